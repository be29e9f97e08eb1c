"""Weight files, written tensor by tensor: safetensors whose contents never lie in memory at once.

The library's own `save_file` wants every tensor of a file first, which for the authors' layout is
the whole model. The format is simple enough to write: 8 bytes of the header's length,
little-endian, the header as JSON, filled up with spaces to 8 bytes, and the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from manifests.errors import UsageError
from omnigen_pipe.weights import WEIGHTS_NAME

#: The dtypes that weights may be stored in, by safetensors' names.
STORED = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in STORED.items()}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Entry:
    """A tensor of a weight file: its name, dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its length in the file, bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def parse_size(text: str) -> int:
    """Bytes of a size such as `5GB` or `500MB`, powers of ten; raises `UsageError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMG]B)", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise UsageError(f"--max-shard-size {text}: write a size such as 5GB or 500MB.")
    return size


def split(entries: Iterable[Entry], limit: int) -> list[list[Entry]]:
    """The entries in files of at most `limit` bytes of tensors each, in their order.

    A tensor that is larger has a file to itself.
    """
    files: list[list[Entry]] = []
    size = 0
    for entry in entries:
        if not files or size + entry.nbytes > limit:
            files.append([])
            size = 0
        files[-1].append(entry)
        size += entry.nbytes
    return files


def file_names(count: int) -> list[str]:
    """diffusers' names of the weight files of one model, of which there are `count`."""
    if count == 1:
        return [WEIGHTS_NAME]
    stem, _, suffix = WEIGHTS_NAME.rpartition(".")
    return [f"{stem}-{i + 1:05d}-of-{count:05d}.{suffix}" for i in range(count)]


def write_index(path: Path, files: dict[str, list[Entry]]) -> None:
    """Write diffusers' index of several weight files: which tensor lies in which."""
    total = sum(entry.nbytes for entries in files.values() for entry in entries)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {
            entry.name: name for name, entries in sorted(files.items()) for entry in entries
        },
    }
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write(
    path: Path, entries: Sequence[Entry], parts: Callable[[Entry], Iterable[torch.Tensor]]
) -> None:
    """Write a weight file of `entries` and flush it to disk.

    `parts` gives the rows of an entry, in one tensor or several, when their turn comes. Raises
    `OSError` where the disk does, and `ValueError` where the parts do not fill the entry.
    """
    # Wide numbers first, as the library has it: so all lie at multiples of their width.
    ordered = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))
    with path.open("wb") as file:
        file.write(_header(ordered))
        for entry in ordered:
            written = 0
            for part in parts(entry):
                if part.dtype != entry.dtype:
                    raise ValueError(f"{entry.name} is {entry.dtype}, and a part of it is not")
                written += file.write(_bytes(part))
            if written != entry.nbytes:
                raise ValueError(f"{entry.name} has {entry.nbytes} bytes, and {written} came")
        file.flush()
        os.fsync(file.fileno())


def _header(entries: Sequence[Entry]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes where they are, row by row; machines here are little-endian."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
