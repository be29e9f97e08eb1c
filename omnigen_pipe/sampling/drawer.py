"""The drawer: what draws and how it computes, and the pictures as they come, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnigen_pipe.model.provenance import Provenance, read_provenance
from omnigen_pipe.sampling.requests import Request, Settings
from omnigen_pipe.sampling.source import Source

if TYPE_CHECKING:
    import torch
    from PIL import Image


@dataclass(frozen=True)
class Drawer:
    """A model, an adapter's file, and where and how they compute.

    `precision`, `base_precision` and `via` are `mixed_precision`, `base_model_precision` and
    `quantize_via` of a workspace.
    """

    source: Source
    adapter: Path | None = None
    device: str | None = None
    precision: str = "auto"
    base_precision: str = "no_change"
    via: str = "cpu"
    batch_size: int = 1

    @cached_property
    def provenance(self) -> Provenance | None:
        """Which adapter it is; its file is read once."""
        return None if self.adapter is None else read_provenance(self.adapter)


def batches(requests: Sequence[Request], size: int) -> list[list[Request]]:
    """`requests` in their order, at most `size` together, and all of one strength."""
    return [
        same[start : start + size]
        for same in (list(group) for _, group in groupby(requests, lambda r: r.strength))
        for start in range(0, len(same), size)
    ]


def drawn(
    pipe: Any,
    dtype: torch.dtype,
    batch: Sequence[Request],
    settings: Settings,
    on_step: Callable[[], object],
    say: Callable[[str], object],
) -> Iterator[tuple[Request, Image.Image | None]]:
    """The pictures of one of `batches` with their requests; `draw` says what None means.

    The transformer's passes are in `dtype`, as in training: the base model's, and the adapter's.
    """
    import torch

    from omnigen_pipe.sampling.pipeline import draw, set_strength

    if batch[0].strength is not None:
        set_strength(pipe, batch[0].strength)
    autocast = torch.autocast(pipe.device.type, dtype=dtype, enabled=dtype != torch.float32)
    yield from zip(batch, draw(pipe, batch, settings, autocast, on_step, say), strict=True)
