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
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import DTypeLike, NDArray

from manifests.keys import key


@dataclass(frozen=True)
class _Key(ISeedSequence):
    """Gives a Philox its 128-bit key as it is: four times faster than `Philox(key=…)`, which asks
    the system for random numbers first that it then has no use for."""

    hexadecimal: str

    def generate_state(self, n_words: int, dtype: DTypeLike = np.uint32) -> NDArray[np.uint64]:
        """The key in its two words, the lower first."""
        assert n_words == 2  # what a Philox asks for
        assert np.dtype(dtype) == np.uint64
        return np.frombuffer(int(self.hexadecimal, 16).to_bytes(16, "little"), "<u8")


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
        # NumPy takes whatever gives states, which its stubs do not know.
        return np.random.Generator(np.random.Philox(_Key(name)))  # type: ignore[arg-type]

    def normal(self, purpose: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Standard normal draws of `shape`, float32."""
        return torch.from_numpy(self.stream(purpose).standard_normal(shape, dtype=np.float32))

    def fill(self, purpose: str, values: NDArray[np.float32]) -> None:
        """Fill the contiguous `values` with what `normal` gives."""
        self.stream(purpose).standard_normal(out=values, dtype=np.float32)

    def choice(self, purpose: str, count: int) -> int:
        """A uniform choice out of 0 … `count` - 1."""
        return int(self.stream(purpose).integers(count)) if count > 1 else 0

    def uniform(self, purpose: str) -> float:
        """A uniform draw from [0, 1)."""
        return float(self.stream(purpose).random())

    def chance(self, purpose: str, probability: float) -> bool:
        """True with `probability`."""
        return probability > 0 and self.uniform(purpose) < probability
