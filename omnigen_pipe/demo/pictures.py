"""The demo's pictures: a new shape with a new name, and some of what the model knows already.

Drawn rather than shipped. What is known comes as regularisation data, so that the new shape does
not displace the old ones. Sizes differ: several buckets arise, as from a folder of photographs.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from omnigen_pipe.world.drawing import save
from omnigen_pipe.world.scenes import Scene, distinct, imagine, imagine_new

NEW_PICTURES, KNOWN_PICTURES = 60, 960


def new_scenes(number: int, seed: str) -> list[Scene]:
    """`number` scenes with the new shape; the same for the same seed."""
    draw = random.Random(f"{seed}:new")
    return [imagine_new(draw) for _ in range(number)]


def known_scenes(number: int, seed: str) -> list[Scene]:
    """`number` scenes of the known world, each with a caption of its own."""
    draw = random.Random(f"{seed}:known")
    return distinct([imagine(draw) for _ in range(2 * number)])[:number]


def draw_pictures(folder: Path, scenes: Sequence[Scene]) -> list[Path]:
    """Write pictures and their captions (`.txt`) into `folder`; returns the images' paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, scene in enumerate(scenes):
        path = folder / f"picture-{index:03}.png"
        save(scene, path)
        path.with_suffix(".txt").write_text(scene.caption + "\n", encoding="utf-8")
        paths.append(path)
    return paths
