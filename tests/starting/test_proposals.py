"""What `init` finds in a folder and proposes for it, against what the stages then make of it."""

from __future__ import annotations

import csv
import json
import os
import shutil
import struct
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.query import query
from omnigen_pipe.memory.batch import LARGEST, batch_within, proposed_batch
from omnigen_pipe.memory.report import square_prospect
from omnigen_pipe.progress import Progress
from omnigen_pipe.starting import proposals
from omnigen_pipe.starting.answers import Answers, configured
from omnigen_pipe.starting.configuration_file import write
from omnigen_pipe.starting.contents import look_into
from omnigen_pipe.starting.names import reads_like_caption
from omnigen_pipe.starting.questions import Surroundings, answered
from omnigen_pipe.starting.tables import MOST_TABLES, find_tables
from omnigen_pipe.workspace import Workspace
from stages import bucket, discover


def png(width: int, height: int) -> bytes:
    """A PNG that says it has this size, without its pixels: headers are all that is read."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0"))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def state(folder: Path) -> dict[str, tuple[int, bytes | None]]:
    """Everything in `folder`: modification times and contents."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            path.read_bytes() if path.is_file() else None,
        )
        for path in [folder, *folder.rglob("*")]
    }


@dataclass(frozen=True)
class Made:
    """One file of a made folder: its size in pixels (None: no image), its name's kind, the text
    beside it (None: none), and whether the table has a caption for it."""

    size: tuple[int, int] | None
    worded: bool
    text: str | None
    listed: bool


SIDES = st.sampled_from([20, 64, 200, 300, 512, 700, 768, 1000, 1024, 1600, 4000])
FILES = st.builds(
    Made,
    st.one_of(st.none(), st.tuples(SIDES, SIDES), st.tuples(SIDES, SIDES)),
    st.booleans(),
    st.sampled_from([None, "", " \n", "a red bird", "one\ntwo"]),
    st.booleans(),
)


@st.composite
def folders(draw: st.DrawFn) -> tuple[list[Made], str | None, str]:
    """Files, mostly of one kind each; the kind of table, and whether files lie deeper."""
    files = draw(st.lists(FILES, max_size=12))
    if files and draw(st.booleans()):  # a folder in which one kind prevails
        kind = draw(FILES)
        files += [Made(each.size, kind.worded, kind.text, kind.listed) for each in files] * 2
    table = draw(st.sampled_from([None, "jsonl", "csv", "tsv", "parquet"]))
    return files, table, draw(st.sampled_from(["", "deep/er"]))


