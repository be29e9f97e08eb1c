"""Bytes of numbers, against arithmetic and against the optimizers themselves."""

from __future__ import annotations

import math

import pytest
import torch

from omnigen_pipe.memory.storage import optimizer_bytes, weight_bytes

SHAPE = (3072, 8192)
NUMBERS = math.prod(SHAPE)


@pytest.mark.parametrize(
    ("precision", "bits"),
    [
        ("no_change", 16),
        ("int8-quanto", 8),
        ("fp8-quanto", 8),
        ("int8-torchao", 8),
        ("fp8-torchao", 8),
        ("int8-bnb", 8),
        ("int4-quanto", 4),
        ("nf4-bnb", 4),
    ],
)
def test_a_weight_takes_its_bits_and_at_most_an_eighth_more_for_scales(
    precision: str, bits: int
) -> None:
    assert NUMBERS * bits // 8 <= weight_bytes(SHAPE, precision, 2) <= NUMBERS * bits * 9 // 64


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="int3-quanto"):
        weight_bytes(SHAPE, "int3-quanto", 2)


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.ndim
    )


@pytest.mark.parametrize("name", ["adamw", "lion", "prodigy", "schedulefree"])
def test_the_table_is_what_the_optimizers_keep(name: str) -> None:
    import lion_pytorch
    import prodigyopt
    import schedulefree

    parameter = torch.nn.Parameter(torch.ones(64, 32))
    classes = {
        "adamw": torch.optim.AdamW,
        "lion": lion_pytorch.Lion,
        "prodigy": prodigyopt.Prodigy,
        "schedulefree": schedulefree.AdamWScheduleFree,
    }
    optimizer = classes[name]([parameter])
    if name == "schedulefree":
        optimizer.train()
    parameter.sum().backward()
    optimizer.step()
    assert _state_bytes(optimizer) == optimizer_bytes(name, parameter.numel())
