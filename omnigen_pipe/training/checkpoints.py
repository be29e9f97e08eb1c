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
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from manifests.errors import PipeError
from manifests.publish import make_folder, publish, staged
from omnigen_pipe.config import LokrConfig

if TYPE_CHECKING:
    import torch

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

    def load(self, network: Any, optimizer: torch.optim.Optimizer) -> None:
        """Put its weights and optimizer state into both."""
        import torch

        from omnigen_pipe.model import lokr

        lokr.restore_weights(network, lokr.read_adapter(self.adapter)[0])
        state = torch.load(self.folder / _OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state)


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
    """Publish a checkpoint of `position` under `folder`, in place of a damaged one if need be."""
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
    if final.exists():
        _remove(final, staging)
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
        return Checkpoint(folder, position, dict(index["blake3"]))
    except (OSError, ValueError, KeyError) as error:
        raise PipeError(f"{folder} is not a whole checkpoint: {error}") from error


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


def prune(folder: Path, staging: Path, keep: int) -> list[str]:
    """Delete all but the `keep` newest checkpoints (0: none); returns the names deleted."""
    if keep == 0:
        return []
    gone = names(folder)[:-keep]
    for name in gone:
        _remove(folder / name, staging)
    return gone
