"""What is trained: the adapted model, and what moves with the adapter's weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from omnigen_pipe.config import LokrConfig
from omnigen_pipe.training.adapted import Adapted, load_adapted
from omnigen_pipe.training.ema import Ema
from omnigen_pipe.training.gradients import AdapterGradients
from omnigen_pipe.training.optimizers import build_optimizer
from omnigen_pipe.workspace import Workspace


@dataclass(frozen=True)
class Trainee(Adapted):
    """The adapted model with its optimizer, gradients, average and, in float16, their scaler."""

    optimizer: torch.optim.Optimizer
    gradients: AdapterGradients
    ema: Ema | None
    scaler: torch.amp.GradScaler


def load_trainee(
    workspace: Workspace,
    lokr: LokrConfig,
    device: torch.device,
    *,
    initial: Path | None = None,
    sharded: bool = False,
) -> Trainee:
    """Load the adapted model as `load_adapted` does, ready to be trained.

    The adapter starts from the file `initial`, if one is given.
    """
    config = workspace.config.train
    model = load_adapted(workspace, lokr, device, sharded)
    if initial is not None:
        model.start_from(initial)
    named = dict(model.network.named_parameters())
    scaler = torch.amp.GradScaler(device.type, enabled=model.dtype == torch.float16)
    # It makes its scale when it first scales a loss, which a process may never do, and is lost
    # without one.
    scaler.scale(torch.zeros((), device=device))
    return Trainee(
        **vars(model),
        optimizer=build_optimizer(named.values(), config, device),
        gradients=AdapterGradients(list(named.values())),
        ema=Ema(named, config.ema_decay) if config.use_ema else None,
        scaler=scaler,
    )
