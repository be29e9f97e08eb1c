"""verify: compare every shard and every manifest with what was written.

Every `ok` row of the latents log is checked, also of other VAEs and also where another row for
the same key is the one that counts: what is passed over today may be what counts tomorrow. Only
places that a `damaged` row names are left out. No lock is taken: shards and fragments never
change once they are published, and a repair only appends.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import pyarrow as pa

from manifests.query import Source, fingerprint, query
from manifests.schema import LATENTS
from omnigen_pipe.latents.checking import Checked, check_shard
from omnigen_pipe.latents.shards import ShardError, shard_path
from omnigen_pipe.maintenance.manifest_files import ManifestFiles, check_manifest_files
from omnigen_pipe.progress import Progress
from omnigen_pipe.stop import StopRequest, stop_on_signal
from omnigen_pipe.summary import Summary
from omnigen_pipe.workspace import Workspace

#: Shards that are read at once. Hashing costs little: it is the disk that has to be kept busy.
_READERS = 4

#: So many damaged shards, manifests and foreign files are named in notes; the JSON names all.
_NAMED = 5

_GIBIBYTE = 2**30

#: The problem of rows that no repair can mend: the stages refuse a log that has them.
ELSEWHERE = "its shard does not lie in the workspace's latents/"

#: Places that a `damaged` row names already.
_MARKED = """
    marked AS (
        SELECT DISTINCT shard, "offset" FROM latents
        WHERE status = 'damaged' AND shard IS NOT NULL AND "offset" IS NOT NULL
    )
"""


@dataclass
class _Shards:
    """What comparing the shards found: how much was compared, and a problem for each bad place."""

    shards: int = 0
    latents: int = 0
    bytes_read: int = 0
    problems: dict[tuple[str | None, int | None], str] = field(default_factory=dict)


def run(
    workspace: Workspace, progress: Progress, quick: bool = False, repair: bool = False
) -> Summary:
    """Check the workspace; `failed` where damage was found that `repair` did not mark.

    `quick` compares the sizes of shards only. `repair` appends a `damaged` row for every damaged
    latent, so that the next encode-vae makes again those that are wanted. Raises `ManifestError`
    for a manifest that a newer version wrote.
    """
    manifests = ManifestFiles() if quick else check_manifest_files(workspace, progress)
    log = workspace.latents
    latents = Source(LATENTS, lambda: [p for p in log.fragments() if p not in manifests.damaged])
    rows = _promises(latents)
    with stop_on_signal() as stop:
        found = _check_shards(workspace, progress, rows, quick, stop)
    faults = _still_there(latents, found).to_pylist()
    marked = _mark(workspace, faults) if repair else set()

    summary = Summary(
        "verify",
        changed=bool(marked),
        counts={
            "manifests": manifests.checked,
            "shards": found.shards,
            "latents": found.latents,
            "bytes checked": found.bytes_read,
            "damaged manifests": len(manifests.damaged),
            "damaged shards": len({fault["shard"] for fault in faults}),
            "damaged latents": len(faults),
            "marked": len(marked),
        },
        unchanged="",
        signal=stop.signal,
    )
    unmarked = [fault for fault in faults if (fault["shard"], fault["offset"]) not in marked]
    summary.failed = bool(manifests.damaged or unmarked)
    if stop.signal is not None:
        summary.notes.append("Stopped by a signal: not everything was checked.")
    elif not faults and not manifests.damaged:
        summary.unchanged = "all sizes as published" if quick else "all as it was written"
    _describe_manifests(summary, manifests, workspace)
    _describe_faults(summary, faults, bool(unmarked))
    return summary


def _promises(latents: Source) -> pa.Table:
    """What the log promises of shards, by shard and offset; `touched` where rows are marked.

    Without keys and names but the shard's, so that a million rows fit into memory.
    """
    return query(
        f"""
        WITH {_MARKED}
        SELECT shard, "offset", nbytes, checksum, shape, dtype, shard_nbytes, shard_checksum,
               coalesce(shard IN (SELECT shard FROM marked), false) AS touched
        FROM latents ANTI JOIN marked USING (shard, "offset")
        WHERE status = 'ok' ORDER BY shard, "offset"
        """,
        latents=latents,
    )


def _check_shards(
    workspace: Workspace, progress: Progress, rows: pa.Table, quick: bool, stop: StopRequest
) -> _Shards:
    """Compare every shard with its rows, several at once, until the end or a stop request."""
    shards = query(
        """
        SELECT shard, count(*) AS latents, coalesce(max(shard_nbytes), 0) AS nbytes
        FROM rows GROUP BY shard ORDER BY shard
        """,
        rows=rows,
    ).to_pylist()
    start = 0
    for shard in shards:
        shard["start"], start = start, start + shard["latents"]

    def check(shard: dict[str, Any]) -> tuple[list[dict[str, Any]], Checked] | None:
        if stop.signal is not None:
            return None
        promised = rows.slice(shard["start"], shard["latents"]).to_pylist()
        try:
            path = shard_path(workspace.root, shard["shard"] or "")
        except ShardError:
            return promised, Checked([ELSEWHERE] * len(promised))
        touched = promised[0]["touched"]
        return promised, check_shard(path, promised, quick=quick, marked=touched)

    found = _Shards()
    total = len(shards) if quick else sum(shard["nbytes"] for shard in shards)
    with (
        progress.task("verify shards" if quick else "verify bytes", total) as advance,
        ThreadPoolExecutor(_READERS, thread_name_prefix="verify") as pool,
    ):
        for shard, outcome in zip(shards, pool.map(check, shards), strict=True):
            if outcome is None:
                break
            promised, checked = outcome
            found.shards += 1
            found.latents += len(promised)
            found.bytes_read += checked.bytes_read
            for row, problem in zip(promised, checked.problems, strict=True):
                if problem:
                    found.problems.setdefault((row["shard"], row["offset"]), problem)
            if quick:
                advance(1)
            else:
                advance(shard["nbytes"], f"{found.bytes_read / _GIBIBYTE:.1f} GiB")
    return found


def _still_there(latents: Source, found: _Shards) -> pa.Table:
    """The rows of the log at the places with a problem, as they are now, one per fault.

    The log is asked again since others may have merged fragments, or marked the same places,
    while the shards were read.
    """
    places = pa.Table.from_pylist(
        [
            {"shard": shard, "offset": offset, "problem": problem}
            for (shard, offset), problem in found.problems.items()
        ],
        schema=pa.schema(
            [("shard", pa.string()), ("offset", pa.int64()), ("problem", pa.string())]
        ),
    )
    return query(
        f"""
        WITH {_MARKED}, unmarked AS (
            SELECT * FROM latents ANTI JOIN marked USING (shard, "offset") WHERE status = 'ok'
        )
        SELECT DISTINCT u.pixels_key, u.vae_key, u.bucket, u.shard, u."offset", p.problem
        FROM unmarked AS u JOIN places AS p
        ON u.shard IS NOT DISTINCT FROM p.shard AND u."offset" IS NOT DISTINCT FROM p."offset"
        ORDER BY u.shard, u."offset", u.pixels_key, u.vae_key
        """,
        latents=latents,
        places=places,
    )


def _mark(workspace: Workspace, faults: list[dict[str, Any]]) -> set[tuple[str, int]]:
    """Append a `damaged` row for the place of each fault that has one; returns these places."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for fault in faults:
        if fault["problem"] != ELSEWHERE and fault["offset"] is not None:
            rows.setdefault((fault["shard"], fault["offset"]), fault)
    if rows:
        common = {"status": "damaged", "written_at_ns": time.time_ns()}
        table = pa.Table.from_pylist(
            [{**fault, **common, "reason": fault["problem"]} for fault in rows.values()],
            schema=LATENTS.schema,
        )
        workspace.latents.append(table, fingerprint=fingerprint(table, ["shard", '"offset"']))
    return set(rows)


