"""Draws the pictures of `loss.md` into `docs/images/`: `python docs/loss_plots.py`, in two minutes.

Two come from the formula alone. The third is measured: an adapter of the embedded model learns
its new shape by the project's own stages, order, draws and objective. Seeded throughout; on one
machine and with the same versions the pictures come out the same.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from statistics import NormalDist
from typing import Any

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray

import stages.bucket
import stages.discover
import stages.encode_vae
import stages.tokenize
from omnigen_pipe.config import EMBEDDED, TrainConfig, parse
from omnigen_pipe.demo.pictures import draw_pictures, new_scenes
from omnigen_pipe.progress import Progress
from omnigen_pipe.runs.freezing import freeze_today
from omnigen_pipe.runs.frozen import FrozenSamples, locate
from omnigen_pipe.runs.order import MicroBatch
from omnigen_pipe.training.baseline import channel_variance, explained, linear_error
from omnigen_pipe.training.batches import BatchReader
from omnigen_pipe.training.loss_window import (
    BINS,
    CENTRES,
    EDGES,
    WINDOW_STEPS,
    LossWindow,
    step_sums,
)
from omnigen_pipe.training.objective import pose, sample_losses
from omnigen_pipe.training.schedule import learning_rate
from omnigen_pipe.training.trainee import load_trainee
from omnigen_pipe.workspace import Workspace

matplotlib.use("Agg")
from matplotlib import pyplot as plt

IMAGES = Path(__file__).resolve().parent / "images"

#: SDXL's VAE, from the per-channel deviations that playground-v2.5's vae/config.json publishes as
#: `latents_std` (unscaled; it is trained on SDXL's latents), times the scaling factor, squared.
SDXL_VARIANCE = [(0.13025 * std) ** 2 for std in (8.4927, 5.9022, 6.5498, 5.2299)]

PICTURES = 240
STEPS = 600
BATCH = 8
FACTOR = 4
LEARNING_RATE = 1e-2
WARMUP_STEPS = 20
#: The last part of the run, whose rows are shown by t.
LAST_STEPS = 300

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """Per step `[steps]`: loss, baseline, their windowed means and explained variance. The
    latents' variance per channel. Of the last steps: t and loss of every row, and loss and
    baseline per bin of t `[BINS]`."""

    loss: Floats
    baseline: Floats
    window_loss: Floats
    window_baseline: Floats
    window_explained: Floats
    variance: list[float]
    row_t: Floats
    row_loss: Floats
    by_t_loss: list[float]
    by_t_baseline: list[float]

    def share_of_t(self) -> float:
        """How much of the rows' variance in loss lies between the bins of t, not within them."""
        bins = np.searchsorted(EDGES, self.row_t, side="right")
        between = np.array(self.by_t_loss)[bins].var()
        return float(between / self.row_loss.var())


def prepared(folder: Path) -> Workspace:
    """A workspace in `folder` with the demo's new pictures, encoded and tokenised."""
    draw_pictures(folder / "zorps", new_scenes(PICTURES))
    config = parse(
        {
            "model": {"pretrained_model_name_or_path": EMBEDDED},
            "defaults": {
                "resolution": 64,
                "resolution_type": "pixel",
                "aspect_bucket_alignment": 16,
                "caption_strategy": "textfile",
            },
            "dataset": [{"id": "zorps", "instance_data_dir": str(folder / "zorps")}],
            "lokr": {"factor": FACTOR},
            "train": {
                "max_train_steps": STEPS,
                "train_batch_size": BATCH,
                "learning_rate": LEARNING_RATE,
                "lr_warmup_steps": WARMUP_STEPS,
                "gradient_checkpointing": False,
            },
        },
        "the script",
    )
    workspace = Workspace(folder, config)
    for stage in (stages.discover, stages.bucket, stages.encode_vae, stages.tokenize):
        stage.run(workspace, Progress(quiet=True))
    return workspace


def micro_batches(frozen: FrozenSamples, config: TrainConfig) -> Iterator[tuple[MicroBatch, int]]:
    """Epoch after epoch, in the order of a run; each with its epoch."""
    for epoch in count():
        order = frozen.order(epoch, config, micro_batches=1)
        for number in range(len(order)):
            for micro in order.global_batch(number):
                yield micro, epoch


def measure(steps: int) -> Measured:
    """Train an adapter of the embedded model for `steps` steps on its new shape, with what the
    loss window says."""
    with tempfile.TemporaryDirectory() as folder:
        return _measured(prepared(Path(folder)), steps)


