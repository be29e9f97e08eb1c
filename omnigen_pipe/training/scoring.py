"""`omnigen-pipe eval`: any checkpoint's stable evaluation, after the fact.

On a run's frozen evaluation samples, exactly as training evaluates; so a number can be had again,
and adapters of different runs can be compared on the samples of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from manifests.errors import UsageError
from omnigen_pipe.config import LokrConfig
from omnigen_pipe.device import exact_float32, pick_device
from omnigen_pipe.model.lokr import adapter_config
from omnigen_pipe.progress import Progress
from omnigen_pipe.runs.checkpoints import EMA_NAME, locate_adapter
from omnigen_pipe.runs.freezing import check_transformer
from omnigen_pipe.runs.frozen import FrozenSamples, locate
from omnigen_pipe.runs.run import Run
from omnigen_pipe.training.adapted import Adapted, load_adapted
from omnigen_pipe.training.batches import BatchReader
from omnigen_pipe.training.evaluation import TIMES, Evaluation, evaluate, images
from omnigen_pipe.workspace import Workspace


@dataclass(frozen=True)
class Score:
    """The evaluation of one adapter file; `adapter` None is the base model without any."""

    adapter: Path | None
    evaluation: Evaluation

    def as_json(self) -> dict[str, Any]:
        """The numbers, with the file they belong to."""
        return {
            "adapter": str(self.adapter) if self.adapter else None,
            **self.evaluation.as_json(),
        }


def score(
    workspace: Workspace,
    progress: Progress,
    places: Sequence[Path],
    *,
    run_name: str | None = None,
    base: bool = False,
    device_name: str | None = None,
) -> list[Score]:
    """Evaluate the adapters at `places`, and first the base model alone if `base`.

    A place is an adapter's file, a checkpoint's folder or a run's; of a checkpoint its average is
    evaluated, too. Without places it is the newest checkpoint of the run. Damaged checkpoints that
    were passed over are named on stderr. Raises `UsageError` where the run has no evaluation
    samples, or a place holds no adapter.
    """
    config = workspace.config.train
    name = run_name or config.tracker_run_name
    run = Run(name, workspace.run_folder(name))
    reader, variance = _inputs(workspace, run)
    began = run.start().settings.get("base_model_precision", "no_change")
    if began != config.base_model_precision:
        progress.note(
            f"The run `{name}` has base_model_precision {began}, and this is evaluated in "
            f"{config.base_model_precision}: the numbers do not compare with those it wrote.",
            always=True,
        )
    files = [file for place in places or [run.folder] for file in _adapters(place, progress)]
    count = images(len(reader.frozen), config)
    device = pick_device(device_name)

    def scored(model: Adapted, file: Path | None) -> Score:
        result = Score(file, evaluate(model, count, reader.read_eval, variance))
        advance(1)
        return result

    scores = []
    label, total = f"Evaluating on {count} images", len(files) + base
    with exact_float32(), progress.task(label, total) as advance:
        loaded: tuple[LokrConfig, Adapted] | None = None
        for file in [None, *files] if base else files:
            lokr = adapter_config(file) if file else workspace.lokr()
            if loaded is None or (file is not None and loaded[0] != lokr):
                loaded = None  # two models at once may not fit
                loaded = (lokr, load_adapted(workspace, lokr, device))
            model = loaded[1]
            if file is None:
                with model.base_only():
                    scores.append(scored(model, None))
            else:
                model.start_from(file)
                scores.append(scored(model, file))
    return scores


def _inputs(workspace: Workspace, run: Run) -> tuple[BatchReader, tuple[float, ...]]:
    variance = run.variance()
    if not run.samples.is_file() or variance is None:
        raise UsageError(
            f"The run `{run.name}` has not been started: {run.folder} holds no samples to evaluate "
            "on. Train it first, or name another with --run."
        )
    frozen = FrozenSamples.open(run.samples, ("eval",))
    if not len(frozen):
        raise UsageError(
            f"The run `{run.name}` was started without evaluation samples. Give a dataset "
            'dataset_type = "eval" and start another run.'
        )
    check_transformer(workspace, run, frozen)
    reader = BatchReader(workspace, frozen, locate(workspace, frozen), workspace.config.train)
    return reader, variance


def _adapters(place: Path, progress: Progress) -> Iterator[Path]:
    """The adapter at `place`, and its average where it lies in a checkpoint that has one."""
    file, passed_over = locate_adapter(place)
    for sentence in passed_over:
        progress.note(sentence, always=True)
    yield file
    average = file.with_name(EMA_NAME)
    if place.is_dir() and average.is_file():
        yield average


def show(scores: Sequence[Score], root: Path) -> None:
    """Print scores for a person on stdout: a row each, and the loss at every t."""
    from rich.console import Console
    from rich.table import Column, Table

    times = [f"t {t:.2f}" for t in TIMES]
    numbers_of = [
        Column(name, justify="right", no_wrap=True) for name in ("loss", "explained", *times)
    ]
    table = Table(Column("adapter", no_wrap=True), *numbers_of, show_edge=False)
    for one in scores:
        result = one.evaluation
        numbers = [f"{loss:.3f}" for loss in result.losses]
        name = _name(one.adapter, root)
        table.add_row(name, f"{result.loss:.4f}", f"{100 * result.explained:.1f} %", *numbers)
    baseline = scores[0].evaluation.baseline
    numbers = [f"{loss:.3f}" for loss in baseline]
    table.add_row("linear baseline", f"{fmean(baseline):.4f}", "", *numbers)
    # As wide as it is: a number that is cut off says nothing.
    needed = Console(width=1000).measure(table).maximum
    console = Console(highlight=False)
    console.width = max(console.width, needed)
    console.print(table)
    console.print(f"On {scores[0].evaluation.images} images, at {len(TIMES)} times each.")


def _name(adapter: Path | None, root: Path) -> str:
    if adapter is None:
        return "base model"
    absolute = adapter.absolute()
    return str(absolute.relative_to(root)) if absolute.is_relative_to(root) else str(adapter)
