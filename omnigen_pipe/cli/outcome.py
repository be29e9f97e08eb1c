"""How a command ends: its summary on stdout, and its exit status."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from omnigen_pipe.summary import Summary


def report(summary: Summary, as_json: bool, strict: bool) -> None:
    """Print one stage's summary and leave with the exit status it asks for."""
    if as_json:
        print(json.dumps(summary.as_json(), indent=2, default=str))
    else:
        from omnigen_pipe.summary import show

        show(summary)
    leave([summary], strict)


def leave(summaries: list[Summary], strict: bool) -> None:
    """Leave with the exit status that the summaries ask for, unless it is 0."""
    if any(summary.failed for summary in summaries):
        raise typer.Exit(1)
    for summary in summaries:
        if summary.signal is not None:
            raise typer.Exit(128 + summary.signal)
    if strict and any(summary.left_out for summary in summaries):
        raise typer.Exit(3)
