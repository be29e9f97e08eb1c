"""Learning rate and clipping as pure functions."""

from __future__ import annotations

import pytest
import torch

from omnigen_pipe.config import TrainConfig
from omnigen_pipe.training.optimizers import clip_gradients, learning_rate


def test_warm_up_rises_from_the_first_step_and_then_stays() -> None:
    config = TrainConfig(learning_rate=1e-3, lr_warmup_steps=4)
    rates = [learning_rate(step, config) for step in range(6)]
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])
    assert learning_rate(0, TrainConfig(learning_rate=1e-3, lr_warmup_steps=0)) == 1e-3


def _parameters() -> list[torch.nn.Parameter]:
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    parameters[0].grad = torch.tensor([3.0, 0.0])
    parameters[1].grad = torch.tensor([0.0, -4.0])
    return parameters


def test_clipping_by_norm_scales_all_and_returns_the_norm_before() -> None:
    parameters = _parameters()
    config = TrainConfig(max_grad_norm=1.0, grad_clip_method="norm")
    assert clip_gradients(parameters, config) == pytest.approx(5.0)
    assert torch.stack([p.grad for p in parameters]).norm().item() == pytest.approx(1.0, rel=1e-4)


def test_clipping_by_value_clamps_each_element() -> None:
    parameters = _parameters()
    config = TrainConfig(max_grad_norm=0.01, grad_clip_method="value")
    assert clip_gradients(parameters, config) == pytest.approx(5.0)
    assert parameters[0].grad.tolist() == pytest.approx([0.01, 0.0])
    assert parameters[1].grad.tolist() == pytest.approx([0.0, -0.01])


def test_zero_leaves_gradients_alone() -> None:
    parameters = _parameters()
    assert clip_gradients(parameters, TrainConfig(max_grad_norm=0)) == pytest.approx(5.0)
    assert parameters[0].grad.tolist() == [3.0, 0.0]
