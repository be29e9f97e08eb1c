"""`estimate`: the memory that training will take."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from omnigen_pipe.cli.command import command
from omnigen_pipe.cli.options import HERE, JsonOption, QuietOption, WorkspaceOption, open_workspace


@command(
    "estimate",
    epilog="Examples:  \n"
    "`omnigen-pipe estimate`  \n"
    "`omnigen-pipe estimate --vram 12 --resolution 512`  \n"
    "`omnigen-pipe estimate -w my-project --batch 4 --json`",
)
def estimate(
    workspace: WorkspaceOption = HERE,
    vram: Annotated[
        float, typer.Option(min=1, max=10_000, metavar="GB", help="Memory of the card, as sold.")
    ] = 24.0,
    resolution: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="PIXELS",
            help="Estimate for square images of this side.  Default: the workspace's buckets.",
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Samples per micro-batch.  Default: train_batch_size.")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Estimate training's peak memory on a GPU, part by part; needs neither a GPU nor weights."""
    import omnigen_pipe.memory.report as memory

    opened, progress = open_workspace(workspace, quiet)
    report = memory.run(opened, progress, vram, resolution, batch)
    if as_json:
        print(json.dumps(report.as_json(), indent=2))
    else:
        memory.show(report)
