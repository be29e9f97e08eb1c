"""A run's numbers over its steps, thinned to what a chart can show.

`metrics.jsonl` is read line by line and never held: so many neighbouring steps as it takes become
one point, their mean, in which a step's losses count by the samples that they are means of.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omnigen_pipe.report.charts import finite
from omnigen_pipe.runs.metrics import EVALUATIONS_NAME, METRICS_NAME, SCORES_NAME, lines
from omnigen_pipe.runs.time_bins import BINS

#: A series has at most so many points.
MOST_POINTS = 1000

#: Numbers of a step that are averaged as they are.
_PLAIN = ("learning_rate", "grad_norm", "samples_per_second", "memory_gib", "prodigy_d")


@dataclass
class Point:
    """Some neighbouring steps, of which `step` is the last; points add up.

    `values` are sums of `_PLAIN` and `loss` with their weights. `rows`, `losses` and `baselines`
    are sums over rows with the plain target, by bin of t.
    """

    step: int = 0
    steps: int = 0
    values: dict[str, tuple[float, float]] = field(default_factory=dict)
    rows: list[float] = field(default_factory=lambda: [0.0] * BINS)
    losses: list[float] = field(default_factory=lambda: [0.0] * BINS)
    baselines: list[float] = field(default_factory=lambda: [0.0] * BINS)

    def add(self, other: Point) -> None:
        """Take in the steps of a later point."""
        self.step, self.steps = other.step, self.steps + other.steps
        for name, (total, weight) in other.values.items():
            mine = self.values.get(name, (0.0, 0.0))
            self.values[name] = mine[0] + total, mine[1] + weight
        for mine_by_t, others_by_t in (
            (self.rows, other.rows),
            (self.losses, other.losses),
            (self.baselines, other.baselines),
        ):
            mine_by_t[:] = [x + y for x, y in zip(mine_by_t, others_by_t, strict=True)]

    def mean(self, name: str) -> float:
        """The mean of `name`; NaN where no step has it."""
        total, weight = self.values.get(name, (0.0, 0.0))
        return total / weight if weight else math.nan

    def loss(self, place: int | None = None) -> float:
        """The mean loss of the plain rows in one bin, or in all; NaN where there is none."""
        return _mean(self.rows, self.losses, place)

    def baseline(self, place: int | None = None) -> float:
        """The linear baseline of the same rows."""
        return _mean(self.rows, self.baselines, place)


def _mean(rows: list[float], totals: list[float], place: int | None) -> float:
    places = range(BINS) if place is None else (place,)
    count = math.fsum(rows[n] for n in places)
    return math.fsum(totals[n] for n in places) / count if count else math.nan


@dataclass(frozen=True)
class Series:
    """The points of a run in order; each is of `steps_per_point` steps, the last perhaps of fewer.
    `evaluations` and `scores` are the lines of these files, at most `MOST_POINTS` of each."""

    steps: int
    steps_per_point: int
    points: list[Point]
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    scores: list[dict[str, Any]] = field(default_factory=list)

    def windows(self, steps: int) -> list[Point]:
        """For each point, it and those before it as one, of `steps` steps together or a little
        more; shorter at the beginning."""
        width = max(1, math.ceil(steps / self.steps_per_point))
        found = []
        for place in range(len(self.points)):
            window = Point()
            for point in self.points[max(0, place - width + 1) : place + 1]:
                window.add(point)
            found.append(window)
        return found

    def last(self, share: float) -> Point:
        """The last `share` of the points as one, at least one point."""
        count = max(1, math.ceil(share * len(self.points)))
        found = Point()
        for point in self.points[-count:]:
            found.add(point)
        return found


def series(folder: Path, most: int = MOST_POINTS) -> Series:
    """The numbers of the run in `folder`, with at most `most` points."""
    path = folder / METRICS_NAME
    per_point = max(1, math.ceil(_count(path) / most))
    points: list[Point] = []
    last = 0
    for line in _lines(path):
        point = _point(line)
        last = point.step
        if points and points[-1].steps < per_point:
            points[-1].add(point)
        else:
            points.append(point)
    of_others = (_thinned(folder / name, most) for name in (EVALUATIONS_NAME, SCORES_NAME))
    return Series(last, per_point, points, *of_others)


def _thinned(path: Path, most: int) -> list[dict[str, Any]]:
    """At most `most` lines of a file, one of each step, the last among them."""
    # Where a step has two lines the later one holds.
    found = list({line["step"]: line for line in lines(path) if _is_step(line)}.values())
    stride = max(1, math.ceil(len(found) / most))
    return found[::-1][::stride][::-1]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a metrics file; none where it is missing."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                found = json.loads(line)
            except ValueError:
                continue  # the last line of a killed process
            if _is_step(found):
                yield found


def _is_step(line: object) -> bool:
    return isinstance(line, dict) and isinstance(line.get("step"), int)


def _count(path: Path) -> int:
    """The lines of a file, torn ones too; 0 where it is missing."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return sum(1 for _ in file)


def _point(line: dict[str, Any]) -> Point:
    """One step; what is no finite number in it is passed over."""
    point = Point(line["step"], 1)
    samples = finite(line.get("samples"))
    weights = {name: 1.0 for name in _PLAIN} | {"loss": samples if samples > 0 else 1.0}
    for name, weight in weights.items():
        value = finite(line.get(name))
        if not math.isnan(value):
            point.values[name] = weight * value, weight
    by_t = [line.get(name) for name in ("samples_by_t", "loss_by_t", "baseline_by_t")]
    if all(isinstance(values, list) and len(values) == BINS for values in by_t):
        for place, values in enumerate(zip(*by_t, strict=True)):
            rows, loss, baseline = (finite(value) for value in values)
            if rows > 0 and not math.isnan(loss + baseline):
                point.rows[place] = rows
                point.losses[place], point.baselines[place] = rows * loss, rows * baseline
    return point
