"""Snapshots: replaced whole, and only when what they hold differs."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manifests import schema
from manifests.errors import ManifestError
from manifests.snapshot import Snapshot


def snapshot(root: Path) -> Snapshot:
    return Snapshot(schema.IMAGES, root / "manifests" / "images.parquet", root / "staging")


def images(*paths: str) -> pa.Table:
    rows = [
        {"dataset": "d", "path": path, "width": 10, "captions": ["a", None, "é"], "status": "ok"}
        for path in paths
    ]
    return pa.Table.from_pylist(rows, schema=schema.IMAGES.schema)


def test_before_the_first_publication_there_is_nothing(tmp_path: Path) -> None:
    some = snapshot(tmp_path)
    assert not some.exists()
    assert some.metadata() == {}
    assert some.read().equals(schema.IMAGES.empty())


def test_what_was_written_is_read(tmp_path: Path) -> None:
    some = snapshot(tmp_path)
    assert some.replace(images("a.jpg", "b.jpg"), fingerprint="f", settings="s")
    assert some.read().equals(images("a.jpg", "b.jpg"))
    assert some.metadata()["fingerprint"] == "f"
    assert some.metadata()["settings"] == "s"
    assert some.metadata()["stage"] == "discover"


def test_not_rewritten_when_equal(tmp_path: Path) -> None:
    some = snapshot(tmp_path)
    some.replace(images("a.jpg"), fingerprint="f")
    before = some.path.stat()
    chunked = pa.concat_tables([images("a.jpg"), images()])
    assert not some.replace(chunked, fingerprint="f")
    assert some.path.stat().st_ino == before.st_ino
    assert some.path.stat().st_mtime_ns == before.st_mtime_ns


@given(
    st.lists(st.integers(0, 5), max_size=12),
    st.lists(st.integers(0, 5), max_size=12),
    st.lists(st.integers(0, 12), max_size=4),
    st.lists(st.integers(0, 12), max_size=4),
)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_rows_in_parts_are_compared_as_if_they_came_in_one(
    tmp_path: Path, before: list[int], after: list[int], cuts: list[int], recuts: list[int]
) -> None:
    some = snapshot(Path(tempfile.mkdtemp(dir=tmp_path)))
    for rows, places in ((before, cuts), (after, recuts)):
        known = some.exists() and some.read().equals(images(*map(str, rows)))
        bounds = sorted({0, len(rows), *(place for place in places if place < len(rows))})
        parts = (images(*map(str, rows[a:b])) for a, b in itertools.pairwise(bounds))
        assert some.replace(parts, fingerprint="f") == (not known)
        assert some.read().equals(images(*map(str, rows)))
        assert not list(some.staging.iterdir())


def test_parts_that_cannot_be_made_change_nothing(tmp_path: Path) -> None:
    some = snapshot(tmp_path)
    some.replace(images("a.jpg"))

    def parts() -> Iterator[pa.Table]:
        yield images("b.jpg")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        some.replace(parts())
    assert some.read().equals(images("a.jpg"))
    assert not list(some.staging.iterdir())


def test_rewritten_when_rows_order_or_metadata_differ(tmp_path: Path) -> None:
    some = snapshot(tmp_path)
    some.replace(images("a.jpg", "b.jpg"), fingerprint="f")
    assert some.replace(images("b.jpg", "a.jpg"), fingerprint="f")
    assert some.replace(images("b.jpg", "a.jpg"), fingerprint="g")
    assert some.replace(images("b.jpg"), fingerprint="g")
    assert not some.replace(images("b.jpg"), fingerprint="g")
    assert some.replace(images(), fingerprint="g")
    assert not some.replace(images(), fingerprint="g")


def test_a_torn_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    some = snapshot(tmp_path)
    some.replace(images("a.jpg"))
    some.path.write_bytes(some.path.read_bytes()[:100])
    for attempt in (some.metadata, some.read, lambda: some.replace(images())):
        with pytest.raises(ManifestError, match="omnigen-pipe discover"):
            attempt()


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    some = snapshot(tmp_path)
    some.path.parent.mkdir(parents=True)
    newer = {"omnigen_pipe.schema_version": str(schema.SCHEMA_VERSION + 1)}
    pq.write_table(images("a.jpg").replace_schema_metadata(newer), some.path)
    with pytest.raises(ManifestError, match="schema version"):
        some.read()


def test_columns_added_later_are_null_in_an_earlier_snapshot(tmp_path: Path) -> None:
    some = snapshot(tmp_path)
    some.replace(images("a.jpg"))
    old = pq.read_table(some.path).drop_columns(["frames"])
    pq.write_table(old, some.path)
    assert some.read()["frames"].to_pylist() == [None]
    assert some.read().schema.equals(schema.IMAGES.schema)
