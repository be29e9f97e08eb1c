"""Stopped anywhere, any number of times, a run gives the numbers of one that never stopped."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import start
from pipeline_project import Project
from training_project import change, evaluations, metrics, prepare

from small_omnigen import build_small_omnigen

#: Steps of such runs that every test run does, and of those that only the slow ones do.
STEPS, MANY = 24, 40


@pytest.mark.parametrize(
    ("steps", "options"),
    [
        (STEPS, {}),
        pytest.param(MANY, {}, marks=pytest.mark.slow),
        pytest.param(
            MANY,
            {"optimizer": "prodigy", "learning_rate": 1.0, "train_batch_size": 1},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            MANY,
            {"optimizer": "adamw_schedulefree", "lr_scheduler": "constant", "use_ema": False},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            MANY,
            {"gradient_checkpointing": True, "mixed_precision": "bf16", "vae_posterior": "sample"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_a_run_killed_anywhere_ends_as_one_that_never_was(
    project: Callable[..., Project], tmp_path: Path, steps: int, options: dict[str, object]
) -> None:
    """To the last bit, over many epochs, with accumulation, repeats, two buckets,
    regularisation, rollout, evaluation and averages; SIGKILL at drawn steps, again and again."""
    here = prepare(
        project,
        tmp_path,
        max_train_steps=steps,
        gradient_accumulation_steps=3,
        checkpoint_step_interval=3,
        **options,
    )
    chance = random.Random(7)
    path = here.root / "runs" / "default" / "metrics.jsonl"
    kills = 0
    while True:
        done = len(path.read_text().splitlines()) if path.exists() else 0
        child = start(here.root, "train", "--device", "cpu")
        goal = done + chance.randint(1, 12)
        deadline = time.monotonic() + 120
        while not child.ends_within(0.002):
            assert time.monotonic() < deadline
            if path.exists() and path.read_bytes().count(b"\n") >= goal:
                child.kill()
                break
        if child.ended(None).status == 0:
            break
        kills += 1
    assert kills >= 3
    change(here, tracker_run_name="whole")
    start(here.root, "train", "--device", "cpu").ended()
    assert metrics(here) == metrics(here, "whole")
    assert len(metrics(here)) == steps
    assert metrics(here)[-1]["epoch"] > 5
    assert evaluations(here) == evaluations(here, "whole")
    folders = [here.root / "runs" / run / "checkpoints" for run in ("default", "whole")]
    files = sorted((folders[0] / f"step-{steps:08d}").glob("*.safetensors"))
    assert [file.name for file in files] == ["adapter.safetensors", "ema.safetensors"][
        : 2 if options.get("use_ema", True) else 1
    ]
    for file in files:
        other = folders[1] / file.parent.name / file.name
        assert file.read_bytes() == other.read_bytes(), file.name


def test_what_there_is_to_say_of_a_start_is_said_before_its_first_step(
    project: Callable[..., Project], tmp_path: Path
) -> None:
    """Also to one who asked for quiet: the run may take days, or be killed."""
    here = prepare(project, tmp_path, max_train_steps=6, checkpoint_step_interval=3)
    change(here, eval_steps_interval=0, lr_scheduler="constant")
    here.run("train", "--device", "cpu")
    newest = here.root / "runs" / "default" / "checkpoints" / "step-00000006" / "training.pt"
    newest.write_bytes(newest.read_bytes() + b"x")
    change(here, max_train_steps=100_000, learning_rate=5e-4, optimizer="adamw")
    child = start(here.root, "train", "--device", "cpu", "--quiet")
    path = here.root / "runs" / "default" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while len(path.read_bytes().splitlines()) < 8:
        assert time.monotonic() < deadline
    child.kill()
    said = child.ended(-9).stderr
    assert "Passed over the checkpoint" in said
    assert "learning_rate was 0.001 and is 0.0005 from here on" in said


def test_run_refuses_an_impossible_evaluation_before_it_does_anything(
    project: Callable[..., Project], tmp_path: Path
) -> None:
    here = project(tmp_path, train={"eval_steps_interval": 5})
    assert "nothing to evaluate on" in here.run("run", status=2).stderr
    assert not (here.root / "manifests").exists()


@pytest.mark.slow
def test_libraries_stay_quiet(project: Callable[..., Project], tmp_path: Path) -> None:
    """Every line on stderr is ours, though quantisers and paged optimizers like to talk."""
    here = prepare(project, tmp_path, max_train_steps=1, base_model_precision="int8-quanto")
    change(here, optimizer="bnb-lion8bit-paged", eval_steps_interval=0, use_ema=False)
    change(here, lr_warmup_steps=0, lr_scheduler="constant")
    said = here.run("train", "--device", "cpu", process=True).stderr.splitlines()
    begins = ("Measuring the variance", "LoKr on ", "bnb-lion8bit-paged pages")
    assert all(line.startswith(begins) for line in said), said
    assert here.run("estimate", "--quiet", process=True).stderr == ""


def test_eval_gives_what_training_wrote_for_any_checkpoint(
    project: Callable[..., Project], tmp_path: Path
) -> None:
    """To the last bit, for the adapter and its average, and for the base model at step 0."""
    here = prepare(project, tmp_path, checkpoint_step_interval=4)
    here.run("train", "--device", "cpu")
    written = {line["step"]: line for line in evaluations(here)}
    assert set(written) == {0, 4, 8}
    folder = here.root / "runs" / "default" / "checkpoints"
    places = [str(folder / f"step-{step:08d}") for step in (4, 8)]
    scores = here.json("eval", "--base", *places, "--device", "cpu")
    assert [score["adapter"] and Path(score["adapter"]).name for score in scores] == [
        None,
        *["adapter.safetensors", "ema.safetensors"] * 2,
    ]
    expected = [written[0], written[4], written[4]["ema"], written[8], written[8]["ema"]]
    for score, line in zip(scores, expected, strict=True):
        assert score["losses"] == line["losses"]
        assert score["baseline"] == line["baseline"]
    newest = here.run("eval", "--device", "cpu").stdout
    assert "step-00000008/adapter.safetensors" in newest
    assert f"{written[8]['loss']:.4f}" in newest


def test_eval_says_what_is_missing(project: Callable[..., Project], tmp_path: Path) -> None:
    here = prepare(project, tmp_path)
    assert "has not been started" in here.run("eval", status=2).stderr
    change(here, eval_steps_interval=0, max_train_steps=1)
    here.run("train", "--device", "cpu")
    assert "There is no adapter" in here.run("eval", "nothing.safetensors", status=2).stderr
    assert "has not been started" in here.run("eval", "--run", "other", status=2).stderr
    build_small_omnigen(tmp_path / "other", seed=1)
    path = here.root / "omnigen-pipe.toml"
    lines = path.read_text().splitlines()
    lines[1] = f'pretrained_model_name_or_path = "{tmp_path / "other"}"'
    path.write_text("\n".join(lines))
    assert "another transformer" in here.run("eval", status=2).stderr


def test_a_run_is_trained_by_one_command_at_a_time(
    project: Callable[..., Project], tmp_path: Path
) -> None:
    here = prepare(project, tmp_path, max_train_steps=100_000, lr_scheduler="constant")
    change(here, eval_steps_interval=0)
    first = start(here.root, "train", "--device", "cpu")
    path = here.root / "runs" / "default" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not path.exists() or not path.read_bytes():
        assert time.monotonic() < deadline
    assert "Another command is training" in start(here.root, "train").ended(2).stderr
    first.kill()
    first.ended(-9)
    change(here, max_train_steps=2)
    here.run("train", "--device", "cpu")


def test_evaluation_cannot_be_asked_of_a_run_without_samples_for_it(
    project: Callable[..., Project], tmp_path: Path
) -> None:
    here = prepare(project, tmp_path, max_train_steps=2)
    path = here.root / "omnigen-pipe.toml"
    whole = path.read_text()
    path.write_text(
        whole.replace('dataset_type = "eval"', 'dataset_type = "eval"\ndisabled = true')
    )
    assert "nothing to evaluate on" in here.run("run", "--device", "cpu", status=2).stderr
    change(here, eval_steps_interval=0)
    here.run("run", "--device", "cpu")
    change(here, eval_steps_interval=1, max_train_steps=4)
    said = here.run("train", "--device", "cpu", status=2).stderr
    assert "was started without evaluation samples" in said
