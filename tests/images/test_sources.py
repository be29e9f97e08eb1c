"""Candidates of folders and lists: each file once, in one order, nothing outside the root."""

from __future__ import annotations

import csv
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manifests.errors import UsageError
from omnigen_pipe import config
from omnigen_pipe.images.candidates import Candidate, escaped
from omnigen_pipe.images.sources import Found, dataset_root, find
from omnigen_pipe.workspace import Workspace


def discover(root: Path, **options: Any) -> Found:
    """The candidates of a dataset with `options` under `root`/images."""
    (root / "images").mkdir(exist_ok=True)
    table = {"id": "d", "instance_data_dir": "images", **options}
    workspace = Workspace(root, config.parse({"dataset": [table]}, "test"))
    dataset = workspace.config.datasets[0]
    return find(workspace, dataset, dataset_root(workspace, dataset))


def paths(found: Found) -> list[str]:
    return [candidate.path for candidate in found.candidates]


def touch(path: Path, content: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_every_picture_file_is_listed_once_and_sorted(tmp_path: Path) -> None:
    names = ["b.jpg", "a/z.PNG", "a.webp", "a/b/c.tiff", "ä.jpeg", "x.heic", 'q"u\no.gif']
    for name in names:
        touch(tmp_path / "images" / name)
    found = discover(tmp_path)
    assert paths(found) == sorted(names)
    for candidate in found.candidates:
        facts = os.stat(tmp_path / "images" / candidate.path)
        assert (candidate.size, candidate.mtime_ns) == (facts.st_size, facts.st_mtime_ns)
        assert candidate.real == str(tmp_path / "images" / candidate.path)
        assert candidate.reason is None


def test_what_is_no_picture_is_counted(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.txt", "b.json", "c.json", ".hidden.jpg", ".git/x.jpg", "b.jpg~"):
        touch(tmp_path / "images" / name)
    touch(tmp_path / "images" / "@eaDir" / "thumb.jpg")
    found = discover(tmp_path)
    assert paths(found) == ["a.jpg"]
    assert found.notes == [
        "dataset `d`: Hidden or leftover files and folders, left aside: 4.",
        "dataset `d`: No pictures by their names: 3 (2 .json, 1 .txt).",
    ]
    with_captions = discover(tmp_path, caption_strategy="textfile")
    assert any("(2 .json)" in note for note in with_captions.notes)


def test_the_workspaces_own_folders_are_no_data(tmp_path: Path) -> None:
    touch(tmp_path / "a.jpg")
    touch(tmp_path / "runs" / "first" / "preview.png")
    found = discover(tmp_path, instance_data_dir=".")
    assert paths(found) == ["a.jpg"]


def test_links_are_followed_once_and_loops_are_not(tmp_path: Path) -> None:
    images = tmp_path / "images"
    touch(images / "real" / "a.jpg")
    touch(tmp_path / "elsewhere" / "b.jpg")
    touch(tmp_path / "elsewhere" / "deep" / "c.jpg")
    (images / "loop").symlink_to(images)
    (images / "real" / "up").symlink_to(tmp_path)
    (images / "twice").symlink_to(images / "real")
    (images / "out").symlink_to(tmp_path / "elsewhere")
    (images / "out2").symlink_to(tmp_path / "elsewhere")
    (images / "inner").symlink_to(tmp_path / "elsewhere" / "deep")
    (images / "same.jpg").symlink_to(images / "real" / "a.jpg")
    (images / "one.jpg").symlink_to(touch(tmp_path / "single" / "d"))
    (images / "two.jpg").symlink_to(tmp_path / "single" / "d")
    (images / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (images / "round.jpg").symlink_to(images / "round.jpg")
    found = discover(tmp_path)
    assert paths(found) == [
        "gone.jpg",
        "inner/c.jpg",
        "one.jpg",
        "out/b.jpg",
        "real/a.jpg",
        "round.jpg",
    ]
    reasons = {c.path: c.reason for c in found.candidates if c.reason}
    assert reasons.keys() == {"gone.jpg", "round.jpg"}
    assert reasons["gone.jpg"] == "the link leads nowhere"
    real = [c.real for c in found.candidates if c.reason is None]
    assert len(set(real)) == len(real)


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(seed=st.integers(0, 10_000))
def test_the_order_of_directory_entries_does_not_matter(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    root = tmp_path_factory.mktemp("order")
    draw = random.Random(seed)
    folders = [root / "images", root / "images" / "a", root / "images" / "b", root / "out"]
    for folder in folders:
        for name in draw.sample(["x.jpg", "y.png", "z.txt"], 2):
            touch(folder / name)
    for number in range(5):
        link = draw.choice(folders[:3]) / draw.choice([f"l{number}", f"l{number}.jpg"])
        target = draw.choice([*folders, *root.rglob("*.jpg")])
        link.symlink_to(target)
    scandir = os.scandir

    def shuffled(order: Callable[[list[Any]], None]) -> list[Candidate]:
        class Entries(list[Any]):
            def __enter__(self) -> Entries:
                return self

            def __exit__(self, *_: object) -> None:
                pass

        def listing(path: str) -> Entries:
            with scandir(path) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
            order(found)
            return Entries(found)

        with monkeypatch.context() as patch:
            patch.setattr(os, "scandir", listing)
            return discover(root).candidates

    forward = shuffled(lambda entries: None)
    assert shuffled(lambda entries: entries.reverse()) == forward
    assert shuffled(draw.shuffle) == forward
    reals = [candidate.real for candidate in forward]
    assert len(set(reals)) == len(reals)


def test_names_that_are_not_utf8_are_escaped_and_rejected(tmp_path: Path) -> None:
    images = os.fsencode(tmp_path / "images")
    os.makedirs(images + b"/\xfe")
    for name in (b"caf\xe9.jpg", b"caf\\xe9.jpg", b"a\\b\xff.jpg", b"\xfe/good.jpg"):
        with open(images + b"/" + name, "wb"):
            pass
    found = discover(tmp_path)
    assert [(c.path, c.reason) for c in found.candidates] == sorted(
        [
            ("a\\\\b\\xff.jpg", "name is not UTF-8: rename the file"),
            ("caf\\xe9.jpg", None),
            ("caf\\xe9.jpg'", "name is not UTF-8: rename the file"),
            ("\\xfe/good.jpg", "name is not UTF-8: rename the file"),
        ]
    )


@given(st.text(st.characters(categories=["L", "P", "Cs"])))
def test_escaped_text_is_utf8_and_leaves_good_text_alone(text: str) -> None:
    shown = escaped(text)
    shown.encode("utf-8")
    if not any("\ud800" <= c <= "\udfff" for c in text):
        assert shown == text


def test_odd_files_with_picture_names(tmp_path: Path) -> None:
    os.makedirs(tmp_path / "images" / "folder.jpg")
    touch(tmp_path / "images" / "folder.jpg" / "a.png")
    os.mkfifo(tmp_path / "images" / "pipe.jpg")
    found = discover(tmp_path)
    assert [(c.path, c.reason) for c in found.candidates] == [
        ("folder.jpg/a.png", None),
        ("pipe.jpg", "not a regular file"),
    ]


def test_missing_folders_are_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        discover(tmp_path, instance_data_dir="nowhere")
    touch(tmp_path / "file")
    with pytest.raises(UsageError, match="is not a folder"):
        discover(tmp_path, instance_data_dir="file")
    assert "there are no images" in discover(tmp_path).notes[0]


# Lists.

Rows = list[dict[str, Any]]


def write_jsonl(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8-sig")


def write_csv(path: Path, rows: Rows) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as handle:
        writer = csv.DictWriter(handle, ["path", "caption"])
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: Rows) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


WRITERS = {"jsonl": write_jsonl, "csv": write_csv, "parquet": write_parquet}


def discover_list(root: Path, kind: str, rows: Rows, **options: Any) -> Found:
    WRITERS[kind](root / f"list.{kind}", rows)
    table = {"type": "list", "list_file": f"list.{kind}", "caption_strategy": kind, **options}
    return discover(root, **table)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_list_names_its_images(tmp_path: Path, kind: str) -> None:
    images = tmp_path / "images"
    for name in ("b.jpg", "a.dat", "sub/c.jpg", "unlisted.jpg"):
        touch(images / name)
    nasty = 'says "hello",\nand leaves'
    found = discover_list(
        tmp_path,
        kind,
        [
            {"path": "./b.jpg", "caption": nasty},
            {"path": str(images / "a.dat"), "caption": "by its absolute path"},
            {"path": "sub/../sub//c.jpg", "caption": "first"},
            {"path": "sub/c.jpg", "caption": "second"},
            {"path": "absent.jpg", "caption": "not there"},
            {"path": "../outside.jpg", "caption": "no"},
            {"path": "/etc/hostname", "caption": "no"},
        ],
    )
    assert found.listing is not None
    assert [(c.path, (c.reason or "").split(": ")[0]) for c in found.candidates] == [
        ("../outside.jpg", "outside the dataset"),
        ("/etc/hostname", "outside the dataset"),
        ("a.dat", ""),
        ("absent.jpg", "not there"),
        ("b.jpg", ""),
        ("sub/c.jpg", ""),
    ]
    texts = {path: row.texts for path, row in found.listing.rows.items()}
    assert texts["b.jpg"] == (nasty,)
    assert texts["sub/c.jpg"] == ("first", "second")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_cell_may_hold_several_captions(tmp_path: Path, kind: str) -> None:
    rows = [{"path": "a.jpg", "caption": ["one", "two"]}, {"path": "b.jpg", "caption": None}]
    found = discover_list(tmp_path, kind, rows)
    assert found.listing is not None
    assert found.listing.rows["a.jpg"].texts == ("one", "two")
    assert found.listing.rows["b.jpg"] == ((), "no caption: the list's caption is empty")


def test_columns_have_the_names_that_are_configured(tmp_path: Path) -> None:
    rows = [{"file_name": "a.jpg", "text": "one"}]
    found = discover_list(tmp_path, "jsonl", rows, path_column="file_name", caption_column="text")
    assert found.listing is not None
    assert found.listing.rows["a.jpg"].texts == ("one",)


def test_a_list_may_give_captions_to_a_walk(tmp_path: Path) -> None:
    touch(tmp_path / "images" / "a.jpg")
    touch(tmp_path / "images" / "b.jpg")
    # Beside the images, where it is no stray file either.
    write_jsonl(
        tmp_path / "images" / "list.jsonl",
        [{"path": "a.jpg", "caption": "one"}, {"path": "gone.jpg", "caption": "two"}],
    )
    found = discover(tmp_path, caption_strategy="jsonl", list_file="list.jsonl")
    assert paths(found) == ["a.jpg", "b.jpg"]
    assert len(found.notes) == 1
    assert "1 paths in list.jsonl name no image" in found.notes[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.jsonl", '{"path": "a.jpg", "caption": "x"}\n{"path": ', "line 2 is not JSON"),
        ("l.jsonl", "[1]\n", "line 1 is not a JSON object"),
        ("l.jsonl", '{"file": "a.jpg"}\n', "no column `path`; its columns are `file`"),
        ("l.jsonl", '{"path": "a.jpg"}\n', "no column `caption`"),
        ("l.jsonl", '{"path": null, "caption": "x"}\n', "row 1 has no path"),
        ("l.jsonl", b"\xff\xfe{\0", "is not UTF-8"),
        ("l.csv", "file,caption\na.jpg,x\n", "no column `path`"),
        ("l.csv", "", "no column `path`; its columns are none"),
        ("l.csv", 'path,caption\na.jpg,"x', "line 2"),
        ("l.parquet", "not parquet", "not a readable Parquet file"),
        ("l.xyz", "", None),
    ],
)
def test_wrong_lists_are_wrong_usage(
    tmp_path: Path, name: str, content: str | bytes, message: str | None
) -> None:
    data = content.encode() if isinstance(content, str) else content
    touch(tmp_path / name, data)
    strategy = name.split(".")[1] if message else "filename"
    with pytest.raises(UsageError, match=message or "must end in"):
        discover(tmp_path, type="list", list_file=name, caption_strategy=strategy)


def test_a_list_of_another_kind_or_nowhere_is_wrong_usage(tmp_path: Path) -> None:
    touch(tmp_path / "l.csv", b"path,caption\n")
    with pytest.raises(UsageError, match="is no jsonl"):
        discover(tmp_path, type="list", list_file="l.csv", caption_strategy="jsonl")
    with pytest.raises(UsageError, match="there is no list_file"):
        discover(tmp_path, type="list", list_file="x.csv", caption_strategy="csv")


def test_an_unquoted_comma_does_not_cut_a_caption(tmp_path: Path) -> None:
    touch(tmp_path / "l.csv", b"path,caption\na.jpg,a dog, running\nb.jpg\n")
    found = discover(tmp_path, type="list", list_file="l.csv", caption_strategy="csv")
    assert found.listing is not None
    assert found.listing.rows["a.jpg"].texts == ()
    assert "more fields than its header" in str(found.listing.rows["a.jpg"].reason)
    assert found.listing.rows["b.jpg"].texts == ()


@pytest.mark.parametrize("name", ["a\0b.jpg", "\udce9.jpg", "half \ud800", ".", "x" * 300])
def test_paths_that_no_file_can_have_are_rejected(tmp_path: Path, name: str) -> None:
    found = discover_list(tmp_path, "jsonl", [{"path": name, "caption": "x"}])
    assert len(found.candidates) == 1
    assert found.candidates[0].reason
    found.candidates[0].path.encode("utf-8")


def test_a_list_may_name_the_images_and_names_give_the_captions(tmp_path: Path) -> None:
    touch(tmp_path / "images" / "a.jpg")
    touch(tmp_path / "l.csv", b"path\na.jpg\n")
    found = discover(tmp_path, type="list", list_file="l.csv")
    assert [(c.path, c.reason) for c in found.candidates] == [("a.jpg", None)]
