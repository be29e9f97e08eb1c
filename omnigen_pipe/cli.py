"""The command line: options in, one stage called, its summary and exit status out.

The only module here that knows the stages. Whatever is slow to import (torch, diffusers,
DuckDB) is imported inside the command that needs it, so that `--help` starts at once.

Exit status: 0 done, 1 failed, 2 wrong usage or configuration, 3 done but with items left out
when `--strict` is given, 128 + N when a signal N ended it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer

from manifests.errors import PipeError

if TYPE_CHECKING:
    from omnigen_pipe.progress import Progress
    from omnigen_pipe.summary import Summary
    from omnigen_pipe.workspace import Workspace

app = typer.Typer(
    name="omnigen-pipe",
    help="Prepare captioned images for OmniGen-v1 and train a LoKr adapter on them.\n\n"
    "Five stages, each rerunnable at any time: discover, bucket, encode-vae, tokenize, train. "
    "`run` does all five and skips what is done.\n\n"
    "Start with: omnigen-pipe init, or omnigen-pipe demo.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

WorkspaceOption = Annotated[
    Path, typer.Option("--workspace", "-w", help="Folder with omnigen-pipe.toml.")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print a machine-readable summary on stdout.")
]
StrictOption = Annotated[
    bool, typer.Option("--strict", help="Exit with status 3 when items were left out.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", help="Where to compute: cpu, cuda, cuda:1 …  Default: CUDA if any."),
]

HERE = Path(".")


def _open(workspace: Path, quiet: bool) -> tuple[Workspace, Progress]:
    from omnigen_pipe.progress import Progress
    from omnigen_pipe.workspace import Workspace

    return Workspace.open(workspace), Progress(quiet)


def _report(summary: Summary, as_json: bool, strict: bool) -> None:
    """Print one stage's summary and leave with the exit status it asks for."""
    if as_json:
        print(json.dumps(summary.as_json(), indent=2, default=str))
    else:
        from omnigen_pipe.summary import show

        show(summary)
    _leave([summary], strict)


def _leave(summaries: list[Summary], strict: bool) -> None:
    """Leave with the exit status that the summaries ask for, unless it is 0."""
    if any(summary.failed for summary in summaries):
        raise typer.Exit(1)
    for summary in summaries:
        if summary.signal is not None:
            raise typer.Exit(128 + summary.signal)
    if strict and any(summary.left_out for summary in summaries):
        raise typer.Exit(3)


