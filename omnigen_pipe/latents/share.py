"""The share of one of several encoders: whole images, by the hash of their content.

All geometries of an image fall to the same encoder. The shares of N encoders are disjoint and
hold everything together, whatever the encoders see of each other's work.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa

from manifests.errors import UsageError
from manifests.query import query

_FORM = re.compile(r"(\d{1,9})/(\d{1,9})")

#: Hex digits of a content_hash that decide: 64 bits.
_DIGITS = 16


@dataclass(frozen=True)
class Share:
    """Share `number` of `count`; numbers start at 1. `origin` says who chose it."""

    number: int = 1
    count: int = 1
    origin: str = "--worker"

    def __str__(self) -> str:
        """As on the command line."""
        return f"{self.number}/{self.count}"

    def of(self, wanted: pa.Table) -> pa.Table:
        """The rows of `wanted` whose `content_hash` falls to this share, in their order."""
        if self.count == 1:
            return wanted
        return query(
            f"""
            SELECT * FROM wanted
            WHERE ('0x' || left(content_hash, {_DIGITS}))::UBIGINT % ? = ?
            ORDER BY bucket, pixels_key
            """,
            self.count,
            self.number - 1,
            wanted=wanted,
        )


def parse(text: str) -> Share:
    """The share written as `I/N`; raises `UsageError` for anything else."""
    match = _FORM.fullmatch(text.strip())
    number, count = (int(part) for part in match.groups()) if match else (0, 0)
    if not 1 <= number <= count:
        raise UsageError(
            f"--worker is {text!r}, but must be I/N with I from 1 to N: --worker 1/4 to --worker "
            "4/4 for four encoders."
        )
    return Share(number, count)


def from_environment(environment: Mapping[str, str]) -> Share:
    """The share of a task of a SLURM job array; all of the work outside of one.

    Raises `UsageError` where the array's ids have gaps, so that shares would go to nobody.
    """
    task, count = (environment.get(f"SLURM_ARRAY_TASK_{name}") for name in ("ID", "COUNT"))
    if task is None or count is None:
        return Share()
    try:
        total = int(count)
        first = int(environment.get("SLURM_ARRAY_TASK_MIN", 0))
        last = int(environment.get("SLURM_ARRAY_TASK_MAX", first + total - 1))
        step = int(environment.get("SLURM_ARRAY_TASK_STEP", 1))
        place, rest = divmod(int(task) - first, step)
        regular = total >= 1 and rest == 0 and first + (total - 1) * step == last
    except (ValueError, ZeroDivisionError):
        regular = False
    if not regular:
        raise UsageError(
            f"SLURM_ARRAY_TASK_ID is {task} and SLURM_ARRAY_TASK_COUNT {count}, but the ids of the "
            "array have gaps or cannot be read, so that shares would be left undone. Use an array "
            "such as --array=1-8, or give --worker I/N yourself."
        )
    # Without the array's first id any run of ids in a row still gives each task its own share.
    return Share(place % total + 1, total, "SLURM_ARRAY_TASK_ID")
