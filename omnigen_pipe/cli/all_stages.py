"""All five stages in order: `run`, and what `demo` shares with it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from manifests.errors import UsageError
from omnigen_pipe.cli.command import command
from omnigen_pipe.cli.options import (
    HERE,
    DeviceOption,
    JsonOption,
    QuietOption,
    StrictOption,
    WorkspaceOption,
    open_workspace,
)
from omnigen_pipe.cli.outcome import leave

if TYPE_CHECKING:
    from collections.abc import Callable

    from omnigen_pipe.progress import Progress
    from omnigen_pipe.summary import Summary
    from omnigen_pipe.workspace import Workspace


@command("run", epilog="Examples:  \n`omnigen-pipe run`  \n`omnigen-pipe run -w my-project --json`")
def run(
    workspace: WorkspaceOption = HERE,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    strict: StrictOption = False,
    quiet: QuietOption = False,
) -> None:
    """Do all five stages, skipping what is done."""
    opened, progress = open_workspace(workspace, quiet)
    check_machine(device)
    summaries = run_stages(opened, progress, device, shown=not as_json)
    if as_json:
        print(json.dumps([summary.as_json() for summary in summaries], indent=2, default=str))
    leave(summaries, strict)


def check_machine(device: str | None) -> None:
    """Raise `UsageError`, before hours of work, where all five stages could not run: under
    torchrun, or on a `device` that is not there."""
    from omnigen_pipe.training.processes import from_environment

    if from_environment().size > 1:
        raise UsageError(
            "torchrun starts `omnigen-pipe train` only. Run the other stages once, without it."
        )
    if device is not None:
        from omnigen_pipe.device import pick_device

        pick_device(device)


def run_stages(
    opened: Workspace, progress: Progress, device: str | None, shown: bool
) -> list[Summary]:
    """All five stages in order, each summary `shown` as it comes; stops after one that failed."""
    import stages.bucket
    import stages.discover
    import stages.encode_vae
    import stages.tokenize
    import stages.train
    from omnigen_pipe.summary import show

    steps: tuple[Callable[[], Summary], ...] = (
        lambda: stages.discover.run(opened, progress),
        lambda: stages.bucket.run(opened, progress),
        lambda: stages.encode_vae.run(opened, progress, device=device),
        lambda: stages.tokenize.run(opened, progress),
        lambda: stages.train.run(opened, progress, device=device),
    )
    stages.train.check(opened)  # before hours of other stages
    stages.train.check_hub(opened)
    summaries: list[Summary] = []
    for step in steps:
        summaries.append(step())
        if shown:
            show(summaries[-1])
        if summaries[-1].failed or summaries[-1].signal is not None:
            break
    if shown and not any(summary.changed or summary.failed for summary in summaries):
        print("Everything was up to date: no work was done.")
    return summaries
