"""Progress: what is shown where, and to whom."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from omnigen_pipe import progress
from omnigen_pipe.progress import Progress


def _shown(monkeypatch: pytest.MonkeyPatch, width: int | None, **state: bool) -> str:
    """What a task of three steps prints; `width` None is no terminal."""
    monkeypatch.setattr(progress, "LINE_INTERVAL", 0.0)
    shown = Progress(state.get("quiet", False))
    shown.silent = state.get("silent", False)
    output = io.StringIO()
    shown.console = Console(
        file=output, force_terminal=width is not None, width=width or 80, soft_wrap=True
    )
    with shown.task("Training", 3) as advance:
        for _ in range(3):
            advance(1, "loss 1.2", "by t 1.1 1.3")
    shown.note("A sentence.")
    shown.note("An important one.", always=True)
    return output.getvalue()


def test_lines_and_wide_terminals_show_more(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Training: 3 of 3 loss 1.2 by t 1.1 1.3\n" in _shown(monkeypatch, None)
    assert "loss 1.2 by t 1.1 1.3" in _shown(monkeypatch, 200)
    narrow = _shown(monkeypatch, 80)
    assert "loss 1.2" in narrow
    assert "by t" not in narrow


def test_quiet_shows_what_must_not_be_missed_and_silence_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert _shown(monkeypatch, None, quiet=True) == "An important one.\n"
    assert _shown(monkeypatch, None, silent=True) == ""
