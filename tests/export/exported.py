"""Adapters to export, and what the base computes with them: the reference of every export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from omnigen_pipe.config import LokrConfig
from omnigen_pipe.model import lokr
from omnigen_pipe.model.transformer import load_transformer, predict_velocity

CPU = torch.device("cpu")
#: Low rank in attention and MLP, alpha not the rank.
CONFIG = LokrConfig.model_validate(
    {
        "linear_dim": 3,
        "linear_alpha": 6,
        "factor": 4,
        "apply_preset": {"target_module": ["Attention", "FeedForward"], "module_algo_map": {}},
    }
)


def write_adapter(
    base: Path, path: Path, config: LokrConfig = CONFIG, size: float = 0.2, seed: int = 1
) -> Path:
    """Write an adapter of random weights for the model in `base`; returns `path`."""
    transformer = load_transformer(base / "transformer", torch.float32, CPU)
    network = lokr.attach(transformer, config, seed=0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    lokr.save_adapter(lokr.weights(network), path, config)
    return path


def adapted(base: Path, adapter: Path, strength: float = 1.0) -> Any:
    """The model in `base` with the adapter beside it, in LyCORIS' bypass mode, float32."""
    transformer = load_transformer(base / "transformer", torch.float32, CPU)
    config = lokr.adapter_config(adapter)
    network = lokr.attach(transformer, config, seed=0)
    lokr.restore_weights(network, lokr.read_adapter(adapter)[0])
    network.set_multiplier(strength * config.multiplier)
    return transformer


def inputs() -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    """Noisy latents, times and prompts of two samples."""
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, 4, 8, 12, generator=generator)
    return x_t, torch.tensor([0.3, 0.8]), [[5, 6, 9], [7]]


def velocity(transformer: Any) -> torch.Tensor:
    """What a transformer says of `inputs`, float32."""
    with torch.no_grad():
        return predict_velocity(transformer, *inputs()).float()


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    """The size of the difference, in units of `other`."""
    return float((one - other).norm() / other.norm())
