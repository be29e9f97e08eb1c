"""Progress on stderr: a rich bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as Bar,
)

#: Seconds between two lines where there is no terminal.
LINE_INTERVAL = 30.0


class Progress:
    """Says on stderr how far long work is; `quiet` says nothing."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)

    def note(self, message: str) -> None:
        """A sentence for the person who waits."""
        if not self.quiet:
            self.console.print(message, markup=False)

    @contextmanager
    def task(self, label: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """Count up to `total` under `label`; the value is called with each amount done."""
        if self.quiet:
            yield lambda amount: None
        elif self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            with Bar(*columns, console=self.console, transient=True) as bar:
                task = bar.add_task(label, total=total)
                yield lambda amount: bar.advance(task, amount)
        else:
            done, last = 0, time.monotonic()

            def advance(amount: int) -> None:
                nonlocal done, last
                done += amount
                if time.monotonic() - last >= LINE_INTERVAL:
                    last = time.monotonic()
                    print(f"{label}: {done} of {total or '?'}", file=sys.stderr, flush=True)

            yield advance
