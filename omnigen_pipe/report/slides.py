"""Validation pictures of a run over its steps, one slider per picture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from omnigen_pipe.images.probe import PILLOW_ERRORS
from omnigen_pipe.report.thumbnails import Album, fitted
from omnigen_pipe.runs.pictures import validations

#: So many steps of a picture are shown, evenly spread, and so many pictures.
MOST_STEPS, MOST_PICTURES = 20, 12
#: The longer side in pixels at which they are shown.
_SHOWN = 320


@dataclass(frozen=True)
class Slide:
    """One picture after `step`: its `data:` URI, or why it cannot be shown."""

    step: int
    uri: str | None
    problem: str | None


@dataclass(frozen=True)
class Slides:
    """A picture over the steps; `steps` says of how many it is there. `size` is that of the
    thumbnails, in pixels."""

    name: str
    prompt: str | None
    steps: int
    size: tuple[int, int]
    slides: list[Slide]


def slides(folder: Path, last_step: int, album: Album) -> tuple[list[Slides], int]:
    """The pictures of the run in `folder` up to `last_step`, and how many more there are than are
    shown.

    Where the `album` is full, all pictures have lost the same steps, or one more.
    """
    files: dict[str, dict[int, Path]] = {}
    for step, place in validations(folder, last_step):
        for path in sorted(place.glob("*.png")):
            files.setdefault(path.stem, {})[step] = path
    names = sorted(files)[:MOST_PICTURES]
    wanted = [
        (turn, name, step)
        for name in names
        for turn, step in enumerate(_from_the_ends(spread(sorted(files[name]), MOST_STEPS)))
    ]
    made: dict[str, dict[int, Slide]] = {name: {} for name in names}
    sizes: dict[str, tuple[int, int]] = {}
    prompts: dict[str, str | None] = {}
    for _, name, step in sorted(wanted):
        slide, size, prompt = _slide(files[name][step], step, album)
        made[name][step] = slide
        sizes.setdefault(name, size)
        prompts[name] = prompts.get(name) or prompt
    return [
        Slides(
            name,
            prompts[name],
            len(files[name]),
            sizes[name],
            [slide for _, slide in sorted(made[name].items()) if slide.uri or slide.problem],
        )
        for name in names
    ], len(files) - len(names)


def spread(steps: list[int], most: int) -> list[int]:
    """At most `most` of `steps`, evenly spread, the first and the last among them."""
    if len(steps) <= most:
        return steps
    return [steps[round(place * (len(steps) - 1) / (most - 1))] for place in range(most)]


def _from_the_ends(steps: list[int]) -> list[int]:
    """The last first, then the first, then what halves the gaps: what to keep where room ends."""
    order = sorted(range(len(steps)), key=lambda n: (_depth(n, len(steps)), n))
    return [steps[-1], *(steps[n] for n in order if n != len(steps) - 1)]


def _depth(number: int, count: int) -> int:
    """How often the steps must be halved until `number` is among those that are kept."""
    if number == 0:
        return 0
    return math.ceil(math.log2(count)) - (number & -number).bit_length() + 1


def _slide(path: Path, step: int, album: Album) -> tuple[Slide, tuple[int, int], str | None]:
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            prompt = picture.info.get("prompt")
            size = fitted(picture.size, _SHOWN)
            small = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    except (*PILLOW_ERRORS, Image.DecompressionBombError):
        # Pillow's own words name the file with all its folders.
        return Slide(step, None, "the file cannot be read as PNG"), (1, 1), None
    return Slide(step, album.add(small), None), size, prompt if isinstance(prompt, str) else None
