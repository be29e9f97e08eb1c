"""Locks: at most one process at a time maintains a workspace, trains a run, or makes a model.

A lock is a `flock` on a file, which the system lets go of when the process ends, however it ends.
The file holds at most a line on who took it last, for the sake of messages. Readers and writers
of manifests take no lock: maintenance never changes what they rely on.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from manifests.publish import make_folder

#: Bytes of a lock file that are read: far more than a signature takes.
_MOST = 4096


class Lock(NamedTuple):
    """A lock file as this process has it open: `held` is False where another process holds it,
    and None where the file system knows no locks.

    A child process that is given `handle` holds it too, until both have ended.
    """

    held: bool | None
    handle: int


@contextmanager
def locked(path: Path) -> Iterator[Lock]:
    """Hold the lock file `path`, which is made where it is not there."""
    make_folder(path.parent)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield Lock(False, handle)
        except OSError:
            yield Lock(None, handle)
        else:
            yield Lock(True, handle)
    finally:
        os.close(handle)


def sign(handle: int, process: int | None = None) -> None:
    """Write into the lock file that is open as `handle` that `process` (None: this one) holds it.

    On a full disk nothing is written: a lock is held without a signature, too.
    """
    with suppress(OSError):
        text = f"process {process or os.getpid()} on {socket.gethostname()}\n".encode()
        os.ftruncate(handle, 0)
        os.pwrite(handle, text, 0)


def holder(handle: int) -> str:
    """Who holds the lock file that is open as `handle`, as it signed: a process and its machine.

    In the instant between taking the lock and signing it is the holder before.
    """
    signed = os.pread(handle, _MOST, 0).decode("utf-8", "replace").strip()
    return signed or "a process that did not say its number"


@contextmanager
def maintenance_lock(path: Path) -> Iterator[bool]:
    """Hold the maintenance lock `path`; the value is False where it cannot be had: maintenance
    can wait."""
    with locked(path) as lock:
        yield lock.held is True
