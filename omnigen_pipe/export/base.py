"""The base model that an adapter is merged into: its tensors one by one, and whether it is whole.

Its weights are read as they are stored: unquantised, whatever a run quantised them to.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from manifests.errors import PipeError, UsageError
from omnigen_pipe.export.weight_files import STORED
from omnigen_pipe.quiet import quiet_imports
from omnigen_pipe.weights import weights_files

#: The JSON file that the readers of each part start from.
_NEEDED = {
    "vae": "config.json",
    "tokenizer": "tokenizer.json",
    "scheduler": "scheduler_config.json",
}


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
        with _opened(self.file) as handle:
            tensor: torch.Tensor = handle.get_tensor(self.name)
            return tensor


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """The safetensors file `file`; raises `UsageError` where it is not there, and `PipeError` where
    it cannot be read."""
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except FileNotFoundError as error:
        raise UsageError(f"{file} is missing. Fetch the model again.") from error
    except SafetensorError as error:
        raise PipeError(
            f"{file} is not a whole safetensors file: {error}. Fetch the model again."
        ) from error
    except OSError as error:
        raise PipeError(f"{file} cannot be read: {error}") from error


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of the weights in `folder`, by name; none of them is read.

    Raises `UsageError` where there are no weights or they are stored quantised, `PipeError` where
    a file is damaged.
    """
    found = {}
    for file in weights_files(folder):
        with _opened(file) as handle:
            for name in handle.keys():  # noqa: SIM118
                view = handle.get_slice(name)
                kind = str(view.get_dtype())
                if kind not in STORED:
                    raise UsageError(
                        f"{name} in {file} is stored as {kind}: this base is quantised. "
                        "Merging needs the weights it was made from."
                    )
                found[name] = Stored(file, name, STORED[kind], tuple(view.get_shape()))
    return found


def whole_weights_files(folder: Path) -> list[Path]:
    """The weight files in `folder`, each known to be a whole safetensors file: what is copied must
    not be anything else. Raises as `stored_tensors` does."""
    files = weights_files(folder)
    for file in files:
        with _opened(file):
            pass
    return files


def check_needed(parts: Mapping[str, Path]) -> None:
    """Raise `UsageError` where one of `parts`, which are folders by name, lacks the JSON file that
    its readers start from, or holds it damaged: nobody could load what is made of it."""
    for part, name in _NEEDED.items():
        if part not in parts:
            continue
        file = parts[part] / name
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError("it is no JSON object")
        except FileNotFoundError as error:
            raise UsageError(
                f"The base is not whole: its {part} has no {file}. Fetch the base again."
            ) from error
        except (OSError, ValueError) as error:
            raise UsageError(
                f"The base is not whole: {file} of its {part} cannot be read: {error}. Fetch the "
                "base again."
            ) from error


def left_over(folder: Path, stored: Mapping[str, Stored], config: Mapping[str, Any]) -> list[str]:
    """Names of tensors that the transformer in `folder` stores and its configuration does not know.

    Raises `UsageError` where one that it asks for is missing or has another shape: readers would
    only warn, and fill it with anything.
    """
    with quiet_imports():
        from diffusers import OmniGenTransformer2DModel

    try:
        with torch.device("meta"):
            state = OmniGenTransformer2DModel.from_config(dict(config)).state_dict()
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
    ) as error:
        raise UsageError(
            f"{folder / 'config.json'} is not that of an OmniGen: {error!r}."
        ) from error
    if missing := sorted(state.keys() - stored.keys()):
        raise UsageError(
            f"The transformer in {folder} is not whole: {len(missing)} tensors are missing, such "
            f"as {', '.join(missing[:3])}. Fetch it again."
        )
    for name, tensor in state.items():
        if stored[name].shape != tuple(tensor.shape):
            raise UsageError(
                f"{name} in {stored[name].file} is {list(stored[name].shape)}, and config.json "
                f"asks for {list(tensor.shape)}: they are not of one model. Fetch it again."
            )
    return sorted(stored.keys() - state.keys())
