"""What a benchmark's row is, how two things are timed in turn, and the table that comes of it.

Most figures that are judged are ratios of two things measured in turn in one run on one machine, so
that what else the machine does hits both alike; a few are our seconds alone, or how they grow.
Other times and rates go along as information.
"""

from __future__ import annotations

import atexit
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

#: Where the real Phi-3-mini tokenizer may lie: beside this checkout.
SHARED = ROOT.parent / "shared"


@dataclass(frozen=True)
class Goal:
    """What `value` of a line is to be: at most, or `at_least`, `limit`.

    The value is, by `of`: `times` our seconds over the bare loop's, `rate` our rate over the bare
    loop's, `seconds` our seconds alone, `exponent` the growth of our seconds with the amount.
    """

    limit: float
    of: str

    @property
    def at_least(self) -> bool:
        """Whether more is better."""
        return self.of == "rate"

    def __str__(self) -> str:
        """As the table shows it."""
        sign = "≥" if self.at_least else "≤"
        unit = {"times": " ×", "rate": "", "seconds": " s", "exponent": ""}[self.of]
        return f"{sign} {self.limit:g}{unit}"


@dataclass(frozen=True)
class Line:
    """One line of the table: seconds of ours and of the bare loop, repeat by repeat.

    `unit` is what `amount` counts and rates are of. A line that could not be measured says in
    `skipped` why. `exponent` is given where the goal is one; `failed` names what the goal asks for
    besides, where it was not so; `details` go into the JSON and `note` under the table.
    """

    stage: str
    goal: Goal
    unit: str = ""
    amount: int = 0
    ours: tuple[float, ...] = ()
    bare: tuple[float, ...] = ()
    exponent: float | None = None
    skipped: str = ""
    failed: str = ""
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def value(self) -> float | None:
        """What the goal judges: the median over the repeats."""
        if self.skipped:
            return None
        if self.goal.of == "exponent":
            return self.exponent
        if self.goal.of == "seconds":
            return statistics.median(self.ours)
        pairs = zip(self.ours, self.bare, strict=True)
        ratio = statistics.median(ours / bare for ours, bare in pairs)
        return 1 / ratio if self.goal.of == "rate" else ratio

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None where nothing was measured."""
        value = self.value
        if value is None:
            return None
        enough = value >= self.goal.limit if self.goal.at_least else value <= self.goal.limit
        return enough and not self.failed

    def as_json(self) -> dict[str, Any]:
        """Everything of it as plain values."""
        return {**asdict(self), "goal": str(self.goal), "value": self.value, "met": self.met}


@dataclass(frozen=True)
class Bench:
    """What a row is measured with: a `folder` of its own, how often, and how much.

    `scale` multiplies the amounts: 1 is what the goals are meant for.
    """

    folder: Path
    repeats: int
    scale: float = 1.0

    def amount(self, full: int, least: int = 8) -> int:
        """`full` at this scale."""
        return max(least, round(full * self.scale))


class Skip(Exception):
    """A row cannot be measured here, with the reason."""


@dataclass(frozen=True)
class Row:
    """One thing to measure, which gives one or several lines.

    `name` is what `--rows` calls it. `measure` may build what it likes in the folder it is given,
    which is empty, and removed afterwards.
    """

    name: str
    stage: str
    goal: Goal
    measure: Callable[[Bench], Iterable[Line]]

    def lines(self, bench: Bench) -> list[Line]:
        """Its lines; one that says why, where it cannot be measured."""
        try:
            return list(self.measure(bench))
        except Skip as reason:
            return [Line(self.stage, self.goal, skipped=str(reason))]


def in_turn(repeats: int, *works: Callable[[], float]) -> list[tuple[float, ...]]:
    """The seconds of each of `works`, which take turns `repeats` times.

    Every other time they go in the opposite order: what the one before leaves (a full cache, a
    disk still writing) then helps or hinders all alike.
    """
    seconds: list[list[float]] = [[] for _ in works]
    for repeat in range(repeats):
        order = list(enumerate(works))
        for number, work in order if repeat % 2 == 0 else reversed(order):
            seconds[number].append(work())
    return [tuple(each) for each in seconds]


def elapsed(*command: str) -> float:
    """Seconds that `command` takes, start and end of its process included."""
    started = time.perf_counter()
    subprocess.run(command, env=_environment(), check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def child(script: str, work: str, *arguments: object) -> dict[str, Any]:
    """What the function `work` of `script`, run in a process of its own, returned.

    `script` lies beside this module and ends in `answer(...)`.
    """
    path = Path(__file__).with_name(script)
    command = [sys.executable, str(path), work, *map(str, arguments)]
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True)
    if done.returncode != 0:  # else it is libraries that say what they lack
        raise RuntimeError(f"{work} of {script} failed with {done.returncode}:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def answer(works: dict[str, Callable[..., dict[str, Any]]]) -> None:
    """Do what `child` asked this process for, and print what it returned as JSON."""
    print(json.dumps(works[sys.argv[1]](*sys.argv[2:])))


@cache
def _byte_code() -> str:
    """A folder where our modules' byte code is kept while this process lives. The libraries have
    theirs; ours has to be there, too, wherever the environment forbids to write it."""
    folder = tempfile.mkdtemp(prefix="byte-code-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    here = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    kept = {"PYTHONPATH": path, "PYTHONPYCACHEPREFIX": _byte_code()}
    return {**here, **kept, "HF_HUB_OFFLINE": "1"}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    from importlib.metadata import version

    names = ("duckdb", "pillow", "pyarrow", "tokenizers", "torch", "typer")
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
        "versions": {name: version(name) for name in names},
    }


HEADINGS = ("stage", "ours", "bare loop", "ratio", "goal", "met")


def cells(line: Line) -> tuple[str, ...]:
    """The columns of a line, in the order of `HEADINGS`."""
    if line.skipped:
        return (line.stage, "–", "–", "–", str(line.goal), f"skipped: {line.skipped}")
    value = line.value
    assert value is not None  # only of skipped lines
    unit = {"times": " ×", "rate": "", "exponent": ""}.get(line.goal.of)
    shown = duration(value) if unit is None else f"{value:.2f}{unit}"
    met = "yes" if line.met else "no"
    if line.failed:
        met += f": {line.failed}"
    return (
        line.stage,
        _speed(line, line.ours),
        _speed(line, line.bare),
        shown,
        str(line.goal),
        met,
    )


def _speed(line: Line, seconds: tuple[float, ...]) -> str:
    if not seconds:
        return "–"
    middle = statistics.median(seconds)
    if not line.unit:
        return duration(middle)
    rate = line.amount / middle
    return f"{rate:,.0f} {line.unit}/s" if rate >= 20 else f"{rate:.2f} {line.unit}/s"


def duration(seconds: float) -> str:
    """As tables and notes show it: in milliseconds below a tenth of a second."""
    return f"{seconds:.2f} s" if seconds >= 0.0995 else f"{1000 * seconds:.2g} ms"


def as_text(lines: Iterable[Line]) -> str:
    """The table in Markdown, and the notes under it."""
    lines = list(lines)
    rows = [HEADINGS, *(cells(line) for line in lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    text += ["", *(f"- {line.stage}: {line.note}" for line in lines if line.note)]
    return "\n".join(text).rstrip()
