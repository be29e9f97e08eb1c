"""`export`: an adapter merged into its base, as a model of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from omnigen_pipe.cli.base_model import check_revision, model_workspace
from omnigen_pipe.cli.command import command
from omnigen_pipe.cli.options import JsonOption, QuietOption, given_path
from omnigen_pipe.cli.outcome import report


@command(
    "export",
    epilog="Examples:  \n"
    "`omnigen-pipe export runs/default -o merged`  \n"
    "`omnigen-pipe export adapter.safetensors -o merged --model Shitao/OmniGen-v1-diffusers "
    "--strength 0.8`  \n"
    "`omnigen-pipe export runs/default -o for-omnigen --layout omnigen --ema`",
)
def export(
    adapter: Annotated[
        Path,
        typer.Argument(
            parser=given_path,
            help="An adapter's file, a checkpoint's folder, or a run's: its newest checkpoint.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", parser=given_path, metavar="FOLDER", help="Folder to be made."
        ),
    ],
    layout: Annotated[
        Literal["diffusers", "omnigen"],
        typer.Option(
            help="As diffusers reads a model, or as the authors' code does (Shitao/OmniGen-v1). "
            "In the latter q, k and v are one weight, and three Kronecker products do not join "
            "into one: an adapter can only be had merged there."
        ),
    ] = "diffusers",
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"] | None,
        typer.Option(
            help="What the transformer's weights are rounded to.  Default: as the base has them."
        ),
    ] = None,
    strength: Annotated[float, typer.Option(help="1: as trained; 0.5: half of the change.")] = 1.0,
    ema: Annotated[
        bool, typer.Option("--ema", help="Take the average in the run's or checkpoint's folder.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The base model: a hub id or folder.  Default: the workspace's.",
        ),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(
            metavar="REVISION", help="Branch, tag or commit of the hub id that --model names."
        ),
    ] = None,
    any_base: Annotated[
        bool,
        typer.Option(
            "--any-base", help="Merge also into another base than the adapter was trained on."
        ),
    ] = False,
    workspace: Annotated[
        Path | None,
        typer.Option(
            "--workspace",
            "-w",
            parser=given_path,
            help="Folder with omnigen-pipe.toml, whose model is taken.  Default: the current one.",
        ),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Largest weight file in diffusers' layout, such as 500MB.  Default: 5GB.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace FOLDER where it is an earlier export.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Merge an adapter into its base model, and write the result as a model of its own."""
    from omnigen_pipe.export.exporting import run
    from omnigen_pipe.export.weight_files import parse_size
    from omnigen_pipe.model_files import Model
    from omnigen_pipe.progress import Progress
    from omnigen_pipe.runs.checkpoints import locate_adapter

    opened = model_workspace(workspace, model)
    check_revision(revision, model)
    limit = None if max_shard_size is None else parse_size(max_shard_size)
    file, passed_over = locate_adapter(adapter, ema)
    summary = run(
        file,
        output,
        Progress(quiet),
        base=Model.of(opened) if opened else Model(model or "", Path.cwd(), revision),
        workspace=opened,
        layout=layout,
        dtype=dtype,
        strength=strength,
        limit=limit,
        any_base=any_base,
        overwrite=overwrite,
    )
    summary.notes[:0] = passed_over
    report(summary, as_json, strict=False)
