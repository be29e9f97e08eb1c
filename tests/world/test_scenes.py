"""Scenes: what they may show, and that their sentences say it."""

from __future__ import annotations

import random
from itertools import repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnigen_pipe.world.drawing import outline, paint
from omnigen_pipe.world.scenes import (
    BACKGROUNDS,
    BUCKETS,
    COLOURS,
    FINER_SHAPES,
    MADE_UP_SHAPES,
    NEW_SHAPE,
    SHAPES,
    Scene,
    distinct,
    imagine,
    imagine_made_up,
    imagine_new,
)

SEEDS = st.integers(0, 2**32)


@given(SEEDS)
def test_things_lie_within_the_picture_and_apart(seed: int) -> None:
    scene = imagine(random.Random(seed))
    short = min(scene.width, scene.height)
    boxes = []
    for thing in scene.things:
        x, y, reach = thing.x * scene.width, thing.y * scene.height, thing.radius * short
        assert 0 <= x - reach < x + reach <= scene.width
        assert 0 <= y - reach < y + reach <= scene.height
        boxes.append((x - reach, y - reach, x + reach, y + reach))
    if len(boxes) == 2:
        (a, b, c, d), (e, f, g, h) = boxes
        assert c + 2 < e or g + 2 < a or d + 2 < f or h + 2 < b, "less than two pixels apart"


@given(SEEDS)
def test_the_sentence_tells_what_is_there(seed: int) -> None:
    scene = imagine(random.Random(seed))
    for thing in scene.things:
        assert f"{thing.colour} {thing.shape}" in scene.caption
        assert thing.named_size is None or f"{thing.named_size} {thing.colour}" in scene.caption
    for name in BACKGROUNDS:
        assert f"{name} background" not in scene.caption or name == scene.background
    assert " a orange" not in scene.caption
    assert NEW_SHAPE not in scene.caption
    if len(scene.things) == 2:
        first, second = scene.things
        x, y = second.x - first.x, second.y - first.y
        for words, true in {
            "left of": x > 0.3,
            "right of": x < -0.3,
            "above": y > 0.3,
            "below": y < -0.3,
        }.items():
            assert f" {words} " not in scene.caption or true


@given(SEEDS)
def test_the_same_seed_gives_the_same_scene_and_picture(seed: int) -> None:
    one, other = imagine(random.Random(seed)), imagine(random.Random(seed))
    assert one == other
    assert paint(one).tobytes() == paint(other).tobytes()


def test_everything_occurs() -> None:
    draw = random.Random(0)
    scenes = [imagine(draw) for _ in range(1000)]
    things = [thing for scene in scenes for thing in scene.things]
    assert {(t.shape, t.colour) for t in things} == {(s, c) for s in SHAPES for c in COLOURS}
    assert {(s.width, s.height) for s in scenes} == set(BUCKETS)
    assert {s.background for s in scenes} == set(BACKGROUNDS)
    assert {t.named_size for t in things} == {None, "large", "small"}
    for words in ("left of", "right of", "above", "below", "on the left", "at the top"):
        assert any(words in s.caption for s in scenes)


def test_the_new_shape_is_alone_and_of_one_name() -> None:
    draw = random.Random(0)
    for scene in (imagine_new(draw) for _ in range(100)):
        (thing,) = scene.things
        assert thing.shape == NEW_SHAPE
        assert NEW_SHAPE in scene.caption


def test_made_up_shapes_all_occur_alone_and_with_their_names() -> None:
    draw = random.Random(0)
    scenes = [imagine_made_up(draw) for _ in range(1000)]
    for scene in scenes:
        (thing,) = scene.things
        assert f"{thing.colour} {thing.shape}" in scene.caption
        assert NEW_SHAPE not in scene.caption
    assert {scene.things[0].shape for scene in scenes} == set(MADE_UP_SHAPES)


def test_distinct_keeps_the_first_of_each_sentence_in_order() -> None:
    def scene(caption: str, width: int) -> Scene:
        return Scene(width, 64, "white", (), caption)

    scenes = [scene("a", 1), scene("b", 2), scene("a", 3), scene("c", 4)]
    assert [s.width for s in distinct(scenes, 4)] == [1, 2, 4]
    assert [s.width for s in distinct(scenes, 2)] == [1, 2]
    assert distinct(repeat(scenes[0]), 0) == []
    assert [s.width for s in distinct(scenes, 2, {"a"})] == [2, 4]


@pytest.mark.parametrize("shape", [*FINER_SHAPES, NEW_SHAPE, *MADE_UP_SHAPES])
def test_outlines_stay_within_their_circle_s_square(shape: str) -> None:
    points = [point for polygon in outline(shape) for point in polygon]
    assert all(-1 <= x <= 1 and -1 <= y <= 1 for x, y in points)


def test_a_shape_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="blob"):
        outline("blob")
