"""The objective wired to the model: rolled-out rows, regularisation rows, and the rest.

References are written out here, on a second model, which has no adapter where the base model is
meant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_loop import _config, _load, _plan, _read

from omnigen_pipe.model.transformer import load_transformer, predict_velocity
from omnigen_pipe.progress import Progress
from omnigen_pipe.runs.order import MicroBatch
from omnigen_pipe.stop import StopRequest
from omnigen_pipe.training import objective
from omnigen_pipe.training.batches import Batch, Rollout
from omnigen_pipe.training.loop import Course, train
from omnigen_pipe.training.objective import passes_without_gradients, pose, sample_losses
from omnigen_pipe.training.trainee import Trainee

#: Five samples of one bucket: two are rolled out, one is regularisation data.
STEPS = torch.tensor([0, 3, 0, 1, 0])
PARTS = torch.tensor([1.0, 0.25, 1.0, 0.6, 1.0])
REGULARISED = torch.tensor([False, False, True, False, False])
STRENGTH = 0.7


def _batch() -> Batch:
    batch = _read(MicroBatch(np.arange(5), np.zeros(5, dtype=np.int64)), 0)
    batch = replace(batch, t=batch.t.clamp(max=0.9), regularisation=REGULARISED)
    return replace(batch, rollout=Rollout(batch.t * PARTS, STEPS))


@pytest.fixture
def trainee(small_omnigen: Path, tmp_path: Path) -> Trainee:
    """An adapter that has learned something, at a strength that is not 1."""
    found = _load(_config(small_omnigen), tmp_path)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    found.network.set_multiplier(STRENGTH)
    return found


@pytest.fixture
def base(small_omnigen: Path) -> Any:
    """The base model, to which nothing was ever attached."""
    return load_transformer(small_omnigen / "transformer", torch.float32, torch.device("cpu"))


def _interpolated(batch: Batch) -> torch.Tensor:
    t = batch.t[:, None, None, None]
    return t * batch.x1 + (1 - t) * batch.x0


def _walked(transformer: Any, batch: Batch, row: int) -> torch.Tensor:
    """Euler's method for one row, written out: x from t·part in equal steps to t."""
    t, steps = float(batch.t[row]), int(STEPS[row])
    time = t * float(PARTS[row])
    size = (t - time) / steps
    x = time * batch.x1[row] + (1 - time) * batch.x0[row]
    for _ in range(steps):
        with torch.no_grad():
            v = predict_velocity(transformer, x[None], torch.tensor([time]), [batch.prompts[row]])[
                0
            ]
        x, time = x + size * v, time + size
    return x


def test_rolled_out_rows_come_from_the_models_own_steps(trainee: Trainee) -> None:
    """With the adapter at its strength; their target leads from there to x1, and every other
    row is the interpolation, to the bit."""
    batch = _batch()
    problem = pose(trainee, batch)
    straight = _interpolated(batch)
    for row in range(5):
        if STEPS[row] == 0:
            assert torch.equal(problem.x_t[row], straight[row])
            if not REGULARISED[row]:
                assert torch.equal(problem.wanted[row], batch.x1[row] - batch.x0[row])
            continue
        x = _walked(trainee.transformer, batch, row)
        torch.testing.assert_close(problem.x_t[row], x, rtol=1e-4, atol=1e-5)
        assert (x - straight[row]).norm() > 0.05 * straight[row].norm()
        wanted = (batch.x1[row] - x) / (1 - float(batch.t[row]))
        torch.testing.assert_close(problem.wanted[row], wanted, rtol=1e-3, atol=1e-3)
        ended = problem.x_t[row] + (1 - batch.t[row]) * problem.wanted[row]
        torch.testing.assert_close(ended, batch.x1[row], rtol=1e-4, atol=1e-5)
    assert not problem.x_t.requires_grad
    assert not problem.wanted.requires_grad


def test_the_walk_is_the_adapted_models_not_the_base_models(trainee: Trainee, base: Any) -> None:
    batch = _batch()
    found = pose(trainee, batch).x_t[1]
    assert (found - _walked(base, batch, 1)).norm() > 1e-2
    with trainee.base_only():
        torch.testing.assert_close(
            pose(trainee, batch).x_t[1], _walked(base, batch, 1), rtol=1e-4, atol=1e-5
        )


