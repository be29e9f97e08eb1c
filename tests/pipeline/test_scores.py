"""CLIP scores of validation pictures in whole runs: what they are, where they stand, and that
training goes on as without them."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import start_all
from listening import listener
from PIL import Image
from pipeline_project import Project, configured
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_project import change, copied, draw_turned, metrics, run_first_four
from transformers import CLIPModel, CLIPProcessor

from omnigen_pipe.sampling.clip import ClipScorer
from small_clip import build_small_clip

VALIDATION = """
[validation]
validation_prompt = "a red circle on a very long wall of many bricks"
user_prompt_library = "library.json"
validation_resolution = "32x32"
validation_num_inference_steps = 2
validation_step_interval = 2
pretrained_evaluation_model_name_or_path = "clip"
"""
SCORES = 'evaluation_type = "clip"\n'
PROMPTS = {"cat": "a cat", "validation": "a red circle on a very long wall of many bricks"}
TRAIN = ("train", "--device", "cpu")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, small_omnigen: Path) -> Project:
    """Ready for training, four steps with three validations, still without scores: whoever trains
    makes a copy."""
    folder = tmp_path_factory.mktemp("scores")
    pictures = folder / "pictures"
    draw_turned(pictures, 2)
    options = {
        "max_train_steps": 4,
        "learning_rate": 1e-2,
        "use_ema": True,
        "checkpoint_step_interval": 2,
        "report_to": "tensorboard",
    }
    root = folder / "workspace"
    here = configured(root, small_omnigen, pictures, train=options, extra=VALIDATION)
    (root / "library.json").write_text(json.dumps({"cat": "a cat"}))
    build_small_clip(root / "clip")
    run_first_four(here)
    return here


@pytest.fixture(scope="module")
def plain(prepared: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Trained without scores: nobody changes it."""
    here = _copy(prepared, tmp_path_factory.mktemp("plain"), "")
    here.run(*TRAIN)
    return here


