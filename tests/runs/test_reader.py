"""What the reader draws, on real frozen samples and shards: every draw from a stream of its own."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import tracemalloc
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_frozen import METADATA, _frozen, _moments, workspace

from manifests.schema import LATENTS
from omnigen_pipe.config import TrainConfig, parse
from omnigen_pipe.runs.frozen import FrozenSamples, freeze, locate
from omnigen_pipe.runs.order import MicroBatch
from omnigen_pipe.training.batches import (
    READERS,
    Batch,
    BatchReader,
    read_ahead,
    rollout_share,
)
from omnigen_pipe.training.draws import Appearance
from omnigen_pipe.workspace import Workspace

__all__ = ["workspace"]

ROLLOUT = {"scheduled_sampling_max_step_offset": 4, "scheduled_sampling_probability": 0.5}


@pytest.fixture
def frozen(workspace: Workspace) -> FrozenSamples:
    return _frozen(workspace)


def _reader(workspace: Workspace, frozen: FrozenSamples, **options: Any) -> BatchReader:
    config = TrainConfig(**{"seed": 5, **options})
    return BatchReader(workspace, frozen, locate(workspace, frozen), config)


def _read(reader: BatchReader, rows: list[tuple[int, int]], epoch: int, step: int = 0) -> Batch:
    """A micro-batch of (sample, repeat)."""
    samples, repeats = (np.array(part) for part in zip(*rows, strict=True))
    return reader.read(MicroBatch(samples, repeats), epoch, step)


def _row(batch: Batch, row: int) -> list[Any]:
    """All that was drawn for a row."""
    rolled = [0, 0.0]
    if batch.rollout is not None and batch.rollout.steps[row] > 0:
        rolled = [int(batch.rollout.steps[row]), float(batch.rollout.starts[row])]
    tensors = [batch.x1[row].tolist(), batch.x0[row].tolist(), float(batch.t[row])]
    return [*tensors, batch.prompts[row], bool(batch.regularisation[row]), *rolled]


@pytest.mark.parametrize("posterior", ["fresh", "sample", "mean"])
def test_x1_is_the_chosen_draw_of_the_posterior_written_out(
    workspace: Workspace, frozen: FrozenSamples, posterior: str
) -> None:
    """`sample` is one and the same at every epoch and repeat, `mean` has nothing random, and
    `fresh` differs every time; noise and time differ every time in all of them."""
    reader = _reader(workspace, frozen, vae_posterior=posterior)
    seen, noises, times = [], set(), set()
    for epoch in range(3):
        for repeat in range(2):
            batch = _read(reader, [(3, repeat)], epoch)
            mean, log_variance = np.split(_moments(3).astype(np.float32), 2)
            own = (epoch, repeat) if posterior == "fresh" else (0, 0)
            noise = Appearance(5, "s3", *own).normal("posterior", (4, 2, 4)).numpy()
            deviation = 0 if posterior == "mean" else np.exp(0.5 * log_variance) * noise
            expected = 0.5 * (mean + deviation)
            np.testing.assert_allclose(batch.x1[0].numpy(), expected, rtol=1e-5, atol=1e-6)
            seen.append(batch.x1[0])
            noises.add(float(batch.x0[0].sum()))
            times.add(float(batch.t[0]))
    assert len(noises) == len(times) == 6
    different = {tuple(x.flatten().tolist()) for x in seen}
    assert len(different) == (6 if posterior == "fresh" else 1)


def test_every_purpose_has_a_stream_of_its_own(workspace: Workspace, frozen: FrozenSamples) -> None:
    """Every draw is that of the named stream, so that none is a function of another."""
    reader = _reader(workspace, frozen, **ROLLOUT)
    names: list[str] = []
    stream = Appearance.stream

    def noting(appearance: Appearance, purpose: str) -> np.random.Generator:
        names.append(purpose)
        return stream(appearance, purpose)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Appearance, "stream", noting)
        for epoch in range(8):
            _read(reader, [(1, 0)], epoch)
    drawn = {"noise", "posterior", "time", "caption", "dropout", "rollout"}
    assert set(names) == drawn | {"rollout steps", "rollout start"}
    assert all(names.count(name) == 8 for name in drawn)
    first = {name: Appearance(5, "s1", 0, 0).stream(name).random(4).tolist() for name in set(names)}
    assert len({tuple(values) for values in first.values()}) == len(first)


def test_time_is_the_logit_normal_of_its_stream(
    workspace: Workspace, frozen: FrozenSamples
) -> None:
    reader = _reader(workspace, frozen)
    for epoch in range(5):
        normal = float(
            Appearance(5, "s0", epoch, 0).stream("time").standard_normal(dtype=np.float32)
        )
        assert float(_read(reader, [(0, 0)], epoch).t[0]) == pytest.approx(
            1 / (1 + np.exp(-normal))
        )


_ROWS = st.lists(st.tuples(st.sampled_from([1, 3]), st.integers(0, 3)), min_size=1, max_size=4)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # it keeps nothing between reads
)
@given(rows=_ROWS, epoch=st.integers(0, 3), step=st.integers(0, 30))
def test_a_rows_draws_depend_on_nothing_but_the_row(
    worked: BatchReader, rows: list[tuple[int, int]], epoch: int, step: int
) -> None:
    """Not on its micro-batch, and so not on the rank; nor on the step, once the share is full."""
    together = _read(worked, rows, epoch, step)
    for place, row in enumerate(rows):
        assert _row(together, place) == _row(_read(worked, [row], epoch, step=1000), 0)


@pytest.fixture
def worked(workspace: Workspace, frozen: FrozenSamples) -> BatchReader:
    return _reader(workspace, frozen, caption_dropout_probability=0.3, **ROLLOUT)


def test_rollouts_have_their_share_their_steps_and_their_times(
    workspace: Workspace, frozen: FrozenSamples
) -> None:
    """Of 1200 draws: the probability times P(t <= 0.9), never a later t, 1 to 4 steps equally
    often, from a uniform part of t."""
    reader = _reader(workspace, frozen, **ROLLOUT)
    steps, parts, times = [], [], []
    for epoch in range(600):
        batch = _read(reader, [(0, 0), (2, 0)], epoch)
        times += batch.t.tolist()
        if batch.rollout is None:
            steps += [0, 0]
            continue
        steps += batch.rollout.steps.tolist()
        chosen = batch.rollout.steps > 0
        assert (batch.t[chosen] <= 0.9).all()
        assert (batch.rollout.starts[chosen] < batch.t[chosen]).all()
        parts += (batch.rollout.starts / batch.t)[chosen].tolist()
    late = np.array(times) > 0.9
    assert late.any(), "some came too late"
    assert not np.array(steps)[late].any()
    share = np.mean(np.array(steps)[~late] > 0)
    assert abs(share - 0.5) < 4 * (0.25 / len(steps)) ** 0.5
    counts = np.bincount(steps, minlength=5)[1:]
    assert len(counts) == 4
    assert (abs(counts / counts.sum() - 0.25) < 0.08).all()
    assert abs(np.mean(parts) - 0.5) < 0.06
    assert abs(np.std(parts) - 12**-0.5) < 0.03


def test_regularisation_rows_are_never_rolled_out(
    workspace: Workspace, frozen: FrozenSamples
) -> None:
    reader = _reader(workspace, frozen, **{**ROLLOUT, "scheduled_sampling_probability": 1.0})
    for epoch in range(50):
        batch = _read(reader, [(3, 0), (1, 0)], epoch)
        assert batch.regularisation.tolist() == [True, False]
        rolled = batch.rollout.steps.tolist() if batch.rollout is not None else [0, 0]
        assert rolled[0] == 0
        assert (rolled[1] > 0) == (float(batch.t[1]) <= 0.9)


@pytest.mark.parametrize(("start", "ramp"), [(0, 0), (10, 0), (0, 4), (7, 5)])
def test_the_share_rises_as_configured(start: int, ramp: int) -> None:
    """0 before `start_step` steps are done, then in `ramp_steps` equal parts to the whole."""
    config = TrainConfig(
        **{**ROLLOUT, "scheduled_sampling_probability": 0.8},
        scheduled_sampling_start_step=start,
        scheduled_sampling_ramp_steps=ramp,
    )
    for step in range(40):
        if step < start:
            expected = 0.0
        elif ramp == 0:
            expected = 0.8
        else:
            expected = 0.8 * min(ramp, step - start + 1) / ramp
        assert rollout_share(step, config) == pytest.approx(expected)


def test_who_is_rolled_out_at_a_small_share_is_at_a_larger_one(
    workspace: Workspace, frozen: FrozenSamples
) -> None:
    """On the ramp rows only join, each with the steps and the start that it keeps."""
    reader = _reader(workspace, frozen, **ROLLOUT, scheduled_sampling_ramp_steps=20)
    joined = 0
    for epoch in range(40):
        found = [_row(_read(reader, [(0, 0)], epoch, step), 0)[-2:] for step in range(0, 20, 3)]
        first = next((i for i, (steps, _) in enumerate(found) if steps), len(found))
        assert all(each == [0, 0.0] for each in found[:first])
        assert all(each == found[first] for each in found[first:])
        joined += 0 < first < len(found)
    assert joined > 3


def test_off_means_no_draw(
    workspace: Workspace, frozen: FrozenSamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor before its first step; and no other number changes by it."""
    plain = _reader(workspace, frozen)
    later = _reader(workspace, frozen, **ROLLOUT, scheduled_sampling_start_step=5)
    with_it = _reader(workspace, frozen, **ROLLOUT)
    rows = [(1, 0), (3, 1)]
    expected = [_row(_read(with_it, rows, 2, step=4), row)[:5] for row in range(2)]
    stream = Appearance.stream

    def no_rollout(appearance: Appearance, purpose: str) -> np.random.Generator:
        assert not purpose.startswith("rollout")
        return stream(appearance, purpose)

    monkeypatch.setattr(Appearance, "stream", no_rollout)
    for reader in (plain, later):
        batch = _read(reader, rows, 2, step=4)
        assert batch.rollout is None
        assert [_row(batch, row)[:5] for row in range(2)] == expected