def test_regularisation_rows_have_the_base_models_prediction_as_target(
    trainee: Trainee, base: Any
) -> None:
    """Also beside rolled-out rows, and with the strength as it was before and after."""
    batch = _batch()
    wanted = pose(trainee, batch).wanted[2]
    with torch.no_grad():
        x_t = _interpolated(batch)[2:3]
        expected = predict_velocity(base, x_t, batch.t[2:3], [batch.prompts[2]])[0]
    torch.testing.assert_close(wanted, expected)
    assert {lora.multiplier for lora in trainee.network.loras} == {STRENGTH}


def test_gradients_of_regularisation_rows_are_those_of_an_mse_to_the_base_model(
    trainee: Trainee, base: Any
) -> None:
    batch = replace(_batch(), rollout=None, regularisation=torch.ones(5, dtype=torch.bool))
    trainee.gradients.zero()
    sample_losses(trainee, pose(trainee, batch), batch).sum().backward()
    found = trainee.gradients.flat.clone()

    trainee.gradients.zero()
    x_t = _interpolated(batch)
    with torch.no_grad():
        target = predict_velocity(base, x_t, batch.t, batch.prompts)
    velocity = predict_velocity(trainee.transformer, x_t, batch.t, batch.prompts)
    losses = [torch.nn.functional.mse_loss(velocity[row], target[row]) for row in range(5)]
    torch.stack(losses).sum().backward()
    assert found.norm() > 0
    assert (found - trainee.gradients.flat).norm() < 1e-5 * found.norm()


@pytest.mark.parametrize("during", ["the base model's prediction", "the rollout", "the forward"])
def test_the_strength_is_what_it_was_after_an_error_anywhere(
    trainee: Trainee, monkeypatch: pytest.MonkeyPatch, during: str
) -> None:
    """A process that goes on after it, as one in an interpreter may, has the same adapter."""
    batch = _batch()
    allowed = {"the rollout": 0, "the base model's prediction": 3, "the forward": 4}[during]
    calls = 0
    really = objective.predict_velocity

    def failing(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > allowed:
            strengths = {lora.multiplier for lora in trainee.network.loras}
            assert strengths == {0.0 if during.startswith("the base") else STRENGTH}
            raise torch.OutOfMemoryError("CUDA out of memory")
        return really(*arguments)

    monkeypatch.setattr(objective, "predict_velocity", failing)
    with pytest.raises(torch.OutOfMemoryError):
        sample_losses(trainee, pose(trainee, batch), batch)
    assert calls == allowed + 1
    assert {lora.multiplier for lora in trainee.network.loras} == {STRENGTH}


def _calls(trainee: Trainee, batch: Batch) -> int:
    """How often the model is run for a batch."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    handle = trainee.transformer.register_forward_hook(count)
    sample_losses(trainee, pose(trainee, batch), batch)
    handle.remove()
    return calls


def test_the_model_runs_once_and_what_is_off_costs_nothing(trainee: Trainee) -> None:
    """One pass, one more where a row is regularisation data, and as many as the longest rollout
    has steps."""
    batch = _batch()
    plain = torch.zeros(5, dtype=torch.bool)
    for rollout, walked in ((None, 0), (batch.rollout, 3)):
        for regularisation, more in ((plain, 0), (REGULARISED, 1)):
            asked = replace(batch, rollout=rollout, regularisation=regularisation)
            assert _calls(trainee, asked) == 1 + walked + more
            assert passes_without_gradients(asked) == walked + more


def test_a_training_with_the_rollout_off_runs_the_model_once_per_micro_batch(
    small_omnigen: Path, tmp_path: Path
) -> None:
    config = _config(small_omnigen)
    trainee = _load(config, tmp_path)
    read: list[MicroBatch] = []
    calls = 0

    def reading(micro: MicroBatch, epoch: int, step: int) -> Batch:
        read.append(micro)
        return _read(micro, epoch)

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    trainee.transformer.register_forward_hook(count)
    save: Callable[[object], None] = lambda position: None  # noqa: E731
    course = Course(reading, save, (1.0,) * 4, Progress(quiet=True), StopRequest())
    train(trainee, _plan(config, 4), config.train, course)
    assert calls == len(read) == 4
