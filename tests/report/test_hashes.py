"""Perceptual hashes, and the search for near ones."""

from __future__ import annotations

import io
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import picture
from PIL import Image

from omnigen_pipe.report.hashes import MOST_DISTANCE, SIDE, grey, near_pairs, perceptual_hash
from omnigen_pipe.report.likeness import DISTANCE, MOST_DIFFERENCE, grouped, look

#: Hashes that are near to each other, in one or in several bands.
NEAR = st.builds(
    lambda base, flips: base ^ sum(1 << bit for bit in flips),
    st.sampled_from((0, 2**64 - 1, 0x0123456789ABCDEF)),
    st.sets(st.integers(0, 63), max_size=4),
)
HASHES = st.lists(NEAR | st.integers(0, 2**64 - 1), max_size=40, unique=True)


@settings(max_examples=200, deadline=None)
@given(HASHES, st.integers(0, MOST_DISTANCE))
def test_bands_find_the_pairs_that_a_comparison_of_all_finds(
    values: list[int], distance: int
) -> None:
    first, second = near_pairs(np.array(values, np.uint64), distance)
    found = list(zip(first.tolist(), second.tolist(), strict=True))
    wanted = [
        (i, j)
        for (i, one), (j, other) in combinations(enumerate(values), 2)
        if (one ^ other).bit_count() <= distance
    ]
    assert found == wanted


def test_farther_than_the_bands_reach_is_refused() -> None:
    with pytest.raises(ValueError, match="up to a distance of 3"):
        near_pairs(np.zeros(1, np.uint64), MOST_DISTANCE + 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(NEAR, st.integers(0, 3)), max_size=25))
def test_groups_are_what_is_connected(items: list[tuple[int, int]]) -> None:
    """Against a search that compares all with all; equal hashes with other colours stay apart."""
    hashes = np.array([value for value, _ in items], np.uint64)
    shades = np.array([9 * shade for _, shade in items], np.uint8)
    colours = np.broadcast_to(shades[:, None, None, None], (len(items), 16, 16, 3)).copy()
    names = grouped(hashes, colours).tolist()

    def alike(one: int, other: int) -> bool:
        apart = abs(int(shades[one]) - int(shades[other]))
        bits = (items[one][0] ^ items[other][0]).bit_count()
        return bits <= DISTANCE and apart <= MOST_DIFFERENCE

    groups = [{n} for n in range(len(items))]
    for one, other in combinations(range(len(items)), 2):
        if alike(one, other):
            mine = next(group for group in groups if one in group)
            theirs = next(group for group in groups if other in group)
            if mine is not theirs:
                mine |= theirs
                groups.remove(theirs)
    wanted = {frozenset(group) for group in groups}
    found = {frozenset(n for n, name in enumerate(names) if name == which) for which in set(names)}
    assert found == wanted


def alike(one: Image.Image, other: Image.Image) -> bool:
    looks = [look(each) for each in (one, other)]
    names = grouped(np.array([h for h, _ in looks], np.uint64), np.stack([c for _, c in looks]))
    return bool(names[0] == names[1])


def again(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def test_copies_of_photographs_are_alike_and_different_ones_are_not(photos: Path) -> None:
    found = []
    for path in sorted(photos.glob("*.jpg")):
        with Image.open(path) as image:
            image.draft("RGB", (512, 512))
            found.append(image.convert("RGB").resize((320, 240)))
    for one in found:
        assert alike(one, again(one.resize((160, 120)), 60))
        assert alike(one, one.point(lambda value: min(255, value + 5)))
    assert not any(alike(one, other) for one, other in combinations(found, 2))


def test_drawings_of_other_colours_are_not_alike() -> None:
    def drawing(colour: str) -> Image.Image:
        image = Image.new("RGB", (64, 64), "white")
        image.paste(Image.new("RGB", (20, 12), colour), (8, 31))
        image.paste(Image.new("RGB", (9, 25), "black"), (41, 6))
        return image

    assert alike(drawing("red"), again(drawing("red"), 95))
    assert not alike(drawing("red"), drawing("green"))


def test_the_hash_is_that_of_the_cosine_transform() -> None:
    """Against the definition, frequency by frequency."""
    luma = grey(picture(3, (80, 60)))
    assert luma.shape == (SIDE, SIDE)
    n = np.arange(SIDE)
    wanted = []
    for v in range(8):
        for u in range(8):
            waves = np.outer(
                np.cos(np.pi * v * (2 * n + 1) / (2 * SIDE)),
                np.cos(np.pi * u * (2 * n + 1) / (2 * SIDE)),
            )
            wanted.append(float((waves * luma).sum()))
    median = float(np.median(wanted[1:]))
    bits = "".join("1" if value > median else "0" for value in wanted)
    assert perceptual_hash(luma) == int(bits, 2)
    assert perceptual_hash(np.full((SIDE, SIDE), 200, np.uint8)).bit_count() == 1
