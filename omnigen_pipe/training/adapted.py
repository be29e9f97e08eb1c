"""The frozen base model with an adapter in it: what predicts, in training and in evaluation."""

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
from omnigen_pipe.workspace import Workspace


@dataclass(frozen=True)
class Adapted:
    """The base model in `dtype`, with a float32 adapter attached, all on `device`.

    `sharded` says that the base model is spread over the processes (FSDP2), which then have to
    run it the same number of times.
    """

    transformer: Any
    network: Any
    targets: list[TargetCount]
    device: torch.device
    dtype: torch.dtype
    sharded: bool

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

    def start_from(self, path: Path) -> None:
        """Take over the weights in the adapter file `path`; raises `UsageError` where its shape
        is another one."""
        tensors, _ = read_adapter(path)
        try:
            restore_weights(self.network, tensors)
        except PipeError as error:
            raise UsageError(f"The adapter {path} does not fit: {error}") from error


def load_adapted(
    workspace: Workspace, lokr: LokrConfig, device: torch.device, sharded: bool = False
) -> Adapted:
    """Load the configured transformer, as the configuration of `[train]` wants it, and attach a
    fresh adapter, seeded by the run's seed.

    In this order: quantise, adapt, checkpoint, shard, compile. Raises `UsageError` where the
    model folder, the device or a LoKr target does not fit.
    """
    config = workspace.config.train
    dtype = pick_precision(config.mixed_precision, device)
    transformer = load_transformer(
        model_part(workspace, "transformer"),
        dtype,
        torch.device("cpu") if sharded else device,
        config.base_model_precision,
        config.quantize_via,
    )
    network = attach(transformer, lokr, config.seed).to(device)
    targets = count_targets(transformer, network, lokr)
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if sharded:
        shard(transformer, device)
    compile_blocks(transformer, config.dynamo_backend, config.dynamo_mode)
    return Adapted(transformer, network, targets, device, dtype, sharded)
