"""The grid: every picture is on it, whole, with its caption under it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFont

from omnigen_pipe.sampling.grid import GAP, grid_picture, planned_grid, wrapped
from omnigen_pipe.sampling.requests import Request, at_strengths, requests_of

COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30), (30, 200, 200)]


def pictures(count: int, size: tuple[int, int] = (160, 96)) -> list[Image.Image]:
    return [Image.new("RGB", size, COLOURS[i % len(COLOURS)]) for i in range(count)]


@pytest.mark.parametrize(("count", "columns"), [(1, None), (4, None), (5, None), (6, 2), (3, 3)])
def test_without_captions_there_are_pictures_and_gaps(count: int, columns: int | None) -> None:
    grid = grid_picture(pictures(count), None, columns)
    across = columns or {1: 1, 4: 2, 5: 3}[count]
    down = -(-count // across)
    assert grid.size == (across * (160 + GAP) + GAP, down * (96 + GAP) + GAP)
    pixels = np.asarray(grid)
    for index in range(count):
        top = GAP + index // across * (96 + GAP)
        left = GAP + index % across * (160 + GAP)
        assert (pixels[top : top + 96, left : left + 160] == COLOURS[index % 5]).all()
    coloured = (pixels != 255).any(axis=2).sum()
    assert coloured == count * 160 * 96


def test_captions_stand_under_their_pictures() -> None:
    plain = grid_picture(pictures(2), None)
    captioned = grid_picture(pictures(2), ["a cat", "a dog " * 9])
    assert captioned.width == plain.width
    assert captioned.height > plain.height
    pixels = np.asarray(captioned)
    under = pixels[GAP + 96 :]
    middle = GAP + 160 + GAP // 2
    ink = (under < 128).all(axis=2)
    assert ink[:, :middle].any()
    assert ink[:, middle:].sum() > 3 * ink[:, :middle].sum(), "the longer caption has more ink"
    assert (pixels[GAP : GAP + 96, GAP : GAP + 160] == COLOURS[0]).all()
    assert (pixels[-2:] == 255).all(), "no caption runs out of the grid"


def test_small_and_unequal_pictures_keep_their_pixels() -> None:
    mixed = [*pictures(1, (32, 32)), *pictures(1, (16, 64))]
    pixels = np.asarray(grid_picture(mixed, ["one", "two"]))
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


def test_a_picture_that_is_not_there_leaves_its_cell_empty() -> None:
    first, _, last = pictures(3)
    pixels = np.asarray(grid_picture([first, None, last], ["one", "two", "three"], 3))
    assert pixels.shape == np.asarray(grid_picture(pictures(3), ["one", "two", "three"], 3)).shape
    for column, colour in ((0, COLOURS[0]), (1, (255, 255, 255)), (2, COLOURS[2])):
        left = GAP + column * (160 + GAP)
        assert (pixels[GAP : GAP + 96, left : left + 160] == colour).all()


def asked(prompts: int, strengths: int, count: int) -> list[Request]:
    requests = requests_of([f"prompt {n}" for n in range(prompts)], {}, 5, count)
    return at_strengths(requests, [n / 4 for n in range(strengths)])


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.integers(1, 4),
    strengths=st.integers(1, 3),
    count=st.integers(1, 4),
    captions=st.booleans(),
)
def test_the_size_is_known_before_and_every_picture_has_its_cell(
    prompts: int, strengths: int, count: int, captions: bool
) -> None:
    requests = asked(prompts, strengths, count)
    drawn = {request: Image.new("RGB", (32, 16), (n, 0, 1)) for n, request in enumerate(requests)}
    grid = planned_grid(requests, captions)
    picture = grid.picture(drawn)
    assert picture.size == grid.size(32, 16)
    shown = [n for n in np.asarray(picture)[..., 0].flatten() if n < len(requests)]
    assert all(shown.count(n) >= 32 * 16 for n in range(len(requests)))


@pytest.mark.parametrize(
    ("prompts", "strengths", "count", "columns"),
    [(1, 1, 9, 3), (4, 1, 1, 2), (3, 1, 2, 2), (1, 2, 5, 5), (3, 2, 5, 5), (3, 2, 1, 2)],
)
def test_a_prompt_and_a_strength_have_a_row(
    prompts: int, strengths: int, count: int, columns: int
) -> None:
    """But for one prompt at one strength, and where each row would hold a single picture."""
    grid = planned_grid(asked(prompts, strengths, count))
    assert grid.columns == columns
    if strengths > 1 and count > 1:
        rows = [grid.cells[n : n + columns] for n in range(0, len(grid.cells), columns)]
        assert all(len({(cell.prompt, cell.strength) for cell in row}) == 1 for row in rows)
        assert [row[0].prompt for row in rows] == sorted(row[0].prompt for row in rows)


def test_captions_tell_pictures_apart() -> None:
    def captions(*numbers: int) -> tuple[str, ...]:
        return planned_grid(asked(*numbers)).captions or ()

    assert captions(1, 1, 1) == ("prompt 0",)
    assert captions(1, 1, 2) == ("prompt 0 (seed 5)", "prompt 0 (seed 6)")
    assert captions(1, 2, 1) == ("prompt 0 (strength 0)", "prompt 0 (strength 0.25)")
    assert captions(1, 2, 2)[3] == "prompt 0 (seed 6, strength 0.25)"


def test_of_a_grid_that_was_not_finished_rows_without_pictures_are_left_out() -> None:
    requests = asked(3, 1, 2)
    grid = planned_grid(requests, captions=False)
    picture = grid.picture({requests[0]: Image.new("RGB", (32, 16))})
    assert picture.size == (2 * (32 + GAP) + GAP, 16 + 2 * GAP)
