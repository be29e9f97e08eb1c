"""The rollout, with predictors whose paths are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from omnigen_pipe.model import flow
from omnigen_pipe.training.rollout import Predict, rollout, rollout_target

B = 5
T = torch.tensor([0.3, 0.5, 0.7, 0.85, 0.9])
STARTS = torch.tensor([0.1, 0.0, 0.45, 0.8, 0.2])
STEPS = torch.tensor([1, 4, 0, 2, 3])


def _pair(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, 4, 6, 8, generator=generator), torch.randn(
        B, 4, 6, 8, generator=generator
    )


def _true(x1: torch.Tensor, x0: torch.Tensor) -> Predict:
    return lambda x, t, rows: (x1 - x0)[rows]


def _bent(x: torch.Tensor, t: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """A velocity that depends on place and time, as a model's does."""
    return torch.sin(x) - t[:, None, None, None] * x + 0.1


def test_the_true_velocity_leads_to_the_interpolated_x_and_the_true_target() -> None:
    x1, x0 = _pair()
    x_hat = rollout(_true(x1, x0), x1, x0, T, STARTS, STEPS)
    torch.testing.assert_close(x_hat, flow.interpolate(x1, x0, T))
    torch.testing.assert_close(
        rollout_target(x1, x_hat, T), flow.target(x1, x0), rtol=1e-4, atol=1e-5
    )


def test_another_velocity_leads_elsewhere_and_only_its_rows() -> None:
    x1, x0 = _pair()
    x_hat = rollout(_bent, x1, x0, T, STARTS, STEPS)
    distance = (x_hat - flow.interpolate(x1, x0, T)).flatten(1).norm(dim=1)
    assert (distance[STEPS > 0] > 0.1).all()
    assert torch.equal(x_hat[2], flow.interpolate(x1, x0, T)[2])


@pytest.mark.parametrize("pieces", [1, 7])
def test_the_target_leads_from_where_the_walk_ended_to_the_clean_latent(pieces: int) -> None:
    x1, x0 = _pair()
    x = rollout(_bent, x1, x0, T, STARTS, STEPS)
    target = rollout_target(x1, x, T)
    for _ in range(pieces):
        x = x + target * ((1 - T) / pieces)[:, None, None, None]
    torch.testing.assert_close(x, x1, rtol=1e-5, atol=1e-5)


def test_the_walk_is_eulers_method_written_out() -> None:
    """In NumPy and double, row by row."""
    x1, x0 = _pair()
    x_hat = rollout(_bent, x1, x0, T, STARTS, STEPS)
    for row in range(B):
        t0, t, n = STARTS[row].item(), T[row].item(), int(STEPS[row])
        start = t0 if n else t
        x = start * x1[row].double().numpy() + (1 - start) * x0[row].double().numpy()
        for step in range(n):
            size = (t - t0) / n
            x = x + size * (np.sin(x) - (t0 + step * size) * x + 0.1)
        np.testing.assert_allclose(x_hat[row], x, rtol=1e-4, atol=1e-5)


def test_more_steps_come_nearer_to_the_path() -> None:
    """dx/dt = -x has the solution x(t0)·exp(-(t - t0)); Euler's error falls with 1/n."""
    x1, x0 = _pair()
    starts, t = torch.full((B,), 0.1), torch.full((B,), 0.9)
    path = flow.interpolate(x1, x0, starts) * np.exp(-0.8)
    errors = [
        (rollout(lambda x, t, rows: -x, x1, x0, t, starts, torch.full((B,), n)) - path).norm()
        for n in (10, 20, 40)
    ]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.1)


def test_a_row_does_not_depend_on_which_others_walk() -> None:
    x1, x0 = _pair()
    together = rollout(_bent, x1, x0, T, STARTS, STEPS)
    for row in range(B):
        alone = torch.where(torch.arange(B) == row, STEPS, 0)
        torch.testing.assert_close(rollout(_bent, x1, x0, T, STARTS, alone)[row], together[row])


def test_no_row_chosen_costs_no_call_and_changes_nothing() -> None:
    def never(x: torch.Tensor, t: torch.Tensor, rows: list[int]) -> torch.Tensor:
        raise AssertionError("the model was called")

    x1, x0 = _pair()
    x_hat = rollout(never, x1, x0, T, STARTS, torch.zeros(B, dtype=torch.int64))
    assert torch.equal(x_hat, flow.interpolate(x1, x0, T))


def test_rows_that_are_done_drop_out_and_the_rest_go_together() -> None:
    calls: list[list[int]] = []
    times: list[torch.Tensor] = []

    def watched(x: torch.Tensor, t: torch.Tensor, rows: list[int]) -> torch.Tensor:
        assert x.shape == (len(rows), 4, 6, 8)
        calls.append(rows)
        times.append(t)
        return _bent(x, t, rows)

    x1, x0 = _pair()
    rollout(watched, x1, x0, T, STARTS, STEPS)
    assert calls == [[0, 1, 3, 4], [1, 3, 4], [1, 4], [1]]
    torch.testing.assert_close(times[0], STARTS[[0, 1, 3, 4]])
    torch.testing.assert_close(times[-1], torch.tensor([0.375]))


def test_a_half_precision_model_is_walked_in_float32_without_gradient() -> None:
    x1, x0 = _pair()
    weight = torch.ones((), requires_grad=True)
    x_hat = rollout(
        lambda x, t, rows: (weight * (x1 - x0)[rows]).bfloat16(), x1, x0, T, STARTS, STEPS
    )
    assert x_hat.dtype == torch.float32
    assert not x_hat.requires_grad
    torch.testing.assert_close(x_hat, flow.interpolate(x1, x0, T), rtol=0.02, atol=0.02)


def test_what_was_passed_in_stays_as_it_was() -> None:
    x1, x0 = _pair()
    rollout(_bent, x1, x0, T, STARTS, STEPS)
    assert torch.equal(x1, _pair()[0])
    assert torch.equal(x0, _pair()[1])
