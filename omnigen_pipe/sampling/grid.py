"""The grid: pictures side by side on one, each with its caption under it.

Where each picture goes, and so how large the grid is, is known before any is drawn. Drawn with the
font that comes with Pillow, so that it looks the same everywhere. What this gives up: scripts
beyond Latin, which that font does not have, come out as boxes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from PIL import Image, ImageDraw, ImageFont

from omnigen_pipe.sampling.requests import Request, exact

#: Pixels between pictures, and around all of them.
GAP = 8
#: Cells are at least so wide, in pixels: small pictures leave room for words, too.
_MIN_CELL = 128
_MIN_FONT, _MAX_FONT = 11, 28
#: Lines of a caption; the last one of a longer caption ends in "…".
_MAX_LINES = 6
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_Value = TypeVar("_Value")
_PAPER, _INK = (255, 255, 255), (20, 20, 20)


@dataclass(frozen=True)
class Grid:
    """The cells of a grid, row by row, and the caption of each; no captions: no room for any."""

    cells: tuple[Request, ...]
    columns: int
    captions: tuple[str, ...] | None

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of the grid of pictures of `width` x `height`, all in pixels."""
        lines = _Lines.of(len(self.cells), self.captions, self.columns, width)
        return lines.size(height)

    def picture(self, drawn: Mapping[Request, Image.Image]) -> Image.Image:
        """The grid of those that are `drawn`, at least one.

        A cell without a picture stays empty, and a row without any is left out.
        """
        pictures: list[Image.Image | None] = []
        captions: list[str] = []
        for start in range(0, len(self.cells), self.columns):
            row = slice(start, start + self.columns)
            found = [drawn.get(cell) for cell in self.cells[row]]
            if any(picture is not None for picture in found):
                pictures += found
                captions += self.captions[row] if self.captions is not None else ()
        return grid_picture(pictures, captions if self.captions is not None else None, self.columns)


def planned_grid(requests: Sequence[Request], captions: bool = True) -> Grid:
    """The grid of `requests`: a row for each prompt and strength of the adapter.

    Where each prompt and strength has one picture, the strengths of a prompt share a row; where
    there is one strength as well, or one prompt, the grid is as near to a square as can be.
    """
    prompts = _order(request.name for request in requests)
    strengths = _order(request.strength for request in requests)
    seeds = _order(request.seed for request in requests)
    # Sorting is stable: seeds stay in their order.
    cells = sorted(requests, key=lambda cell: (prompts[cell.name], strengths[cell.strength]))
    if len(strengths) == 1 and 1 in (len(prompts), len(seeds)):
        columns = _near_square(len(cells))
    else:
        columns = len(seeds) if len(seeds) > 1 else len(strengths)
    told = [_caption(cell, len(seeds) > 1, len(strengths) > 1) for cell in cells]
    return Grid(tuple(cells), columns, tuple(told) if captions else None)


def _order(values: Iterable[_Value]) -> dict[_Value, int]:
    """When each of `values` first comes, in that order."""
    return {value: number for number, value in enumerate(dict.fromkeys(values))}


def _caption(request: Request, seed: bool, strength: bool) -> str:
    """The prompt, and what else tells the picture from its neighbours."""
    told = [f"seed {request.seed}"] if seed else []
    if strength and request.strength is not None:
        told.append(f"strength {exact(request.strength)}")
    return f"{request.prompt} ({', '.join(told)})" if told else request.prompt


def grid_picture(
    pictures: Sequence[Image.Image | None],
    captions: Sequence[str] | None = None,
    columns: int | None = None,
) -> Image.Image:
    """All `pictures`, at least one, on one, row by row, RGB; None leaves a cell empty.

    `captions`, one for each picture, are wrapped under them; None leaves no room for any. Without
    `columns` there are about as many rows as columns.
    """
    columns = columns or _near_square(len(pictures))
    height = max([picture.height for picture in pictures if picture is not None])
    widest = max([picture.width for picture in pictures if picture is not None])
    lines = _Lines.of(len(pictures), captions, columns, widest)
    grid = Image.new("RGB", lines.size(height), _PAPER)
    canvas = ImageDraw.Draw(grid)
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        left = GAP + column * (lines.width + GAP)
        top = GAP + row * (height + GAP) + sum(lines.rooms[:row])
        if picture is not None:
            x, y = left + (lines.width - picture.width) // 2, top + height - picture.height
            grid.paste(picture.convert("RGB"), (x, y))
        if lines.texts:
            middle = (left + lines.width / 2, top + height + GAP / 2)
            canvas.multiline_text(
                middle, lines.texts[index], _INK, lines.font, "ma", align="center"
            )
    return grid


def _near_square(count: int) -> int:
    return math.ceil(math.sqrt(count))


@dataclass(frozen=True)
class _Lines:
    """The words of a grid, broken into lines: cells are `width` pixels wide, and under each row
    there is its one of `rooms`, in pixels."""

    columns: int
    width: int
    font: _Font
    texts: list[str]
    rooms: list[int]

    @classmethod
    def of(cls, count: int, captions: Sequence[str] | None, columns: int, width: int) -> _Lines:
        """The lines of `captions` under `count` pictures that are at most `width` wide."""
        if captions is not None:
            width = max(width, _MIN_CELL)
        font = ImageFont.load_default(min(_MAX_FONT, max(_MIN_FONT, width // 32)))
        texts = ["\n".join(wrapped(text, font, width)) for text in captions or ()]
        rooms = [_height(text, font) for text in texts] or [0] * count
        rows = [max(rooms[start : start + columns]) for start in range(0, count, columns)]
        return cls(columns, width, font, texts, rows)

    def size(self, height: int) -> tuple[int, int]:
        """Width and height of the grid whose pictures are at most `height` pixels high."""
        across = self.columns * (self.width + GAP) + GAP
        return across, sum(height + room + GAP for room in self.rooms) + GAP


def wrapped(text: str, font: _Font, width: int) -> list[str]:
    """`text` in lines that are at most `width` pixels wide in `font`."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        longer = f"{line} {word}" if line else word
        if font.getlength(longer) <= width:
            line = longer
            continue
        if line:
            lines.append(line)
        line = word
        while font.getlength(line) > width and len(line) > 1:
            shorter = range(len(line) - 1, 1, -1)
            fits = next((n for n in shorter if font.getlength(line[:n]) <= width), 1)
            lines.append(line[:fits])
            line = line[fits:]
    lines.append(line)
    if len(lines) > _MAX_LINES:
        last = lines[_MAX_LINES - 1]
        while last and font.getlength(f"{last}…") > width:
            last = last[:-1]
        lines = [*lines[: _MAX_LINES - 1], f"{last.rstrip()}…"]
    return lines


def _height(text: str, font: _Font) -> int:
    """Pixels that `text`'s lines take under a picture."""
    canvas = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    box = canvas.multiline_textbbox((0, 0), text or " ", font, "la")
    return math.ceil(box[3]) + GAP // 2
