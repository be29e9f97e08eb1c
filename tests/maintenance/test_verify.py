"""verify: all damage is found, named and, when asked, marked once; what is intact is left alone."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manifests import parquet
from manifests.errors import ManifestError
from manifests.publish import new_id
from manifests.query import Source, query
from manifests.schema import IMAGES, LATENTS, PROMPTS
from manifests.views import current_latents
from omnigen_pipe.config import parse
from omnigen_pipe.latents import checking
from omnigen_pipe.latents.shards import ShardWriter
from omnigen_pipe.maintenance import verify
from omnigen_pipe.progress import Progress
from omnigen_pipe.summary import Summary
from omnigen_pipe.workspace import Workspace

QUIET = Progress(quiet=True)
REPAIR = "omnigen-pipe verify --repair"


def key(number: int) -> str:
    return f"{number:032x}"


def write(place: Workspace, numbers: range, vae_key: str = "v" * 32) -> Path:
    """A shard of small latents; returns its file."""
    with ShardWriter(place, vae_key, {}) as writer:
        for number in numbers:
            moments = np.random.default_rng(number).normal(size=(8, 2, 3)).astype("float16")
            writer.add(key(number), "48x32", moments, {"pixels_key": key(number)})
    return max((place.root / "latents" / "48x32").iterdir())


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    """Three shards of two latents each, and a manifest of another kind."""
    place = Workspace(tmp_path / "w", parse({}, "test"))
    for start in (0, 2, 4):
        write(place, range(start, start + 2))
    place.images.replace(pa.Table.from_pylist([{"path": "a.png"}], schema=IMAGES.schema))
    return place


def run(place: Workspace, **options: bool) -> Summary:
    return verify.run(place, QUIET, **options)


def rows(place: Workspace, *statuses: str) -> list[dict[str, Any]]:
    found = place.latents.read().sort_by([("shard", "ascending"), ("offset", "ascending")])
    return [row for row in found.to_pylist() if row["status"] in statuses]


def flip(path: Path, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 0x10
    path.write_bytes(data)


def places(faults: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(fault["shard"], fault["offset"]) for fault in faults]


def counting(place: Workspace) -> set[str]:
    """The keys of the latents that count."""
    return set(current_latents(place.latents.source(), place.root)["pixels_key"].to_pylist())


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("repair", [False, True])
def test_what_is_intact_is_left_as_it_is(place: Workspace, quick: bool, repair: bool) -> None:
    before = {path: path.stat() for path in place.root.rglob("*")}
    summary = run(place, quick=quick, repair=repair)
    size = sum(path.stat().st_size for path in place.latents_folder.glob("*/*.tar"))
    assert summary.counts == {
        "manifests": 0 if quick else 4,
        "shards": 3,
        "latents": 6,
        "bytes checked": 0 if quick else size,
        "damaged manifests": 0,
        "damaged shards": 0,
        "damaged latents": 0,
        "marked": 0,
    }
    assert not summary.failed
    assert not summary.changed
    assert summary.notes == []
    after = {path: path.stat() for path in place.root.rglob("*")}
    assert {p: (s.st_size, s.st_mtime_ns) for p, s in after.items()} == {
        p: (s.st_size, s.st_mtime_ns) for p, s in before.items()
    }


def test_an_empty_workspace_is_intact(tmp_path: Path) -> None:
    summary = run(Workspace(tmp_path, parse({}, "test")), repair=True)
    assert not summary.failed
    assert set(summary.counts.values()) == {0}


def _damage(place: Workspace) -> tuple[set[str], list[dict[str, Any]]]:
    """One array of the first shard, a header of the second, the third gone; what must be found."""
    ok = rows(place, "ok")
    flip(place.root / ok[0]["shard"], ok[0]["offset"])
    flip(place.root / ok[2]["shard"], 3)
    (place.root / ok[4]["shard"]).unlink()
    return {ok[1]["pixels_key"]}, [ok[0], *ok[2:]]


def test_all_damage_is_named_with_what_to_do(place: Workspace) -> None:
    _, bad = _damage(place)
    summary = run(place)
    assert summary.failed
    problems = [checking.CHANGED, *[checking.AROUND] * 2, *[checking.MISSING] * 2]
    assert summary.details["faults"] == [
        {
            "shard": row["shard"],
            "offset": row["offset"],
            "pixels_key": row["pixels_key"],
            "problem": problem,
        }
        for row, problem in zip(bad, problems, strict=True)
    ]
    assert summary.counts["damaged shards"] == 3
    assert summary.counts["damaged latents"] == 5
    assert summary.notes[0] == f"{bad[0]['shard']}: 1 latent: {checking.CHANGED}"
    assert REPAIR in summary.notes[-1]
    assert "omnigen-pipe encode-vae" in summary.notes[-1]
    assert rows(place, "damaged") == [], "nothing is marked unless asked"


def test_repair_marks_each_once_and_the_rest_counts(place: Workspace) -> None:
    good, bad = _damage(place)
    summary = run(place, repair=True)
    assert not summary.failed
    assert summary.changed
    assert summary.counts["marked"] == 5
    marks = rows(place, "damaged")
    names = ("pixels_key", "vae_key", "bucket", "shard", "offset")
    assert [[row[n] for n in names] for row in marks] == [[row[n] for n in names] for row in bad]
    ok = {row["pixels_key"]: row["written_at_ns"] for row in bad}
    for mark in marks:
        assert mark["reason"]
        assert mark["written_at_ns"] > ok[mark["pixels_key"]]
    assert counting(place) == good

    again = run(place, repair=True)
    assert not again.failed
    assert not again.changed
    assert again.counts["latents"] == 1
    assert rows(place, "damaged") == marks
    assert not run(place).failed


def test_a_latent_marked_in_a_shard_leaves_the_others_checked(place: Workspace) -> None:
    first, second = rows(place, "ok")[:2]
    flip(place.root / first["shard"], first["offset"])
    run(place, repair=True)
    assert not run(place).failed
    flip(place.root / second["shard"], second["offset"])
    summary = run(place)
    assert places(summary.details["faults"]) == places([second])


@pytest.mark.parametrize("repair", [False, True])
def test_quick_finds_sizes_and_reads_nothing(place: Workspace, repair: bool) -> None:
    ok = rows(place, "ok")
    flip(place.root / ok[0]["shard"], ok[0]["offset"])
    os.truncate(place.root / ok[2]["shard"], 5000)
    (place.root / ok[4]["shard"]).unlink()
    summary = run(place, quick=True, repair=repair)
    assert places(summary.details["faults"]) == places(ok[2:])
    assert summary.counts["bytes checked"] == 0
    assert summary.failed is not repair
    assert len(rows(place, "damaged")) == (4 if repair else 0)


def test_rows_that_do_not_count_now_are_checked_too(place: Workspace) -> None:
    """A duplicate that loses, and a latent of another VAE."""
    duplicate, other = write(place, range(2)), write(place, range(2), vae_key="o" * 32)
    for path in (duplicate, other):
        path.unlink()
    faults = run(place).details["faults"]
    assert {fault["shard"] for fault in faults} == {
        path.relative_to(place.root).as_posix() for path in (duplicate, other)
    }


def test_a_row_in_two_fragments_is_marked_once(place: Workspace) -> None:
    ok = rows(place, "ok")
    table = place.latents.read()
    place.latents.append(table)
    flip(place.root / ok[0]["shard"], ok[0]["offset"])
    assert run(place, repair=True).counts["marked"] == 1
    assert len(rows(place, "damaged")) == 1
    assert not run(place).failed


def test_marks_that_came_meanwhile_are_not_repeated(
    place: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    _damage(place)
    check = verify.check_shard

    def check_while_another_repairs(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(verify, "check_shard", check)
        monkeypatch.setattr(verify, "_READERS", 1)
        assert run(place, repair=True).counts["marked"] == 5
        return check(*arguments, **options)

    monkeypatch.setattr(verify, "_READERS", 1)
    monkeypatch.setattr(verify, "check_shard", check_while_another_repairs)
    summary = run(place, repair=True)
    assert summary.counts["marked"] == 0
    assert not summary.failed
    assert len(rows(place, "damaged")) == 5


def test_rows_that_disagree_are_named(place: Workspace) -> None:
    first = rows(place, "ok")[0]
    wrong = {**first, "offset": first["offset"] + 512, "shard_checksum": 1}
    place.latents.append(pa.Table.from_pylist([wrong], schema=LATENTS.schema))
    faults = run(place).details["faults"]
    assert {fault["problem"] for fault in faults} == {checking.DISAGREEING}
    assert len(faults) == 3
    assert not run(place, repair=True).failed


@pytest.mark.parametrize(
    "wrong", [{"shard": "../outside.tar"}, {"shard": "/etc/passwd"}, {"shard": None}]
)
def test_shards_elsewhere_are_not_opened_and_cannot_be_repaired(
    place: Workspace, wrong: dict[str, Any]
) -> None:
    row = {**rows(place, "ok")[0], **wrong}
    place.latents.append(pa.Table.from_pylist([row], schema=LATENTS.schema))
    for repair in (False, True):
        summary = run(place, repair=repair)
        assert summary.failed
        (fault,) = summary.details["faults"]
        assert (fault["shard"], fault["problem"]) == (wrong["shard"], verify.ELSEWHERE)
        assert "remove their fragments" in summary.notes[-1]
    assert rows(place, "damaged") == []


def test_a_row_without_a_place_is_no_repair(place: Workspace) -> None:
    row = {**rows(place, "ok")[0], "offset": None}
    place.latents.append(pa.Table.from_pylist([row], schema=LATENTS.schema))
    summary = run(place, repair=True)
    assert summary.failed
    assert [fault["offset"] for fault in summary.details["faults"]] == [None]


def test_notes_name_a_few_and_the_details_all(place: Workspace) -> None:
    for start in range(10, 20):
        write(place, range(start, start + 1)).unlink()
    summary = run(place)
    assert len(summary.details["faults"]) == 10
    assert len(summary.notes) == 7
    assert "and 5 more" in summary.notes[5]


def test_a_signal_ends_it_and_what_was_found_is_marked(
    place: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    _damage(place)
    check = verify.check_shard

    def check_and_stop(*arguments: Any, **options: Any) -> Any:
        noting = signal.getsignal(signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        # The main thread notes it, and puts the handler before back: then it is noted.
        deadline = time.monotonic() + 60
        while signal.getsignal(signal.SIGTERM) is noting:
            assert time.monotonic() < deadline
        monkeypatch.setattr(verify, "check_shard", check)
        return check(*arguments, **options)

    monkeypatch.setattr(verify, "_READERS", 1)
    monkeypatch.setattr(verify, "check_shard", check_and_stop)
    summary = run(place, repair=True)
    assert summary.signal == signal.SIGTERM
    assert 1 <= summary.counts["shards"] < 3
    assert summary.counts["marked"] == len(rows(place, "damaged")) >= 1
    assert "not everything was checked" in summary.notes[0]


def _fragment(place: Workspace) -> Path:
    return place.latents.fragments()[0]


@pytest.mark.parametrize("cut", [0, 3, 100, -1])
def test_a_torn_fragment_is_named_and_the_others_are_checked(place: Workspace, cut: int) -> None:
    path = _fragment(place)
    path.write_bytes(path.read_bytes()[:cut])
    row = rows(place, "ok")[-1]
    flip(place.root / row["shard"], row["offset"])
    summary = run(place, repair=True)
    assert summary.failed, "no mark mends a manifest"
    (fault,) = summary.details["damaged_manifests"]
    assert fault["manifest"] == f"manifests/latents/{path.name}"
    assert f"{path.name} is damaged" in summary.notes[0]
    assert "Move it away and run `omnigen-pipe encode-vae`" in summary.notes[0]
    assert summary.counts["latents"] == 4
    assert summary.counts["marked"] == 1
    path.unlink()
    assert not run(place).failed


def _flip_a_fragment(place: Workspace, times: int) -> None:
    """Whatever bit is flipped: it is named, or the fragment's rows are still the same."""
    path = _fragment(place)
    good = path.read_bytes()
    whole = parquet.read(path, LATENTS)
    draws = random.Random(3)
    for _ in range(times):
        byte = draws.randrange(len(good))
        flipped = bytearray(good)
        flipped[byte] ^= 1 << draws.randrange(8)
        path.write_bytes(flipped)
        try:
            found = run(place)
        except ManifestError:
            continue  # it now says that it is another manifest, or of a newer version
        if not found.failed:
            assert parquet.read(path, LATENTS).equals(whole), byte
            asked = query("SELECT * FROM rows", rows=Source(LATENTS, lambda: [path]))
            assert asked.to_pylist() == whole.to_pylist(), byte
    path.write_bytes(good)
    assert not run(place).failed


