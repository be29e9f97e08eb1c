"""What pictures and grids say of how they were made: text by key, for PNG files.

No paths, which concern nobody else. Numbers are written so that they are read again as they were.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Protocol

from manifests.parquet import tool_version
from omnigen_pipe.model.provenance import Provenance
from omnigen_pipe.model_files import Model
from omnigen_pipe.sampling.requests import Request, Settings, exact


class Draws(Protocol):
    """What draws, as far as pictures speak of it: `drawer.Drawer`, or a training."""

    @property
    def source(self) -> Model:
        """The model."""
        ...

    @property
    def base_precision(self) -> str:
        """`base_model_precision` of the workspace."""
        ...

    @property
    def provenance(self) -> Provenance | None:
        """Which adapter; None without one."""
        ...


def picture_metadata(
    drawer: Draws, dtype: str, settings: Settings, request: Request
) -> dict[str, str]:
    """Of the picture of `request`; `dtype` is what the transformer computed in."""
    entries = {
        "prompt": request.prompt,
        "seed": str(request.seed),
        **_settings_entries(settings),
        **model_entries(drawer, dtype),
    }
    if request.strength is not None:
        entries["strength"] = exact(request.strength)
    return entries


def grid_metadata(
    drawer: Draws, dtype: str, settings: Settings, drawn: Sequence[Request]
) -> dict[str, str]:
    """Of the grid of those that were `drawn`, which it lists in its order."""
    pictures = [{"prompt": request.prompt, "seed": request.seed} for request in drawn]
    if drawer.provenance is not None:
        strengths = [{"strength": request.strength} for request in drawn]
        pictures = [{**one, **other} for one, other in zip(pictures, strengths, strict=True)]
    return {
        "pictures": json.dumps(pictures, ensure_ascii=False),
        **_settings_entries(settings),
        **model_entries(drawer, dtype),
    }


def _settings_entries(settings: Settings) -> dict[str, str]:
    return {
        "negative_prompt": settings.negative_prompt,
        "steps": str(settings.num_inference_steps),
        "guidance": exact(settings.guidance_scale),
        "size": settings.size,
    }


def model_entries(drawer: Draws, dtype: str) -> dict[str, str]:
    """Of what drew: whatever identifies the model and the adapter belongs here."""
    source = drawer.source
    entries = {
        "model": source.label,
        "precision": dtype,
        "software": f"omnigen-pipe {tool_version()}",
    }
    if source.revision is not None:
        entries["revision"] = source.revision
    if source.vae is not None:
        entries["vae"] = Model(source.vae, source.start).label
    if drawer.base_precision != "no_change":
        entries["base_model_precision"] = drawer.base_precision
    if drawer.provenance is not None:
        entries |= drawer.provenance.as_text()
    return entries
