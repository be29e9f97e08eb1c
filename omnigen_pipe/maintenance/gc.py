"""gc: give back the space of what neither the configuration nor any run needs.

Latents that are still needed move out of shards that are mostly unused, hold damage, or are
small. Then one merged fragment replaces those that name the emptied shards, without their rows:
its publication is the commit. Emptied shards and orphans are deleted a day later, so
that whoever looked them up before still finds them. Killed at any instant, it leaves latents
twice at worst, of which one counts, and the next gc clears up.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from manifests import parquet
from manifests.errors import PipeError
from manifests.lock import maintenance_lock
from manifests.log import GRACE_SECONDS, Listing
from manifests.parquet import check_undamaged
from manifests.query import Source, fingerprint, query
from manifests.views import current_latents
from omnigen_pipe.images.samples import current_samples
from omnigen_pipe.latents.packing import Packed, pack
from omnigen_pipe.latents.vae import inputs_key, vae_inputs
from omnigen_pipe.maintenance.needs import needed_by_runs, needed_latents
from omnigen_pipe.maintenance.rubbish import delete, leftovers, orphans
from omnigen_pipe.model_files import model_part
from omnigen_pipe.progress import Progress
from omnigen_pipe.settings import as_text
from omnigen_pipe.summary import Summary
from omnigen_pipe.workspace import Workspace

#: A shard of whose bytes a smaller share is needed is rewritten.
LIVE_SHARE = 0.5

#: A shard smaller than this share of `shard_size_mb` is packed with others.
SMALL_SHARE = 0.25

#: Why a shard with places that `verify --repair` marked is given up.
DAMAGED = "it holds damaged latents"

_MEBIBYTE = 1024 * 1024


@dataclass(frozen=True)
class Plan:
    """What a gc would do: the shards to give up, and the latents to move out of them.

    `shards` has, per shard that is to go, `bucket`, `nbytes`, `live` (latents needed), `why`
    and `there`; `moves` are rows of the log.
    """

    shards: pa.Table
    moves: pa.Table


def run(
    workspace: Workspace,
    progress: Progress,
    yes: bool = False,
    grace_seconds: float = GRACE_SECONDS,
    live_share: float = LIVE_SHARE,
) -> Summary:
    """Say what can go, and with `yes` remove it.

    Raises `PipeError` where it is not known what is needed, or what is there.
    """
    _check_logs(workspace)
    if not yes:
        plan = _plan(workspace, workspace.latents.listing(), _needs(workspace), live_share)
        return _planned(workspace, plan, grace_seconds)
    with maintenance_lock(workspace.maintenance_lock) as held:
        if not held:
            raise PipeError(
                f"Another process maintains this workspace: it holds {workspace.maintenance_lock}. "
                "Run gc again when it has ended."
            )
        return _collect(workspace, progress, grace_seconds, live_share)


def _collect(
    workspace: Workspace, progress: Progress, grace_seconds: float, live_share: float
) -> Summary:
    needs = _needs(workspace)
    _rescue(workspace, needs)
    before = workspace.latents.listing()
    plan = _plan(workspace, before, needs, live_share)
    marked = set(plan.shards.filter(pc.equal(plan.shards["why"], DAMAGED))["shard"].to_pylist())
    with progress.task("gc: bytes moved", _total(plan.moves)) as advance:
        packed = pack(plan.moves, workspace, workspace.latents.inputs(), marked, advance)
    if plan.shards.num_rows:
        _commit(workspace, before, plan, set(packed.faults), needs)
        # What came into use meanwhile, say by a run that froze its samples, comes back.
        _rescue(workspace, needed_by_runs(workspace))
    return _collected(workspace, plan, packed, grace_seconds)


def _check_logs(workspace: Workspace) -> None:
    """Raise `PipeError` where a log cannot be trusted to say what is needed and what is there."""
    for log in (workspace.files, workspace.latents, workspace.prompts):
        listing = log.listing()
        if listing.torn:
            raise PipeError(
                f"{listing.torn[0]} is damaged, and what it held is not known: its shards would "
                f"pass for orphans. Restore it, or move it away and run `omnigen-pipe "
                f"{log.manifest.stage}`; then run gc again."
            )
    check_undamaged(workspace.latents.fragments(), workspace.latents.manifest)
    if workspace.samples.exists():
        check_undamaged([workspace.samples.path], workspace.samples.manifest)


def _rescue(workspace: Workspace, needs: pa.Table) -> None:
    """Append again what `needs` of the latents that only replaced fragments still name."""
    listing, log = workspace.latents.listing(), workspace.latents
    if not listing.replaced:
        return
    every = Source(log.manifest, lambda: [f.path for f in (*listing.current, *listing.replaced)])
    rows = query(
        """
        SELECT * FROM before SEMI JOIN needs USING (pixels_key, vae_key)
        ANTI JOIN (SELECT pixels_key, vae_key FROM now WHERE status = 'ok')
            USING (pixels_key, vae_key)
        WHERE status = 'ok'
        """,
        before=current_latents(every, workspace.root),
        now=current_latents(log.source(), workspace.root),
        needs=needs,
    )
    if rows.num_rows:
        log.append(rows, inputs=as_text(log.inputs()), fingerprint=fingerprint(rows, ["shard"]))


def _needs(workspace: Workspace) -> pa.Table:
    """What is needed now; raises `PipeError` where samples.parquet does not say."""
    inputs = vae_inputs(workspace, model_part(workspace, "vae"), remember=False)
    return needed_latents(workspace, current_samples(workspace), inputs_key(inputs))


def _plan(workspace: Workspace, listing: Listing, needs: pa.Table, live_share: float) -> Plan:
    """Which shards of the log as `listing` shows it are to go, and which latents to save."""
    latents = Source(workspace.latents.manifest, lambda: [f.path for f in listing.current])
    live = query(
        "SELECT * FROM counting SEMI JOIN needs USING (pixels_key, vae_key) WHERE status = 'ok'",
        counting=current_latents(latents, workspace.root),
        needs=needs,
    )
    # A shard that is gone, say with an unmounted disk, and held what is needed, may come back.
    missed = query(
        """
        SELECT DISTINCT shard FROM latents SEMI JOIN needs USING (pixels_key, vae_key)
        ANTI JOIN live USING (pixels_key, vae_key)
        ANTI JOIN (SELECT shard, "offset" FROM latents WHERE status = 'damaged')
            USING (shard, "offset")
        WHERE status = 'ok'
        """,
        latents=latents,
        needs=needs,
        live=live.select(["pixels_key", "vae_key"]),
    )
    shards = query(
        """
        WITH live AS (
            SELECT shard, count(*) AS live, sum(nbytes) AS live_nbytes FROM live GROUP BY shard
        ), every AS (
            SELECT shard, any_value(bucket) AS bucket, any_value(vae_key) AS vae_key,
                   max(shard_nbytes) AS nbytes, sum(nbytes) AS array_nbytes
            FROM latents ANTI JOIN missed USING (shard) WHERE status = 'ok' GROUP BY shard
        ), damaged AS (SELECT DISTINCT shard FROM latents WHERE status = 'damaged'),
        judged AS (
            SELECT every.*, coalesce(live, 0)::BIGINT AS live,
                   coalesce(live_nbytes, 0)::BIGINT AS live_nbytes,
                   CASE WHEN coalesce(live, 0) = 0 THEN 'nothing in it is needed'
                        WHEN shard IN (FROM damaged) THEN $4
                        WHEN live_nbytes < $1 * array_nbytes THEN 'most of it is not needed'
                        WHEN nbytes < $2 * $3 THEN 'it is small' END AS why
            FROM every LEFT JOIN live USING (shard)
        ), grouped AS (
            -- Packing is worth it where fewer shards come out than go in.
            SELECT *,
                   ceil(sum(live_nbytes) FILTER (why IS NOT NULL AND live > 0) OVER w / $3)
                   < count(*) FILTER (why IS NOT NULL AND live > 0) OVER w AS worth
            FROM judged WINDOW w AS (PARTITION BY vae_key, bucket)
        )
        SELECT shard, bucket, nbytes, live, why FROM grouped
        WHERE why IS NOT NULL AND (why <> 'it is small' OR worth)
        ORDER BY shard
        """,
        live_share,
        SMALL_SHARE,
        workspace.config.vae.shard_size_mb * _MEBIBYTE,
        DAMAGED,
        latents=latents,
        live=live.select(["shard", "nbytes"]),
        missed=missed,
    )
    there = [(workspace.root / shard).is_file() for shard in shards["shard"].to_pylist()]
    shards = shards.append_column("there", pa.array(there, pa.bool_()))
    moves = query(
        "SELECT * FROM live SEMI JOIN shards USING (shard)",
        live=live,
        shards=shards.select(["shard"]),
    )
    return Plan(shards, moves)


def _commit(
    workspace: Workspace, before: Listing, plan: Plan, kept: set[str], needs: pa.Table
) -> None:
    """Publish the log without the shards that go, except those `kept`; see the module."""
    going = {shard for shard in plan.shards["shard"].to_pylist() if shard not in kept}
    gone = pa.table({"shard": pa.array(sorted(going), pa.string())})

    def keep(rows: pa.Table) -> pa.Table:
        return query(
            """
            SELECT rows.* FROM rows LEFT JOIN needs USING (pixels_key, vae_key)
            WHERE CASE WHEN rows.status = 'failed' THEN needs.pixels_key IS NOT NULL
                       ELSE rows.shard NOT IN (SELECT shard FROM gone) END
            """,
            rows=rows,
            needs=needs,
            gone=gone,
        )

    # The others stay as they are, and so does what others appended since `before`.
    named = ((f, parquet.read(f.path, workspace.latents.manifest)) for f in before.current)
    concerned = [f for f, rows in named if not going.isdisjoint(rows["shard"].to_pylist())]
    workspace.latents.merge(concerned, keep)


def _planned(workspace: Workspace, plan: Plan, grace_seconds: float) -> Summary:
    """The summary of a dry run."""
    summary = _summary(workspace, plan, grace_seconds)
    if any(summary.counts.values()):
        summary.unchanged = "planned"
        summary.notes.append("Nothing was changed: `omnigen-pipe gc --yes` does it.")
    return summary


def _collected(workspace: Workspace, plan: Plan, packed: Packed, grace_seconds: float) -> Summary:
    """Delete what may go, and say what was done."""
    summary = _summary(workspace, plan, grace_seconds)
    delete(workspace, grace_seconds)
    summary.changed = any(summary.counts.values())
    summary.details["bytes_written"] = packed.bytes_written
    if packed.faults:
        summary.failed = True
        summary.details["faults"] = packed.faults
        shard, fault = next(iter(packed.faults.items()))
        summary.notes.append(
            f"{len(packed.faults)} shards were left as they are. {shard}: {fault} Run "
            "`omnigen-pipe verify --repair`, `omnigen-pipe encode-vae`, and gc again."
        )
    return summary


def _summary(workspace: Workspace, plan: Plan, grace_seconds: float) -> Summary:
    """What goes, by kind, before anything is deleted."""
    shards, unfinished = orphans(workspace, grace_seconds), leftovers(workspace, grace_seconds)
    given_up = plan.shards.filter(plan.shards["there"])
    summary = Summary(
        "gc",
        changed=False,
        unchanged="nothing to collect",
        counts={
            "shards given up": plan.shards.num_rows,
            "latents moved": plan.moves.num_rows,
            "orphans deleted": len(shards.old),
            "unfinished files deleted": len(unfinished.old),
            "bytes freed": shards.old_bytes() + unfinished.old_bytes(),
        },
        details={
            "shards": plan.shards.to_pylist(),
            "bytes_given_up": _total(given_up),
            "bytes_moved": _total(plan.moves),
            "bytes_waiting": shards.young_bytes(),
        },
    )
    hours = f"{grace_seconds / 3600:g} hours"
    if given_up.num_rows:
        later = (
            f"The old ones can be deleted by a gc {hours} later, so that whoever looked them up "
            "before still finds them."
        )
        summary.notes.append(
            f"{_total(given_up):,} bytes of shards are given up, and {_total(plan.moves):,} bytes "
            "in them move to new ones. "
            + (later if grace_seconds else "With no grace, the old ones are deleted at once.")
        )
    if shards.young:
        summary.notes.append(
            f"{len(shards.young):,} shards ({shards.young_bytes():,} bytes) that the log does not "
            f"name, or no longer names, wait until they are {hours} old."
        )
    return summary


def _total(rows: pa.Table) -> int:
    """The bytes of `rows` together."""
    return int(pc.sum(rows["nbytes"]).as_py() or 0)