def test_a_flipped_bit_of_a_fragment_is_named_or_harmless(place: Workspace) -> None:
    _flip_a_fragment(place, 8)


@pytest.mark.slow
def test_many_flipped_bits_of_a_fragment_are_named_or_harmless(place: Workspace) -> None:
    _flip_a_fragment(place, 100)


def test_a_damaged_snapshot_is_named_with_its_stage(place: Workspace) -> None:
    os.truncate(place.images.path, 200)
    summary = run(place)
    assert summary.failed
    assert "manifests/images.parquet is damaged" in summary.notes[0]
    assert "omnigen-pipe discover" in summary.notes[0]
    pq.write_table(pa.table({"a": [1]}), place.images.path)
    assert run(place).failed, "a foreign file where a manifest is expected"
    assert not run(place, quick=True).failed


def test_foreign_files_are_named_and_do_no_harm(place: Workspace) -> None:
    folder = place.root / "manifests"
    pq.write_table(pa.table({"a": [1]}), folder / "latents" / "theirs.parquet")
    (folder / "latents" / "notes.parquet").write_text("these are notes")
    pq.write_table(pa.table({"a": [1]}), folder / "mine.parquet")
    summary = run(place)
    assert not summary.failed
    assert summary.details["foreign_files"] == [
        "manifests/mine.parquet",
        "manifests/latents/notes.parquet",
        "manifests/latents/theirs.parquet",
    ]
    assert "mine.parquet is not a manifest of omnigen-pipe and is ignored" in summary.notes[0]
    assert summary.counts["damaged manifests"] == 0


