"""Wrong configuration: one clear message, exit status 2, no traceback, nothing half done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from pipeline_project import Project


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (80, 80), (60 * number, 90, 30)).save(folder / f"picture {number}.png")
    return folder


@pytest.mark.parametrize(
    ("dataset", "train", "words"),
    [
        ({"resolutoin": 64}, {}, ["dataset[0].resolutoin", "did you mean `resolution`"]),
        ({"repeats": "many"}, {}, ["dataset[0].repeats", "'many'", "integer"]),
        ({"resolution": 4096}, {}, ["dataset `main`", "4096 px", "3072"]),
        ({"aspect_bucket_alignment": 20}, {}, ["aspect_bucket_alignment", "multiple of 16"]),
        ({}, {"learning_rate": -1}, ["train.learning_rate", "greater than 0"]),
        ({}, {"max_train_steps": 0}, ["max_train_steps", "num_train_epochs"]),
        ({}, {"lycoris_config": "gone.json"}, ["lycoris_config", "gone.json"]),
    ],
)
def test_a_fault_in_the_file(
    project: Callable[..., Project],
    pictures: Path,
    dataset: dict[str, object],
    train: dict[str, object],
    words: list[str],
) -> None:
    here = project(pictures, dataset, train)
    done = here.run("run", status=2)
    message = done.stderr.splitlines()[-1]
    assert message.startswith("Error: ")
    for word in words:
        assert word in done.stderr, done.stderr
    assert not (here.root / "runs").exists()
    assert not (here.root / "latents").exists(), "found before hours of encoding"


def test_a_missing_image_folder(project: Callable[..., Project], tmp_path: Path) -> None:
    done = project(tmp_path / "nowhere").run("run", status=2)
    assert "nowhere" in done.stderr
    assert "main" in done.stderr


def test_a_missing_model_folder(project: Callable[..., Project], pictures: Path) -> None:
    here = project(pictures)
    path = here.root / "omnigen-pipe.toml"
    lines = path.read_text().splitlines()
    lines[1] = 'pretrained_model_name_or_path = "./no-model-here"'
    path.write_text("\n".join(lines))
    assert "no-model-here" in here.run("run", status=2).stderr


def test_a_lokr_target_that_matches_nothing(
    project: Callable[..., Project], pictures: Path
) -> None:
    extra = '[lokr.apply_preset]\ntarget_module = ["Attention", "Transformer"]\n'
    done = project(pictures, extra=extra).run("run", status=2)
    assert "`Transformer` matches nothing" in done.stderr
    assert "FeedForward" in done.stderr


def test_no_configuration_at_all(tmp_path: Path) -> None:
    done = Project(tmp_path).run("run", status=2)
    assert "omnigen-pipe init" in done.stderr


def test_an_unknown_option_of_a_command(tmp_path: Path) -> None:
    assert "--nope" in Project(tmp_path).run("train", "--nope", status=2).stderr


def test_stages_out_of_order_say_which_comes_first(
    project: Callable[..., Project], pictures: Path
) -> None:
    here = project(pictures)
    assert "omnigen-pipe discover" in here.run("bucket", status=1).stderr
    here.run("discover")
    assert "omnigen-pipe bucket" in here.run("encode-vae", status=1).stderr
    assert "omnigen-pipe bucket" in here.run("tokenize", status=1).stderr
    here.run("bucket")
    stderr = here.run("train", status=1).stderr
    assert "omnigen-pipe encode-vae" in stderr
    assert "omnigen-pipe tokenize" in stderr
    assert "--allow-missing" in stderr
