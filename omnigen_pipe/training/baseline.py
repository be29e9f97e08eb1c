"""The linear baseline: the loss of the best predictor that knows only mean and variance.

A velocity loss says little by itself: how much of the target can be guessed at all depends on
t and on how large the latents are. The baseline says what the best affine predictor per channel
would lose at the same t on the same latents, from their first two moments alone. It knows
neither prompt nor neighbouring elements, so a model that sees both should lose less.

Gives up more than two moments: a baseline that knew of pictures would be a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

#: Measuring reads at most so many latents; see `chosen` for what that costs in precision.
MEASURED_LATENTS = 4096


#: What is measured: moments, how often they are shown, and what each element counts, if masked.
Measured = (
    tuple[NDArray[np.floating], float]
    | tuple[NDArray[np.floating], float, NDArray[np.floating] | None]
)


def channel_variance(
    latents: Iterable[Measured], scaling_factor: float, posterior: bool
) -> list[float]:
    """s² per channel of the scaled latents that are trained on.

    `latents`: moments `[2·C, h, w]` (mean, then log-variance, both unscaled; sizes may differ)
    and how often each is shown in an epoch, that is, repeats + 1; and its loss mask `[1, h, w]`,
    by which its elements count as they do in its loss. With `posterior`, training
    draws from the posterior, and by the law of total variance

        s² = scaling_factor² · (Var(mean) + E[exp(log-variance)]);

    without it training takes the posterior's mean, and the second term is absent. The loss
    averages over each sample's elements first, so a large picture counts no more than a small
    one here, too. One pass over the latents, in float64; the merging of means and squared
    deviations is that of Chan, Golub and LeVeque (1979), which cancels nothing.

    Raises `ValueError` where there are no latents.
    """
    total = 0.0
    mean = np.zeros(0)
    squares = np.zeros(0)
    for moments, weight, *masks in latents:
        means, log_variances = np.split(np.asarray(moments, dtype=np.float64), 2)
        own_mean, own_variance = _own_moments(means, masks[0] if masks else None)
        if posterior:
            own_variance += _own_moments(np.exp(log_variances), masks[0] if masks else None)[0]
        if total == 0:
            mean, squares = np.zeros_like(own_mean), np.zeros_like(own_mean)
        before, total = total, total + weight
        shift = own_mean - mean
        mean = mean + shift * (weight / total)
        squares = squares + weight * (own_variance + shift**2 * (before / total))
    if total == 0:
        raise ValueError("there are no latents to measure")
    variance: NDArray[np.float64] = scaling_factor**2 * squares / total
    return [float(s2) for s2 in variance]


def _own_moments(
    values: NDArray[np.float64], mask: NDArray[np.floating] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and variance of each channel of `values` `[C, h, w]`, weighted by `mask` `[1, h, w]`."""
    if mask is None:
        return values.mean(axis=(1, 2)), values.var(axis=(1, 2))
    weights = np.asarray(mask, np.float64) / np.sum(mask, dtype=np.float64)
    mean = (weights * values).sum(axis=(1, 2))
    return mean, (weights * (values - mean[:, None, None]) ** 2).sum(axis=(1, 2))


def chosen(count: int, limit: int = MEASURED_LATENTS) -> NDArray[np.int64]:
    """At most `limit` indexes out of 0 … `count` - 1, evenly spaced, ascending.

    Frozen samples lie in the order of their keys, which are hashes, so evenly spaced ones are
    a random subset without replacement, and the same one at every start. With n of N samples
    the standard error of s² is

        sd(q) / √n · √(1 - n/N),   q = a sample's own variance + its mean's squared deviation,

    which for q that scatter as much as they are large (sd(q) = s²) is at most 1.6 % of s² at
    n = 4096. `linear_error` is less sensitive than that: its relative error is s²'s times
    (1-t)² / (t²s² + (1-t)²), which is at most 1. Where `repeats` differ, n is the effective
    number (Σw)²/Σw².
    """
    size = min(count, limit)
    return np.arange(size, dtype=np.int64) * count // max(size, 1)


def linear_error(t: torch.Tensor, variance: Sequence[float]) -> torch.Tensor:
    """The loss of the best affine predictor at times `t` `[B]`: `[B]`, float64, on `t`'s device.

    Per channel, let x1 have variance s² and any mean, and x0 be standard normal, independent
    of it. x_t = t·x1 + (1-t)·x0 is seen, u = x1 - x0 is wanted. With D = Var(x_t),

        D = t²s² + (1-t)²,   Cov(u, x_t) = t·s² - (1-t),   Var(u) = s² + 1,

    and the best affine predictor E[u] + Cov/D·(x_t - E[x_t]) has the mean squared error

        Var(u) - Cov²/D = ((s² + 1)(t²s² + (1-t)²) - (t·s² - (1-t))²) / D
                        = s²·((1-t)² + 2t(1-t) + t²) / D = s² / (t²s² + (1-t)²),

    whatever the distributions are. It is s² at t = 0 and 1 at t = 1 (also for s² = 0, where
    the noise alone is left to guess). The loss is the mean over the channels.
    """
    times = t.detach().double()[:, None]
    s2 = torch.tensor(variance, dtype=torch.float64, device=t.device)
    seen = times**2 * s2 + (1 - times) ** 2
    return torch.where(seen > 0, s2 / seen, 1.0).mean(dim=1)


def explained(loss: float, baseline: float) -> float:
    """The share of the linear baseline's error that the model does without: 1 - loss/baseline.

    1 is perfect, 0 is no better than the linear predictor, below 0 is worse.
    """
    return 1 - loss / baseline
