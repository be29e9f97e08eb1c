"""An adapter says what it was trained on, and who uses it elsewhere is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from blake3 import blake3
from PIL import Image
from pipeline_project import Project
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training_project import prepare

from manifests.keys import key

WEIGHTS = Path("transformer") / "diffusion_pytorch_model.safetensors"
FAST = ("--size", "48x32", "--steps", "1", "--device", "cpu")


@pytest.fixture
def trained(project: Callable[..., Project], tmp_path: Path) -> Project:
    """A workspace with a run of two checkpoints, each with its average."""
    here = prepare(
        project,
        tmp_path,
        max_train_steps=4,
        checkpoint_step_interval=2,
        eval_steps_interval=0,
        gradient_accumulation_steps=1,
    )
    here.run("train", "--device", "cpu")
    return here


def test_an_adapter_knows_its_base_and_its_step(
    trained: Project, small_omnigen: Path, tmp_path: Path
) -> None:
    newest = trained.root / "runs" / "default" / "checkpoints" / "step-00000004"
    own = key(blake3((small_omnigen / WEIGHTS).read_bytes()).hexdigest())
    for name in ("adapter", "ema"):
        with safe_open(newest / f"{name}.safetensors", framework="np") as handle:
            said = handle.metadata()
        assert (said["base"], said["transformer_key"]) == (small_omnigen.name, own)
        assert str(tmp_path) not in json.dumps(said)
    for folder, options in (("merged", ()), ("average", ("--ema",))):
        ended = trained.run("export", "runs/default", "-o", folder, *options)
        assert "step 4, BLAKE3" in ended.stdout
        assert "was trained on other" not in ended.stdout
        assert "does not say" not in ended.stdout
    assert (trained.root / "merged" / WEIGHTS).read_bytes() != (
        trained.root / "average" / WEIGHTS
    ).read_bytes()

    draw = ("generate", "a cat", "--adapter", "runs/default", *FAST)
    ended = trained.run(*draw, "-o", "own.png")
    assert "step 4, BLAKE3" in ended.stdout
    assert "was trained on other weights" not in ended.stdout

    # The newest is damaged: which one is used instead is said, in words and in what is written.
    (newest / "adapter.safetensors").write_bytes(b"")
    ended = trained.run("export", "runs/default", "-o", "older")
    assert "step-00000004: adapter.safetensors is damaged" in ended.stdout
    assert "step 2, BLAKE3" in ended.stdout
    marker = json.loads((trained.root / "older" / "export.json").read_text())
    assert (marker["adapter_step"], marker["trained_on"]) == ("2", small_omnigen.name)
    ended = trained.run(*draw, "-o", "older.png")
    assert "step-00000004: adapter.safetensors is damaged" in ended.stdout
    with Image.open(trained.root / "older.png") as picture:
        assert picture.info["adapter_step"] == "2"

    # The same shapes, other numbers.
    shutil.copytree(small_omnigen, tmp_path / "other")
    state = load_file(tmp_path / "other" / WEIGHTS)
    state["norm.weight"] *= 1.5
    save_file(state, tmp_path / "other" / WEIGHTS, metadata={"format": "pt"})
    other = ("--model", str(tmp_path / "other"))
    ended = trained.run("export", "runs/default", "-o", "wrong", *other, status=2)
    assert "was trained on other weights than other has" in ended.stderr
    assert "--any-base" in ended.stderr
    ended = trained.run(*draw, "-o", "wrong.png", *other)
    assert "was trained on other weights than other has" in ended.stdout
