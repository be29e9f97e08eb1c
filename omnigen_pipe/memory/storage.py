"""How many bytes numbers take: base weights by precision, optimizer states by optimizer."""

from __future__ import annotations

import math
from collections.abc import Sequence

#: Bytes of a float32.
FLOAT32 = 4
#: Numbers that share a scale: quanto's int4, bitsandbytes' nf4, bitsandbytes' 8-bit states.
_INT4_GROUP = 128
_NF4_BLOCK = 64
_STATE_BLOCK = 256


def weight_bytes(shape: Sequence[int], precision: str, base: int) -> int:
    """Bytes of a linear layer's weight `[out, in]` in `base_model_precision`.

    `base`: bytes of a number of the unquantised model. Scales are counted with it: one for each
    output channel in 8 bits, a scale and a shift for each group in int4, a float32 for each
    block in nf4. Raises `ValueError` for a precision that is not known.
    """
    numbers = math.prod(shape)
    if precision == "no_change":
        return numbers * base
    if precision in ("int8-quanto", "fp8-quanto", "int8-torchao", "fp8-torchao"):
        return numbers + shape[0] * base
    if precision == "int8-bnb":
        return numbers + shape[0] * FLOAT32
    if precision == "int4-quanto":
        return -(-numbers // 2) + -(-numbers // _INT4_GROUP) * 2 * base
    if precision == "nf4-bnb":
        return -(-numbers // 2) + -(-numbers // _NF4_BLOCK) * FLOAT32
    raise ValueError(f"base_model_precision {precision} is not known")


def optimizer_bytes(name: str, numbers: int) -> int:
    """Bytes of the state that the optimizer `name` keeps for `numbers` float32 parameters.

    AdamW keeps two moments, schedule-free AdamW one and a second set of weights, Lion one
    moment, Prodigy two moments, the start and a running sum. In 8 bits a state takes a byte a
    number and a float32 for each block of 256. Paged states are counted as if on the GPU.
    """
    states = 4 if "prodigy" in name else 1 if "lion" in name else 2
    if "8bit" in name:
        return states * (numbers + -(-numbers // _STATE_BLOCK) * FLOAT32)
    return states * numbers * FLOAT32
