"""The command that judges adapters: `eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from omnigen_pipe.cli.command import command
from omnigen_pipe.cli.options import (
    HERE,
    DeviceOption,
    JsonOption,
    QuietOption,
    WorkspaceOption,
    given_path,
    open_workspace,
)


@command(
    "eval",
    epilog="Examples:  \n"
    "`omnigen-pipe eval`  \n"
    "`omnigen-pipe eval --base runs/default/checkpoints/step-*`  \n"
    "`omnigen-pipe eval runs/other --run default --json`",
)
def evaluate(
    adapters: Annotated[
        list[Path] | None,
        typer.Argument(
            parser=given_path,
            help="Adapter files, checkpoint folders, or run folders: their newest checkpoint.  "
            "Default: the configured run.",
        ),
    ] = None,
    workspace: WorkspaceOption = HERE,
    run: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Evaluate on the frozen samples of this run.  Default: the configured run.",
        ),
    ] = None,
    base: Annotated[
        bool, typer.Option("--base", help="Evaluate the base model without an adapter as well.")
    ] = False,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Evaluate adapters at fixed times and noise, so that the losses of any two compare."""
    from omnigen_pipe.training import scoring

    opened, progress = open_workspace(workspace, quiet)
    scores = scoring.score(
        opened, progress, adapters or [], run_name=run, base=base, device_name=device
    )
    if as_json:
        print(json.dumps([score.as_json() for score in scores], indent=2))
    else:
        scoring.show(scores, opened.root)
