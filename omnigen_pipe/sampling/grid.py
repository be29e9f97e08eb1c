"""The contact sheet: pictures side by side, each with its caption under it.

Drawn with the font that comes with Pillow, so that it looks the same everywhere. What this gives
up: scripts beyond Latin, which that font does not have, come out as boxes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

#: Pixels between pictures, and around all of them.
GAP = 8
#: Cells are at least so wide, in pixels: small pictures leave room for words, too.
_MIN_CELL = 128
_MIN_FONT, _MAX_FONT = 11, 28
#: Lines of a caption; the last one of a longer caption ends in "…".
_MAX_LINES = 6
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_PAPER, _INK = (255, 255, 255), (20, 20, 20)


def contact_sheet(
    pictures: Sequence[Image.Image],
    captions: Sequence[str] | None = None,
    columns: int | None = None,
) -> Image.Image:
    """All `pictures` on one sheet, row by row, RGB.

    `captions`, one for each picture, are wrapped under them; None leaves no room for any. Without
    `columns` the sheet has about as many rows as columns.
    """
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    width = max([picture.width for picture in pictures])
    height = max([picture.height for picture in pictures])
    if captions is not None:
        width = max(width, _MIN_CELL)
    font = ImageFont.load_default(min(_MAX_FONT, max(_MIN_FONT, width // 32)))
    texts = ["\n".join(wrapped(text, font, width)) for text in captions or ()]
    room = [_height(text, font) for text in texts] or [0] * len(pictures)
    rows = [room[start : start + columns] for start in range(0, len(pictures), columns)]
    sheet = Image.new(
        "RGB",
        (
            columns * (width + GAP) + GAP,
            sum(height + max(row) + GAP for row in rows) + GAP,
        ),
        _PAPER,
    )
    canvas = ImageDraw.Draw(sheet)
    top = GAP
    for number, row in enumerate(rows):
        for column in range(len(row)):
            index = number * columns + column
            picture, left = pictures[index], GAP + column * (width + GAP)
            x, y = left + (width - picture.width) // 2, top + height - picture.height
            sheet.paste(picture.convert("RGB"), (x, y))
            if captions is not None:
                middle = (left + width / 2, top + height + GAP / 2)
                canvas.multiline_text(middle, texts[index], _INK, font, "ma", align="center")
        top += height + max(row) + GAP
    return sheet


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
