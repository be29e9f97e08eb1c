"""Bytes of weights, against arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from omnigen_pipe.memory.storage import weight_bytes

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
    assert (
        NUMBERS * bits // 8
        <= weight_bytes(SHAPE, precision, torch.bfloat16)
        <= NUMBERS * bits * 9 // 64
    )


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="int3-quanto"):
        weight_bytes(SHAPE, "int3-quanto", torch.bfloat16)