def _measured(workspace: Workspace, steps: int) -> Measured:
    config = workspace.config.train
    path = workspace.root / "samples.arrow"
    freeze_today(workspace, path, allow_missing=False)
    frozen = FrozenSamples.open(path)
    reader = BatchReader(workspace, frozen, locate(workspace, frozen), config)
    scaling = float(frozen.metadata["scaling_factor"])
    moments = ((reader.moments(row), 1.0) for row in range(len(frozen)))
    variance = channel_variance(moments, scaling, posterior=True)
    trainee = load_trainee(workspace, workspace.lokr(), torch.device("cpu"))
    window, last = LossWindow(WINDOW_STEPS), LossWindow(LAST_STEPS)
    rows: list[tuple[float, ...]] = []
    latest: deque[torch.Tensor] = deque(maxlen=LAST_STEPS)
    for step, (micro, epoch) in enumerate(islice(micro_batches(frozen, config), steps)):
        batch = reader.read(micro, epoch, step)
        losses = sample_losses(trainee, pose(trainee, batch), batch)
        for group in trainee.optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, config)
        losses.mean().backward()
        trainee.gradients.clip(trainee.gradients.norm(), config)
        trainee.optimizer.step()
        trainee.gradients.zero()

        baselines = linear_error(batch.t, variance)
        sums = step_sums(batch.t, losses, baselines)
        window.add(sums)
        last.add(sums)
        latest.append(torch.stack([batch.t, losses.detach()]).double())
        seen = window.values()
        rows.append(
            (
                losses.mean().item(),
                baselines.mean().item(),
                seen["loss"],
                seen["baseline"],
                seen["explained"],
            )
        )
        if (step + 1) % WINDOW_STEPS == 0:
            print(f"step {step + 1}: {window.progress_text()}", flush=True)
    values = last.values()
    row_t, row_loss = torch.cat(list(latest), dim=1).numpy()
    by_t = values["loss_by_t"], values["baseline_by_t"]
    return Measured(*np.array(rows).T, variance, row_t, row_loss, *by_t)


def logit_normal(t: Floats) -> Floats:
    """The density of t = sigmoid(n), n standard normal: φ(logit t) / (t(1-t))."""
    logit = np.log(t / (1 - t))
    density: Floats = np.exp(-(logit**2) / 2) / np.sqrt(2 * np.pi) / (t * (1 - t))
    return density


def baseline(t: Floats, variance: Sequence[float]) -> Floats:
    """`linear_error` on an array."""
    return linear_error(torch.from_numpy(t), variance).numpy()


def average(variance: Sequence[float]) -> float:
    """The mean baseline under the logit-normal t, by quadrature over 20,000 equal masses."""
    normal = NormalDist()
    n = np.array([normal.inv_cdf((k + 0.5) / 20_000) for k in range(20_000)])
    return float(baseline(1 / (1 + np.exp(-n)), variance).mean())


def draw_baseline() -> Any:
    """Figure 1: the linear baseline over t for several variances, with the grid of t."""
    figure, axes = plt.subplots(figsize=(7, 4.2))
    t = np.linspace(0, 1, 501)
    for s2, colour in ((2.0, "#b2182b"), (1.0, "#555555"), (0.5, "#2166ac")):
        label = f"s² = {s2:g} (mean {average([s2]):.2f})"
        axes.plot(t, baseline(t, [s2]), color=colour, label=label)
    label = f"SDXL's VAE, four channels (mean {average(SDXL_VARIANCE):.2f})"
    axes.plot(t, baseline(t, SDXL_VARIANCE), color="black", linewidth=2.2, label=label)
    grid = np.array(CENTRES)
    axes.plot(grid, baseline(grid, SDXL_VARIANCE), "o", color="black", label="grid of evaluation")
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set(
        xlim=(0, 1),
        ylim=(0, 3.2),
        xlabel="t  (0: noise alone, 1: clean latent)",
        ylabel="loss of the linear predictor",
    )
    axes.legend(frameon=False, loc="lower right", fontsize=8)
    return figure