@app.command(
    epilog="Examples:  \n`omnigen-pipe discover`  \n`omnigen-pipe discover -w my-project --json`"
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

    opened, progress = _open(workspace, quiet)
    _report(stages.discover.run(opened, progress, allow_shrink=allow_shrink), as_json, strict)


@app.command(epilog="Examples:  \n`omnigen-pipe bucket`  \n`omnigen-pipe bucket --strict`")
def bucket(
    workspace: WorkspaceOption = HERE,
    as_json: JsonOption = False,
    strict: StrictOption = False,
    quiet: QuietOption = False,
) -> None:
    """Give every image its size, crop and bucket, and list them in samples.parquet."""
    import stages.bucket

    opened, progress = _open(workspace, quiet)
    _report(stages.bucket.run(opened, progress), as_json, strict)


@app.command(
    "encode-vae",
    epilog="Examples:  \n`omnigen-pipe encode-vae`  \n`omnigen-pipe encode-vae --device cuda:1`",
)
def encode_vae(
    workspace: WorkspaceOption = HERE,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    strict: StrictOption = False,
    quiet: QuietOption = False,
) -> None:
    """Encode the latents that are missing, into shards under latents/."""
    import stages.encode_vae

    opened, progress = _open(workspace, quiet)
    _report(stages.encode_vae.run(opened, progress, device=device), as_json, strict)


@app.command(epilog="Examples:  \n`omnigen-pipe tokenize`  \n`omnigen-pipe tokenize --json`")
def tokenize(
    workspace: WorkspaceOption = HERE,
    as_json: JsonOption = False,
    strict: StrictOption = False,
    quiet: QuietOption = False,
) -> None:
    """Tokenise the captions that are missing, and the dropout and validation prompts."""
    import stages.tokenize

    opened, progress = _open(workspace, quiet)
    _report(stages.tokenize.run(opened, progress), as_json, strict)


AllowMissingOption = Annotated[
    bool,
    typer.Option("--allow-missing", help="Train without samples that lack a latent or prompt."),
]


@app.command(
    epilog="Examples:  \n`omnigen-pipe train`  \n`omnigen-pipe train --allow-missing --device cpu`"
)
def train(
    workspace: WorkspaceOption = HERE,
    device: DeviceOption = None,
    allow_missing: AllowMissingOption = False,
    as_json: JsonOption = False,
    strict: StrictOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train the LoKr adapter, or go on where the run stopped."""
    import stages.train

    opened, progress = _open(workspace, quiet)
    summary = stages.train.run(opened, progress, device=device, allow_missing=allow_missing)
    _report(summary, as_json, strict)


def _run_stages(
    opened: Workspace, progress: Progress, device: str | None, as_json: bool
) -> list[Summary]:
    """All five stages in order, each summary shown as it comes; stops after one that failed."""
    import stages.discover
    import stages.encode_vae

    import stages.bucket
    import stages.tokenize
    import stages.train
    from omnigen_pipe.summary import show

    summaries: list[Summary] = []
    for step in (
        lambda: stages.discover.run(opened, progress),
        lambda: stages.bucket.run(opened, progress),
        lambda: stages.encode_vae.run(opened, progress, device=device),
        lambda: stages.tokenize.run(opened, progress),
        lambda: stages.train.run(opened, progress, device=device),
    ):
        summaries.append(step())
        if not as_json:
            show(summaries[-1])
        if summaries[-1].failed or summaries[-1].signal is not None:
            break
    return summaries


@app.command(epilog="Examples:  \n`omnigen-pipe run`  \n`omnigen-pipe run -w my-project --json`")
def run(
    workspace: WorkspaceOption = HERE,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    strict: StrictOption = False,
    quiet: QuietOption = False,
) -> None:
    """Do all five stages, skipping what is done."""
    opened, progress = _open(workspace, quiet)
    summaries = _run_stages(opened, progress, device, as_json)
    if as_json:
        print(json.dumps([summary.as_json() for summary in summaries], indent=2, default=str))
    elif not any(summary.changed or summary.failed for summary in summaries):
        print("Everything was up to date: no work was done.")
    _leave(summaries, strict)


@app.command(epilog="Examples:  \n`omnigen-pipe demo`  \n`omnigen-pipe demo -w /tmp/demo`")
def demo(
    workspace: Annotated[
        Path, typer.Option("--workspace", "-w", help="Folder that the demo is written into.")
    ] = Path("demo"),
    device: DeviceOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Do all five stages on a small random model and drawn pictures; needs no download."""
    import shlex

    from omnigen_pipe.demo.project import write_project
    from omnigen_pipe.progress import Progress

    write_project(workspace, Progress(quiet))
    opened, progress = _open(workspace, quiet)
    summaries = _run_stages(opened, progress, device, as_json)
    if as_json:
        print(json.dumps([summary.as_json() for summary in summaries], indent=2, default=str))
    _leave(summaries, strict=False)
    if not as_json:
        if not any(summary.changed for summary in summaries):
            print("Everything was up to date: no work was done.")
        adapter = str(summaries[-1].details["adapter"])
        print(f"\nThe adapter lies at {adapter}")
        print(f"Inspect it with:  omnigen-pipe inspect {shlex.quote(adapter)}")


def main() -> None:
    """Run the command line; errors that a user can act on print one message."""
    try:
        status = app(standalone_mode=False)
    except click.exceptions.Abort:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except PipeError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        print("Interrupted. Run the same command again to go on.", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno is None:
            raise
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)
    sys.exit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    main()
