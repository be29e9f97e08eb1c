"""What is seen in a picture of the little world, by plain image measurements.

The background is the border's colour. What differs from it falls into connected blobs; a blob's
colour is the named one nearest to its pixels' median, its shape the one whose silhouette,
stretched a little to the blob's bounding box, overlaps it most, and its size that of such a shape
of equal area. What is like nothing that has a name is "nothing". Nothing here is learned, and
nothing knows what the picture was meant to show.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from omnigen_pipe.world.drawing import SECOND_COLOUR, extent, silhouette
from omnigen_pipe.world.scenes import BACKGROUNDS, COLOURS, NEW_SHAPE, SHAPES, Scene

#: To be raised whenever a picture may be judged otherwise than before.
VERSION = 4
#: A pixel belongs to a blob where some channel differs from the background by this much.
_DIFFERENT = 40
#: Smaller blobs, as a part of the shorter side squared, are specks.
_SPECK = 0.008
#: Colours that differ from every named one by more than this, in levels of 255 and as a distance
#: in RGB, have no name. Yellow and orange are nearest to each other, 74.8 apart, so that what has
#: a name is named by the nearer one.
_NAMED = 60
#: So much wider or narrower than its outline a shape may be.
_STRETCHED = 1.35
#: An overlap (intersection over union) below this is no shape at all.
_ALIKE = 0.6
#: A thing's middle may be so far from where it belongs, as a part of width and height.
_NEAR = 0.2
#: Silhouettes are compared at this side in pixels.
_SIDE = 48
#: The new shape's second colour has no name; seen in a shape of one colour it is none either.
_NAMELESS = "nameless"
_NOTHING = "nothing"


@dataclass(frozen=True)
class Blob:
    """A connected region: colours and shape as seen, its box as parts of width and height, and
    its radius as a part of the shorter side (0 where it is no shape)."""

    shape: str
    colour: str
    lower_colour: str
    left: float
    top: float
    right: float
    bottom: float
    radius: float

    @property
    def x(self) -> float:
        """The middle of its box, as a part of the width."""
        return (self.left + self.right) / 2

    @property
    def y(self) -> float:
        """The middle of its box, as a part of the height."""
        return (self.top + self.bottom) / 2


@dataclass(frozen=True)
class Seen:
    """The background's name and the blobs, the largest first."""

    background: str
    blobs: tuple[Blob, ...]


@dataclass(frozen=True)
class Verdict:
    """Which of the things that a sentence names were drawn right, each in its place; `background`
    is None where the sentence names none, and so is each of `sizes`. A size is right only
    where a shape is seen, whichever."""

    background: bool | None
    colours: tuple[bool, ...]
    shapes: tuple[bool, ...]
    sizes: tuple[bool | None, ...]

    @property
    def right(self) -> bool:
        """Every thing has its colour and its shape, size and background are those that were named,
        if any were, and there is nothing more."""
        named = (self.background, *self.sizes)
        return all(self.colours) and all(self.shapes) and False not in named


def look(image: Image.Image) -> Seen:
    """What is seen in `image`."""
    pixels = np.asarray(image.convert("RGB")).astype(np.int16)  # [H, W, 3]
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = np.median(border, axis=0)
    different = np.abs(pixels - background).max(axis=-1) > _DIFFERENT  # [H, W]
    smallest = _SPECK * min(image.size) ** 2
    regions = [region for region in _connected(different) if region.sum() >= smallest]
    regions.sort(key=lambda region: -int(region.sum()))
    return Seen(
        _nearest(background, BACKGROUNDS.items()),
        tuple(_blob(pixels, background, region) for region in regions),
    )