def test_draws_leave_torchs_own_generator_alone(
    workspace: Workspace, frozen: FrozenSamples, tmp_path: Path
) -> None:
    before = torch.get_rng_state()
    _read(_reader(workspace, frozen, **ROLLOUT), [(1, 0)], 0)
    assert torch.equal(torch.get_rng_state(), before)


def _many(root: Path, number: int) -> tuple[Workspace, FrozenSamples]:
    """Frozen samples that share the one latent, of zeros, in four shards that are holes."""
    here = Workspace(root, parse({"train": {"seed": 5}}, "test"))
    shape, shards = [8, 2, 2], 4
    nbytes = 2 * 8 * 2 * 2
    keys = [f"{n:032x}" for n in range(number)]
    latents: dict[str, Any] = {
        "pixels_key": keys,
        "checksum": np.full(number, xxhash.xxh3_64_intdigest(bytes(nbytes)), np.uint64),
        "nbytes": [nbytes] * number,
        "shape": [shape] * number,
        "dtype": ["float16"] * number,
        "bucket": ["16x16"] * number,
    }
    names = [f"latents/16x16/{shard:032x}.tar" for shard in range(shards)]
    (root / names[0]).parent.mkdir(parents=True)
    for name in names:
        (root / name).touch()
        os.truncate(root / name, number * nbytes)
    placed = {
        "vae_key": ["v"] * number,
        "shard": [names[n % shards] for n in range(number)],
        "offset": [n * nbytes for n in range(number)],
        "shard_nbytes": [number * nbytes] * number,
        "status": ["ok"] * number,
    }
    rows = pa.Table.from_pydict(latents | placed)
    here.latents.append(
        pa.Table.from_pylist(rows.to_pylist(), LATENTS.schema),
    )
    frozen = {
        "sample_id": [f"s{n:020}" for n in range(number)],
        "split": ["train"] * number,
        "repeats": [n % 2 for n in range(number)],
        "prompts": [[[n % 50] * 20, [1, 2]] for n in range(number)],
    }
    types = {"prompts": pa.list_(pa.list_(pa.int32())), "repeats": pa.int64()}
    table = pa.table({k: pa.array(v, types.get(k)) for k, v in (latents | frozen).items()})
    freeze(table, root / "samples.arrow", here.staging, METADATA | {"vae_key": "v"})
    return here, FrozenSamples.open(root / "samples.arrow")


