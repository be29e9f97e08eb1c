"""The errors this project raises on purpose: each says what happened, where, and what to do.

The command line prints the message of a `PipeError` without a traceback and exits with its
`exit_status`. Anything else that escapes is a bug and shows its traceback.
"""

from __future__ import annotations


class PipeError(Exception):
    """Something went wrong that a user can act on. Exit status 1."""

    exit_status = 1


class UsageError(PipeError):
    """The command line, configuration or workspace is wrong. Exit status 2."""

    exit_status = 2


class ManifestError(PipeError):
    """A manifest cannot be used: torn, foreign, or written by a newer version."""
