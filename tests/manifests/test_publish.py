"""Publishing: whole or not at all, under names that sort by age."""

from __future__ import annotations

import os
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from manifests import publish as publishing
from manifests.errors import UsageError
from manifests.publish import make_folder, new_id, publish, staged


def test_ids_sort_by_creation_and_are_uuids_of_version_7() -> None:
    ids = [new_id() for _ in range(10_000)]
    assert ids == sorted(ids)
    assert len(set(ids)) == len(ids)
    parsed = [uuid.UUID(i) for i in ids]
    assert {(u.version, u.variant) for u in parsed} == {(7, uuid.RFC_4122)}


def test_ids_never_repeat_across_threads() -> None:
    def some(_: int) -> list[str]:
        return [new_id() for _ in range(2000)]

    with ThreadPoolExecutor(8) as pool:
        per_thread = list(pool.map(some, range(8)))
    every = [i for ids in per_thread for i in ids]
    assert len(set(every)) == len(every) == 16_000
    assert all(ids == sorted(ids) for ids in per_thread)


def test_ids_go_on_rising_when_the_clock_is_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    first = new_id()
    monkeypatch.setattr(publishing.time, "time_ns", lambda: 1_000_000_000)
    ids = [first, *(new_id() for _ in range(100))]
    assert ids == sorted(ids)
    assert len(set(ids)) == 101


def test_ids_stay_valid_when_the_random_part_runs_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing.secrets, "randbits", lambda bits: (1 << bits) - 1)
    monkeypatch.setattr(publishing, "_last_id", (0, 0))
    monkeypatch.setattr(publishing.time, "time_ns", lambda: 1_700_000_000_000_000_000)
    ids = [new_id() for _ in range(10)]
    assert ids == sorted(set(ids))
    assert {(uuid.UUID(i).version, uuid.UUID(i).variant) for i in ids} == {(7, uuid.RFC_4122)}


def test_an_id_tells_when_it_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "_last_id", (0, 0))
    monkeypatch.setattr(publishing.time, "time_ns", lambda: 1_700_000_000_123_456_789)
    assert int(new_id()[:12], 16) == 1_700_000_000_123


def test_a_published_file_is_whole_and_leaves_nothing_behind(tmp_path: Path) -> None:
    staging, final = tmp_path / "staging", tmp_path / "a" / "b" / "file.bin"
    path = staged(staging, final)
    assert path.parent == staging
    assert not final.parent.exists()
    path.write_bytes(b"whole")
    assert not final.exists()
    assert publish(path, final) == final
    assert final.read_bytes() == b"whole"
    assert list(staging.iterdir()) == []


def test_two_writers_of_one_file_do_not_share_a_staged_name(tmp_path: Path) -> None:
    final = tmp_path / "file.bin"
    assert len({staged(tmp_path / "staging", final) for _ in range(50)}) == 50


def test_an_earlier_file_stays_until_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "file.bin"
    final.write_bytes(b"old")

    class Killed(BaseException):
        pass

    def killed(*arguments: object) -> None:
        raise Killed

    for name in ("fsync", "rename"):
        path = staged(tmp_path / "staging", final)
        path.write_bytes(b"new")
        with monkeypatch.context() as patched:
            patched.setattr(publishing.os, name, killed)
            with pytest.raises(Killed):
                publish(path, final)
        assert final.read_bytes() == b"old"
    publish(path, final)
    assert final.read_bytes() == b"new"


def test_the_file_is_flushed_before_and_its_folder_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "final" / "file.bin"
    path = staged(tmp_path / "staging", final)
    path.write_bytes(b"x")
    steps: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(handle: int) -> None:
        steps.append("fsync " + Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        real_fsync(handle)

    def rename(a: Path, b: Path) -> None:
        steps.append("rename")
        real_rename(a, b)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to see which file is flushed")
    monkeypatch.setattr(publishing.os, "fsync", fsync)
    monkeypatch.setattr(publishing.os, "rename", rename)
    publish(path, final)
    assert steps == [f"fsync {path.name}", f"fsync {tmp_path.name}", "rename", "fsync final"]


def test_a_folder_appears_with_all_its_files(tmp_path: Path) -> None:
    final = tmp_path / "checkpoints" / "step-10"
    path = staged(tmp_path / "staging", final)
    (path / "inner").mkdir(parents=True)
    (path / "inner" / "a.bin").write_bytes(b"a")
    (path / "b.bin").write_bytes(b"b")
    publish(path, final)
    assert (final / "inner" / "a.bin").read_bytes() == b"a"
    assert (final / "b.bin").read_bytes() == b"b"
    again = staged(tmp_path / "staging", final)
    again.mkdir()
    with pytest.raises(OSError):
        publish(again, final)
    assert (final / "b.bin").read_bytes() == b"b"


def test_refuses_a_staging_folder_on_another_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = tmp_path / "staging"
    real = os.stat

    def elsewhere(path: Path, **more: Any) -> os.stat_result:
        found = list(real(path, **more))
        if path == staging:
            found[2] += 1  # st_dev
        return os.stat_result(found)

    monkeypatch.setattr(publishing.os, "stat", elsewhere)
    staging.mkdir()
    with pytest.raises(UsageError, match="different file systems") as raised:
        staged(staging, tmp_path / "latents" / "x.tar")
    assert raised.value.exit_status == 2


def test_make_folder_is_content_with_one_that_is_there(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
