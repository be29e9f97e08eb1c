"""encode-vae: give every wanted image, in its geometry, a latent.

Reads samples.parquet and the image files; writes shards under latents/ and their fragments
under manifests/latents/. Only what is missing is encoded, and torch is loaded only for that.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from manifests.log import merge_if_crowded
from manifests.query import Source, fingerprint
from omnigen_pipe.images.samples import current_samples
from omnigen_pipe.latents.shards import MASKS_KEY, ShardWriter
from omnigen_pipe.latents.share import Share
from omnigen_pipe.latents.vae import inputs_key, vae_inputs
from omnigen_pipe.latents.wanted import (
    STATUS_COLUMNS,
    known_latents,
    known_masks,
    wanted_latents,
    wanted_masks,
    with_files,
    with_status,
)
from omnigen_pipe.model_files import model_part
from omnigen_pipe.progress import Progress
from omnigen_pipe.settings import as_text
from omnigen_pipe.stop import stop_on_signal
from omnigen_pipe.summary import Summary
from omnigen_pipe.workspace import Workspace

if TYPE_CHECKING:
    from omnigen_pipe.latents.encoder import Item, Outcome

#: Rows that are made work at once.
_ROWS = 4096
#: So many files are named in the summary's notes; the JSON names all.
_NAMED_FILES = 5


def run(
    workspace: Workspace,
    progress: Progress,
    device: str | None = None,
    share: Share | None = None,
    retry_failed: bool = False,
) -> Summary:
    """Encode what is missing; raises `PipeError` where samples are missing or stale.

    Of several encoders each takes its `share`. With `retry_failed`, what failed in an earlier
    run counts as missing.

    A file that is gone or changed since discover, or for which memory is too short, makes the
    summary `failed`; one that cannot be decoded is a fact, remembered and left out.
    """
    share = share or Share()
    samples = current_samples(workspace)
    everything = wanted_latents(samples)
    wanted = share.of(everything)
    folder = model_part(workspace, "vae")
    inputs = vae_inputs(workspace, folder)
    key = inputs_key(inputs)
    wanted = with_status(wanted, known_latents(workspace, key, STATUS_COLUMNS))
    failed = wanted.filter(pc.equal(wanted["status"], "failed"))
    missing = wanted.filter(pc.is_null(wanted["status"]))
    retried = failed.num_rows if retry_failed else 0
    if retried:
        missing = wanted.filter(pc.invert(pc.equal(wanted["status"].fill_null(""), "ok")))
        failed = failed.slice(0, 0)
    failed, missing = (with_files(r, samples) if r.num_rows else r for r in (failed, missing))
    summary = Summary(
        "encode-vae",
        changed=False,
        counts={
            "wanted": wanted.num_rows,
            "already there": wanted.num_rows - missing.num_rows - failed.num_rows,
            "encoded": 0,
            "failed": failed.num_rows,
            "changed since discover": 0,
            "not read": 0,
            "bytes written": 0,
        },
        details={"vae_key": key, "images_per_second": None},
    )
    faults = [(_name(row), row["reason"]) for row in failed.to_pylist()]
    if failed.num_rows:
        summary.notes.append(
            f"{failed.num_rows:,} failed in an earlier run and were not tried again; a file that "
            "changes is. `omnigen-pipe encode-vae --retry-failed` tries all of them."
        )
    if retried:
        summary.notes.append(f"{retried:,} that failed in an earlier run were tried again.")
    if share.count > 1:
        others = everything.num_rows - wanted.num_rows
        summary.counts["other workers'"] = others
        summary.details["worker"] = str(share)
        summary.notes.append(
            f"Worker {share} (by {share.origin}): {others:,} other latents fall to other workers."
        )
    if not everything.num_rows:
        summary.notes.append("No sample is usable: `omnigen-pipe bucket` says why.")
    if missing.num_rows:
        roots = _roots(missing, workspace)
        metadata = {
            "fingerprint": fingerprint(wanted, ["pixels_key"]),
            "inputs": as_text({key: inputs}),
        }
        with ShardWriter(workspace, key, metadata) as writer:
            outcome = _encode(
                missing, roots, folder, writer, workspace, progress, key, device, summary
            )
        summary.counts["bytes written"] = writer.bytes_written
        faults += [(item.name, reason) for item, reason in outcome.failed]
        _describe(summary, outcome)
    _masks(workspace, progress, samples, share, retry_failed, summary, faults)
    merge_if_crowded(workspace.latents, workspace.maintenance_lock)
    _describe_faults(summary, faults)
    return summary


def _masks(
    workspace: Workspace,
    progress: Progress,
    samples: pa.Table | Source,
    share: Share,
    retry_failed: bool,
    summary: Summary,
    faults: list[tuple[str, str]],
) -> None:
    """Make the loss masks that are missing, and add to `summary` and `faults` what that came to."""
    every = wanted_masks(samples)
    if not every.num_rows:
        return
    wanted = with_status(share.of(every), known_masks(workspace, every))
    status = wanted["status"].fill_null("missing")
    missing = wanted.filter(
        pc.not_equal(status, "ok") if retry_failed else pc.equal(status, "missing")
    )
    summary.counts |= {"masks wanted": wanted.num_rows, "masks made": 0}
    if not missing.num_rows or summary.signal is not None:
        return
    from omnigen_pipe.images.masks import MASK_VERSION
    from omnigen_pipe.images.weighing import mask_items
    from omnigen_pipe.latents.masks import make_masks

    items = mask_items(workspace, samples, missing)
    metadata = {
        "fingerprint": fingerprint(wanted, ["pixels_key"]),
        "inputs": as_text({MASKS_KEY: {"version of the masks": str(MASK_VERSION)}}),
    }
    with (
        ShardWriter(workspace, MASKS_KEY, metadata) as writer,
        progress.task("masks", missing.num_rows) as advance,
        stop_on_signal() as stop,
    ):
        outcome = make_masks(items, writer, advance, lambda: stop.signal is not None)
    summary.counts["masks made"] = outcome.made
    summary.counts["bytes written"] += writer.bytes_written
    summary.changed = summary.changed or outcome.made > 0 or bool(outcome.failed)
    summary.signal = stop.signal
    if stop.signal is not None:
        summary.notes.append(
            "Stopped by a signal; the masks that were made are published. Run the same command to "
            "go on."
        )
    faults += [(item.name, reason) for item, reason in outcome.failed]
    if outcome.changed:
        summary.failed = True
        files = _distinct(fault for _, found in outcome.changed for fault in found)
        summary.details["changed_masks"] = files
        summary.notes.append(
            f"Of masks, {_number(files)} no longer what discover saw. Run `omnigen-pipe discover` "
            "and `omnigen-pipe bucket`, then encode-vae again:\n" + _some(files)
        )


def _roots(missing: pa.Table, workspace: Workspace) -> dict[str, Path]:
    """Where the datasets of the missing rows lie, by their ids."""
    from omnigen_pipe.images.sources import dataset_root

    files = pc.list_flatten(missing["files"])
    needed = set(pc.unique(pc.struct_field(files, "dataset")).to_pylist())
    return {d.id: dataset_root(workspace, d) for d in workspace.config.datasets if d.id in needed}


def _items(missing: pa.Table, roots: Mapping[str, Path]) -> Iterator[Item]:
    """The missing rows as work, in their order, made as they are asked for: of millions of rows a
    few thousand are Python's at a time."""
    from omnigen_pipe.latents.encoder import Item

    for batch in missing.to_batches(max_chunksize=_ROWS):
        for row in batch.to_pylist():
            width, height = row["bucket"].split("x")
            yield Item(
                name=_name(row),
                pixels_key=row["pixels_key"],
                content_hash=row["content_hash"],
                bucket=(int(width), int(height)),
                resize=(row["resize_width"], row["resize_height"]),
                crop=(row["crop_left"], row["crop_top"]),
                paths=tuple(roots[file["dataset"]] / file["path"] for file in row["files"]),
            )


