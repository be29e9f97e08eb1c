"""What training measures, step by step: `metrics.jsonl` and TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from manifests.publish import publish, staged

METRICS_NAME = "metrics.jsonl"


def truncate(path: Path, last_step: int, staging: Path) -> None:
    """Drop the lines after `last_step`, which a resumed run computes again, and torn ones."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # the last line of a killed process
        if entry["step"] <= last_step:
            kept.append(line + "\n")
    unfinished = staged(staging, path)
    unfinished.write_text("".join(kept), encoding="utf-8")
    publish(unfinished, path)


class MetricsWriter:
    """Appends one line per step, and the same numbers to TensorBoard if asked."""

    def __init__(self, folder: Path, steps_done: int, tensorboard: bool) -> None:
        self._file = (folder / METRICS_NAME).open("a", encoding="utf-8")
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(
                log_dir=str(folder / "tensorboard"), purge_step=steps_done + 1
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
        """Flush and close both."""
        self._file.close()
        if self._board is not None:
            self._board.close()

    def write(self, step: int, values: dict[str, float | int]) -> None:
        """Record the numbers of `step` (1, 2, …: steps done)."""
        self._file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"train/{name}", value, step)
