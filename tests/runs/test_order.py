"""The order's laws, over many combinations of plain integers."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.keys import key
from omnigen_pipe.runs.order import Epoch, epoch_order, permutation, steps_per_epoch

SAMPLES = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), min_size=1, max_size=40)
BATCH = st.integers(1, 7)
MICRO = st.integers(1, 5)
SEED = st.integers(0, 2**32)

KNOWN = [[([4, 3], [0, 0]), ([4], [2])], [([2, 4], [0, 1]), ([0], [1])], [([1, 0], [0, 0])]]


def _epoch(
    samples: list[tuple[int, int]], batch: int, micro: int, seed: int, epoch: int = 0
) -> Epoch:
    buckets, repeats = (np.array(column, dtype=np.int64) for column in zip(*samples, strict=True))
    return epoch_order(
        buckets, repeats, seed=seed, epoch=epoch, batch_size=batch, micro_batches=micro
    )


@settings(max_examples=300, deadline=None)
@given(samples=SAMPLES, batch=BATCH, micro=MICRO, seed=SEED)
def test_every_sample_comes_exactly_repeats_plus_one_times(
    samples: list[tuple[int, int]], batch: int, micro: int, seed: int
) -> None:
    order = _epoch(samples, batch, micro, seed)
    seen: Counter[tuple[int, int]] = Counter()
    for index in range(len(order)):
        micro_batches = order.global_batch(index)
        assert 1 <= len(micro_batches) <= micro
        if index < len(order) - 1:
            assert len(micro_batches) == micro
        for one in micro_batches:
            assert 1 <= len(one.samples) <= batch
            assert len({samples[i][0] for i in one.samples}) == 1, "one bucket a micro-batch"
            seen.update(zip(one.samples.tolist(), one.repeats.tolist(), strict=True))
    wanted = {(i, r) for i, (_, repeats) in enumerate(samples) for r in range(repeats + 1)}
    assert set(seen) == wanted
    assert set(seen.values()) == {1}


@settings(max_examples=100, deadline=None)
@given(samples=SAMPLES, batch=BATCH, micro=MICRO, seed=SEED, epoch=st.integers(0, 3))
def test_the_number_of_steps_is_known_beforehand_and_the_same_every_epoch(
    samples: list[tuple[int, int]], batch: int, micro: int, seed: int, epoch: int
) -> None:
    buckets, repeats = (np.array(column, dtype=np.int64) for column in zip(*samples, strict=True))
    expected = steps_per_epoch(buckets, repeats, batch, micro)
    assert len(_epoch(samples, batch, micro, seed, epoch)) == expected


@settings(max_examples=100, deadline=None)
@given(samples=SAMPLES, batch=BATCH, seed=SEED)
def test_only_full_and_one_short_micro_batch_per_bucket(
    samples: list[tuple[int, int]], batch: int, seed: int
) -> None:
    order = _epoch(samples, batch, 1, seed)
    sizes: dict[int, list[int]] = {}
    for index in range(len(order)):
        (one,) = order.global_batch(index)
        sizes.setdefault(samples[one.samples[0]][0], []).append(len(one.samples))
    for lengths in sizes.values():
        assert sum(length < batch for length in lengths) <= 1


@settings(max_examples=200, deadline=None)
@given(samples=SAMPLES, batch=BATCH, seed=SEED)
def test_a_micro_batch_holds_a_sample_twice_only_across_rounds(
    samples: list[tuple[int, int]], batch: int, seed: int
) -> None:
    order = _epoch(samples, batch, 1, seed)
    for index in range(len(order)):
        (one,) = order.global_batch(index)
        rounds = one.repeats.tolist()
        assert rounds == sorted(rounds)
        pairs = list(zip(one.samples.tolist(), rounds, strict=True))
        assert len(set(pairs)) == len(pairs)
        if len(set(rounds)) == 1:
            assert len(set(one.samples.tolist())) == len(one.samples)


@settings(max_examples=100, deadline=None)
@given(samples=SAMPLES, batch=BATCH, micro=MICRO, seed=SEED)
def test_the_order_is_a_pure_function(
    samples: list[tuple[int, int]], batch: int, micro: int, seed: int
) -> None:
    first, again = _epoch(samples, batch, micro, seed), _epoch(samples, batch, micro, seed)
    for index in reversed(range(len(first))):
        for one, other in zip(first.global_batch(index), again.global_batch(index), strict=True):
            assert one.samples.tolist() == other.samples.tolist()
            assert one.repeats.tolist() == other.repeats.tolist()


def test_epochs_and_seeds_differ() -> None:
    samples = [(0, 0)] * 50
    orders = [
        _epoch(samples, 5, 1, seed, epoch).samples.tolist()
        for seed, epoch in [(0, 0), (0, 1), (1, 0)]
    ]
    assert len({tuple(order) for order in orders}) == 3


def test_every_position_is_equally_likely_for_a_sample() -> None:
    """Over many seeds a sample's place is uniform: mean near the middle, all places taken."""
    places = [_epoch([(0, 0)] * 10, 1, 1, seed).starts.tolist() for seed in range(400)]
    samples = [_epoch([(0, 0)] * 10, 1, 1, seed).samples for seed in range(400)]
    where = [s[p].tolist().index(0) for s, p in zip(samples, places, strict=True)]
    counts = Counter(where)
    assert set(counts) == set(range(10))
    assert max(counts.values()) < 75  # 40 expected, 6 its standard deviation


def test_the_order_of_a_known_case_never_changes() -> None:
    """Frozen runs depend on it: another order would need another name for the key."""
    order = _epoch([(0, 1), (0, 0), (1, 0), (1, 0), (1, 2)], 2, 2, seed=7, epoch=3)
    found = [
        [(one.samples.tolist(), one.repeats.tolist()) for one in order.global_batch(index)]
        for index in range(len(order))
    ]
    assert found == KNOWN


@settings(max_examples=300, deadline=None)
@given(words=st.lists(st.one_of(st.integers(0, 40), st.integers(0, 2**64 - 1)), max_size=60))
def test_the_permutation_is_the_stable_argsort_of_the_words(words: list[int]) -> None:
    """Also of words that are equal, or differ in nothing but their low bits."""
    drawn = np.array(words, dtype=np.uint64)
    assert permutation(drawn).tolist() == np.argsort(drawn, kind="stable").tolist()


def test_the_order_is_by_bucket_and_round_and_then_by_random_words() -> None:
    """Written out once more with NumPy's own sort, for many samples in more buckets than 16 bits
    can number."""
    random = np.random.default_rng(0)
    buckets, repeats = random.integers(0, 70_000, 5000), random.integers(0, 4, 5000)
    order = epoch_order(buckets, repeats, seed=3, epoch=1, batch_size=1, micro_batches=1)
    samples = np.repeat(np.arange(5000), repeats + 1)
    rounds = np.concatenate([np.arange(n + 1) for n in repeats])
    words = np.random.Philox(key=int(key("order", 3, 1), 16)).random_raw(len(samples))
    expected = np.lexsort((words, rounds, buckets[samples]))
    assert order.samples.tolist() == samples[expected].tolist()
    assert order.repeats.tolist() == rounds[expected].tolist()


def test_an_index_beyond_the_epoch_is_an_error() -> None:
    order = _epoch([(0, 0)], 1, 1, 0)
    with pytest.raises(IndexError):
        order.global_batch(1)
