"""What is trained: the frozen base model, the adapter in it, and the adapter's optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from omnigen_pipe.config import LokrConfig
from omnigen_pipe.device import pick_device, pick_precision
from omnigen_pipe.model.lokr import TargetCount, attach, count_targets
from omnigen_pipe.model.transformer import load_transformer
from omnigen_pipe.model_files import model_part
from omnigen_pipe.training.optimizers import build_optimizer
from omnigen_pipe.workspace import Workspace


@dataclass(frozen=True)
class Trainee:
    """The base model in `dtype`, with a float32 adapter attached, all on `device`."""

    transformer: Any
    network: Any
    optimizer: torch.optim.Optimizer
    targets: list[TargetCount]
    device: torch.device
    dtype: torch.dtype

    def parameters(self) -> list[torch.nn.Parameter]:
        """The adapter's parameters."""
        return list(self.network.parameters())


def load_trainee(workspace: Workspace, lokr: LokrConfig, device_name: str | None) -> Trainee:
    """Load the configured transformer and attach a fresh adapter, seeded by the run's seed.

    Raises `UsageError` where the device, the model folder or a LoKr target does not fit.
    """
    config = workspace.config.train
    device = pick_device(device_name)
    dtype = pick_precision(config.mixed_precision, device)
    transformer = load_transformer(model_part(workspace, "transformer"), dtype, device)
    network = attach(transformer, lokr, config.seed).to(device)
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    optimizer = build_optimizer(network.parameters(), config, device)
    targets = count_targets(transformer, network, lokr)
    return Trainee(transformer, network, optimizer, targets, device, dtype)
