"""What training measures, step by step: `metrics.jsonl`, `evaluations.jsonl` and TensorBoard."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from manifests.errors import WriteError
from manifests.publish import publishing

METRICS_NAME = "metrics.jsonl"
EVALUATIONS_NAME = "evaluations.jsonl"


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
    """Appends a line per step, and one per evaluation; scalars go to TensorBoard if asked."""

    def __init__(self, folder: Path, steps_done: int, tensorboard: bool) -> None:
        self._folder = folder
        self._metrics = (folder / METRICS_NAME).open("a", encoding="utf-8")
        self._evaluations = (folder / EVALUATIONS_NAME).open("a", encoding="utf-8")
        self._board: Any = None
        self._thread_hook = threading.excepthook
        if tensorboard:
            threading.excepthook = self._thread_failed
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(
                # A beginning takes back the evaluation before the first step, too.
                log_dir=str(folder / "tensorboard"),
                purge_step=steps_done + 1 if steps_done else 0,
            )

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
        threading.excepthook = self._thread_hook
        files = [self._metrics, self._evaluations, *([self._board] if self._board else [])]
        for file in files:
            try:
                file.close()
            except OSError as failure:
                if error is None:
                    raise WriteError(self._folder, failure) from failure

    def _thread_failed(self, args: threading.ExceptHookArgs) -> None:
        """Say nothing of a disk that is full for TensorBoard's thread: the next write raises it."""
        if not isinstance(args.exc_value, OSError):
            self._thread_hook(args)

    def flush(self) -> None:
        """Bring the lines to the disk: a checkpoint must not outlive the lines before it."""
        for file in (self._metrics, self._evaluations):
            os.fsync(file.fileno())

    def write(
        self, step: int, values: Mapping[str, Any], board: Mapping[str, float] | None = None
    ) -> None:
        """Record the numbers of `step` (1, 2, …: steps done): `values` in `metrics.jsonl`, and
        those that are scalars on TensorBoard, with the scalars of `board` under their own names."""
        _append(self._metrics, step, values)
        scalars = {f"train/{name}": value for name, value in values.items() if _is_scalar(value)}
        self._show(step, scalars | dict(board or {}))

    def write_evaluation(
        self, step: int, values: Mapping[str, Any], board: Mapping[str, float]
    ) -> None:
        """Record an evaluation after `step` in `evaluations.jsonl`, and `board` on TensorBoard."""
        _append(self._evaluations, step, values)
        self._show(step, board)

    def _show(self, step: int, scalars: Mapping[str, float]) -> None:
        if self._board is None:
            return
        try:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)
        except OSError as error:
            raise WriteError(self._folder / "tensorboard", error) from error


def _append(file: TextIO, step: int, values: Mapping[str, Any]) -> None:
    line = json.dumps({"step": step, **values}, allow_nan=False)
    try:
        file.write(line + "\n")
        file.flush()
    except OSError as error:
        raise WriteError(Path(file.name), error) from error


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
