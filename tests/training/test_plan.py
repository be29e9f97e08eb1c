"""The plan's laws: k steps and the rest are all steps, whatever the number of processes."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from omnigen_pipe.runs.checkpoints import Position
from omnigen_pipe.runs.order import MicroBatch, epoch_order
from omnigen_pipe.training.plan import Plan, Step, steps

SAMPLES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=25)
BATCH = st.integers(1, 5)
MICRO = st.integers(1, 6)
SEED = st.integers(0, 2**32)


def _plan(
    samples: list[tuple[int, int]],
    batch: int,
    micro: int,
    seed: int,
    total: int,
    start: Position | None = None,
) -> Plan:
    buckets, repeats = (np.array(column, dtype=np.int64) for column in zip(*samples, strict=True))
    return Plan(
        start or Position(),
        total,
        lambda epoch: epoch_order(
            buckets, repeats, seed=seed, epoch=epoch, batch_size=batch, micro_batches=micro
        ),
    )


def _plain(step: Step) -> tuple[object, ...]:
    return (
        step.epoch,
        step.after,
        [(micro.samples.tolist(), micro.repeats.tolist()) for micro in step.batches],
    )


@settings(max_examples=400, deadline=None)
@given(
    samples=SAMPLES,
    batch=BATCH,
    micro=MICRO,
    seed=SEED,
    total=st.integers(1, 30),
    stops=st.lists(st.integers(0, 30), max_size=4),
)
def test_first_steps_and_the_rest_are_all_steps_in_order(
    samples: list[tuple[int, int]],
    batch: int,
    micro: int,
    seed: int,
    total: int,
    stops: list[int],
) -> None:
    """Stopped any number of times, each time going on from the position alone."""
    whole = [_plain(step) for step in steps(_plan(samples, batch, micro, seed, total))]
    assert len(whole) == total
    parts: list[tuple[object, ...]] = []
    position = Position()
    for stop in [*sorted(min(stop, total) for stop in stops), total]:
        for step in steps(_plan(samples, batch, micro, seed, stop, position)):
            parts.append(_plain(step))
            position = step.after
    assert parts == whole
    assert position.step == total


@settings(max_examples=300, deadline=None)
@given(samples=SAMPLES, batch=BATCH, micro=MICRO, seed=SEED, total=st.integers(1, 12))
def test_any_number_of_processes_computes_the_same_global_batches(
    samples: list[tuple[int, int]], batch: int, micro: int, seed: int, total: int
) -> None:
    def plain(batches: list[MicroBatch]) -> list[tuple[list[int], list[int]]]:
        return [(one.samples.tolist(), one.repeats.tolist()) for one in batches]

    for step in steps(_plan(samples, batch, micro, seed, total)):
        whole = plain(step.batches)
        for size in (1, 2, 3, 4):
            shares = [plain(step.share(rank, size)) for rank in range(size)]
            dealt = [shares[i % size][i // size] for i in range(len(whole))]
            assert dealt == whole
            assert sum(map(len, shares)) == len(whole), "each micro-batch is computed once"
            assert max(map(len, shares)) == step.rounds(size)


@settings(max_examples=200, deadline=None)
@given(samples=SAMPLES, batch=BATCH, micro=MICRO, seed=SEED)
def test_over_an_epoch_every_sample_comes_repeats_plus_one_times_in_any_number_of_processes(
    samples: list[tuple[int, int]], batch: int, micro: int, seed: int
) -> None:
    per_epoch = len(_plan(samples, batch, micro, seed, 1).epoch_order(0))
    for size in (1, 2, 3, 4):
        seen: Counter[tuple[int, int]] = Counter()
        for step in steps(_plan(samples, batch, micro, seed, per_epoch)):
            assert step.epoch == 0
            for rank in range(size):
                for one in step.share(rank, size):
                    seen.update(zip(one.samples.tolist(), one.repeats.tolist(), strict=True))
        wanted = {(i, r) for i, (_, repeats) in enumerate(samples) for r in range(repeats + 1)}
        assert set(seen) == wanted
        assert set(seen.values()) == {1}
