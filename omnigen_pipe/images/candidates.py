"""Candidates: files that may be images, as a walk or a list names them; none is opened here.

Those of a dataset are held as columns: a tuple for each of a million files would cost more than
finding them did.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from operator import le
from typing import NamedTuple, overload

from omnigen_pipe.images.probe import PICTURE_EXTENSIONS


class Candidate(NamedTuple):
    """A file that may be an image.

    `path` is from the dataset's root, with `/`, escaped where it is not UTF-8; `real` is the
    file itself, without symbolic links. `size` (bytes) and `mtime_ns` are None where the file
    could not be asked, and then, or where its name rules it out, `reason` says why.
    """

    path: str
    real: str
    size: int | None
    mtime_ns: int | None
    reason: str | None


def is_picture_name(name: str) -> bool:
    """Whether the extension is one of a picture format."""
    return os.path.splitext(name)[1].lower() in PICTURE_EXTENSIONS


def escaped(path: str) -> str:
    """`path` as UTF-8 text; what is not UTF-8 in it becomes `\\xNN`, and each `\\` then `\\\\`."""
    try:
        path.encode("utf-8")
        return path
    except UnicodeEncodeError:
        doubled = path.replace("\\", "\\\\")
        try:
            return os.fsencode(doubled).decode("utf-8", "backslashreplace")
        except UnicodeEncodeError:  # from a list: half a character, which no file name holds
            return doubled.encode("utf-8", "backslashreplace").decode("utf-8")


def candidate_of(path: str, real: str, facts: os.stat_result) -> Candidate:
    """The candidate at `path`, whose file `real` has these `facts`."""
    text = escaped(path)
    reason = None
    if text != path:
        reason = "name is not UTF-8: rename the file"
    elif not stat.S_ISREG(facts.st_mode):
        reason = "not a regular file"
    return Candidate(text, real, facts.st_size, facts.st_mtime_ns, reason)


def refused(path: str, reason: str) -> Candidate:
    """A candidate at `path` that is not to be opened, with the reason."""
    text = escaped(path)
    name = "name is not UTF-8: rename the file"
    return Candidate(text, "", None, None, reason if text == path else name)


def asked(path: str, full: str, absent: str) -> Candidate:
    """The candidate at `full`; `absent` is the reason where there is none."""
    try:
        return candidate_of(path, os.path.realpath(full), os.stat(full))
    except (FileNotFoundError, NotADirectoryError):
        return refused(path, absent)
    except OSError as error:
        return refused(path, f"unreadable: {error.strerror}")
    except ValueError:  # a zero byte, or half a character
        return refused(path, absent)


class Candidates(Sequence[Candidate]):
    """Candidates as columns of one length, named as the fields of `Candidate` in the plural."""

    def __init__(self, candidates: Iterable[Candidate] = ()) -> None:
        self.paths: list[str] = []
        self.reals: list[str] = []
        self.sizes: list[int | None] = []
        self.mtimes_ns: list[int | None] = []
        self.reasons: list[str | None] = []
        for candidate in candidates:
            self.append(candidate)

    def append(self, candidate: Candidate) -> None:
        """Add `candidate` at the end."""
        for column, value in zip(self._columns(), candidate, strict=True):
            column.append(value)

    def take(self, numbers: Iterable[int]) -> Candidates:
        """Those with these `numbers`, in this order."""
        chosen, taken = list(numbers), Candidates()
        for column, own in zip(taken._columns(), self._columns(), strict=True):
            column.extend(map(own.__getitem__, chosen))
        return taken

    def _columns(self) -> tuple[list[object], ...]:
        return (self.paths, self.reals, self.sizes, self.mtimes_ns, self.reasons)  # type: ignore[return-value]

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, number: int) -> Candidate: ...
    @overload
    def __getitem__(self, number: slice) -> Candidates: ...
    def __getitem__(self, number: int | slice) -> Candidate | Candidates:
        if isinstance(number, slice):
            return self.take(range(*number.indices(len(self))))
        return Candidate._make(column[number] for column in self._columns())

    def __iter__(self) -> Iterator[Candidate]:
        return map(Candidate._make, zip(*self._columns(), strict=True))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Candidates) and self._columns() == other._columns()

    __hash__ = None  # type: ignore[assignment]


def with_distinct_paths(candidates: Candidates) -> Candidates:
    """`candidates` by path; an escaped name that looks like another's gets a mark."""
    if len(set(candidates.paths)) < len(candidates):
        candidates = _marked(candidates)
    paths = candidates.paths
    if all(map(le, paths, islice(paths, 1, None))):
        return candidates
    return candidates.take(sorted(range(len(paths)), key=paths.__getitem__))


def _marked(candidates: Candidates) -> Candidates:
    taken: set[str] = set()
    distinct = Candidates()
    # Good names first: theirs must not change.
    for candidate in sorted(candidates, key=lambda c: (c.reason is not None, c.path, c.real)):
        path = candidate.path
        while path in taken:
            path += "'"
        taken.add(path)
        distinct.append(candidate._replace(path=path))
    return distinct
