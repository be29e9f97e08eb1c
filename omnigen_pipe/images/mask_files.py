"""Mask files: which file of a dataset's folder of masks belongs to which image.

They are found by a walk as images are, and what reading them found stands in the same log, under
`DATASET:mask`, a name that no dataset can have. Only those that an image needs are read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from manifests.errors import UsageError
from omnigen_pipe.config import DatasetConfig
from omnigen_pipe.images.candidates import Candidates
from omnigen_pipe.images.walk import walk
from omnigen_pipe.workspace import Workspace

#: Columns of images.parquet that say which mask an image has.
MASK_COLUMNS = ("mask_path", "mask_size", "mask_mtime_ns", "mask_hash")

_SCHEMA = pa.schema(
    [
        ("mask_path", pa.string()),
        ("mask_size", pa.int64()),
        ("mask_mtime_ns", pa.int64()),
        ("mask_hash", pa.string()),
        ("reason", pa.string()),
    ]
)

#: What is asked of a mask's reading.
_FACTS = ("content_hash", "width", "height", "reason", "unreadable")


@dataclass
class MaskFiles:
    """The masks of one dataset: those that its images need, by path, and by stem the numbers of
    those with it. `notes` are for the user."""

    candidates: Candidates
    of_stem: dict[str, list[int]]
    notes: list[str] = field(default_factory=list)

    def rows(self, dataset: DatasetConfig, images: pa.Table, masks: pa.Table) -> pa.Table:
        """A row for each of `images` (`path`, `width`, `height`): its mask and, where that cannot
        be used, why.

        `masks` is what reading the candidates found, a row each; what is not read yet has nulls.
        """
        facts = masks.select(list(_FACTS)).to_pylist()
        reasons = [self._fault(dataset, number, row) for number, row in enumerate(facts)]
        found: list[dict[str, object]] = []
        for path, width, height in zip(
            *(images[name].to_pylist() for name in ("path", "width", "height")), strict=True
        ):
            numbers = self.of_stem.get(stem(path), [])
            if len(numbers) != 1:
                found.append({"reason": self._why_none(dataset, numbers)})
                continue
            (number,) = numbers
            reason = reasons[number] or _other_aspect(facts[number], width, height)
            found.append(
                {
                    "mask_path": self.candidates.paths[number],
                    "mask_size": self.candidates.sizes[number],
                    "mask_mtime_ns": self.candidates.mtimes_ns[number],
                    "mask_hash": None if reason else facts[number]["content_hash"],
                    "reason": reason,
                }
            )
        return pa.Table.from_pylist(found, schema=_SCHEMA)

    def stems(self, numbers: Iterable[int]) -> set[str]:
        """The stems of the masks with these `numbers`."""
        return {stem(self.candidates.paths[number]) for number in numbers}

    def _why_none(self, dataset: DatasetConfig, numbers: list[int]) -> str:
        if not numbers:
            return "no mask: no picture among the masks has the image's path before the extension"
        names = " and ".join(self.candidates.paths[number] for number in numbers)
        return f"several masks: {names}"

    def _fault(self, dataset: DatasetConfig, number: int, facts: dict[str, object]) -> str | None:
        """Why the options of `dataset`, or the file itself, rule a mask out; None where neither."""
        reason = self.candidates.reasons[number] or facts["unreadable"] or facts["reason"]
        if reason is not None:
            return f"mask cannot be used: {reason}"
        width, height = facts["width"], facts["height"]
        if not isinstance(width, int) or not isinstance(height, int):
            return None  # not read yet
        if width * height > dataset.maximum_pixels:
            return (
                f"mask cannot be used: too large: {width}x{height} is {width * height:,} pixels, "
                f"over maximum_pixels = {dataset.maximum_pixels:,}"
            )
        return None


def stem(path: str) -> str:
    """`path` without its extension: what an image and its mask have in common."""
    return os.path.splitext(path)[0]


def mask_root(workspace: Workspace, dataset: DatasetConfig) -> Path | None:
    """The absolute folder of the masks of `dataset`; None where it has no such folder."""
    return None if dataset.mask_folder is None else workspace.path(dataset.mask_folder)


def log_name(dataset: DatasetConfig) -> str:
    """What the files log calls the masks of `dataset`."""
    return f"{dataset.id}:mask"


def find_masks(
    workspace: Workspace, dataset: DatasetConfig, paths: Sequence[str]
) -> MaskFiles | None:
    """The masks of the images at `paths`; None where `dataset` has no folder of masks.

    Raises `UsageError` where that folder cannot be used.
    """
    root = mask_root(workspace, dataset)
    if root is None:
        return None
    if not root.is_dir() or not os.access(root, os.R_OK | os.X_OK):
        what = "may not be read" if root.is_dir() else "is not a folder"
        raise UsageError(
            f"dataset `{dataset.id}`: mask {root} {what}. Correct the path in "
            f"{workspace.root / 'omnigen-pipe.toml'}, or mount the disk it is on."
        )
    lying, _ = walk(root, frozenset(), textfiles=True, list_file=None, distinct=False)
    wanted = {stem(path) for path in paths}
    needed = lying.take(n for n, path in enumerate(lying.paths) if stem(path) in wanted)
    of_stem: dict[str, list[int]] = {}
    for number, path in enumerate(needed.paths):
        of_stem.setdefault(stem(path), []).append(number)
    found = MaskFiles(needed, of_stem)
    if idle := len(lying) - len(needed):
        found.notes.append(f"dataset `{dataset.id}`: {idle:,} masks in {root} belong to no image.")
    return found


def alpha_rows(content_hashes: pa.ChunkedArray) -> pa.Table:
    """The same rows where the mask is the image's own alpha channel."""
    number = len(content_hashes)
    nothing = {field.name: pa.nulls(number, field.type) for field in _SCHEMA}
    return pa.table(nothing | {"mask_hash": content_hashes}).cast(_SCHEMA)


def no_rows(number: int) -> pa.Table:
    """The same rows where a dataset has no masks."""
    return pa.table({field.name: pa.nulls(number, field.type) for field in _SCHEMA})


def _other_aspect(mask: dict[str, object], width: int | None, height: int | None) -> str | None:
    """Why a mask does not lie over an image of this size: it has another aspect, by more than the
    rounding of a side to whole pixels."""
    across, down = mask["width"], mask["height"]
    if not isinstance(across, int) or not isinstance(down, int) or not width or not height:
        return None
    if abs(across * height - down * width) <= width + height:
        return None
    return f"mask of another aspect: {across}x{down} for an image of {width}x{height}"
