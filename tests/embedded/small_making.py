"""The making of a very small model, by the real command in a process of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import forked

from omnigen_pipe.embedded.making import Making

MAKING = Making(seed=1, vae_steps=5, pictures=12, steps=5)
#: Steps after which the pretraining's state is saved.
SAVED_EVERY = 2


def start(folder: Path, first: Callable[[], object] | None = None) -> forked.Child:
    """Start the command on `folder`; `first` is called in the child, as in `forked.start`."""
    folder.parent.mkdir(exist_ok=True)
    options = [str(folder), *MAKING.options().split()]
    before = forked.both(little, first) if first else little
    program = "omnigen_pipe.embedded.make"
    return forked.start(folder.parent, *options, first=before, program=program)


def little() -> None:
    """Let this process train on little, and do the stages in itself."""
    from omnigen_pipe.embedded import autoencoder, card, learned, make

    autoencoder._SCALED_BY = autoencoder._JUDGED_BY = card._JUDGED_BY = 4
    autoencoder._BATCH = autoencoder._SAVE_EVERY = 2
    text = learned._CONFIGURATION
    for old, new in (
        ("train_batch_size = 64", "train_batch_size = 4"),
        ("checkpoint_step_interval = 250", f"checkpoint_step_interval = {SAVED_EVERY}"),
    ):
        assert old in text
        text = text.replace(old, new)
    learned._CONFIGURATION = text
    make.run_stage = _stage_in_process


def _stage_in_process(stage: str, folder: Path, lock: int) -> None:
    from omnigen_pipe.cli import app

    given, sys.argv = sys.argv, ["omnigen-pipe", stage, "-w", str(folder), "--quiet"]
    try:
        app()
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.argv = given
