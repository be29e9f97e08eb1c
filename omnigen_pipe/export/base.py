"""The base model that an adapter is merged into: where its parts lie, and its tensors one by one.

Its weights are read as they are stored: unquantised, whatever a run quantised them to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from manifests.errors import PipeError, UsageError
from omnigen_pipe.export.weight_files import DTYPES
from omnigen_pipe.model_files import Model
from omnigen_pipe.weights import weights_files
from omnigen_pipe.workspace import Workspace

#: Files that lie beside the parts of a model in diffusers' layout; not every model has both.
BESIDE = ("model_index.json", "generation.json")


@dataclass(frozen=True)
class Base:
    """A model's name and the folders of its parts, by part; `beside`: files next to them."""

    name: str
    revision: str | None
    parts: Mapping[str, Path]
    beside: tuple[Path, ...]


@dataclass(frozen=True)
class Stored:
    """A tensor where it is stored."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self) -> torch.Tensor:
        """The tensor; raises `PipeError` where the file cannot be read.

        The file is opened for this tensor alone: with the tensor its part of memory goes.
        """
        try:
            with safe_open(self.file, framework="pt") as handle:
                tensor: torch.Tensor = handle.get_tensor(self.name)
                return tensor
        except (SafetensorError, OSError) as error:
            raise PipeError(f"{self.file} cannot be read: {error}") from error


def base_of(workspace: Workspace, parts: tuple[str, ...]) -> Base:
    """The workspace's model with these `parts`, downloaded where they are not here."""
    model = workspace.config.model
    return named(
        model.pretrained_model_name_or_path,
        parts,
        start=workspace.root,
        revision=model.revision,
        vae=model.pretrained_vae_model_name_or_path,
    )


def named(
    name: str,
    parts: tuple[str, ...],
    *,
    start: Path,
    revision: str | None = None,
    vae: str | None = None,
) -> Base:
    """The model `name` with these `parts`; a relative folder starts at `start`.

    `vae` names another VAE than the model's own. Raises `UsageError` where a part is not there.
    """
    model = Model(name, start, revision, vae)
    folders = {part: model.part(part) for part in parts}
    beside = (model.beside(file) for file in BESIDE)
    return Base(model.label, revision, folders, tuple(path for path in beside if path is not None))


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of the weights in `folder`, by name; none of them is read.

    Raises `UsageError` where there are no weights or they are stored quantised, `PipeError` where
    a file is damaged.
    """
    found = {}
    for file in weights_files(folder):
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118
                    view = handle.get_slice(name)
                    kind = str(view.get_dtype())
                    if kind not in DTYPES:
                        raise UsageError(
                            f"{name} in {file} is stored as {kind}: this base is quantised. "
                            "Merging needs the weights it was made from."
                        )
                    found[name] = Stored(file, name, DTYPES[kind], tuple(view.get_shape()))
        except FileNotFoundError as error:
            raise UsageError(f"{file} is missing. Fetch the model again.") from error
        except (SafetensorError, OSError) as error:
            raise PipeError(f"{file} is not a whole safetensors file: {error}") from error
    return found


def transformer_config(folder: Path) -> dict[str, Any]:
    """The transformer's `config.json`; raises `UsageError` where it is not readable."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UsageError(f"{path} is no JSON object.")
    return config
