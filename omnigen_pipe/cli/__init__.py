"""The command line: options in, one stage called, its summary and exit status out.

The only package here that knows the stages. Whatever is slow to import (torch, diffusers,
DuckDB) is imported inside the command that needs it, so that `--help` starts at once.

Exit status: 0 done, 1 failed, 2 wrong usage or configuration, 3 done but with items left out
when `--strict` is given, 128 + N when a signal N ended it.
"""

from __future__ import annotations

import os
import sys

import typer

from manifests.errors import PipeError
from omnigen_pipe.cli import (
    adapter,
    all_stages,
    demo,
    estimate,
    export,
    generate,
    init,
    inspection,
    maintenance,
    one_stage,
)

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

#: Every command, in the order in which `omnigen-pipe --help` lists them.
COMMANDS = (
    init.init,
    one_stage.discover,
    one_stage.bucket,
    one_stage.encode_vae,
    one_stage.tokenize,
    one_stage.train,
    estimate.estimate,
    adapter.evaluate,
    all_stages.run,
    maintenance.verify,
    demo.demo,
    generate.generate,
    inspection.inspect,
    export.export,
    maintenance.status,
    maintenance.gc,
)
for _command in COMMANDS:
    app.command(_command.name, epilog=_command.epilog)(_command.call)


def main() -> None:
    """Run the command line; errors that a user can act on print one message."""
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        # Buckets of many sizes would fragment the GPU's memory. torch reads it when it starts.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    try:
        app()
    except PipeError as error:
        if not error.said:
            print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except OSError as error:
        if error.errno is None:
            raise
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)
