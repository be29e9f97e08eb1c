"""The rows of training: what a batch, a block with its adapter, attention and resuming cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import lokr_modes
import numpy as np
import torch
from table import Bench, Goal, Line, Row, in_turn

from omnigen_pipe.model.attention import by_spans, spans
from omnigen_pipe.model.transformer import assembled
from omnigen_pipe.quiet import quiet_imports
from omnigen_pipe.runs.order import epoch_order

#: Pixels a side, and what a token of the picture covers.
_SIDE, _PATCH = 1024, 16
#: Lengths of four prompts in tokens: short, usual and long ones.
_PROMPTS = (20, 45, 130, 400)
#: Tokens that pass through one block, as of a 512 px picture.
_TOKENS = 1024
#: Where an epoch goes on, in samples.
_POSITION = 1_000_000


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

    def step(mode: str) -> float:
        lokr_modes.set_mode(network, mode)
        return lokr_modes.step(model, network, tokens, torch.float32)

    works = [partial(step, mode) for mode in ("bypass", "no adapter", "rebuild")]
    ours, bare, rebuild = (each[1:] for each in in_turn(bench.repeats + 1, *works))
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
    yield Line("LoKr, LyCORIS' rebuild mode", LOKR.goal, "tokens", tokens, rebuild, bare)


def attention(bench: Bench) -> Iterator[Line]:
    """One layer's attention in two calls without a mask, against one call with the dense mask."""
    prompt, picture = 60, max(64, round((_SIDE // _PATCH) ** 2 * min(1.0, bench.scale)))
    length = prompt + 1 + picture
    shape = (1, 32, length, 96)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(shape, generator=generator) for _ in range(3))
    mask = torch.ones(length, length, dtype=torch.bool)
    mask[: prompt + 1] = torch.ones(prompt + 1, length, dtype=torch.bool).tril()
    call = torch.nn.functional.scaled_dot_product_attention
    with torch.no_grad():
        ours, bare = in_turn(
            bench.repeats + 1,
            partial(_timed, lambda: by_spans(query, key, value, spans([prompt]))),
            partial(_timed, lambda: call(query, key, value, attn_mask=mask[None, None])),
        )
        same = torch.allclose(
            by_spans(query, key, value, spans([prompt])),
            call(query, key, value, attn_mask=mask[None, None]),
            atol=1e-5,
        )
    yield Line(
        "attention",
        ATTENTION.goal,
        "tokens",
        length,
        ours[1:],
        bare[1:],
        failed="" if same else "the two differ",
        note=f"one layer of true width, {length:,} tokens of a {_SIDE} px picture; the dense mask "
        f"alone is {length**2 / 2**20:.0f} MiB as bytes, four times that in float32",
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


BATCH = Row("batch", "batch assembly", Goal(0.01, "seconds"), batch)
LOKR = Row("lokr", "LoKr itself", Goal(1.35, "times"), adapter)
ATTENTION = Row("attention", "attention", Goal(1, "times"), attention)
RESUME = Row("resume", "resume", Goal(1, "seconds"), resume)

ROWS = (BATCH, LOKR, ATTENTION, RESUME)
