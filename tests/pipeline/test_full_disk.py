"""The disk full or not writable, a file gone in the middle: said clearly, and nothing is lost."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import forked
import pytest
from effect import check_equal, check_growing, check_nothing_twice, check_whole, effect, leftovers
from pipeline_project import Ended, Project
from writers import WRITERS, Writers, prepare

from omnigen_pipe.latents import encoder, shards

#: Bytes of the small file system, and of the unit in which it gives room.
_SIZE = 4 << 20
_PAGE = 4096

#: What every message says, besides the cause.
_SAID = re.compile(r"Error: /.* could not be written: .*\. What was published before is valid\. ")


@pytest.fixture(scope="module")
def writers(tmp_path_factory: pytest.TempPathFactory, small_omnigen: Path) -> Writers:
    """Two pictures in two buckets, each a shard."""
    return prepare(tmp_path_factory.mktemp("full"), small_omnigen, 2)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of a few MiB; skips where none may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", f"size={_SIZE}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mounted, capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def _leave_room(disk: Path, pages: int) -> Path:
    """Fill `disk` up to so many pages; returns the file that fills it."""
    filler = disk / "filler"
    facts = os.statvfs(disk)
    filler.write_bytes(bytes(facts.f_bavail * facts.f_frsize - pages * _PAGE))
    return filler


def _check_failed_clearly(ended: Ended, cause: str, remedy: str) -> None:
    assert ended.status == 1, ended
    lines = [line for line in ended.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, ended.stderr
    assert _SAID.match(lines[0]), lines
    assert cause in lines[0]
    assert lines[0].endswith(f"{remedy}, and run the same command again.")
    assert "Traceback" not in ended.stderr


def _check_published_is_valid(here: Project, writer: str, writers: Writers) -> None:
    """What was there before is there still, nothing is half there, nothing is left lying about."""
    now, before = effect(here.root), effect(writers.ready[writer])
    check_whole(here.root)
    check_growing(before, now)
    expected = writers.expected[writer]
    assert any(now.images.equals(one.images) for one in (before, expected))
    assert any(now.samples.equals(one.samples) for one in (before, expected))
    unfinished, orphans = leftovers(here.root)
    assert unfinished == []
    assert len(orphans) <= 1, "a tar whose fragment found no room"


def _check_completes(here: Project, writer: str, writers: Writers) -> None:
    here.run(writer)
    check_equal(effect(here.root), writers.expected[writer])
    check_nothing_twice(here.root)


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_disk_that_is_full_at_any_point(
    writer: str, step: int, writers: Writers, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `step` pages more room each time, until the writer comes to its end."""
    monkeypatch.setattr("stages.discover.FLUSH_SECONDS", 0.0)
    monkeypatch.setattr("stages.tokenize.CHUNK", 4)
    for pages in count(0, step):
        here = writers.workspace(writer, small_disk / f"with {pages} pages")
        filler = _leave_room(small_disk, pages)
        ended = here.run(writer, status=None)
        if ended.status == 0:
            break
        _check_failed_clearly(ended, "No space left on device", "Make room")
        _check_published_is_valid(here, writer, writers)
        filler.unlink()
        _check_completes(here, writer, writers)
        shutil.rmtree(here.root)
    assert pages > 0, "a fragment takes room"


@pytest.mark.slow
@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_that_may_not_grow(writer: str, writers: Writers, tmp_path: Path) -> None:
    """The same by a limit of the system, which needs no rights; tars are larger than fragments."""
    here = writers.workspace(writer, tmp_path / "workspace")
    first = forked.both(forked.publish_often, partial(forked.limit_file_size, 1000))
    ended = forked.start(here.root, writer, first=first).ended(status=1)
    _check_failed_clearly(ended, "File too large", "Make room")
    _check_published_is_valid(here, writer, writers)
    _check_completes(here, writer, writers)


def test_a_disk_that_turns_read_only_between_tar_and_fragment(
    writers: Writers, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = writers.workspace("encode-vae", small_disk / "workspace")
    published: list[Path] = []
    publish = shards.publish

    def publish_and_protect(staged: Path, final: Path) -> Path:
        published.append(publish(staged, final))
        if len(published) == 2:
            _remount(small_disk, "ro")
        return final

    monkeypatch.setattr(shards, "publish", publish_and_protect)
    ended = here.run("encode-vae", status=1)
    assert len(published) == 2
    _check_failed_clearly(ended, "Read-only file system", "Give access")
    _check_published_is_valid(here, "encode-vae", writers)
    assert len(effect(here.root).latents) == 1, "the first shard counts"
    monkeypatch.undo()
    _remount(small_disk, "rw")
    _check_completes(here, "encode-vae", writers)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_read_only_disk(writer: str, writers: Writers, small_disk: Path) -> None:
    here = writers.workspace(writer, small_disk / "workspace")
    _remount(small_disk, "ro")
    ended = here.run(writer, status=1)
    _check_failed_clearly(ended, "Read-only file system", "Give access")
    _check_published_is_valid(here, writer, writers)
    _remount(small_disk, "rw")
    _check_completes(here, writer, writers)


def _remount(disk: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)


@pytest.mark.parametrize(
    ("writer", "folder"),
    [
        ("discover", "manifests"),
        ("bucket", "staging"),
        ("encode-vae", "latents"),
        ("encode-vae", "manifests/latents"),
        ("tokenize", "manifests/prompts"),
    ],
)
def test_a_folder_without_permission(
    writer: str, folder: str, writers: Writers, tmp_path: Path
) -> None:
    here = writers.workspace(writer, tmp_path / "workspace")
    protected = here.root / folder
    protected.mkdir(parents=True, exist_ok=True)
    protected.chmod(0o555)
    try:
        child = forked.start(here.root, writer, first=forked.without_roots_rights)
        _check_failed_clearly(child.ended(status=1), "Permission denied", "Give access")
        _check_published_is_valid(here, writer, writers)
    finally:
        protected.chmod(0o755)
    _check_completes(here, writer, writers)


def test_a_picture_that_vanishes_and_comes_back(
    small_omnigen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gone when the encoder comes to it, though it was there when the work was listed."""
    writers = prepare(tmp_path, small_omnigen, 3)
    here = writers.workspace("encode-vae", tmp_path / "workspace")
    picture = tmp_path / "pictures" / "picture 1.png"
    hidden = tmp_path / "hidden.png"
    encode = encoder.encode

    def encode_without(*arguments: Any, **options: Any) -> Any:
        picture.rename(hidden)
        return encode(*arguments, **options)

    monkeypatch.setattr(encoder, "encode", encode_without)
    ended = here.run("encode-vae", status=1)
    monkeypatch.undo()
    assert f"{picture}: No such file or directory" in ended.stdout
    assert "Run `omnigen-pipe discover` and `omnigen-pipe bucket`" in ended.stdout
    _check_published_is_valid(here, "encode-vae", writers)
    assert len(effect(here.root).latents) == 2, "the others"
    hidden.rename(picture)
    _check_completes(here, "encode-vae", writers)
