"""How many bytes the base model's weights take, by their precision."""

from __future__ import annotations

import math

import torch

#: Bytes of a float32.
FLOAT32 = 4
#: Numbers that share a scale: quanto's int4, bitsandbytes' nf4.
_INT4_GROUP = 128
_NF4_BLOCK = 64


def weight_bytes(shape: tuple[int, int], precision: str, base_dtype: torch.dtype) -> int:
    """Bytes of the weight of one linear layer of `shape` (out, in), with its scales.

    `base_dtype`: of the unquantised model. A scale is counted for each output channel in 8 bits,
    a scale and a shift for each group in int4, a float32 for each block in nf4. Raises
    `ValueError` for a `base_model_precision` that is not known.
    """
    numbers = math.prod(shape)
    if precision == "no_change":
        return numbers * base_dtype.itemsize
    if precision in ("int8-quanto", "fp8-quanto", "int8-torchao", "fp8-torchao", "int8-bnb"):
        return numbers + shape[0] * FLOAT32
    if precision == "int4-quanto":
        return numbers // 2 + numbers // _INT4_GROUP * 2 * base_dtype.itemsize
    if precision == "nf4-bnb":
        return numbers // 2 + numbers // _NF4_BLOCK * FLOAT32
    raise ValueError(f"base_model_precision {precision} is not known")