def _describe_manifests(summary: Summary, found: ManifestFiles, workspace: Workspace) -> None:
    """Name the damaged manifests, each with what to do, and the files that are not ours."""
    damaged = [
        (path.relative_to(workspace.root).as_posix(), manifest.stage, problem)
        for path, (manifest, problem) in found.damaged.items()
    ]
    summary.details["damaged_manifests"] = [
        {"manifest": name, "problem": problem} for name, _, problem in damaged
    ]
    summary.notes += _some(
        [
            f"{name} is damaged: {problem}. Move it away and run `omnigen-pipe {stage}`, which "
            "makes again what it held."
            for name, stage, problem in damaged
        ]
    )
    foreign = [path.relative_to(workspace.root).as_posix() for path in found.foreign]
    summary.details["foreign_files"] = foreign
    summary.notes += _some(
        [f"{name} is not a manifest of omnigen-pipe and is ignored." for name in foreign]
    )


def _describe_faults(summary: Summary, faults: list[dict[str, Any]], unmarked: bool) -> None:
    """Name the damaged shards with their problems, and what to do."""
    names = ("shard", "offset", "pixels_key", "problem")
    summary.details["faults"] = [{name: fault[name] for name in names} for fault in faults]
    lines = []
    for (shard, problem), group in groupby(faults, lambda f: (f["shard"], f["problem"])):
        number = len(list(group))
        lines.append(f"{shard}: {number:,} latent{'s' if number > 1 else ''}: {problem}")
    summary.notes += _some(lines)
    if any(fault["problem"] == ELSEWHERE for fault in faults):
        summary.notes.append(
            "Rows that name a shard elsewhere were not written by omnigen-pipe: remove their "
            "fragments from manifests/latents/, and run `omnigen-pipe encode-vae`."
        )
    elif unmarked:
        summary.notes.append(
            "Run `omnigen-pipe verify --repair`, then `omnigen-pipe encode-vae`, which makes "
            "again what is wanted; and check the disk."
        )
    elif faults:
        summary.notes.append(
            "They are marked as damaged and count no more. Run `omnigen-pipe encode-vae`, which "
            "makes again what is wanted; and check the disk."
        )


def _some(lines: list[str]) -> list[str]:
    """The first of `lines`, and how many more there are."""
    more = len(lines) - _NAMED
    return [*lines[:_NAMED], *([f"and {more:,} more; --json names all"] if more > 0 else [])]
