"""The demo's pictures: a new shape with a new name, and some of what the model knows already.

Drawn rather than shipped. What is known comes as regularisation data, so that the new shape does
not displace the old ones. Sizes differ: several buckets arise, as from a folder of photographs.
No sentence that is judged is a caption that the adapter is trained on, and the new shape is judged
in colours on backgrounds, too, on which it was never shown. Of the known sentences that are judged
35 of 100 are captions of the base model's own pretraining.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path

from omnigen_pipe.world.drawing import save
from omnigen_pipe.world.scenes import (
    BACKGROUNDS,
    COLOURS,
    OPENINGS,
    Scene,
    distinct,
    imagine,
    imagine_new,
)

NEW_PICTURES, KNOWN_PICTURES = 60, 960
#: Sentences that are judged, with the new word and without it.
NEW, KNOWN = 60, 100
#: Colours of the new shape, and backgrounds, that are never trained on together.
HELD_BACK = {
    "red": "white",
    "blue": "black",
    "green": "grey",
    "yellow": "black",
    "purple": "white",
    "orange": "grey",
}


def new_scenes(number: int) -> list[Scene]:
    """`number` scenes with the new shape, to train on: every colour equally often, and so its
    backgrounds that are not held back. Sentences may occur more than once."""
    scenes = _plain(imagine_new, "new")
    pairs = cycle((c, b) for c in COLOURS for b in BACKGROUNDS if HELD_BACK[c] != b)
    return [
        next(s for s in scenes if (s.things[0].colour, s.background) == pair)
        for pair in islice(pairs, number)
    ]


def known_scenes(number: int) -> list[Scene]:
    """`number` scenes of the known world, to train on, each with a sentence of its own."""
    return distinct(_plain(imagine, "known"), number)


def judged_scenes(number: int, known: int, seed: str = "proof") -> list[Scene]:
    """`number` scenes with the new shape and then `known` without it, to judge by: each with a
    sentence of its own that is no caption of what the demo trains on."""
    trained = {scene.caption for scene in new_scenes(NEW_PICTURES) + known_scenes(KNOWN_PICTURES)}
    new, old = _scenes(imagine_new, f"{seed}:new"), _scenes(imagine, f"{seed}:known")
    return distinct(new, number, trained) + distinct(old, known, trained)


def held_back(scene: Scene) -> bool:
    """Whether the scene shows a colour on the background that is held back for it."""
    return any(HELD_BACK[thing.colour] == scene.background for thing in scene.things)


def draw_pictures(folder: Path, scenes: Sequence[Scene]) -> list[Path]:
    """Write pictures and their captions (`.txt`) into `folder`; returns the images' paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{stem}.png" for stem in _stems(len(scenes))]
    for path, scene in zip(paths, scenes, strict=True):
        save(scene, path)
        path.with_suffix(".txt").write_text(scene.caption + "\n", encoding="utf-8")
    return paths


def file_names(number: int) -> set[str]:
    """The names of all files that `draw_pictures` writes for `number` scenes."""
    return {stem + suffix for stem in _stems(number) for suffix in (".png", ".txt")}


def _stems(number: int) -> list[str]:
    return [f"picture-{index:03}" for index in range(number)]


def _scenes(kind: Callable[[random.Random], Scene], seed: str) -> Iterator[Scene]:
    """Scenes without end; the same for the same seed."""
    draw = random.Random(f"demo:{seed}")
    while True:
        yield kind(draw)


def _plain(kind: Callable[[random.Random], Scene], seed: str) -> Iterator[Scene]:
    """Only those without an opening, since a batch is as long as its longest sentence."""
    return (s for s in _scenes(kind, seed) if not s.caption.startswith(OPENINGS))
