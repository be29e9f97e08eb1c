"""The folder of an export: appears whole, and replaces nothing but an earlier export.

It is written beside the target under a name that begins with a dot and ends in `.unfinished`,
flushed, and renamed. A process killed at any instant leaves the target as it was, or whole; at the
worst, where an earlier export is being replaced, gone, with the old one beside it in `….replaced`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import Any

from manifests.errors import PipeError, UsageError, WriteError
from manifests.publish import fsync_folder, make_folder, new_id, publish

MARKER_NAME = "export.json"
#: What the marker says of its own form.
_FORMAT = "omnigen-pipe export, version 1"
#: Bytes that are copied at once.
_CHUNK = 1 << 22


def check_target(folder: Path, overwrite: bool) -> None:
    """Raise `UsageError` where an export must not be written to `folder`."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file. Give a folder that is not there yet.")
    if os.path.ismount(folder):
        raise UsageError(
            f"{folder} is a mount point: nothing can be moved into its place. Name a folder inside "
            "it."
        )
    if not any(folder.iterdir()):
        return
    if not overwrite:
        raise UsageError(
            f"{folder} is not empty. Give another folder, or --overwrite where it is an earlier "
            "export."
        )
    files = _marked_files(folder)
    if files is None:
        raise UsageError(
            f"{folder} has no {MARKER_NAME} of an export, so it is not overwritten. Give another "
            "folder."
        )
    own = {MARKER_NAME, *files}
    own |= {str(parent) for name in files for parent in PurePath(name).parents}
    there = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    if foreign := sorted(there - own):
        raise UsageError(
            f"{folder} holds {len(foreign)} files or folders that are not of the export, such as "
            f"{foreign[0]}. Move them away, or give another folder."
        )


def check_room(folder: Path, size: int) -> None:
    """Raise `PipeError` where the disk has no room for an export of `size` bytes at `folder`, and
    `UsageError` where no folder can be made there."""
    there = folder.parent
    while not there.exists():
        there = there.parent
    usage = shutil.disk_usage(there)
    if usage.total == 0 or not os.access(there, os.W_OK):  # such as /proc, which holds no files
        raise UsageError(f"{folder} cannot be made: nothing can be written into {there}.")
    free = usage.free
    if free < size:
        raise PipeError(
            f"{folder} needs {size / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free there. Make "
            "room, or name a folder on another disk."
        )


def copy_files(files: Iterable[Path], folder: Path) -> None:
    """Copy `files` into `folder`, which is made where it is not there.

    Raises `PipeError` where one cannot be read, and `OSError` where one cannot be written.
    """
    folder.mkdir(exist_ok=True)
    for file in files:
        with (folder / file.name).open("wb") as copy:
            for chunk in _chunks(file):
                copy.write(chunk)


def _chunks(file: Path) -> Iterator[bytes]:
    try:
        with file.open("rb") as source:
            while chunk := source.read(_CHUNK):
                yield chunk
    except OSError as error:
        raise PipeError(f"{file} cannot be read: {error.strerror}. Fetch the model again.") from (
            error
        )


def _marked_files(folder: Path) -> set[str] | None:
    """The files that the marker in `folder` names; None where there is no such marker."""
    try:
        marker = json.loads((folder / MARKER_NAME).read_text(encoding="utf-8"))
        names = set(marker["files"]) if marker["format"] == _FORMAT else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return names if names is None or all(isinstance(name, str) for name in names) else None


def leftovers(folder: Path) -> list[str]:
    """Names beside `folder` that killed exports to it have left, or that running ones use."""
    ends = (".unfinished", ".replaced")
    beside = folder.parent.iterdir() if folder.parent.is_dir() else ()
    return sorted(
        path.name
        for path in beside
        if path.name.startswith(f".{folder.name}.") and path.name.endswith(ends)
    )


@contextmanager
def published(folder: Path, overwrite: bool) -> Iterator[Path]:
    """Yields a new folder; what is written there is then published as `folder`, with `overwrite`
    in place of an earlier export.

    Raises `UsageError` as `check_target` does, where something has come to lie there meanwhile,
    and `WriteError` where the disk is full or not writable. After any exception nothing is left.
    """
    unfinished = folder.parent / f".{folder.name}.{new_id()}.unfinished"
    replaced = unfinished.with_suffix(".replaced")
    try:
        try:
            make_folder(unfinished)
            yield unfinished
            check_target(folder, overwrite)
            if folder.exists() and any(folder.iterdir()):
                os.rename(folder, replaced)
            publish(unfinished, folder)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            if replaced.exists():
                with suppress(OSError):
                    os.rename(replaced, folder)
            raise
        if replaced.exists():
            shutil.rmtree(replaced)
            fsync_folder(folder.parent)
    except OSError as error:
        raise WriteError(folder, error) from error


def write_marker(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write `export.json` into a folder whose files are all there: `facts`, and their names."""
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir())
    marker = {"format": _FORMAT, **facts, "files": files}
    text = json.dumps(marker, indent=2) + "\n"
    (folder / MARKER_NAME).write_text(text, encoding="utf-8")
