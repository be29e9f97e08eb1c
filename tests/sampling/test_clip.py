"""CLIP scores are those that transformers' own model and processor give."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPProcessor

from manifests.errors import UsageError
from omnigen_pipe.config import parse
from omnigen_pipe.sampling import clip
from omnigen_pipe.sampling.clip import check, load_scorer
from omnigen_pipe.workspace import Workspace
from small_clip import LENGTH, build_small_clip

CPU = torch.device("cpu")
LONG = "a red circle on a very long wall of many bricks"
PROMPTS = ["red", "A  red\ncircle", "it's 2 dogs!", LONG, ""]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small CLIP that a test may change."""
    return build_small_clip(tmp_path / "clip")


def workspace(root: Path, **options: Any) -> Workspace:
    wanted = {
        "evaluation_type": "clip",
        "validation_step_interval": 1,
        "pretrained_evaluation_model_name_or_path": "clip",
    }
    return Workspace(root, parse({"validation": {**wanted, **options}}, "test"))


def _pictures(folder: Path) -> list[Path]:
    paths = []
    for number in range(6):
        values = np.random.default_rng(number).integers(0, 256, (2, 3, 3), np.uint8)
        paths.append(folder / f"{number}.png")
        Image.fromarray(values).resize((56, 40)).save(paths[-1])
    return paths


def _by_transformers(model: Any, processor: Any, path: Path, prompt: str) -> float:
    """The score by the library's whole forward pass."""
    text = processor.tokenizer(prompt, truncation=True, max_length=LENGTH, return_tensors="pt")
    with Image.open(path) as picture:
        pixels = processor.image_processor(picture.convert("RGB"), return_tensors="pt")
    with torch.no_grad():
        found = model(**text, **pixels)
    one, other = found.image_embeds[0], found.text_embeds[0]
    return max(0.0, 100 * float(one @ other / (one.norm() * other.norm())))


def test_scores_are_those_of_transformers(folder: Path, tmp_path: Path) -> None:
    """Also of prompts that are cut, whose end token counts; and nothing is drawn at random."""
    pairs = [(path, prompt) for path in _pictures(tmp_path) for prompt in PROMPTS]
    state = torch.get_rng_state()
    scorer = load_scorer(workspace(tmp_path))
    found = list(scorer.scores(pairs, CPU))
    assert torch.equal(torch.get_rng_state(), state)
    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    expected = [_by_transformers(model, processor, *pair) for pair in pairs]
    assert found == pytest.approx(expected, abs=1e-3)
    assert 0.0 in found
    assert len({round(score, 2) for score in found}) > len(pairs) / 2
    assert list(scorer.scores(pairs[::-1], CPU))[::-1] == found


def test_of_a_long_prompt_the_end_token_is_kept(folder: Path, tmp_path: Path) -> None:
    """Without it CLIP would read nothing of the text but its beginning."""
    scorer = load_scorer(workspace(tmp_path))
    (ids,) = scorer.processor(text=[LONG])["input_ids"].tolist()
    end = scorer.model.config.text_config.eos_token_id
    assert (len(ids), ids[-1]) == (LENGTH, end)
    assert end not in ids[:-1]
    assert [scorer.is_cut(prompt) for prompt in PROMPTS] == [p == LONG for p in PROMPTS]


def test_a_picture_that_is_gone_is_an_os_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="gone"):
        list(load_scorer(workspace(tmp_path)).scores([(tmp_path / "gone.png", "red")], CPU))


def test_a_score_that_is_no_number_is_an_error(folder: Path, tmp_path: Path) -> None:
    scorer = load_scorer(workspace(tmp_path))
    scorer.model.clip.visual_projection.weight.data.fill_(torch.nan)
    (path, *_) = _pictures(tmp_path)
    with pytest.raises(ValueError, match=r"score of 0\.png is nan"):
        list(scorer.scores([(path, "red")], CPU))


def test_a_torchmetrics_that_cannot_be_imported_is_said_at_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.multimodal", None)
    with pytest.raises(UsageError, match=r"omnigen-pipe\[scores\]"):
        load_scorer(workspace(tmp_path))


def _without_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _without_a_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights.pop("visual_projection.weight")
    save_file(weights, path, {"format": "pt"})


def _of_another_kind(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "siglip"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_weights, "no weights in safetensors"),
        (_without_a_tensor, r"1 tensors are missing, such as visual_projection\.weight"),
        (_of_another_kind, "it is a siglip"),
        (lambda folder: (folder / "config.json").unlink(), "says no model_type"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), r"tokenizer\.json cannot"),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"tokenizer\.json cannot"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no"), "cannot be used"),
        (lambda folder: (folder / "preprocessor_config.json").write_text("no"), "cannot be used"),
    ],
)
def test_what_cannot_score_is_refused(
    folder: Path, tmp_path: Path, damage: Any, message: str
) -> None:
    damage(folder)
    with pytest.raises(UsageError, match=f"The CLIP in .*{message}.*pretrained_evaluation_model"):
        load_scorer(workspace(tmp_path))


def test_what_is_missing_is_said_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="clip does not exist"):
        check(workspace(tmp_path))
    check(workspace(tmp_path, evaluation_type="none"))
    check(workspace(tmp_path, validation_step_interval=0))

    def missing(name: str) -> str:
        raise clip.PackageNotFoundError(name)

    (tmp_path / "clip").mkdir()
    check(workspace(tmp_path))
    monkeypatch.setattr(clip, "version", missing)
    with pytest.raises(UsageError, match=r"pip install 'omnigen-pipe\[scores\]'"):
        check(workspace(tmp_path))
