"""Questions asked of the manifests, as SQL: sets in, sets out.

DuckDB does the joins and the hashing, so a million rows take seconds. It reads the columns that
a question needs straight from the Parquet files, so that memory is bounded by the answer. Views
of a log depend only on the set of its rows, never on the order of its fragments.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from manifests import parquet
from manifests.errors import ManifestError
from manifests.keys import key, key_sql
from manifests.schema import Manifest


@dataclass(frozen=True)
class Source:
    """The rows of a manifest, read from the files that `files` names when a question is asked."""

    manifest: Manifest
    files: Callable[[], list[Path]]


def query(sql: str, *parameters: object, **tables: pa.Table | Source) -> pa.Table:
    """Run one SQL statement over the given tables, named as the keywords, and return its rows.

    Raises `ManifestError` naming the file where a manifest is damaged.
    """
    sources = {name: table for name, table in tables.items() if isinstance(table, Source)}
    while True:
        files = {name: source.files() for name, source in sources.items()}
        try:
            return _answer(sql, parameters, tables, files)
        except (duckdb.Error, UnicodeDecodeError) as error:
            # A listed fragment may have been merged and removed since: ask the new ones.
            if files != {name: source.files() for name, source in sources.items()}:
                continue
            for name, source in sources.items():
                for path in files[name]:
                    if fault := parquet.damage(path):
                        raise ManifestError(
                            f"{path} is damaged: {fault}. Move it away and run `omnigen-pipe "
                            f"{source.manifest.stage}`, which makes again what it held."
                        ) from error
            raise


def _answer(
    sql: str,
    parameters: tuple[object, ...],
    tables: dict[str, pa.Table | Source],
    files: dict[str, list[Path]],
) -> pa.Table:
    # Where DuckDB spills what does not fit into memory; its own default is the current folder.
    config: dict[str, Any] = {"temp_directory": tempfile.gettempdir()}
    with duckdb.connect(config=config) as connection:
        for name, table in tables.items():
            if not isinstance(table, Source):
                connection.register(name, table)
                continue
            # The empty table gives columns that none of the files has yet.
            connection.register(f"{name}_empty", table.manifest.empty())
            rows = f"SELECT * FROM {name}_empty"
            if files[name]:
                listed = ", ".join("'" + str(p).replace("'", "''") + "'" for p in files[name])
                rows += (
                    " UNION ALL BY NAME "
                    f"SELECT * FROM read_parquet([{listed}], union_by_name = true)"
                )
            columns = ", ".join(f'"{column}"' for column in table.manifest.schema.names)
            connection.sql(f"CREATE VIEW {name} AS SELECT {columns} FROM ({rows})")
        return connection.sql(sql, params=list(parameters)).to_arrow_table()


def fingerprint(rows: pa.Table | Source, columns: list[str]) -> str:
    """A key of the content of `columns`, independent of the order of rows."""
    # As JSON, null differs from an empty text, and ["a, b"] from ["a", "b"].
    fields = [f"coalesce(CAST(to_json({name}) AS VARCHAR), 'null')" for name in columns]
    found = query(
        f"SELECT string_agg(digest, '' ORDER BY digest) AS digests "
        f"FROM (SELECT {key_sql(*fields)} AS digest FROM t)",
        t=rows,
    )
    return key(found["digests"][0].as_py() or "")