def make(folder: Path, files: list[Made], table: str | None, below: str) -> None:
    inside = folder / below
    inside.mkdir(parents=True)
    rows = []
    for number, made in enumerate(files):
        stem = f"a red bird nr {number}" if made.worded else f"IMG_{number:04}"
        name = f"{stem}.png"
        (inside / name).write_bytes(b"no image" if made.size is None else png(*made.size))
        if made.text is not None:
            (inside / f"{stem}.txt").write_text(made.text)
        if made.listed:
            rows.append({"file_name": str(Path(below) / name), "text": f"caption {number}"})
    if table == "jsonl":
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / "metadata.jsonl").write_text("".join(lines))
    elif table in ("csv", "tsv"):
        with (folder / f"metadata.{table}").open("w", newline="") as handle:
            delimiter = "\t" if table == "tsv" else ","
            writer = csv.DictWriter(handle, ["file_name", "text"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    elif table == "parquet":
        schema = pa.schema([("file_name", pa.string()), ("text", pa.string())])
        pq.write_table(pa.Table.from_pylist(rows, schema), folder / "metadata.parquet")


def proposed(folders_of_images: list[Path], root: Path) -> Answers:
    """What is written with `--yes`, already written."""
    around = Surroundings(look=lambda images: look_into(Path(images), root))
    answers = answered({"images": [str(f) for f in folders_of_images]}, None, around)
    write(root, configured(answers, root, root.parent))
    return answers


@settings(max_examples=15, deadline=None)
@given(st.lists(folders(), min_size=1, max_size=2))
def test_what_is_proposed_is_valid_and_the_stages_find_what_was_said(
    made: list[tuple[list[Made], str | None, str]],
) -> None:
    base = Path(tempfile.mkdtemp())
    try:
        places = [base / f"images-{number}" for number in range(len(made))]
        for place, one in zip(places, made, strict=True):
            make(place, *one)
        before = [state(place) for place in places]
        answers = proposed(places, base / "project")
        workspace = Workspace.open(base / "project")
        discover.run(workspace, Progress(quiet=True))
        bucket.run(workspace, Progress(quiet=True))
        assert [state(place) for place in places] == before
        for (files, _, _), dataset, each in zip(
            made, workspace.config.datasets, answers.datasets, strict=True
        ):
            contents = each.contents
            assert contents is not None
            usable = sum(one.size is not None for one in files)
            assert contents.files == len(files) == contents.usable + sum(contents.faults.values())
            assert contents.usable == usable
            counts = query(
                "SELECT count(*) AS total, count(*) FILTER (status = 'ok') AS ok FROM images "
                "WHERE dataset = $1",
                dataset.id,
                images=workspace.images.source(),
            ).to_pylist()[0]
            assert counts["total"] == len(files)
            table = contents.best_table
            everywhere = dataset.caption_strategy in ("filename", "instanceprompt")
            in_texts = dataset.caption_strategy == "textfile"
            found = usable if everywhere else contents.captioned
            if not everywhere and not in_texts:
                assert table is not None
                found = table.captioned
            assert counts["ok"] == found
            assert counts["ok"] > usable / 2 or usable == 0
            if found == usable and dataset.resolution > min(proposals.RESOLUTIONS):
                samples = query(
                    "SELECT count(*) FILTER (status = 'ok') AS ok FROM samples WHERE dataset = $1",
                    dataset.id,
                    samples=workspace.samples.source(),
                ).to_pylist()[0]
                assert samples["ok"] >= proposals.REACHED * usable
    finally:
        shutil.rmtree(base)


@given(st.lists(st.integers(0, 5000), max_size=4))
def test_repeats_fill_an_epoch_and_never_shrink_it(images: list[int]) -> None:
    values = [each.value for each in proposals.repeats(images)]
    assert len(values) == len(images)
    for number, value in zip(images, values, strict=True):
        samples = number * (value + 1)
        assert value >= 0
        assert number == 0 or samples >= proposals.EPOCH
        if number >= proposals.EPOCH:
            assert value + 1 <= proposals.BALANCE
            # About as many as the largest has, as far as the limit allows.
            assert samples <= 1.5 * max(images)
            assert samples >= max(images) * 2 / 3 or value + 1 == proposals.BALANCE
    assert proposals.repeats([images[0]])[0].value <= values[0] if images else True


@pytest.mark.parametrize(
    "name",
    [
        "a red bird.jpg",
        "a_red_bird_on_a_fence.png",
        "red-bird.webp",
        "Katze auf dem Sofa 12.jpg",
        "deep/er/the bird's nest.jpg",
        "a bird.jpg",
        "Photo of a bird 3.jpg",
        "一只猫坐在沙发上.jpg",
        "picturesque old town.jpg",
    ],
)
def test_names_that_read_like_captions(name: str) -> None:
    assert reads_like_caption(name)


@pytest.mark.parametrize(
    "name",
    [
        "IMG_1234.JPG",
        "DSC00012.jpg",
        "PXL_20230101_123456789.jpg",
        "Screenshot 2023-01-02 at 12.30.11.png",
        "WhatsApp Image 2021-05-05 at 10.11.12.jpeg",
        "0001.png",
        "d41d8cd98f00b204e9800998ecf8427e.jpg",
        "123e4567-e89b-12d3-a456-426614174000.png",
        "deadbeef12ab-cafe-face.png",
        "cat.jpg",
        "00012_x7.png",
        "image (3).png",
        "_.png",
    ],
)
def test_names_that_do_not(name: str) -> None:
    assert not reads_like_caption(name)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1024, 1024), 1024),
        ((1023, 1023), 768),
        ((4000, 700), 1024),
        ((700, 500), 512),
        ((9, 9), 64),
    ],
)
def test_a_resolution_is_one_that_images_cover(
    size: tuple[int, int], expected: int, tmp_path: Path
) -> None:
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(png(*size))
    # One of five may fall short.
    (tmp_path / "0.png").write_bytes(png(1, 1))
    assert proposals.resolution(look_into(tmp_path, tmp_path / "project")).value == expected


@pytest.mark.parametrize(("longest", "expected"), [(3072, 1024), (2047, 768), (256, 128), (64, 64)])
def test_no_resolution_is_proposed_whose_long_buckets_the_model_cannot_take(
    longest: int, expected: int, tmp_path: Path
) -> None:
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(png(2000, 2000))
    contents = look_into(tmp_path, tmp_path / "project")
    proposal = proposals.resolution(contents, longest)
    assert proposal.value == expected
    assert ("made for" if expected == 1024 else f"at most {longest:,} px") in proposal.reason


