"""The adapter's gradients: one flat float32 buffer that every parameter's gradient is a view of.

So adding up micro-batches, adding up processes, the norm, clipping and the test for what is not
finite are one operation each, and a process without a micro-batch contributes zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from omnigen_pipe.config import TrainConfig


class AdapterGradients:
    """Owns `grad` of every parameter of `parameters`, which must not be replaced."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        count = sum(parameter.numel() for parameter in parameters)
        device = parameters[0].device
        #: All gradients, `[count]`, in the parameters' order.
        self.flat = torch.zeros(count, dtype=torch.float32, device=device)
        start = 0
        for parameter in parameters:
            end = start + parameter.numel()
            parameter.grad = self.flat[start:end].view_as(parameter)
            start = end

    def zero(self) -> None:
        """Begin a new global batch."""
        self.flat.zero_()

    def norm(self) -> float:
        """The global norm; not finite exactly where any gradient is not.

        In float64: in float32 the squares of large finite gradients overflow.
        """
        return float(torch.linalg.vector_norm(self.flat, dtype=torch.float64))

    def clip(self, norm: float, config: TrainConfig) -> None:
        """Clip in place as configured, given the global `norm`.

        `value` clamps each element to ±`max_grad_norm`; `norm` scales all so that the global norm
        is at most that; 0 is off.
        """
        limit = config.max_grad_norm
        if limit == 0:
            return
        if config.grad_clip_method == "value":
            self.flat.clamp_(-limit, limit)
        elif norm > limit:
            self.flat.mul_(limit / norm)
