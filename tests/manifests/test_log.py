"""Logs: a view depends on the set of fragments alone, and foreign files do no harm."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import manifests.log
from manifests import parquet, schema
from manifests.errors import ManifestError, WriteError
from manifests.lock import maintenance_lock
from manifests.log import Log, merge_if_crowded
from manifests.query import query


def prompts(*keys: str) -> pa.Table:
    rows = [
        {
            "prompt_key": key,
            "tokenizer_key": "t",
            "text": f"text of {key}",
            "input_ids": [1, 2],
            "length": 2,
            "written_at_ns": 1,
            "status": "ok",
            "reason": None,
        }
        for key in keys
    ]
    return pa.Table.from_pylist(rows, schema=schema.PROMPTS.schema)


def log(root: Path) -> Log:
    return Log(schema.PROMPTS, root / "manifests" / "prompts", root / "staging")


def keys_in(some: Log) -> list[str]:
    return sorted(some.read()["prompt_key"].to_pylist())


def test_a_log_without_fragments_has_the_schema_and_no_row(tmp_path: Path) -> None:
    table = log(tmp_path).read()
    assert table.num_rows == 0
    assert table.schema.equals(schema.PROMPTS.schema)


def test_appended_rows_come_back(tmp_path: Path) -> None:
    some = log(tmp_path)
    path = some.append(prompts("a", "b"), fragment_id="f1", fingerprint="of this")
    some.append(prompts("c"))
    assert path == some.folder / "f1.parquet"
    assert keys_in(some) == ["a", "b", "c"]
    assert some.read().schema.equals(schema.PROMPTS.schema)
    assert list(some.staging.iterdir()) == []
    metadata = parquet.read_metadata(path, schema.PROMPTS)
    assert metadata is not None
    assert metadata["stage"] == "tokenize"
    assert metadata["manifest"] == "prompts"
    assert metadata["fingerprint"] == "of this"
    assert metadata["schema_version"] == str(schema.SCHEMA_VERSION)
    assert {"tool_version", "created_at"} <= set(metadata)


def test_fragments_in_any_order_give_the_same_view(tmp_path: Path) -> None:
    tables = [prompts("a", "b"), prompts("c"), prompts("d", "e")]
    views = []
    for number, order in enumerate(itertools.permutations(range(3))):
        some = log(tmp_path / str(number))
        for name, which in enumerate(order):
            some.append(tables[which], fragment_id=f"f{name}")
        views.append(query("SELECT * FROM t ORDER BY prompt_key", t=some.read()))
    assert len(views) == 6
    assert all(view.equals(views[0]) for view in views)


@pytest.mark.parametrize("merged", ["0-before", "z-after"])
def test_replaced_fragments_are_left_out_even_when_both_are_listed(
    tmp_path: Path, merged: str
) -> None:
    some = log(tmp_path)
    some.append(prompts("a"), fragment_id="f1")
    some.append(prompts("b"), fragment_id="f2")
    some.append(prompts("c"), fragment_id="f3")
    some.append(prompts("a", "b"), fragment_id=merged, replaces="f1 f2")
    assert keys_in(some) == ["a", "b", "c"]
    assert sorted(p.stem for p in some.fragments()) == sorted([merged, "f3"])
    (some.folder / "f1.parquet").unlink()  # as when the deletion is half way through
    assert keys_in(some) == ["a", "b", "c"]


def test_foreign_and_torn_files_are_ignored(tmp_path: Path) -> None:
    some = log(tmp_path)
    good = some.append(prompts("a"))
    whole = good.read_bytes()
    (some.folder / "torn.parquet").write_bytes(whole[: len(whole) // 2])
    (some.folder / "empty.parquet").write_bytes(b"")
    footer = bytearray(whole)
    footer[-200:-100] = bytes(100)
    (some.folder / "footer.parquet").write_bytes(footer)
    (some.folder / "text.parquet").write_text("not a table")
    pq.write_table(pa.table({"x": [1]}), some.folder / "foreign.parquet")
    (some.folder / "notes.txt").write_text("hello")
    assert some.fragments() == [good]
    assert keys_in(some) == ["a"]


def written_by(path: Path, version: str, table: pa.Table, manifest: str = "prompts") -> None:
    entries = {"schema_version": version, "manifest": manifest, "tool_version": "9.9.9"}
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {f"omnigen_pipe.{name}": value for name, value in entries.items()}
    pq.write_table(table.replace_schema_metadata(metadata), path)


def test_a_newer_schema_is_refused_and_says_what_to_do(tmp_path: Path) -> None:
    some = log(tmp_path)
    newer = str(schema.SCHEMA_VERSION + 1)
    written_by(some.folder / "f.parquet", newer, prompts("a"))
    with pytest.raises(ManifestError, match=r"Upgrade omnigen-pipe to at least 9\.9\.9"):
        some.read()


def test_another_manifest_in_its_place_is_refused(tmp_path: Path) -> None:
    some = log(tmp_path)
    written_by(some.folder / "f.parquet", "1", prompts("a"), manifest="latents")
    with pytest.raises(ManifestError, match="holds the manifest `latents`"):
        some.read()


def test_columns_added_later_are_null_in_earlier_fragments(tmp_path: Path) -> None:
    some = log(tmp_path)
    written_by(some.folder / "old.parquet", "1", prompts("a").drop_columns(["reason", "length"]))
    some.append(prompts("b"))
    found = query("SELECT * FROM t ORDER BY prompt_key", t=some.read()).to_pylist()
    assert [(row["prompt_key"], row["length"]) for row in found] == [("a", None), ("b", 2)]


def test_extra_columns_are_not_written_and_missing_ones_refused(tmp_path: Path) -> None:
    some = log(tmp_path)
    extra = prompts("a").append_column("scratch", pa.array([1]))
    path = some.append(extra)
    assert "scratch" not in pq.read_schema(path).names
    with pytest.raises(KeyError):
        some.append(prompts("b").drop_columns(["text"]))
    assert keys_in(some) == ["a"]


def test_a_failed_write_leaves_no_fragment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = log(tmp_path)
    some.append(prompts("a"))

    def full(writer: pq.ParquetWriter, table: pa.Table, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(WriteError, match="No space"):
        some.append(prompts("b"))
    assert keys_in(some) == ["a"]
    assert list(some.staging.iterdir()) == []


def test_merging_changes_no_view_and_old_fragments_go_after_the_grace(tmp_path: Path) -> None:
    some = log(tmp_path)
    for number in range(7):
        some.append(prompts(f"k{number}", "twice"), inputs=json.dumps({f"t{number}": {"n": "1"}}))
    rows, inputs = sorted(some.read()["prompt_key"].to_pylist()), some.inputs()
    old = some.fragments()
    merged = some.merge_small()
    assert some.fragments() == [merged]
    assert sorted(some.read()["prompt_key"].to_pylist()) == rows
    assert some.inputs() == inputs
    assert all(path.exists() for path in old), "a listing under way may still name them"
    assert some.merge_small() is None, "one fragment is not merged with itself"
    assert some.sweep() == []
    assert sorted(some.sweep(grace_seconds=0)) == sorted(old)
    assert some.fragments() == [merged]
    assert sorted(some.read()["prompt_key"].to_pylist()) == rows


@given(st.lists(st.sampled_from(["append", "merge", "sweep", "sweep half"]), max_size=14))
@settings(max_examples=60, deadline=None)
def test_no_row_is_lost_doubled_or_raised_from_the_dead(
    tmp_path_factory: pytest.TempPathFactory, steps: list[str]
) -> None:
    """Whatever the order of appends, merges and sweeps, and where a sweep was killed."""
    some = log(tmp_path_factory.mktemp("w"))
    random = Random(len(steps))
    expected: list[str] = []
    for number, step in enumerate(steps):
        if step == "append":
            expected.append(f"k{number:02d}")
            some.append(prompts(expected[-1]))
        elif step == "merge":
            some.merge_small()
        elif step == "sweep":
            some.sweep(grace_seconds=0)
        elif replaced := some.listing().replaced:
            random.choice(replaced).path.unlink()
        assert keys_in(some) == expected


def test_a_merge_may_drop_rows(tmp_path: Path) -> None:
    some = log(tmp_path)
    for key in "abc":
        some.append(prompts(key))
    some.merge(some.listing().current, keep=lambda t: t.filter(pc.not_equal(t["prompt_key"], "b")))
    assert keys_in(some) == ["a", "c"]


def test_large_fragments_are_left_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = log(tmp_path)
    large = some.append(prompts("a", "b", "c"))
    some.append(prompts("d"))
    some.append(prompts("e"))
    monkeypatch.setattr(manifests.log, "LARGE_ROWS", 3)
    merged = some.merge_small()
    assert some.fragments() == [large, merged]
    assert keys_in(some) == list("abcde")


def test_a_crowded_log_is_merged_and_another_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifests.log, "MERGE_AT", 3)
    some, lock = log(tmp_path), tmp_path / "manifests" / "maintenance.lock"
    for key in "abc":
        some.append(prompts(key))
    assert merge_if_crowded(some, lock) is None
    some.append(prompts("d"))
    with maintenance_lock(lock) as held:
        assert held
        assert merge_if_crowded(some, lock) is None, "somebody else is at it"
    assert len(some.fragments()) == 4
    assert merge_if_crowded(some, lock) is not None
    assert len(some.fragments()) == 1
    assert merge_if_crowded(some, lock) is None, "what waits for the sweep does not count"
    assert keys_in(some) == list("abcd")


_APPENDER = """
import sys
from pathlib import Path
import manifests.log
from test_log import log, prompts
some = log(Path(sys.argv[1]))
for number in range(int(sys.argv[2])):
    some.append(prompts(f"{sys.argv[3]}-{number:04d}"))
    print(number, flush=True)
