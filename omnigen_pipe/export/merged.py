"""The base's tensors with the adapter's changes, one at a time, and what is left of the changes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch

from manifests.errors import PipeError
from omnigen_pipe.export.base import Stored
from omnigen_pipe.model.merging import Delta, Rounding, merge

#: What `--dtype` may be; without it every tensor keeps the base's.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def short(dtype: torch.dtype) -> str:
    """A dtype's name as `--dtype` has it, where it has one."""
    names = {kind: name for name, kind in DTYPES.items()}
    return names.get(dtype, str(dtype).removeprefix("torch."))


class Merged:
    """A merged model that is never whole in memory; it notes what is left of each change, in the
    dtype that is written and in bfloat16, which most programs load whatever is written."""

    def __init__(
        self, stored: Mapping[str, Stored], changes: Mapping[str, Delta], factor: float
    ) -> None:
        self._stored, self._changes, self._factor = stored, changes, factor
        self._roundings: dict[str, Rounding] = {}
        self._in_bf16: dict[str, Rounding] = {}

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The tensor as it is to be written; raises `PipeError` where a number does not fit."""
        weight = self._stored[name].read()
        if name in self._changes:
            result, (self._roundings[name], self._in_bf16[name]) = merge(
                weight, self._changes[name], self._factor, dtype, (torch.bfloat16,)
            )
        elif weight.dtype == dtype:
            return weight
        else:
            result = weight.to(dtype)
        # Smallest and largest, NaN where there is one: a mask would be as large as the tensor.
        if result.numel() and not all(map(torch.isfinite, torch.aminmax(result))):
            raise PipeError(
                f"{name} holds numbers that are not finite, or that {short(dtype)} is too narrow "
                "for: try --dtype bf16 or fp32."
            )
        return result

    @property
    def overall(self) -> Rounding:
        """What is left of the adapter's change as a whole."""
        return reduce(lambda a, b: a + b, self._roundings.values(), Rounding())

    @property
    def in_bf16(self) -> Rounding:
        """The same where what is written is loaded in bfloat16."""
        return reduce(lambda a, b: a + b, self._in_bf16.values(), Rounding())

    @property
    def worst(self) -> tuple[str, Rounding] | None:
        """The weight of whose change the least survives; None where nothing changes."""
        known = [(name, r) for name, r in self._roundings.items() if r.survival is not None]
        return min(known, key=lambda one: one[1].survival or 0.0) if known else None

    def figures(self) -> dict[str, Any]:
        """Survival and error, overall and of the worst weight, for the marker and the JSON."""
        worst = self.worst
        return {
            "modules": len(self._roundings),
            **_figures(self.overall),
            "worst": worst and {"weight": worst[0], **_figures(worst[1])},
            "loaded_in_bf16": _figures(self.in_bf16),
        }


def _figures(rounding: Rounding) -> dict[str, Any]:
    return {"survival": rounding.survival, "relative_error": rounding.relative_error}
