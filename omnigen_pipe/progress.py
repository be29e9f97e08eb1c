"""Progress on stderr: a rich bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

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
from rich.table import Column


class Advance(Protocol):
    """Called with an amount done and, optionally, a few words on how it goes, and `more` of them,
    which are shown where there is room."""

    def __call__(self, amount: int, detail: str = "", more: str = "") -> None: ...


#: Columns of a terminal that has room for more.
_WIDE = 170
#: Seconds between two lines where there is no terminal.
LINE_INTERVAL = 30.0


class Progress:
    """Says on stderr how far long work is; `quiet` says nothing."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        #: Says nothing at all: another process does.
        self.silent = False
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)

    def note(self, message: str, always: bool = False) -> None:
        """A sentence for the person who waits; `always` also for one who wants quiet."""
        if self.silent or (self.quiet and not always):
            return
        self.console.print(message, markup=False)

    @contextmanager
    def task(self, label: str, total: int | None, done: int = 0) -> Iterator[Advance]:
        """Count from `done` up to `total` under `label`.

        The value is called with each amount done and, if wanted, a few words on how it goes.
        """
        if self.quiet or self.silent:
            yield lambda amount, detail="", more="": None
        elif self.console.is_terminal:
            # The numbers must be seen on 80 columns too: there is a bar only where there is room.
            bar_width = 20 if self.console.width >= 120 else 4
            columns = (
                TextColumn("{task.description}", table_column=Column(no_wrap=True)),
                BarColumn(bar_width),
                MofNCompleteColumn(table_column=Column(no_wrap=True)),
                TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
                TextColumn("{task.fields[detail]}", table_column=Column(no_wrap=True)),
            )
            with Bar(*columns, console=self.console, transient=True) as bar:
                task = bar.add_task(label, total=total, completed=done, detail="")
                room = self.console.width >= _WIDE

                def update(amount: int, detail: str = "", more: str = "") -> None:
                    shown = f"{detail} {more}" if room and more else detail
                    bar.update(task, advance=amount, detail=shown)

                yield update
        else:
            last = time.monotonic()

            def advance(amount: int, detail: str = "", more: str = "") -> None:
                nonlocal done, last
                done += amount
                if time.monotonic() - last >= LINE_INTERVAL:
                    last = time.monotonic()
                    text = f"{label}: {done} of {total or '?'} {detail} {more}"
                    self.note(" ".join(text.split()))

            yield advance
