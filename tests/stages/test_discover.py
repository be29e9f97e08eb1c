"""discover as a whole: every file accounted for, nothing read twice, nothing lost when killed."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from PIL import Image

from hub_stub import Hub, environment, serve
from manifests.errors import PipeError, UsageError
from manifests.parquet import read_metadata
from manifests.schema import FILES
from omnigen_pipe import config
from omnigen_pipe.images import probe, reading
from omnigen_pipe.progress import Progress
from omnigen_pipe.summary import Summary, show
from omnigen_pipe.workspace import Workspace
from stages import discover

QUIET = Progress(quiet=True)

#: A modification time (nanoseconds) so old that no reading comes within two seconds of it.
LONG_AGO = 1_600_000_000_000_000_000


def workspace(root: Path, *datasets: dict[str, Any]) -> Workspace:
    tables = [{"id": "d", "instance_data_dir": "images", **dataset} for dataset in datasets or [{}]]
    return Workspace(root, config.parse({"dataset": tables}, "test"))


def picture(
    path: Path, size: tuple[int, int] = (30, 20), mode: str = "RGB", **options: Any
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    format = Image.registered_extensions()[path.suffix]
    Image.new(mode, size).save(buffer, format, **options)
    return old(path, buffer.getvalue())


def old(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, ns=(LONG_AGO, LONG_AGO))
    return path


def rows(ws: Workspace) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = ws.images.read().to_pylist()
    return found


def by_path(ws: Workspace) -> dict[str, dict[str, Any]]:
    return {row["path"]: row for row in rows(ws)}


_opened: list[tuple[int, str, bool]] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None and isinstance(arguments[0], (str, bytes)):
        # os.open has no mode; open() has one, and is followed by os.open where it has an opener.
        path, low = os.fsdecode(arguments[0]), arguments[1] is None
        before = (threading.get_ident(), path, False)
        if low and before in _opened:
            _opened.remove(before)
        _opened.append((threading.get_ident(), path, low))


sys.addaudithook(_audit)


@contextmanager
def opened_under(folder: Path) -> Iterator[list[str]]:
    """The files under `folder` that Python opens meanwhile, by whatever function."""
    global _opened
    _opened = []
    found: list[str] = []
    try:
        yield found
    finally:
        start = f"{folder}/"
        paths = sorted(path for _, path, _ in _opened)
        found += [path.removeprefix(start) for path in paths if path.startswith(start)]
        _opened = None


def run_counting(ws: Workspace, folder: Path) -> tuple[Summary, list[str]]:
    with opened_under(folder) as opened:
        summary = discover.run(ws, QUIET)
    return summary, opened


@pytest.fixture
def bad_folder(tmp_path: Path) -> Path:
    """A folder with one of everything, good and bad."""
    images = tmp_path / "images"
    picture(images / "good.jpg")
    picture(images / "cmyk.jpg", mode="CMYK")
    picture(images / "sixteen.png", mode="I;16")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(images / "rotated.jpg", exif=exif)
    picture(images / 'a "quoted"\nname.png')
    picture(images / "moving.gif", save_all=True, append_images=[Image.new("RGB", (30, 20), "red")])
    picture(images / "huge.png", size=(500, 500))
    old(images / "empty.jpg", b"")
    old(images / "text.jpg", b"dear diary")
    old(images / "cut.jpg", (images / "good.jpg").read_bytes()[:100])
    old(Path(os.fsdecode(os.fsencode(images) + b"/caf\xe9.jpg")), b"")
    picture(images / "___.png")
    return images


def test_every_file_is_accounted_for(tmp_path: Path, bad_folder: Path) -> None:
    ws = workspace(tmp_path, {"maximum_pixels": 100_000})
    summary = discover.run(ws, QUIET)
    found = by_path(ws)
    assert len(rows(ws)) == len(found) == len(os.listdir(bad_folder)) == 12
    reasons = {path: row["reason"].split(": ")[0] for path, row in found.items() if row["reason"]}
    assert reasons == {
        "moving.gif": "animated",
        "huge.png": "too large",
        "empty.jpg": "empty file",
        "text.jpg": "not an image",
        "cut.jpg": "truncated or damaged header",
        "caf\\xe9.jpg": "name is not UTF-8",
        "___.png": "no caption",
    }
    for path, row in found.items():
        assert row["status"] == ("rejected" if path in reasons else "ok")
    assert (found["rotated.jpg"]["width"], found["rotated.jpg"]["height"]) == (20, 30)
    assert found["cmyk.jpg"]["mode"] == "CMYK"
    assert found['a "quoted"\nname.png']["captions"] == ['a "quoted"\nname']
    good = (bad_folder / "good.jpg").read_bytes()
    assert found["good.jpg"]["content_hash"] == blake3(good).hexdigest()[:32]
    assert found["good.jpg"]["mtime_ns"] == LONG_AGO

    assert summary.counts == {"images": 12, "ok": 5, "rejected": 7, "files opened": 11}
    assert summary.left_out == Counter(reasons.values())
    assert summary.details["datasets"] == {"d": {"images": 12, "ok": 5, "rejected": 7}}
    json.dumps(summary.as_json())
    assert [row["path"] for row in rows(ws)] == sorted(found)


def test_rejected_files_are_shown_with_reasons(
    tmp_path: Path, bad_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old(bad_folder / "[red]bad\n.jpg", b"")
    show(discover.run(workspace(tmp_path), QUIET))
    shown = capsys.readouterr().out
    assert "[red]bad\\n.jpg" in shown
    assert "left out 2: empty file" in shown


def test_a_second_run_opens_nothing_and_says_so(tmp_path: Path, bad_folder: Path) -> None:
    ws = workspace(tmp_path, {"caption_strategy": "textfile"})
    for path in list(bad_folder.iterdir()):
        old(path.with_suffix(".txt"), b"a caption")
    first, opened = run_counting(ws, bad_folder)
    assert len(opened) > 12
    before = {p: p.stat().st_mtime_ns for p in ws.root.rglob("*")}
    second, opened = run_counting(ws, bad_folder)
    assert opened == []
    assert (second.changed, second.counts["files opened"]) == (False, 0)
    assert {**second.counts, "files opened": 0} == {**first.counts, "files opened": 0}
    assert second.left_out == first.left_out
    assert {p: p.stat().st_mtime_ns for p in ws.root.rglob("*")} == before


def test_what_changed_is_read_again_and_only_that(tmp_path: Path, bad_folder: Path) -> None:
    ws = workspace(tmp_path)
    discover.run(ws, QUIET)
    os.utime(bad_folder / "good.jpg", ns=(LONG_AGO, LONG_AGO + 1))
    picture(bad_folder / "new.webp")
    (bad_folder / "cmyk.jpg").unlink()
    (bad_folder / "sixteen.png").rename(bad_folder / "renamed.png")
    picture(bad_folder / "text.jpg")
    summary, opened = run_counting(ws, bad_folder)
    assert opened == [str(n) for n in ("good.jpg", "new.webp", "renamed.png", "text.jpg")]
    assert summary.changed
    found = by_path(ws)
    assert found["good.jpg"]["mtime_ns"] == LONG_AGO + 1
    assert found["text.jpg"]["status"] == "ok"
    assert "cmyk.jpg" not in found


def test_options_that_judge_open_no_file(tmp_path: Path, bad_folder: Path) -> None:
    discover.run(workspace(tmp_path), QUIET)
    assert by_path(workspace(tmp_path))["moving.gif"]["status"] == "rejected"
    options = {"animated": "first", "maximum_pixels": 100_000}
    summary, opened = run_counting(workspace(tmp_path, options), bad_folder)
    assert opened == []
    assert summary.changed
    found = by_path(workspace(tmp_path))
    assert (found["moving.gif"]["status"], found["moving.gif"]["frames"]) == ("ok", 2)
    assert found["huge.png"]["reason"] == (
        "too large: 500x500 is 250,000 pixels, over maximum_pixels = 100,000"
    )


def test_other_settings_are_another_snapshot(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.png")
    discover.run(workspace(tmp_path), QUIET)
    # The same rows, but whoever reads the fingerprint must see that they were asked for anew.
    assert discover.run(workspace(tmp_path, {"maximum_pixels": 1_000_000}), QUIET).changed
    assert not discover.run(
        workspace(tmp_path, {"maximum_pixels": 1_000_000, "repeats": 3}), QUIET
    ).changed


def test_a_file_read_just_after_it_was_written_is_read_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ws = workspace(tmp_path)
    fresh = picture(tmp_path / "images" / "fresh.png")
    picture(tmp_path / "images" / "old.png")
    os.utime(fresh)
    # "Just after" is a year here, so that a slow machine fails no test.
    year = 365 * 24 * 3600 * 10**9
    with monkeypatch.context() as patch:
        patch.setattr(reading, "RACY_NS", year)
        assert run_counting(ws, tmp_path / "images")[1] == ["fresh.png", "old.png"]
        assert run_counting(ws, tmp_path / "images")[1] == ["fresh.png"]
    os.utime(fresh, ns=(LONG_AGO, LONG_AGO))
    assert run_counting(ws, tmp_path / "images")[1] == ["fresh.png"]
    assert run_counting(ws, tmp_path / "images")[1] == []


def test_two_datasets_over_one_folder_open_each_file_once(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        picture(tmp_path / "images" / name)
    both = ({"id": "at512", "resolution": 512}, {"id": "at1024"})
    summary, opened = run_counting(workspace(tmp_path, *both), tmp_path / "images")
    assert opened == ["a.png", "b.png"]
    assert summary.counts == {"images": 4, "ok": 4, "rejected": 0, "files opened": 2}
    third = (*both, {"id": "link", "instance_data_dir": "same"})
    (tmp_path / "same").symlink_to(tmp_path / "images")
    summary, opened = run_counting(workspace(tmp_path, *third), tmp_path / "images")
    assert opened == []
    assert summary.counts["images"] == 6
    # Its facts are logged under its own name: they outlive the other datasets.
    alone = workspace(tmp_path, third[2])
    assert run_counting(alone, tmp_path)[1].count("same/a.png") == 0
    assert discover.run(alone, QUIET).counts["files opened"] == 0


def test_order_of_datasets_and_of_log_fragments_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        picture(tmp_path / "images" / f"{number}.png", size=(number + 1, 3))
        picture(tmp_path / "more" / f"{number}.png", size=(7, number + 1))
    datasets = ({"id": "a"}, {"id": "b", "instance_data_dir": "more"})
    monkeypatch.setattr(discover, "FLUSH_SECONDS", 0.0)
    ws = workspace(tmp_path, *datasets)
    discover.run(ws, QUIET)
    assert len(ws.files.fragments()) == 10
    found = ws.images.read()
    shutil.rmtree(tmp_path / "manifests")
    monkeypatch.undo()
    turned = workspace(tmp_path, *reversed(datasets))
    discover.run(turned, QUIET)
    assert len(turned.files.fragments()) == 1
    assert turned.images.read().equals(found)
    assert not discover.run(ws, QUIET).changed


def test_text_files_are_captions_and_are_followed(tmp_path: Path) -> None:
    images = tmp_path / "images"
    picture(images / "a.png")
    picture(images / "sub" / "b.png")
    picture(images / "c.png")
    old(images / "a.txt", b"one\ntwo\n")
    old(images / "sub" / "b.txt", b'say "hi"')
    ws = workspace(tmp_path, {"caption_strategy": "textfile"})
    summary = discover.run(ws, QUIET)
    found = by_path(ws)
    assert found["a.png"]["captions"] == ["one", "two"]
    assert found["sub/b.png"]["captions"] == ['say "hi"']
    assert found["sub/b.png"]["caption_path"] == "sub/b.txt"
    assert found["sub/b.png"]["caption_mtime_ns"] == LONG_AGO
    assert found["c.png"]["reason"] == "no caption: there is no .txt beside the image"
    assert summary.left_out == {"no caption": 1}

    (images / "a.txt").write_bytes(b"three")
    old(images / "c.txt", b"now there")
    _, opened = run_counting(ws, images)
    assert opened == ["a.txt", "c.txt"]
    found = by_path(ws)
    assert found["a.png"]["captions"] == ["three"]
    assert found["c.png"]["captions"] == ["now there"]
    joined = workspace(tmp_path, {"caption_strategy": "textfile", "textfile_lines": "join"})
    old(images / "a.txt", b"one\ntwo")
    discover.run(joined, QUIET)
    assert by_path(joined)["a.png"]["captions"] == ["one two"]


def test_lists_give_images_and_captions(tmp_path: Path) -> None:
    images = tmp_path / "images"
    picture(images / "a.png")
    picture(images / "b.png")
    lines = [
        {"path": "a.png", "caption": ["one", 'two, "quoted"\nand broken']},
        {"path": "b.png"},
        {"path": "gone.png", "caption": "x"},
    ]
    (tmp_path / "l.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    options = {
        "type": "list",
        "list_file": "l.jsonl",
        "caption_strategy": "jsonl",
        "instance_prompt": "sks",
        "prepend_instance_prompt": True,
    }
    ws = workspace(tmp_path, options)
    discover.run(ws, QUIET)
    found = by_path(ws)
    assert found["a.png"]["captions"] == ["sks one", 'sks two, "quoted"\nand broken']
    assert found["a.png"]["caption_path"] == "l.jsonl"
    assert found["b.png"]["reason"] == "no caption: the list's caption is empty"
    assert found["gone.png"]["reason"] == "not there: the list names a file that does not exist"
    assert found["gone.png"]["size"] is None
    assert not discover.run(ws, QUIET).changed
    walked = workspace(tmp_path, {**options, "type": "local"})
    picture(images / "c.png")
    summary = discover.run(walked, QUIET)
    assert by_path(walked)["c.png"]["reason"] == "no caption: the list has no row for the file"
    assert any("1 paths in l.jsonl" in note for note in summary.notes)


def test_a_dataset_that_shrank_stops_discover(tmp_path: Path) -> None:
    images = tmp_path / "images"
    for number in range(5):
        picture(images / f"{number}.png")
    ws = workspace(tmp_path)
    discover.run(ws, QUIET)
    (images / "0.png").unlink()
    (images / "1.png").unlink()
    discover.run(ws, QUIET)
    (images / "2.png").unlink()
    (images / "3.png").unlink()
    before = ws.images.read()
    with pytest.raises(PipeError, match=r"dataset `d`: 2 of the 3 files .* gone.*--allow-shrink"):
        discover.run(ws, QUIET)
    images.rename(tmp_path / "moved")
    with pytest.raises(PipeError, match=r"dataset `d`: the folder .* is gone.*--allow-shrink") as e:
        discover.run(ws, QUIET)
    assert e.value.exit_status == 1
    assert ws.images.read().equals(before)
    assert discover.run(ws, QUIET, allow_shrink=True).counts["images"] == 0
    with pytest.raises(UsageError, match="does not exist"):
        discover.run(ws, QUIET)
    (tmp_path / "moved").rename(images)
    assert discover.run(ws, QUIET).counts == {
        "images": 1,
        "ok": 1,
        "rejected": 0,
        "files opened": 0,
    }


def test_other_files_in_their_place_are_a_loss_too(tmp_path: Path) -> None:
    images = tmp_path / "images"
    for number in range(5):
        picture(images / f"{number}.png", size=(10 + number, 10))
    ws = workspace(tmp_path)
    discover.run(ws, QUIET)
    before = ws.images.read()
    for number in range(3):
        (images / f"{number}.png").unlink()
        os.utime(picture(images / f"new {number}.png", size=(20, 10)))
    with pytest.raises(PipeError, match=r"3 of the 5 files .* 5 files are there now"):
        discover.run(ws, QUIET)
    assert ws.images.read().equals(before)
    assert discover.run(ws, QUIET, allow_shrink=True).counts["images"] == 5


def test_renamed_and_moved_files_are_no_loss(tmp_path: Path) -> None:
    images = tmp_path / "images"
    for number in range(4):
        # All of one size and time: each new name makes up for one old name, and no more.
        picture(images / f"{number}.png")
    ws = workspace(tmp_path)
    discover.run(ws, QUIET)
    (images / "sub").mkdir()
    for number in range(3):
        (images / f"{number}.png").rename(images / "sub" / f"renamed {number}.png")
    assert discover.run(ws, QUIET).counts["ok"] == 4
    for number in range(3):
        (images / "sub" / f"renamed {number}.png").unlink()
    (images / "3.png").rename(images / "last.png")
    with pytest.raises(PipeError, match="3 of the 4 files"):
        discover.run(ws, QUIET)


def test_a_folder_that_never_was_is_a_wrong_path(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.png")
    ws = workspace(tmp_path, {}, {"id": "typo", "instance_data_dir": "imagse"})
    with pytest.raises(UsageError, match="imagse does not exist"):
        discover.run(ws, QUIET, allow_shrink=True)
    assert not ws.images.exists()


def test_no_dataset_is_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no"):
        discover.run(workspace(tmp_path, {"disabled": True}), QUIET)


def test_an_unreadable_file_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = tmp_path / "images"
    picture(images / "a.png")
    forbidden = picture(images / "b.png")
    real_open = os.open

    def refuse(path: Any, *arguments: Any, **options: Any) -> int:
        if path == str(forbidden):
            raise PermissionError(13, "Permission denied", path)
        return real_open(path, *arguments, **options)

    ws = workspace(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        summary = discover.run(ws, QUIET)
        assert by_path(ws)["b.png"]["reason"] == "unreadable: Permission denied"
        assert summary.left_out == {"unreadable": 1}
        assert not discover.run(ws, QUIET).changed
    summary = discover.run(ws, QUIET)
    assert summary.counts == {"images": 2, "ok": 2, "rejected": 0, "files opened": 1}


def test_a_file_that_memory_is_too_short_for_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(tmp_path / "images" / "a.png")
    picture(tmp_path / "images" / "b.jpg")

    def refuse(*_: Any, **__: Any) -> Any:
        raise MemoryError

    ws = workspace(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "getexif", refuse)
        summary = discover.run(ws, QUIET)
        assert {row["reason"] for row in rows(ws)} == {"unreadable: too little memory"}
        assert summary.left_out == {"unreadable": 2}
    assert discover.run(ws, QUIET).counts["ok"] == 2


def test_the_fingerprint_is_in_the_snapshot(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.png")
    ws = workspace(tmp_path)
    discover.run(ws, QUIET)
    assert len(ws.images.metadata()["fingerprint"]) == 32
    picture(tmp_path / "images" / "b.png")
    discover.run(ws, QUIET)
    found = [read_metadata(fragment, FILES) for fragment in ws.files.fragments()]
    assert len({metadata["fingerprint"] for metadata in found if metadata}) == 2


KILLED = """
import sys, time
from pathlib import Path
from omnigen_pipe import config
from omnigen_pipe.images import probe
from omnigen_pipe.progress import Progress
from omnigen_pipe.workspace import Workspace
from stages import discover

