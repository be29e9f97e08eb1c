"""What became of each of SimpleTuner's keys, printed."""

from __future__ import annotations

import json
import sys
from itertools import groupby

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from omnigen_pipe.starting.simpletuner import Conversion


def show_conversion(conversion: Conversion, as_json: bool) -> None:
    """What became of each of SimpleTuner's keys: a table, or JSON with the notes on stderr."""
    if as_json:
        entries = [entry.as_json() for entry in conversion.report]
        print(json.dumps(entries, indent=2, ensure_ascii=False))
        for note in conversion.notes:
            print(note, file=sys.stderr)
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=140)
    for file, entries_of_file in groupby(conversion.report, key=lambda entry: entry.file):
        headings = ("key", "value", "outcome", "here", "note")
        columns = [
            Column(heading, overflow="fold", no_wrap=heading == "outcome") for heading in headings
        ]
        table = Table(*columns, title=file, title_justify="left", show_edge=False)
        for entry in entries_of_file:
            value = json.dumps(entry.value, ensure_ascii=False)
            cells = (entry.key, value, entry.outcome, entry.target or "", entry.note)
            table.add_row(*(Text(cell) for cell in cells))
        console.print(table)
        console.print()
    for note in conversion.notes:
        console.print(note, markup=False, soft_wrap=True)  # a path in it stays whole
