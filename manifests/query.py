"""Questions asked of the manifests, as SQL over Arrow tables: sets in, sets out.

DuckDB does the joins and the hashing, so a million rows take seconds. Views of a log depend
only on the set of its rows, never on the order of its fragments.
"""

from __future__ import annotations

import stat
from pathlib import Path

import duckdb
import pyarrow as pa

from manifests.keys import key, key_sql


def query(sql: str, *parameters: object, **tables: pa.Table) -> pa.Table:
    """Run one SQL statement over the given tables, named as the keywords, and return its rows."""
    with duckdb.connect() as connection:
        for name, table in tables.items():
            connection.register(name, table)
        return connection.sql(sql, params=list(parameters)).to_arrow_table()


def fingerprint(table: pa.Table, columns: list[str]) -> str:
    """A key of the content of `columns`, independent of the order of rows."""
    # As JSON, null differs from an empty text, and ["a, b"] from ["a", "b"].
    fields = [f"coalesce(CAST(to_json({name}) AS VARCHAR), 'null')" for name in columns]
    rows = query(f"SELECT {key_sql(*fields)} AS digest FROM t ORDER BY digest", t=table)
    return key("".join(rows["digest"].to_pylist()))


def current_files(files: pa.Table) -> pa.Table:
    """The newest row per (dataset, path, size, mtime_ns) of the `files` log."""
    return query(
        """
        SELECT * FROM files
        QUALIFY row_number() OVER (
            PARTITION BY dataset, path, size, mtime_ns ORDER BY read_at_ns DESC, content_hash
        ) = 1
        """,
        files=files,
    )


def current_latents(latents: pa.Table, workspace: Path) -> pa.Table:
    """The row that counts for each (pixels_key, vae_key) of the `latents` log.

    Rows whose shard is gone or has another size than it was published with, or whose place a
    `damaged` row names, do not count. Of the rest the `ok` row with the smallest (shard, offset)
    wins, else the newest `failed` one.
    """
    shards = latents["shard"].drop_null().unique().to_pylist()
    sizes = [_size(workspace / shard) for shard in shards]
    present = pa.table(
        {"shard": pa.array(shards, pa.string()), "shard_nbytes": pa.array(sizes, pa.int64())}
    )
    return query(
        """
        SELECT * FROM latents
        WHERE status = 'failed'
           OR (status = 'ok'
               AND (shard, shard_nbytes) IN (SELECT (shard, shard_nbytes) FROM present)
               AND NOT EXISTS (SELECT 1 FROM latents AS damaged
                               WHERE damaged.status = 'damaged'
                                 AND damaged.shard = latents.shard
                                 AND damaged."offset" = latents."offset"))
        QUALIFY row_number() OVER (
            PARTITION BY pixels_key, vae_key
            ORDER BY status = 'ok' DESC, shard, "offset", written_at_ns DESC, reason
        ) = 1
        """,
        latents=latents,
        present=present,
    )


def _size(path: Path) -> int | None:
    """The size of a file in bytes; None where there is none."""
    try:
        facts = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return facts.st_size if stat.S_ISREG(facts.st_mode) else None


def current_prompts(prompts: pa.Table) -> pa.Table:
    """The row that counts for each (prompt_key, tokenizer_key): `ok` first, then the newest."""
    return query(
        """
        SELECT * FROM prompts
        QUALIFY row_number() OVER (
            PARTITION BY prompt_key, tokenizer_key
            ORDER BY status = 'ok' DESC, written_at_ns DESC, text
        ) = 1
        """,
        prompts=prompts,
    )
