"""The commands that do one stage each."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

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
from omnigen_pipe.cli.outcome import leave, report

AllowMissingOption = Annotated[
    bool,
    typer.Option(
        "--allow-missing", help="Train without samples that lack a latent, mask or prompt."
    ),
]


@command(
    "discover",
    epilog="Examples:  \n`omnigen-pipe discover`  \n`omnigen-pipe discover -w my-project --json`",
)
def discover(
    workspace: WorkspaceOption = HERE,
    allow_shrink: Annotated[
        bool,
        typer.Option(
            "--allow-shrink",
            help="Go on where a dataset's folder is gone or more than half of its files are.",
        ),
    ] = False,
    as_json: JsonOption = False,
    strict: StrictOption = False,
    quiet: QuietOption = False,
) -> None:
    """Find the images and captions of every dataset, and list them in images.parquet."""
    import stages.discover

    opened, progress = open_workspace(workspace, quiet)
    report(stages.discover.run(opened, progress, allow_shrink=allow_shrink), as_json, strict)


@command("bucket", epilog="Examples:  \n`omnigen-pipe bucket`  \n`omnigen-pipe bucket --strict`")
def bucket(
    workspace: WorkspaceOption = HERE,
    as_json: JsonOption = False,
    strict: StrictOption = False,
    quiet: QuietOption = False,
) -> None:
    """Give every image its size, crop and bucket, and list them in samples.parquet."""
    import stages.bucket

    opened, progress = open_workspace(workspace, quiet)
    report(stages.bucket.run(opened, progress), as_json, strict)


@command(
    "encode-vae",
    epilog="Examples:  \n"
    "`omnigen-pipe encode-vae`  \n"
    "`omnigen-pipe encode-vae --device cuda:1 --worker 2/4`  \n"
    "`omnigen-pipe encode-vae --retry-failed`",
)
def encode_vae(
    workspace: WorkspaceOption = HERE,
    device: DeviceOption = None,
    worker: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Encode the I-th of N shares of the images, I from 1 to N.  Default: all, or "
            "the share of SLURM_ARRAY_TASK_ID in a SLURM job array.",
        ),
    ] = None,
    retry_failed: Annotated[
        bool,
        typer.Option("--retry-failed", help="Try again what could not be encoded earlier."),
    ] = False,
    as_json: JsonOption = False,
    strict: StrictOption = False,
    quiet: QuietOption = False,
) -> None:
    """Encode the latents that are missing, into shards under latents/."""
    import stages.encode_vae
    from omnigen_pipe.latents import share

    opened, progress = open_workspace(workspace, quiet)
    mine = share.from_environment(os.environ) if worker is None else share.parse(worker)
    summary = stages.encode_vae.run(
        opened, progress, device=device, share=mine, retry_failed=retry_failed
    )
    report(summary, as_json, strict)


@command(
    "tokenize", epilog="Examples:  \n`omnigen-pipe tokenize`  \n`omnigen-pipe tokenize --json`"
)
def tokenize(
    workspace: WorkspaceOption = HERE,
    as_json: JsonOption = False,
    strict: StrictOption = False,
    quiet: QuietOption = False,
) -> None:
    """Tokenise the captions that are missing, and the dropout and validation prompts."""
    import stages.tokenize

    opened, progress = open_workspace(workspace, quiet)
    report(stages.tokenize.run(opened, progress), as_json, strict)


@command(
    "train",
    epilog="Examples:  \n"
    "`omnigen-pipe train`  \n"
    "`omnigen-pipe train --allow-missing --device cpu`  \n"
    "`omnigen-pipe train --processes 4`  \n"
    "`torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-id 1 "
    "--rdzv-endpoint HOST:29500 -m omnigen_pipe.cli train`",
)
def train(
    workspace: WorkspaceOption = HERE,
    device: DeviceOption = None,
    processes: Annotated[
        int,
        typer.Option(
            min=1, help="Start so many processes on this machine, one per GPU, as torchrun does."
        ),
    ] = 1,
    allow_missing: AllowMissingOption = False,
    as_json: JsonOption = False,
    strict: StrictOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train the LoKr adapter, or go on where the run stopped."""
    import stages.train
    from omnigen_pipe.training.processes import from_environment

    opened, progress = open_workspace(workspace, quiet)
    if processes > 1:
        stages.train.check(opened)  # before several processes say it
        raise typer.Exit(_start_processes(processes))
    summary = stages.train.run(opened, progress, device=device, allow_missing=allow_missing)
    if from_environment().is_first:
        report(summary, as_json, strict)
    else:
        leave([summary], strict)


def _start_processes(count: int) -> int:
    """Run this very command line in `count` processes; their exit status."""
    from omnigen_pipe.training.launch import launch
    from omnigen_pipe.training.processes import from_environment

    if from_environment().size > 1:
        raise UsageError("--processes starts processes, and torchrun has done so already.")
    arguments = sys.argv[1:]
    place = next(i for i, word in enumerate(arguments) if word.startswith("--processes"))
    del arguments[place : place + (1 if "=" in arguments[place] else 2)]
    return launch(count, arguments)
