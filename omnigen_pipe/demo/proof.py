"""Before and after: what the adapter has taught the embedded model, and what it has cost.

The same sentences are drawn twice, without and with the adapter, from the same noise, and judged
by image measurements that know nothing of the model. The adapter was trained on none of the
sentences; the base model was, on 35 of the 100 without the new word.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3
from PIL import Image

from manifests.publish import publishing
from omnigen_pipe.demo.pictures import KNOWN, NEW, judged_scenes
from omnigen_pipe.device import pick_device
from omnigen_pipe.embedded.rates import Rates, draw_scenes, measure
from omnigen_pipe.progress import Progress
from omnigen_pipe.sampling.grid import grid_picture
from omnigen_pipe.sampling.requests import Settings
from omnigen_pipe.sampling.source import Source
from omnigen_pipe.stop import StopRequest, stop_on_signal
from omnigen_pipe.workspace import Workspace
from omnigen_pipe.world import recognition
from omnigen_pipe.world.scenes import Scene

GRID_NAME, RATES_NAME = "before-and-after.png", "before-and-after.json"
#: Less guidance than the base model's own, because it enlarges what the adapter does, too; and as
#: few steps as draw what is known no worse.
DRAWING = {"guidance_scale": 2.0, "num_inference_steps": 8}
#: How many of each the grid shows.
_SHOWN = 6


@dataclass(frozen=True)
class Proof:
    """Rates of the new shape and of the known world, without and with the adapter."""

    new_before: Rates
    new_after: Rates
    known_before: Rates
    known_after: Rates

    def as_json(self) -> dict[str, Any]:
        """The rates by name."""
        return {name: rates.as_json() for name, rates in vars(self).items()}

    def sentences(self) -> list[str]:
        """What a person reads of it."""
        return [
            f"{what}: {before.right:.0%} drawn right before, {after.right:.0%} after, "
            f"of {after.pictures} sentences"
            for what, before, after in (
                ("The new shape", self.new_before, self.new_after),
                ("The known ones", self.known_before, self.known_after),
            )
        ]


def prove(workspace: Workspace, adapter: Path, progress: Progress, device: str | None) -> Proof:
    """Draw and judge with and without `adapter`, and publish the grid and the rates; what was
    judged already of the same models, sentences and settings is read again.

    Raises `Stopped` where a signal asks for it while pictures are drawn; nothing is kept of them.
    """
    scenes = judged_scenes(NEW, KNOWN)
    identity = _identity(workspace, adapter, scenes)
    known = _read(workspace.root / RATES_NAME, identity)
    if known is not None and (workspace.root / GRID_NAME).exists():
        return known
    with stop_on_signal() as stop:
        before = _drawn(workspace, None, scenes, progress, device, stop)
        after = _drawn(workspace, adapter, scenes, progress, device, stop)
    proof = Proof(
        measure(before[:NEW], scenes[:NEW]),
        measure(after[:NEW], scenes[:NEW]),
        measure(before[NEW:], scenes[NEW:]),
        measure(after[NEW:], scenes[NEW:]),
    )
    with publishing(workspace.staging, workspace.root / GRID_NAME) as path:
        _grid(before, after, scenes).save(path, format="PNG")
    with publishing(workspace.staging, workspace.root / RATES_NAME) as path:
        text = json.dumps({"judged": identity, **proof.as_json()}, indent=2)
        path.write_text(text + "\n", encoding="utf-8")
    return proof


def _identity(workspace: Workspace, adapter: Path, scenes: list[Scene]) -> str:
    """Of all that decides what is judged: the weights, the sentences, the settings, the judge."""
    source = Source.of(workspace)
    hashed = blake3()
    parts = [source.part(name) for name in ("transformer", "vae", "tokenizer", "scheduler")]
    for path in (adapter, *(path for part in parts for path in sorted(part.iterdir()))):
        hashed.update(path.read_bytes())
    hashed.update(repr((scenes, _settings(source), recognition.VERSION)).encode())
    return hashed.hexdigest()


def _settings(source: Source) -> Settings:
    """How the sentences are drawn, with and without the adapter."""
    return source.settings().changed(DRAWING, "demo")


def _drawn(
    workspace: Workspace,
    adapter: Path | None,
    scenes: list[Scene],
    progress: Progress,
    device: str | None,
    stop: StopRequest,
) -> list[Image.Image | None]:
    import torch

    source = Source.of(workspace)
    pipe = source.pipeline(source.tokenizer(), pick_device(device), torch.float32, adapter)
    label = "Drawing with the adapter" if adapter else "Drawing without the adapter"
    stop.obey()
    with progress.task(label, len(scenes)) as advance:
        return draw_scenes(pipe, scenes, _settings(source), on_picture=advance, on_step=stop.obey)


def _grid(
    before: list[Image.Image | None], after: list[Image.Image | None], scenes: list[Scene]
) -> Image.Image:
    """Rows of pictures before, and under each the one after: new shapes, then known ones. One that
    came out as something else than numbers is black."""
    pictures, captions = [], []
    for first in (0, NEW):
        rows = range(first, first + _SHOWN)
        for kind, drawn in (("before", before), ("after", after)):
            pictures += [
                drawn[n] or Image.new("RGB", (scenes[n].width, scenes[n].height)) for n in rows
            ]
            captions += [f"{kind}: {scenes[n].caption}" for n in rows]
    return grid_picture(pictures, captions, columns=_SHOWN)


def _read(path: Path, identity: str) -> Proof | None:
    """The proof in `path`, if it is of that identity."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if entries.pop("judged") != identity:
            return None
        return Proof(**{name: Rates(**rates) for name, rates in entries.items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # not there, or not whole: it is made anew