read_file = probe.read_file

def read_or_hang(path, size, mtime_ns):
    if path.endswith("07.png"):
        time.sleep(600)
    return read_file(path, size, mtime_ns)

def say(amount):
    global done
    done += amount
    if done == 7:
        # Called before the seventh row is published: the next reading never comes.
        print("seven", flush=True)

done = 0
probe.read_file = read_or_hang
discover.FLUSH_SECONDS = 0.0
root = Path(sys.argv[1])
table = {"id": "d", "instance_data_dir": "images"}
progress = Progress(quiet=True)
progress.task = __import__("contextlib").contextmanager(lambda label, total: (yield say))
discover.run(Workspace(root, config.parse({"dataset": [table]}, "test")), progress)
"""


def test_a_killed_discover_goes_on_where_it_was(tmp_path: Path) -> None:
    images = tmp_path / "images"
    for number in range(20):
        picture(images / f"{number:02}.png", size=(number + 1, 2))
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"seven\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    ws = workspace(tmp_path)
    assert not ws.images.exists()
    kept = sorted(ws.files.read()["path"].to_pylist())
    assert kept[:6] == [f"{number:02}.png" for number in range(6)]
    summary, opened = run_counting(ws, images)
    assert opened == sorted({f"{number:02}.png" for number in range(20)} - set(kept))
    assert summary.counts["images"] == summary.counts["ok"] == 20
    assert [row["width"] for row in rows(ws)] == list(range(1, 21))


def test_an_interrupted_discover_keeps_what_it_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(10):
        picture(tmp_path / "images" / f"{number}.png")

    @contextmanager
    def interrupt(label: str, total: int | None) -> Iterator[Any]:
        assert total == 10
        done = 0

        def advance(amount: int) -> None:
            nonlocal done
            done += amount
            if done == 4:
                raise KeyboardInterrupt

        yield advance

    ws = workspace(tmp_path)
    progress = Progress(quiet=True)
    monkeypatch.setattr(progress, "task", interrupt)
    with pytest.raises(KeyboardInterrupt):
        discover.run(ws, progress)
    assert ws.files.read().num_rows == 4
    assert discover.run(ws, QUIET).counts["files opened"] == 6


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_publishes_what_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    images = tmp_path / "images"
    picture(images / "before.png")
    ws = workspace(tmp_path)
    discover.run(ws, QUIET)
    before = ws.images.read()
    for each in range(100):
        picture(images / f"{each:02}.png", size=(each + 1, 2))

    @contextmanager
    def interrupted(label: str, total: int | None) -> Iterator[Any]:
        assert total == 100
        sent = False

        def advance(amount: int, detail: str = "") -> None:
            nonlocal sent
            if not sent:
                sent = True
                os.kill(os.getpid(), number)

        yield advance

    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    progress = Progress(quiet=True)
    monkeypatch.setattr(progress, "task", interrupted)
    summary = discover.run(ws, progress)
    assert summary.signal == number
    assert any("Run the same command to go on" in note for note in summary.notes)
    read = summary.counts["files opened"]
    # Those begun are finished, and hardly more.
    assert 1 <= read <= 2 * probe.READERS + 1
    assert summary.counts["not read yet"] == 100 - read
    assert ws.files.read().num_rows == 1 + read
    assert ws.images.read().equals(before)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    rest = discover.run(ws, QUIET)
    assert (rest.signal, rest.counts["files opened"]) == (None, 100 - read)
    assert rest.counts["ok"] == 101


def test_a_signal_at_the_last_file_is_passed_on_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is listed, but whatever would come next was asked not to."""
    picture(tmp_path / "images" / "only.png")
    ws = workspace(tmp_path)

    @contextmanager
    def interrupted(label: str, total: int | None) -> Iterator[Any]:
        yield lambda amount, detail="": os.kill(os.getpid(), signal.SIGTERM)

    progress = Progress(quiet=True)
    monkeypatch.setattr(progress, "task", interrupted)
    summary = discover.run(ws, progress)
    assert (summary.signal, summary.counts["ok"]) == (signal.SIGTERM, 1)
    assert not discover.run(ws, QUIET).changed


