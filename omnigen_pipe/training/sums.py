"""What the micro-batches of a step add up to, over all processes: losses by kind, and requests."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from omnigen_pipe.runs.time_bins import BINS
from omnigen_pipe.training.baseline import linear_error
from omnigen_pipe.training.batches import Batch
from omnigen_pipe.training.loss_window import step_metrics, step_sums
from omnigen_pipe.training.processes import Processes


@dataclass
class StepSums:
    """Sums over the samples of a step. `by_time` are those of `loss_window`, without the rows that
    have other targets; `failed`, `interrupted` and `terminated` count processes."""

    loss: float = 0.0
    long_rows: float = 0.0
    regularised_loss: float = 0.0
    regularised: float = 0.0
    rolled_loss: float = 0.0
    rolled: float = 0.0
    failed: float = 0.0
    interrupted: float = 0.0
    terminated: float = 0.0
    by_time: torch.Tensor = field(
        default_factory=lambda: torch.zeros(3 * BINS, dtype=torch.float64)
    )

    def collect(
        self, losses: list[tuple[Batch, torch.Tensor]], variance: tuple[float, ...]
    ) -> list[float]:
        """Take in the losses `[B]` of this process' micro-batches; returns them sample by sample.

        Waits for the device, once.
        """
        if not losses:
            return []
        found = torch.cat([of_batch for _, of_batch in losses]).cpu().double()
        t = torch.cat([batch.t for batch, _ in losses])
        regularised = torch.cat([batch.regularisation for batch, _ in losses])
        rolled = torch.cat([_rolled(batch) for batch, _ in losses])
        plain = ~(regularised | rolled)
        self.loss = float(found.sum())
        self.regularised, self.rolled = float(regularised.sum()), float(rolled.sum())
        self.regularised_loss = float(found[regularised].sum())
        self.rolled_loss = float(found[rolled].sum())
        self.by_time = step_sums(t[plain], found[plain], linear_error(t[plain], variance))
        return list(found.tolist())

    def exchange(self, processes: Processes) -> None:
        """Replace every number by its sum over the processes."""
        names = [name for name in vars(self) if name != "by_time"]
        numbers = torch.tensor([getattr(self, name) for name in names], dtype=torch.float64)
        values = torch.cat((numbers, self.by_time))
        processes.sum_(values)
        for name, value in zip(names, values.tolist(), strict=False):
            setattr(self, name, value)
        self.by_time = values[len(names) :]

    def metrics(self, samples: int) -> dict[str, object]:
        """The step's losses as they stand in `metrics.jsonl`, for a step of so many samples."""
        found: dict[str, object] = {
            "loss": self.loss / samples,
            "samples": samples,
            "long_rope_share": self.long_rows / samples,
            **step_metrics(self.by_time),
        }
        if self.regularised:
            found["regularisation_samples"] = round(self.regularised)
            found["regularisation_loss"] = self.regularised_loss / self.regularised
        if self.rolled:
            found["rollout_samples"] = round(self.rolled)
            found["rollout_loss"] = self.rolled_loss / self.rolled
        return found


def _rolled(batch: Batch) -> torch.Tensor:
    """Which rows are rolled out, `[B]`."""
    if batch.rollout is None:
        return torch.zeros(len(batch.sample_ids), dtype=torch.bool)
    return batch.rollout.steps > 0
