"""Logs: a view depends on the set of fragments alone, and foreign files do no harm."""

from __future__ import annotations

import itertools
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manifests import parquet, schema
from manifests.errors import ManifestError
from manifests.log import Log
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
    assert list(some.staging.iterdir()) == []


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
    assert list(some.staging.iterdir()) == []


def test_a_failed_write_leaves_no_fragment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = log(tmp_path)
    some.append(prompts("a"))

    def full(writer: pq.ParquetWriter, table: pa.Table) -> None:
        raise OSError(28, "No space left on device")
