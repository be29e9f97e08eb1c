"""The frozen base model in fewer bits: the linear layers of its blocks, by established libraries.

Only the weights of `transformer.layers.*` are quantised, 96 % of OmniGen; embeddings, norms and
the projections at both ends stay as they are. To be done before the adapter is attached, because
bitsandbytes and quanto put modules of their own in the place of linear layers. What trains with
LyCORIS in bypass mode was measured; other names are refused by the configuration
(`omnigen_pipe.precisions`). Given up: quantising while the file is read, so the CPU holds the
whole model in its base dtype once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from manifests.errors import UsageError
from omnigen_pipe.quiet import quiet_imports

_INSTALL = "Install it with: pip install 'omnigen-pipe[quantised]'"
_PACKAGES = {"quanto": "optimum-quanto", "torchao": "torchao", "bnb": "bitsandbytes"}

#: quanto's group of int4 weights that share a scale; less by steps of 32 until it divides a row.
_QUANTO_GROUP, _QUANTO_STEP = 128, 32
#: bitsandbytes' blocks: weights under one 8-bit scale, and such scales under one of 32 bits.
_NF4_BLOCK, _NF4_NESTED = 64, 256
#: Its two tables of float32 values, of nf4 and of the scales, and the scales' offset.
_NF4_TABLES = (16 + 256 + 1) * 4


def quantise(transformer: Any, precision: str, device: torch.device, via: str) -> None:
    """Quantise the linear layers of `transformer.layers` in place, and move the blocks to `device`.

    `via` "cpu": each block is quantised where it lies, then moved, so `device` never holds an
    unquantised one; "accelerator": it is moved first, which may be faster. Everything outside the
    blocks is left where it is. All parameters are frozen afterwards. Raises `UsageError` where
    `check_available` would.
    """
    if precision == "no_change":
        return
    check_available(precision, device, transformer.dtype)
    for block in transformer.layers:
        _quantise_module(block, precision, device, via)


def check_available(
    precision: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> None:
    """Raise `UsageError` where the package is missing or `device` cannot compute it.

    Tries it: a small layer of base dtype `dtype` is quantised, run forward and backward.
    """
    if precision == "no_change":
        return
    package = _PACKAGES[precision.rsplit("-", 1)[1]]
    probe = nn.Sequential(nn.Linear(2 * _QUANTO_GROUP, _QUANTO_GROUP, bias=False, dtype=dtype))
    probe.requires_grad_(False)
    try:
        _quantise_module(probe, precision, device, "cpu")
        x = torch.ones(2, 2 * _QUANTO_GROUP, dtype=dtype, device=device, requires_grad=True)
        probe(x).sum().backward()
    except ModuleNotFoundError as error:
        raise UsageError(
            f"base_model_precision {precision} needs {package}, and there is no module "
            f"{error.name}. {_INSTALL}"
        ) from error
    # What the libraries raise where a kernel is missing for a device, cannot be built, or refuses.
    except (ImportError, RuntimeError, AssertionError, OSError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"base_model_precision {precision} ({package}) does not run on {device}: {first}. "
            "Take another one, or no_change."
        ) from error


def stored_bytes(shape: tuple[int, int], precision: str, base_dtype: torch.dtype) -> int:
    """Bytes of the weight of one linear layer of `shape` (out, in), with its scales.

    `base_dtype` is what the model is loaded in; quanto keeps its scales in it.
    """
    rows, columns = shape
    number = rows * columns
    if precision == "no_change":
        return number * base_dtype.itemsize
    if precision in ("int8-quanto", "fp8-quanto"):
        return number + rows * base_dtype.itemsize
    if precision == "int4-quanto":
        # A scale and a shift per group.
        return number // 2 + 2 * (number // _quanto_group(columns)) * base_dtype.itemsize
    if precision == "int8-torchao":
        # A scale of 32 bits and a zero point of 8, which is always 0, per row.
        return number + rows * (4 + 1)
    if precision in ("fp8-torchao", "int8-bnb"):
        return number + rows * 4
    if precision == "nf4-bnb":
        blocks = math.ceil(number / _NF4_BLOCK)
        return math.ceil(number / 2) + blocks + math.ceil(blocks / _NF4_NESTED) * 4 + _NF4_TABLES
    raise ValueError(f"unknown precision {precision}")


def _quanto_group(columns: int) -> int:
    """How many weights of a row share a scale in quanto's int4; the whole row where none fits."""
    for group in range(_QUANTO_GROUP, 0, -_QUANTO_STEP):
        if columns > _QUANTO_GROUP and columns % group == 0:
            return group
    return columns


