"""The base's tensors with the adapter's changes, one at a time, and what is left of the changes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch

from manifests.errors import PipeError
from omnigen_pipe.export.base import Stored
from omnigen_pipe.model.merging import Delta, Survival, merge

#: What `--dtype` may be; without it every tensor keeps the base's.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def short(dtype: torch.dtype) -> str:
    """A dtype's name as `--dtype` has it, where it has one."""
    names = {kind: name for name, kind in DTYPES.items()}
    return names.get(dtype, str(dtype).removeprefix("torch."))


class Merged:
    """A merged model that is never whole in memory; it notes what is left of each change."""

    def __init__(
        self, stored: Mapping[str, Stored], changes: Mapping[str, Delta], factor: float
    ) -> None:
        self._stored, self._changes, self._factor = stored, changes, factor
        self.survivals: dict[str, Survival] = {}

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The tensor as it is to be written; raises `PipeError` where a number does not fit."""
        weight = self._stored[name].read()
        if name in self._changes:
            result, survival = merge(weight, self._changes[name], self._factor, dtype)
            self.survivals[name] = survival
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
    def overall(self) -> Survival:
        """What is left of the adapter's change as a whole."""
        return reduce(lambda a, b: a + b, self.survivals.values(), Survival())

    @property
    def worst(self) -> str | None:
        """The weight of whose change the smallest share is left; None where nothing changes."""
        shares = {n: s.share for n, s in self.survivals.items() if s.share is not None}
        return min(shares, key=lambda name: shares[name] or 0.0) if shares else None

    def figures(self) -> dict[str, Any]:
        """Survival and error, overall and of the worst weight, for the marker and the JSON."""
        worst = self.worst
        return {
            "modules": len(self.survivals),
            "survival": self.overall.share,
            "relative_error": self.overall.relative_error,
            "worst": worst
            and {
                "weight": worst,
                "survival": self.survivals[worst].share,
                "relative_error": self.survivals[worst].relative_error,
            },
        }