def test_the_photographs_are_all_good(tmp_path: Path, photos: Path) -> None:
    ws = workspace(tmp_path, {"instance_data_dir": str(photos)})
    summary = discover.run(ws, QUIET)
    pictures = [path for path in photos.iterdir() if path.suffix == ".jpg"]
    assert summary.counts["ok"] == summary.counts["images"] == len(pictures)
    assert {row["captions"][0] for row in rows(ws)} == {path.stem for path in pictures}
    for row in rows(ws):
        with Image.open(photos / row["path"]) as image:
            assert (row["width"], row["height"]) == image.size
    assert not discover.run(ws, QUIET).changed


# The hub, as a server on this machine.


@pytest.fixture
def hub() -> Iterator[tuple[str, type[Hub]]]:
    """Address and handler of a hub with the dataset ann/pets."""
    with serve("ann/pets", "datasets/") as running:
        yield running


def run_with_hub(root: Path, endpoint: str) -> subprocess.CompletedProcess[str]:
    """discover as a command: huggingface_hub reads HF_ENDPOINT when it is imported."""
    return subprocess.run(
        [sys.executable, "-m", "omnigen_pipe.cli", "discover", "-w", str(root), "--json", "-q"],
        env=environment(endpoint, root / "hub"),
        capture_output=True,
        text=True,
        check=False,
    )


