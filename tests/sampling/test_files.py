"""Where pictures go: under names of their own, over nothing, whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from PIL import Image

from manifests.errors import PipeError, UsageError, WriteError
from omnigen_pipe.sampling.files import (
    FORMATS,
    LIMITS,
    check_size,
    checked_path,
    output_paths,
    write_picture,
)
from omnigen_pipe.sampling.requests import at_strengths, requests_of

PICTURE = Image.radial_gradient("L").convert("RGB")


def test_one_picture_may_be_a_file(tmp_path: Path) -> None:
    requests = requests_of(["a cat"], {}, 3, 1)
    for name in ("out.png", "out.JPG", "new/deep/out.webp"):
        assert output_paths(tmp_path / name, requests, False) == [tmp_path / name]
    assert not list(tmp_path.iterdir()), "nothing is made before there is a picture"


def test_several_pictures_go_into_a_folder_and_take_no_name_that_is_taken(tmp_path: Path) -> None:
    folder = tmp_path / "v1.5"
    first, second = output_paths(folder, requests_of(["a cat"], {}, 3, 2), False)
    assert (first, second) == (folder / "a-cat-3.png", folder / "a-cat-4.png")
    for expected in (first, folder / "a-cat-3-2.png", folder / "a-cat-3-3.png"):
        assert write_picture(PICTURE, first, {}, False) == expected
    assert write_picture(PICTURE, first, {}, True) == first
    assert len(list(folder.iterdir())) == 3


def test_a_file_is_not_a_place_for_several(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one file, but 2 pictures"):
        output_paths(tmp_path / "out.png", requests_of(["a"], {}, 0, 2), False)


def test_what_is_there_is_only_replaced_when_told(tmp_path: Path) -> None:
    file = tmp_path / "out.png"
    file.touch()
    with pytest.raises(UsageError, match="is there already"):
        checked_path("--grid", file, False)
    assert checked_path("--grid", file, True) == file
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UsageError, match="is there already"):
        checked_path("--grid", tmp_path / "folder.png", True)


def test_strengths_are_in_the_names_where_there_are_several(tmp_path: Path) -> None:
    requests = at_strengths(requests_of(["a"], {}, 0, 1), [0, 1, 0.3])
    assert [path.name for path in output_paths(tmp_path, requests, False)] == [
        "a-0-strength-0.png",
        "a-0-strength-1.png",
        "a-0-strength-0.3.png",
    ]
    assert [path.name for path in output_paths(tmp_path, requests[2:], False)] == ["a-0.png"]


def test_a_name_that_is_taken_at_the_last_moment_is_left_to_its_taker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("link", "replace"):
        plain = getattr(os, name)

        def outrun(source: Path, target: Path, plain: Callable[..., None] = plain) -> None:
            if target == tmp_path / "out.png":
                target.write_bytes(b"theirs")
            plain(source, target)

        monkeypatch.setattr(os, name, outrun)
    assert write_picture(PICTURE, tmp_path / "out.png", {}, False) == tmp_path / "out-2.png"
    assert (tmp_path / "out.png").read_bytes() == b"theirs"


@pytest.mark.parametrize("links", [True, False], ids=["", "without-hard-links"])
def test_of_writers_at_once_none_replaces_another_s_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:

        def no_link(*_: object) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", no_link)
    many, rounds = 4, 40
    together = Barrier(many)

    def write(shade: int) -> list[Path]:
        picture = Image.new("L", (1, 1), shade)
        found = []
        for number in range(rounds):
            together.wait()
            found.append(write_picture(picture, tmp_path / f"{number}.png", {}, False))
        return found

    with ThreadPoolExecutor(many) as pool:
        written = list(pool.map(write, range(many)))
    for shade, paths in enumerate(written):
        for path in paths:
            with Image.open(path) as opened:
                assert opened.getpixel((0, 0)) == shade
    assert sorted(tmp_path.iterdir()) == sorted(path for paths in written for path in paths)


@pytest.mark.parametrize("name", ["out.jpge", "out.pgn", "out.wepb", "out.tga", "out.PDF"])
def test_one_picture_is_not_put_into_a_folder_with_a_misspelt_name(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(UsageError, match=rf"{name}: pictures are written as \.png"):
        output_paths(tmp_path / name, requests_of(["a"], {}, 0, 1), False)
    (tmp_path / name).mkdir()
    assert output_paths(tmp_path / name, requests_of(["a"], {}, 0, 1), False)


@pytest.mark.parametrize("name", ["v1.5", "of.today", "2024.01.31", "run.d"])
def test_folders_may_have_points_in_their_names(tmp_path: Path, name: str) -> None:
    (path,) = output_paths(tmp_path / name, requests_of(["a"], {}, 0, 1), False)
    assert path.parent == tmp_path / name


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_what_a_format_cannot_hold_is_said_before_and_after(tmp_path: Path, suffix: str) -> None:
    """The limits are Pillow's."""
    limit = LIMITS[FORMATS[suffix]]
    path = tmp_path / f"out{suffix}"
    for size in ((limit, 1), (1, limit)):
        check_size("--grid", path, size, "")
        write_picture(Image.new("RGB", size), path, {}, True)
        path.unlink()
    for size in ((limit + 1, 1), (1, limit + 1)):
        with pytest.raises(UsageError, match=rf"{limit} a side .* a \.png, or draw less"):
            check_size("--grid", path, size, "draw less")
        with pytest.raises(PipeError, match="could not be written"):
            write_picture(Image.new("RGB", size), path, {}, True)
        check_size("--grid", tmp_path / "out.png", size, "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["out.gif", "out.tiff"])
def test_formats_that_are_not_written_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"\.png, \.jpg"):
        output_paths(tmp_path / name, requests_of(["a"], {}, 0, 1), False)


def test_a_folder_that_cannot_be_is_wrong_usage(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        output_paths(tmp_path / "file" / "out", requests_of(["a"], {}, 0, 1), False)


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