def _quantise_module(module: nn.Module, precision: str, device: torch.device, via: str) -> None:
    """Quantise every linear layer inside `module`, and move it to `device`, frozen."""
    with quiet_imports():
        _QUANTISERS[precision](module, device, via == "cpu")
    # quanto's frozen weights ask for gradients, and would get them.
    module.requires_grad_(False)


def _with_quanto(weights: str) -> Callable[[nn.Module, torch.device, bool], None]:
    def apply(module: nn.Module, device: torch.device, on_cpu: bool) -> None:
        from optimum import quanto

        if not on_cpu:
            module.to(device)
        quanto.quantize(module, weights=getattr(quanto, weights))
        quanto.freeze(module)
        module.to(device)

    return apply


def _with_torchao(config: str) -> Callable[[nn.Module, torch.device, bool], None]:
    def apply(module: nn.Module, device: torch.device, on_cpu: bool) -> None:
        from torchao import quantization

        if not on_cpu:
            module.to(device)
        quantization.quantize_(module, getattr(quantization, config)())
        module.to(device)

    return apply


def _with_bitsandbytes(
    layer: Callable[[nn.Linear], nn.Linear],
) -> Callable[[nn.Module, torch.device, bool], None]:
    def apply(module: nn.Module, device: torch.device, on_cpu: bool) -> None:
        # It warns at every call that inputs of 8-bit layers are cast.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        for parent in list(module.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    quantised = layer(child)
                    # Its weights quantise themselves when they are moved, also to where they
                    # are, and only from the CPU. They are moved one by one, because moving a
                    # whole module leaves the scales of 8-bit weights behind.
                    weight: Any = quantised.weight
                    if on_cpu:
                        weight = weight.to("cpu")
                    quantised.weight = weight.to(device)
                    setattr(parent, name, quantised)
        module.to(device)

    return apply


def _int8_layer(linear: nn.Linear) -> nn.Linear:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    with torch.device("meta"):
        layer = Linear8bitLt(
            linear.in_features, linear.out_features, bias=False, has_fp16_weights=False
        )
    layer.weight = Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    layer.bias = linear.bias
    quantised: nn.Linear = layer
    return quantised


def _nf4_layer(linear: nn.Linear) -> nn.Linear:
    from bitsandbytes.nn import Linear4bit, Params4bit

    options = {"quant_type": "nf4", "compress_statistics": True}
    with torch.device("meta"):
        layer = Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=linear.weight.dtype,
            **options,
        )
    layer.weight = Params4bit(linear.weight.data, requires_grad=False, module=layer, **options)
    layer.bias = linear.bias
    # On some CPUs it would repack the weights for inference in the first pass without gradients,
    # and every pass after that would be without gradients, too.
    layer.support_avx512bf16_for_cpu = False
    quantised: nn.Linear = layer
    return quantised


_QUANTISERS: dict[str, Callable[[nn.Module, torch.device, bool], None]] = {
    "int8-quanto": _with_quanto("qint8"),
    "int4-quanto": _with_quanto("qint4"),
    "fp8-quanto": _with_quanto("qfloat8"),
    "int8-torchao": _with_torchao("Int8WeightOnlyConfig"),
    "fp8-torchao": _with_torchao("Float8WeightOnlyConfig"),
    "int8-bnb": _with_bitsandbytes(_int8_layer),
    "nf4-bnb": _with_bitsandbytes(_nf4_layer),
}
