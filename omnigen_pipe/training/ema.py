"""The exponential moving average of the adapter's weights, in float32.

In bfloat16 it would stand still: at a decay of 0.995 an update rounds away.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch


def decay_at(step: int, limit: float) -> float:
    """The decay of optimizer step `step` (1, 2, …): min(`limit`, (1 + n) / (10 + n)) for n = step.

    So a short run's average forgets the untrained adapter.
    """
    return min(limit, (1 + step) / (10 + step))


class Ema:
    """The average of named parameters, held beside them on their device."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], decay: float) -> None:
        self._parameters = dict(parameters)
        self._decay = decay
        #: The averaged weights by the parameters' names, float32.
        self.weights = {
            name: parameter.detach().float().clone() for name, parameter in parameters.items()
        }

    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step` (1, 2, …)."""
        weight = 1 - decay_at(step, self._decay)
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.weights.values()), [p.float() for p in self._parameters.values()], weight
            )

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over averaged weights of the same names and shapes."""
        for name, weight in self.weights.items():
            weight.copy_(tensors[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the parameters hold the average; after it what they held before, exactly."""
        kept = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(self.weights[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    parameter.copy_(kept[name])
