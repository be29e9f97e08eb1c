"""The state of an unfinished training in one file, replaced whole: model, optimizer and step."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import torch

from manifests.errors import PipeError
from manifests.publish import publishing


def save_state(
    path: Path,
    staging: Path,
    subject: str,
    step: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Publish the state after `step` steps; `subject` names all that decides these steps."""
    state = {
        "subject": subject,
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    # By way of memory: torch's own writer makes of a full disk an error without a cause.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with publishing(staging, path) as unfinished:
        unfinished.write_bytes(buffer.getbuffer())


def load_state(
    path: Path, subject: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    """Take over what `path` holds; the steps done, 0 where there is no such file.

    Raises `PipeError` where it is damaged, or was saved of another `subject`.
    """
    if not path.exists():
        return 0
    remedy = "Restore it, or delete it: this training then begins at step 0."
    try:
        state = torch.load(path, weights_only=True)
        saved, step = state["subject"], int(state["step"])
        if saved == subject:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
    # What torch raises for a torn or foreign file; there is no common base.
    except (
        OSError,
        EOFError,
        RuntimeError,
        ValueError,
        KeyError,
        TypeError,
        pickle.UnpicklingError,
    ) as error:
        why = str(error).splitlines()[0] if str(error) else repr(error)
        raise PipeError(f"{path} cannot be read: {why}. {remedy}") from error
    if saved != subject:
        raise PipeError(
            f"{path} was saved in training on {saved}, and there is now {subject}. Restore what "
            "it was trained on, or delete it: this training then begins at step 0."
        )
    return step
