"""The training loop: global batches in, an adapter out.

Knows nothing of configuration files or manifests: it is handed a model, an adapter, an order
and a reader, and leaves checkpoints and metrics. A global batch's loss is the mean over all
its samples of each sample's mean over latent elements, so that cutting it into micro-batches
changes nothing but rounding.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

import torch

from manifests.errors import PipeError
from omnigen_pipe.config import TrainConfig
from omnigen_pipe.progress import Progress
from omnigen_pipe.runs.checkpoints import Position
from omnigen_pipe.runs.metrics import MetricsWriter
from omnigen_pipe.runs.order import Epoch, MicroBatch
from omnigen_pipe.stop import StopRequest
from omnigen_pipe.training.batches import Batch, read_ahead
from omnigen_pipe.training.objective import long_table_rows, micro_batch_losses
from omnigen_pipe.training.optimizers import clip_gradients
from omnigen_pipe.training.schedule import learning_rate
from omnigen_pipe.training.trainee import Trainee

#: So many steps the shown loss is the mean of.
RECENT_STEPS = 50


@dataclass(frozen=True)
class Progressed:
    """The position reached, and the mean loss of the last `over` steps (None without any)."""

    position: Position
    loss: float | None
    over: int


@dataclass(frozen=True)
class Plan:
    """Where training starts and ends, and how to get each epoch's order and each batch."""

    start: Position
    total_steps: int
    epoch_order: Callable[[int], Epoch]
    read: Callable[[MicroBatch, int], Batch]


@dataclass(frozen=True)
class _Step:
    """One optimizer step of the plan: its global batch, and the position after it."""

    batches: list[MicroBatch]
    epoch: int
    after: Position

    @property
    def samples(self) -> int:
        return sum(len(micro.samples) for micro in self.batches)


def _steps(plan: Plan) -> Iterator[_Step]:
    step, epoch, index = plan.start.step, plan.start.epoch, plan.start.global_batch
    while step < plan.total_steps:
        order = plan.epoch_order(epoch)
        while index < len(order) and step < plan.total_steps:
            batches = order.global_batch(index)
            step, index = step + 1, index + 1
            ended = index == len(order)
            after = Position(step, epoch + 1, 0) if ended else Position(step, epoch, index)
            yield _Step(batches, epoch, after)
        epoch, index = epoch + 1, 0


def train(
    trainee: Trainee,
    plan: Plan,
    config: TrainConfig,
    metrics: MetricsWriter,
    save: Callable[[Position], object],
    progress: Progress,
    stop: StopRequest,
) -> Progressed:
    """Train until the plan's end or a stop request; what was reached is saved.

    Raises `PipeError` where the loss or the gradient is not finite; that step is not taken, and
    the last checkpoint is the last good one.
    """
    trainee.transformer.train()
    trainee.network.train()
    position, saved = plan.start, plan.start
    recent: deque[float] = deque(maxlen=RECENT_STEPS)
    batches = read_ahead(
        ((micro, step.epoch) for step in _steps(plan) for micro in step.batches),
        lambda item: plan.read(*item),
    )
    label = f"Training {config.tracker_run_name}"
    with (
        closing(batches),
        progress.task(label, plan.total_steps, done=position.step) as advance,
    ):
        for step in _steps(plan):
            started = time.monotonic()
            loss, long_rows = _accumulate(trainee, step, batches)
            if not math.isfinite(loss):
                raise PipeError(_not_finite("loss", loss, step, saved))
            rate = learning_rate(position.step, plan.total_steps, config)
            for group in trainee.optimizer.param_groups:
                group["lr"] = rate
            norm = clip_gradients(trainee.parameters(), config)
            if not math.isfinite(norm):
                raise PipeError(_not_finite("gradient", norm, step, saved))
            trainee.optimizer.step()
            trainee.optimizer.zero_grad(set_to_none=True)
            position = step.after
            recent.append(loss)

            speed = step.samples / (time.monotonic() - started)
            memory = peak_memory(trainee.device)
            metrics.write(
                position.step,
                {
                    "epoch": step.epoch,
                    "loss": loss,
                    "learning_rate": rate,
                    "grad_norm": norm,
                    "samples": step.samples,
                    "long_rope_share": long_rows / step.samples,
                    "samples_per_second": speed,
                    "memory_gib": memory,
                },
            )
            mean = sum(recent) / len(recent)
            advance(1, f"loss {mean:.3f} lr {rate:.1e} {speed:.1f}/s {memory:.1f}GiB")

            interval = config.checkpoint_step_interval
            if interval and position.step % interval == 0:
                save(position)
                saved = position
            if stop.signal is not None:
                break
    if position != saved:
        save(position)
    return Progressed(position, sum(recent) / len(recent) if recent else None, len(recent))


def _not_finite(what: str, value: float, step: _Step, saved: Position) -> str:
    kept = f"the last checkpoint is of step {saved.step}" if saved.step else "nothing was saved yet"
    return (
        f"The {what} of step {step.after.step} is {value}. The step was not taken; {kept}. Lower "
        'learning_rate, or set mixed_precision = "no".'
    )


def _accumulate(trainee: Trainee, step: _Step, batches: Iterator[Batch]) -> tuple[float, int]:
    """Add up the gradients of a global batch; its loss, and how many rows were long."""
    total = torch.zeros((), device=trainee.device)
    long_rows = 0
    for _ in step.batches:
        batch = next(batches)
        try:
            share = micro_batch_losses(trainee, batch).sum() / step.samples
            share.backward()  # type: ignore[no-untyped-call]
        except torch.OutOfMemoryError as error:
            raise PipeError(
                f"{trainee.device} ran out of memory at {len(batch.sample_ids)} samples of "
                f"{batch.bucket} in step {step.after.step}. Lower train_batch_size, set "
                "gradient_checkpointing = true, take FeedForward out of target_module, or lower "
                "the resolution."
            ) from error
        total += share.detach()
        long_rows += long_table_rows(trainee, batch)
    return total.item(), long_rows


def peak_memory(device: torch.device) -> float:
    """The most memory used so far, GiB: on CUDA torch's allocations, else the process' own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
