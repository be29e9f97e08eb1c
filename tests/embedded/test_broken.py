"""With one thing broken, the embedded model draws wrongly: so what it draws proves that whole.

Here the sampling is broken; `test_broken_training.py` breaks the training.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from omnigen_pipe.embedded.rates import draw_scenes, measure
from omnigen_pipe.sampling.requests import Settings
from omnigen_pipe.world.scenes import Scene, distinct, imagine

#: The whole model is above this, and every broken one below it.
LIMIT = 0.75
#: Levels of 255 by which rounding may move a pixel.
SAME = 4


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    """Two things each: more can go wrong than with one."""
    draw = random.Random("broken")
    return distinct((imagine(draw, size=(64, 64), things=2) for _ in range(40)), 32)


def right(pipe: Any, scenes: list[Scene], settings: Settings) -> float:
    return measure(draw_scenes(pipe, scenes, settings), scenes).right


def negate(module: Any, inputs: Any, output: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (-output[0],)


def reverse_time(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "timestep": 1 - kwargs["timestep"]}


def wrong_sign(pipe: Any, patch: pytest.MonkeyPatch) -> None:
    pipe.transformer.register_forward_hook(negate)


def reversed_time(pipe: Any, patch: pytest.MonkeyPatch) -> None:
    pipe.transformer.register_forward_pre_hook(reverse_time, with_kwargs=True)


def no_scaling(pipe: Any, patch: pytest.MonkeyPatch) -> None:
    pipe.vae.register_to_config(scaling_factor=1.0)


def prompt_shuffled(pipe: Any, patch: pytest.MonkeyPatch) -> None:
    """Positions all 0 in the prompt: its words have no order."""
    original = pipe.transformer.rope.forward

    def forward(hidden_states: torch.Tensor, position_ids: torch.Tensor) -> Any:
        image = position_ids.shape[1] - 16
        flat = position_ids.clone()
        flat[:, :image] = 0
        return original(hidden_states, flat)

    patch.setattr(pipe.transformer.rope, "forward", forward)


@pytest.mark.parametrize("broken", [wrong_sign, reversed_time, no_scaling, prompt_shuffled])
def test_what_is_broken_shows(
    pipe: Any,
    recommended: Settings,
    scenes: list[Scene],
    broken: Callable[[Any, pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken(pipe, monkeypatch)
    assert right(pipe, scenes, recommended) < LIMIT


def mixed() -> list[Scene]:
    """A short sentence first, then long ones: batched, their prompts begin at different places."""
    draw = random.Random("mixed")
    scenes = [imagine(draw, size=(64, 64), things=2) for _ in range(100)]
    scenes.sort(key=lambda scene: len(scene.caption))
    return [scenes[0], *scenes[-7:]]


def drawn_as_alone(pipe: Any, settings: Settings) -> float:
    """The share of the long sentences whose picture is, in a batch, the one drawn alone."""
    scenes = mixed()
    alone = [draw_scenes(pipe, [s], settings, seed=n)[0] for n, s in enumerate(scenes)][1:]
    batch = draw_scenes(pipe, scenes, settings)[1:]
    distances = [
        np.abs(np.asarray(one, dtype=int) - np.asarray(other)).max()
        for one, other in zip(alone, batch, strict=True)
    ]
    return float(np.mean([distance <= SAME for distance in distances]))


def test_positions_of_the_first_row_show_in_a_batch(
    pipe: Any, recommended: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers' own rotation takes row 0's positions for all rows. The model is too good a reader
    to draw the wrong things then: causality alone tells it the words' order. But its pictures
    change."""
    assert drawn_as_alone(pipe, recommended) == 1
    rope = pipe.transformer.rope
    right = rope.forward
    monkeypatch.setattr(rope, "forward", lambda x, ids: right(x, ids[:1].expand_as(ids)))
    assert drawn_as_alone(pipe, recommended) < 0.3


def test_whole_it_draws_them(pipe: Any, recommended: Settings, scenes: list[Scene]) -> None:
    assert right(pipe, scenes, recommended) > LIMIT
