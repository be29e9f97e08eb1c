"""What is trained: the frozen base model, the adapter in it, and what moves with the adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from manifests.errors import PipeError, UsageError
from omnigen_pipe.config import LokrConfig
from omnigen_pipe.device import pick_precision
from omnigen_pipe.model.compilation import compile_blocks
from omnigen_pipe.model.lokr import (
    TargetCount,
    attach,
    count_targets,
    read_adapter,
    restore_weights,
)
from omnigen_pipe.model.sharding import shard
from omnigen_pipe.model.transformer import load_transformer
from omnigen_pipe.model_files import model_part
from omnigen_pipe.training.ema import Ema
from omnigen_pipe.training.gradients import AdapterGradients
from omnigen_pipe.training.optimizers import build_optimizer
from omnigen_pipe.workspace import Workspace


@dataclass(frozen=True)
class Trainee:
    """The base model in `dtype`, with a float32 adapter attached, all on `device`.

    `sharded` says that the base model is spread over the processes (FSDP2), which then have to
    run it the same number of times.
    """

    transformer: Any
    network: Any
    optimizer: torch.optim.Optimizer
    gradients: AdapterGradients
    ema: Ema | None
    scaler: torch.amp.GradScaler
    targets: list[TargetCount]
    device: torch.device
    dtype: torch.dtype
    sharded: bool = False

    def parameters(self) -> list[torch.nn.Parameter]:
        """The adapter's parameters, float32."""
        return list(self.network.parameters())

    def autocast(self) -> torch.autocast:
        """The precision of a forward pass: the base model's, the adapter's factors included."""
        return torch.autocast(
            self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32
        )

    @contextmanager
    def base_only(self) -> Iterator[None]:
        """Within it the base model computes alone; after it the adapter has its strength again.

        Not around a forward pass with gradients: recomputation under checkpointing would come
        after it, and rereads the strength.
        """
        strength = self.network.multiplier
        self.network.set_multiplier(0.0)
        try:
            yield
        finally:
            self.network.set_multiplier(strength)


def load_trainee(
    workspace: Workspace,
    lokr: LokrConfig,
    device: torch.device,
    *,
    initial: Path | None = None,
    sharded: bool = False,
) -> Trainee:
    """Load the configured transformer and attach a fresh adapter, seeded by the run's seed.

    The adapter starts from the file `initial`, if one is given. Raises `UsageError` where the
    model folder, a LoKr target or that file does not fit.
    """
    config = workspace.config.train
    dtype = pick_precision(config.mixed_precision, device)
    cpu = torch.device("cpu")
    folder = model_part(workspace, "transformer")
    transformer = load_transformer(
        folder,
        dtype,
        cpu if sharded else device,
        config.base_model_precision,
        config.quantize_via,
    )
    network = attach(transformer, lokr, config.seed).to(device)
    if initial is not None:
        _start_from(network, initial)
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if sharded:
        shard(transformer, device)
    compile_blocks(transformer, config.dynamo_backend, config.dynamo_mode)
    optimizer = build_optimizer(network.parameters(), config, device)
    named = dict(network.named_parameters())
    return Trainee(
        transformer,
        network,
        optimizer,
        AdapterGradients(list(named.values())),
        Ema(named, config.ema_decay) if config.use_ema else None,
        torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        count_targets(transformer, network, lokr),
        device,
        dtype,
        sharded,
    )


def _start_from(network: Any, path: Path) -> None:
    tensors, _ = read_adapter(path)
    try:
        restore_weights(network, tensors)
    except PipeError as error:
        raise UsageError(f"init_lora, {path}, does not fit: {error}") from error
