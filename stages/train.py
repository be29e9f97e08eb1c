"""train: the frozen samples and the base model become a LoKr adapter.

A run freezes its samples at its first start and goes on from its newest checkpoint ever after.
Under torchrun every process runs this; the first one alone prepares, writes and reports.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import TYPE_CHECKING

from manifests.errors import PipeError, UsageError
from omnigen_pipe import webhooks
from omnigen_pipe.config import CONFIG_NAME, LokrConfig
from omnigen_pipe.events import Events
from omnigen_pipe.model_files import lone_model
from omnigen_pipe.progress import Progress
from omnigen_pipe.runs import pushing
from omnigen_pipe.runs.checkpoints import Checkpoint, names
from omnigen_pipe.runs.freezing import (
    NOTHING_TO_EVALUATE,
    changes_since,
    check_evaluation,
    freeze_today,
)
from omnigen_pipe.runs.frozen import FrozenSamples
from omnigen_pipe.runs.pushing import CheckpointPusher
from omnigen_pipe.runs.run import Run, Start
from omnigen_pipe.runs.trackers import check_trackers
from omnigen_pipe.sampling import clip, validation
from omnigen_pipe.sampling.requests import Settings
from omnigen_pipe.sampling.source import Source
from omnigen_pipe.stop import Stopped, stopped_by_signal
from omnigen_pipe.summary import Summary
from omnigen_pipe.training.processes import Processes, connected, device_name, from_environment
from omnigen_pipe.workspace import Workspace

if TYPE_CHECKING:
    from omnigen_pipe.training.batches import Batch

#: Seconds in which webhooks may still be told that a signal ended the training.
_SIGNALLED_PATIENCE = 3.0


def run(
    workspace: Workspace,
    progress: Progress,
    device: str | None = None,
    allow_missing: bool = False,
) -> Summary:
    """Start or go on with the configured run, and push it where it is to be pushed; see
    `training.loop` for the work itself.

    A signal ends it wherever it is: in the loop after the step, elsewhere at once.
    """
    lokr = check(workspace)
    config = workspace.config
    name = config.train.tracker_run_name
    this = Run(name, workspace.run_folder(name))
    processes = from_environment()
    progress.silent = not processes.is_first
    summary = Summary("train", changed=False)
    events = Events()
    hooks = webhooks.opened(config.webhook, name) if processes.is_first else []
    events.listeners += [hook.tell for hook in hooks]
    try:
        with stopped_by_signal():
            tells = _train(
                workspace, progress, this, lokr, processes, device, allow_missing, summary, events
            )
            if processes.is_first and summary.signal is None and config.hub.push_to_hub:
                _push(workspace, progress, this, lokr, summary, events)
    except Stopped as stopped:
        tells = True
        _report_stop(this, summary, stopped.signal)
    except Exception as error:
        events.send("error", kind=type(error).__name__, message=str(error))
        for sentence in [*summary.notes, *webhooks.close(hooks)]:
            progress.note(sentence, always=True)  # no summary is shown
        raise
    if tells or summary.changed:
        events.send(
            "end",
            step=summary.counts["steps"],
            loss=summary.details.get("loss"),
            repository=config.hub.hub_model_id if "pushed" in summary.details else None,
            failed=summary.failed,
            signal=summary.signal,
        )
    patience = webhooks.PATIENCE if summary.signal is None else _SIGNALLED_PATIENCE
    summary.notes += webhooks.close(hooks, patience)
    return summary


def _report_stop(this: Run, summary: Summary, signal: int) -> None:
    """Say in `summary` what a signal has left that did not wait for a step's end."""
    summary.signal = signal
    saved = pushing.newest(this)
    step = saved.position.step if saved else 0
    summary.counts = {"steps": step}
    if saved is None:
        left = "No checkpoint was saved yet. Run the same command to go on."
    elif step < summary.details.get("total_steps", math.inf):
        left = f"The newest checkpoint is of step {step}. Run the same command to go on."
    else:
        left = (
            "The run is complete and saved. Run the same command for what is left: it trains "
            "nothing anew, draws the pictures that are lacking, and pushes what was not pushed."
        )
    summary.notes.append(f"Stopped by a signal. {left}")


