"""The randomness of one sample: noise, time, posterior, caption and dropout.

Each is drawn on the CPU in float32 from a stream of its own, keyed by the run's seed, the
sample, the epoch, the repeat and the purpose. So a draw depends on neither batch, process nor
restart. The streams are NumPy's Philox with the whole 128-bit key: torch's CPU generator uses
only 32 bits of its seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from manifests.keys import key


@dataclass(frozen=True)
class Appearance:
    """One appearance of one sample in training."""

    seed: int
    sample_id: str
    epoch: int
    repeat: int

    def stream(self, purpose: str) -> np.random.Generator:
        """The random stream of this appearance for one purpose."""
        name = key(self.seed, self.sample_id, self.epoch, self.repeat, purpose)
        return np.random.Generator(np.random.Philox(key=int(name, 16)))

    def normal(self, purpose: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Standard normal draws of `shape`, float32."""
        return torch.from_numpy(self.stream(purpose).standard_normal(shape, dtype=np.float32))

    def choice(self, purpose: str, count: int) -> int:
        """A uniform choice out of 0 … `count` - 1."""
        return int(self.stream(purpose).integers(count))

    def uniform(self, purpose: str) -> float:
        """A uniform draw from [0, 1)."""
        return float(self.stream(purpose).random())

    def chance(self, purpose: str, probability: float) -> bool:
        """True with `probability`."""
        return self.uniform(purpose) < probability
