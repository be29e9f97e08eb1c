"""Locks: at most one process at a time maintains a workspace, and at most one trains a run.

A lock is a `flock` on an empty file, which the system lets go of when the process ends, however
it ends. Readers and writers of manifests take none: maintenance never changes what they rely on.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from manifests.publish import make_folder


@contextmanager
def locked(path: Path) -> Iterator[bool | None]:
    """Hold the lock file `path`. The value is False where another process holds it already, and
    None where the file system knows no locks."""
    make_folder(path.parent)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        except OSError:
            yield None
        else:
            yield True
    finally:
        os.close(handle)


@contextmanager
def maintenance_lock(path: Path) -> Iterator[bool]:
    """Hold the maintenance lock `path`; the value is False where it cannot be had: maintenance
    can wait."""
    with locked(path) as held:
        yield held is True
