"""Merging an adapter into the weights that it adapts, and what of it a coarser dtype keeps.

Pure: tensors in, tensors and figures out; the adapter's tensors say all that is needed, LyCORIS is
not. LyCORIS' own `merge_to` applies alpha / rank twice, its forward pass once; what is merged here
is what the forward pass in bypass mode computes:

    W + strength * scale * kron(w1, w2)

with scale = alpha / rank, and 1 where both factors are full matrices, whatever alpha is. The sum is
formed in float32 and rounded once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from manifests.errors import PipeError, UsageError
from omnigen_pipe.model.lokr import PREFIX

_FULL = ("lokr_w1", "lokr_w2")


@dataclass(frozen=True)
class Delta:
    """The change of one linear layer: `scale * kron(w1, w2)`, the factors in float32."""

    w1: torch.Tensor
    w2: torch.Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the change, and so of the weight that it belongs to."""
        return self.w1.shape[0] * self.w2.shape[0], self.w1.shape[1] * self.w2.shape[1]

    @property
    def norm(self) -> float:
        """Its Frobenius norm: that of a Kronecker product is the product of the factors'."""
        return abs(self.scale) * float(self.w1.norm()) * float(self.w2.norm())

    def matrix(self, strength: float = 1.0) -> torch.Tensor:
        """The change at `strength`, written out, float32 `[rows, columns]`."""
        return torch.kron(self.w1, self.w2).mul_(strength * self.scale)


@dataclass(frozen=True)
class Rounding:
    """How much of a change d is still there once weights are rounded: squared norms, which add up.

    Written is c = round(W + d) - round(W), the difference between the merged weights and the base's
    in the dtype that both are used in. Of a base stored in that dtype round(W) is W.
    """

    meant: float = 0.0
    written: float = 0.0
    error: float = 0.0

    def __add__(self, other: Rounding) -> Rounding:
        return Rounding(
            self.meant + other.meant, self.written + other.written, self.error + other.error
        )

    @property
    def survival(self) -> float | None:
        """<c, d> / <d, d>: 1 where the change is there as a whole, 0 where it was rounded away;
        None where there is no change."""
        if not self.meant:
            return None
        # <c, d> = (|c|² + |d|² - |c - d|²) / 2, which needs no product of the two.
        return (self.written + self.meant - self.error) / (2 * self.meant)

    @property
    def relative_error(self) -> float | None:
        """|c - d| / |d|: what rounding adds or takes, in units of the change."""
        return math.sqrt(self.error / self.meant) if self.meant else None


def read_deltas(tensors: Mapping[str, torch.Tensor], who: str = "The adapter") -> dict[str, Delta]:
    """The change of every module of an adapter file, by LyCORIS' name of the module.

    `who` is what messages call the adapter. Raises `UsageError` where a tensor belongs to no LoKr
    of linear layers, and `PipeError` where one is missing or does not fit its neighbour.
    Whether they are finite is known by `lokr.read_adapter`.
    """
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        parts.setdefault(module, {})[part] = tensor
    if not parts:
        raise PipeError(f"{who} is empty.")
    return {module: delta_of(module, part, who) for module, part in sorted(parts.items())}


def delta_of(module: str, parts: Mapping[str, torch.Tensor], who: str = "The adapter") -> Delta:
    """The change of one module from its tensors, named as LyCORIS names them; `read_deltas`."""
    allowed = {"alpha", *(name + end for name in _FULL for end in ("", "_a", "_b"))}
    if more := sorted(parts.keys() - allowed):
        raise UsageError(
            f"{who} has a tensor {module}.{more[0]}: only LoKr of linear layers, without weight "
            "decomposition, can be read."
        )
    w1, w2 = (_factor(module, parts, name, who) for name in _FULL)
    if all(name in parts for name in _FULL):
        return Delta(w1, w2, 1.0)
    if "alpha" not in parts:
        raise PipeError(f"{who} is damaged: {module}.alpha, which scales it, is missing.")
    rank = parts["lokr_w2_b" if "lokr_w2_b" in parts else "lokr_w1_b"].shape[0]
    return Delta(w1, w2, float(parts["alpha"]) / rank)


