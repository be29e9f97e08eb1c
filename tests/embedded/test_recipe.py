"""The recipe's digest is of all that decides what is made."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from manifests.errors import UsageError
from omnigen_pipe.embedded import autoencoder, card, learned, pretraining, tokenizer
from omnigen_pipe.embedded.card import write_card
from omnigen_pipe.embedded.making import Making, begun
from omnigen_pipe.embedded.recipe import recipe
from omnigen_pipe.progress import Progress
from omnigen_pipe.world import drawing, scenes

MAKING = Making(pictures=50)
CHANGES = [
    (scenes, "_OPENED", 0.3),
    (scenes, "_OF_TWO", {"large": 0.36, "small": 0.27}),
    (scenes, "OPENINGS", ("a painting of",)),
    (drawing, "_CROSS_ARM", 0.3),
    (drawing, "_STAR_INNER", 0.5),
    (autoencoder, "_SCRIBBLED", 0.5),
    (autoencoder, "_HUE", 2.0),
    (autoencoder, "_ARCHITECTURE", {"latent_channels": 8}),
    (learned, "_MADE_UP", 0.1),
    (learned, "_CONFIGURATION", ""),
    (pretraining, "_BLOCKS", 8),
    (tokenizer, "VOCABULARY", 512),
    (tokenizer, "SPECIAL_TOKENS", ("<unk>",)),
]


@pytest.mark.parametrize(("module", "name", "value"), CHANGES)
def test_another_value_is_another_recipe(
    module: Any, name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = recipe(MAKING)
    random.random()  # nothing depends on the state of what is drawn elsewhere
    assert recipe(MAKING) == before
    monkeypatch.setattr(module, name, value)
    assert recipe(MAKING) != before


def test_how_often_a_state_is_saved_is_not_of_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    before = recipe(MAKING)
    monkeypatch.setattr(autoencoder, "_SAVE_EVERY", 7)
    assert recipe(MAKING) == before


def test_no_card_is_written_of_a_model_of_another_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with begun(tmp_path / "w", MAKING, recipe(MAKING)):
        pass
    monkeypatch.setattr(learned, "_MADE_UP", 0.1)
    with pytest.raises(UsageError, match="by the recipe"):
        write_card(tmp_path / "w", tmp_path / "staging", Progress(quiet=True))
    assert not (tmp_path / "w" / card.CARD_NAME).exists()