def png(width: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, 2)).save(buffer, "PNG")
    return buffer.getvalue()


def hub_workspace(root: Path, address: str, **options: str) -> Workspace:
    lines = [f"{name} = {json.dumps(value)}" for name, value in options.items()]
    (root / "omnigen-pipe.toml").write_text(
        f'[[dataset]]\nid = "d"\ninstance_data_dir = "{address}"\n' + "\n".join(lines)
    )
    return Workspace.open(root)


def test_a_dataset_on_the_hub(tmp_path: Path, hub: tuple[str, type[Hub]]) -> None:
    endpoint, handler = hub
    handler.files = {
        "README.md": b"# Pets",
        "train/cat.png": png(3),
        "train/same cat.PNG": png(3),
        "train/cat.txt": b"a cat\nthe cat",
        "train/same cat.txt": b"another name",
        "train/big.parquet": b"x" * 100,
        "test/dog.png": png(4),
    }
    ws = hub_workspace(tmp_path, "hf://datasets/ann/pets@main/train", caption_strategy="textfile")
    done = run_with_hub(tmp_path, endpoint)
    assert done.returncode == 0, done.stderr
    found = by_path(ws)
    # Equal bytes are one file in the hub's cache, but two images with captions of their own.
    assert {path: row["captions"] for path, row in found.items()} == {
        "cat.png": ["a cat", "the cat"],
        "same cat.PNG": ["another name"],
    }
    assert json.loads(done.stdout)["counts"]["files opened"] == 1
    asked = " ".join(handler.requests)
    assert "big.parquet" not in asked
    assert "dog.png" not in asked

    # Without the hub, discover and the later stages go on with what was downloaded.
    handler.requests.clear()
    done = run_with_hub(tmp_path, "http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    script = (
        "import sys; from omnigen_pipe.workspace import Workspace;"
        "from omnigen_pipe.images.sources import dataset_root;"
        "w = Workspace.open(sys.argv[1]); print(dataset_root(w, w.config.datasets[0]))"
    )
    root = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env=environment(endpoint, tmp_path / "hub"),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert (Path(root) / "cat.png").read_bytes() == png(3)
    assert handler.requests == []


