"""Checkpoints: folders that appear whole, by rename, and say what is in them.

    checkpoints/step-00000500/
        adapter.safetensors    the adapter, with its configuration as metadata
        …                      what else training needs to go on (see `training.state`)
        checkpoint.json        step, position, and the BLAKE3 of every other file, sealed by its own

A damaged checkpoint is noticed by its hashes and passed over for the one before. Imports no
torch: whether a run is complete is known without it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from manifests.errors import PipeError, UsageError, WriteError
from manifests.publish import make_folder, publish, staged

ADAPTER_NAME = "adapter.safetensors"
EMA_NAME = "ema.safetensors"
_INDEX_NAME = "checkpoint.json"
_FOLDER_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Position:
    """How far a run is: optimizer steps done, and the next global batch of the order."""

    step: int = 0
    epoch: int = 0
    global_batch: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint folder whose index was read."""

    folder: Path
    position: Position
    hashes: dict[str, str]

    @property
    def adapter(self) -> Path:
        """The adapter's file."""
        return self.folder / ADAPTER_NAME

    @property
    def ema(self) -> Path:
        """The file of its average, which only runs with `use_ema` have."""
        return self.folder / EMA_NAME

    def damage(self) -> str | None:
        """What is wrong with its files; None when nothing is."""
        for name, wanted in self.hashes.items():
            try:
                found = _hash(self.folder / name)
            except OSError as error:
                return f"{name} cannot be read: {error.strerror or error}"  # of blake3 only a text
            if found != wanted:
                return f"{name} is damaged"
        return None


def _hash(path: Path) -> str:
    hasher = blake3(max_threads=blake3.AUTO)
    hasher.update_mmap(path)
    return str(hasher.hexdigest())


def save(
    folder: Path, staging: Path, position: Position, write: Callable[[Path], object]
) -> Checkpoint:
    """Publish a checkpoint of `position` under `folder`, of the files that `write` puts into the
    folder it is given."""
    final = folder / _name(position)
    try:
        unfinished = staged(staging, final)
    except OSError as error:
        raise WriteError(final, error) from error
    try:
        make_folder(unfinished)
        write(unfinished)
        hashes = {path.name: _hash(path) for path in sorted(unfinished.iterdir())}
        index = {**asdict(position), "blake3": hashes}
        index["seal"] = _seal(index)
        (unfinished / _INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        publish(unfinished, final)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)  # on a full disk it would be in the way
        raise WriteError(final, error) from error
    return Checkpoint(final, position, hashes)


def _name(position: Position) -> str:
    return f"step-{position.step:08d}"


def _seal(index: dict[str, Any]) -> str:
    """The BLAKE3 of an index's other entries."""
    return str(blake3(json.dumps(index, sort_keys=True).encode()).hexdigest())


def _remove(folder: Path, staging: Path) -> None:
    """Delete a checkpoint, out of sight in one step first, so that nobody sees half of it."""
    doomed = staged(staging, folder)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def read(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`; raises `PipeError` where there is none."""
    try:
        index = json.loads((folder / _INDEX_NAME).read_text(encoding="utf-8"))
        position = Position(index["step"], index["epoch"], index["global_batch"])
        if index.pop("seal") != _seal(index) or folder.name != _name(position):
            raise ValueError(f"{_INDEX_NAME} is not what was written")
        hashes = {str(name): str(digest) for name, digest in index["blake3"].items()}
        if ADAPTER_NAME not in hashes or any("/" in name for name in hashes):
            raise ValueError(f"{_INDEX_NAME} lists {sorted(hashes)}")
        return Checkpoint(folder, position, hashes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PipeError(f"{folder} is not a whole checkpoint: {error!r}") from error


def names(folder: Path) -> list[str]:
    """Names of the checkpoints under `folder`, oldest first."""
    if not folder.is_dir():
        return []
    found = [p.name for p in folder.iterdir() if p.is_dir() and _FOLDER_NAME.fullmatch(p.name)]
    return sorted(found, key=lambda name: int(name.removeprefix("step-")))


def latest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint under `folder`, and a sentence for each one passed over."""
    skipped = []
    for name in reversed(names(folder)):
        try:
            checkpoint = read(folder / name)
        except PipeError as error:
            skipped.append(f"Passed over a damaged checkpoint: {error}")
            continue
        damage = checkpoint.damage()
        if damage is None:
            return checkpoint, skipped
        skipped.append(f"Passed over the checkpoint {folder / name}: {damage}")
    return None, skipped


def locate_adapter(path: Path, ema: bool = False) -> tuple[Path, list[str]]:
    """The adapter's file for `path`: itself, a checkpoint's, or that of a run's newest whole
    checkpoint; or with `ema` the average beside it. With a sentence for each damaged checkpoint
    that was passed over for an older one: whoever takes the file is to say it.

    Raises `UsageError` where there is no `path`, a folder holds none, or no average, or `path` is a
    file and `ema` asks for another; `PipeError` where `path` is a checkpoint that is damaged.
    """
    if not path.is_dir():
        if not path.is_file():
            raise UsageError(f"There is no adapter {path}.")
        if ema:
            raise UsageError(
                f"--ema takes the average in a run's or a checkpoint's folder, and {path} is "
                "none. Name the folder, or the average's file without --ema."
            )
        return path, []
    if (path / _INDEX_NAME).is_file():
        damage = read(path).damage()
        if damage is not None:
            raise PipeError(f"The checkpoint {path.absolute()} cannot be used: {damage}.")
    skipped: list[str] = []
    found = path
    if not (path / ADAPTER_NAME).is_file():
        folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        checkpoint, skipped = latest(folder)
        if checkpoint is None:
            none = f"There is no whole checkpoint in {path.absolute()}."
            raise UsageError("\n  ".join([none, *skipped]))
        found = checkpoint.folder
    if ema and not (found / EMA_NAME).is_file():
        raise UsageError(
            f"{found.absolute()} holds no {EMA_NAME}: the run has no average (use_ema = false). "
            "Leave out --ema."
        )
    return found / (EMA_NAME if ema else ADAPTER_NAME), skipped


def set_aside(folder: Path, after: int) -> list[str]:
    """Rename checkpoints of steps beyond `after` to `damaged-…`; returns their old names.

    They were passed over when the run went on from step `after`. Kept under their names they
    would count as newer than what comes now.
    """
    aside = [name for name in names(folder) if int(name.removeprefix("step-")) > after]
    for name in aside:
        number = len(list(folder.glob(f"damaged-*{name}")))
        (folder / name).rename(folder / f"damaged-{number}-{name}")
    return aside


def prune(folder: Path, staging: Path, keep: int) -> list[str]:
    """Delete all but the `keep` newest checkpoints (0: none); returns the names deleted."""
    if keep == 0:
        return []
    gone = names(folder)[:-keep]
    for name in gone:
        _remove(folder / name, staging)
    return gone
