"""Flushed, then renamed, then the folder flushed: seen in the system calls of each writer.

Killing a process shows nothing of this: what it wrote is in the kernel already. After a power
cut only what was flushed in the right order is whole.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from writers import WRITERS, Writers, prepare

_CALLS = "fsync,fdatasync,rename,renameat,renameat2,mkdir,mkdirat,openat,unlink,unlinkat"
_WRITES = "write,pwrite64,writev,pwritev,ftruncate"

#: A whole call, or the end of one that another thread's call came between.
_LINE = re.compile(r"^(\d+) +(?:<\.\.\. )?(\w+)(?: resumed>|\()(.*)$")
_UNFINISHED = " <unfinished ...>"


@dataclass(frozen=True)
class Call:
    """A system call that succeeded: the lines of the record at which it began and returned."""

    name: str
    path: Path
    began: int
    returned: int
    #: Of a rename, the new name.
    target: Path | None = None
    writes: bool = False


@pytest.fixture(scope="module")
def writers(tmp_path_factory: pytest.TempPathFactory, small_omnigen: Path) -> Writers:
    """Three pictures in two buckets."""
    return prepare(tmp_path_factory.mktemp("order"), small_omnigen, 3)


@pytest.fixture(scope="module")
def record(writers: Writers, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Call]]:
    """The workspace that all four writers filled, one after the other, and their system calls."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    folder = tmp_path_factory.mktemp("record")
    root = writers.workspace("discover", folder / "workspace").root
    written = folder / "calls"
    recording = [strace, "-f", "-y", "-qq", "-s", "0", "-o", str(written)]
    recording += ["-e", f"trace={_CALLS},{_WRITES}", "-e", "signal=none"]
    if subprocess.run([*recording, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine does not let strace trace")
    script = (
        "import sys\n"
        "import forked\n"
        "from omnigen_pipe.cli import main\n"
        "forked.publish_often()\n"
        f"for writer in {WRITERS!r}:\n"
        "    sys.argv = ['omnigen-pipe', writer, '--quiet']\n"
        "    try:\n        main()\n"
        "    except SystemExit as end:\n        assert not end.code, end.code\n"
    )
    here = Path(__file__).resolve()
    path = ":".join([str(here.parent), str(here.parents[2])])
    done = subprocess.run(
        [*recording, "-E", f"PYTHONPATH={path}", sys.executable, "-c", script],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return root, _calls(written.read_text(errors="replace").splitlines(), root)


def _calls(lines: Sequence[str], root: Path) -> list[Call]:
    """The calls of a record that touch `root`, in the order in which they returned."""
    begun: dict[str, tuple[int, str]] = {}
    calls = []
    for number, line in enumerate(lines):
        match = _LINE.match(line)
        if match is None:
            continue
        thread, name, text = match.groups()
        began = number
        if text.endswith(_UNFINISHED):
            begun[thread] = (number, text.removesuffix(_UNFINISHED))
            continue
        if " resumed>" in line:
            began, first = begun.pop(thread)
            text = first + text
        arguments, _, result = text.rpartition(" = ")
        if result.startswith(("-1", "?")):
            continue
        # Names stand in quotes, and those of descriptors in angle brackets.
        where = (
            r'"([^"]*)"' if name.startswith(("rename", "mkdir", "unlink", "open")) else "<([^>]*)>"
        )
        paths = [root / found for found in re.findall(where, arguments)]
        if not paths or root not in [paths[0], *paths[0].parents]:
            continue
        writes = name.startswith("open") and ("O_WRONLY" in arguments or "O_RDWR" in arguments)
        target = paths[1] if name.startswith("rename") else None
        calls.append(Call(name, paths[0], began, number, target, writes))
    return calls


def _flushes(calls: Sequence[Call], path: Path) -> list[Call]:
    return [call for call in calls if call.name == "fsync" and call.path == path]


def _renames(calls: Sequence[Call]) -> list[Call]:
    return [call for call in calls if call.name.startswith("rename")]


def test_what_each_writer_should_publish_is_in_the_record(
    record: tuple[Path, list[Call]],
) -> None:
    root, calls = record
    published = [call.target for call in _renames(calls)]
    assert len(published) == len(set(published)), "nothing is ever published over"
    files = {p for p in root.rglob("*") if p.is_file() and p != root / "omnigen-pipe.toml"}
    assert files == set(published)
    kinds = [target.relative_to(root).parts[:2] for target in published if target is not None]
    for kind, least in (
        (("manifests", "files"), 3),
        (("manifests", "images.parquet"), 1),
        (("manifests", "samples.parquet"), 1),
        (("manifests", "latents"), 2),
        (("latents", "64x64"), 1),
        (("manifests", "prompts"), 2),
    ):
        assert kinds.count(kind) >= least, (kind, kinds)


def test_a_file_is_flushed_after_its_last_write_and_before_its_rename(
    record: tuple[Path, list[Call]],
) -> None:
    _, calls = record
    for rename in _renames(calls):
        writes = [c for c in calls if c.name in _WRITES.split(",") and c.path == rename.path]
        assert writes, rename
        flushes = [
            flush
            for flush in _flushes(calls, rename.path)
            if all(write.returned < flush.began for write in writes)
            and flush.returned < rename.began
        ]
        assert flushes, rename
        assert not [c for c in calls if c.path == rename.target and c.name in _WRITES.split(",")]


def test_a_folder_is_flushed_after_each_rename_and_before_the_next(
    record: tuple[Path, list[Call]],
) -> None:
    """So a tar's folder is flushed before its fragment appears."""
    _, calls = record
    renames = _renames(calls)
    for rename, following in zip(renames, [*renames[1:], None], strict=True):
        assert rename.target is not None
        flushes = [
            flush
            for flush in _flushes(calls, rename.target.parent)
            if rename.returned < flush.began
            and (following is None or flush.returned < following.began)
        ]
        assert flushes, rename


def test_a_new_folder_is_flushed_into_its_parent_before_anything_is_published_in_it(
    record: tuple[Path, list[Call]],
) -> None:
    root, calls = record
    made = [call for call in calls if call.name.startswith("mkdir")]
    assert {call.path for call in made} == {p for p in root.rglob("*") if p.is_dir()}
    for folder in made:
        inside = [r.began for r in _renames(calls) if r.target and folder.path in r.target.parents]
        flushes = [
            flush
            for flush in _flushes(calls, folder.path.parent)
            if folder.returned < flush.began and all(flush.returned < began for began in inside)
        ]
        assert flushes, folder


def test_a_tar_appears_before_its_fragment(record: tuple[Path, list[Call]]) -> None:
    root, calls = record
    order = [call.target for call in _renames(calls)]
    tars = [path for path in order if path is not None and path.suffix == ".tar"]
    assert tars
    for tar in tars:
        fragment = root / "manifests" / "latents" / f"{tar.stem}.parquet"
        assert order.index(tar) < order.index(fragment)


def test_files_are_written_in_staging_only_and_none_is_removed(
    record: tuple[Path, list[Call]],
) -> None:
    root, calls = record
    written = {call.path.parent for call in calls if call.writes}
    assert written == {root / "staging"}
    assert not [call for call in calls if call.name.startswith("unlink")]