"""

_MERGER = """
import sys
from pathlib import Path
import manifests.log
from manifests.lock import maintenance_lock
from test_log import log
some = log(Path(sys.argv[1]))
while True:
    with maintenance_lock(Path(sys.argv[1]) / "lock") as held:
        if held:
            some.merge_small()
            # A day, as it were: this is how old a listing can be at the most.
            some.sweep(grace_seconds=2.0)
"""


def _python(source: str, *arguments: str) -> subprocess.Popen[str]:
    here = Path(__file__).resolve().parent
    search = os.pathsep.join([str(here), *sys.path])
    return subprocess.Popen(
        [sys.executable, "-c", source, *arguments],
        env=os.environ | {"PYTHONPATH": search},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_every_listing_is_complete_while_others_append_and_merge(tmp_path: Path) -> None:
    """Thousands of listings beside two writers and two merging processes, all real."""
    some = log(tmp_path)
    number = 120
    mergers = [_python(_MERGER, str(tmp_path)) for _ in range(2)]
    writers = [_python(_APPENDER, str(tmp_path), str(number), name) for name in "xy"]
    published: dict[str, int] = {}

    def follow(name: str, writer: subprocess.Popen[str]) -> None:
        assert writer.stdout is not None
        for line in writer.stdout:
            published[name] = int(line)

    followers = [
        threading.Thread(target=follow, args=(name, writer))
        for name, writer in zip("xy", writers, strict=True)
    ]
    for follower in followers:
        follower.start()
    listings, most = 0, 0
    try:
        while any(follower.is_alive() for follower in followers) or listings < 2000:
            sure = {f"{name}-{n:04d}" for name, last in published.items() for n in range(last + 1)}
            began = time.monotonic()
            found = some.listing()
            listings += 1
            most = max(most, len(found.replaced))
            if listings % 20 == 0:
                keys = query("SELECT prompt_key FROM t", t=some.source())["prompt_key"].to_pylist()
                assert len(keys) == len(set(keys)), "a row counted twice"
                assert sure <= set(keys)
            else:
                try:
                    rows = sum(parquet.row_count(f.path) for f in found.current)
                except FileNotFoundError:
                    assert time.monotonic() - began > 1, "swept before the grace was over"
                    continue
                assert rows >= len(sure)
                assert rows <= 2 * number
    finally:
        for process in [*mergers, *writers]:
            process.kill()
            process.wait()
        for follower in followers:
            follower.join()
    assert published == {"x": number - 1, "y": number - 1}
    assert len(keys_in(some)) == len(set(keys_in(some))) == 2 * number
    assert most > 0, "nothing was merged while the listings ran"
