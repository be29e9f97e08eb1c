"""How much of what was asked is drawn right: scenes drawn by a model, and measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

from PIL import Image

from omnigen_pipe.sampling.requests import Request, Settings
from omnigen_pipe.world.recognition import Verdict, judge
from omnigen_pipe.world.scenes import Scene

#: Pictures that are drawn at once.
BATCH = 32


@dataclass(frozen=True)
class Rates:
    """Shares of what was asked: of things in the right colour, of the right shape, of the named
    size, of pictures with the named background, of pictures in which everything has its colour and
    its shape, and of pictures in which size and background are right, too, where they are named.
    Where more is seen than was asked, no shape is right."""

    pictures: int
    colours: float
    shapes: float
    sizes: float
    backgrounds: float
    colours_and_shapes: float
    right: float

    def as_json(self) -> dict[str, Any]:
        """The values by name."""
        return asdict(self)


def draw_scenes(
    pipe: Any,
    scenes: Sequence[Scene],
    settings: Settings,
    seed: int = 0,
    on_picture: Callable[[int], object] = lambda count: None,
    on_step: Callable[[], object] = lambda: None,
) -> list[Image.Image | None]:
    """A picture for the sentence of each scene, in the scene's size; the n-th has the seed
    `seed` + n. None takes the place of one that came out as something else than numbers.
    `on_step` is called after each step of a batch."""
    from omnigen_pipe.sampling.pipeline import draw

    pictures: dict[int, Image.Image | None] = {}
    for width, height in sorted({(scene.width, scene.height) for scene in scenes}):
        sized = settings.changed({"width": width, "height": height}, "scene")
        mine = [n for n, s in enumerate(scenes) if (s.width, s.height) == (width, height)]
        # Attention computes neighbours with prompts of one length together.
        mine.sort(key=lambda n: len(scenes[n].caption.split()))
        for start in range(0, len(mine), BATCH):
            numbers = mine[start : start + BATCH]
            requests = [Request(str(n), scenes[n].caption, seed + n) for n in numbers]
            drawn = draw(pipe, requests, sized, nullcontext(), on_step)
            pictures.update(zip(numbers, drawn, strict=True))
            on_picture(len(numbers))
    return [pictures[number] for number in range(len(scenes))]


def measure(pictures: Sequence[Image.Image | None], scenes: Sequence[Scene]) -> Rates:
    """The rates of `pictures`, one for each of `scenes`; in a None everything is wrong."""
    verdicts = [_verdict(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
    return Rates(
        len(verdicts),
        _share([right for verdict in verdicts for right in verdict.colours]),
        _share([right for verdict in verdicts for right in verdict.shapes]),
        _share([right for verdict in verdicts for right in verdict.sizes if right is not None]),
        _share([v.background for v in verdicts if v.background is not None]),
        _share([all((*verdict.colours, *verdict.shapes)) for verdict in verdicts]),
        _share([verdict.right for verdict in verdicts]),
    )


def _verdict(picture: Image.Image | None, scene: Scene) -> Verdict:
    if picture is not None:
        return judge(picture, scene)
    empty = judge(Image.new("RGB", (scene.width, scene.height)), scene)
    return empty if empty.background is None else replace(empty, background=False)


def _share(results: Sequence[bool]) -> float:
    return sum(results) / max(1, len(results))
