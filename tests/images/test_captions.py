"""Captions from names, text files and cells of lists."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnigen_pipe.config import DatasetConfig
from omnigen_pipe.images.captions import (
    finish,
    from_name,
    from_textfile,
    from_value,
    split_text,
    textfile_of,
    texts_without_file,
    without_file,
)


def dataset(**options: Any) -> DatasetConfig:
    return DatasetConfig.model_validate({"id": "d", "instance_data_dir": "x", **options})


@pytest.mark.parametrize(
    ("path", "caption"),
    [
        ("a red_car.jpg", "a red car"),
        ("deep/er/two_dogs.PNG", "two dogs"),
        ("a 3.5mm lens.jpg", "a 3.5mm lens"),
        ("_.jpg", ""),
        ('a "quote"\nand a line.jpg', 'a "quote"\nand a line'),
    ],
)
def test_caption_of_a_name(path: str, caption: str) -> None:
    assert from_name(path) == caption


def test_captions_without_a_file() -> None:
    assert without_file("a_b.jpg", dataset()).texts == ("a b",)
    assert without_file("__.jpg", dataset()).reason == "no caption: the file's name has no words"
    options = {"instance_prompt": "a photo of sks"}
    prompt = dataset(caption_strategy="instanceprompt", prepend_instance_prompt=True, **options)
    assert without_file("a_b.jpg", prompt).texts == ("a photo of sks",)
    prepended = dataset(prepend_instance_prompt=True, **options)
    assert without_file("a_b.jpg", prepended).texts == ("a photo of sks a b",)


@pytest.mark.parametrize(
    ("text", "captions", "joined"),
    [
        ("one\ntwo\n", ["one", "two"], ["one two"]),
        ("one\r\n\r\n  two  \r", ["one", "two"], ["one two"]),
        ("\n \n", [], []),
        ('say "hi"\u2028there', ['say "hi"\u2028there'], ['say "hi"\u2028there']),
    ],
)
def test_lines_of_a_text_file(text: str, captions: list[str], joined: list[str]) -> None:
    assert split_text(text, "captions") == captions
    assert split_text(text, "join") == joined


@given(st.lists(st.text()))
def test_finished_captions_are_stripped_distinct_and_in_order(texts: list[str]) -> None:
    finished = finish(texts, dataset())
    assert len(set(finished)) == len(finished)
    assert all(text and text == text.strip() for text in finished)
    assert set(finished) == {text.strip() for text in texts} - {""}
    first_seen = list(dict.fromkeys(text.strip() for text in texts if text.strip()))
    assert list(finished) == first_seen


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_a_text_file_is_utf8_with_or_without_bom(tmp_path: Path, bom: bytes) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.b.txt").write_bytes(bom + "grün\nblau".encode())
    found = from_textfile(tmp_path, "sub/a.b.jpg", dataset())
    assert found.texts == ("grün", "blau")
    assert (found.path, found.reason) == ("sub/a.b.txt", None)
    assert found.size == (tmp_path / "sub" / "a.b.txt").stat().st_size


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no caption: there is no .txt beside the image"),
        (b"", "no caption: its .txt is empty"),
        (b" \n\n", "no caption: its .txt is empty"),
        ("grün".encode("latin-1"), "no caption: its .txt is not UTF-8"),
        ("grün".encode("utf-16"), "no caption: its .txt is not UTF-8"),
    ],
)
def test_why_a_text_file_gives_none(tmp_path: Path, content: bytes | None, reason: str) -> None:
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    found = from_textfile(tmp_path, "a.jpg", dataset())
    assert (found.texts, found.reason) == ((), reason)


def test_a_pipe_in_place_of_a_text_file_is_not_waited_on(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    found = from_textfile(tmp_path, "a.jpg", dataset())
    assert found.reason == "no caption: its .txt is not a regular file"


def test_an_unchanged_text_file_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / textfile_of("a.jpg")
    path.write_text("one")
    first = from_textfile(tmp_path, "a.jpg", dataset())
    stat = path.stat()
    # Same size and time, other text: only opening it could tell.
    path.write_text("two")
    os.utime(path, ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    assert from_textfile(tmp_path, "a.jpg", dataset(), first) is first
    os.utime(path, ns=(stat.st_mtime_ns, stat.st_mtime_ns + 1))
    assert from_textfile(tmp_path, "a.jpg", dataset(), first).texts == ("two",)


@pytest.mark.parametrize(
    ("value", "texts", "reason"),
    [
        ("a", ["a"], None),
        (["a", None, "b"], ["a", "b"], None),
        (None, [], "no caption: the list's caption is empty"),
        ("  ", [], "no caption: the list's caption is empty"),
        ([], [], "no caption: the list's caption is empty"),
        (3, [], "no caption: the list's caption is not a text"),
        (["a", 3], [], "no caption: the list's caption is not a text"),
        ("\ud800", [], "no caption: the list's caption is not valid Unicode"),
    ],
)
def test_cells_of_a_list(value: object, texts: list[str], reason: str | None) -> None:
    assert from_value(value) == (texts, reason)


@given(st.lists(st.sampled_from(["a_b", ".", "..", ".jpg", "x.y", "_", " ä", "日本"]), min_size=1))
def test_a_name_is_taken_apart_as_pathlib_does(parts: list[str]) -> None:
    """Alone and among many, whatever dots a name has."""
    path = "folder.d/" + "".join(parts)
    name = PurePosixPath(path).name
    if "/" + name != path[path.rfind("/") :] or name.endswith("."):
        return  # not what any walk or list gives, or what versions of pathlib differ in
    expected = PurePosixPath(path).stem.replace("_", " ").strip()
    assert from_name(path) == expected
    assert texts_without_file([path, "b.jpg"], dataset()) == [expected, "b"]
    assert textfile_of(path) == str(PurePosixPath(path).with_suffix(".txt"))
