"""OmniGen's objective: rectified flow with a logit-normal time.

Source: `OmniGen/train_helper/loss.py` of the authors (VectorSpaceLab/OmniGen). t = 1 is the
clean image, there is no schedule shift, and everything here is float32: bfloat16 would round
t and x_t.
"""

from __future__ import annotations

import torch


def times(normal: torch.Tensor) -> torch.Tensor:
    """Times in (0, 1) from standard normal draws: t = sigmoid(n)."""
    return torch.sigmoid(normal.float())


def clean_latents(
    moments: torch.Tensor, posterior_noise: torch.Tensor | None, scaling_factor: float
) -> torch.Tensor:
    """Scaled latents x1 `[B, 4, h, w]` from `moments` `[B, 8, h, w]`: mean, then log-variance.

    With `posterior_noise` `[B, 4, h, w]` a draw of the posterior, without it its mean.
    """
    mean, log_variance = moments.float().chunk(2, dim=1)
    if posterior_noise is not None:
        mean = mean + torch.exp(0.5 * log_variance) * posterior_noise
    return mean * scaling_factor


def interpolate(x1: torch.Tensor, x0: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """x_t = t*x1 + (1 - t)*x0 for clean x1, noise x0 `[B, …]` and times t `[B]`."""
    t = t.reshape(-1, *(1,) * (x1.ndim - 1))
    return t * x1 + (1 - t) * x0


def target(x1: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
    """The velocity that the model learns: x1 - x0."""
    return x1 - x0


def sample_losses(
    velocity: torch.Tensor, wanted: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The loss of each sample, `[B]`, float32: the mean squared error over its elements.

    With `mask` m `[B, 1, h, w]`, of numbers from 0 to 1 that are not all 0 in a row, the mean is
    weighted: sum(m e^2) / (C sum(m)) over the C channels. A row of ones has the plain mean, to the
    last bit, so that a sample without a mask is not changed by its neighbours'.
    """
    squares = (velocity.float() - wanted.float()).square()
    plain = squares.flatten(1).mean(dim=1)
    if mask is None:
        return plain
    channels = squares.shape[1]
    weighted = (mask * squares).flatten(1).sum(dim=1) / (channels * mask.flatten(1).sum(dim=1))
    return torch.where((mask == 1).flatten(1).all(dim=1), plain, weighted)
