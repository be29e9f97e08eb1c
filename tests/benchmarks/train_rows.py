"""The rows of training: what its data, its steps, a batch, a block with its adapter, attention and
resuming cost."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import attention_modes
import bare
import folders
import lokr_modes
import numpy as np
import torch
from table import Bench, Goal, Line, Row, child, in_turn

from omnigen_pipe.config import LokrConfig
from omnigen_pipe.model import flow
from omnigen_pipe.model.transformer import assembled, predict_velocity
from omnigen_pipe.model_files import EMBEDDED_FOLDER
from omnigen_pipe.progress import Advance, Progress
from omnigen_pipe.quiet import quiet_imports
from omnigen_pipe.runs.checkpoints import Position
from omnigen_pipe.runs.frozen import FrozenSamples, locate
from omnigen_pipe.runs.metrics import MetricsWriter
from omnigen_pipe.runs.order import MicroBatch, epoch_order
from omnigen_pipe.stop import StopRequest
from omnigen_pipe.training import loop
from omnigen_pipe.training.batches import BatchReader, read_ahead
from omnigen_pipe.training.plan import Plan
from omnigen_pipe.training.trainee import Trainee, load_trainee
from omnigen_pipe.workspace import Workspace
from small_omnigen import build_small_omnigen

#: Pixels a side, and what a token of the picture covers.
_SIDE, _PATCH = 1024, 16
#: Lengths of four prompts in tokens: short, usual and long ones.
_PROMPTS = (20, 45, 130, 400)
#: Tokens that pass through one block, as of a 512 px picture.
_TOKENS = 1024
#: Where an epoch goes on, in samples.
_POSITION = 1_000_000

#: Latents of an epoch and how often it is read, pixels a side, samples of a micro-batch.
_LATENTS, _EPOCHS, _LATENT_SIDE, _READ_BATCH = 20_000, 5, 512, 8
#: Memory that may come and go between two epochs, bytes.
_SWAY = 8 * 2**20
#: Samples of a step, and steps that a side takes before it is the other's turn: more than the
#: batches that are read before the first of them begins.
_STEP_BATCH, _STRETCH = 4, 12
#: The most of its time that training may wait for its data.
_WAITING = 0.01


def data(bench: Bench) -> Iterator[Line]:
    """An epoch of latents through the reader, against copying them from mapped shards."""
    number = bench.amount(_LATENTS, least=2 * _READ_BATCH)
    options = ("[train]", f"train_batch_size = {_READ_BATCH}")
    workspace = folders.workspace(bench.folder, *options)
    path = folders.training_data(workspace, number, _LATENT_SIDE, tokens=30_000)
    frozen = FrozenSamples.open(path)
    shape = frozen.forms[0][0]

    def reader_epoch(ahead: bool) -> None:
        reader = BatchReader(workspace, frozen, places, workspace.config.train)

        def read(micro: MicroBatch) -> Any:
            prompts = [frozen.prompt(row, 0) for row in micro.samples.tolist()]
            latents = torch.from_numpy(reader.latents(micro.samples)).float()
            return frozen.sample_ids(micro.samples), prompts, latents

        micros = _micro_batches(frozen.order(0, workspace.config.train, 1))
        for _ in read_ahead(micros, read) if ahead else map(read, micros):
            pass

    def bare_epoch(as_float32: bool) -> None:
        for latents in bare.read_latents(batches, shape):
            if as_float32:
                torch.from_numpy(latents).float()

    places = locate(workspace, frozen)
    batches = [
        [
            (str(workspace.root / places.latents.shards[row]), int(places.latents.offsets[row]))
            for row in micro.samples
        ]
        for micro in _micro_batches(frozen.order(0, workspace.config.train, 1))
    ]
    epochs = (
        partial(reader_epoch, ahead=False),
        partial(reader_epoch, ahead=True),
        partial(bare_epoch, as_float32=True),
        partial(bare_epoch, as_float32=False),
    )
    works = (partial(_timed, epoch) for epoch in epochs)
    alone, ahead, plain, copied = in_turn(2 * bench.repeats - 1, *works)
    found = child("ours.py", "memory_of_epochs", bench.folder, _EPOCHS)
    grown = found["resident"][-1] - found["resident"][0] if found["resident"] else 0
    against_copy = Line("", DATA.goal, ours=alone, bare=copied).value
    held = (
        path.stat().st_size,
        sum(map(_nbytes, (frozen, places))) + sum(a.nbytes for a in places.latents),
    )
    yield Line(
        "training data",
        DATA.goal,
        "latents",
        number,
        alone,
        plain,
        failed=f"memory grew by {grown / 2**20:.0f} MiB in {_EPOCHS - 1} epochs"
        if grown > _SWAY
        else "",
        note=f"{number:,} latents of {_LATENT_SIDE} px, 64 KiB, in micro-batches of {_READ_BATCH} "
        "as float32 tensors, in the system's cache, in one thread as the bare loop; ours also "
        "orders the epoch, checks every checksum, and gives ids and prompts; against copying the "
        f"bytes alone {against_copy:.2f}; memory after epoch {_EPOCHS} of whole batches is "
        f"{grown / 2**20:+.1f} MiB from that after the first; a sample is "
        f"{held[0] / number:.0f} bytes of the mapped file and {held[1] / number:.0f} of arrays",
        details={"memory": found, "copied": copied},
    )
    yield Line(
        "training data, read ahead",
        DATA.goal,
        "latents",
        number,
        ahead,
        plain,
        note="the same in two threads ahead of its use, as in training; whole batches with all "
        f"random draws {number / statistics.median(found['seconds']):,.0f} latents/s",
    )


def _micro_batches(order: Any) -> Iterator[MicroBatch]:
    return itertools.chain.from_iterable(map(order.global_batch, range(len(order))))


def _nbytes(holder: Any) -> int:
    return sum(value.nbytes for value in vars(holder).values() if isinstance(value, np.ndarray))


def step(bench: Bench) -> Iterator[Line]:
    """Steps of the training loop, against forward, backward and optimizer of the same modules."""
    wide = build_small_omnigen(bench.folder / "wide", hidden_size=512, num_layers=4, num_heads=8)
    for name, model, side in (("embedded model", EMBEDDED_FOLDER, 128), ("width 512", wide, 128)):
        options = ("[train]", f"train_batch_size = {_STEP_BATCH}", 'mixed_precision = "no"',
                   "gradient_checkpointing = false", "lr_warmup_steps = 0")  # fmt: skip
        root = bench.folder / name.replace(" ", "-")
        workspace = folders.workspace(root, *options, model=str(model))
        shape = json.loads((model / "transformer" / "config.json").read_text(encoding="utf-8"))
        path = folders.training_data(workspace, 64, side, tokens=shape["vocab_size"])
        stretches = bench.repeats + 1
        ours, plain, waiting = _steps(workspace, FrozenSamples.open(path), stretches)
        yield Line(
            f"training step, {name}",
            STEP.goal,
            ours=ours,
            bare=plain,
            failed=f"{waiting:.1%} of it waited for data" if waiting > _WAITING else "",
            note=f"{_STEP_BATCH} samples of {side} px, {torch.get_num_threads()} threads, float32; "
            f"{statistics.median(ours) * 1000:.1f} ms, of which {waiting:.2%} waited for data; "
            f"median of {stretches - 1} turns, each the median of {_STRETCH} steps",
            details={"waiting": waiting},
        )


def _steps(
    workspace: Workspace, frozen: FrozenSamples, stretches: int
) -> tuple[tuple[float, ...], tuple[float, ...], float]:
    """Seconds of a step of ours and of the bare loop, stretch by stretch, the first left out; and
    the share of its time that ours waited for data."""
    config = workspace.config.train
    trainee = load_trainee(workspace, LokrConfig(), torch.device("cpu"))
    reader = BatchReader(workspace, frozen, locate(workspace, frozen), config)
    timed, waited = _Timed(quiet=True), list[float]()
    done, trained = 0, 0.0

    def plain() -> float:
        batches = [
            reader.read(micro, 0, 0)
            for micro in itertools.islice(_micro_batches(frozen.order(0, config, 1)), _STRETCH)
        ]
        problems = [
            (flow.interpolate(b.x1, b.x0, b.t), b.t, b.prompts, flow.target(b.x1, b.x0))
            for b in batches
        ]
        return statistics.median(_plain_step(trainee, *problem) for problem in problems)

    with MetricsWriter(workspace.run_folder("bench")) as metrics:
        course = loop.Course(
            reader.read, lambda position: None, (1.0,) * 4, timed, StopRequest(), metrics
        )

        def ours() -> float:
            nonlocal done, trained
            start = Position(done, 0, 0)
            # A step more than is counted: the first waits for the thread that reads to begin.
            done += _STRETCH + 1
            plan = Plan(start, done, lambda epoch: frozen.order(epoch, config, 1))
            timed.ends.clear()
            with _waits(waited):
                loop.train(trainee, plan, config, course)
            trained += timed.ends[-1] - timed.ends[0]
            return statistics.median(b - a for a, b in itertools.pairwise(timed.ends))

        mine, bare_ones = (each[1:] for each in in_turn(stretches, ours, plain))
    return mine, bare_ones, sum(waited) / trained


def _plain_step(trainee: Trainee, x_t: Any, t: Any, prompts: Any, target: Any) -> float:
    trainee.transformer.train()
    predict = partial(predict_velocity, trainee.transformer, x_t, t, prompts)
    parameters = list(trainee.network.parameters())
    return _timed(lambda: bare.training_step(predict, target, parameters, trainee.optimizer))


class _Timed(Progress):
    """Notes when each step ended."""

    def __init__(self, quiet: bool) -> None:
        super().__init__(quiet)
        self.ends: list[float] = []

    @contextmanager
    def task(self, label: str, total: int | None, done: int = 0) -> Iterator[Advance]:
        """Note the time of each advance."""

        def advance(amount: int, detail: str = "", more: str = "") -> None:
            self.ends.append(time.perf_counter())

        yield advance


@contextmanager
def _waits(waited: list[float]) -> Iterator[None]:
    """Within it, note how long training waits for each batch but the first."""

    def noting(items: Any, read: Any) -> Iterator[Any]:
        batches = read_ahead(items, read)
        try:
            for number in itertools.count():
                # To free the last batch gives up Python's lock, for which others may be waiting:
                # the step's time, and no waiting for data.
                batch = None
                started = time.perf_counter()
                batch = next(batches, None)
                if batch is None:
                    return
                if number:
                    waited.append(time.perf_counter() - started)
                yield batch
        finally:
            batches.close()

    with patch.object(loop, "read_ahead", noting):
        yield


def batch(bench: Bench) -> Iterator[Line]:
    """Ids, positions and spans of mixed prompts, against diffusers' collator with its mask."""
    with quiet_imports():
        from diffusers.pipelines.omnigen.processor_omnigen import OmniGenCollator

    ids = [list(range(length)) for length in _PROMPTS]
    collator = OmniGenCollator()
    inputs = [{"input_ids": each, "pixel_values": None, "image_sizes": []} for each in ids]
    tokens = (_SIDE // _PATCH) ** 2
    ours, bare = in_turn(
        bench.repeats + 1,
        partial(_timed, lambda: assembled(ids, tokens, torch.device("cpu"))),
        partial(_timed, lambda: collator.process_mllm_input(inputs, [(_SIDE, _SIDE)] * len(ids))),
    )
    yield Line(
        "batch assembly",
        BATCH.goal,
        ours=ours[1:],
        bare=bare[1:],
        note=f"{_SIDE} px, {len(ids)} prompts of {min(_PROMPTS)} to {max(_PROMPTS)} tokens: "
        f"{_middle(ours[1:]) * 1000:.1f} ms; the bare side is diffusers' collator",
    )


def adapter(bench: Bench) -> Iterator[Line]:
    """A step of one block of the true width with its adapter, against the same without."""
    tokens = bench.amount(_TOKENS, least=64)
    model, network = lokr_modes.build(torch.float32, 1, lokr_modes.WIDTHS)

    def work(mode: str) -> float:
        lokr_modes.set_mode(network, mode)
        return lokr_modes.step(model, network, tokens, torch.float32)

    works = [partial(work, mode) for mode in ("bypass", "no adapter")]
    ours, bare = (each[1:] for each in in_turn(bench.repeats + 1, *works))
    # Once, for comparison: it takes as long as a turn of both others.
    rebuild = (work("rebuild"),)
    yield Line(
        "LoKr itself",
        LOKR.goal,
        "tokens",
        tokens,
        ours,
        bare,
        note="one block of width 3072, attention and MLP adapted as in the guide; gradients flow "
        "through the frozen base on both sides",
    )
    yield Line(
        "LoKr, LyCORIS' rebuild mode",
        LOKR.goal,
        "tokens",
        tokens,
        rebuild,
        (statistics.median(bare),),
        note="one step without warming up, for comparison: it is not used",
    )


def attention(bench: Bench) -> Iterator[Line]:
    """One layer's attention in spans, forwards and backwards, against the same with a mask."""
    picture = max(64, round((_SIDE // _PATCH) ** 2 * min(1.0, bench.scale)))
    length = max(attention_modes.PROMPTS) + 1 + picture
    problem = attention_modes.build(picture)
    works = [attention_modes.attend(mode, problem) for mode in attention_modes.MODES]
    turns = in_turn(bench.repeats + 1, *(partial(attention_modes.step, work) for work in works))
    ours, bare = (each[1:] for each in turns)
    apart = attention_modes.difference(problem)
    peaks = {
        mode: child("attention_modes.py", "peak", mode, picture) for mode in attention_modes.MODES
    }
    memory = ", ".join(
        f"{mode} {found['bytes'] / 2**20:.0f} MiB" for mode, found in peaks.items() if found
    )
    yield Line(
        "attention",
        ATTENTION.goal,
        "tokens",
        len(attention_modes.PROMPTS) * length,
        ours,
        bare,
        failed="" if apart < 1e-4 else f"the two differ by {apart:.1g}",
        note=f"an eighth of one layer's heads of true width, forwards and backwards, two prompts "
        f"of {' and '.join(map(str, attention_modes.PROMPTS))} tokens with a {_SIDE} px picture: "
        f"{length:,} tokens a row; peak over the inputs: {memory or 'not known here'}",
        details={"peaks": peaks},
    )


def resume(bench: Bench) -> Iterator[Line]:
    """The global batch that comes after a million samples of an epoch."""
    position = bench.amount(_POSITION)
    count = 2 * position
    buckets = np.random.default_rng(0).integers(0, 20, count)
    repeats = np.zeros(count, dtype=np.int64)

    def work() -> None:
        order = epoch_order(buckets, repeats, seed=0, epoch=3, batch_size=4, micro_batches=1)
        order.global_batch(position // 4)

    (ours,) = in_turn(bench.repeats, partial(_timed, work))
    yield Line(
        "resume",
        RESUME.goal,
        ours=ours,
        note=f"position {position:,} of an epoch of {count:,} samples in 20 buckets",
    )


def _timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _middle(seconds: tuple[float, ...]) -> float:
    return sorted(seconds)[len(seconds) // 2]


DATA = Row("training-data", "training data", Goal(0.8, "rate"), data)
STEP = Row("training-step", "training step", Goal(1.05, "times"), step)
BATCH = Row("batch", "batch assembly", Goal(0.01, "seconds"), batch)
LOKR = Row("lokr", "LoKr itself", Goal(1.35, "times"), adapter)
ATTENTION = Row("attention", "attention", Goal(1, "times"), attention)
RESUME = Row("resume", "resume", Goal(1, "seconds"), resume)

ROWS = (DATA, STEP, BATCH, LOKR, ATTENTION, RESUME)
