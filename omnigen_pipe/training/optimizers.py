"""The optimizer, and the learning rate as a pure function of the step."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from omnigen_pipe.config import TrainConfig


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter], config: TrainConfig
) -> torch.optim.Optimizer:
    """AdamW over the adapter's float32 parameters.

    `adamw_bf16` names the same here: its point is bfloat16 weights, and adapters have none.
    """
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
    )


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of optimizer step `step` (0, 1, …): (step + 1) / warm-up, then constant.

    The first step already moves, unlike in diffusers' schedules, which start at 0.
    """
    if step < config.lr_warmup_steps:
        return config.learning_rate * (step + 1) / config.lr_warmup_steps
    return config.learning_rate


def clip_gradients(parameters: list[torch.nn.Parameter], config: TrainConfig) -> float:
    """Clip in place as configured; returns the global norm before clipping."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if config.max_grad_norm > 0:
        if config.grad_clip_method == "value":
            torch.nn.utils.clip_grad_value_(parameters, config.max_grad_norm)
        else:
            torch.nn.utils.clip_grads_with_norm_(parameters, config.max_grad_norm, norm)
    return float(norm)
