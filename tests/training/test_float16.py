"""float16 with its gradient scaler, which torch has on the CPU, too."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_loop
import torch
from test_loop import _config, _losses, _train

from manifests.errors import PipeError
from omnigen_pipe.model.lokr import read_adapter
from omnigen_pipe.runs import checkpoints
from omnigen_pipe.runs.metrics import METRICS_NAME
from omnigen_pipe.training import loop

OPTIONS: dict[str, Any] = {
    "mixed_precision": "fp16",
    "use_ema": True,
    "gradient_accumulation_steps": 2,
}


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / METRICS_NAME).read_text().splitlines()]


def _state(checkpoint: checkpoints.Checkpoint | None) -> tuple[Any, Any, Any]:
    """A checkpoint's adapter, average and training state."""
    assert checkpoint is not None
    training = torch.load(checkpoint.folder / "training.pt", weights_only=True)
    return read_adapter(checkpoint.adapter)[0], read_adapter(checkpoint.ema)[0], training


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in one.items())


@pytest.fixture
def overflowing(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Steps in whose backward pass the scaled gradient overflows: float16 goes no further."""
    steps: set[int] = set()
    really = loop._forward_and_back

    def overflow(trainee: Any, step: Any, batch: Any, processes: Any) -> torch.Tensor:
        losses = really(trainee, step, batch, processes)
        if step.after.step in steps:
            trainee.gradients.flat[3] = math.inf
        return losses

    monkeypatch.setattr(loop, "_forward_and_back", overflow)
    return steps


def test_float16_trains_as_float32_does(small_omnigen: Path, tmp_path: Path) -> None:
    """To the precision of its numbers; the adapter and its average stay float32."""
    trainee, saved = _train(tmp_path / "half", _config(small_omnigen, **OPTIONS), 8)
    _train(
        tmp_path / "full", _config(small_omnigen, use_ema=True, gradient_accumulation_steps=2), 8
    )
    assert trainee.dtype == trainee.transformer.dtype == torch.float16
    assert trainee.scaler.is_enabled()
    assert all(p.dtype == torch.float32 for p in trainee.parameters())
    np.testing.assert_allclose(_losses(tmp_path / "half"), _losses(tmp_path / "full"), rtol=0.01)
    norms = [[line["grad_norm"] for line in _lines(tmp_path / run)] for run in ("half", "full")]
    np.testing.assert_allclose(*norms, rtol=0.05, err_msg="of the unscaled gradient")
    adapter, ema, _ = _state(saved)
    assert {t.dtype for t in [*adapter.values(), *ema.values()]} == {torch.float32}


def test_an_overflow_takes_no_step_and_halves_the_scale(
    small_omnigen: Path, tmp_path: Path, overflowing: set[int]
) -> None:
    overflowing.add(3)
    config = _config(small_omnigen, checkpoint_step_interval=1, **OPTIONS)
    _, last = _train(tmp_path / "run", config, 5)
    states = [
        _state(checkpoints.read(tmp_path / "run" / "checkpoints" / f"step-{step:08d}"))
        for step in range(1, 6)
    ]
    assert [line["grad_norm"] is None for line in _lines(tmp_path / "run")] == [
        step == 3 for step in range(1, 6)
    ]
    assert [line["step"] for line in _lines(tmp_path / "run")] == [1, 2, 3, 4, 5]
    assert last is not None
    assert last.position.step == 5
    for number, (before, after) in enumerate(pairwise(states), start=2):
        unchanged = [_same(before[0], after[0]), _same(before[1], after[1])]
        assert unchanged == [number == 3] * 2
    counts = [float(state[2]["optimizer"]["state"][0]["step"]) for state in states]
    assert counts == [1, 2, 2, 3, 4]
    scales = [state[2]["scaler"]["scale"] for state in states]
    assert [after / scales[0] for after in scales] == [1, 1, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("stop_at", [2, 3, 4])
def test_resuming_across_a_skipped_step_is_exact(
    small_omnigen: Path, tmp_path: Path, overflowing: set[int], stop_at: int
) -> None:
    """Stopped before it, at it or after it: the scale is part of the checkpoint."""
    overflowing.add(3)
    config = _config(small_omnigen, **OPTIONS)
    _, whole = _train(tmp_path / "whole", config, 7)
    _, first = _train(tmp_path / "parts", config, stop_at)
    assert first is not None
    _, second = _train(tmp_path / "parts", config, 7, resume=checkpoints.read(first.folder))
    assert _losses(tmp_path / "parts") == _losses(tmp_path / "whole")
    one, other = _state(whole), _state(second)
    assert _same(one[0], other[0])
    assert _same(one[1], other[1])
    assert one[2]["scaler"] == other[2]["scaler"]


def test_real_overflows_are_left_behind(
    small_omnigen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a scale that float16 cannot hold steps are skipped until it can, and then it trains."""
    load = test_loop._load

    def loading(*arguments: Any) -> Any:
        trainee = load(*arguments)
        trainee.scaler.update(2.0**30)
        return trainee

    monkeypatch.setattr(test_loop, "_load", loading)
    trainee, _ = _train(tmp_path / "run", _config(small_omnigen, **OPTIONS), 40)
    skipped = [line["grad_norm"] is None for line in _lines(tmp_path / "run")]
    assert all(skipped[:5])
    assert sum(skipped[-15:]) < 4, "the scale is near the edge at first"
    assert trainee.scaler.get_scale() == 2.0 ** (30 - sum(skipped))
    assert all(p.isfinite().all() for p in trainee.parameters())


def test_a_scale_that_cannot_go_lower_ends_the_training(
    small_omnigen: Path, tmp_path: Path, overflowing: set[int]
) -> None:
    """Halved seventeen times from 2^16 it is below 1: the gradient itself is at fault."""
    overflowing.update(range(3, 100))
    config = _config(small_omnigen, checkpoint_step_interval=2, **OPTIONS)
    with pytest.raises(
        PipeError, match=r"gradient of step \d+ is inf.*checkpoint is of step 18.*mixed_precision"
    ):
        _train(tmp_path / "run", config, 100)
    lines = _lines(tmp_path / "run")
    assert [line["grad_norm"] is None for line in lines] == [False] * 2 + [True] * 16
    *_, training = _state(checkpoints.latest(tmp_path / "run" / "checkpoints")[0])
    assert training["scaler"]["scale"] == 1.0