def draw_share() -> Any:
    """Figure 2: how often each t is drawn, and how much of the mean baseline comes from there."""
    figure, axes = plt.subplots(figsize=(7, 3.8))
    t = np.linspace(0.001, 0.999, 999)
    density = logit_normal(t)
    share = density * baseline(t, SDXL_VARIANCE) / average(SDXL_VARIANCE)
    axes.fill_between(t, density, color="#c9d8e8", label="how often t is drawn")
    axes.plot(t, share, color="#b2182b", label="share of the mean linear loss (SDXL's VAE)")
    for index, edge in enumerate(EDGES):
        label = f"edges of the {BINS} bins: an eighth of the draws in each" if index == 0 else None
        axes.axvline(edge, ymax=0.79, color="#777777", linewidth=0.8, linestyle=":", label=label)
    axes.set(xlim=(0, 1), ylim=(0, 2.35), xlabel="t", ylabel="density")
    axes.legend(frameon=False, loc="upper center", fontsize=8.5, ncols=1)
    return figure


def draw_measured(measured: Measured) -> Any:
    """Figure 3: a run's losses step by step, what the window makes of them, and loss by t."""
    figure, (upper, lower, by_t) = plt.subplots(
        3, 1, figsize=(7, 8.2), height_ratios=(1.25, 0.8, 1.0), layout="constrained"
    )
    steps = np.arange(1, len(measured.loss) + 1)
    upper.plot(steps, measured.loss, ".", color="#9db7d3", markersize=2.5, label="loss of one step")
    window = f"mean of {WINDOW_STEPS} steps"
    upper.plot(steps, measured.window_loss, color="#2166ac", label=f"loss, {window}")
    label = f"linear baseline, {window}"
    upper.plot(steps, measured.window_baseline, color="black", linewidth=1, label=label)
    upper.set(ylim=(0, 2.2), xlim=(0, len(steps)), ylabel="loss")
    upper.legend(frameon=False, fontsize=8.5)

    per_step = 1 - measured.loss / measured.baseline
    lower.plot(steps, per_step, ".", color="#9db7d3", markersize=2.5, label="one step")
    lower.plot(steps, measured.window_explained, color="#b2182b", label=window)
    lower.axhline(0, color="black", linewidth=1)
    lower.set(
        ylim=(-0.25, 1), xlim=(0, len(steps)), xlabel="step", ylabel="explained: 1 - loss/linear"
    )
    lower.legend(frameon=False, fontsize=8.5, loc="center right")

    label = f"loss of one row, last {LAST_STEPS} steps"
    by_t.plot(measured.row_t, measured.row_loss, ".", color="#9db7d3", markersize=2, label=label)
    t = np.linspace(0.01, 0.99, 200)
    by_t.plot(
        t, baseline(t, measured.variance), color="black", linewidth=1, label="linear baseline"
    )
    label = "their mean per bin of t; in % what it explains"
    by_t.plot(CENTRES, measured.by_t_loss, "o-", color="#2166ac", label=label)
    for centre, loss, base in zip(CENTRES, measured.by_t_loss, measured.by_t_baseline, strict=True):
        by_t.annotate(
            f"{100 * explained(loss, base):.0f} %",
            (centre, 0.62),
            ha="center",
            fontsize=8.5,
        )
    by_t.set(xlim=(0, 1), ylim=(0, 2.6), xlabel="t", ylabel="loss")
    by_t.legend(frameon=False, fontsize=8.5, loc="upper left")
    return figure


def save(figure: Any, path: Path) -> None:
    """Write `figure` as a PNG without a date or a version in it."""
    figure.savefig(path, dpi=100, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    print(f"{path} ({path.stat().st_size / 1024:.0f} KiB)")


def main() -> None:
    """Draw all three, and print the figures that the page quotes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of figure 3")
    parser.add_argument("--folder", type=Path, default=IMAGES, help="where the pictures go")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the model is too small for more
    save(draw_baseline(), options.folder / "loss-baseline.png")
    save(draw_share(), options.folder / "loss-share.png")
    measured = measure(options.steps)
    loss, base = measured.loss[-LAST_STEPS:], measured.baseline[-LAST_STEPS:]
    print(
        f"last {len(loss)} steps: loss {loss.mean():.3f} ± {loss.std():.3f}, linear "
        f"{base.mean():.3f} ± {base.std():.3f}, explains {100 * (1 - loss.sum() / base.sum()):.0f}"
        f" % ± {100 * (loss / base).std():.0f}; {100 * measured.share_of_t():.0f} % of the rows' "
        "variance is between the bins of t"
    )
    save(draw_measured(measured), options.folder / "loss-measured.png")


if __name__ == "__main__":
    main()
