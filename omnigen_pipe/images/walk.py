"""The walk of a folder: all picture files in it, however deep, with symbolic links followed once.

What is reached by real folders counts first, then linked folders in the order of their paths,
then linked files; so which of several names a file is listed under does not depend on the
order of directory entries.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path

from omnigen_pipe.images.candidates import (
    Candidates,
    asked,
    candidate_of,
    escaped,
    is_picture_name,
    refused,
    with_distinct_paths,
)

#: Leftovers of editors, file managers and network drives; those with a leading dot come on top.
_LEFTOVERS = frozenset({"Thumbs.db", "desktop.ini", "__MACOSX", "@eaDir", "#recycle"})


def walk(
    root: Path, not_data: frozenset[str], textfiles: bool, list_file: Path | None, distinct: bool
) -> tuple[Candidates, list[str]]:
    """All picture files under `root`, and in sentences what was left aside.

    `not_data` are real paths of folders not to be entered. Files named `.txt`, where these are
    captions (`textfiles`), and `list_file` are not counted as strange. With `distinct`, a linked
    file that is listed under another name is left out.
    """
    found = _Walk(os.fspath(root), not_data, textfiles, list_file)
    found.folders([""])
    found.links(distinct)
    return with_distinct_paths(found.candidates), found.notes()


class _Walk:
    """One walk: what it has seen, so that nothing is seen twice, and what it left aside."""

    def __init__(
        self, root: str, not_data: frozenset[str], textfiles: bool, list_file: Path | None
    ) -> None:
        self.root = root
        self.not_data = not_data
        self.textfiles = textfiles
        self.list_file = None if list_file is None else os.path.realpath(list_file)
        self.seen: set[str] = set()  # real paths of folders
        self.candidates = Candidates()
        self.file_links: list[str] = []
        self.others: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.unreadable: list[str] = []

    def folders(self, links: list[str]) -> None:
        """Walk the folders in `links` (paths from the root), then those linked from them."""
        while links:
            further: list[str] = []
            for path in sorted(links):
                full = os.path.join(self.root, path) if path else self.root
                real = os.path.realpath(full)
                # A link to a folder that it lies in would lead round and round.
                lies_in = os.path.realpath(os.path.dirname(full)) + "/"
                if path and lies_in.startswith(real.rstrip("/") + "/"):
                    self.counts["loops"] += 1
                else:
                    self._descend(path, real, further)
            links = further

    def _descend(self, path: str, real: str, links: list[str]) -> None:
        stack = [(path, real)]
        while stack:
            path, real = stack.pop()
            if real in self.seen:
                self.counts["twice"] += 1
                continue
            if path and real in self.not_data:
                self.counts["workspace"] += 1
                continue
            self.seen.add(real)
            waiting = len(stack)
            try:
                # By a handle: to ask for a file, the system need not follow the whole path again.
                with _opened(self.root) as root, _opened(path or ".", root) as folder:
                    with os.scandir(folder) as entries:
                        # In order, so that at the end there is hardly anything to sort.
                        by_name = sorted(entries, key=attrgetter("name"))
                    self._entries(by_name, path, real, stack, links)
                stack[waiting:] = reversed(stack[waiting:])
            except FileNotFoundError:
                continue  # deleted since it was listed
            except OSError as error:
                self.unreadable.append(f"{escaped(path)} ({error.strerror})")

    def _entries(
        self,
        entries: Iterable[os.DirEntry[str]],
        folder: str,
        real: str,
        stack: list[tuple[str, str]],
        links: list[str],
    ) -> None:
        """List what lies in one folder.

        Nearly all of it is plain files with plain names. These are put into the columns right
        here: a call for each would cost as much as asking for its size.
        """
        names, sizes, mtimes_ns = [], [], []
        is_plain: dict[str, bool] = {}  # by extension, as it is written
        utf8 = escaped(folder) == folder
        for entry in entries:
            name = entry.name
            extension = name[name.rfind(".") :]
            plain = is_plain.get(extension)
            if plain is None:
                plain = is_plain[extension] = utf8 and is_picture_name("x" + extension)
            # Leftovers that have the extension of a picture begin with one of two characters.
            if (
                plain
                and name[0] not in ".~"
                and name.isascii()
                and entry.is_file(follow_symlinks=False)
            ):
                try:
                    facts = entry.stat(follow_symlinks=False)
                except OSError:
                    pass  # what it means is decided below
                else:
                    names.append(name)
                    sizes.append(facts.st_size)
                    mtimes_ns.append(facts.st_mtime_ns)
                    continue
            self._entry(entry, folder, real, stack, links)
        found = self.candidates
        prefix, real_prefix = f"{folder}/" if folder else "", os.path.join(real, "")
        found.paths.extend([prefix + name for name in names])
        found.reals.extend([real_prefix + name for name in names])
        found.sizes.extend(sizes)
        found.mtimes_ns.extend(mtimes_ns)
        found.reasons.extend([None] * len(names))

    def _entry(
        self,
        entry: os.DirEntry[str],
        folder: str,
        real: str,
        stack: list[tuple[str, str]],
        links: list[str],
    ) -> None:
        name = entry.name
        path = f"{folder}/{name}" if folder else name
        if _is_left_aside(name):
            self.counts["hidden"] += 1
        elif entry.is_dir(follow_symlinks=False):
            stack.append((path, os.path.join(real, name)))
        elif entry.is_symlink() and _is_folder(entry):
            links.append(path)
        elif not is_picture_name(name):
            self._other(name, os.path.join(real, name))
        elif entry.is_symlink():
            self.file_links.append(path)
        else:
            try:
                self.candidates.append(
                    candidate_of(path, os.path.join(real, name), entry.stat(follow_symlinks=False))
                )
            except FileNotFoundError:
                pass  # deleted since it was listed
            except OSError as error:
                self.candidates.append(refused(path, f"unreadable: {error.strerror}"))

    def _other(self, name: str, real: str) -> None:
        extension = os.path.splitext(name)[1].lower()
        if self.textfiles and extension == ".txt":
            return
        if self.list_file is not None and os.path.realpath(real) == self.list_file:
            return
        self.others[escaped(extension) or "without extension"] += 1

    def links(self, distinct: bool) -> None:
        """List the linked files; with `distinct`, none whose target is listed already."""
        reached: set[str] = set()
        for path in sorted(self.file_links):
            full = os.path.join(self.root, path)
            real = os.path.realpath(full)
            folder, name = os.path.split(real)
            listed = folder in self.seen and is_picture_name(name) and not _is_left_aside(name)
            if distinct and (real in reached or (listed and os.path.isfile(real))):
                self.counts["twice"] += 1
                continue
            reached.add(real)
            self.candidates.append(asked(path, full, "the link leads nowhere"))

    def notes(self) -> list[str]:
        """What was left aside, in sentences."""
        sentences = {
            "hidden": "Hidden or leftover files and folders, left aside: {}.",
            "twice": "Links to what is listed under another name, listed once: {}.",
            "loops": "Links to a folder that they lie in, not followed: {}.",
            "workspace": "Folders of the workspace itself or of masks, left aside: {}.",
        }
        notes = [s.format(f"{self.counts[k]:,}") for k, s in sentences.items() if self.counts[k]]
        if self.others:
            kinds = sorted(self.others.items(), key=lambda item: (-item[1], item[0]))
            listed = ", ".join(f"{number:,} {kind}" for kind, number in kinds[:8])
            more = f" and {len(kinds) - 8} more kinds" if len(kinds) > 8 else ""
            total = sum(self.others.values())
            notes.append(f"No pictures by their names: {total:,} ({listed}{more}).")
        if self.unreadable:
            number, first = len(self.unreadable), min(self.unreadable)
            notes.append(f"Folders that could not be read: {number:,}, the first {first}.")
        return notes


@contextmanager
def _opened(folder: str, start: int | None = None) -> Iterator[int]:
    """A handle of `folder`, whose path begins at the folder with the handle `start`."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY, dir_fd=start)
    try:
        yield handle
    finally:
        os.close(handle)


def _is_left_aside(name: str) -> bool:
    return name.startswith((".", "~$")) or name.endswith("~") or name in _LEFTOVERS


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads round to itself
        return False
