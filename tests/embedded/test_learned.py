"""What was learned is known afterwards: a function of the seed and the number of pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from omnigen_pipe.embedded import learned
from omnigen_pipe.embedded.learned import draw_learned, learned_scenes, unseen_scenes
from omnigen_pipe.embedded.making import Making
from omnigen_pipe.progress import Progress
from omnigen_pipe.workspace import Workspace
from omnigen_pipe.world.drawing import paint
from omnigen_pipe.world.recognition import look

QUIET = Progress(quiet=True)
MAKING = Making(seed=5, pictures=40, steps=9)


def test_what_is_drawn_is_what_is_said_to_be_learned(tmp_path: Path) -> None:
    draw_learned(tmp_path, MAKING, QUIET)
    lines = (tmp_path / "captions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    scenes = list(learned_scenes(MAKING))
    assert [row["caption"] for row in rows] == [scene.caption for scene in scenes]
    drawn = sorted((tmp_path / "pictures").iterdir())
    assert [row["path"] for row in rows] == [path.name for path in drawn]
    for path, scene in zip(drawn, scenes, strict=True):
        with Image.open(path) as image:
            assert look(image) == look(paint(scene))
    assert Workspace.open(tmp_path).config.train.max_train_steps == MAKING.steps
    assert Workspace.open(tmp_path).config.train.seed == MAKING.seed


def test_the_seed_and_the_number_alone_decide_what_is_learned() -> None:
    scenes = list(learned_scenes(MAKING))
    assert len(scenes) == 40
    assert scenes == list(learned_scenes(Making(seed=5, pictures=80)))[:40]
    assert scenes != list(learned_scenes(Making(seed=6, pictures=40)))


def test_unseen_sentences_are_new_and_all_different() -> None:
    making = Making(pictures=3000)
    known = {scene.caption for scene in learned_scenes(making)}
    scenes = unseen_scenes(making, 300, "test")
    sentences = {scene.caption for scene in scenes}
    assert len(scenes) == len(sentences) == 300
    assert not sentences & known
    assert scenes == unseen_scenes(making, 300, "test") != unseen_scenes(making, 300, "other")


def test_a_table_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def fail(scene: object, path: Path) -> None:
        if path.stem == "000030":
            raise Killed
        save(scene, path)

    save = learned.save
    with monkeypatch.context() as patch:
        patch.setattr(learned, "save", fail)
        with pytest.raises(Killed):
            draw_learned(tmp_path, MAKING, QUIET)
    assert not (tmp_path / "captions.jsonl").exists()
    draw_learned(tmp_path, MAKING, QUIET)
    content = (tmp_path / "captions.jsonl").read_bytes()
    assert content.count(b"\n") == 40
    monkeypatch.setattr(learned, "save", fail)
    draw_learned(tmp_path, MAKING, QUIET)  # complete: nothing is drawn
    assert (tmp_path / "captions.jsonl").read_bytes() == content
