"""The peak memory of training, part by part.

Weights, adapter, gradients and optimizer are counted from shapes; activations are traced. What
no one can count without the GPU, CUDA's context and the allocator's gaps, is an assumption and
says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from omnigen_pipe.config import LokrConfig, TrainConfig
from omnigen_pipe.memory.skeleton import Architecture, adapted, blocks
from omnigen_pipe.memory.trace import activation_bytes
from omnigen_pipe.model.quantisation import stored_bytes
from omnigen_pipe.training.optimizers import state_bytes

GIB = 2**30
#: CUDA's context, its libraries' workspaces and the allocator's gaps: assumed, not traced.
CONTEXT = GIB
#: Of a card sold as N GB, N GiB are fitted and about this share of them is offered to CUDA: 23.6
#: of 24, 11.8 of 12, 79 of 80. Error correction (as on a T4) or a desktop take more.
OFFERED = 0.98
#: Names of the parts of an estimate, in its order.
PARTS = (
    "weights",
    "adapter",
    "gradients",
    "optimizer",
    "ema",
    "activations",
    "unpacked",
    "context",
)


@dataclass(frozen=True)
class Estimate:
    """Bytes at the peak of training on one bucket, part by part.

    `unpacked` are quantised weights in the base's dtype, for their turn. `context` is assumed.
    """

    bucket: str
    batch: int
    prompt_tokens: int
    weights: int
    adapter: int
    gradients: int
    optimizer: int
    ema: int
    activations: int
    unpacked: int
    context: int = CONTEXT

    @property
    def total(self) -> int:
        """The sum of all parts, bytes."""
        return sum(getattr(self, part) for part in PARTS)

    @property
    def allocated(self) -> int:
        """What torch's own count of allocations should show: the total without the context."""
        return self.total - self.context

    def as_json(self) -> dict[str, Any]:
        """A machine-readable form, bytes."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class Activations:
    """Bytes of activations for one prompt length, by batch and image tokens.

    They are exactly `constant + batch * (sample + token * image_tokens)`: attention keeps no
    matrix of tokens by tokens. Where only one number of tokens was traced, `token` is 0.
    """

    constant: int
    sample: int
    token: int

    def bytes(self, batch: int, bucket: str) -> int:
        """For `batch` samples of `bucket`."""
        return self.constant + batch * (self.sample + self.token * image_tokens(bucket))


@dataclass(frozen=True)
class Prospect:
    """Everything that estimates of one configuration and prompt length are made of."""

    prompt_tokens: int
    weights: int
    adapter: int
    gradients: int
    optimizer: int
    ema: int
    unpacked: int
    activations: Activations

    def estimate(self, bucket: str, batch: int) -> Estimate:
        """The peak at `batch` samples of `bucket`."""
        return Estimate(
            bucket,
            batch,
            self.prompt_tokens,
            self.weights,
            self.adapter,
            self.gradients,
            self.optimizer,
            self.ema,
            self.activations.bytes(batch, bucket),
            self.unpacked,
        )

    def largest_batch(self, bucket: str, offered: int) -> int:
        """The largest batch of `bucket` whose estimate is at most `offered` bytes; 0: none."""
        one, two = self.estimate(bucket, 1).total, self.estimate(bucket, 2).total
        return max(0, 1 + (offered - one) // (two - one))


def offered_bytes(vram: float) -> int:
    """What a card of `vram` GiB offers to CUDA, bytes."""
    return math.floor(vram * OFFERED * GIB)


def image_tokens(bucket: str) -> int:
    """Tokens of an image of `bucket` (`WIDTHxHEIGHT`): 16x16 pixels each."""
    width, height = sides(bucket)
    return (width // 16) * (height // 16)


def sides(bucket: str) -> tuple[int, int]:
    """Width and height of a bucket in pixels."""
    width, height = (int(side) for side in bucket.split("x"))
    return width, height


def estimate_peak(
    shapes: Architecture,
    train: TrainConfig,
    lokr: LokrConfig,
    bucket: str,
    batch: int,
    prompt_tokens: int,
) -> Estimate:
    """The peak of training on `batch` samples of `bucket`, traced for just these: two traces.

    `prompt_tokens`: of the longest prompt, the template included. `mixed_precision = "auto"`
    counts as bfloat16, for the estimate is of a GPU. Raises `UsageError` where a LoKr target
    does not fit the model.
    """
    traced = _traced(shapes, train, lokr, bucket, batch, prompt_tokens)
    ahead = counted(shapes, train, lokr, prompt_tokens, Activations(traced, 0, 0))
    return ahead.estimate(bucket, batch)


def prospect(
    shapes: Architecture,
    train: TrainConfig,
    lokr: LokrConfig,
    buckets: Sequence[str],
    prompt_tokens: int,
) -> Prospect:
    """The same for every batch of these buckets at once, from two or three points."""
    activations = traced_activations(shapes, train, lokr, buckets, prompt_tokens)
    return counted(shapes, train, lokr, prompt_tokens, activations)


def traced_activations(
    shapes: Architecture,
    train: TrainConfig,
    lokr: LokrConfig,
    buckets: Sequence[str],
    prompt_tokens: int,
) -> Activations:
    """Traced are the largest bucket at batch 1 and 2, and the smallest, if it has fewer tokens."""

    def at(bucket: str, batch: int) -> int:
        return _traced(shapes, train, lokr, bucket, batch, prompt_tokens)

    smallest, largest = min(buckets, key=image_tokens), max(buckets, key=image_tokens)
    one, two = at(largest, 1), at(largest, 2)
    token = 0
    if tokens := image_tokens(largest) - image_tokens(smallest):
        token = (one - at(smallest, 1)) // tokens
    sample = two - one - token * image_tokens(largest)
    return Activations(2 * one - two, sample, token)


def _dtype(train: TrainConfig) -> torch.dtype:
    """Of base weights and autocast on a GPU; float16 has the size of bfloat16."""
    return torch.float32 if train.mixed_precision == "no" else torch.bfloat16


def _traced(
    shapes: Architecture,
    train: TrainConfig,
    lokr: LokrConfig,
    bucket: str,
    batch: int,
    prompt_tokens: int,
) -> int:
    checkpointing = train.gradient_checkpointing
    return activation_bytes(
        shapes, lokr, _dtype(train), checkpointing, sides(bucket), batch, prompt_tokens
    )


def _unpacked_blocks(precision: str, checkpointing: bool, depth: int) -> int:
    """So many blocks' weights are unpacked at once, at the most, where the base is quantised.

    Measured on the CPU (`tests/memory/test_estimate.py`). torchao's tensors are unpacked before
    the multiplication and kept for the backward pass; the other libraries unpack again.
    """
    if precision.endswith("-torchao"):
        return min(2, depth) if checkpointing else depth
    return 1


def counted(
    shapes: Architecture,
    train: TrainConfig,
    lokr: LokrConfig,
    prompt_tokens: int,
    activations: Activations,
) -> Prospect:
    """Count at full depth everything that is not an activation."""
    dtype = _dtype(train)
    precision = train.base_model_precision
    transformer, network = adapted(shapes, blocks(shapes), lokr, dtype)
    linears = {
        id(layer.weight) for layer in transformer.layers.modules() if isinstance(layer, nn.Linear)
    }
    weights = sum(
        stored_bytes(tuple(p.shape), precision, dtype) if id(p) in linears else p.nbytes
        for p in transformer.parameters()
    ) + sum(buffer.nbytes for buffer in transformer.buffers())
    adapter = sum(p.nbytes for p in network.parameters())  # float32, as are gradients and EMA
    unpacked = 0
    if precision != "no_change":
        block = sum(p.nbytes for p in transformer.layers[0].parameters() if id(p) in linears)
        unpacked = block * _unpacked_blocks(precision, train.gradient_checkpointing, blocks(shapes))
    return Prospect(
        prompt_tokens,
        weights,
        adapter=adapter,
        gradients=adapter,
        optimizer=state_bytes(network.parameters(), train),
        ema=adapter if train.use_ema else 0,
        unpacked=unpacked,
        activations=activations,
    )
