"""Views of the logs: of all that was ever appended, the rows that count now.

They depend only on the set of rows, never on the order of fragments.
"""

from __future__ import annotations

import stat
from pathlib import Path

import pyarrow as pa

from manifests.query import Source, query


def current_files(files: pa.Table | Source) -> pa.Table:
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


def current_latents(
    latents: pa.Table | Source, workspace: Path, vae_key: str | None = None
) -> pa.Table:
    """The row that counts for each (pixels_key, vae_key) of the `latents` log.

    Rows whose shard is gone or has another size than it was published with, or whose place a
    `damaged` row names, do not count. Of the rest the `ok` row with the smallest (shard, offset)
    wins, else the newest `failed` one. With `vae_key` only the rows of that VAE are looked for.
    """
    shards = query(
        "SELECT DISTINCT shard, shard_nbytes FROM latents WHERE status = 'ok'", latents=latents
    )
    sizes = {shard: _size(workspace / shard) for shard in shards["shard"].unique().to_pylist()}
    present = pa.Table.from_pylist(
        [row for row in shards.to_pylist() if sizes[row["shard"]] == row["shard_nbytes"]],
        schema=shards.schema,
    )
    return query(
        """
        WITH damaged AS (SELECT shard, "offset" FROM latents WHERE status = 'damaged'),
        good AS (
            SELECT * FROM latents
            SEMI JOIN present USING (shard, shard_nbytes)
            ANTI JOIN damaged USING (shard, "offset")
            WHERE status = 'ok' AND ($1 IS NULL OR vae_key = $1)
        ), candidates AS (
            SELECT * FROM good
            UNION ALL
            SELECT * FROM latents WHERE status = 'failed' AND ($1 IS NULL OR vae_key = $1)
        )
        SELECT * FROM candidates
        QUALIFY row_number() OVER (
            PARTITION BY pixels_key, vae_key
            ORDER BY status = 'ok' DESC, shard, "offset", written_at_ns DESC, reason
        ) = 1
        """,
        vae_key,
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


def current_prompts(prompts: pa.Table | Source, tokenizer_key: str | None = None) -> pa.Table:
    """The row that counts for each (prompt_key, tokenizer_key): `ok` first, then the newest.

    With `tokenizer_key` only the rows of that tokenizer are looked for.
    """
    return query(
        """
        SELECT * FROM prompts WHERE $1 IS NULL OR tokenizer_key = $1
        QUALIFY row_number() OVER (
            PARTITION BY prompt_key, tokenizer_key
            ORDER BY status = 'ok' DESC, written_at_ns DESC, text
        ) = 1
        """,
        tokenizer_key,
        prompts=prompts,
    )
