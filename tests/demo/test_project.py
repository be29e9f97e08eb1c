"""The demo's workspace: written once and whole, and never over anything of a user's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from manifests.errors import UsageError
from omnigen_pipe import config
from omnigen_pipe.demo import project
from omnigen_pipe.demo.pictures import draw_pictures, known_scenes, new_scenes
from omnigen_pipe.progress import Progress
from omnigen_pipe.world.scenes import NEW_SHAPE, Scene

QUIET = Progress(quiet=True)


def test_pictures_lie_beside_their_captions(tmp_path: Path) -> None:
    scenes = new_scenes(12, "test") + known_scenes(12, "test")
    paths = draw_pictures(tmp_path, scenes)
    for path, scene in zip(paths, scenes, strict=True):
        assert path.with_suffix(".txt").read_text() == scene.caption + "\n"
        with Image.open(path) as image:
            image.load()
            assert (image.mode, image.size) == ("RGB", (scene.width, scene.height))
    assert len({path.read_bytes() for path in paths}) == len(paths)


def test_the_new_shape_is_in_all_of_one_kind_and_in_none_of_the_other() -> None:
    assert all(NEW_SHAPE in scene.caption for scene in new_scenes(60, "test"))
    known = known_scenes(60, "test")
    assert not any(NEW_SHAPE in scene.caption for scene in known)
    assert len({scene.caption for scene in known}) == 60
    assert new_scenes(60, "test") == new_scenes(60, "test") != new_scenes(60, "other")


def test_what_is_judged_was_not_trained_on() -> None:
    for scenes in (new_scenes, known_scenes):
        trained = {scene.things for scene in scenes(150, "demo")}
        assert not trained & {scene.things for scene in scenes(150, "proof")}


def test_the_configuration_is_valid_and_marked() -> None:
    parsed = config.parse(config.tomllib.loads(project.CONFIGURATION), "demo")
    assert [(d.id, d.split) for d in parsed.datasets] == [
        ("zorps", "train"),
        ("known", "regularisation"),
    ]
    assert parsed.model.pretrained_model_name_or_path == config.EMBEDDED
    assert project.CONFIGURATION.startswith(project.MARK)


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / config.CONFIG_NAME
    mine.write_text("[train]\nseed = 1\n")
    with pytest.raises(UsageError, match="--workspace"):
        project.write_project(tmp_path, QUIET)
    assert mine.read_text() == "[train]\nseed = 1\n"

    mine.unlink()
    (tmp_path / "known").mkdir()
    with pytest.raises(UsageError, match="known"):
        project.write_project(tmp_path, QUIET)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["known"]
    with pytest.raises(UsageError, match="is a file"):
        project.write_project(Path(__file__), QUIET)


def test_an_unfinished_project_is_begun_again_and_a_finished_one_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "demo"

    def killed(folder: Path, scenes: Sequence[Scene]) -> None:
        draw_pictures(folder, scenes[:3])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(project, "draw_pictures", killed)
        with pytest.raises(KeyboardInterrupt):
            project.write_project(root, QUIET)
    assert not (root / config.CONFIG_NAME).exists()
    assert project.write_project(root, QUIET)
    assert len(list((root / "zorps").glob("*.png"))) == 60
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert not project.write_project(root, QUIET)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
