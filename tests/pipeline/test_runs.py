"""Training as a process: stopped, killed, resumed, and refused where it would mean another run."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from pipeline_project import COMMAND, Project
from safetensors.torch import load_file
from training_project import change, losses


@pytest.fixture
def prepared(project: Callable[..., Project], tmp_path: Path) -> Callable[..., Project]:
    """A project whose first four stages are done: five pictures in two buckets."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(5):
        size = (80, 80) if number < 3 else (112, 64)
        Image.radial_gradient("L").resize(size).rotate(30 * number).convert("RGB").save(
            folder / f"picture {number}.png"
        )

    def make(**train: object) -> Project:
        here = project(folder, train=train)
        for stage in ("discover", "bucket", "encode-vae", "tokenize"):
            here.run(stage)
        return here

    return make


def test_two_halves_equal_the_whole_and_changed_settings_are_refused(
    prepared: Callable[..., Project],
) -> None:
    here = prepared(max_train_steps=3)
    here.run("train")
    change(here, max_train_steps=7, learning_rate=1e-4)
    halves = here.json("train")
    assert halves["counts"]["steps now"] == 4
    change(here, tracker_run_name="whole")
    whole = here.json("train")
    assert losses(here) == losses(here, "whole")
    one, other = load_file(halves["adapter"]), load_file(whole["adapter"])
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert here.json("train")["changed"] is False

    change(here, train_batch_size=1, max_train_steps=9)
    assert "train_batch_size: 2 → 1" in here.run("train", status=2).stderr


def _start(here: Project) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, "train", "--json"],
        cwd=here.root,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def _wait_for_steps(here: Project, process: subprocess.Popen[str], steps: int) -> None:
    metrics = here.root / "runs" / "default" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_text().splitlines()) < steps:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline


@pytest.mark.parametrize(
    ("number", "status"),
    [
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGKILL, -9, marks=pytest.mark.slow),
    ],
)
def test_a_signal_in_the_middle_loses_nothing_that_was_saved(
    prepared: Callable[..., Project], number: signal.Signals, status: int
) -> None:
    here = prepared(max_train_steps=100_000, checkpoint_step_interval=5)
    process = _start(here)
    _wait_for_steps(here, process, 12)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert "Traceback" not in errors
    if number is not signal.SIGKILL:
        stopped = json.loads(output)
        assert Path(stopped["adapter"]).is_file()
        assert len(losses(here)) == stopped["counts"]["steps"]

    change(here, max_train_steps=20_000, tracker_run_name="default")
    steps = len(losses(here)) + 3
    change(here, max_train_steps=steps)
    here.run("train")
    change(here, tracker_run_name="whole")
    here.run("train")
    assert losses(here) == losses(here, "whole")
    assert len(losses(here)) == steps


def test_old_checkpoints_go_and_changed_data_are_said(
    prepared: Callable[..., Project], tmp_path: Path
) -> None:
    here = prepared(max_train_steps=6, checkpoint_step_interval=2, checkpoints_total_limit=2)
    here.run("train")
    checkpoints = here.root / "runs" / "default" / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-00000004", "step-00000006"]
    Image.new("RGB", (80, 80)).save(tmp_path / "pictures" / "new.png")
    change(here, max_train_steps=8)
    parts = here.json("run")
    assert parts[-1]["counts"]["samples"] == 5
    assert any("goes on with the 5 samples that it froze" in note for note in parts[-1]["notes"])


def test_missing_latents_stop_training_unless_allowed(
    prepared: Callable[..., Project],
) -> None:
    here = prepared(max_train_steps=2)
    bucket = next((here.root / "latents").iterdir())
    for shard in bucket.iterdir():
        shard.unlink()
    assert "omnigen-pipe encode-vae" in here.run("train", status=1).stderr
    summary = here.json("train", "--allow-missing")
    left_out = {"no latent, mask or prompt yet": 5 - summary["counts"]["samples"]}
    assert summary["left_out"] == left_out
    assert here.json("train", "--strict", status=3)["left_out"] == left_out, "said every time"


def test_a_damaged_newest_checkpoint_costs_only_its_own_steps(
    prepared: Callable[..., Project],
) -> None:
    here = prepared(max_train_steps=8, checkpoint_step_interval=4, checkpoints_total_limit=2)
    here.run("train")
    whole = losses(here)
    checkpoints = here.root / "runs" / "default" / "checkpoints"
    (checkpoints / "step-00000008" / "training.pt").write_bytes(b"")
    change(here, checkpoints_total_limit=1, max_train_steps=7)
    summary = here.json("train")
    assert any("step-00000008" in note for note in summary["notes"])
    assert Path(summary["adapter"]).is_file()
    assert losses(here) == whole[:7]
    names = sorted(p.name for p in checkpoints.iterdir())
    assert names == ["damaged-0-step-00000008", "step-00000007"]
    assert here.json("train")["changed"] is False


def test_a_first_start_that_failed_can_be_mended(prepared: Callable[..., Project]) -> None:
    here = prepared(max_train_steps=2)
    path = here.root / "omnigen-pipe.toml"
    good = path.read_text()
    path.write_text(good + '[lokr.apply_preset]\ntarget_module = ["Atention"]\n')
    here.run("train", status=2)
    path.write_text(good)
    change(here, train_batch_size=1)
    assert here.json("train")["counts"]["steps"] == 2


def test_a_run_goes_on_with_latents_that_were_encoded_again(
    prepared: Callable[..., Project],
) -> None:
    here = prepared(max_train_steps=3)
    here.run("train")
    shutil.rmtree(here.root / "latents")
    change(here, max_train_steps=6)
    assert "omnigen-pipe encode-vae" in here.run("train", status=1).stderr
    path = here.root / "omnigen-pipe.toml"
    path.write_text(path.read_text() + "[vae]\nvae_batch_size = 1\n")
    here.run("encode-vae")
    assert here.json("train")["counts"]["steps"] == 6


def test_another_transformer_or_dropout_prompt_is_noticed(
    prepared: Callable[..., Project], tmp_path: Path, small_omnigen: Path
) -> None:
    here = prepared(max_train_steps=2, caption_dropout_prompt="negative")
    here.run("train")
    path = here.root / "omnigen-pipe.toml"
    text = path.read_text()
    path.write_text(text + '[validation]\nvalidation_negative_prompt = "ugly"\n')
    here.run("tokenize")
    assert any("today's data differ" in note for note in here.json("train")["notes"])

    moved = tmp_path / "moved"
    shutil.copytree(small_omnigen, moved)
    path.write_text(text.replace(str(small_omnigen), str(moved)))
    assert here.json("train")["notes"][0].startswith("The run `default` is complete")
    weights = moved / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert "another transformer" in here.run("train", status=2).stderr
    # Nor where today's samples cannot be compared, because bucket has to run first.
    path.write_text(path.read_text().replace("resolution = 64", "resolution = 48"))
    assert "another transformer" in here.run("train", status=2).stderr


def test_a_run_of_an_earlier_version_goes_on(prepared: Callable[..., Project]) -> None:
    here = prepared(max_train_steps=1)
    here.run("train")
    path = here.root / "runs" / "default" / "run.json"
    run = json.loads(path.read_text())
    del run["settings"]["vae_posterior"]
    path.write_text(json.dumps(run))
    change(here, max_train_steps=2)
    assert here.json("train")["counts"]["steps"] == 2
