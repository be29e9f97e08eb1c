"""An export is whole or not there: killed at any instant, on a full disk, beside what is there."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path

import forked
import pytest
from pipeline_project import Project

from manifests.errors import PipeError, UsageError, WriteError
from omnigen_pipe.export import exporting
from omnigen_pipe.export.folder import check_room, check_target, copy_files, published
from omnigen_pipe.export.merged import Merged

#: Signal 9, as an exit status of multiprocessing.
KILLED = -9
#: Bytes of the small file system: the export takes ten MiB.
_DISK = 24 << 20


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class Exports:
    """Exports of one adapter, at strength 1 and at a half: what a whole one holds."""

    def __init__(self, adapter: Path, model: Path, folder: Path) -> None:
        self.arguments = ("export", str(adapter), "--model", str(model), "--quiet")
        here = Project(folder)
        here.run(*self.arguments, "-o", "new")
        here.run(*self.arguments, "-o", "old", "--strength", "0.5")
        self.new, self.old = _contents(folder / "new"), _contents(folder / "old")
        self.folder = folder


@pytest.fixture(scope="module")
def exports(
    adapter: Path, small_omnigen: Path, tmp_path_factory: pytest.TempPathFactory
) -> Exports:
    return Exports(adapter, small_omnigen, tmp_path_factory.mktemp("exports"))


@pytest.mark.slow
@pytest.mark.parametrize("step", [25, 1])
@pytest.mark.parametrize("replacing", [False, True], ids=["first", "replacing"])
def test_killed_at_any_instant(
    exports: Exports, tmp_path: Path, replacing: bool, step: int
) -> None:
    """The target is what it was, or whole; where it is gone for a moment, the old one is beside."""
    for moment in count(1, step):
        root = tmp_path / f"killed at {moment}"
        root.mkdir()
        if replacing:
            shutil.copytree(exports.folder / "old", root / "out")
        first = partial(forked.kill_at, moment)
        arguments = (*exports.arguments, "-o", "out", "--overwrite")
        status = forked.start(root, *arguments, first=first).ended(status=None).status
        assert status in (0, KILLED)
        if (root / "out").exists():
            found = _contents(root / "out")
            assert found == exports.new or (replacing and status and found == exports.old)
        elif replacing:
            (kept,) = root.glob(".out.*.replaced")
            assert _contents(kept) == exports.old
        ended = Project(root).run(*arguments)
        assert _contents(root / "out") == exports.new
        left = [path for path in root.iterdir() if path.name != "out"]
        assert ("left by an export that was killed" in ended.stdout) == bool(left)
        shutil.rmtree(root)
        if status == 0:
            break
    assert moment > step, "there is something to kill"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of a few MiB; skips where none may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mounted, capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("layout", ["diffusers", "omnigen"])
def test_a_disk_that_fills_up_meanwhile_leaves_nothing(
    exports: Exports, small_disk: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    monkeypatch.setattr(exporting, "check_room", lambda *_: None)  # there was room
    here = Project(small_disk)
    arguments = (*exports.arguments, "-o", "out", "--layout", layout)
    for room in (0, 8192, 100_000, 300_000, 5_000_000, 10_000_000):
        facts = os.statvfs(small_disk)
        filler = small_disk / "filler"
        filler.write_bytes(bytes(facts.f_bavail * facts.f_frsize - room))
        ended = here.run(*arguments, status=1)
        assert "out could not be written: No space left on device" in ended.stderr
        assert "Make room, and run the same command again." in ended.stderr
        assert [path.name for path in small_disk.iterdir()] == ["filler"]
        filler.unlink()
    here.run(*arguments)
    assert (small_disk / "out" / "export.json").is_file()


def test_a_disk_without_room_is_found_before_anything_is_written(
    exports: Exports, small_disk: Path
) -> None:
    facts = os.statvfs(small_disk)
    (small_disk / "filler").write_bytes(bytes(facts.f_bavail * facts.f_frsize - 5_000_000))
    ended = Project(small_disk).run(*exports.arguments, "-o", "a/b", status=1)
    assert "b needs 0.01" in ended.stderr
    assert "GB are free there" in ended.stderr
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_where_no_files_can_be_is_said_as_such() -> None:
    with pytest.raises(UsageError, match=r"/proc/zz cannot be made: nothing can be written"):
        check_room(Path("/proc/zz"), 1)


def test_room_is_asked_of_the_disk_that_the_folder_will_lie_on(tmp_path: Path) -> None:
    check_room(tmp_path / "not" / "there", 1)
    with pytest.raises(PipeError, match=r"there needs 1e\+09 GB, and .* GB are free"):
        check_room(tmp_path / "not" / "there", 10**18)


def test_a_file_of_the_base_that_cannot_be_read_is_not_blamed_on_the_export(
    tmp_path: Path,
) -> None:
    def publish() -> None:
        with published(tmp_path / "out", overwrite=False) as unfinished:
            copy_files([tmp_path / "gone.json"], unfinished / "vae")

    with pytest.raises(PipeError, match=r"gone\.json cannot be read: No such file") as raised:
        publish()
    assert not isinstance(raised.value, WriteError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_file_that_may_not_grow(exports: Exports, tmp_path: Path) -> None:
    """The same by a limit of the system, which needs no rights; the earlier export stays."""
    shutil.copytree(exports.folder / "old", tmp_path / "work" / "out")
    first = partial(forked.limit_file_size, 1_000_000)
    child = forked.start(
        tmp_path / "work", *exports.arguments, "-o", "out", "--overwrite", first=first
    )
    assert "File too large" in child.ended(status=1).stderr
    assert _contents(tmp_path / "work") == {f"out/{n}": b for n, b in exports.old.items()}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing(
    exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    tensor, calls = Merged.tensor, count()

    def interrupted(*arguments: object) -> object:
        if next(calls) == 5:
            os.kill(os.getpid(), number)
        return tensor(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Merged, "tensor", interrupted)
    ended = Project(tmp_path).run(*exports.arguments, "-o", "out", status=128 + number)
    assert "Stopped: nothing was written." in ended.stdout
    assert list(tmp_path.iterdir()) == []


def test_only_an_export_is_overwritten_and_only_when_asked(
    exports: Exports, tmp_path: Path
) -> None:
    export = tmp_path / "export"
    shutil.copytree(exports.folder / "old", export)
    with pytest.raises(UsageError, match="is not empty"):
        check_target(export, overwrite=False)
    check_target(export, overwrite=True)
    (export / "vae" / "notes.md").write_text("mine")
    with pytest.raises(UsageError, match=r"1 files or folders that are not .* such as vae/notes"):
        check_target(export, overwrite=True)
    (export / "vae" / "notes.md").unlink()
    check_target(export, overwrite=True)
    (export / "vae" / "mine").mkdir()
    with pytest.raises(UsageError, match=r"not of the export, such as vae/mine"):
        check_target(export, overwrite=True)

    mine = tmp_path / "mine"
    mine.mkdir()
    check_target(mine, overwrite=False)
    (mine / "folder").mkdir()
    with pytest.raises(UsageError, match="is not empty"):
        check_target(mine, overwrite=False)
    (mine / "folder").rmdir()
    (mine / "picture.png").write_text("mine")
    numbers = '{"format": "omnigen-pipe export, version 1", "files": [1]}'
    for text in (None, "{]", "[]", numbers, '{"format": "another", "files": ["picture.png"]}'):
        if text is not None:
            (mine / "export.json").write_text(text)
        with pytest.raises(UsageError, match=r"has no export\.json of an export"):
            check_target(mine, overwrite=True)
    with pytest.raises(UsageError, match="is a file"):
        check_target(mine / "picture.png", overwrite=True)


def test_a_mount_point_is_refused_before_the_work(small_disk: Path, exports: Exports) -> None:
    """Nothing can be renamed into its place."""
    ended = Project(small_disk.parent).run(
        *exports.arguments, "-o", small_disk.name, "--overwrite", status=2
    )
    assert "is a mount point" in ended.stderr
    assert list(small_disk.iterdir()) == []


def test_the_root_is_a_mount_point() -> None:
    with pytest.raises(UsageError, match="Name a folder inside"):
        check_target(Path("/"), overwrite=True)


def test_what_came_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def publish() -> None:
        with published(target, overwrite=False) as unfinished:
            (unfinished / "a").write_text("new")
            target.mkdir()
            (target / "mine").write_text("mine")

    with pytest.raises(UsageError, match="is not empty"):
        publish()
    assert _contents(tmp_path) == {"out/mine": b"mine"}


def test_the_base_is_not_overwritten_by_what_is_made_of_it(
    exports: Exports, adapter: Path, tmp_path: Path
) -> None:
    """An export can be the base of the next one, but not be replaced by it."""
    shutil.copytree(exports.folder / "old", tmp_path / "base")
    here = Project(tmp_path)
    ended = here.run(
        "export", str(adapter), "--model", "base", "-o", "base", "--overwrite", status=2
    )
    assert "holds the base model itself" in ended.stderr
    here.run("export", str(adapter), "--model", "base", "-o", "next")
    assert _contents(tmp_path / "base") == exports.old
