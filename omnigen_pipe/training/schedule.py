"""The learning rate as a pure function of the step.

A function instead of a scheduler object: there is no state that a resume could get wrong. It
gives up schedules that look at the loss. The rate never depends on the batch.
"""

from __future__ import annotations

import math

from omnigen_pipe.config import TrainConfig


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """The rate of optimizer step `step` (0, 1, …) of a run of `total_steps` steps.

    Warm-up is (step + 1) / lr_warmup_steps, so that the first step already moves; diffusers'
    schedules start at 0. From step lr_warmup_steps on, the rates are those of
    `diffusers.optimization` at the same step, with lr_end in place of 0: they would reach lr_end
    at `total_steps`, one step after the last, and stay there.
    """
    warm_up, top, end = config.lr_warmup_steps, config.learning_rate, config.lr_end
    if step < warm_up:
        return top * (step + 1) / warm_up
    if config.lr_scheduler in ("constant", "constant_with_warmup"):
        return top
    if step >= total_steps:
        return end
    return end + (top - end) * _share((step - warm_up) / (total_steps - warm_up), config)


def _share(progress: float, config: TrainConfig) -> float:
    """What is left of the way down, 1 to 0, at `progress` in [0, 1) of the falling part."""
    if config.lr_scheduler == "linear":
        return 1 - progress
    if config.lr_scheduler == "polynomial":
        return float((1 - progress) ** config.lr_power)
    cycles = config.lr_num_cycles if config.lr_scheduler == "cosine_with_restarts" else 1
    return (1 + math.cos(math.pi * (cycles * progress % 1))) / 2


def note(total_steps: int, config: TrainConfig) -> str | None:
    """What a user should know of the schedule before a run of `total_steps` steps."""
    warm_up = config.lr_warmup_steps
    if warm_up > total_steps:
        last = learning_rate(total_steps - 1, total_steps, config)
        return (
            f"The warm-up of {warm_up} steps is longer than the run of {total_steps}: the rate "
            f"rises to {last:.3g} only, of {config.learning_rate:.3g}. Lower lr_warmup_steps."
        )
    if warm_up == total_steps and not config.lr_scheduler.startswith("constant"):
        return (
            f"The warm-up takes all {total_steps} steps of the run: the rate never falls, as "
            f"lr_scheduler = {config.lr_scheduler} means it to. Lower lr_warmup_steps."
        )
    return None
