"""What a checkpoint holds of a trainee, and how it comes back.

adapter.safetensors    the adapter, with its configuration as metadata
optimizer.pt           the optimizer's state, read with weights_only
"""

from __future__ import annotations

import io
from pathlib import Path

import torch

from manifests.errors import UsageError
from omnigen_pipe.config import LokrConfig
from omnigen_pipe.model import lokr
from omnigen_pipe.runs.checkpoints import ADAPTER_NAME, Checkpoint
from omnigen_pipe.training.trainee import Trainee

_OPTIMIZER_NAME = "optimizer.pt"


def write_state(trainee: Trainee, folder: Path, config: LokrConfig, step: int) -> None:
    """Write the files of a checkpoint into `folder`; an `OSError` where they do not fit."""
    lokr.save_adapter(
        lokr.weights(trainee.network),
        folder / ADAPTER_NAME,
        config,
        step=str(step),
        dtype=str(trainee.dtype).removeprefix("torch."),
    )
    # By way of memory: torch's own writer makes of a full disk an error without a cause.
    buffer = io.BytesIO()
    torch.save(trainee.optimizer.state_dict(), buffer)
    (folder / _OPTIMIZER_NAME).write_bytes(buffer.getbuffer())


def read_state(trainee: Trainee, checkpoint: Checkpoint) -> None:
    """Put the weights and optimizer state of `checkpoint` into `trainee`.

    Raises `UsageError` where the trainee computes in another precision: the run would be
    another one.
    """
    tensors, metadata = lokr.read_adapter(checkpoint.adapter)
    now = str(trainee.dtype).removeprefix("torch.")
    if metadata.get("dtype", now) != now:
        raise UsageError(
            f"{checkpoint.folder} was trained in {metadata['dtype']}, and here mixed_precision "
            f"comes to {now}. Set mixed_precision to what gives {metadata['dtype']}, or set "
            "another tracker_run_name to start a new run."
        )
    lokr.restore_weights(trainee.network, tensors)
    path = checkpoint.folder / _OPTIMIZER_NAME
    trainee.optimizer.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
