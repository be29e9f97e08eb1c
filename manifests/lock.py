"""The maintenance lock: at most one process at a time merges, collects or packs in a workspace.

It is a `flock` on an empty file, which the system lets go of when the process ends, however it
ends. Readers and writers take no lock: maintenance never changes what they rely on.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from manifests.publish import make_folder


@contextmanager
def maintenance_lock(path: Path) -> Iterator[bool]:
    """Hold the lock file `path`; the value is False where another process holds it already,
    or the file system knows no locks."""
    make_folder(path.parent)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # held by another process, or a file system without locks
            yield False
        else:
            yield True
    finally:
        os.close(handle)
