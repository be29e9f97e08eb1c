"""The demo's workspace: written once and whole, and never over anything of a user's."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from blake3 import blake3
from PIL import Image

from manifests import publish
from manifests.errors import UsageError
from omnigen_pipe import config
from omnigen_pipe.demo import project
from omnigen_pipe.demo.folder import MARK
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
from omnigen_pipe.world.drawing import paint
from omnigen_pipe.world.scenes import NEW_SHAPE, Scene

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
    assert sum(held_back(scene) for scene in judged[:NEW]) >= 0.4 * NEW


def test_other_pictures_or_settings_are_another_version() -> None:
    """A folder that an older version wrote is not taken for one of today's."""
    scenes = new_scenes(NEW_PICTURES) + known_scenes(KNOWN_PICTURES)
    identity = blake3(repr((scenes, project.CONFIGURATION)).encode())
    for scene in scenes:
        identity.update(paint(scene).tobytes())
    assert (project.VERSION, identity.hexdigest()[:16]) == (4, "c5291eb010910b76")


def test_the_configuration_is_valid_and_marked() -> None:
    parsed = config.parse(config.tomllib.loads(project.CONFIGURATION), "demo")
    assert [(d.id, d.split) for d in parsed.datasets] == [
        ("zorps", "train"),
        ("known", "regularisation"),
    ]
    assert parsed.model.pretrained_model_name_or_path == config.EMBEDDED
    assert project.CONFIGURATION.startswith(MARK)


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


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A demo of few pictures."""
    monkeypatch.setattr(project, "NEW_PICTURES", 6)
    monkeypatch.setattr(project, "KNOWN_PICTURES", 9)


def times(root: Path) -> dict[Path, int]:
    """When each file and folder of the demo was changed."""
    return {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def kill_at(root: Path, kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin the demo, and end it amid the `kind`-th folder of pictures, as a kill does: nothing
    is cleared away."""
    calls = []

    def killed(folder: Path, scenes: Sequence[Scene]) -> None:
        calls.append(folder)
        draw_pictures(folder, scenes[:3] if len(calls) == kind else scenes)
        if len(calls) == kind:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(project, "draw_pictures", killed)
        patch.setattr(publish, "discard", lambda path: None)
        with pytest.raises(KeyboardInterrupt):
            project.write_project(root, QUIET)
    assert not (root / config.CONFIG_NAME).exists()


@pytest.mark.usefixtures("few")
def test_settings_that_the_user_changed_are_kept(tmp_path: Path) -> None:
    assert project.write_project(tmp_path / "demo", QUIET)
    path = tmp_path / "demo" / config.CONFIG_NAME
    changed = path.read_text().replace("factor = 2", "factor = 4")
    path.write_text(changed)
    assert not project.write_project(tmp_path / "demo", QUIET)
    assert path.read_text() == changed


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("kind", [1, 2])
def test_an_unfinished_project_is_begun_again_and_a_finished_one_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: int
) -> None:
    """Where one folder of pictures was complete, it is not drawn again."""
    root = tmp_path / "demo"
    kill_at(root, kind, monkeypatch)
    complete = times(root / "zorps")
    assert len(complete) == (12 if kind == 2 else 0)
    assert project.write_project(root, QUIET)
    assert len(list((root / "zorps").glob("*.png"))) == 6
    assert len(list((root / "known").glob("*.txt"))) == 9
    assert kind == 1 or times(root / "zorps") == complete
    before = times(root)
    assert not project.write_project(root, QUIET)
    assert times(root) == before


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("zorps/mine.png", "holds mine.png"),
        ("zorps/picture-006.png", "holds picture-006.png"),
        ("-zorps/picture-002.txt", "lacks picture-002.txt"),
        ("known/mine.txt", "holds mine.txt"),
        ("staging/mine.png", "such as staging/mine.png"),
        ("mine.png", "such as mine.png"),
    ],
)
def test_what_an_unfinished_demo_did_not_write_is_neither_learned_nor_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    root = tmp_path / "demo"
    kill_at(root, 2, monkeypatch)
    path = root / name.removeprefix("-")
    if name.startswith("-"):
        path.unlink()
    else:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    before = times(root)
    with pytest.raises(UsageError, match=f"{message}.*--workspace"):
        project.write_project(root, QUIET)
    assert times(root) == before


@pytest.mark.usefixtures("few")
def test_another_version_s_unfinished_demo_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_at(tmp_path / "demo", 2, monkeypatch)
    (tmp_path / "demo" / ".demo-unfinished").write_text(f"{MARK} Version 1.\n")
    before = times(tmp_path)
    with pytest.raises(UsageError, match="unfinished demo of another version"):
        project.write_project(tmp_path / "demo", QUIET)
    assert times(tmp_path) == before


def test_a_place_that_cannot_be_written_is_told_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"file is a file.*--workspace"):
        project.write_project(tmp_path / "file" / "x", Progress())

    def refuse(folder: Path) -> None:
        raise PermissionError(errno.EROFS, "Read-only file system", str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(project, "make_folder", refuse)
        with pytest.raises(
            UsageError, match=r"--workspace .*Read-only file system.*another folder"
        ):
            project.write_project(tmp_path / "x", Progress())
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        with pytest.raises(UsageError, match=r"is write-protected.*--workspace"):
            project.write_project(tmp_path / "x", Progress())
    assert capsys.readouterr().err == ""
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
