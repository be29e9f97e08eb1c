"""What of the model can be read on this machine: a report does without what cannot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from manifests.errors import PipeError
from omnigen_pipe.maintenance.explanation import Keys, tokenizer_key_here, vae_key_here
from omnigen_pipe.model_files import Model
from omnigen_pipe.workspace import Workspace


@dataclass(frozen=True)
class ModelHere:
    """The keys of the model's VAE and tokenizer; `problems` says by the part's name why one cannot
    be read, without the folders that it lies in."""

    keys: Keys
    problems: dict[str, str] = field(default_factory=dict)


def model_here(workspace: Workspace) -> ModelHere:
    """Read the keys of the model's parts; nothing is downloaded.

    A part that is not there, or only half, has no key: the disk that it is on may not be mounted.
    """
    problems: dict[str, str] = {}

    def known(part: str, read: Callable[[Workspace], str | None]) -> str | None:
        try:
            return read(workspace)
        except (PipeError, OSError) as error:
            problems[part] = Model.of(workspace).without_folders(" ".join(str(error).split()))
            return None

    keys = Keys(known("vae", vae_key_here), known("tokenizer", tokenizer_key_here))
    return ModelHere(keys, problems)
