"""What training measures, step by step: `metrics.jsonl`, `evaluations.jsonl`, `scores.jsonl` and
trackers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from manifests.errors import PipeError, WriteError
from manifests.publish import publishing
from omnigen_pipe.runs.trackers import Tracker

METRICS_NAME = "metrics.jsonl"
EVALUATIONS_NAME = "evaluations.jsonl"
SCORES_NAME = "scores.jsonl"


def lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; none where it is missing."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # the last line of a killed process
    return found


def truncate(path: Path, last_step: int, staging: Path) -> list[dict[str, Any]]:
    """Drop the lines after `last_step`, which a resumed run computes again, and torn ones.

    Returns the lines that are kept.
    """
    if not path.exists():
        return []
    kept = [line for line in lines(path) if line["step"] <= last_step]
    with publishing(staging, path) as unfinished:
        unfinished.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    return kept


class MetricsWriter:
    """Appends a line per step, one per evaluation and one per validation that is scored, and shows
    the same to `trackers`, which it closes."""

    def __init__(self, folder: Path, trackers: Sequence[Tracker] = ()) -> None:
        self._folder = folder
        self._metrics = (folder / METRICS_NAME).open("a", encoding="utf-8")
        self._evaluations = (folder / EVALUATIONS_NAME).open("a", encoding="utf-8")
        self._scores = (folder / SCORES_NAME).open("a", encoding="utf-8")
        self._trackers = tuple(trackers)

    def __enter__(self) -> MetricsWriter:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Flush and close all; what fails here is raised where nothing failed before."""
        files = (self._metrics, self._evaluations, self._scores)
        closing: list[Callable[[], object]] = [file.close for file in files]
        closing += [partial(tracker.close, error is not None) for tracker in self._trackers]
        failure: PipeError | None = None
        for close in closing:
            try:
                close()
            except PipeError as failed:
                failure = failure or failed
            except OSError as failed:
                failure = failure or WriteError(self._folder, failed)
        if failure is not None and error is None:
            raise failure

    def flush(self) -> None:
        """Bring the lines to the disk, and trackers' things to where they are kept: a checkpoint
        must not outlive what was before it."""
        for file in (self._metrics, self._evaluations, self._scores):
            os.fsync(file.fileno())
        self._flush_trackers()

    def write(
        self, step: int, values: Mapping[str, Any], board: Mapping[str, float] | None = None
    ) -> None:
        """Record the numbers of `step` (1, 2, …: steps done): `values` in `metrics.jsonl`, and
        those that are scalars in trackers, with the scalars of `board` under their own names."""
        _append(self._metrics, step, values)
        scalars = {f"train/{name}": value for name, value in values.items() if _is_scalar(value)}
        self._show(step, scalars | dict(board or {}))

    def write_evaluation(
        self, step: int, values: Mapping[str, Any], board: Mapping[str, float]
    ) -> None:
        """Record an evaluation after `step` in `evaluations.jsonl`, and `board` in trackers."""
        _append(self._evaluations, step, values)
        self._show(step, board)

    def write_scores(
        self, step: int, values: Mapping[str, Any], board: Mapping[str, float]
    ) -> None:
        """Record the scores of pictures after `step` in `scores.jsonl`, and `board` in trackers.

        Where a step has several lines the last one holds: it is of more pictures.
        """
        _append(self._scores, step, values)
        self._show(step, board)
        self._flush_trackers()

    def has_scores(self, step: int) -> bool:
        """Whether scores of the pictures after `step` are recorded."""
        return any(line["step"] == step for line in lines(self._folder / SCORES_NAME))

    def _show(self, step: int, scalars: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.scalars(step, scalars)

    def show_picture(self, step: int, name: str, path: Path, caption: str) -> None:
        """Show trackers the picture in the file `path`."""
        for tracker in self._trackers:
            tracker.picture(step, name, path, caption)
        self._flush_trackers()

    def _flush_trackers(self) -> None:
        """Also after what belongs to a checkpoint and comes after it: that is not shown again."""
        for tracker in self._trackers:
            tracker.flush()


def _append(file: TextIO, step: int, values: Mapping[str, Any]) -> None:
    line = json.dumps({"step": step, **values}, allow_nan=False)
    try:
        file.write(line + "\n")
        file.flush()
    except OSError as error:
        raise WriteError(Path(file.name), error) from error


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
