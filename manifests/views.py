"""Views of the logs: of all that was ever appended, the rows that count now.

They depend only on the set of rows, never on the order of fragments. Rows are put in order only
where several have the same key, which is rare: to sort a whole log would take the time and memory
of all its columns. For the same reason callers name the columns that they need.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa

from manifests.query import Source, query
from manifests.schema import FILES, LATENTS, PROMPTS, Manifest

#: Of the rows with one key, the first in this order counts.
_LATENTS_ORDER = """status = 'ok' DESC, shard, "offset", written_at_ns DESC, reason"""
FILES_ORDER = "read_at_ns DESC, content_hash"
_PROMPTS_ORDER = "status = 'ok' DESC, written_at_ns DESC, text"


def current_files(files: pa.Table | Source) -> pa.Table:
    """The newest row per (dataset, path, size, mtime_ns) of the `files` log."""
    return query(
        f"""
        WITH candidates AS NOT MATERIALIZED (SELECT * FROM files)
        {_first_of_each(FILES, FILES.schema.names, FILES_ORDER)}
        """,
        files=files,
    )


def current_latents(
    latents: pa.Table | Source,
    workspace: Path,
    vae_key: str | None = None,
    columns: Sequence[str] = LATENTS.schema.names,
    locate: Callable[[str], Path] | None = None,
) -> pa.Table:
    """The row that counts for each (pixels_key, vae_key) of the `latents` log.

    Rows whose shard is gone or has another size than it was published with, or whose place a
    `damaged` row names, do not count. Of the rest the `ok` row with the smallest (shard, offset)
    wins, else the newest `failed` one. With `vae_key` only the rows of that VAE are looked for.
    `locate` gives a shard's file, and may raise; without it any path from the workspace will do.
    """
    shards = query(
        """
        SELECT DISTINCT shard, shard_nbytes FROM latents
        WHERE status = 'ok' AND ($1 IS NULL OR vae_key = $1)
        """,
        vae_key,
        latents=latents,
    )
    place = locate or workspace.joinpath
    sizes = {shard: file_size(place(shard)) for shard in shards["shard"].unique().to_pylist()}
    present = pa.Table.from_pylist(
        [row for row in shards.to_pylist() if sizes[row["shard"]] == row["shard_nbytes"]],
        schema=shards.schema,
    )
    return query(
        f"""
        WITH damaged AS (SELECT shard, "offset" FROM latents WHERE status = 'damaged'),
        good AS NOT MATERIALIZED (
            SELECT * FROM latents
            SEMI JOIN present USING (shard, shard_nbytes)
            ANTI JOIN damaged USING (shard, "offset")
            WHERE status = 'ok' AND ($1 IS NULL OR vae_key = $1)
        ), candidates AS NOT MATERIALIZED (
            SELECT * FROM good
            UNION ALL
            SELECT * FROM latents WHERE status = 'failed' AND ($1 IS NULL OR vae_key = $1)
        )
        {_first_of_each(LATENTS, columns, _LATENTS_ORDER)}
        """,
        vae_key,
        latents=latents,
        present=present,
    )


def file_size(path: Path) -> int | None:
    """The size of a regular file in bytes; None where there is none."""
    try:
        facts = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return facts.st_size if stat.S_ISREG(facts.st_mode) else None


def current_prompts(
    prompts: pa.Table | Source,
    tokenizer_key: str | None = None,
    columns: Sequence[str] = PROMPTS.schema.names,
) -> pa.Table:
    """The row that counts for each (prompt_key, tokenizer_key): `ok` first, then the newest.

    With `tokenizer_key` only the rows of that tokenizer are looked for.
    """
    return query(
        f"""
        WITH candidates AS NOT MATERIALIZED (
            SELECT * FROM prompts WHERE $1 IS NULL OR tokenizer_key = $1
        )
        {_first_of_each(PROMPTS, columns, _PROMPTS_ORDER)}
        """,
        tokenizer_key,
        prompts=prompts,
    )


def _first_of_each(manifest: Manifest, columns: Sequence[str], order: str) -> str:
    """The end of a statement: `columns` of the first row, by `order`, of each key in `candidates`.

    What begins the statement has defined `candidates`, with the columns of `manifest`.
    """
    keys = ", ".join(manifest.key)
    wanted = ", ".join(f'"{column}"' for column in columns)
    return f"""
        , contested AS (SELECT {keys} FROM candidates GROUP BY ALL HAVING count(*) > 1)
        SELECT {wanted} FROM candidates ANTI JOIN contested USING ({keys})
        UNION ALL
        SELECT {wanted} FROM (
            SELECT * FROM candidates SEMI JOIN contested USING ({keys})
            QUALIFY row_number() OVER (PARTITION BY {keys} ORDER BY {order}) = 1
        )
        """
