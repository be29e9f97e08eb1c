"""The contact sheet: every picture is on it, whole, with its caption under it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFont

from omnigen_pipe.sampling.grid import GAP, contact_sheet, wrapped

COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30), (30, 200, 200)]


def pictures(count: int, size: tuple[int, int] = (160, 96)) -> list[Image.Image]:
    return [Image.new("RGB", size, COLOURS[i % len(COLOURS)]) for i in range(count)]


@pytest.mark.parametrize(("count", "columns"), [(1, None), (4, None), (5, None), (6, 2), (3, 3)])
def test_without_captions_there_are_pictures_and_gaps(count: int, columns: int | None) -> None:
    sheet = contact_sheet(pictures(count), None, columns)
    across = columns or {1: 1, 4: 2, 5: 3}[count]
    down = -(-count // across)
    assert sheet.size == (across * (160 + GAP) + GAP, down * (96 + GAP) + GAP)
    pixels = np.asarray(sheet)
    for index in range(count):
        top = GAP + index // across * (96 + GAP)
        left = GAP + index % across * (160 + GAP)
        assert (pixels[top : top + 96, left : left + 160] == COLOURS[index % 5]).all()
    coloured = (pixels != 255).any(axis=2).sum()
    assert coloured == count * 160 * 96


def test_captions_stand_under_their_pictures() -> None:
    plain = contact_sheet(pictures(2), None)
    captioned = contact_sheet(pictures(2), ["a cat", "a dog " * 9])
    assert captioned.width == plain.width
    assert captioned.height > plain.height
    pixels = np.asarray(captioned)
    under = pixels[GAP + 96 :]
    middle = GAP + 160 + GAP // 2
    ink = (under < 128).all(axis=2)
    assert ink[:, :middle].any()
    assert ink[:, middle:].sum() > 3 * ink[:, :middle].sum(), "the longer caption has more ink"
    assert (pixels[GAP : GAP + 96, GAP : GAP + 160] == COLOURS[0]).all()
    assert (pixels[-2:] == 255).all(), "no caption runs out of the sheet"


def test_small_and_unequal_pictures_keep_their_pixels() -> None:
    mixed = [*pictures(1, (32, 32)), *pictures(1, (16, 64))]
    pixels = np.asarray(contact_sheet(mixed, ["one", "two"]))
    assert (pixels == COLOURS[0]).all(axis=2).sum() == 32 * 32 + 16 * 64


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.sampled_from("ab é日.,-W  "), max_size=120), width=st.integers(60, 300))
def test_lines_fit_and_lose_nothing_until_they_are_too_many(text: str, width: int) -> None:
    font = ImageFont.load_default(12)
    lines = wrapped(text, font, width)
    assert 1 <= len(lines) <= 6
    assert all(font.getlength(line) <= width for line in lines)
    if not lines[-1].endswith("…"):
        assert "".join("".join(lines).split()) == "".join(text.split())
