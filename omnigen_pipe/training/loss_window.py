"""Loss by time, beside the linear baseline: sums of one step, and a window over many.

A step's loss mostly tells which t were drawn. So rows are counted by t, in eight bins of equal
mass under the logit-normal t of training: each holds an eighth of the rows, so every bin fills
up as fast as the others and is as exact, the plain mean of the eight is the loss, and their
medians t = sigmoid(Φ⁻¹((k+½)/8)) are the grid on which evaluation measures. Bins of equal width
would leave 2.6 % of the rows to each of the outer two: five in fifty steps of four samples.

Everything is a sum, so that micro-batches and processes add up. Rows with another target
(regularisation data, rolled-out x_t) do not belong in here: the baseline says nothing of them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch

from omnigen_pipe.runs.time_bins import BINS, CENTRES, EDGES
from omnigen_pipe.training.baseline import explained

#: Optimizer steps that the window remembers.
WINDOW_STEPS = 50


def step_sums(t: torch.Tensor, losses: torch.Tensor, baselines: torch.Tensor) -> torch.Tensor:
    """What rows contribute: `[3·BINS]`, float64, on the CPU.

    Number of rows per bin, then the sum of their losses per bin, then of their baselines; all
    three arguments are `[B]`, any B, and may be on any device. The vectors of micro-batches and
    processes add up to that of all their rows. It waits for the device that computes `losses`:
    call it once a step, on the losses of all micro-batches.
    """
    values = [x.detach().to("cpu", torch.float64) for x in (t, losses, baselines)]
    edges = torch.tensor(EDGES, dtype=torch.float64)
    bins = torch.bucketize(values[0], edges, right=True)
    rows = torch.stack((torch.ones_like(values[0]), values[1], values[2]))
    return torch.zeros(3, BINS, dtype=torch.float64).index_add_(1, bins, rows).flatten()


def step_metrics(sums: torch.Tensor) -> dict[str, Any]:
    """One step's sums for `metrics.jsonl`: means, and per bin lists, with None where no row is."""
    counts, losses, baselines = _table(sums)
    loss, baseline = _mean(counts, losses), _mean(counts, baselines)
    return {
        "baseline": baseline,
        "explained": _explained(loss, baseline),
        "samples_by_t": [int(n) for n in counts],
        "loss_by_t": [_mean([n], [x]) for n, x in zip(counts, losses, strict=True)],
        "baseline_by_t": [_mean([n], [x]) for n, x in zip(counts, baselines, strict=True)],
    }


def sums_of(metrics: Mapping[str, Any]) -> torch.Tensor:
    """The sums that `step_metrics` made a line of, to rounding: a resumed run fills its window."""
    counts = metrics["samples_by_t"]
    rows = [[float(n) for n in counts]]
    for name in ("loss_by_t", "baseline_by_t"):
        rows.append([n * (x or 0.0) for n, x in zip(counts, metrics[name], strict=True)])
    return torch.tensor(rows, dtype=torch.float64).flatten()


class LossWindow:
    """The last `steps` steps' sums, as one: what a person looks at."""

    def __init__(self, steps: int = WINDOW_STEPS) -> None:
        self._sums: deque[torch.Tensor] = deque(maxlen=steps)

    def add(self, sums: torch.Tensor) -> None:
        """Remember one step's `step_sums`, and forget the step that is too old."""
        self._sums.append(sums.detach().to("cpu", torch.float64).clone())

    def __len__(self) -> int:
        """How many steps are remembered."""
        return len(self._sums)

    def sums(self) -> torch.Tensor:
        """The sum over the remembered steps, `[3·BINS]`, added up anew each time."""
        if not self._sums:
            return torch.zeros(3 * BINS, dtype=torch.float64)
        return torch.stack(list(self._sums)).sum(dim=0)

    def values(self) -> dict[str, Any]:
        """Of all remembered rows: `loss`, and what `step_metrics` says of their sums."""
        counts, losses, _ = _table(self.sums())
        return {"loss": _mean(counts, losses), **step_metrics(self.sums())}

    def board(self) -> dict[str, float]:
        """Scalars for TensorBoard, such as `train/loss_by_t/0.46`; what has no row is absent."""
        values = self.values()
        scalars = {f"train/window/{name}": values[name] for name in ("loss", "baseline")}
        scalars["train/window/explained"] = values["explained"]
        for centre, loss, baseline in zip(
            CENTRES, values["loss_by_t"], values["baseline_by_t"], strict=True
        ):
            scalars[f"train/loss_by_t/{centre:.2f}"] = loss
            scalars[f"train/baseline_by_t/{centre:.2f}"] = baseline
            scalars[f"train/explained_by_t/{centre:.2f}"] = _explained(loss, baseline)
        return {name: value for name, value in scalars.items() if value is not None}

    def progress_text(self) -> str:
        """Such as `loss 1.213 (linear 1.402, explains 13 %)`; empty while there is no row."""
        values = self.values()
        loss, baseline, share = values["loss"], values["baseline"], values["explained"]
        if loss is None:
            return ""
        if share is None:
            return f"loss {loss:.3f}"
        return f"loss {loss:.3f} (linear {baseline:.3f}, explains {100 * share:.0f} %)"

    def bins_text(self) -> str:
        """Such as `by t 1.42 1.40 – 1.31 …`: the mean loss in each bin, `–` where no row is."""
        losses = self.values()["loss_by_t"]
        return "by t " + " ".join("–" if loss is None else f"{loss:.2f}" for loss in losses)


def _table(sums: torch.Tensor) -> tuple[list[float], list[float], list[float]]:
    counts, losses, baselines = sums.double().reshape(3, BINS).tolist()
    return counts, losses, baselines


def _mean(counts: list[float], totals: list[float]) -> float | None:
    rows = math.fsum(counts)
    return math.fsum(totals) / rows if rows else None


def _explained(loss: float | None, baseline: float | None) -> float | None:
    return explained(loss, baseline) if loss is not None and baseline else None