def _name(row: dict[str, Any]) -> str:
    """What a person calls the image of a wanted row: the first of its files."""
    return f"{row['files'][0]['dataset']}: {row['files'][0]['path']}"


def _encode(
    missing: pa.Table,
    roots: Mapping[str, Path],
    folder: Path,
    writer: ShardWriter,
    workspace: Workspace,
    progress: Progress,
    key: str,
    device: str | None,
    summary: Summary,
) -> Outcome:
    """Load the VAE and encode the `missing` rows to the end, or to the first Ctrl-C or SIGTERM."""
    # On a CPU the VAE's threads share the cores with those that decode, and must not spin while
    # they wait for each other. OpenMP reads it when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    from omnigen_pipe.device import exact_float32, pick_device
    from omnigen_pipe.latents.encoder import encode
    from omnigen_pipe.latents.vae import load_vae

    place = pick_device(device)
    progress.note(f"encode-vae: {missing.num_rows:,} latents to encode on {place}")
    vae = load_vae(folder, workspace.config.vae, place)
    started = time.monotonic()
    with (
        exact_float32(),
        progress.task("encode-vae", missing.num_rows) as advance,
        stop_on_signal() as stop,
    ):
        outcome = encode(
            _items(missing, roots),
            vae,
            writer,
            workspace.config,
            key,
            place,
            advance,
            asked_to_stop=lambda: stop.signal is not None,
        )
        writer.close()
    seconds = time.monotonic() - started
    summary.details["images_per_second"] = float(f"{outcome.encoded / seconds:.6g}")
    # Also where it came in the last batch: whatever would come next was asked not to.
    summary.signal = stop.signal
    if stop.signal is not None:
        summary.notes.append(
            "Stopped by a signal; what was encoded is published. Run the same command to go on."
        )
    return outcome


