"""The base model of `generate` and `export`: a workspace's, or the one that is named."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from manifests.errors import UsageError
from omnigen_pipe.cli.options import HERE

if TYPE_CHECKING:
    from omnigen_pipe.workspace import Workspace


def model_workspace(workspace: Path | None, model: str | None) -> Workspace | None:
    """The workspace whose model is taken; None where `model` names one."""
    from omnigen_pipe.config import CONFIG_NAME
    from omnigen_pipe.workspace import Workspace

    if model is not None:
        if workspace is not None:
            raise UsageError(
                f"--model is {model} and --workspace is {workspace}: the model is the workspace's, "
                "or the one that is named. Give one of them."
            )
        return None
    if workspace is None and not (HERE / CONFIG_NAME).is_file():
        raise UsageError(
            f"There is no {CONFIG_NAME} here that would name a model. Name one with --model "
            "(a hub id, a folder or `embedded`), or a workspace with --workspace."
        )
    return Workspace.open(workspace or HERE)


def check_revision(revision: str | None, model: str | None) -> None:
    """Raise `UsageError` where `--revision` has no hub id beside it."""
    from omnigen_pipe.model_files import Model

    if revision is None:
        return
    if model is None:
        raise UsageError(
            f"--revision {revision} is of the model that --model names. That of a workspace is "
            "`revision` in [model] of its configuration."
        )
    if Model(model, Path.cwd()).is_local:
        raise UsageError(f"--revision {revision}: {model} is on this machine, not on the hub.")
