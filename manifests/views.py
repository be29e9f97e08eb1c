"""Views of the logs: of all that was ever appended, the rows that count now.

They depend only on the set of rows, never on the order of fragments. Rows are put in order only
where several have the same key, which is rare: to sort a whole log would take the time and memory
of all its columns. For the same reason callers name the columns that they need. Each question is
put to the log once, since to open hundreds of fragments takes longer than to answer it.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from manifests.query import Source, query
from manifests.schema import FILES, LATENTS, PROMPTS, Manifest

#: Of the rows with one key, the first in this order counts.
_LATENTS_ORDER = """status = 'ok' DESC, shard, "offset", written_at_ns DESC, reason"""
FILES_ORDER = "read_at_ns DESC, content_hash"
_PROMPTS_ORDER = "status = 'ok' DESC, written_at_ns DESC, text"


def current_files(files: pa.Table | Source) -> pa.Table:
    """The newest row per (dataset, path, size, mtime_ns) of the `files` log."""
    return _first_of_each(
        FILES, FILES.schema.names, FILES_ORDER, "SELECT * FROM files", files=files
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
    places = query(
        """
        SELECT DISTINCT status, shard, shard_nbytes,
               CASE status WHEN 'damaged' THEN "offset" END AS "offset"
        FROM latents
        WHERE status = 'damaged' OR (status = 'ok' AND ($1 IS NULL OR vae_key = $1))
        """,
        vae_key,
        latents=latents,
    )
    is_ok = pc.equal(places["status"], "ok")
    shards = places.filter(is_ok).select(["shard", "shard_nbytes"])
    place = locate or workspace.joinpath
    sizes = {shard: file_size(place(shard)) for shard in shards["shard"].unique().to_pylist()}
    present = pa.Table.from_pylist(
        [row for row in shards.to_pylist() if sizes[row["shard"]] == row["shard_nbytes"]],
        schema=shards.schema,
    )
    return _first_of_each(
        LATENTS,
        columns,
        _LATENTS_ORDER,
        """
        SELECT * FROM latents WHERE ($1 IS NULL OR vae_key = $1) AND (
            status = 'failed' OR (
                status = 'ok'
                AND EXISTS (
                    FROM present p
                    WHERE p.shard = latents.shard AND p.shard_nbytes = latents.shard_nbytes
                )
                AND NOT EXISTS (
                    FROM damaged d WHERE d.shard = latents.shard AND d."offset" = latents."offset"
                )
            )
        )
        """,
        vae_key,
        latents=latents,
        present=present,
        damaged=places.filter(pc.invert(is_ok)),
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
    return _first_of_each(
        PROMPTS,
        columns,
        _PROMPTS_ORDER,
        "SELECT * FROM prompts WHERE $1 IS NULL OR tokenizer_key = $1",
        tokenizer_key,
        prompts=prompts,
    )


def _first_of_each(
    manifest: Manifest,
    columns: Sequence[str],
    order: str,
    candidates: str,
    *parameters: object,
    **tables: pa.Table | Source,
) -> pa.Table:
    """`columns` of the first row, by `order`, of each key among the rows that `candidates` gives.

    `candidates` is a statement that asks `tables`, and gives all columns of `manifest`. Those
    that have a key in common are asked for again, with what their order needs.
    """
    keys = ", ".join(manifest.key)
    wanted = ", ".join(f'"{column}"' for column in columns)
    needed = ", ".join(f'"{column}"' for column in dict.fromkeys([*columns, *manifest.key]))
    rows = query(f"SELECT {needed} FROM ({candidates})", *parameters, **tables)
    contested = query(f"SELECT {keys} FROM rows GROUP BY ALL HAVING count(*) > 1", rows=rows)
    if not contested.num_rows:
        return rows.select(columns)
    return query(
        f"""
        SELECT {wanted} FROM rows ANTI JOIN contested USING ({keys})
        UNION ALL
        SELECT {wanted} FROM (
            SELECT * FROM ({candidates}) SEMI JOIN contested USING ({keys})
            QUALIFY row_number() OVER (PARTITION BY {keys} ORDER BY {order}) = 1
        )
        """,
        *parameters,
        rows=rows,
        contested=contested,
        **tables,
    )
