"""Charts: every point lies in the box, at its place."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnigen_pipe.report.charts import chart, finite, number

VALUES = st.floats(-1e6, 1e6, allow_nan=False) | st.just(math.nan)


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


@given(st.floats(1e-12, 1e12), st.lists(st.integers(0, 3), min_size=2, max_size=20))
def test_values_that_differ_in_their_last_digits_lie_in_the_middle(
    value: float, steps: list[int]
) -> None:
    near = [value]
    for _ in range(3):
        near.append(math.nextafter(near[-1], math.inf))
    found = chart("title", "", [("a", "one", [(n, near[k]) for n, k in enumerate(steps)])])
    assert found is not None
    heights = [float(text) for text in re.findall(r" ([\d.]+)", found.lines[0].path)]
    assert heights == pytest.approx([50] * len(steps))
    assert found.up


def test_what_is_not_finite_or_too_large_is_passed_over() -> None:
    points = [(0, math.inf), (1, 2.0), (2, -math.inf), (3, 1.7e308), (4, -1.7e308), (5, 4.0)]
    found = chart("title", "", [("a", "one", points)])
    assert found is not None
    assert [row[0] for row in found.rows] == ["1", "5"]
    assert chart("title", "", [("a", "one", [(0, math.inf)])]) is None
    assert all(math.isnan(finite(value)) for value in (None, "1", [1], math.inf, 10**400))
    assert (finite(3), finite(-0.5)) == (3.0, -0.5)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1.5, "1.5"), (12345.6, "12,346"), (1e-4, "1e-4"), (2.5e-5, "2.5e-5"),
     (-0.25, "-0.25"), (1e7, "1e7"), (0.90271, "0.9027"), (math.inf, "inf"), (math.nan, "nan")],
)  # fmt: skip
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text
