"""train: the frozen samples and the base model become a LoKr adapter.

A run freezes its samples at its first start and goes on from its newest checkpoint ever after.
Under torchrun every process runs this; the first one alone prepares, writes and reports.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from manifests.errors import UsageError
from omnigen_pipe.config import CONFIG_NAME, LokrConfig
from omnigen_pipe.progress import Progress
from omnigen_pipe.runs.checkpoints import Checkpoint, names
from omnigen_pipe.runs.freezing import (
    NOTHING_TO_EVALUATE,
    changes_since,
    check_evaluation,
    freeze_today,
)
from omnigen_pipe.runs.frozen import FrozenSamples
from omnigen_pipe.runs.run import Run, Start
from omnigen_pipe.summary import Summary
from omnigen_pipe.training.processes import Processes, connected, device_name, from_environment
from omnigen_pipe.workspace import Workspace

if TYPE_CHECKING:
    from omnigen_pipe.training.batches import Batch


def run(
    workspace: Workspace,
    progress: Progress,
    device: str | None = None,
    allow_missing: bool = False,
) -> Summary:
    """Start or go on with the configured run; see `training.loop` for the work itself."""
    config = workspace.config.train
    lokr = check(workspace)
    this = Run(config.tracker_run_name, workspace.run_folder(config.tracker_run_name))
    processes = from_environment()
    device = device_name(processes, device)
    progress.silent = not processes.is_first
    summary = Summary("train", changed=False)

    with connected(processes, device), ExitStack() as stack:
        processes.on_first(lambda: stack.enter_context(this.alone()))
        start, checkpoint, notes = processes.on_first(
            lambda: _prepare(workspace, this, lokr, processes, allow_missing)
        )
        for note in notes:
            summary.say(progress, note)
        frozen = FrozenSamples.open(this.samples)
        summary.left_out = frozen.left_out()
        total = frozen.total_steps(config, start.micro_batches)
        summary.details = {"run": str(this.folder), "total_steps": total}
        if checkpoint is None or checkpoint.position.step < total:
            from omnigen_pipe.training.session import Session

            session = Session(
                workspace,
                progress,
                this,
                start,
                frozen,
                lokr,
                processes,
                lambda largest: _estimated(workspace, lokr, largest),
            )
            session.train(device, checkpoint, summary)
            return summary
    summary.counts = {"samples": len(frozen), "steps": checkpoint.position.step, "steps now": 0}
    summary.details["adapter"] = str(checkpoint.adapter)
    summary.notes.append(f"The run `{this.name}` is complete. Adapter: {checkpoint.adapter}")
    return summary


def _estimated(workspace: Workspace, lokr: LokrConfig, batch: Batch) -> int:
    """Bytes that training on batches such as `batch` should allocate on a GPU at its peak."""
    from omnigen_pipe.memory.estimate import estimate_peak
    from omnigen_pipe.memory.skeleton import architecture

    shapes = architecture(workspace)
    rows, tokens = len(batch.sample_ids), len(batch.prompts[0])
    found = estimate_peak(shapes, workspace.config.train, lokr, batch.bucket, rows, tokens)
    return found.allocated


def check(workspace: Workspace) -> LokrConfig:
    """The adapter to train; raises `UsageError` for what is wrong without looking at any data."""
    config = workspace.config.train
    if config.max_train_steps == 0 and config.num_train_epochs == 0:
        raise UsageError(
            f"{workspace.root / CONFIG_NAME}: [train] says no end: set max_train_steps or "
            "num_train_epochs."
        )
    folder = workspace.run_folder(config.tracker_run_name) / "checkpoints"
    if (
        config.init_lora is not None
        and not workspace.path(config.init_lora).exists()
        and not names(folder)  # a run that goes on reads it no more
    ):
        raise UsageError(f"init_lora names {workspace.path(config.init_lora)}, which is not there.")
    if config.eval_steps_interval and not names(folder):
        splits = {dataset.split for dataset in workspace.config.datasets}
        if "eval" not in splits:
            raise UsageError(NOTHING_TO_EVALUATE)
    return workspace.lokr()


def _prepare(
    workspace: Workspace, this: Run, lokr: LokrConfig, processes: Processes, allow_missing: bool
) -> tuple[Start, Checkpoint | None, list[str]]:
    """A run's start, its newest checkpoint, and what to say; a new run is frozen first."""
    checkpoint, notes = this.resume_point(workspace.config.train.resume_from_checkpoint)
    if this.has_begun():
        this.start()  # refuses damaged samples before anything reads them
        check_evaluation(workspace, this)
        start, changes = this.go_on(workspace, lokr, processes.size)
        return start, checkpoint, notes + changes + changes_since(workspace, this)
    start = this.begin(
        workspace,
        lokr,
        processes.size,
        lambda: freeze_today(workspace, this.samples, allow_missing),
    )
    return start, None, notes
