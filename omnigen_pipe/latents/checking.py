"""Checking a shard: whether its file still is, bit for bit, what its rows in the log promise.

A function of one file and its rows: it knows nothing of manifests, marks nothing and removes
nothing. The file is read once, from front to back, in pieces. Not mapped: a page that a dying
disk cannot give would kill the process instead of being reported.
"""

from __future__ import annotations

import errno
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from manifests.views import file_size
from omnigen_pipe.latents.shards import DTYPES

MISSING = "the shard is missing"
DISAGREEING = "its rows in the manifest disagree about the shard's length or checksum"
MISFIT = "its length in the manifest does not fit its shape and dtype"
OUTSIDE = "it does not lie inside the shard"
CHANGED = "its bytes are not what was written"
AROUND = "the shard's headers, JSON or padding are not what was written"

#: So many bytes are held in memory for each shard that is being read.
_PIECE_NBYTES = 4 * 1024 * 1024

# What a disk or file system says of its own damage. Other errors, such as a missing permission,
# say nothing about the bytes.
_DAMAGE_ERRORS = {errno.EIO, errno.EBADMSG, getattr(errno, "EUCLEAN", errno.EIO)}

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Checked:
    """What checking found: for each row, in order, its problem or None; and the bytes read."""

    problems: list[str | None]
    bytes_read: int = 0


@dataclass
class _Array:
    """The bytes from `start` to `end` that the row `index` promises."""

    index: int
    start: int
    end: int
    digest: Any = field(default_factory=xxhash.xxh3_64)


def check_shard(
    path: Path,
    rows: Sequence[Row],
    *,
    quick: bool = False,
    marked: bool = False,
    piece_nbytes: int = _PIECE_NBYTES,
) -> Checked:
    """Compare the shard `path` with its `rows` of the latents log, at least one.

    With `quick` only sizes are compared and nothing is read. `marked` says that other rows of
    this shard are known to be damaged, so that the checksum of the whole cannot hold any more.
    Raises `OSError` where the file may not be read.
    """
    promised = {(row["shard_nbytes"], row["shard_checksum"]) for row in rows}
    if len(promised) > 1:
        return _all(rows, DISAGREEING)
    ((nbytes, checksum),) = promised
    size = file_size(path)
    if size is None:
        return _all(rows, MISSING)
    if size != nbytes:
        return _all(rows, _other_length(size, nbytes))
    problems = [_misfit(row) for row in rows]
    if quick:
        return Checked(problems)

    arrays = [
        _Array(index, row["offset"], row["offset"] + row["nbytes"])
        for index, row in enumerate(rows)
        if problems[index] is None
    ]
    try:
        digest, read = _read(path, arrays, max(1, min(piece_nbytes, size)))
    except FileNotFoundError:
        return _all(rows, MISSING)
    except OSError as error:
        if error.errno not in _DAMAGE_ERRORS:
            raise
        return _all(rows, f"the shard cannot be read: {error.strerror}")
    if read != nbytes:
        return _all(rows, _other_length(read, nbytes), read)
    for array in arrays:
        if array.digest.intdigest() != rows[array.index]["checksum"]:
            problems[array.index] = CHANGED
    if digest != checksum and not marked and not any(problems):
        # Every array is right, so the change lies between them, and nothing says which sample's
        # header or JSON it hit. A shard is at most a minute of encoding: all of it is given up.
        return _all(rows, AROUND, read)
    return Checked(problems, read)


def _all(rows: Sequence[Row], problem: str, read: int = 0) -> Checked:
    return Checked([problem] * len(rows), read)


def _other_length(found: int, promised: int | None) -> str:
    return f"the shard has {found} bytes and was published with {promised}"


def _misfit(row: Row) -> str | None:
    """What is impossible about the place that `row` names, whatever the bytes there are."""
    shape, dtype = row["shape"], row["dtype"]
    if not shape or min(shape) <= 0 or dtype not in DTYPES:
        return MISFIT
    if row["nbytes"] != math.prod(shape) * DTYPES[dtype].itemsize:
        return MISFIT
    start = row["offset"]
    if start is None or start < 0 or start + row["nbytes"] > row["shard_nbytes"]:
        return OUTSIDE
    return None


def _read(path: Path, arrays: list[_Array], piece_nbytes: int) -> tuple[int, int]:
    """Read the whole file and feed each array's digest; the file's own digest and length."""
    waiting = deque(sorted(arrays, key=lambda array: array.start))
    begun: list[_Array] = []
    digest = xxhash.xxh3_64()
    position = 0
    with path.open("rb", buffering=0) as handle:
        buffer = memoryview(bytearray(piece_nbytes))
        while read := handle.readinto(buffer):
            piece, end = buffer[:read], position + read
            digest.update(piece)
            while waiting and waiting[0].start < end:
                begun.append(waiting.popleft())
            for array in begun:
                first = max(array.start - position, 0)
                array.digest.update(piece[first : array.end - position])
            begun = [array for array in begun if array.end > end]
            position = end
    return digest.intdigest(), position
