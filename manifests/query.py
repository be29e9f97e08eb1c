"""Questions asked of the manifests, as SQL: sets in, sets out.

DuckDB does the joins and the hashing, so a million rows take seconds. It reads the columns that
a question needs straight from the Parquet files, so that memory is bounded by the answer. Views
of a log depend only on the set of its rows, never on the order of its fragments.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from manifests import parquet
from manifests.keys import key, key_sql
from manifests.schema import Manifest

#: What DuckDB may hold while it streams, for it would fill all memory before it spills.
STREAM_MEMORY = "256MB"


@dataclass(frozen=True)
class Source:
    """The rows of a manifest, read from the files that `files` names when a question is asked."""

    manifest: Manifest
    files: Callable[[], list[Path]]


def query(sql: str, *parameters: object, **tables: pa.Table | Source) -> pa.Table:
    """Run one SQL statement over the given tables, named as the keywords, and return its rows.

    Raises `ManifestError` naming the file where a manifest is damaged.
    """
    while True:
        files = _files(tables)
        try:
            with _opened(tables, files) as connection:
                return connection.sql(sql, params=list(parameters)).to_arrow_table()
        except (duckdb.Error, UnicodeDecodeError) as error:
            # A listed fragment may have been merged and removed since: ask the new ones.
            if files != _files(tables):
                continue
            _name_damage(tables, files, error)
            raise


def stream(
    sql: str, *parameters: object, rows: int, **tables: pa.Table | Source
) -> Iterator[pa.Table]:
    """The same rows as `query` gives, in its order, as tables of about `rows` rows each.

    For answers that are too wide to be held at once. Those of snapshots only: fragments that
    are merged meanwhile are not asked for again.
    """
    files = _files(tables)
    try:
        with _opened(tables, files, memory_limit=STREAM_MEMORY) as connection:
            for batch in connection.sql(sql, params=list(parameters)).to_arrow_reader(rows):
                yield pa.Table.from_batches([batch])
    except (duckdb.Error, UnicodeDecodeError, pa.ArrowException, OSError) as error:
        _name_damage(tables, files, error)
        raise


_lock = threading.Lock()


@cache
def _database(process: int, settings: tuple[tuple[str, str], ...]) -> duckdb.DuckDBPyConnection:
    """An empty database of this process, kept because opening one takes ten times as long as a
    small question. A forked child needs one of its own, since threads do not pass a fork."""
    config: dict[str, Any] = {
        # Where DuckDB spills what does not fit into memory; its default is the current folder.
        "temp_directory": tempfile.gettempdir(),
        # Else it would keep what it read of manifests for as long as the process lives.
        "enable_external_file_cache": False,
        # Whatever a question needs comes with the library; nothing is to be fetched for it.
        "autoinstall_known_extensions": False,
        **dict(settings),
    }
    database = duckdb.connect(config=config)
    # Footers are small, and one command reads those of a thousand fragments again and again.
    database.sql("SET GLOBAL parquet_metadata_cache = true")
    return database


def _files(tables: dict[str, pa.Table | Source]) -> dict[str, list[Path]]:
    """By name, the files of those tables that are read from files."""
    return {name: table.files() for name, table in tables.items() if isinstance(table, Source)}


@contextmanager
def _opened(
    tables: dict[str, pa.Table | Source], files: dict[str, list[Path]], **settings: str
) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection that knows `tables` by their names."""
    with _lock:
        connection = _database(os.getpid(), tuple(settings.items())).cursor()
    with connection:
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
            connection.sql(f"CREATE TEMP VIEW {name} AS SELECT {columns} FROM ({rows})")
        yield connection


def _name_damage(
    tables: dict[str, pa.Table | Source], files: dict[str, list[Path]], error: Exception
) -> None:
    """Raise `ManifestError` from `error` where one of `files` is damaged; else do nothing."""
    for name, paths in files.items():
        table = tables[name]
        assert isinstance(table, Source)  # only these have files
        for path in paths:
            if fault := parquet.damage(path):
                raise parquet.damaged(path, table.manifest, fault) from error


def fingerprint(
    rows: pa.Table | Source, columns: list[str], where: str = "true", *parameters: object
) -> str:
    """A key of the content of `columns` in the rows that fulfil `where`, whatever their order.

    It is made of the sums of the rows' keys, so that any number of rows takes no memory.
    """
    # As JSON, null differs from an empty text, and ["a, b"] from ["a", "b"].
    row_key = key_sql(f"to_json(struct_pack({', '.join(columns)}))")
    found = query(
        f"""
        SELECT count(*), coalesce(sum(('0x' || left(row_key, 16))::UBIGINT), 0)::VARCHAR,
               coalesce(sum(('0x' || right(row_key, 16))::UBIGINT), 0)::VARCHAR
        FROM (SELECT {row_key} AS row_key FROM t WHERE {where})
        """,
        *parameters,
        t=rows,
    )
    return key(*(column[0].as_py() for column in found.columns))
