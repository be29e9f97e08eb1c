"""What a checkpoint holds of a trainee, and how it comes back.

    adapter.safetensors    the adapter to use, with its configuration as metadata
    ema.safetensors        its exponential moving average, where there is one
    training.pt            optimizer, gradient scaler, and the weights that training goes on from
                           where these are others (schedule-free); read with weights_only

Everything is exact: training on from a checkpoint equals never having stopped.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from manifests.errors import PipeError, UsageError
from omnigen_pipe.config import LokrConfig
from omnigen_pipe.model import lokr
from omnigen_pipe.runs.checkpoints import ADAPTER_NAME, EMA_NAME, Checkpoint
from omnigen_pipe.training.optimizers import averaged_weights, has_averaged_weights
from omnigen_pipe.training.trainee import Trainee

_TRAINING_NAME = "training.pt"


def adapter_said(trainee: Trainee, step: int, **origin: str) -> dict[str, str]:
    """What the files of the adapter and of its average after `step` say of themselves.

    `origin` says what they were trained on; see `model.provenance`.
    """
    return {"step": str(step), "dtype": _name_of(trainee.dtype), **origin}


@contextmanager
def weights_in_use(trainee: Trainee, average: bool = False) -> Iterator[None]:
    """Within it the adapter has the weights that a checkpoint's `adapter.safetensors` would hold
    now, or those of its `ema.safetensors`; after it, exactly, those it had."""
    if not average:
        with averaged_weights(trainee.optimizer):
            yield
    elif trainee.ema is not None:
        with trainee.ema.in_place():
            yield
    else:
        raise ValueError("there is no average")


def write_state(
    trainee: Trainee, folder: Path, config: LokrConfig, step: int, **origin: str
) -> None:
    """Write the files of a checkpoint into `folder`; an `OSError` where they do not fit.

    `origin` is that of `adapter_said`.
    """
    said = adapter_said(trainee, step, **origin)
    for average in (False, True) if trainee.ema is not None else (False,):
        with weights_in_use(trainee, average):
            tensors = lokr.weights(trainee.network)
        path = folder / (EMA_NAME if average else ADAPTER_NAME)
        lokr.save_adapter(tensors, path, config, **said)
    state: dict[str, Any] = {
        "optimizer": trainee.optimizer.state_dict(),
        "scaler": trainee.scaler.state_dict(),
    }
    if has_averaged_weights(trainee.optimizer):
        state["weights"] = lokr.weights(trainee.network)
    # By way of memory: torch's own writer makes of a full disk an error without a cause.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    (folder / _TRAINING_NAME).write_bytes(buffer.getbuffer())


def read_state(trainee: Trainee, checkpoint: Checkpoint) -> None:
    """Put everything in `checkpoint` into `trainee`, which must be built by the same settings.

    Raises `UsageError` where the trainee computes in another precision: the run would be
    another one.
    """
    tensors, metadata = lokr.read_adapter(checkpoint.adapter)
    now = _name_of(trainee.dtype)
    if metadata.get("dtype", now) != now:
        raise UsageError(
            f"{checkpoint.folder} was trained in {metadata['dtype']}, and here mixed_precision "
            f"comes to {now}. Set mixed_precision to what gives {metadata['dtype']}, or set "
            "another tracker_run_name to start a new run."
        )
    path = checkpoint.folder / _TRAINING_NAME
    if path.name not in checkpoint.hashes:
        raise PipeError(f"{checkpoint.folder} has no {path.name}: it was made by another version.")
    state = torch.load(path, map_location="cpu", weights_only=True)
    lokr.restore_weights(trainee.network, state.get("weights", tensors))
    trainee.optimizer.load_state_dict(state["optimizer"])
    trainee.scaler.load_state_dict(state["scaler"])
    if trainee.ema is not None:
        trainee.ema.load(lokr.read_adapter(checkpoint.ema)[0])


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
