"""The processor's cores."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """The cores that this process may run on: in a container or a batch job, often not all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
