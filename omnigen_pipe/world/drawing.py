"""Scenes as pixels: drawn with Pillow, larger than needed and shrunk, so that edges are smooth."""

from __future__ import annotations

import hashlib
import math
import os
import random
from pathlib import Path

from PIL import Image, ImageDraw

from omnigen_pipe.world.scenes import BACKGROUNDS, COLOURS, MADE_UP_SHAPES, NEW_SHAPE, Scene

#: Pixels a side that are drawn for each pixel of the picture.
SUPERSAMPLING = 4
#: The new shape's lower half has this colour, which no word of the known world names.
SECOND_COLOUR = (0, 170, 170)
#: Inner corners of a star, and half the width of a cross's arms, as parts of the radius.
_STAR_INNER, _CROSS_ARM = 0.42, 0.36
#: The new shape is a bar upon a stem, as a T: where the bar ends, and half the stem's width. Both
#: parts are so large that each has latents of its own colour.
_BAR, _STEM = -0.15, 0.42

#: Saved pictures are dated within these years from 2020 on, in seconds since 1970.
_DRAWN_FROM, _DRAWN_WITHIN = 1_577_836_800, 3 * 365 * 24 * 3600

Point = tuple[float, float]


def outline(shape: str) -> list[list[Point]]:
    """The polygons of a shape around (0, 0), within -1 … 1; y grows downwards."""
    if shape == "circle":
        return [_around(64, [1.0])]
    if shape == "square":
        return [[(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]]
    if shape == "triangle":
        return [[(0.0, -0.95), (1.0, 0.85), (-1.0, 0.85)]]
    if shape == "star":
        return [_around(10, [1.0, _STAR_INNER])]
    if shape == "cross":
        a, b = _CROSS_ARM, 1.0
        corners = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a)]
        return [[*corners, *((-x, -y) for x, y in corners)]]
    if shape == NEW_SHAPE:
        bar = [(-1.0, -1.0), (1.0, -1.0), (1.0, _BAR), (-1.0, _BAR)]
        return [bar, [(-_STEM, _BAR), (_STEM, _BAR), (_STEM, 1.0), (-_STEM, 1.0)]]
    if shape in MADE_UP_SHAPES:
        return _made_up(random.Random(shape))
    raise ValueError(f"no shape is called {shape}")


def _made_up(draw: random.Random) -> list[list[Point]]:
    """Two parts, one upon the other, each with three widths to the left and three to the right; at
    least as wide as half of the height."""
    middle = draw.uniform(-0.4, 0.4)
    parts = []
    for top, bottom in ((-1.0, middle), (middle, 1.0)):
        heights = (top, (top + bottom) / 2, bottom)
        left = [(-draw.uniform(0.15, 1.0), y) for y in heights]
        right = [(draw.uniform(0.15, 1.0), y) for y in heights]
        parts.append([*left, *reversed(right)])
    return parts


def second_colour(shape: str) -> tuple[int, int, int]:
    """The colour of a shape's lower part, whatever colour its upper one has."""
    if shape in MADE_UP_SHAPES:
        return random.Random(f"{shape}:colour").choice(list(COLOURS.values()))
    return SECOND_COLOUR


def _around(corners: int, reaches: list[float]) -> list[Point]:
    """Corners of a polygon around (0, 0), the first one on top, at distances in turn."""
    angles = [2 * math.pi * corner / corners - math.pi / 2 for corner in range(corners)]
    return [
        (reaches[n % len(reaches)] * math.cos(angle), reaches[n % len(reaches)] * math.sin(angle))
        for n, angle in enumerate(angles)
    ]


def paint(scene: Scene) -> Image.Image:
    """The picture in RGB, `scene.width` x `scene.height` pixels."""
    scale = SUPERSAMPLING
    large = (scene.width * scale, scene.height * scale)
    image = Image.new("RGB", large, BACKGROUNDS[scene.background])
    canvas = ImageDraw.Draw(image)
    for thing in scene.things:
        radius = thing.radius * min(large)
        x, y = thing.x * large[0], thing.y * large[1]
        colours = (COLOURS[thing.colour], second_colour(thing.shape))
        for polygon, colour in zip(outline(thing.shape), colours, strict=False):
            canvas.polygon([(x + radius * px, y + radius * py) for px, py in polygon], fill=colour)
    return image.resize((scene.width, scene.height), Image.Resampling.BOX)


def save(scene: Scene, path: Path) -> None:
    """Write the picture as the file `path`, dated long ago, by its content.

    discover reads files once more that were written just before it came, since they may still
    change; these are complete. One that is drawn otherwise has another date, and is read again.
    """
    paint(scene).save(path)
    digest = hashlib.sha256(path.read_bytes()).digest()
    date = _DRAWN_FROM + int.from_bytes(digest[:8], "big") % _DRAWN_WITHIN
    os.utime(path, (date, date))


def extent(shape: str) -> tuple[float, float, float, float]:
    """The left, the top, the width and the height of a shape's outline."""
    points = [point for polygon in outline(shape) for point in polygon]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)


def silhouette(shape: str, side: int) -> Image.Image:
    """The shape in white on black, mode L, stretched so that it just fills `side` x `side`."""
    left, top, width, height = extent(shape)
    large = side * SUPERSAMPLING
    image = Image.new("L", (large, large), 0)
    canvas = ImageDraw.Draw(image)
    for polygon in outline(shape):
        canvas.polygon(
            [((x - left) / width * large, (y - top) / height * large) for x, y in polygon],
            fill=255,
        )
    return image.resize((side, side), Image.Resampling.BOX)
