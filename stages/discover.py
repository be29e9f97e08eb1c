"""discover: find the images and captions of every dataset. Writes the files log and
images.parquet.

Files that the log knows by size and modification time are not opened. Nothing is ever written
into, or deleted from, the folders of the images.
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from manifests.errors import PipeError, UsageError
from manifests.log import merge_if_crowded
from manifests.query import query
from omnigen_pipe.config import DatasetConfig
from omnigen_pipe.images.candidates import Candidates
from omnigen_pipe.images.catalogue import (
    discovered_settings,
    image_rows,
    known_captions,
    options_fingerprint,
)
from omnigen_pipe.images.mask_files import log_name
from omnigen_pipe.images.reading import known_readings, logged_rows, numbered, read_missing
from omnigen_pipe.images.sources import Found, dataset_root, find
from omnigen_pipe.progress import Progress
from omnigen_pipe.settings import as_text
from omnigen_pipe.stop import stop_on_signal
from omnigen_pipe.summary import Summary
from omnigen_pipe.workspace import Workspace

#: What was read is published this often (seconds): so much work a killed discover loses.
FLUSH_SECONDS = 30.0

#: So many rejected files are shown by name; images.parquet has all.
_SHOWN = 20


def run(workspace: Workspace, progress: Progress, allow_shrink: bool = False) -> Summary:
    """Publish what is there now.

    Raises `PipeError` where more than half of a dataset's files of the last time are gone,
    unless `allow_shrink`; `UsageError` where a folder, list or repository cannot be used. A
    first Ctrl-C or SIGTERM while files are read ends it with what was read published, and
    images.parquet as it was.
    """
    datasets = sorted(workspace.config.datasets, key=lambda dataset: dataset.id)
    if not datasets:
        raise UsageError(
            f"{workspace.root} has no [[dataset]] that is not disabled. Add one to its "
            "omnigen-pipe.toml."
        )
    # The log is read while the folders are walked: one waits for files, the other computes.
    with ThreadPoolExecutor(1, "discover") as beside:
        known_rows = beside.submit(logged_rows, workspace.files.source())
        before = _rows_before(workspace)
        found = {}
        for dataset in datasets:
            progress.note(f"discover: looking for the images of `{dataset.id}`")
            rows = before.filter(pc.equal(before["dataset"], dataset.id))
            found[dataset.id] = _find(workspace, dataset, rows, allow_shrink)
    entries = [(d.id, found[d.id].candidates) for d in datasets]
    masks = {d.id: each for d in datasets if (each := found[d.id].masks) is not None}
    entries += [(log_name(d), masks[d.id].candidates) for d in datasets if d.id in masks]
    readings = known_readings(entries, known_rows.result())
    total = len(readings.unread())
    with progress.task("discover", total) as advance, stop_on_signal() as stop:
        opened, logged = read_missing(
            entries,
            readings,
            workspace.files,
            advance,
            FLUSH_SECONDS,
            asked_to_stop=lambda: stop.signal is not None,
        )
    if left := len(readings.unread()):
        return _stopped(opened, logged, left, stop.signal)

    merge_if_crowded(workspace.files, workspace.maintenance_lock)
    fingerprint = options_fingerprint(datasets)
    known = known_captions(workspace.images, datasets)
    tables = []
    numbers = numbered(entries)
    for dataset in datasets:
        this = found[dataset.id]
        of_masks = None
        if this.masks is not None:
            of_masks = this.masks, readings.of(numbers[log_name(dataset)])
        read = readings.of(numbers[dataset.id])
        tables.append(
            image_rows(dataset, this.root, this.candidates, read, this.listing, known, of_masks)
        )
    images = pa.concat_tables(tables)
    replaced = workspace.images.replace(
        images, fingerprint=fingerprint, settings=as_text(discovered_settings(datasets))
    )
    notes = [note for dataset in datasets for note in found[dataset.id].notes]
    summary = _summary(images, opened, replaced or logged > 0, notes)
    # It came when all was read: this stage is done, but whatever would come next was asked not to.
    summary.signal = stop.signal
    return summary


def _stopped(opened: int, logged: int, left: int, signal: int | None) -> Summary:
    """The summary of a run that a signal ended before all files were read."""
    return Summary(
        "discover",
        changed=logged > 0,
        counts={"files opened": opened, "not read yet": left},
        notes=[
            "Stopped by a signal; what was read is kept, and images.parquet is as it was. Run the "
            "same command to go on."
        ],
        signal=signal,
    )


def _rows_before(workspace: Workspace) -> pa.Table:
    """The rows of the last snapshot: `dataset`, `path`, `size`, `mtime_ns`."""
    return query(
        "SELECT dataset, path, size, mtime_ns FROM images", images=workspace.images.source()
    )


def _find(
    workspace: Workspace, dataset: DatasetConfig, before: pa.Table, allow_shrink: bool
) -> Found:
    """The candidates of `dataset`; stops where too many of the rows `before` would vanish."""
    local = workspace.path(dataset.instance_data_dir)
    gone = not dataset.instance_data_dir.startswith("hf://") and not local.is_dir()
    # A folder that was never there is a wrong path, and stays an error.
    if gone and before.num_rows and allow_shrink:
        return Found(
            local, Candidates(), notes=[f"dataset `{dataset.id}`: the folder {local} is gone."]
        )
    if gone and before.num_rows:
        raise PipeError(
            f"dataset `{dataset.id}`: the folder {local} is gone, and with it {before.num_rows:,} "
            "files that were there last time. Mount or restore it. If it is gone for good, "
            "disable the dataset or pass --allow-shrink."
        )
    found = find(workspace, dataset, dataset_root(workspace, dataset, refresh=True))
    vanished = _vanished(before, found)
    if 2 * vanished > before.num_rows and not allow_shrink:
        raise PipeError(
            f"dataset `{dataset.id}`: {vanished:,} of the {before.num_rows:,} files that were "
            f"there last time are gone from {found.root}, and {len(found.candidates):,} files are "
            "there now. Nothing was changed. If that is meant, pass --allow-shrink."
        )
    return found


def _vanished(before: pa.Table, found: Found) -> int:
    """How many files of `before` are there no more, under their name or another.

    A renamed or moved file keeps its size and modification time: each new file makes up for
    one vanished file with the same two.
    """
    candidates = found.candidates
    if before["path"].to_pylist() == candidates.paths:
        return 0
    now = pa.table(
        {
            "path": pa.array(candidates.paths, pa.string()),
            "size": pa.array(candidates.sizes, pa.int64()),
            "mtime_ns": pa.array(candidates.mtimes_ns, pa.int64()),
        }
    )
    (row,) = query(
        """
        WITH lost AS (
            SELECT size, mtime_ns, count(*) AS n FROM before ANTI JOIN now USING (path) GROUP BY ALL
        ), new AS (
            SELECT size, mtime_ns, count(*) AS n FROM now ANTI JOIN before USING (path) GROUP BY ALL
        )
        SELECT coalesce(sum(greatest(lost.n - coalesce(new.n, 0), 0)), 0)::BIGINT AS vanished
        FROM lost LEFT JOIN new ON lost.size IS NOT DISTINCT FROM new.size
            AND lost.mtime_ns IS NOT DISTINCT FROM new.mtime_ns
        """,
        before=before,
        now=now,
    ).to_pylist()
    return int(row["vanished"])


def _summary(images: pa.Table, opened: int, changed: bool, notes: list[str]) -> Summary:
    counted = images.group_by(["dataset", "status"]).aggregate([([], "count_all")])
    statuses: Counter[tuple[str, str]] = Counter()
    for row in counted.to_pylist():
        statuses[row["dataset"], row["status"]] = row["count_all"]
    named = images.select(["dataset", "path", "status", "reason"])
    rejected = named.filter(pc.equal(named["status"], "rejected")).to_pylist()
    summary = Summary("discover", changed, notes=notes)
    summary.counts = {
        "images": images.num_rows,
        "ok": images.num_rows - len(rejected),
        "rejected": len(rejected),
        "files opened": opened,
    }
    # What follows the colon of a reason is peculiar to the file.
    summary.left_out = dict(Counter(row["reason"].split(": ")[0] for row in rejected))
    summary.details = {
        "datasets": {
            dataset: {
                "images": statuses[dataset, "ok"] + statuses[dataset, "rejected"],
                "ok": statuses[dataset, "ok"],
                "rejected": statuses[dataset, "rejected"],
            }
            for dataset in sorted({dataset for dataset, _ in statuses})
        },
        "rejected_files": [
            {name: row[name] for name in ("dataset", "path", "reason")} for row in rejected[:_SHOWN]
        ],
    }
    if rejected:
        summary.tables.append(_rejected_table(rejected))
    return summary


def _rejected_table(rejected: list[dict[str, Any]]) -> Any:
    """The first rejected files and why, for the terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="rejected", title_justify="left", box=None)
    for heading in ("dataset", "path", "reason"):
        table.add_column(heading, overflow="fold")
    for row in rejected[:_SHOWN]:
        # Line breaks and escape codes in names are shown, not obeyed.
        path = row["path"] if row["path"].isprintable() else repr(row["path"])
        table.add_row(Text(row["dataset"]), Text(path), Text(row["reason"]))
    if len(rejected) > _SHOWN:
        more = f"… and {len(rejected) - _SHOWN:,} more in manifests/images.parquet"
        table.add_row(Text("…"), Text(more), Text(""))
    return table
