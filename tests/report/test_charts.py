"""Charts: every point lies in the box, at its place."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnigen_pipe.report.charts import chart, number

VALUES = st.floats(-1e6, 1e6, allow_nan=False, allow_subnormal=False) | st.just(math.nan)


@given(st.lists(VALUES, max_size=30), st.lists(VALUES, max_size=30))
def test_all_lines_and_ticks_lie_in_the_box(one: list[float], other: list[float]) -> None:
    named = [
        ("one", "one", list(enumerate(one))),
        ("other", "two", list(enumerate(other))),
    ]
    found = chart("title", "", named)
    if all(math.isnan(value) for value in one + other):
        assert found is None
        return
    assert found is not None
    for line in found.lines:
        numbers = [float(text) for text in re.findall(r"-?[\d.]+", line.path)]
        assert all(-0.01 <= value <= 100.01 for value in numbers)
    for tick in found.across + found.up:
        assert -1e-6 <= tick.place <= 100 + 1e-6
    assert len(found.up) <= 8
    assert len(found.rows) <= 12


def test_a_value_lies_where_its_tick_does() -> None:
    found = chart("title", "", [("a", "one", [(0, 0.0), (10, 5.0), (20, 10.0)])])
    assert found is not None
    assert found.lines[0].path == "M0.00 100.00L50.00 50.00L100.00 0.00"
    assert {tick.label: tick.place for tick in found.up}["5"] == pytest.approx(50)
    assert {tick.label: tick.place for tick in found.across}["10"] == pytest.approx(50)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1.5, "1.5"), (12345.6, "12,346"), (1e-4, "1e-4"), (2.5e-5, "2.5e-5"),
     (-0.25, "-0.25"), (1e7, "1e7"), (0.90271, "0.9027")],
)  # fmt: skip
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text
