"""`omnigen-pipe init` as a person at a terminal meets it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from PIL import Image
from terminal import Terminal, on_terminal

from omnigen_pipe.config import CONFIG_NAME
from omnigen_pipe.workspace import Workspace

Start = Callable[..., AbstractContextManager[Terminal]]


def picture(path: Path, width: int, height: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height)).save(path)


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Starts `init` with arguments in an empty folder, on a machine without a GPU."""

    def started(*arguments: str) -> AbstractContextManager[Terminal]:
        command = [sys.executable, "-m", "omnigen_pipe.cli", "init", *arguments]
        return on_terminal(command, tmp_path, {"CUDA_VISIBLE_DEVICES": ""})

    return started


def test_two_folders_are_looked_into_and_all_that_is_proposed_can_be_taken(
    tmp_path: Path, start: Start
) -> None:
    for number in range(10):
        picture(tmp_path / "cats" / f"IMG_{number:04}.png", 900, 800)
        (tmp_path / "cats" / f"IMG_{number:04}.txt").write_text("a cat")
    picture(tmp_path / "others" / "red bird on a fence.jpg", 1300, 1100)
    with start("project") as terminal:
        terminal.answer("Folder of images", "cats")
        shown = terminal.answer("Resolution")
        assert f"10 images in {tmp_path / 'cats'}" in shown
        assert "10 of 10 images reach it" in shown
        assert shown.endswith("[768]: ")
        shown = terminal.answer("Where captions come from")
        assert "10 of 10 images have a .txt beside them" in shown
        assert shown.endswith("[textfile]: ")
        terminal.answer("Another folder?", "others")
        terminal.answer("regularisation data", "y")
        terminal.answer("Resolution")
        terminal.answer("Where captions come from")
        terminal.answer("Another folder?")
        terminal.answer("Repeats of cats")
        terminal.answer("Repeats of others", "7")
        for question in ("Model", "Name of the run", "Learning rate"):
            terminal.answer(question)
        assert "no GPU" in terminal.answer("Samples per step")
        assert "epochs" in terminal.answer("Optimizer steps")
        terminal.wait_for("Wrote ")
        assert terminal.exit_status() == 0
    config = Workspace.open(tmp_path / "project").config
    cats, others = config.datasets
    assert (cats.id, cats.resolution, cats.caption_strategy) == ("cats", 768, "textfile")
    assert (cats.repeats, cats.is_regularisation_data) == (19, False)
    assert (others.id, others.resolution, others.caption_strategy) == ("others", 1024, "filename")
    assert (others.repeats, others.is_regularisation_data) == (7, True)
    assert config.train.train_batch_size == 1


def test_wrong_answers_are_asked_again_with_the_reason(tmp_path: Path, start: Start) -> None:
    picture(tmp_path / "cats" / "1.png", 600, 600)
    (tmp_path / "a file").touch()
    with start("--learning-rate", "1e-5", "--batch-size", "2") as terminal:
        terminal.answer("Folder of images", "a file")
        terminal.wait_for("is a file")
        terminal.answer("Folder of images", "s3://bucket/cats")
        terminal.wait_for("no address")
        terminal.answer("Folder of images", "cast")
        terminal.answer("There is no folder cast yet", "n")
        terminal.answer("Folder of images", "cats")
        for wrong, reason in [
            ("big", "not a whole number"),
            ("-5", "greater than 0"),
            ("5000", "limit is 3072"),
        ]:
            terminal.answer("Resolution", wrong)
            terminal.wait_for(reason)
        terminal.answer("Resolution", "448")
        terminal.answer("Where captions come from", "jsonl")
        terminal.wait_for("not one of filename, textfile, instanceprompt")
        assert terminal.answer("Where captions come from").endswith("[instanceprompt]: ")
        terminal.answer("caption of every image", "a cat")
        terminal.answer("Another folder?", "cats")
        terminal.wait_for("is a dataset already")
        terminal.answer("Another folder?")
        terminal.answer("Repeats", "-1")
        terminal.wait_for("greater than or equal to 0")
        terminal.answer("Repeats", "3")
        terminal.answer("Model")
        terminal.answer("Name of the run", "my run")
        terminal.wait_for("should match")
        terminal.answer("Name of the run", "mine")
        terminal.answer("Optimizer steps", "0")
        terminal.wait_for("less than 1")
        terminal.answer("Optimizer steps", "12")
        assert terminal.exit_status() == 0
    config = Workspace.open(tmp_path).config
    (cats,) = config.datasets
    assert (cats.resolution, cats.instance_prompt, cats.repeats) == (448, "a cat", 3)
    assert (config.train.tracker_run_name, config.train.max_train_steps) == ("mine", 12)
    assert (config.train.train_batch_size, config.train.learning_rate) == (2, 1e-5)


@pytest.mark.parametrize("key", ["\x03", "\x04"], ids=["ctrl-c", "ctrl-d"])
@pytest.mark.parametrize("question", ["Folder of images", "Where captions come from", "Model"])
def test_leaving_at_a_question_writes_nothing(
    tmp_path: Path, start: Start, question: str, key: str
) -> None:
    questions = ["Folder of images", "Resolution", "Where captions come from", "Another", "Model"]
    with start("project") as terminal:
        for each in questions[: questions.index(question)]:
            terminal.answer(each)
        terminal.wait_for(question)
        terminal.wait_for_prompt()
        assert terminal.leave(key) == 130
        assert "Nothing was written." in terminal.shown
    assert list(tmp_path.iterdir()) == []


def test_a_configuration_that_is_there_is_refused_before_anything_is_asked(
    tmp_path: Path, start: Start
) -> None:
    (tmp_path / CONFIG_NAME).write_text("")
    with start() as terminal:
        assert terminal.exit_status() == 2
        assert "never overwritten" in terminal.shown
        assert "Folder of images" not in terminal.shown


def test_with_yes_nothing_is_asked_and_what_is_proposed_is_said(
    tmp_path: Path, start: Start
) -> None:
    picture(tmp_path / "images" / "IMG_1.png", 1200, 1200)
    with start("--yes", "--resolution", "512") as terminal:
        assert terminal.exit_status() == 0
        assert "caption_strategy = instanceprompt: " in terminal.shown
        assert "resolution =" not in terminal.shown
    (images,) = Workspace.open(tmp_path).config.datasets
    assert (images.resolution, images.caption_strategy, images.repeats) == (
        512,
        "instanceprompt",
        199,
    )


def test_names_of_files_cannot_command_the_terminal(tmp_path: Path, start: Start) -> None:
    picture(tmp_path / "images" / "red \x1b]0;mine\x07 bird.png", 64, 64)
    with start("--yes") as terminal:
        assert terminal.exit_status() == 0
        assert "bird" in terminal.shown
        assert "\x1b]" not in terminal.shown
