"""What a picture of the little world shows, and the sentences that say so.

One or two shapes, each of a colour and a size, on a plain background. Everything is drawn from
a `random.Random` that the caller seeds, so the same seed gives the same pictures everywhere.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

COLOURS = {
    "red": (214, 40, 40),
    "blue": (38, 84, 204),
    "green": (44, 140, 60),
    "yellow": (240, 200, 40),
    "purple": (128, 56, 160),
    "orange": (244, 128, 20),
}
BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "grey": (150, 150, 150)}
SHAPES = ("circle", "square", "triangle", "cross")
#: What the VAE learns to keep: shapes with finer corners, too.
FINER_SHAPES = ("circle", "square", "triangle", "star", "cross")
#: A word and a shape of two colours that the embedded model was never shown; the demo teaches it.
NEW_SHAPE = "zorp"

#: Words that mean nothing, each the name of a shape of two parts: the upper one has the colour that
#: is named, the lower one the shape's own, which is the same in one of six. The embedded model is
#: shown them, so that a made-up word is something it can draw; what they look like, only the
#: drawing says, and no picture is judged by them.
# fmt: off
MADE_UP_SHAPES = (
    "dax", "fep", "glorb", "gnip", "jick", "kaz", "mib", "murg", "nalp", "norf", "plim", "quib",
    "rask", "skeb", "slub", "snig", "spof", "stad", "swen", "thup", "tolk", "trib", "twem", "ulm",
    "vink", "vorb", "whun", "wug", "yern", "zilt", "bimp", "clorf", "dulp", "frib", "gorn",
    "hask", "jalb", "keft", "lorm", "mulb",
)
# fmt: on

#: Width and height in pixels, by how often each is drawn; two shapes stand along the longer side.
BUCKETS = {(64, 64): 6, (96, 64): 2, (64, 96): 2}

#: Half of a shape's side as a part of the picture's shorter side: alone in the middle, and
#: elsewhere.
_ALONE = {"large": 0.36, "small": 0.2}
_ASIDE = {"large": 0.2, "small": 0.15}
#: Those of the shapes of two colours, which stand alone in the middle: two parts need more room.
_OF_TWO = {"large": 0.38, "small": 0.27}
#: How far a shape may stand from where the sentence puts it, as a part of the shorter side.
_JITTER = 0.03
#: Where two shapes stand along their axis, and one that is not in the middle.
_NEAR, _FAR = 0.25, 0.75

PLACES = {
    "on the left": (_NEAR, 0.5),
    "on the right": (_FAR, 0.5),
    "at the top": (0.5, _NEAR),
    "at the bottom": (0.5, _FAR),
}
#: Relations, and whether the thing named first has the smaller coordinate along the axis.
_RELATIONS = {
    "left of": ("x", True),
    "right of": ("x", False),
    "above": ("y", True),
    "below": ("y", False),
}
#: Beginnings that say nothing, so that sentences differ in length.
OPENINGS = (
    "a drawing of",
    "a simple picture of",
    "a very simple little drawing of just",
)
#: How often a sentence leaves out a word, or begins with an opening.
_OMITTED, _OPENED = 0.3, 0.2


@dataclass(frozen=True)
class Thing:
    """One shape: its centre as a part of width and height, its radius of the shorter side.

    `named_size` is None where the sentence does not tell it; at the radius `boundary` large ends
    and small begins, which depends on where the thing stands.
    """

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    named_size: str | None = None
    boundary: float = 0.0

    @property
    def words(self) -> str:
        """The thing with its article, such as "a large red circle"."""
        words = f"{self.colour} {self.shape}"
        if self.named_size is not None:
            words = f"{self.named_size} {words}"
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


@dataclass(frozen=True)
class Scene:
    """One picture: its size in pixels, its background, its things, and its sentence."""

    width: int
    height: int
    background: str
    things: tuple[Thing, ...]
    caption: str


def imagine(
    draw: random.Random,
    *,
    size: tuple[int, int] | None = None,
    things: int | None = None,
    shapes: Sequence[str] = SHAPES,
) -> Scene:
    """A scene of the world the embedded model knows, of a drawn size and number of things unless
    they are given."""
    width, height = size or draw.choices(list(BUCKETS), list(BUCKETS.values()))[0]
    count = things or draw.choice((1, 2))
    background = draw.choice(sorted(BACKGROUNDS))
    colours = draw.sample(sorted(COLOURS), count)
    kinds = tuple(zip(draw.choices(shapes, k=count), colours, strict=True))
    if count == 1:
        place = draw.choice(sorted(PLACES)) if draw.random() < 0.4 else None
        radii = _ASIDE if place else _ALONE
        return _alone(draw, width, height, background, *kinds[0], place, radii)
    return _beside(draw, width, height, background, kinds)


def imagine_new(draw: random.Random, *, size: tuple[int, int] | None = None) -> Scene:
    """A scene with the new shape, alone in the middle of the picture."""
    return _of_two_colours(draw, NEW_SHAPE, size)


def imagine_made_up(draw: random.Random) -> Scene:
    """A scene with a shape that has a made-up name, alone in the middle of the picture."""
    return _of_two_colours(draw, draw.choice(MADE_UP_SHAPES), None)


def _of_two_colours(draw: random.Random, shape: str, size: tuple[int, int] | None) -> Scene:
    width, height = size or draw.choices(list(BUCKETS), list(BUCKETS.values()))[0]
    background, colour = draw.choice(sorted(BACKGROUNDS)), draw.choice(sorted(COLOURS))
    return _alone(draw, width, height, background, shape, colour, None, _OF_TWO)


def distinct(
    scenes: Iterable[Scene], number: int, others: Collection[str] = frozenset()
) -> list[Scene]:
    """The first `number` of `scenes` whose sentences are not among `others`, nor each other's."""
    found: dict[str, Scene] = {}
    for scene in scenes if number else ():
        if scene.caption not in others:
            found.setdefault(scene.caption, scene)
        if len(found) == number:
            break
    return list(found.values())


