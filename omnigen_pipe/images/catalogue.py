"""Rows of `images.parquet`: candidates, what reading them found, options, and captions.

The facts say what a file is; here a dataset's options say whether it is wanted. So changing
`animated` or `maximum_pixels` opens no file again.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from manifests.errors import PipeError
from manifests.keys import key
from manifests.schema import IMAGES
from manifests.snapshot import Snapshot
from omnigen_pipe import settings
from omnigen_pipe.config import DatasetConfig
from omnigen_pipe.images.candidates import Candidate
from omnigen_pipe.images.captions import (
    LIST_STRATEGIES,
    Captions,
    finish,
    from_textfile,
    without_file,
)
from omnigen_pipe.images.listing import Listing
from omnigen_pipe.images.probe import Facts, Reading
from omnigen_pipe.mtimes import RACY_NS

#: The options of a dataset that rows of images depend on.
_OPTIONS = (
    "instance_data_dir",
    "source",
    "list_file",
    "path_column",
    "caption_strategy",
    "caption_column",
    "instance_prompt",
    "prepend_instance_prompt",
    "textfile_lines",
    "animated",
    "maximum_pixels",
)


def options_fingerprint(datasets: Sequence[DatasetConfig]) -> str:
    """A key of the options of `datasets` that discover reads, independent of their order."""
    return key(settings.as_text(discovered_settings(datasets)))


def discovered_settings(datasets: Sequence[DatasetConfig]) -> dict[str, Any]:
    """The options of `datasets` that images.parquet depends on."""
    options = {d.id: {name: getattr(d, name) for name in _OPTIONS} for d in datasets}
    return {settings.DATASETS: options}


def changed_since_discover(images: Snapshot, datasets: Sequence[DatasetConfig]) -> list[str]:
    """What differs between today's options of `datasets` and those that `images` was made with.

    Datasets that it holds besides, because they are disabled or gone now, do not matter.
    """
    then = settings.from_text(images.metadata().get("settings", ""))
    now = discovered_settings(datasets)
    known = then.get(settings.DATASETS, {})
    still = {name: known[name] for name in now[settings.DATASETS] if name in known}
    return settings.changes({settings.DATASETS: still}, now)


def check_discovered(images: Snapshot, datasets: Sequence[DatasetConfig]) -> None:
    """Raise `PipeError` unless `images` was made with today's options of each of `datasets`."""
    changed = changed_since_discover(images, datasets)
    if changed:
        raise PipeError(
            f"The configuration changed since discover ({settings.listed(changed)}): run "
            "`omnigen-pipe discover`."
        )


def known_captions(images: Snapshot, fingerprint: str) -> dict[tuple[str, str], Captions]:
    """By dataset and path, the captions from text files in a snapshot made with `fingerprint`.

    Nothing where it was made with other options. Text files that were modified when the
    snapshot was made, or less than two seconds before, are left out: they are read again.
    """
    metadata = images.metadata()
    if metadata.get("fingerprint") != fingerprint:
        return {}
    made_at_ns = int(datetime.fromisoformat(metadata["created_at"]).timestamp()) * 10**9
    rows = images.read().select(
        ["dataset", "path", "captions", "caption_path", "caption_size", "caption_mtime_ns"]
    )
    return {
        (dataset, path): Captions(tuple(texts), caption_path, size, mtime_ns)
        for dataset, path, texts, caption_path, size, mtime_ns in zip(
            *(column.to_pylist() for column in rows.columns), strict=True
        )
        if texts and mtime_ns is not None and mtime_ns < made_at_ns - RACY_NS
    }


def image_rows(
    dataset: DatasetConfig,
    root: Path,
    candidates: Sequence[Candidate],
    readings: Sequence[Reading | None],
    listing: Listing | None,
    known: dict[tuple[str, str], Captions],
) -> pa.Table:
    """One row per candidate, in their order. Captions are looked for where the image is good."""
    nothing = Facts("")
    rows = []
    for candidate, reading in zip(candidates, readings, strict=True):
        facts = reading.facts if reading is not None and reading.facts is not None else nothing
        reason = candidate.reason or (reading.unreadable if reading is not None else None)
        reason = reason or facts.reason or unwanted(facts, dataset)
        captions = Captions(())
        if reason is None:
            captions = _captions(dataset, root, candidate.path, listing, known)
            reason = captions.reason
        rows.append(
            {
                "dataset": dataset.id,
                "path": candidate.path,
                "size": candidate.size,
                "mtime_ns": candidate.mtime_ns,
                "content_hash": facts.content_hash or None,
                "format": facts.format,
                "width": facts.width,
                "height": facts.height,
                "mode": facts.mode,
                "frames": facts.frames,
                "captions": list(captions.texts),
                "caption_path": captions.path,
                "caption_size": captions.size,
                "caption_mtime_ns": captions.mtime_ns,
                "status": "ok" if reason is None else "rejected",
                "reason": reason,
            }
        )
    return pa.Table.from_pylist(rows, IMAGES.schema)


def unwanted(facts: Facts, dataset: DatasetConfig) -> str | None:
    """Why the options of `dataset` rule out a readable image; None where they do not."""
    if facts.frames is not None and facts.frames > 1 and dataset.animated == "reject":
        return f'animated: {facts.frames} frames or pages; animated = "first" uses the first'
    if facts.width is not None and facts.height is not None:
        pixels = facts.width * facts.height
        if pixels > dataset.maximum_pixels:
            return (
                f"too large: {facts.width}x{facts.height} is {pixels:,} pixels, over "
                f"maximum_pixels = {dataset.maximum_pixels:,}"
            )
    return None


def _captions(
    dataset: DatasetConfig,
    root: Path,
    path: str,
    listing: Listing | None,
    known: dict[tuple[str, str], Captions],
) -> Captions:
    if dataset.caption_strategy == "textfile":
        return from_textfile(root, path, dataset, known.get((dataset.id, path)))
    if dataset.caption_strategy not in LIST_STRATEGIES:
        return without_file(path, dataset)
    assert listing is not None  # read for every such strategy
    row = listing.rows.get(path)
    texts = () if row is None else finish(row.texts, dataset)
    reason = None
    if not texts:
        reason = "no caption: the list has no row for the file" if row is None else row.reason
        reason = reason or "no caption: the list's caption is empty"
    return Captions(texts, dataset.list_file, listing.size, listing.mtime_ns, reason)
