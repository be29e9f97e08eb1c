"""Publishing: how a finished file appears in the workspace, whole or not at all.

A file is written under `staging/`, flushed to disk, renamed to its final name, and then the
folder that now names it is flushed too. A process killed at any instant leaves either nothing
or the finished file; what is left in `staging/` is never read. No locks are taken.
"""

from __future__ import annotations

import os
import secrets
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from manifests.errors import UsageError, WriteError

_RANDOM_BITS = 74
_last_id = (0, 0)
_id_lock = threading.Lock()


def new_id() -> str:
    """A UUIDv7 (RFC 9562) in hex: unique anywhere, and later ones of a process sort after.

    48 bits of milliseconds, then 74 random bits around the fixed version and variant bits.
    """
    global _last_id
    with _id_lock:
        fresh = (time.time_ns() // 1_000_000, secrets.randbits(_RANDOM_BITS))
        if fresh <= _last_id:
            # Same millisecond, or a clock set back: stay just above the last one.
            milliseconds, number = _last_id
            number += 1 + secrets.randbits(32)
            if number >> _RANDOM_BITS:
                milliseconds, number = milliseconds + 1, secrets.randbits(_RANDOM_BITS - 1)
            fresh = (milliseconds, number)
        _last_id = fresh
    milliseconds, number = fresh
    value = milliseconds << 80 | 0x7 << 76 | number >> 62 << 64 | 0x2 << 62
    return uuid.UUID(int=value | number & (1 << 62) - 1).hex


def is_id(text: str) -> bool:
    """Whether `text` is of the form that `new_id` gives."""
    try:
        return uuid.UUID(text).hex == text
    except ValueError:
        return False


def fsync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename into it survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Create `folder` and its missing parents, each flushed into its own parent."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    fsync_folder(folder.parent)


def staged(staging: Path, final: Path) -> Path:
    """A new name under `staging` for what will become `final`.

    Raises `UsageError` where the two lie on different file systems: a rename between them
    would not be atomic.
    """
    make_folder(staging)
    target = final.parent
    while not target.exists():
        target = target.parent
    if os.stat(staging).st_dev != os.stat(target).st_dev:
        raise UsageError(
            f"{staging} and {target} lie on different file systems, so finished files cannot "
            "be published in one step. Keep the whole workspace on one file system."
        )
    return staging / f"{new_id()}-{final.name}"


def publish(staged_path: Path, final: Path) -> Path:
    """Make the finished `staged_path` (a file or a folder) appear as `final`; returns `final`.

    Flushes the file first (for a folder: every file in it), renames, then flushes the folder
    that names it. An existing file at `final` is replaced; an existing folder is an error.
    """
    for path in [*staged_path.rglob("*"), staged_path] if staged_path.is_dir() else [staged_path]:
        if path.is_dir():
            fsync_folder(path)
        else:
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
    make_folder(final.parent)
    os.rename(staged_path, final)
    fsync_folder(final.parent)
    return final


@contextmanager
def publishing(staging: Path, final: Path) -> Iterator[Path]:
    """Yields a new name under `staging`; the file or folder written there is then published as
    `final`.

    Raises `WriteError` where the disk is full or not writable. After any exception nothing is
    left in `staging`.
    """
    try:
        path = staged(staging, final)
        try:
            yield path
            publish(path, final)
        except BaseException:
            discard(path)
            raise
    except OSError as error:
        raise WriteError(final, error) from error


def discard(staged_path: Path) -> None:
    """Remove an unfinished file or folder, where that is possible: nobody reads what stays in
    `staging`."""
    with suppress(OSError):
        if staged_path.is_dir() and not staged_path.is_symlink():
            shutil.rmtree(staged_path)
        else:
            staged_path.unlink(missing_ok=True)