def _alone(
    draw: random.Random,
    width: int,
    height: int,
    background: str,
    shape: str,
    colour: str,
    place: str | None,
    radii: Mapping[str, float],
) -> Scene:
    """One thing at a place, or in the middle where it is None."""
    named = draw.choice(("large", "small"))
    x, y = PLACES[place] if place else (0.5, 0.5)
    thing = _thing(draw, width, height, shape, colour, x, y, radii, named)
    text = f"{thing.words} {place}" if place else thing.words
    return Scene(width, height, background, (thing,), _sentence(draw, text, background))


def _beside(
    draw: random.Random,
    width: int,
    height: int,
    background: str,
    kinds: tuple[tuple[str, str], ...],
) -> Scene:
    """Two things side by side or one above the other, along the longer side where there is one."""
    axes = ("x",) if width > height else ("y",) if height > width else ("x", "y")
    relation = draw.choice([r for r, (axis, _) in sorted(_RELATIONS.items()) if axis in axes])
    axis, first_is_near = _RELATIONS[relation]
    things = []
    for (shape, colour), near in zip(kinds, (first_is_near, not first_is_near), strict=True):
        along = _NEAR if near else _FAR
        x, y = (along, 0.5) if axis == "x" else (0.5, along)
        named = draw.choice(("large", "small"))
        things.append(_thing(draw, width, height, shape, colour, x, y, _ASIDE, named))
    text = f"{things[0].words} {relation} {things[1].words}"
    return Scene(width, height, background, tuple(things), _sentence(draw, text, background))


def _thing(
    draw: random.Random,
    width: int,
    height: int,
    shape: str,
    colour: str,
    x: float,
    y: float,
    radii: Mapping[str, float],
    size: str,
) -> Thing:
    """A thing near (x, y), of a size that the sentence may leave out: whatever is drawn stays
    within the picture."""
    radius = radii[size]
    short = min(width, height)
    reach = _JITTER * short
    x += draw.uniform(-reach, reach) / width
    y += draw.uniform(-reach, reach) / height
    margin_x, margin_y = (radius + 0.01) * short / width, (radius + 0.01) * short / height
    x = min(max(x, margin_x), 1 - margin_x)
    y = min(max(y, margin_y), 1 - margin_y)
    named = None if draw.random() < _OMITTED else size
    return Thing(shape, colour, x, y, radius, named, sum(radii.values()) / len(radii))


def _sentence(draw: random.Random, text: str, background: str) -> str:
    if draw.random() >= _OMITTED / 2:
        text += f" on a {background} background"
    if draw.random() < _OPENED:
        text = f"{draw.choice(OPENINGS)} {text}"
    return text