def test_only_a_sample_is_opened_and_counts_are_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from omnigen_pipe.starting import contents as module

    for number in range(40):
        (tmp_path / f"{number}.png").write_bytes(png(100, 80) if number % 2 else b"")
    opened = []
    read = module.read_header
    monkeypatch.setattr(module, "read_header", lambda path: opened.append(path) or read(path))
    found = look_into(tmp_path, tmp_path / "project", most=10)
    assert (found.files, found.sample, len(opened), len(set(opened))) == (40, 10, 10, 10)
    assert found.usable + sum(found.faults.values()) == 10
    assert found.images == 4 * found.usable
    assert look_into(tmp_path, tmp_path / "project", most=10) == found
    assert any("looked at 10 of them" in sentence for sentence in found.sentences())


def test_tables_that_cannot_be_used_are_said_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("no json\n")
    (tmp_path / "b.csv").write_text("who,when\nme,now\n")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 but no table")
    (tmp_path / "d.csv").write_text('path,caption\n"x.png,"never closed\n')
    (tmp_path / "e.json").write_text('{"a": 1}')
    (tmp_path / "f.jsonl").write_text("[" * 100_000)
    (tmp_path / "g.csv").write_text("path,caption\nx.png,a bird\n")
    (tmp_path / "h.jsonl").write_text("")
    tables, notes = find_tables(tmp_path, ["x.png", "y.png"])
    assert [(table.path.name, table.captioned) for table in tables] == [("g.csv", 1)]
    assert [note.split()[0] for note in notes] == [
        "a.jsonl",
        "b.csv",
        "c.parquet",
        "d.csv",
        "f.jsonl",
    ]
    assert "`who`, `when`" in notes[1]


def test_so_many_tables_are_looked_into_and_the_rest_is_said(tmp_path: Path) -> None:
    for number in range(MOST_TABLES + 3):
        (tmp_path / f"{number:02}.csv").write_text("path,caption\nx.png,a bird\n")
    tables, notes = find_tables(tmp_path, ["x.png"])
    assert len(tables) == MOST_TABLES
    assert notes == ["3 more tables were not looked into."]


def test_the_workspace_of_its_own_folder_is_not_taken_for_images(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(100, 80))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "validation.png").write_bytes(png(100, 80))
    assert look_into(tmp_path, tmp_path).files == 1


def workspace_of(tmp_path: Path, **answers: object) -> Workspace:
    write(tmp_path, configured(answered(answers, None), tmp_path, tmp_path))
    return Workspace.open(tmp_path)


def test_the_batch_is_the_largest_that_fits_up_to_a_limit(
    tmp_path: Path, small_omnigen: Path
) -> None:
    workspace = workspace_of(tmp_path, model=str(small_omnigen), resolution=64)
    square, ahead = square_prospect(workspace)
    assert square == "64x64"
    three = ahead.estimate(square, 3).total
    assert batch_within(ahead, square, three)[0] == 3
    assert batch_within(ahead, square, three - 1)[0] == 2
    batch, reason = batch_within(ahead, square, ahead.estimate(square, LARGEST + 4).total)
    assert batch == LARGEST
    assert f"{LARGEST + 4} of 64x64" in reason
    batch, reason = batch_within(ahead, square, ahead.estimate(square, 1).total - 1)
    assert batch == 1
    assert "Not even one sample" in reason


class _Card:
    total_memory = 24 * 2**30


def test_a_model_that_cannot_be_estimated_makes_a_batch_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = workspace_of(tmp_path, model="./nowhere")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: _Card)
    batch, reason = proposed_batch(workspace)
    assert batch == 1
    assert "does not exist" in reason
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert proposed_batch(workspace) == (1, "There is no GPU here to reckon with.")


def test_the_memory_of_the_gpu_is_what_counts(
    tmp_path: Path, small_omnigen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = workspace_of(tmp_path, model=str(small_omnigen), resolution=64)
    square, ahead = square_prospect(workspace)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: _Card)
    monkeypatch.setattr(_Card, "total_memory", ahead.estimate(square, 5).total)
    assert proposed_batch(workspace)[0] == 5


def test_a_folder_that_may_not_be_read_is_said(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    from typer.testing import CliRunner

    from omnigen_pipe.cli import app

    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    arguments = ["init", str(tmp_path / "project"), "--yes", "--images", str(closed)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    assert "may not be read" in result.output
