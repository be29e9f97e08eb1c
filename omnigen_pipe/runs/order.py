"""The order of training data, as a pure function of plain arrays.

A micro-batch is at most `batch_size` samples of one bucket. A global batch, one optimizer
step, is `micro_batches` of them, buckets mixed. Every sample comes exactly `repeats` + 1 times
an epoch; what does not fill a micro-batch comes in a short one, and the epoch's last global
batch may have fewer micro-batches. Nothing is dropped, and nothing but the arguments decides:
not the number of processes, not what came before. Resuming is an index into the epoch.

Permutations are stable argsorts of Philox's raw 64-bit words, which NumPy keeps the same between
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

    order = permutation(words.random_raw(len(samples)))
    for code in (rounds, buckets[samples]):  # the bucket decides first, so it is sorted by last
        order = order[_stable_argsort(code[order])]
    samples, rounds = samples[order], rounds[order]

    # Cut each bucket's run of items into pieces of batch_size.
    in_bucket = buckets[samples]
    is_first = np.diff(in_bucket, prepend=-1) != 0
    bucket_start = np.flatnonzero(is_first)
    offset = np.arange(len(samples)) - bucket_start[np.cumsum(is_first) - 1]
    starts = np.flatnonzero(offset % batch_size == 0)
    ends = np.append(starts[1:], len(samples))[: len(starts)]

    shuffled = permutation(words.random_raw(len(starts)))
    return Epoch(samples, rounds, starts[shuffled], ends[shuffled], micro_batches)


def permutation(words: NDArray[np.uint64]) -> Integers:
    """`np.argsort(words, kind="stable")`, in a fraction of its time.

    NumPy sorts values several times faster than indexes. So each word gives up its low bits for its
    index, and is sorted as a value; what is then equal but for the index, which is rare where the
    words are random, is put in order by the whole words.
    """
    low = np.uint64((1 << max(1, (len(words) - 1).bit_length())) - 1)
    packed = np.sort((words & ~low) | np.arange(len(words), dtype=np.uint64))
    order = (packed & low).astype(np.int64)
    packed &= ~low
    equal = np.flatnonzero(packed[1:] == packed[:-1])
    if len(equal):
        places = np.union1d(equal, equal + 1)
        among = order[places]
        order[places] = among[np.lexsort((among, words[among]))]
    return order


def _stable_argsort(codes: Integers) -> Integers:
    """Indexes that sort `codes` and keep equal ones in order; most quickly those below 65,536."""
    if len(codes) and codes.max() < 2**16:
        codes = codes.astype(np.uint16)  # sorted by radix
    return np.argsort(codes, kind="stable")