def _factor(module: str, parts: Mapping[str, torch.Tensor], name: str, who: str) -> torch.Tensor:
    """One factor, float32: as it is stored, or the product of its two low-rank matrices."""
    both = (f"{name}_a", f"{name}_b")
    stored = [name] if name in parts else list(both)
    if missing := [part for part in stored if part not in parts]:
        raise PipeError(f"{who} is damaged: {module}.{missing[0]} is missing.")
    if name in parts and any(part in parts for part in both):
        raise PipeError(f"{who} is damaged: {module}.{name} is there twice, whole and low-rank.")
    matrices = [parts[part].to(torch.float32) for part in stored]
    if any(matrix.ndim != 2 for matrix in matrices):
        raise UsageError(
            f"{who} changes something else than linear layers: {module}.{name} is no matrix. Only "
            "LoKr of linear layers can be read."
        )
    if len(matrices) == 1:
        return matrices[0]
    if matrices[0].shape[1] != matrices[1].shape[0]:
        shapes = " and ".join(str(tuple(matrix.shape)) for matrix in matrices)
        raise PipeError(f"{who} is damaged: {module}.{name}_a and _b do not fit, {shapes}.")
    return matrices[0] @ matrices[1]


def by_weight(
    deltas: Mapping[str, Delta], shapes: Mapping[str, tuple[int, ...]], who: str = "The adapter"
) -> dict[str, Delta]:
    """The changes by the name of the weight that each belongs to.

    `shapes` are those of all tensors of the transformer, by name; `who` is what messages call the
    adapter. Raises `UsageError` where a module is none of its linear layers, or is one of another
    shape.
    """
    weights = {
        f"{PREFIX}_{name.removesuffix('.weight')}".replace(".", "_"): name
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and not name.startswith("embed_tokens.")
    }
    if unknown := sorted(deltas.keys() - weights.keys()):
        raise UsageError(
            f"{who} changes {len(unknown)} modules that are no linear layers of this model, "
            f"such as {unknown[0]}: it was trained on another model."
        )
    found = {weights[module]: delta for module, delta in deltas.items()}
    for name, delta in found.items():
        if delta.shape != tuple(shapes[name]):
            theirs, ours = (" x ".join(map(str, s)) for s in (delta.shape, shapes[name]))
            raise UsageError(
                f"{who} was trained on a model of another size: its change of {name} is {theirs}, "
                f"and this model's weight {ours}."
            )
    return found


def merge(
    weight: torch.Tensor,
    delta: Delta,
    strength: float,
    dtype: torch.dtype,
    loaded: Sequence[torch.dtype] = (),
) -> tuple[torch.Tensor, tuple[Rounding, ...]]:
    """`weight` with `delta` at `strength`, in `dtype`, and how much of the change is left there,
    and then where that is loaded in each of the dtypes `loaded`.

    `weight` stays as it is. At strength 0 the result is the weight itself, to the last bit.
    """
    if strength == 0:
        return weight.to(dtype), (Rounding(),) * (1 + len(loaded))
    exact = weight.to(torch.float32)
    change = delta.matrix(strength)
    rounded = (exact + change).to(dtype)
    return rounded, tuple(_rounding(exact, change, rounded, kind) for kind in (dtype, *loaded))


def _rounding(
    exact: torch.Tensor, change: torch.Tensor, merged: torch.Tensor, dtype: torch.dtype
) -> Rounding:
    """What is left of `change` where `merged` and the base, which is `exact`, are in `dtype`."""
    written = merged.to(dtype).to(torch.float32) - exact.to(dtype).to(torch.float32)
    meant, found = _squared(change), _squared(written)
    return Rounding(meant, found, _squared(written.sub_(change)))


def _squared(tensor: torch.Tensor) -> float:
    """The sum of squares, formed in float64 without a copy in it."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2
