"""A run's numbers: thinning loses no sample, and what is torn is passed over."""

from __future__ import annotations

import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import metrics

from omnigen_pipe.report.series import Point, series
from omnigen_pipe.runs.time_bins import BINS


def written(folder: Path, steps: int) -> None:
    lines = "".join(json.dumps(line) + "\n" for line in metrics(steps))
    (folder / "metrics.jsonl").write_text(lines)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 300), st.integers(1, 40))
def test_points_are_few_and_add_up_to_all_steps(steps: int, most: int) -> None:
    with TemporaryDirectory() as name:
        written(Path(name), steps)
        found = series(Path(name), most)
    lines = metrics(steps)
    assert len(found.points) <= most
    assert found.steps == steps == sum(point.steps for point in found.points)
    whole = Point()
    for point in found.points:
        whole.add(point)
    for place in range(BINS):
        counts = [line["samples_by_t"][place] for line in lines]
        losses = [
            n * (line["loss_by_t"][place] or 0) for n, line in zip(counts, lines, strict=True)
        ]
        assert whole.rows[place] == sum(counts)
        if sum(counts):
            assert whole.loss(place) == pytest.approx(math.fsum(losses) / sum(counts))
        else:
            assert math.isnan(whole.loss(place))
    if steps:
        rate = math.fsum(line["learning_rate"] for line in lines) / steps
        assert whole.mean("learning_rate") == pytest.approx(rate)
        assert [point.step for point in found.points] == sorted({p.step for p in found.points})
        assert found.points[-1].step == steps
        assert math.isnan(whole.mean("grad_norm"))  # no step has one


def test_a_window_is_of_the_steps_before_it(tmp_path: Path) -> None:
    written(tmp_path, 30)
    found = series(tmp_path)
    windows = found.windows(10)
    rows = [sum(line["samples_by_t"]) for line in metrics(30)]
    assert [sum(w.rows) for w in windows] == [sum(rows[max(0, n - 9) : n + 1]) for n in range(30)]
    assert sum(found.last(0.1).rows) == sum(rows[-3:])


def test_torn_and_foreign_lines_are_passed_over(tmp_path: Path) -> None:
    written(tmp_path, 3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('[1, 2]\n{"step": "x"}\n{"step": 4, "lo')
    assert series(tmp_path).steps == 3


def test_what_is_no_number_in_a_step_is_passed_over(tmp_path: Path) -> None:
    good, bad, odd = metrics(3)
    for line in (good, bad, odd):
        line["samples_by_t"], line["loss_by_t"] = [1] * BINS, [0.5] * BINS
        line["baseline_by_t"] = [1.0] * BINS
    bad |= {"learning_rate": math.nan, "samples": None, "loss": math.inf}
    bad["loss_by_t"] = [math.nan, None, "x", *[0.5] * (BINS - 3)]
    odd |= {"samples": "two", "samples_by_t": [None] * BINS, "baseline_by_t": 3}
    text = "".join(json.dumps(line) + "\n" for line in (good, bad, odd))
    (tmp_path / "metrics.jsonl").write_text(text)
    whole = Point()
    for point in series(tmp_path).points:
        whole.add(point)
    assert whole.rows == [1, 1, 1, *[2] * (BINS - 3)]
    assert [whole.loss(place) for place in range(BINS)] == [0.5] * BINS
    assert whole.mean("learning_rate") == pytest.approx(2e-4)
    assert math.isfinite(whole.mean("loss"))


def test_of_two_lines_of_a_step_the_later_one_holds(tmp_path: Path) -> None:
    lines = [{"step": n // 2, "clip_score": n} for n in range(20)]
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = series(tmp_path).scores
    assert [(line["step"], line["clip_score"]) for line in found] == [
        (n, 2 * n + 1) for n in range(10)
    ]
    assert [line["step"] for line in series(tmp_path, 4).scores] == [0, 3, 6, 9]


def test_a_run_without_a_step_has_no_points(tmp_path: Path) -> None:
    assert series(tmp_path).points == []
