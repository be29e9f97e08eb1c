"""The demo's pictures show what their captions say, and make several buckets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from manifests.errors import UsageError
from omnigen_pipe import config
from omnigen_pipe.demo import project
from omnigen_pipe.demo.pictures import COLOURS, draw_pictures, imagine, paint
from omnigen_pipe.progress import Progress


def test_every_picture_has_a_caption_and_opens(tmp_path: Path) -> None:
    paths = draw_pictures(tmp_path)
    assert 40 <= len(paths) <= 60
    assert len(set(paths)) == len(paths)
    assert len({path.with_suffix(".txt").read_text() for path in paths}) == len(paths)
    assert len({path.read_bytes() for path in paths}) == len(paths)
    for path in paths:
        assert path.with_suffix(".txt").read_text().strip()
        with Image.open(path) as image:
            image.load()
            assert image.mode == "RGB"
    assert len({path.suffix for path in paths}) == 2


def test_the_same_seed_draws_the_same_pictures() -> None:
    first, again, other = imagine(seed=3), imagine(seed=3), imagine(seed=4)
    assert first == again != other
    assert all(paint(a).tobytes() == paint(b).tobytes() for a, b in zip(first, again, strict=True))


def test_shapes_lie_where_the_caption_says(tmp_path: Path) -> None:
    for path in draw_pictures(tmp_path):
        caption = path.with_suffix(".txt").read_text()
        with Image.open(path) as image:
            pixels = np.asarray(image).astype(int)
        relation = " above a " if " above a " in caption else " left of a "
        axis = 0 if relation == " above a " else 1
        for part, side in zip(caption.split(relation), ("first", "second"), strict=True):
            (colour,) = (name for name in COLOURS if f" {name} " in f" {part} ")
            near = np.abs(pixels - COLOURS[colour]).max(axis=2) < 12
            assert near.sum() > 100, f"{path.name}: {colour} is missing"
            centre = np.nonzero(near)[axis].mean() / pixels.shape[axis]
            assert (centre < 0.5) == (side == "first"), f"{path.name}: {caption}"


def test_several_aspects_and_sizes() -> None:
    aspects = {picture.width / picture.height for picture in imagine()}
    areas = {picture.width * picture.height for picture in imagine()}
    assert min(aspects) < 0.7
    assert 1.0 in aspects
    assert max(aspects) > 1.4
    assert len(aspects) >= 5
    assert len(areas) >= 4
    assert min(areas) >= 128 * 128, "nothing needs upscaling at the demo's resolution"


def test_the_configuration_is_valid_and_marked() -> None:
    raw = config.tomllib.loads(project.CONFIGURATION)
    assert [dataset.id for dataset in config.parse(raw, "demo").datasets] == ["pictures"]
    assert project.CONFIGURATION.startswith(project.MARK)


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    quiet = Progress(quiet=True)
    mine = tmp_path / config.CONFIG_NAME
    mine.write_text("[train]\nseed = 1\n")
    with pytest.raises(UsageError, match="--workspace"):
        project.write_project(tmp_path, quiet)
    assert mine.read_text() == "[train]\nseed = 1\n"

    mine.unlink()
    (tmp_path / "pictures").mkdir()
    with pytest.raises(UsageError, match="pictures"):
        project.write_project(tmp_path, quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures"]
    with pytest.raises(UsageError, match="is a file"):
        project.write_project(Path(__file__), quiet)


def test_an_unfinished_project_is_begun_again_and_a_finished_one_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = Progress(quiet=True)
    root = tmp_path / "demo"
    built = []
    monkeypatch.setattr(project, "build_small_omnigen", lambda folder: built.append(folder))

    def killed(folder: Path) -> None:
        draw_pictures(folder, number=3)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(project, "draw_pictures", killed)
        with pytest.raises(KeyboardInterrupt):
            project.write_project(root, quiet)
    assert not (root / config.CONFIG_NAME).exists()
    assert project.write_project(root, quiet)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert not project.write_project(root, quiet)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    assert len(built) == 2
