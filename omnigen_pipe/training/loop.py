"""The training loop: global batches in, an adapter out.

Knows nothing of configuration files or manifests: it is handed a model with its adapter, a plan,
a reader and what to do at the steps that are due. A global batch's loss is the mean over all
its samples of each sample's mean over latent elements, so that cutting it into micro-batches,
or dealing these out to processes, changes nothing but rounding.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch

from manifests.errors import PipeError
from omnigen_pipe.config import TrainConfig
from omnigen_pipe.device import peak_memory
from omnigen_pipe.events import Events
from omnigen_pipe.progress import Advance, Progress
from omnigen_pipe.runs.checkpoints import Position
from omnigen_pipe.runs.metrics import MetricsWriter
from omnigen_pipe.runs.order import MicroBatch
from omnigen_pipe.stop import StopRequest
from omnigen_pipe.training.batches import Batch, read_ahead
from omnigen_pipe.training.loss_window import LossWindow
from omnigen_pipe.training.objective import (
    long_table_rows,
    passes_without_gradients,
    pose,
    run_idle,
    sample_losses,
)
from omnigen_pipe.training.plan import Plan, Step, steps
from omnigen_pipe.training.processes import Processes
from omnigen_pipe.training.schedule import learning_rate
from omnigen_pipe.training.sums import StepSums
from omnigen_pipe.training.trainee import Trainee

#: A gradient scaler below this has halved its scale so often that the gradient itself is at fault.
_SMALLEST_SCALE = 1.0
#: So many samples are named where a loss is not finite.
_NAMED = 5
#: What to change where memory does not suffice.
LESS_MEMORY = (
    "Lower train_batch_size, set gradient_checkpointing = true, set base_model_precision, take "
    "FeedForward out of target_module, or lower the resolution. `omnigen-pipe estimate` says what "
    "fits."
)


@dataclass
class Course:
    """What a training is given, beside what is trained and the plan."""

    read: Callable[[MicroBatch, int, int], Batch]
    #: Saves a checkpoint of the position.
    save: Callable[[Position], object]
    #: The latents' own variance per channel, for the linear baseline.
    variance: tuple[float, ...]
    progress: Progress
    stop: StopRequest
    #: Where numbers go; in the first process only.
    metrics: MetricsWriter | None = None
    #: Evaluates after so many steps; None where nothing is evaluated.
    evaluate: Callable[[int], object] | None = None
    #: Whether pictures are drawn after so many steps…
    validates: Callable[[int], bool] = lambda step: False
    #: …and draws them, telling how it goes; returns the signal that ended it early, if one did.
    validate: Callable[[int, Advance], int | None] = lambda step, advance: None
    #: The losses of the last steps, which a resumed run has from before.
    window: LossWindow = field(default_factory=LossWindow)
    #: Is told of every step; of the first process only.
    events: Events = field(default_factory=Events)
    processes: Processes = field(default_factory=Processes)


@dataclass(frozen=True)
class Progressed:
    """The position reached, and the losses of the last steps, as numbers and for a person."""

    position: Position
    recent: dict[str, Any]
    text: str


def train(trainee: Trainee, plan: Plan, config: TrainConfig, course: Course) -> Progressed:
    """Train until the plan's end or a stop request; what was reached is saved.

    Raises `PipeError` where the loss or the gradient is not finite; that step is not taken, and
    the last checkpoint is the last good one.
    """
    trainee.transformer.train()
    trainee.network.train()
    processes, progress = course.processes, course.progress
    position, saved = plan.start, plan.start
    window = course.window
    batches = read_ahead(
        (
            (micro, step.epoch, step.after.step - 1)
            for step in steps(plan)
            for micro in step.share(processes.rank, processes.size)
        ),
        lambda item: course.read(*item),
    )
    if course.evaluate is not None and position.step == 0:
        course.evaluate(0)
    label = f"Training {config.tracker_run_name}"
    with (
        closing(batches),
        progress.task(label, plan.total_steps, done=position.step) as advance,
    ):
        # Also what the end of an earlier start has left undone.
        stopping = _validate(course, position, advance)
        for step in steps(plan) if not stopping else ():
            started = time.monotonic()
            sums = _accumulate(trainee, step, batches, course, saved)
            rate = learning_rate(position.step, plan.total_steps, config)
            norm = _take(trainee, config, rate, step, saved, processes)
            position = step.after
            window.add(sums.by_time)

            speed = step.samples / (time.monotonic() - started)
            memory = peak_memory(trainee.device)
            if course.metrics is not None:
                values = {
                    "epoch": step.epoch,
                    "learning_rate": rate,
                    "grad_norm": norm,
                    **sums.metrics(step.samples),
                    **_own_rate(trainee.optimizer),
                    "samples_per_second": speed,
                    "memory_gib": memory,
                }
                course.metrics.write(position.step, values, window.board())
                course.events.send(
                    "step", step=position.step, total_steps=plan.total_steps, **values
                )
            how = f"{window.progress_text()} lr {rate:.1e} {speed:.1f}/s {memory:.1f}GiB"
            advance(1, how, window.bins_text())

            stopping = bool(sums.interrupted or sums.terminated)
            last = position.step == plan.total_steps
            if course.evaluate is not None and (
                last or position.step % config.eval_steps_interval == 0
            ):
                course.evaluate(position.step)
            interval = config.checkpoint_step_interval
            saving = last or stopping or (interval > 0 and position.step % interval == 0)
            if saving:
                saved = _save(trainee, step, saved, course)
            # After the checkpoint, which is worth more; a run that ends here draws when it goes on.
            if not stopping and _validate(course, position, advance):
                stopping = True
                if not saving:
                    saved = _save(trainee, step, saved, course)
            if stopping:
                if course.stop.signal is None:  # another process was asked to stop
                    course.stop.signal = signal.SIGINT if sums.interrupted else signal.SIGTERM
                break
    recent = window.values() if len(window) else {}
    return Progressed(position, recent, window.progress_text())


def _save(trainee: Trainee, step: Step, saved: Position, course: Course) -> Position:
    """Save a checkpoint of the position after `step`; returns that."""
    _check_weights(trainee, step, saved, course.processes)
    if course.metrics is not None:
        course.metrics.flush()
    course.save(step.after)
    return step.after


def _validate(course: Course, position: Position, advance: Advance) -> bool:
    """Draw the pictures that are due at `position`; whether a signal ended that, which is noted
    also where it went to another process."""
    if not course.validates(position.step):
        return False
    asked = course.validate(position.step, advance)
    if asked is None:
        return False
    course.stop.signal = course.stop.signal or asked
    return True


def _own_rate(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """What Prodigy has found, which multiplies the learning rate; nothing of other optimizers."""
    found = optimizer.param_groups[0].get("d")
    return {} if found is None else {"prodigy_d": float(found)}


def _accumulate(
    trainee: Trainee, step: Step, batches: Iterator[Batch], course: Course, saved: Position
) -> StepSums:
    """Add up the gradients and losses of a global batch, over all processes."""
    processes = course.processes
    trainee.gradients.zero()
    sums, losses, samples = StepSums(), [], []
    failure: PipeError | None = None
    mine = len(step.share(processes.rank, processes.size))
    for turn in range(step.rounds(processes.size) if trainee.sharded else mine):
        try:
            batch = next(batches) if turn < mine else None
            of_batch = _forward_and_back(trainee, step, batch, processes)
        except PipeError as error:
            if trainee.sharded:
                raise  # the others are in the middle of the model, and wait for this one's shard
            failure = error
            break
        if batch is not None:
            losses.append((batch, of_batch))
            samples += batch.sample_ids
            sums.long_rows += long_table_rows(trainee, batch)
    found = sums.collect(losses, course.variance)
    stop = course.stop.signal
    sums.failed = float(failure is not None)
    sums.interrupted = float(stop == signal.SIGINT)
    sums.terminated = float(stop is not None and stop != signal.SIGINT)
    sums.exchange(processes)
    if failure is not None:
        raise failure
    if sums.failed:
        raise PipeError("Another process of this training failed; its own message says why.")
    loss = sums.loss / step.samples
    if not math.isfinite(loss):
        bad = [name for name, one in zip(samples, found, strict=True) if not math.isfinite(one)]
        names = [name for part in processes.gathered(bad) for name in part]
        processes.raise_together(PipeError(_not_finite("loss", loss, step, saved, names)))
    processes.sum_(trainee.gradients.flat)
    return sums


def _forward_and_back(
    trainee: Trainee, step: Step, batch: Batch | None, processes: Processes
) -> torch.Tensor:
    """One micro-batch's losses `[B]`, with its gradients added up.

    Where the base model is sharded, every process runs it equally often; one that has no
    micro-batch in this turn (None) runs it on next to nothing.
    """
    if trainee.sharded:
        passes = passes_without_gradients(batch) if batch is not None else 0
        most = torch.tensor(passes)
        processes.max_(most)
        run_idle(trainee, int(most) - passes)
    if batch is None:
        return run_idle(trainee, 1, gradients=True)
    try:
        losses = sample_losses(trainee, pose(trainee, batch), batch)
        trainee.scaler.scale(losses.sum() / step.samples).backward()  # type: ignore[no-untyped-call]
    except torch.OutOfMemoryError as error:
        raise PipeError(
            f"{trainee.device} ran out of memory at {len(batch.sample_ids)} samples of "
            f"{batch.bucket} in step {step.after.step}. {LESS_MEMORY}"
        ) from error
    return losses.detach()


def _take(
    trainee: Trainee,
    config: TrainConfig,
    rate: float,
    step: Step,
    saved: Position,
    processes: Processes,
) -> float | None:
    """Take the optimizer step; the gradient's norm before clipping.

    None where a float16 gradient overflowed: then the scaler lowers its scale, and the weights
    stay as they are.
    """
    scaler = trainee.scaler
    scaler.unscale_(trainee.optimizer)
    norm = trainee.gradients.norm()
    if not math.isfinite(norm) and (
        not scaler.is_enabled() or scaler.get_scale() <= _SMALLEST_SCALE
    ):
        processes.raise_together(PipeError(_not_finite("gradient", norm, step, saved, [])))
    for group in trainee.optimizer.param_groups:
        group["lr"] = rate
    if math.isfinite(norm):
        trainee.gradients.clip(norm, config)
    scaler.step(trainee.optimizer)
    scaler.update()
    if not math.isfinite(norm):
        return None
    if trainee.ema is not None:
        trainee.ema.update(step.after.step)
    return norm


def _check_weights(trainee: Trainee, step: Step, saved: Position, processes: Processes) -> None:
    """Raise `PipeError` where a step made weights that are no numbers: never save those."""
    if all(bool(parameter.isfinite().all()) for parameter in trainee.parameters()):
        return
    processes.raise_together(
        PipeError(
            f"The adapter's weights are not finite after step {step.after.step}, and were not "
            f"saved; {_kept(saved)}. Lower learning_rate."
        )
    )


def _kept(saved: Position) -> str:
    return f"the last checkpoint is of step {saved.step}" if saved.step else "nothing was saved yet"


def _not_finite(what: str, value: float, step: Step, saved: Position, samples: list[str]) -> str:
    text = (
        f"The {what} of step {step.after.step} is {value}. The step was not taken; {_kept(saved)}. "
    )
    if samples:
        more = f" and {len(samples) - _NAMED} more" if len(samples) > _NAMED else ""
        text += (
            f"Samples: {', '.join(samples[:_NAMED])}{more} (`omnigen-pipe status --sample ID` "
            "explains one). "
        )
    return text + 'Lower learning_rate, or set mixed_precision = "no".'
