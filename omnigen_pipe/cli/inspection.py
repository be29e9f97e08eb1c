"""The command that looks into things: `inspect` of a workspace, a run or an adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from manifests.errors import UsageError
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
from omnigen_pipe.cli.outcome import report


@command(
    "inspect",
    epilog="Examples:  \n"
    "`omnigen-pipe inspect`  \n"
    "`omnigen-pipe inspect --samples 20 --decoded 12 -o /tmp/cats.html`  \n"
    "`omnigen-pipe inspect --run default`  \n"
    "`omnigen-pipe inspect runs/default`  \n"
    "`omnigen-pipe inspect runs/default/checkpoints/step-00001000/adapter.safetensors`",
)
def inspect(
    adapter: Annotated[
        Path | None,
        typer.Argument(
            parser=given_path,
            help="Say what an adapter holds instead: its file, a checkpoint's folder, or a run's, "
            "which is its newest checkpoint.",
        ),
    ] = None,
    workspace: WorkspaceOption = HERE,
    run: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Report on this run, not on the workspace's images."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            parser=given_path,
            help="The HTML file.  Default: inspect.html in the workspace, or in the run's folder.",
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace a file that is no earlier report."),
    ] = False,
    samples: Annotated[
        int | None,
        typer.Option(min=0, max=40, help="Images per bucket on contact sheets.  Default: 8."),
    ] = None,
    decoded: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=40,
            help="Latents to decode and show beside their pixels, which loads the VAE; 0: none.  "
            "Default: 4.",
        ),
    ] = None,
    hash_limit: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Open at most so many images to find those that look alike.  Default: 5000.",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of what is drawn at random.  Default: 0.")
    ] = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write a report on the workspace or a run as one HTML file; or say what an adapter holds."""
    of_images = {
        "--samples": samples,
        "--decoded": decoded,
        "--hash-limit": hash_limit,
        "--seed": seed,
        "--device": device,
    }
    of_reports = {"--run": run, "--output": output, "--overwrite": overwrite or None, **of_images}
    if adapter is not None:
        elsewhere = None if workspace == HERE else workspace
        without = {"--workspace": elsewhere, "--quiet": quiet or None}
        _refuse("with an adapter", {**of_reports, **without})
        _inspect_adapter(adapter, as_json)
        return
    opened, progress = open_workspace(workspace, quiet)
    if run is not None:
        _refuse("with --run", of_images)
        from omnigen_pipe.report import of_run

        report(of_run.write(opened, progress, run, output, overwrite), as_json, strict=False)
        return
    from omnigen_pipe.report import of_workspace
    from omnigen_pipe.report.of_workspace import Options

    given = {"samples": samples, "decoded": decoded, "hash_limit": hash_limit, "seed": seed}
    options = Options(**{name: value for name, value in given.items() if value is not None})
    summary = of_workspace.write(opened, progress, options, output, overwrite, device)
    report(summary, as_json, strict=False)


def _refuse(when: str, options: Mapping[str, object]) -> None:
    """Raise `UsageError` where an option is given that has no effect."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise UsageError(f"{', '.join(given)} has no effect {when}: leave it out.")


def _inspect_adapter(adapter: Path, as_json: bool) -> None:
    from omnigen_pipe.model.inspection import inspect_adapter, show_report
    from omnigen_pipe.progress import Progress
    from omnigen_pipe.runs.checkpoints import locate_adapter

    file, passed_over = locate_adapter(adapter)
    found = inspect_adapter(file)
    for sentence in passed_over:
        Progress().note(sentence, always=True)
    if as_json:
        print(json.dumps({**found.as_json(), "notes": passed_over}, indent=2))
    else:
        show_report(found)
