"""Rates count what is right; a picture that came out as no picture is wrong in everything."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import torch

from omnigen_pipe.embedded.rates import draw_scenes, measure
from omnigen_pipe.sampling.requests import Settings
from omnigen_pipe.world.drawing import paint
from omnigen_pipe.world.scenes import imagine


def test_a_picture_that_is_missing_is_wrong_in_all_that_was_named() -> None:
    draw = random.Random("rates")
    scenes = [imagine(draw) for _ in range(20)]
    named = [f"{scene.background} background" in scene.caption for scene in scenes]
    assert any(named)
    assert not all(named)
    assert any(scene.background == "black" for scene in scenes)
    pictures = [paint(scene) for scene in scenes]
    whole = measure(pictures, scenes)
    assert (whole.colours, whole.shapes, whole.backgrounds, whole.right) == (1, 1, 1, 1)

    assert whole.colours_and_shapes == 1

    none = measure([None] * 20, scenes)
    assert (none.pictures, none.colours, none.shapes, none.backgrounds) == (20, 0, 0, 0)
    assert (none.colours_and_shapes, none.right) == (0, 0)
    for lost, scene in enumerate(scenes):
        found = measure([*pictures[:lost], None, *pictures[lost + 1 :]], scenes)
        things = sum(len(scene.things) for scene in scenes)
        assert (found.colours_and_shapes, found.right) == (19 / 20, 19 / 20)
        assert round(things * (1 - found.shapes)) == len(scene.things)
        assert round(sum(named) * (1 - found.backgrounds)) == named[lost]


def test_a_picture_with_one_wrong_thing_is_wrong() -> None:
    """Its size and its background are not asked for in colours and shapes."""
    draw = random.Random("pairs")
    scenes = [imagine(draw, things=2) for _ in range(10)]
    wrong = scenes[0]
    first, second = wrong.things
    other = "square" if second.shape != "square" else "circle"
    pictures = [paint(scene) for scene in scenes]
    pictures[0] = paint(replace(wrong, things=(first, replace(second, shape=other))))
    rates = measure(pictures, scenes)
    assert (rates.shapes, rates.colours_and_shapes, rates.right) == (19 / 20, 9 / 10, 9 / 10)

    named = next(scene for scene in scenes if f"{scene.background} background" in scene.caption)
    background = "white" if named.background != "white" else "black"
    rates = measure([paint(replace(named, background=background))], [named])
    assert (rates.colours_and_shapes, rates.right) == (1, 0)


def test_a_picture_that_is_not_finite_is_none(pipe: Any, recommended: Settings) -> None:
    scenes = [imagine(random.Random(n), size=(64, 64)) for n in range(3)]
    with torch.no_grad():
        pipe.vae.post_quant_conv.bias[0] = float("nan")
    settings = recommended.changed({"num_inference_steps": 1}, "test")
    assert draw_scenes(pipe, scenes, settings) == [None] * 3