def _train(
    workspace: Workspace,
    progress: Progress,
    this: Run,
    lokr: LokrConfig,
    processes: Processes,
    device: str | None,
    allow_missing: bool,
    summary: Summary,
    events: Events,
) -> bool:
    """Train to the end or a signal, where the run is not complete, and fill in `summary`; whether
    there was anything to do."""
    config = workspace.config.train
    device = device_name(processes, device)
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
        if (
            checkpoint is None
            or checkpoint.position.step < total
            or processes.on_first(lambda: _lacks_pictures(workspace, this, total))
        ):
            from omnigen_pipe.training.session import Session

            pushers: list[CheckpointPusher] = []
            if checkpoint is None or checkpoint.position.step < total:
                processes.on_first(
                    lambda: pushers.extend(
                        _checkpoint_pushers(workspace, this, lokr, total, events)
                    )
                )
            events.listeners += [pusher.tell for pusher in pushers]
            session = Session(
                workspace,
                progress,
                this,
                start,
                frozen,
                lokr,
                processes,
                lambda largest: _estimated(workspace, lokr, largest),
                events,
            )
            events.send(
                "start",
                step=checkpoint.position.step if checkpoint else 0,
                total_steps=total,
                samples=len(frozen),
            )
            try:
                session.train(device, checkpoint, summary)
                if summary.signal is None:
                    for pusher in pushers:
                        pusher.wait()
            finally:
                for pusher in pushers:
                    summary.notes += pusher.close()
            return True
    summary.counts = {"samples": len(frozen), "steps": checkpoint.position.step, "steps now": 0}
    summary.details["adapter"] = str(checkpoint.adapter)
    summary.notes.append(f"The run `{this.name}` is complete. Adapter: {checkpoint.adapter}")
    return False


def _checkpoint_pushers(
    workspace: Workspace, this: Run, lokr: LokrConfig, total: int, events: Events
) -> list[CheckpointPusher]:
    """What pushes checkpoints, where they are to be pushed.

    Raises `UsageError` where anything is to be pushed and the hub refuses it.
    """
    config = workspace.config.hub
    if not config.push_to_hub:
        return []
    pusher = pushing.Pusher(workspace, this, lokr, pushing.check(workspace))
    return [CheckpointPusher(pusher, total, events)] if config.push_checkpoints_to_hub else []


def _push(
    workspace: Workspace,
    progress: Progress,
    this: Run,
    lokr: LokrConfig,
    summary: Summary,
    events: Events,
) -> None:
    """Push the complete run, unless it is on the hub already; what fails is said in `summary`."""
    checkpoint = pushing.newest(this)
    if checkpoint is None or checkpoint.position.step < summary.details["total_steps"]:
        return
    if pushing.is_pushed(workspace, this, checkpoint):
        return
    progress.note(f"Pushing to {workspace.config.hub.hub_model_id}.")
    try:
        repository = pushing.check(workspace)
        address = pushing.Pusher(workspace, this, lokr, repository).push(checkpoint)
    except PipeError as error:
        summary.failed = True
        events.send("error", kind="push", message=str(error))
        summary.notes.append(
            f"The run is complete and saved, and was not pushed. {error} Then run "
            "`omnigen-pipe train` again: it pushes what was not pushed, and trains nothing anew."
        )
        return
    summary.changed = True
    summary.details["pushed"] = address
    summary.notes.append(f"Pushed: {address}")


def check_hub(workspace: Workspace) -> None:
    """Raise `UsageError` where the run is to be pushed and the hub would refuse it.

    A run whose newest checkpoint is on the hub already asks nothing: it may be complete.
    """
    if not workspace.config.hub.push_to_hub:
        return
    name = workspace.config.train.tracker_run_name
    this = Run(name, workspace.run_folder(name))
    checkpoint = pushing.newest(this)
    if checkpoint is None or not pushing.is_pushed(workspace, this, checkpoint):
        pushing.check(workspace)


def _lacks_pictures(workspace: Workspace, this: Run, total: int) -> bool:
    """Whether the end of a run that is complete lacks validation pictures."""
    if not workspace.config.validation.validation_step_interval:
        return False
    own = Source.of(workspace).settings()
    return validation.is_lacking(workspace, own, this.folder, total, total)


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
    options = workspace.config.validation
    if options.validation_step_interval:
        validation.wanted(workspace, Settings())
        if options.validation_preview:  # a folder that is not there is said at once
            name, revision = options.validation_preview_model, options.validation_preview_revision
            lone_model(workspace, name, revision, download=False)
    clip.check(workspace)
    check_trackers(config.report_to)
    if from_environment().is_first:
        webhooks.addresses(workspace.config.webhook)
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
