"""Stable evaluation: the same images, noise and times every time, so that numbers compare.

Each image's loss is taken at eight fixed times inside (0, 1), with one noise per image, and always
weighted by its mask where it has one. No two
images share a pass; so the result is the same, to the last bit on the CPU, whatever the batch
size, the number of processes, and where a run was resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean

import torch

from manifests.errors import PipeError
from omnigen_pipe.config import TrainConfig
from omnigen_pipe.model import flow
from omnigen_pipe.model.transformer import predict_velocity
from omnigen_pipe.model_files import PIXELS_PER_LATENT
from omnigen_pipe.runs.time_bins import CENTRES
from omnigen_pipe.training.adapted import Adapted
from omnigen_pipe.training.baseline import linear_error
from omnigen_pipe.training.batches import EvalSample
from omnigen_pipe.training.objective import run_idle
from omnigen_pipe.training.optimizers import averaged_weights
from omnigen_pipe.training.processes import Processes
from omnigen_pipe.training.trainee import Trainee

#: The times: sigmoid(Φ⁻¹((k + ½)/8)) for k = 0 … 7, the medians of the bins of training's t.
TIMES = CENTRES
#: So many of an image's times go through the model together. Two without gradients need less
#: memory than one in training with checkpointing, whatever the bucket (traced at true widths).
_ROWS_PER_PASS = 2


@dataclass(frozen=True)
class Evaluation:
    """Mean loss over all images at each of `TIMES`, and the linear baseline there."""

    losses: tuple[float, ...]
    baseline: tuple[float, ...]
    images: int

    @property
    def loss(self) -> float:
        """The mean over the times, that is, over t as it is drawn in training."""
        return fmean(self.losses)

    @property
    def explained(self) -> float:
        """The share of the linear baseline's error that the model does away with."""
        return 1 - self.loss / fmean(self.baseline)

    def as_json(self) -> dict[str, object]:
        """The numbers, as they stand in `evaluations.jsonl`."""
        return {
            "images": self.images,
            "loss": self.loss,
            "explained": self.explained,
            "times": list(TIMES),
            "losses": list(self.losses),
            "baseline": list(self.baseline),
        }


def images(available: int, config: TrainConfig) -> int:
    """How many of the `available` samples are evaluated on: the first `num_eval_images`, or all."""
    return min(available, config.num_eval_images or available)


@dataclass(frozen=True)
class Evaluator:
    """Evaluates a trainee on a run's evaluation samples, 0 … `count` - 1, read by `read`.

    `variance`: the latents' own, per channel, for the baseline. Each process takes its share.
    """

    trainee: Trainee
    count: int
    read: Callable[[int], EvalSample]
    variance: tuple[float, ...]
    processes: Processes

    def results(self) -> dict[str, Evaluation]:
        """Of the weights that a checkpoint would hold now (`weights`), and their average (`ema`)
        where there is one."""
        with averaged_weights(self.trainee.optimizer):
            found = {"weights": self._evaluate()}
        if self.trainee.ema is not None:
            with self.trainee.ema.in_place():
                found["ema"] = self._evaluate()
        return found

    def _evaluate(self) -> Evaluation:
        return evaluate(self.trainee, self.count, self.read, self.variance, self.processes)


def as_line(results: Mapping[str, Evaluation]) -> dict[str, object]:
    """The results as a line of `evaluations.jsonl`."""
    line = results["weights"].as_json()
    return line | {name: r.as_json() for name, r in results.items() if name != "weights"}


def as_board(results: Mapping[str, Evaluation]) -> dict[str, float]:
    """The results as scalars for TensorBoard."""
    scalars: dict[str, float] = {}
    for name, result in results.items():
        room = "eval" if name == "weights" else f"eval_{name}"
        scalars |= {f"{room}/loss": result.loss, f"{room}/explained": result.explained}
        for t, loss in zip(TIMES, result.losses, strict=True):
            scalars[f"{room}/loss_by_t/{t:.2f}"] = loss
    return scalars


def sentence(step: int, results: Mapping[str, Evaluation]) -> str:
    """The results as a line for a person."""
    parts = [
        f"{'' if name == 'weights' else name + ' '}loss {result.loss:.4f} (explains "
        f"{100 * result.explained:.1f} % of the linear baseline's)"
        for name, result in results.items()
    ]
    return f"Evaluation after step {step}: {', '.join(parts)}"


def not_finite(step: int, results: Mapping[str, Evaluation]) -> str:
    """What to say where one of the results after `step` is no number."""
    losses = ", ".join(f"{name} {result.loss}" for name, result in results.items())
    return (
        f"The evaluation after step {step} gives no finite loss ({losses}). Nothing was saved "
        'since the last checkpoint. Lower learning_rate, or set mixed_precision = "no".'
    )


def evaluate(
    model: Adapted,
    count: int,
    read: Callable[[int], EvalSample],
    variance: tuple[float, ...],
    processes: Processes = Processes(),
) -> Evaluation:
    """Evaluate the weights as they are; see `Evaluator`."""
    losses = torch.zeros(count, len(TIMES), dtype=torch.float64, device=model.device)
    for first in range(0, count, processes.size):
        index = first + processes.rank
        sample = read(index) if index < count else None
        passes = _passes() if sample is not None else []
        if model.sharded:
            _level(model, len(passes), processes)
        for part in passes:
            assert sample is not None
            try:
                losses[index, part] = _losses(model, sample, TIMES[part])
            except torch.OutOfMemoryError as error:
                height, width = (side * PIXELS_PER_LATENT for side in sample.x1.shape[-2:])
                raise PipeError(
                    f"{model.device} ran out of memory in the evaluation of an image of "
                    f"{width}x{height}. Set base_model_precision, give the evaluation's dataset a "
                    "lower resolution, or set eval_steps_interval = 0."
                ) from error
    processes.sum_(losses)  # each row is of one process, and zero in the others
    t = torch.tensor(TIMES)
    return Evaluation(
        tuple(losses.mean(dim=0).tolist()), tuple(linear_error(t, variance).tolist()), count
    )


def _level(model: Adapted, passes: int, processes: Processes) -> None:
    """Run idle as often as another process runs the sharded model more than this one."""
    most = torch.tensor(passes)
    processes.max_(most)
    run_idle(model, int(most) - passes)


def _passes() -> list[slice]:
    """Which of `TIMES` go through the model together."""
    starts = range(0, len(TIMES), _ROWS_PER_PASS)
    return [slice(start, start + _ROWS_PER_PASS) for start in starts]


def _losses(model: Adapted, sample: EvalSample, times: tuple[float, ...]) -> torch.Tensor:
    """The sample's loss at each of `times`, float32."""
    rows = len(times)
    t = torch.tensor(times, device=model.device)
    x1, x0 = (x.to(model.device).expand(rows, *x.shape) for x in (sample.x1, sample.x0))
    with torch.no_grad(), model.autocast():
        x_t = flow.interpolate(x1, x0, t)
        velocity = predict_velocity(model.transformer, x_t, t, [sample.prompt] * rows)
    mask = None
    if sample.mask is not None:
        mask = sample.mask.to(model.device).expand(rows, *sample.mask.shape)
    return flow.sample_losses(velocity, flow.target(x1, x0), mask)