def _held(root: Path, number: int) -> tuple[int, int]:
    """Blocks of Python's memory, and bytes of all memory but the mapped file, that a training on
    so many samples holds in its samples, reader and order."""
    here, _ = _many(root, number)
    gc.collect()
    tracemalloc.start()
    blocks, arrow = sys.getallocatedblocks(), pa.total_allocated_bytes()
    frozen = FrozenSamples.open(root / "samples.arrow")
    reader = _reader(here, frozen)
    order = frozen.order(0, reader.config, 1)
    for index in range(len(order) // 10):
        for micro in order.global_batch(index):
            reader.read(micro, 0, index)
    gc.collect()
    blocks, arrow = sys.getallocatedblocks() - blocks, pa.total_allocated_bytes() - arrow
    nbytes = tracemalloc.get_traced_memory()[0] + arrow
    tracemalloc.stop()
    assert len(frozen) == number
    assert len(order) >= number
    return blocks, nbytes


def test_training_holds_no_python_object_per_sample(tmp_path: Path) -> None:
    """After a tenth of an epoch 9,000 samples more are not a hundredth of so many objects more, and
    100 bytes each: of numbers that say bucket, repeats, place and checksum, and of the epoch's
    order, in which each sample comes one and a half times."""
    _held(tmp_path / "first", 200)  # what is imported and cached once
    few, few_bytes = _held(tmp_path / "few", 1_000)
    many, many_bytes = _held(tmp_path / "many", 10_000)
    assert many - few < 90
    assert (many_bytes - few_bytes) / 9_000 < 100


def test_batches_read_ahead_are_those_read_one_by_one_and_in_order(tmp_path: Path) -> None:
    """Also where shards are replaced behind the threads that read."""
    here, frozen = _many(tmp_path, 300)
    order = frozen.order(0, TrainConfig(seed=5), 1)
    micros = [micro for index in range(100) for micro in order.global_batch(index)]
    alone = _reader(here, frozen)
    wanted = [alone.read(micro, 0, 0) for micro in micros]
    together = _reader(here, frozen)
    shards = sorted({str(shard) for shard in together.locations.latents.shards})
    threads = set()

    def read(micro: MicroBatch) -> Batch:
        threads.add(threading.get_ident())
        return together.read(micro, 0, 0)

    found = []
    with closing(read_ahead(micros, read)) as batches:
        for number, batch in enumerate(batches):
            found.append(batch)
            if number % 10 == 0:  # another file of the same content takes its place
                path = here.root / shards[number // 10 % len(shards)]
                path.with_suffix(".new").write_bytes(path.read_bytes())
                os.replace(path.with_suffix(".new"), path)
    assert len(threads) == READERS
    assert [batch.sample_ids for batch in found] == [batch.sample_ids for batch in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one.prompts == other.prompts
        for name in ("x1", "x0", "t", "regularisation"):
            assert torch.equal(getattr(one, name), getattr(other, name))


def test_threads_that_read_compute_alone_and_the_one_that_trains_does_not() -> None:
    """Also where the one that trains has computed nothing before."""
    script = """
from omnigen_pipe.training.batches import read_ahead
import torch
print(set(read_ahead(range(8), lambda number: torch.get_num_threads())), torch.get_num_threads())
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = (sys.executable, "-c", script)
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["{1}", "2"], found.stderr
