"""Where pictures go: under names of their own, over nothing, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from manifests.errors import UsageError, WriteError
from omnigen_pipe.sampling.files import file_place, places, write_picture
from omnigen_pipe.sampling.requests import requested

PICTURE = Image.radial_gradient("L").convert("RGB")


def test_one_picture_may_be_a_file(tmp_path: Path) -> None:
    requests = requested(["a cat"], {}, 3, 1)
    for name in ("out.png", "out.JPG", "new/deep/out.webp"):
        assert places(tmp_path / name, requests, False) == [tmp_path / name]
    assert not list(tmp_path.iterdir()), "nothing is made before there is a picture"


def test_several_pictures_go_into_a_folder_and_take_no_name_that_is_taken(tmp_path: Path) -> None:
    folder = tmp_path / "v1.5"
    first, second = places(folder, requested(["a cat"], {}, 3, 2), False)
    assert (first, second) == (folder / "a-cat-3.png", folder / "a-cat-4.png")
    for expected in (first, folder / "a-cat-3-2.png", folder / "a-cat-3-3.png"):
        assert write_picture(PICTURE, first, {}, False) == expected
    assert write_picture(PICTURE, first, {}, True) == first
    assert len(list(folder.iterdir())) == 3


def test_a_file_is_not_a_place_for_several(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one file, but 2 pictures"):
        places(tmp_path / "out.png", requested(["a"], {}, 0, 2), False)


def test_what_is_there_is_only_replaced_when_told(tmp_path: Path) -> None:
    file = tmp_path / "out.png"
    file.touch()
    with pytest.raises(UsageError, match="is there already"):
        file_place("--grid", file, False)
    assert file_place("--grid", file, True) == file
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UsageError, match="is there already"):
        file_place("--grid", tmp_path / "folder.png", True)


@pytest.mark.parametrize("name", ["out.gif", "out.tiff"])
def test_formats_that_are_not_written_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"\.png, \.jpg"):
        places(tmp_path / name, requested(["a"], {}, 0, 1), False)


def test_a_folder_that_cannot_be_is_wrong_usage(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        places(tmp_path / "file" / "out", requested(["a"], {}, 0, 1), False)


@pytest.mark.parametrize("name", ["out.png", "out.jpg", "out.webp"])
def test_files_are_what_their_names_say(tmp_path: Path, name: str) -> None:
    write_picture(PICTURE, tmp_path / name, {"prompt": "日本 naïve\ncafé"}, False)
    with Image.open(tmp_path / name) as opened:
        opened.load()
        assert opened.format == {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[name[4:]]
        assert opened.size == PICTURE.size
        if opened.format == "PNG":
            assert opened.info["prompt"] == "日本 naïve\ncafé"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "out.png"
    target.mkdir()
    (target / "inside").touch()
    with pytest.raises(WriteError, match=r"out\.png could not be written"):
        write_picture(PICTURE, target, {}, True)
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]
