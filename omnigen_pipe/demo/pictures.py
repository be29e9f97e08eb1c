"""The demo's pictures: two coloured shapes each, with a caption that says what is seen.

Drawn rather than shipped, so that the demo needs no download and nobody's photographs. Their
sizes differ on purpose: several buckets arise, as from a folder of real photographs.
"""

from __future__ import annotations

import math
import os
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

#: Width and height in pixels, in turn: squares, 4:3, 3:2, 16:9, and the same upright.
SIZES = (
    (256, 256),
    (320, 240),
    (240, 320),
    (360, 240),
    (216, 324),
    (384, 216),
    (225, 400),
    (192, 192),
)

COLOURS = {
    "red": (214, 40, 40),
    "blue": (38, 84, 204),
    "green": (44, 140, 60),
    "yellow": (240, 200, 40),
    "purple": (128, 56, 160),
    "orange": (244, 128, 20),
}
BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "grey": (150, 150, 150)}
SHAPES = ("circle", "square", "triangle", "star")

#: Half of a shape's side, as a part of the picture's shorter side.
_RADIUS = {"large": 0.24, "small": 0.12}


@dataclass(frozen=True)
class Picture:
    """What one picture shows; `first` is left of `second`, or above it in upright pictures."""

    width: int
    height: int
    background: str
    first: tuple[str, str, str]
    second: tuple[str, str, str]

    @property
    def caption(self) -> str:
        """One sentence, such as "a large red circle left of a small blue square on …"."""
        relation = "above" if self.height > self.width else "left of"
        return (
            f"a {' '.join(self.first)} {relation} a {' '.join(self.second)} "
            f"on a {self.background} background"
        )


def imagine(number: int = 48, seed: int = 0) -> list[Picture]:
    """What `number` pictures show, each with a caption of its own: the same for the same seed."""
    draw = random.Random(seed)
    pictures: list[Picture] = []
    captions: set[str] = set()
    while len(pictures) < number:
        width, height = SIZES[len(pictures) % len(SIZES)]
        colours = draw.sample(sorted(COLOURS), 2)
        shapes = draw.sample(SHAPES, 2)
        sizes = draw.choices(sorted(_RADIUS), k=2)
        background = draw.choice(sorted(BACKGROUNDS))
        first, second = zip(sizes, colours, shapes, strict=True)
        picture = Picture(width, height, background, first, second)
        if picture.caption not in captions:
            captions.add(picture.caption)
            pictures.append(picture)
    return pictures


def paint(picture: Picture) -> Image.Image:
    """The picture in RGB."""
    image = Image.new("RGB", (picture.width, picture.height), BACKGROUNDS[picture.background])
    canvas = ImageDraw.Draw(image)
    short = min(picture.width, picture.height)
    for position, (size, colour, shape) in ((0.25, picture.first), (0.75, picture.second)):
        x, y = picture.width * position, picture.height / 2
        if picture.height > picture.width:
            x, y = picture.width / 2, picture.height * position
        _draw_shape(canvas, shape, COLOURS[colour], x, y, _RADIUS[size] * short)
    return image


def _draw_shape(
    canvas: ImageDraw.ImageDraw,
    shape: str,
    colour: tuple[int, int, int],
    x: float,
    y: float,
    radius: float,
) -> None:
    """Draw `shape` around (x, y), everywhere within `radius` pixels of it to the sides."""
    if shape == "circle":
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    elif shape == "square":
        canvas.rectangle((x - radius, y - radius, x + radius, y + radius), fill=colour)
    else:
        corners = 3 if shape == "triangle" else 10
        points = []
        for corner in range(corners):
            reach = radius if shape == "triangle" or corner % 2 == 0 else 0.4 * radius
            angle = 2 * math.pi * corner / corners - math.pi / 2
            points.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
        canvas.polygon(points, fill=colour)


#: Modification time of the drawn files, seconds since 1970: long ago, and always the same.
DRAWN_AT = 1_700_000_000


def draw_pictures(folder: Path, number: int = 48, seed: int = 0) -> list[Path]:
    """Write the pictures and their captions (`.txt`) into `folder`; returns the images' paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, picture in enumerate(imagine(number, seed)):
        path = folder / f"picture-{index:03}{'.jpg' if index % 3 == 0 else '.png'}"
        paint(picture).save(path, quality=95)
        path.with_suffix(".txt").write_text(picture.caption + "\n", encoding="utf-8")
        # discover reads files once more that were written just before it came, since they may
        # still change; these are complete.
        os.utime(path, (DRAWN_AT, DRAWN_AT))
        paths.append(path)
    return paths
