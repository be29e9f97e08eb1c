"""Line charts as SVG paths: plain numbers in, paths and ticks out. Knows nothing of HTML.

A chart is drawn in a box of 100x100 that the page stretches to any width; labels are text of the
page beside it, so that they stay readable on a phone.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """A line: its `name`, the class that colours it, and its path."""

    name: str
    style: str
    path: str


@dataclass(frozen=True)
class Tick:
    """A label at `place` percent from the box' left, or its bottom."""

    label: str
    place: float


@dataclass(frozen=True)
class Chart:
    """A chart with its ticks; `rows` are some of its numbers: x and a value per line, as text."""

    title: str
    unit: str
    lines: list[Line]
    across: list[Tick]
    up: list[Tick]
    rows: list[list[str]]


#: So many of a chart's numbers stand in its table.
_ROWS = 12
#: Values that differ by less than these are one value: of means of equal numbers the last digits
#: differ, and a scale between them would show nothing else.
_RELATIVE, _ABSOLUTE = 1e-9, 1e-300
#: Nothing larger can be drawn: a scale's ends must be numbers too.
_LARGEST = 1e300


def chart(title: str, unit: str, named: Sequence[tuple[str, str, Points]]) -> Chart | None:
    """A chart of lines (name, style, points with ascending x); None where no point is finite.

    Values are on one linear scale, which holds 0 unless all lie far from it.
    """
    lines = [
        (name, style, [(x, y) for x, y in points if abs(x) < _LARGEST and abs(y) < _LARGEST])
        for name, style, points in named
    ]
    lines = [(name, style, points) for name, style, points in lines if points]
    if not lines:
        return None
    xs = [x for _, _, points in lines for x, _ in points]
    ys = [y for _, _, points in lines for _, y in points]
    left, right = min(xs), max(xs)
    low, high = _range(min(ys), max(ys))
    up = [Tick(number(y), _place(y, low, high)) for y in _ticks(low, high, 4)]
    across = [Tick(f"{x:,.0f}", _place(x, left, right)) for x in _whole_ticks(left, right)]
    drawn = [
        Line(name, style, _path(points, (left, right), (low, high)))
        for name, style, points in lines
    ]
    return Chart(title, unit, drawn, across, up, _rows([points for _, _, points in lines]))


def finite(value: object) -> float:
    """`value`, which a file holds, as a number; NaN where it is none, or not finite."""
    if isinstance(value, (int, float)) and abs(value) <= sys.float_info.max:
        return float(value)
    return math.nan


def number(value: float) -> str:
    """A number for a person: four digits, with an exponent where it is very small or large."""
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return str(value)
    if 1e-3 <= abs(value) < 1e5:
        text = f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def _range(low: float, high: float) -> tuple[float, float]:
    """The ends of a scale that holds `low` and `high`, and 0 where that costs little room."""
    if low >= 0 and low < high / 2:
        low = 0.0
    if math.isclose(low, high, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE):
        margin = abs(high) / 10 if abs(high) > _ABSOLUTE else 1.0
        return low - margin, high + margin
    step = _step(low, high, 4)
    return math.floor(low / step) * step, math.ceil(high / step) * step


def _step(low: float, high: float, count: int) -> float:
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    return next((d * power for d in (1, 2, 2.5, 5) if d * power >= rough), 10 * power)


def _ticks(low: float, high: float, count: int) -> list[float]:
    step = _step(low, high, count)
    first = math.ceil(round(low / step, 6))
    last = math.floor(round(high / step, 6))
    return [place * step for place in range(first, last + 1)]


def _whole_ticks(left: float, right: float) -> list[float]:
    if left == right:
        return [left]
    return [x for x in _ticks(left, right, 4) if x == round(x)] or [left, right]


def _place(value: float, low: float, high: float) -> float:
    return 50.0 if high == low else 100 * (value - low) / (high - low)


def _path(points: Points, across: tuple[float, float], up: tuple[float, float]) -> str:
    places = [(_place(x, *across), 100 - _place(y, *up)) for x, y in points]
    if len(places) == 1:
        x, y = places[0]
        places = [(max(0.0, x - 1), y), (min(100.0, x + 1), y)]  # else nothing would be seen
    return "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in places)


def _rows(lines: Sequence[Points]) -> list[list[str]]:
    """Some x of the longest line, evenly spread and the last among them, with all values there."""
    longest = max(lines, key=len)
    stride = max(1, math.ceil(len(longest) / _ROWS))
    shown = [x for x, _ in longest[::-1][::stride]][::-1]
    values = [dict(points) for points in lines]
    return [
        [f"{x:,.0f}", *(number(found[x]) if x in found else "–" for found in values)] for x in shown
    ]