@pytest.fixture(scope="module")
def scored(prepared: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Trained and scored in one go: nobody changes it."""
    here = _copy(prepared, tmp_path_factory.mktemp("scored"))
    here.run(*TRAIN)
    return here


def _copy(ready: Project, folder: Path, extra: str = SCORES) -> Project:
    return copied(ready, folder, extra)


def _run(here: Project) -> Path:
    return here.root / "runs" / "default"


def _lines(here: Project) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (_run(here) / "scores.jsonl").read_text().splitlines()]


def _files(here: Project, pattern: str) -> dict[str, bytes]:
    found = sorted(_run(here).glob(pattern))
    return {str(path.relative_to(_run(here))): path.read_bytes() for path in found}


def _same(here: Project, plain: Project) -> None:
    """Pictures, checkpoints and numbers are those of a run without scores, to the byte."""
    for pattern in ("validation/*/*.png", "checkpoints/*/*"):
        assert _files(here, pattern)
        assert _files(here, pattern) == _files(plain, pattern)
    assert metrics(here) == metrics(plain)


def _expected(here: Project, step: int) -> dict[str, float]:
    """The scores of the pictures after `step`, by transformers alone."""
    folder = here.root / "clip"
    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    scores = {}
    for path in (_run(here) / f"validation/step-{step:06}").glob("*.png"):
        prompt = PROMPTS[path.name.split("-")[0]]
        text = processor.tokenizer(prompt, truncation=True, max_length=12, return_tensors="pt")
        with Image.open(path) as picture, torch.no_grad():
            pixels = processor.image_processor(picture.convert("RGB"), return_tensors="pt")
            found = model(**text, **pixels)
        cosine = torch.nn.functional.cosine_similarity(found.image_embeds, found.text_embeds)
        scores[path.stem] = max(0.0, 100 * float(cosine))
    return scores


def test_every_picture_is_scored_against_its_prompt(scored: Project) -> None:
    lines = _lines(scored)
    assert [line["step"] for line in lines] == [0, 2, 4]
    for line in lines:
        expected = _expected(scored, line["step"])
        assert line["clip_scores"] == pytest.approx(expected, abs=1e-3)
        own = [score for name, score in expected.items() if not name.endswith("-ema")]
        assert line["clip_score"] == pytest.approx(statistics.fmean(own), abs=1e-3)
        if line["step"]:
            average = [score for name, score in expected.items() if name.endswith("-ema")]
            assert line["clip_score_ema"] == pytest.approx(statistics.fmean(average), abs=1e-3)
    assert "clip_score_ema" not in lines[0]
    assert any(line["clip_score"] > 0 for line in lines)


def test_training_goes_on_as_if_nothing_had_been_scored(scored: Project, plain: Project) -> None:
    _same(scored, plain)
    assert _lines(plain) == []


def test_scores_are_told_and_shown(prepared: Project, tmp_path: Path) -> None:
    with listener() as (address, got):
        hook = f'\n[[webhook]]\nurl = "{address}"\nevents = ["validation"]\n'
        here = _copy(prepared, tmp_path, SCORES + hook)
        ended = here.run(*TRAIN, "--json")
    lines = _lines(here)
    summary = json.loads(ended.stdout)
    for key in ("clip_score", "clip_score_ema", "clip_scores"):
        assert summary["validation"][key] == lines[-1][key]
        assert got[-1][key] == lines[-1][key]
    assert "1 of 2 validation prompts are longer than CLIP reads" in ended.stderr
    assert "Loading weights" not in ended.stderr
    words = f"CLIP score after step 4: {lines[-1]['clip_score']:.2f}, "
    assert f"{words}{lines[-1]['clip_score_ema']:.2f} of the average" in ended.stderr

    folder = str(_run(here) / "tensorboard")
    events = EventAccumulator(folder, size_guidance={"scalars": 0}).Reload()
    shown = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }
    for end in ("", "_ema"):
        of_step = [line for line in lines if f"clip_score{end}" in line]
        means = [(line["step"], line[f"clip_score{end}"]) for line in of_step]
        assert [step for step, _ in shown[f"clip{end}/mean"]] == [step for step, _ in means]
        for (_, found), (_, mean) in zip(shown[f"clip{end}/mean"], means, strict=True):
            assert found == pytest.approx(mean)
        assert len(shown[f"clip{end}/cat-32x32"]) == len(means)
        assert len(shown[f"clip{end}/min"]) == len(shown[f"clip{end}/max"]) == len(means)


def test_a_run_that_goes_on_has_one_line_for_each_step(scored: Project, tmp_path: Path) -> None:
    """What is recorded is not scored again; what lies after the checkpoint is."""
    here = _copy(scored, tmp_path, "")
    shutil.rmtree(_run(here) / "checkpoints/step-00000004")
    here.run(*TRAIN)
    assert _lines(here) == _lines(scored)


def test_pictures_whose_scores_are_lacking_are_scored_when_the_run_goes_on(
    plain: Project, scored: Project, tmp_path: Path
) -> None:
    """Of the step that it goes on from, and of later ones, though none is drawn again."""
    here = _copy(plain, tmp_path)
    shutil.rmtree(_run(here) / "checkpoints/step-00000004")
    assert here.json(*TRAIN)["validation"]["drawn"] == 0
    assert _lines(here) == _lines(scored)[1:]
    _same(here, plain)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), "CUDA out of memory."),
        (MemoryError(), "MemoryError"),
    ],
)
def test_a_score_that_fails_is_said_and_training_goes_on(
    prepared: Project,
    plain: Project,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    why: str,
) -> None:
    def failing(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(ClipScorer, "scores", failing)
    here = _copy(prepared, tmp_path)
    said = here.run(*TRAIN).stderr
    assert "The CLIP scores of the pictures after step 2 could not be computed" in said
    assert why in said
    assert _lines(here) == []
    _same(here, plain)


@pytest.mark.slow
def test_with_two_processes_the_first_scores_what_both_draw(
    prepared: Project, tmp_path: Path
) -> None:
    here = _copy(prepared, tmp_path)
    first, second = start_all(here.root, 2, *TRAIN, "--json")
    assert len(first.json()["validation"]["clip_scores"]) == 4
    assert second.ended().stderr == ""
    assert _lines(here)[-1]["clip_scores"] == pytest.approx(_expected(here, 4), abs=1e-3)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('pretrained_evaluation_model_name_or_path = "gone"', "gone does not exist"),
        ('pretrained_evaluation_model_name_or_path = "staging"', "says no model_type"),
        ('evaluation_type = "fid"', "evaluation_type"),
    ],
)
def test_what_cannot_score_is_refused_before_the_first_step(
    prepared: Project, tmp_path: Path, lines: str, message: str
) -> None:
    here = _copy(prepared, tmp_path, "" if "evaluation_type" in lines else SCORES)
    (here.root / "staging").mkdir(exist_ok=True)
    path = here.root / "omnigen-pipe.toml"
    text = path.read_text().replace('pretrained_evaluation_model_name_or_path = "clip"\n', "")
    path.write_text(f"{text}\n{lines}\n")
    assert message in " ".join(here.run(*TRAIN, status=2).stderr.split())
    assert not (_run(here) / "checkpoints").exists()


def test_scores_without_validation_are_said_to_have_no_effect(
    prepared: Project, tmp_path: Path
) -> None:
    here = _copy(prepared, tmp_path)
    path = here.root / "omnigen-pipe.toml"
    path.write_text(path.read_text().replace("step_interval = 2\np", "step_interval = 0\np"))
    change(here, max_train_steps=1)
    assert "evaluation_type has no effect" in here.run(*TRAIN).stderr
    assert _lines(here) == []
