"""The demo's workspace: written once and whole, and never over anything of a user's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from blake3 import blake3
from PIL import Image

from manifests.errors import UsageError
from omnigen_pipe import config
from omnigen_pipe.demo import project
from omnigen_pipe.demo.pictures import (
    KNOWN,
    KNOWN_PICTURES,
    NEW,
    NEW_PICTURES,
    draw_pictures,
    held_back,
    judged_scenes,
    known_scenes,
    new_scenes,
)
from omnigen_pipe.progress import Progress
from omnigen_pipe.world.drawing import outline
from omnigen_pipe.world.scenes import BACKGROUNDS, COLOURS, NEW_SHAPE, Scene

QUIET = Progress(quiet=True)


def test_pictures_lie_beside_their_captions(tmp_path: Path) -> None:
    scenes = new_scenes(12) + known_scenes(12)
    paths = draw_pictures(tmp_path, scenes)
    for path, scene in zip(paths, scenes, strict=True):
        assert path.with_suffix(".txt").read_text() == scene.caption + "\n"
        with Image.open(path) as image:
            image.load()
            assert (image.mode, image.size) == ("RGB", (scene.width, scene.height))
    assert len({path.read_bytes() for path in paths}) == len(paths)


def test_the_new_shape_is_in_all_of_one_kind_and_in_none_of_the_other() -> None:
    assert all(NEW_SHAPE in scene.caption for scene in new_scenes(60))
    known = known_scenes(60)
    assert not any(NEW_SHAPE in scene.caption for scene in known)
    assert len({scene.caption for scene in known}) == 60
    assert new_scenes(60) == new_scenes(60)


@pytest.mark.parametrize("seed", ["proof", "another"])
def test_what_is_judged_was_not_trained_on(seed: str) -> None:
    """No sentence, and of the new shape not the colours on the backgrounds that are held back."""
    new, known = new_scenes(NEW_PICTURES), known_scenes(KNOWN_PICTURES)
    trained = {scene.caption for scene in new + known}
    judged = judged_scenes(NEW, KNOWN, seed)
    sentences = {scene.caption for scene in judged}
    assert len(sentences) == len(judged) == NEW + KNOWN
    assert not trained & sentences
    assert [NEW_SHAPE in scene.caption for scene in judged] == [True] * NEW + [False] * KNOWN
    assert not any(held_back(scene) for scene in new)
    assert sum(held_back(scene) for scene in judged[:NEW]) >= NEW // 4


def test_other_pictures_or_settings_are_another_version() -> None:
    """A folder that an older version wrote is not taken for one of today's."""
    scenes = new_scenes(NEW_PICTURES) + known_scenes(KNOWN_PICTURES)
    drawn = repr((scenes, outline(NEW_SHAPE), COLOURS, BACKGROUNDS, project.CONFIGURATION))
    identity = blake3(drawn.encode()).hexdigest()[:16]
    assert (project.VERSION, identity) == (3, "cdd50d7d92ff41ad")


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
    (tmp_path / "before-and-after.png").touch()
    with pytest.raises(UsageError, match="other files"):
        project.write_project(tmp_path, QUIET)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["before-and-after.png"]
    with pytest.raises(UsageError, match="is a file"):
        project.write_project(Path(__file__), QUIET)


def test_another_version_s_demo_is_left_alone(tmp_path: Path) -> None:
    older = project.CONFIGURATION.replace(f"Version {project.VERSION}.", "Version 1.")
    assert older != project.CONFIGURATION
    (tmp_path / config.CONFIG_NAME).write_text(older)
    with pytest.raises(UsageError, match="another version"):
        project.write_project(tmp_path, QUIET)


def test_settings_that_the_user_changed_are_kept(tmp_path: Path) -> None:
    assert project.write_project(tmp_path / "demo", QUIET)
    path = tmp_path / "demo" / config.CONFIG_NAME
    changed = path.read_text().replace("factor = 2", "factor = 4")
    path.write_text(changed)
    assert not project.write_project(tmp_path / "demo", QUIET)
    assert path.read_text() == changed


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