def judge(image: Image.Image, scene: Scene) -> Verdict:
    """How much of `scene` is seen in `image`: each thing is looked for where it belongs.

    Where more is seen than the scene has, every shape counts as wrong.
    """
    seen = look(image)
    blobs = list(seen.blobs)
    nothing_more = len(blobs) <= len(scene.things)
    colours: list[bool] = []
    shapes: list[bool] = []
    sizes: list[bool | None] = []
    for thing in scene.things:
        near = [b for b in blobs if max(abs(b.x - thing.x), abs(b.y - thing.y)) < _NEAR]
        if not near:
            colours.append(False)
            shapes.append(False)
            sizes.append(None if thing.named_size is None else False)
            continue
        blob = min(near, key=lambda b: (b.x - thing.x) ** 2 + (b.y - thing.y) ** 2)
        blobs.remove(blob)
        lower = _NAMELESS if thing.shape == NEW_SHAPE else thing.colour
        colours.append(blob.colour == thing.colour and blob.lower_colour == lower)
        shapes.append(blob.shape == thing.shape and nothing_more)
        size = "large" if blob.radius > thing.boundary else "small"
        right = blob.shape != _NOTHING and size == thing.named_size
        sizes.append(None if thing.named_size is None else right)
    named = f"{scene.background} background" in scene.caption
    background = seen.background == scene.background if named else None
    return Verdict(background, tuple(colours), tuple(shapes), tuple(sizes))


def _connected(mask: np.ndarray) -> list[np.ndarray]:
    """The 8-connected regions of a boolean `[H, W]`, each as a mask of its own."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        spread = np.where(mask, _greatest_around(labels), 0)
        if np.array_equal(spread, labels):
            return [labels == label for label in np.unique(labels[mask])]
        labels = spread


def _greatest_around(values: np.ndarray) -> np.ndarray:
    """The greatest of each pixel and its eight neighbours, `[H, W]`."""
    height, width = values.shape
    padded = np.pad(values, 1)
    shifted = [padded[y : y + height, x : x + width] for y in range(3) for x in range(3)]
    greatest: np.ndarray = np.maximum.reduce(shifted)
    return greatest


def _blob(pixels: np.ndarray, background: np.ndarray, region: np.ndarray) -> Blob:
    rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    shape = _shape(region[top:bottom, left:right])
    upper = region & (np.arange(len(region)) < (top + bottom) // 2)[:, None]
    named = [*COLOURS.items(), (_NAMELESS, SECOND_COLOUR)]
    height, width = region.shape
    return Blob(
        shape,
        _nearest(np.median(pixels[upper], axis=0), named),
        _nearest(np.median(pixels[region & ~upper], axis=0), named),
        left / width,
        top / height,
        right / width,
        bottom / height,
        0.0 if shape == _NOTHING else _radius(pixels, background, region, shape),
    )


def _shape(box: np.ndarray) -> str:
    """The shape that fills its bounding box as `box` `[H, W]` is filled."""
    across = box.shape[1] / box.shape[0]
    image = Image.fromarray((box * 255).astype(np.uint8))
    filled = np.asarray(image.resize((_SIDE, _SIDE), Image.Resampling.BOX)) > 127
    overlaps = {_NOTHING: _ALIKE}
    for shape in (*SHAPES, NEW_SHAPE):
        _, _, width, height = extent(shape)
        if 1 / _STRETCHED < across * height / width < _STRETCHED:
            overlaps[shape] = _overlap(filled, _filled(shape))
    return max(overlaps, key=lambda name: overlaps[name])


def _radius(pixels: np.ndarray, background: np.ndarray, region: np.ndarray, shape: str) -> float:
    """Of such a shape of equal area. A pixel counts where it has at least half of the contrast:
    blurred edges do not make a thing larger."""
    contrast = np.abs(pixels - background).max(axis=-1)
    area = (region & (contrast > np.median(contrast[region]) / 2)).sum()
    _, _, width, height = extent(shape)
    outline = _filled(shape).mean() * width * height
    return float(np.sqrt(area / outline) / min(region.shape))


@lru_cache
def _filled(shape: str) -> np.ndarray:
    return np.asarray(silhouette(shape, _SIDE)) > 127


def _overlap(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / max(1, (one | other).sum()))


def _nearest(colour: np.ndarray, named: Iterable[tuple[str, tuple[int, int, int]]]) -> str:
    distances = {name: float(((colour - rgb) ** 2).sum()) for name, rgb in named}
    distances[_NOTHING] = float(_NAMED**2)
    return min(distances, key=lambda name: distances[name])
