"""The errors this project raises on purpose: each says what happened, where, and what to do.

The command line prints the message of a `PipeError` without a traceback and exits with its
`exit_status`. Anything else that escapes is a bug and shows its traceback.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path


class PipeError(Exception):
    """Something went wrong that a user can act on. Exit status 1."""

    exit_status = 1
    #: Whether another process has said it already.
    said = False


class UsageError(PipeError):
    """The command line, configuration or workspace is wrong. Exit status 2."""

    exit_status = 2


class WriteError(PipeError):
    """A file of the workspace could not be written; what was published before stays as it was."""

    def __init__(self, path: Path, error: OSError) -> None:
        # Arrow's own words name neither the file nor, first, the cause.
        why = os.strerror(error.errno) if error.errno else str(error)
        if error.filename not in (None, str(path)):
            why += f" ({error.filename})"
        super().__init__(
            f"{path} could not be written: {why}. What was published before is valid. "
            f"{_REMEDIES.get(error.errno or 0, 'Check the disk')}, and run the same command again."
        )


_REMEDIES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Make room")
_REMEDIES |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "Give access")


def first_line(error: BaseException) -> str:
    """The first line of what `error` says; its name where it says nothing, as `MemoryError`."""
    return str(error).split("\n", 1)[0] or type(error).__name__


class ManifestError(PipeError):
    """A manifest cannot be used: torn, foreign, or written by a newer version."""
