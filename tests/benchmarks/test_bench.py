"""The benchmark: its arithmetic is right, and every row still measures what it says."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

import bench
import pytest
from table import HEADINGS, Bench, Goal, Line, Row, Skip, as_text, cells, duration, in_turn

#: Amounts so small that only the working of a row is tested.
TINY = 0.001


def test_a_rate_is_compared_pair_by_pair() -> None:
    """What slows one repeat of both by ten changes nothing."""
    line = Line("s", Goal(0.8, "rate"), "files", 100, (2.0, 20.0, 2.0), (1.0, 10.0, 1.9))
    assert line.value == 0.5
    assert line.met is False
    assert cells(line) == ("s", "50 files/s", "53 files/s", "0.50", "≥ 0.8", "no")


def test_what_costs_more_than_the_goal_does_not_meet_it() -> None:
    for ours, met in ((2.9, True), (3.1, False)):
        assert Line("s", Goal(3, "times"), ours=(ours,), bare=(1.0,)).met is met
        assert Line("s", Goal(3, "seconds"), ours=(ours,)).met is met
    assert Line("s", Goal(0.5, "rate"), "n", 1, (1.9,), (1.0,)).met is True
    assert Line("s", Goal(1.1, "exponent"), ours=(9.0,), exponent=1.2).met is False
    also = Line("s", Goal(3, "seconds"), ours=(1.0,), failed="torch was imported")
    assert also.met is False
    assert cells(also)[-1] == "no: torch was imported"


def test_moments_are_shown_in_milliseconds() -> None:
    shown = {0.00068: "0.68 ms", 0.0123: "12 ms", 0.0994: "99 ms", 0.0996: "0.10 s", 2: "2.00 s"}
    assert {seconds: duration(seconds) for seconds in shown} == shown


def test_all_take_turns_and_the_order_alternates() -> None:
    done: list[str] = []

    def work(name: str, seconds: float) -> float:
        done.append(name)
        return seconds

    works = [lambda: work("a", 1.0), lambda: work("b", 2.0), lambda: work("c", 3.0)]
    assert in_turn(2, *works) == [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)]
    assert done == ["a", "b", "c", "c", "b", "a"]


def test_a_row_that_cannot_be_measured_says_why(tmp_path: Path) -> None:
    def measure(settings: Bench) -> Iterable[Line]:
        raise Skip("there is no GPU")

    row = Row("r", "a stage", Goal(1, "times"), measure)
    (line,) = row.lines(Bench(tmp_path, 1))
    assert (line.value, line.met) == (None, None)
    assert as_text([line]).splitlines()[-1].endswith("| ≤ 1 × | skipped: there is no GPU |")


def test_the_table_has_a_line_each_and_the_notes_below() -> None:
    lines = [Line(f"s{n}", Goal(1, "seconds"), ours=(0.5,), note=f"n{n}") for n in range(3)]
    text = as_text(lines).splitlines()
    assert [heading.strip() for heading in text[0].strip("|").split("|")] == list(HEADINGS)
    assert len({len(line) for line in text[:5]}) == 1
    assert text[5:] == ["", "- s0: n0", "- s1: n1", "- s2: n2"]


def test_names_of_rows_are_distinct() -> None:
    names = [row.name for row in bench.ROWS]
    assert len(set(names)) == len(names)


def _run(tmp_path: Path, *rows: str) -> dict[str, Line]:
    """The lines of `rows` at the smallest size, as the JSON file has them, by stage."""
    (tmp_path / "work").mkdir()
    arguments = ["--folder", str(tmp_path / "work"), "--json", str(tmp_path / "figures.json")]
    bench.main(["--rows", *rows, "--scale", str(TINY), "--repeats", "1", *arguments])
    assert list((tmp_path / "work").iterdir()) == []
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["scale"] == TINY
    assert found["machine"]["cores"] >= 1
    assert list(found["seconds_of_rows"]) == list(rows)
    return {line["stage"]: line for line in found["lines"]}


@pytest.mark.slow
def test_rows_are_measured_and_written_down(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = _run(tmp_path, "discover-cold", "discover-unchanged", "bucket")
    assert list(lines) == ["discover, cold", "discover, nothing changed", "bucket"]
    for line in lines.values():
        assert line["amount"] > 0
        assert line["value"] > 0
        assert line["failed"] == ""
        assert len(line["ours"]) == len(line["bare"]) == 1
    printed = capsys.readouterr().out
    assert all(f"| {stage}" in printed for stage in lines)


@pytest.mark.slow
def test_every_row_can_be_measured(tmp_path: Path) -> None:
    names = [row.name for row in bench.ROWS]
    for line in _run(tmp_path, *names).values():
        measured = line["value"] is not None and math.isfinite(line["value"])
        assert line["skipped"] or measured, line  # an exponent of so few may be below 0
        assert line["failed"] == ""
