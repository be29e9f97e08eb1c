"""The flat buffer of gradients: what it sums, its norm, and clipping, against torch's own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from omnigen_pipe.config import TrainConfig
from omnigen_pipe.training.gradients import AdapterGradients


def _parameters(count: int = 3) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(2 + n, 3, generator=generator)) for n in range(count)]


def _backward(parameters: list[torch.nn.Parameter], scale: float) -> None:
    sum((scale * parameter.square()).sum() for parameter in parameters).backward()


def test_backward_passes_add_up_in_the_buffer() -> None:
    parameters = _parameters()
    gradients = AdapterGradients(parameters)
    _backward(parameters, 1.0)
    _backward(parameters, 0.5)
    expected = torch.cat([3 * parameter.detach().flatten() for parameter in parameters])
    torch.testing.assert_close(gradients.flat, expected)
    gradients.zero()
    assert all(not parameter.grad.any() for parameter in parameters)
    _backward(parameters, 1.0)
    torch.testing.assert_close(gradients.flat, expected / 1.5)


@pytest.mark.parametrize(
    ("method", "limit"), [("norm", 1.0), ("norm", 1e6), ("value", 0.25), ("norm", 0), ("value", 0)]
)
def test_clipping_equals_torchs_own(method: str, limit: float) -> None:
    config = TrainConfig(max_grad_norm=limit, grad_clip_method=method)
    ours, theirs = _parameters(), _parameters()
    gradients = AdapterGradients(ours)
    for parameters in (ours, theirs):
        _backward(parameters, 1.0)
    norm = gradients.norm()
    gradients.clip(norm, config)
    expected = torch.nn.utils.get_total_norm([p.grad for p in theirs])
    assert norm == pytest.approx(float(expected), rel=1e-6)
    if limit and method == "norm":
        torch.nn.utils.clip_grad_norm_(theirs, limit)
    elif limit:
        torch.nn.utils.clip_grad_value_(theirs, limit)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=0)


def test_clipping_by_norm_leaves_small_gradients_as_they_are() -> None:
    parameters = _parameters()
    gradients = AdapterGradients(parameters)
    _backward(parameters, 1e-3)
    before = gradients.flat.clone()
    gradients.clip(gradients.norm(), TrainConfig(max_grad_norm=1.0))
    assert torch.equal(gradients.flat, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_norm_of_what_is_not_finite_is_not_finite(value: float) -> None:
    gradients = AdapterGradients(_parameters())
    gradients.flat[5] = value
    assert not torch.tensor(gradients.norm()).isfinite()


def test_the_norm_of_large_finite_gradients_is_finite_and_exact() -> None:
    """Their squares overflow in float32: then the step would be taken for one that is infinite."""
    gradients = AdapterGradients([torch.nn.Parameter(torch.zeros(3))])
    values = np.array([3e30, -4e30, 1.0], dtype=np.float32)
    gradients.flat.copy_(torch.from_numpy(values))
    assert gradients.norm() == pytest.approx(np.linalg.norm(values.astype(np.float64)))
    gradients.flat[2] = math.inf
    assert gradients.norm() == math.inf
