"""What a command reports when it ends: for a person, for `--json`, and as an exit status."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omnigen_pipe.progress import Progress


@dataclass
class Summary:
    """The outcome of one stage.

    `counts` are numbers a person reads in one line; `left_out` counts items per reason;
    `notes` are whole sentences that must not be missed, and `said` those that were said while the
    work was going on, which only the JSON repeats; `tables` are printed as they are;
    `details` appear in the JSON only; `unchanged` is said where nothing changed. `failed` makes
    the exit status 1, a `signal` that ended the work early makes it 128 + its number, and anything
    left out makes it 3 under `--strict`.
    """

    stage: str
    changed: bool
    counts: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    tables: list[Any] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    failed: bool = False
    signal: int | None = None
    unchanged: str = "up to date"

    def say(self, progress: Progress, sentence: str) -> None:
        """Say `sentence` now: it is about work that may take long, or never come to its end."""
        progress.note(sentence, always=True)
        self.said.append(sentence)

    def as_json(self) -> dict[str, Any]:
        """A machine-readable form: everything but the tables."""
        return {
            "stage": self.stage,
            "changed": self.changed,
            "counts": self.counts,
            "left_out": self.left_out,
            "notes": self.said + self.notes,
            **self.details,
            "failed": self.failed,
            "signal": self.signal,
        }


def show(summary: Summary) -> None:
    """Print a summary for a person on stdout."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    counts = ", ".join(_counted(number, name) for name, number in summary.counts.items())
    state = "" if summary.changed or not summary.unchanged else f" ({summary.unchanged})"
    console.print(f"{summary.stage}: {counts or 'nothing to do'}{state}", markup=False)
    for table in summary.tables:
        console.print(table)
    for reason, number in sorted(summary.left_out.items(), key=lambda item: (-item[1], item[0])):
        console.print(f"  left out {number:,}: {reason}", markup=False)
    for note in summary.notes:
        console.print(f"  {note}", markup=False)


def _counted(number: int, name: str) -> str:
    """`number` with the `name` of a count, whose plurals all end in a plain s: 1 file opened."""
    return f"{number:,} " + (re.sub(r"s(?= |$)", "", name) if number == 1 else name)
