"""Scheduled sampling: x_t as the model itself would have come to it.

When a picture is generated, the model sees what its own earlier steps made, and in training it
sees interpolations that no step made. For some rows of a batch, x_t is therefore walked to by a
few Euler steps of the model from an earlier time; the target then leads from where the walk
ended to the clean latent. Knows nothing of the model: a function that predicts is passed in.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from omnigen_pipe.model import flow

#: The velocity of the rows with these numbers at x `[n, …]` and times t `[n]`: `[n, …]`.
Predict = Callable[[torch.Tensor, torch.Tensor, list[int]], torch.Tensor]


def rollout(
    predict: Predict,
    x1: torch.Tensor,
    x0: torch.Tensor,
    t: torch.Tensor,
    starts: torch.Tensor,
    steps: torch.Tensor,
) -> torch.Tensor:
    """x̂_t `[B, …]`, float32, without gradient, for clean x1, noise x0 `[B, …]`, times t `[B]`.

    A row with `steps` n > 0 `[B]` starts at t0 = `starts` `[B]`, 0 <= t0 < t, on the
    interpolated x_t0 and takes n equal Euler steps x ← x + Δ·v(x, t0 + iΔ), Δ = (t - t0)/n. A
    row with 0 keeps the interpolated x_t, to the last bit. All rows that still walk go through
    `predict` together; where none does, it is not called.
    """
    with torch.no_grad():
        x_t = flow.interpolate(x1, x0, t)
        left = steps.tolist()
        walking = [row for row, number in enumerate(left) if number > 0]
        if not walking:
            return x_t
        sizes = (t - starts) / steps.to(t).clamp(min=1)
        x_t[walking] = flow.interpolate(x1[walking], x0[walking], starts[walking])
        for step in range(max(left)):
            rows = [row for row in walking if left[row] > step]
            size = sizes[rows]
            velocity = predict(x_t[rows], starts[rows] + step * size, rows).float()
            x_t[rows] += size.reshape(-1, *(1,) * (x_t.ndim - 1)) * velocity
        return x_t


def rollout_target(x1: torch.Tensor, x_hat: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The velocity that leads from x̂_t at time t to x1 at time 1: (x1 - x̂_t) / (1 - t).

    `x1`, `x_hat` `[B, …]`, t `[B]` below 1: near 1 the walk's error is divided by almost
    nothing, which is why rolled-out rows keep t at or below 0.9. For an interpolated x_t it is
    x1 - x0, to rounding.
    """
    return (x1 - x_hat) / (1 - t).reshape(-1, *(1,) * (x1.ndim - 1))
