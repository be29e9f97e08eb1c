"""Rows of `images.parquet`: candidates, what reading them found, options, and captions.

The facts say what a file is; here a dataset's options say whether it is wanted. So changing
`animated` or `maximum_pixels` opens no file again.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from manifests.errors import PipeError
from manifests.keys import key
from manifests.query import query
from manifests.schema import IMAGES
from manifests.snapshot import Snapshot
from omnigen_pipe import settings
from omnigen_pipe.config import DatasetConfig
from omnigen_pipe.images.candidates import Candidates
from omnigen_pipe.images.captions import (
    LIST_STRATEGIES,
    Captions,
    finish,
    from_textfile,
    texts_without_file,
    why_none,
)
from omnigen_pipe.images.listing import Listing
from omnigen_pipe.images.mask_files import MASK_COLUMNS, MaskFiles, alpha_rows, no_rows
from omnigen_pipe.images.probe import Facts
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
    "mask",
)


def options_fingerprint(datasets: Sequence[DatasetConfig]) -> str:
    """A key of the options of `datasets` that discover reads, independent of their order."""
    return key(settings.as_text(discovered_settings(datasets)))


def discovered_settings(datasets: Sequence[DatasetConfig]) -> dict[str, Any]:
    """The options of `datasets` that images.parquet depends on."""
    options = {d.id: {name: getattr(d, name) for name in _OPTIONS} for d in datasets}
    for of_dataset in options.values():
        if of_dataset["mask"] is None:  # so that nothing seems changed where there never was one
            del of_dataset["mask"]
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


def known_captions(
    images: Snapshot, datasets: Sequence[DatasetConfig]
) -> dict[tuple[str, str], Captions]:
    """By dataset and path, the captions from text files in a snapshot made with these options.

    Nothing where it was made with other options. Text files that were modified when the
    snapshot was made, or less than two seconds before, are left out: they are read again.
    """
    ids = [d.id for d in datasets if d.caption_strategy == "textfile"]
    metadata = images.metadata() if ids else {}
    if metadata.get("fingerprint") != options_fingerprint(datasets):
        return {}
    made_at_ns = int(datetime.fromisoformat(metadata["created_at"]).timestamp()) * 10**9
    rows = query(
        """
        SELECT dataset, path, captions, caption_path, caption_size, caption_mtime_ns FROM images
        WHERE len(captions) > 0 AND caption_mtime_ns < $1
        AND list_contains($2::VARCHAR[], dataset)
        """,
        made_at_ns - RACY_NS,
        ids,
        images=images.source(),
    )
    return {
        (dataset, path): Captions(tuple(texts), caption_path, size, mtime_ns)
        for dataset, path, texts, caption_path, size, mtime_ns in zip(
            *(column.to_pylist() for column in rows.columns), strict=True
        )
    }


def image_rows(
    dataset: DatasetConfig,
    root: Path,
    candidates: Candidates,
    readings: pa.Table,
    listing: Listing | None,
    known: dict[tuple[str, str], Captions],
    masks: tuple[MaskFiles, pa.Table] | None = None,
) -> pa.Table:
    """One row per candidate, in their order. Captions are looked for where the image is good.

    `readings` has a row for each, as `Readings.of` gives it. `masks` are those of a folder of
    masks, with what reading them found.
    """
    number = len(candidates)
    reasons = pc.coalesce(
        pa.array(candidates.reasons, pa.string()), readings["unreadable"], readings["reason"]
    )
    reasons = pc.coalesce(reasons, _unwanted(readings, dataset))
    good = np.flatnonzero(pc.is_null(reasons).to_numpy())
    captions = _captions(dataset, root, [candidates.paths[i] for i in good], listing, known)
    spread = captions.take(_places(good, number))
    columns = {
        "dataset": pa.repeat(pa.scalar(dataset.id, pa.string()), number),
        "path": pa.array(candidates.paths, pa.string()),
        "size": pa.array(candidates.sizes, pa.int64()),
        "mtime_ns": pa.array(candidates.mtimes_ns, pa.int64()),
        **{name: readings[name] for name in ("format", "width", "height", "mode", "frames")},
        "content_hash": readings["content_hash"],
        "captions": pc.coalesce(spread["captions"], pa.scalar([], pa.list_(pa.string()))),
        **{name: spread[name] for name in ("caption_path", "caption_size", "caption_mtime_ns")},
    }
    mask_rows = _masks(dataset, columns, masks)
    columns |= {name: mask_rows[name] for name in MASK_COLUMNS}
    reasons = pc.coalesce(reasons, spread["reason"], mask_rows["reason"])
    columns["reason"] = reasons
    columns["status"] = pc.if_else(pc.is_null(reasons), "ok", "rejected")
    return pa.table([columns[name] for name in IMAGES.schema.names], schema=IMAGES.schema)


def _masks(
    dataset: DatasetConfig, columns: dict[str, Any], masks: tuple[MaskFiles, pa.Table] | None
) -> pa.Table:
    """The mask of each row of `columns`, and why there is none to be had."""
    if masks is not None:
        files, readings = masks
        images = pa.table({name: columns[name] for name in ("path", "width", "height")})
        return files.rows(dataset, images, readings)
    if dataset.mask is not None:
        return alpha_rows(columns["content_hash"])
    return no_rows(len(columns["path"]))


def _places(rows: npt.NDArray[np.int64], number: int) -> pa.Array:
    """For each of `number` places which of `rows` it is; null where it is none."""
    places = np.full(number, -1, np.int64)
    places[rows] = np.arange(len(rows))
    return pa.array(places, mask=places < 0)


def _unwanted(readings: pa.Table, dataset: DatasetConfig) -> pa.Array:
    """For each row why the options of `dataset` rule it out; null where they do not."""
    frames, width, height = (
        readings[name].fill_null(0).to_numpy().astype(np.int64)
        for name in ("frames", "width", "height")
    )
    suspect = (frames > 1) | (width * height > dataset.maximum_pixels)
    reasons: list[str | None] = [None] * readings.num_rows
    for i in np.flatnonzero(suspect).tolist():
        row = readings.slice(i, 1).select(["frames", "width", "height"]).to_pylist()[0]
        reasons[i] = unwanted(Facts("", **row), dataset)
    return pa.array(reasons, pa.string())


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


_CAPTIONS_SCHEMA = pa.schema(
    [
        ("captions", pa.list_(pa.string())),
        ("caption_path", pa.string()),
        ("caption_size", pa.int64()),
        ("caption_mtime_ns", pa.int64()),
        ("reason", pa.string()),
    ]
)


def _captions(
    dataset: DatasetConfig,
    root: Path,
    paths: list[str],
    listing: Listing | None,
    known: dict[tuple[str, str], Captions],
) -> pa.Table:
    """The captions of the images at `paths`, a row each."""
    if dataset.caption_strategy != "textfile" and dataset.caption_strategy not in LIST_STRATEGIES:
        return _one_caption_each(texts_without_file(paths, dataset), why_none(dataset))
    found = [_captions_of(dataset, root, path, listing, known) for path in paths]
    columns: list[list[Any]] = [
        [list(each.texts) for each in found],
        [each.path for each in found],
        [each.size for each in found],
        [each.mtime_ns for each in found],
        [each.reason for each in found],
    ]
    arrays = [pa.array(c, f.type) for c, f in zip(columns, _CAPTIONS_SCHEMA, strict=True)]
    return pa.table(arrays, schema=_CAPTIONS_SCHEMA)


def _one_caption_each(texts: list[str], why_none: str) -> pa.Table:
    """One row for each of `texts`, which is its caption; with a reason where it is empty."""
    there = np.array([bool(text) for text in texts], bool)
    offsets = np.concatenate(([0], np.cumsum(there))).astype(np.int32)
    values = pa.array(texts, pa.string()).filter(pa.array(there))
    table = pa.table(
        {
            "captions": pa.ListArray.from_arrays(pa.array(offsets), values),
            "reason": pc.if_else(pa.array(there), None, why_none),
        }
    )
    for field in _CAPTIONS_SCHEMA:
        if field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(len(texts), field.type))
    return table.select(_CAPTIONS_SCHEMA.names).cast(_CAPTIONS_SCHEMA)


def _captions_of(
    dataset: DatasetConfig,
    root: Path,
    path: str,
    listing: Listing | None,
    known: dict[tuple[str, str], Captions],
) -> Captions:
    if dataset.caption_strategy == "textfile":
        return from_textfile(root, path, dataset, known.get((dataset.id, path)))
    assert listing is not None  # read for every such strategy
    row = listing.rows.get(path)
    texts = () if row is None else finish(row.texts, dataset)
    reason = None
    if not texts:
        reason = "no caption: the list has no row for the file" if row is None else row.reason
        reason = reason or "no caption: the list's caption is empty"
    return Captions(texts, dataset.list_file, listing.size, listing.mtime_ns, reason)
