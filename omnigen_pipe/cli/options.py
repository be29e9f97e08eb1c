"""The options that several commands have, and the workspace that they open."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from omnigen_pipe.progress import Progress
    from omnigen_pipe.workspace import Workspace


def given_path(text: str) -> Path:
    """The path that an option or argument names.

    Raises `BadParameter` for an empty one, which an unset variable in a script makes, and which
    `Path` takes for the current folder.
    """
    if not text:
        raise typer.BadParameter("it is empty: name a file or a folder, or leave it out.")
    return Path(text)


WorkspaceOption = Annotated[
    Path,
    typer.Option("--workspace", "-w", parser=given_path, help="Folder with omnigen-pipe.toml."),
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

#: Where a command looks for its workspace unless it is told.
HERE = Path(".")


def open_workspace(workspace: Path, quiet: bool) -> tuple[Workspace, Progress]:
    """The workspace in the folder `workspace`, and a progress that is silent where `quiet`.

    Raises `UsageError` where the folder or its configuration is not as it must be.
    """
    from omnigen_pipe.progress import Progress
    from omnigen_pipe.workspace import Workspace

    return Workspace.open(workspace), Progress(quiet)