def _describe(summary: Summary, outcome: Outcome) -> None:
    """Add what this run did to `summary`."""
    summary.changed = outcome.encoded > 0 or bool(outcome.failed)
    summary.counts["encoded"] = outcome.encoded
    summary.counts["failed"] += len(outcome.failed)
    if outcome.changed:
        summary.failed = True
        summary.counts["changed since discover"] = len(outcome.changed)
        # One file may have been wanted for several latents.
        files = _distinct(fault for _, faults in outcome.changed for fault in faults)
        summary.details["changed_files"] = files
        summary.notes.append(
            f"{_number(files)} no longer what discover saw. Run `omnigen-pipe discover` and "
            "`omnigen-pipe bucket`, then encode-vae again:\n" + _some(files)
        )
    if outcome.unread:
        summary.failed = True
        summary.counts["not read"] = len(outcome.unread)
        files = _distinct(f"{item.name}: {reason}" for item, reason in outcome.unread)
        summary.details["unread_files"] = files
        summary.notes.append(
            f"{_number(files)} not read for want of memory. Lower decode_workers in [vae], or set "
            'decode = "reduced" in [pixels], and run encode-vae again:\n' + _some(files)
        )


def _distinct(lines: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(lines))


def _number(files: list[str]) -> str:
    return "1 file was" if len(files) == 1 else f"{len(files):,} files were"


def _some(lines: list[str]) -> str:
    """The first of `lines`, indented, and how many more there are."""
    more = len(lines) - _NAMED_FILES
    shown = [*lines[:_NAMED_FILES], *([f"and {more:,} more"] if more > 0 else [])]
    return "\n".join(f"    {line}" for line in shown)


def _describe_faults(summary: Summary, faults: list[tuple[str, str]]) -> None:
    """Count the failed latents by kind of reason, and name some of their files."""
    summary.left_out = dict(Counter(reason.split(": ")[0] for _, reason in faults))
    faults = list(dict.fromkeys(faults))
    summary.details["failed_files"] = [{"file": name, "reason": reason} for name, reason in faults]
    summary.notes += [f"{name}: {reason}" for name, reason in faults[:_NAMED_FILES]]
    if len(faults) > _NAMED_FILES:
        summary.notes.append(f"and {len(faults) - _NAMED_FILES:,} more; --json names all")
