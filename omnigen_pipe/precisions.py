"""Names of `base_model_precision`: those that train, and those that are refused, with the reason.

The names are SimpleTuner's. They stand apart from the code that quantises, so that a
configuration is checked without loading torch.
"""

from __future__ import annotations

from typing import Any, Literal

#: What a frozen base model can be stored as while an adapter is trained on it.
BasePrecision = Literal[
    "no_change",
    "int8-quanto",
    "int4-quanto",
    "fp8-quanto",
    "int8-torchao",
    "fp8-torchao",
    "int8-bnb",
    "nf4-bnb",
]

#: Other names for the same.
SPELLINGS = {"fp8wo-torchao": "fp8-torchao"}

_ACTIVATIONS = "it quantises activations too, and gradients of the adapter become wrong"
_SDNQ = "it needs the library SDNQ, which is not used here"

#: SimpleTuner's other names: why each is refused, and what to take.
REFUSED = {
    "int2-quanto": "two bits lose too much: on a small model the output is off by 22 % and the "
    "cosine of the adapter's gradients with the right ones is 0.88. Take int4-quanto or nf4-bnb",
    "fp8uz-quanto": "it is as large as fp8-quanto and no more accurate. Take fp8-quanto",
    "int4-torchao": "torchao's int4 weights have no backward pass. Take int4-quanto or nf4-bnb",
    "int8dq-torchao": f"{_ACTIVATIONS} (cosine 0.66). Take int8-torchao",
    "int8dq-int4-torchao": f"{_ACTIVATIONS} (cosine 0.66), and its 4-bit weights lie in 8 bits "
    "each. Take int4-quanto or nf4-bnb",
    "fp8-int4-torchao": "torchao's int4 weights have no backward pass. Take int4-quanto or nf4-bnb",
    "fp8-native": "it is a format of SimpleTuner's own. Take fp8-torchao or fp8-quanto",
    "fp8-transformerengine": "it needs NVIDIA's Transformer Engine, which is not used here. Take "
    "fp8-torchao or fp8-quanto",
    "int16-sdnq": f"{_SDNQ}. Take no_change with mixed_precision bf16, which is as small",
    "uint16-sdnq": f"{_SDNQ}. Take no_change with mixed_precision bf16, which is as small",
    "fp16-sdnq": f"{_SDNQ}. Take no_change with mixed_precision bf16, which is as small",
    "fp8-sdnq": f"{_SDNQ}. Take fp8-torchao or fp8-quanto",
    "int8-sdnq": f"{_SDNQ}. Take int8-torchao or int8-quanto",
    "uint8-sdnq": f"{_SDNQ}. Take int8-torchao or int8-quanto",
    "int6-sdnq": f"{_SDNQ}. Take int8-torchao, int4-quanto or nf4-bnb",
    "int5-sdnq": f"{_SDNQ}. Take int8-torchao, int4-quanto or nf4-bnb",
    "uint5-sdnq": f"{_SDNQ}. Take int8-torchao, int4-quanto or nf4-bnb",
    "uint4-sdnq": f"{_SDNQ}. Take int4-quanto or nf4-bnb",
    "uint3-sdnq": f"{_SDNQ}. Take int4-quanto or nf4-bnb",
    "uint2-sdnq": f"{_SDNQ}. Take int4-quanto or nf4-bnb",
}


def spelled(name: Any) -> Any:
    """The name as it is written here; raises `ValueError` with the reason for a refused one."""
    if isinstance(name, str) and name in REFUSED:
        raise ValueError(f'base_model_precision "{name}" is not possible: {REFUSED[name]}')
    return SPELLINGS.get(name, name) if isinstance(name, str) else name
