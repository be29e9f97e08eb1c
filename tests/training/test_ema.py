"""The moving average: its decay, its arithmetic in float32, and that a look leaves no trace."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from omnigen_pipe.training.ema import Ema, decay_at


def test_the_decay_starts_low_and_reaches_its_limit() -> None:
    assert [decay_at(n, 0.995) for n in (1, 2, 10)] == [2 / 11, 3 / 12, 11 / 20]
    assert decay_at(1790, 0.995) == pytest.approx(1791 / 1800)
    assert decay_at(1791, 0.995) == decay_at(10**6, 0.995) == 0.995


def test_the_average_is_the_recurrence_written_out() -> None:
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(3, 4, generator=generator))
    ema = Ema({"w": parameter}, 0.9)
    expected = parameter.detach().double().numpy().copy()
    for step in range(1, 200):
        with torch.no_grad():
            parameter.add_(0.01 * torch.randn(3, 4, generator=generator))
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * parameter.detach().double().numpy()
    assert ema.weights["w"].dtype == torch.float32
    np.testing.assert_allclose(ema.weights["w"].numpy(), expected, rtol=1e-5)


def test_small_changes_of_bfloat16_weights_are_not_lost() -> None:
    """In bfloat16 the average would stand still: the step is below half of its last digit."""
    parameter = torch.nn.Parameter(torch.full((4,), 1.0, dtype=torch.bfloat16))
    ema = Ema({"w": parameter}, 0.999)
    with torch.no_grad():
        parameter.fill_(1.0078125)  # the next number in bfloat16
    for step in range(10_000, 10_100):
        ema.update(step)
    assert ema.weights["w"][0].item() == pytest.approx(1 + 0.0078125 * (1 - 0.999**100), rel=1e-5)


def test_parameters_come_back_exactly_after_a_look_at_the_average() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1 / 3, 1e-30, -7.0]))
    ema = Ema({"w": parameter}, 0.9)
    ema.load({"w": torch.tensor([1.0, 2.0, 3.0])})
    before = parameter.detach().clone()
    with ema.in_place():
        assert parameter.tolist() == [1.0, 2.0, 3.0]
    assert torch.equal(parameter.detach(), before)
