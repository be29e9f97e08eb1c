"""The commands that keep a workspace in order: `status`, `verify` and `gc`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from omnigen_pipe.cli.command import command
from omnigen_pipe.cli.options import HERE, JsonOption, QuietOption, WorkspaceOption, open_workspace
from omnigen_pipe.cli.outcome import report


@command(
    "status",
    epilog="Examples:  \n"
    "`omnigen-pipe status`  \n"
    "`omnigen-pipe status --quick --json`  \n"
    "`omnigen-pipe status --sample cats/tabby.jpg`",
)
def status(
    workspace: WorkspaceOption = HERE,
    sample: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="Explain one sample, from file to batch: a sample_id or its beginning, or a path.",
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Do not look into image folders: trust images.parquet."),
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Say what is current, missing, failed and unused, why, and what a run would do."""
    import omnigen_pipe.maintenance.status as standing

    opened, progress = open_workspace(workspace, quiet)
    if sample is not None:
        from omnigen_pipe.maintenance import explanation

        explained = explanation.explain(opened, sample)
        if as_json:
            print(json.dumps(explained, indent=2))
        else:
            explanation.show(explained)
        return
    found = standing.run(opened, progress, quick=quick)
    if as_json:
        print(json.dumps(found.as_json(), indent=2))
    else:
        standing.show(found)


@command(
    "verify",
    epilog="Examples:  \n"
    "`omnigen-pipe verify`  \n"
    "`omnigen-pipe verify --quick`  \n"
    "`omnigen-pipe verify --repair`, then `omnigen-pipe encode-vae`",
)
def verify(
    workspace: WorkspaceOption = HERE,
    quick: Annotated[
        bool, typer.Option("--quick", help="Compare the sizes of shards only; read nothing.")
    ] = False,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Mark damaged latents, so that encode-vae makes them again."),
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Check every shard and manifest against what was written; status 1 where one is damaged."""
    import omnigen_pipe.maintenance.verify

    opened, progress = open_workspace(workspace, quiet)
    summary = omnigen_pipe.maintenance.verify.run(opened, progress, quick=quick, repair=repair)
    report(summary, as_json, strict=False)


@command(
    "gc",
    epilog="Examples:  \n"
    "`omnigen-pipe gc`  \n"
    "`omnigen-pipe gc --yes`  \n"
    "`omnigen-pipe gc --yes --grace-hours 0`",
)
def gc(
    workspace: WorkspaceOption = HERE,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Do it; without, only say what would go.")
    ] = False,
    grace_hours: Annotated[
        float,
        typer.Option(
            min=0,
            help="Delete only what has been unused for so long. Less than a run of any other "
            "command takes is safe only while none is at work.",
        ),
    ] = 24.0,
    live_share: Annotated[
        float,
        typer.Option(min=0, max=1, help="Rewrite shards of which less than this is needed."),
    ] = 0.5,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Give back the space of latents that neither the configuration nor any run needs."""
    import omnigen_pipe.maintenance.gc as collection

    opened, progress = open_workspace(workspace, quiet)
    summary = collection.run(
        opened, progress, yes=yes, grace_seconds=grace_hours * 3600, live_share=live_share
    )
    report(summary, as_json, strict=False)