def test_a_fragments_name_is_no_foreign_files(place: Workspace) -> None:
    """Where a fragment lost its metadata, its rows would silently be gone."""
    pq.write_table(
        pa.table({"a": [1]}), place.root / "manifests" / "latents" / f"{new_id()}.parquet"
    )
    summary = run(place)
    assert summary.failed
    assert "does not say that omnigen-pipe wrote it" in summary.notes[0]


def test_a_column_with_another_name_is_damage_and_a_further_one_is_not(place: Workspace) -> None:
    table = place.latents.read()
    metadata = {
        "omnigen_pipe.schema_version": "1",
        "omnigen_pipe.manifest": "latents",
    }
    folder = place.root / "manifests" / "latents"
    for path in place.latents.fragments():
        path.unlink()
    later = table.append_column("later", pa.nulls(table.num_rows, pa.string()))
    pq.write_table(later.replace_schema_metadata(metadata), folder / "later.parquet")
    earlier = table.drop_columns("written_at_ns")
    pq.write_table(earlier.replace_schema_metadata(metadata), folder / "earlier.parquet")
    assert not run(place).failed
    renamed = table.rename_columns(["qixels_key", *table.column_names[1:]])
    pq.write_table(renamed.replace_schema_metadata(metadata), folder / "later.parquet")
    summary = run(place)
    assert "its column pixels_key is called qixels_key" in summary.notes[0]


def test_a_newer_or_misplaced_manifest_is_refused(place: Workspace) -> None:
    path = _fragment(place)
    table = place.latents.read().replace_schema_metadata(
        {"omnigen_pipe.schema_version": "99", "omnigen_pipe.manifest": "latents"}
    )
    moved = place.root / "manifests" / "prompts" / path.name
    moved.parent.mkdir()
    shutil.copy(path, moved)
    with pytest.raises(ManifestError, match=f"lies where `{PROMPTS.name}` is expected"):
        run(place)
    moved.unlink()
    pq.write_table(table, path)
    for quick in (False, True):
        with pytest.raises(ManifestError, match="schema version 99"):
            run(place, quick=quick)
