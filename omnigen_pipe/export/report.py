"""What a person must know of an export, in sentences."""

from __future__ import annotations

from collections.abc import Sequence

from omnigen_pipe.export.merged import Merged
from omnigen_pipe.model.merging import Rounding

#: Less survival, or a larger error, is worth a word of advice.
_SURVIVAL, _ERROR = 0.95, 0.5


def survival_notes(merged: Merged, dtype: str) -> list[str]:
    """What survived of the adapter's change in `dtype`, and once loaded in bfloat16."""
    if merged.worst is None:
        return ["The adapter changes nothing: these are the base's weights."]
    worst, least = merged.worst
    found = [
        f"Of the adapter's change {_figures(merged.overall, f' in {dtype}')}; least of {worst}: "
        f"{least.survival or 0.0:.1%}."
    ]
    if dtype != "bf16":
        found.append(
            f"Loaded in bf16, as the authors' code always does and most users of diffusers do, "
            f"{_figures(merged.in_bf16)}."
        )
    if dtype != "fp32" and (problem := _problem(merged.overall)):
        found.append(
            f"{problem}: the change is small beside the distance between two numbers of that "
            "dtype. --dtype fp32 keeps it, but only where it is also loaded in float32; the "
            "adapter itself, used beside the base, keeps it everywhere."
        )
    elif problem := _problem(merged.in_bf16):
        found.append(
            f"{problem} there: load this export as it is stored (diffusers: torch_dtype="
            f"torch.{'float16' if dtype == 'fp16' else 'float32'}), or use the adapter itself "
            "beside the base."
        )
    return found


def leftover_notes(leftovers: Sequence[str]) -> list[str]:
    """What lies about of earlier exports; `leftovers` are of `folder.leftovers`."""
    if not leftovers:
        return []
    return [
        f"Beside it lies {leftovers[0]}, left by an export that was killed. Unless one is running "
        "now, delete it."
    ]


def _figures(rounding: Rounding, where: str = "") -> str:
    survival, error = rounding.survival or 0.0, rounding.relative_error or 0.0
    return f"{survival:.1%} survives{where}, with an error of {error:.1%} of its size"


def _problem(rounding: Rounding) -> str | None:
    """What is wrong with what is left, as the beginning of a sentence; None where it is fine."""
    if (rounding.survival or 0.0) < _SURVIVAL:
        return "Much of it is lost"
    if (rounding.relative_error or 0.0) > _ERROR:
        return "The noise of rounding is large beside it"
    return None