def test_pictures_inside_parquet_are_refused(tmp_path: Path, hub: tuple[str, type[Hub]]) -> None:
    endpoint, handler = hub
    handler.files = {"data/train-0.parquet": b"x", "data/train-1.parquet": b"y", "README.md": b""}
    hub_workspace(tmp_path, "hf://datasets/ann/pets")
    done = run_with_hub(tmp_path, endpoint)
    assert done.returncode == 2
    assert "has no image files. It holds 2 .parquet, 1 .md. Pictures embedded" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://datasets/ann/birds", "could not be fetched from the hub"),
        ("hf://datasets/ann", "is not of the form"),
        ("hf://datasets/ann/pets/../secret", "is not of the form"),
    ],
)
def test_wrong_hub_addresses_are_wrong_usage(
    tmp_path: Path, hub: tuple[str, type[Hub]], address: str, message: str
) -> None:
    hub_workspace(tmp_path, address)
    done = run_with_hub(tmp_path, hub[0])
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_hub_that_cannot_be_reached_is_wrong_usage(tmp_path: Path) -> None:
    hub_workspace(tmp_path, "hf://datasets/ann/pets")
    done = run_with_hub(tmp_path, "http://127.0.0.1:9")
    assert done.returncode == 2, done.stderr
    assert "HF_ENDPOINT" in done.stderr
    assert "Traceback" not in done.stderr
