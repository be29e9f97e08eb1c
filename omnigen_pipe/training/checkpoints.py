"""Checkpoints: folders that appear whole, by rename, and say what is in them.

    checkpoints/step-00000500/
        adapter.safetensors    the adapter, with its configuration as metadata
        optimizer.pt           the optimizer's state, read with weights_only
        checkpoint.json        step, position, and the BLAKE3 of the other two

A damaged checkpoint is noticed by its hashes and passed over for the one before. torch is
imported only where tensors are handled: whether a run is complete is known without it.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from manifests.errors import PipeError, UsageError
from manifests.publish import make_folder, publish, staged
from omnigen_pipe.config import LokrConfig

if TYPE_CHECKING:
    from omnigen_pipe.training.trainee import Trainee

ADAPTER_NAME = "adapter.safetensors"
_OPTIMIZER_NAME = "optimizer.pt"
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

    def damage(self) -> str | None:
        """What is wrong with its files; None when nothing is."""
        for name, wanted in self.hashes.items():
            try:
                found = _hash(self.folder / name)
            except OSError as error:
                return f"{name} cannot be read: {error.strerror}"
            if found != wanted:
                return f"{name} is damaged"
        return None

    def load(self, trainee: Trainee) -> None:
        """Put its weights and optimizer state into `trainee`.

        Raises `UsageError` where the trainee computes in another precision: the run would be
        another one.
        """
        import torch

        from omnigen_pipe.model import lokr

        tensors, metadata = lokr.read_adapter(self.adapter)
        now = str(trainee.dtype).removeprefix("torch.")
        if metadata.get("dtype", now) != now:
            raise UsageError(
                f"{self.folder} was trained in {metadata['dtype']}, and here mixed_precision comes "
                f"to {now}. Set mixed_precision to what gives {metadata['dtype']}, or set another "
                "tracker_run_name to start a new run."
            )
        lokr.restore_weights(trainee.network, tensors)
        state = torch.load(self.folder / _OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        trainee.optimizer.load_state_dict(state)


def _hash(path: Path) -> str:
    hasher = blake3(max_threads=blake3.AUTO)
    hasher.update_mmap(path)
    return str(hasher.hexdigest())


def save(
    folder: Path,
    staging: Path,
    position: Position,
    trainee: Trainee,
    config: LokrConfig,
) -> Checkpoint:
    """Publish a checkpoint of `position` under `folder`."""
    import torch

    from omnigen_pipe.model import lokr

    final = folder / f"step-{position.step:08d}"
    unfinished = staged(staging, final)
    make_folder(unfinished)
    lokr.save_adapter(
        lokr.weights(trainee.network),
        unfinished / ADAPTER_NAME,
        config,
        step=str(position.step),
        dtype=str(trainee.dtype).removeprefix("torch."),
    )
    torch.save(trainee.optimizer.state_dict(), unfinished / _OPTIMIZER_NAME)
    hashes = {name: _hash(unfinished / name) for name in (ADAPTER_NAME, _OPTIMIZER_NAME)}
    index = {
        "step": position.step,
        "epoch": position.epoch,
        "global_batch": position.global_batch,
        "blake3": hashes,
    }
    (unfinished / _INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    publish(unfinished, final)
    return Checkpoint(final, position, hashes)


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
        hashes = {name: str(index["blake3"][name]) for name in (ADAPTER_NAME, _OPTIMIZER_NAME)}
        return Checkpoint(folder, position, hashes)
    except (OSError, ValueError, KeyError, TypeError) as error:
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


def find_adapter(path: Path) -> Path:
    """The adapter's file for `path`: itself, a checkpoint's, or that of a run's newest checkpoint.

    Raises `UsageError` where a folder holds none.
    """
    if not path.is_dir():
        return path
    if (path / ADAPTER_NAME).is_file():
        return path / ADAPTER_NAME
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    checkpoint, _ = latest(folder)
    if checkpoint is None:
        raise UsageError(f"There is no whole checkpoint in {path.absolute()}.")
    return checkpoint.adapter


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
