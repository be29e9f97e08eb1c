"""The order of training data, as a pure function of plain arrays.

A micro-batch is at most `batch_size` samples of one bucket. A global batch, one optimizer
step, is `micro_batches` of them, buckets mixed. Every sample comes exactly `repeats` + 1 times
an epoch; what does not fill a micro-batch comes in a short one, and the epoch's last global
batch may have fewer micro-batches. Nothing is dropped, and nothing but the arguments decides:
not the number of processes, not what came before. Resuming is an index into the epoch.

Permutations are argsorts of Philox's raw 64-bit words, which NumPy keeps the same between
releases, unlike `Generator.permutation`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from manifests.keys import key

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one bucket: indexes `[n]` into the frozen samples, and which repeat each is."""

    samples: Integers
    repeats: Integers


@dataclass(frozen=True)
class Epoch:
    """One epoch's order: micro-batch i holds the items from `starts[i]` to `ends[i]`."""

    samples: Integers
    repeats: Integers
    starts: Integers
    ends: Integers
    micro_batches: int

    def __len__(self) -> int:
        """Number of global batches, that is, of optimizer steps."""
        return -(-len(self.starts) // self.micro_batches)

    def global_batch(self, index: int) -> list[MicroBatch]:
        """The micro-batches of optimizer step `index` of the epoch."""
        if not 0 <= index < len(self):
            raise IndexError(f"global batch {index} of an epoch of {len(self)}")
        first = index * self.micro_batches
        bounds = zip(
            self.starts[first : first + self.micro_batches],
            self.ends[first : first + self.micro_batches],
            strict=True,
        )
        return [MicroBatch(self.samples[a:b], self.repeats[a:b]) for a, b in bounds]


def steps_per_epoch(
    buckets: Integers, repeats: Integers, batch_size: int, micro_batches: int
) -> int:
    """Optimizer steps in every epoch, without ordering one."""
    counts = np.bincount(buckets, weights=repeats + 1).astype(np.int64)
    return -(-int((-(-counts // batch_size)).sum()) // micro_batches)


def epoch_order(
    buckets: Integers,
    repeats: Integers,
    *,
    seed: int,
    epoch: int,
    batch_size: int,
    micro_batches: int,
) -> Epoch:
    """The order of epoch `epoch` (0, 1, …).

    `buckets` `[N]`: a small integer per sample; `repeats` `[N]`: extra times per epoch. A
    micro-batch holds a sample twice only where one round of its bucket ends and the next begins.
    """
    words = np.random.Philox(key=int(key("order", seed, epoch), 16))
    samples = np.repeat(np.arange(len(buckets), dtype=np.int64), repeats + 1)
    first = np.cumsum(repeats + 1) - (repeats + 1)
    rounds = np.arange(len(samples), dtype=np.int64) - first[samples]

    order = np.lexsort((words.random_raw(len(samples)), rounds, buckets[samples]))
    samples, rounds = samples[order], rounds[order]

    # Cut each bucket's run of items into pieces of batch_size.
    in_bucket = buckets[samples]
    is_first = np.diff(in_bucket, prepend=-1) != 0
    bucket_start = np.flatnonzero(is_first)
    offset = np.arange(len(samples)) - bucket_start[np.cumsum(is_first) - 1]
    starts = np.flatnonzero(offset % batch_size == 0)
    ends = np.append(starts[1:], len(samples))[: len(starts)]

    shuffled = np.argsort(words.random_raw(len(starts)), kind="stable")
    return Epoch(samples, rounds, starts[shuffled], ends[shuffled], micro_batches)
