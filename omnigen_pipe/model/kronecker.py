"""Kronecker products applied to activations: what a LoKr adds to a linear layer's output.

Never written out as a matrix: `x @ kron(w1, w2).T` is a mixture of x's groups by the small factor
w1, and the same linear layer w2 on every group. The two commute, so the mixture is formed where
there is least of it: in a low-rank w2's middle, else before or after w2, whichever is less work.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def kronecker_linear(
    x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor | tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """`x @ kron(w1, w2).T` for x `[..., a * c]`, w1 `[b, a]`, w2 `[d, c]`; `[..., b * d]`.

    w2 may come as two factors `[d, r]` and `[r, c]`, which are applied in turn.
    """
    a = w1.shape[1]
    groups = x.reshape(*x.shape[:-1], a, x.shape[-1] // a)  # [..., a, c]
    if isinstance(w2, tuple):
        up, down = w2
        return F.linear(_mixed(F.linear(groups, down), w1), up).flatten(-2)
    if _work(w1.shape[0], w1, w2, w2.shape[1]) < _work(w1.shape[1], w1, w2, w2.shape[0]):
        return F.linear(_mixed(groups, w1), w2).flatten(-2)
    return _mixed(F.linear(groups, w2), w1).flatten(-2)


def _work(groups: int, w1: torch.Tensor, w2: torch.Tensor, mixed: int) -> int:
    """Multiplications a row, where w2 is applied to so many groups, and groups of `mixed` numbers
    are mixed."""
    return groups * w2.numel() + w1.numel() * mixed


def _mixed(groups: torch.Tensor, w1: torch.Tensor) -> torch.Tensor:
    """Sums of groups `[..., a, n]` with the weights w1 `[b, a]`: `[..., b, n]`."""
    return torch.einsum("ba,...an->...bn", w1, groups)
