"""Views of the logs: which row counts, whatever the order of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manifests import schema
from manifests.errors import ManifestError
from manifests.keys import key as digest
from manifests.log import Log
from manifests.query import Source, fingerprint, query, stream
from manifests.snapshot import Snapshot
from manifests.views import current_files, current_latents, current_prompts


def table(manifest: schema.Manifest, rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=manifest.schema)


def latent(status: str, shard: str | None, offset: int | None, at: int = 0, **more: Any) -> dict:
    row = {
        "pixels_key": "p",
        "vae_key": "v",
        "shard": shard,
        "offset": offset,
        "shard_nbytes": None if shard is None else 3,
        "status": status,
        "written_at_ns": at,
        "reason": None if status == "ok" else f"{status} at {at}",
    }
    return row | more


def shards(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"tar")


def chosen(rows: list[dict], root: Path) -> list[tuple]:
    found = current_latents(table(schema.LATENTS, rows), root)
    assert found.schema.names == schema.LATENTS.schema.names
    return [(r["status"], r["shard"], r["offset"], r["reason"]) for r in found.to_pylist()]


A, B, C = "latents/512x512/a.tar", "latents/512x512/b.tar", "latents/512x512/c.tar"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], []),
        ([latent("ok", A, 512)], [("ok", A, 512, None)]),
        # The smallest (shard, offset) wins, not the newest, and offsets compare as numbers.
        ([latent("ok", B, 0, 9), latent("ok", A, 1024, 1)], [("ok", A, 1024, None)]),
        ([latent("ok", A, 1024), latent("ok", A, 512)], [("ok", A, 512, None)]),
        # A shard that is gone does not count.
        ([latent("ok", C, 0)], []),
        ([latent("ok", C, 0), latent("ok", B, 7)], [("ok", B, 7, None)]),
        # Nor one that was cut short, or is another.
        ([latent("ok", A, 0, shard_nbytes=4)], []),
        ([latent("ok", A, 0, shard_nbytes=2), latent("ok", B, 7)], [("ok", B, 7, None)]),
        # A damaged row takes its place out, wherever it stands, and only that place.
        ([latent("ok", A, 0), latent("damaged", A, 0)], []),
        ([latent("damaged", A, 0, vae_key="w"), latent("ok", A, 0)], []),
        ([latent("ok", A, 512), latent("damaged", A, 0)], [("ok", A, 512, None)]),
        ([latent("ok", A, 0), latent("damaged", A, 0), latent("ok", B, 0)], [("ok", B, 0, None)]),
        # ok before failed, even a newer one; of the failed ones the newest.
        ([latent("failed", None, None, 9), latent("ok", A, 0, 1)], [("ok", A, 0, None)]),
        (
            [latent("failed", None, None, 3), latent("failed", None, None, 5)],
            [("failed", None, None, "failed at 5")],
        ),
        (
            [latent("failed", None, None, 3), latent("ok", C, 0, 5)],
            [("failed", None, None, "failed at 3")],
        ),
    ],
)
def test_which_latent_counts(tmp_path: Path, rows: list[dict], expected: list[tuple]) -> None:
    shards(tmp_path, A, B)
    assert chosen(rows, tmp_path) == expected
    assert chosen(rows[::-1], tmp_path) == expected


def test_fewer_columns_are_of_the_same_rows(tmp_path: Path) -> None:
    shards(tmp_path, A, B)
    rows = [
        latent("ok", B, 0),
        latent("ok", A, 512),
        latent("failed", None, None, pixels_key="q"),
        latent("ok", A, 0, pixels_key="r"),
    ]
    # With a key that two rows have, and without.
    for log in (table(schema.LATENTS, rows), table(schema.LATENTS, rows[1:])):
        every = current_latents(log, tmp_path)
        few = current_latents(log, tmp_path, "v", ["shard", "status"])
        assert few.schema.names == ["shard", "status"]
        assert {tuple(row.values()) for row in few.to_pylist()} == {
            (A, "ok"),
            (None, "failed"),
        }
        assert few.num_rows == every.num_rows == 3


def test_each_key_has_a_row_of_its_own(tmp_path: Path) -> None:
    shards(tmp_path, A)
    rows = [
        latent("ok", A, 0),
        latent("ok", A, 512, pixels_key="q"),
        latent("ok", A, 1024, vae_key="w"),
    ]
    assert len(chosen(rows, tmp_path)) == 3


some_latents = st.lists(
    st.builds(
        latent,
        st.sampled_from(["ok", "failed", "damaged"]),
        st.sampled_from([A, B, C]),
        st.sampled_from([0, 512, 1024]),
        st.integers(0, 3),
        pixels_key=st.sampled_from(["p", "q"]),
    ),
    max_size=12,
)


@given(some_latents, st.randoms(use_true_random=False))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_the_view_of_latents_is_a_function_of_the_set_of_rows(
    tmp_path: Path, rows: list[dict], random: Any
) -> None:
    shards(tmp_path, A, B)
    rows = [
        row | ({"shard": None, "offset": None} if row["status"] == "failed" else {}) for row in rows
    ]
    expected = []
    damaged = {(r["shard"], r["offset"]) for r in rows if r["status"] == "damaged"}
    for key in ("p", "q"):
        own = [r for r in rows if r["pixels_key"] == key]
        good = [
            (r["shard"], r["offset"])
            for r in own
            if r["status"] == "ok" and r["shard"] != C and (r["shard"], r["offset"]) not in damaged
        ]
        failed = [r["written_at_ns"] for r in own if r["status"] == "failed"]
        if good:
            expected.append(("ok", *min(good), None))
        elif failed:
            expected.append(("failed", None, None, f"failed at {max(failed)}"))
    random.shuffle(rows)
    assert sorted(chosen(rows, tmp_path), key=str) == sorted(expected, key=str)


def test_the_newest_reading_of_an_unchanged_file_counts() -> None:
    def read(path: str, size: int, at: int, content: str) -> dict:
        return {
            "dataset": "d",
            "path": path,
            "size": size,
            "mtime_ns": 1,
            "read_at_ns": at,
            "content_hash": content,
        }

    rows = [read("a", 1, 5, "new"), read("a", 1, 4, "old"), read("a", 2, 1, "other")]
    for order in (rows, rows[::-1]):
        found = current_files(table(schema.FILES, order)).to_pylist()
        assert sorted(row["content_hash"] for row in found) == ["new", "other"]


def test_a_tokenised_prompt_counts_before_a_failed_one_and_then_the_newest() -> None:
    def prompt(key: str, status: str, at: int) -> dict:
        return {
            "prompt_key": key,
            "tokenizer_key": "t",
            "status": status,
            "written_at_ns": at,
            "length": at,
        }

    rows = [
        prompt("a", "ok", 1),
        prompt("a", "failed", 2),
        prompt("b", "failed", 1),
        prompt("b", "failed", 3),
        prompt("c", "ok", 1),
        prompt("c", "ok", 2),
    ]
    for order in (rows, rows[::-1]):
        found = current_prompts(table(schema.PROMPTS, order)).to_pylist()
        assert sorted((r["prompt_key"], r["status"], r["length"]) for r in found) == [
            ("a", "ok", 1),
            ("b", "failed", 3),
            ("c", "ok", 2),
        ]


def test_a_fingerprint_knows_rows_and_named_columns_but_no_order() -> None:
    rows = [{"path": "a", "width": 1, "height": 5}, {"path": "b", "width": 2, "height": 5}]

    def of(some: list[dict]) -> str:
        return fingerprint(table(schema.IMAGES, some), ["path", "width", "captions"])

    assert of(rows) == of(rows[::-1])
    assert of(rows) == of([row | {"height": 6} for row in rows])
    assert of(rows) != of(rows[:1])
    assert of(rows) != of([*rows, rows[0]])
    assert of(rows) != of([row | {"width": 3} for row in rows])
    assert of([]) == of([])


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"reason": None}, {"reason": ""}),
        ({"reason": None}, {"reason": "null"}),
        ({"captions": ["a, b"]}, {"captions": ["a", "b"]}),
        ({"captions": []}, {"captions": None}),
        ({"captions": [None]}, {"captions": ["null"]}),
        ({"captions": ['a", "b']}, {"captions": ["a", "b"]}),
    ],
)
def test_fingerprints_of_similar_values_differ(a: dict, b: dict) -> None:
    columns = ["reason", "captions"]
    first, second = (fingerprint(table(schema.IMAGES, [row]), columns) for row in (a, b))
    assert first != second


def test_a_query_takes_parameters_and_several_tables() -> None:
    left = pa.table({"k": [1, 2, 3]})
    right = pa.table({"k": [2, 3, 4]})
    found = query("SELECT l.k FROM l JOIN r USING (k) WHERE l.k > ?", 2, l=left, r=right)
    assert found.to_pydict() == {"k": [3]}


def a_log(root: Path, *names: str) -> Log:
    log = Log(schema.IMAGES, root / "log", root / "staging")
    for name in names:
        log.append(table(schema.IMAGES, [{"path": name, "captions": [name], "width": 1}]), name)
    return log


def test_files_give_what_a_table_in_memory_gives(tmp_path: Path) -> None:
    sql = "SELECT path, captions, size FROM t ORDER BY path"
    for names in ((), ("a",), ("a", "b's", "c")):
        log = a_log(tmp_path / str(len(names)), *names)
        assert query(sql, t=log.source()).equals(query(sql, t=log.read()))


def test_a_column_that_no_file_has_is_null(tmp_path: Path) -> None:
    log = a_log(tmp_path)
    older = table(schema.IMAGES, [{"path": "a"}]).drop_columns(["captions", "size"])
    entries = {"omnigen_pipe.schema_version": "1", "omnigen_pipe.manifest": "images"}
    log.folder.mkdir()
    pq.write_table(older.replace_schema_metadata(entries), log.folder / "older.parquet")
    found = query("SELECT path, captions, size FROM t", t=log.source()).to_pylist()
    assert found == [{"path": "a", "captions": None, "size": None}]


def test_a_damaged_file_is_named_with_the_command_that_makes_it_again(tmp_path: Path) -> None:
    log = a_log(tmp_path, "a")
    numbers = [{"path": digest(number)} for number in range(2000)]
    path = log.append(table(schema.IMAGES, numbers), "b")
    data = bytearray(path.read_bytes())
    data[10_000:20_000] = bytes(10_000)  # pages, not the footer
    path.write_bytes(data)
    with pytest.raises(ManifestError, match=r"b\.parquet is damaged.*omnigen-pipe discover"):
        query("SELECT * FROM t", t=log.source())


def test_a_stream_gives_the_rows_of_a_query_in_its_order() -> None:
    numbers = pa.table({"n": np.random.default_rng(0).permutation(10_000)})
    sql = "SELECT n FROM t WHERE n > ? ORDER BY n"
    parts = list(stream(sql, 5, rows=2048, t=numbers))
    assert len(parts) > 2
    assert pa.concat_tables(parts).equals(query(sql, 5, t=numbers))
    assert list(stream(sql, 10_000, rows=2048, t=numbers)) == []


def test_a_damaged_file_is_named_by_a_stream_too(tmp_path: Path) -> None:
    some = Snapshot(schema.IMAGES, tmp_path / "images.parquet", tmp_path / "staging")
    some.replace(table(schema.IMAGES, [{"path": digest(number)} for number in range(2000)]))
    data = bytearray(some.path.read_bytes())
    data[10_000:20_000] = bytes(10_000)  # pages, not the footer
    some.path.write_bytes(data)
    for order in ("", "ORDER BY path"):
        with pytest.raises(ManifestError, match=r"images\.parquet is damaged.*discover"):
            list(stream(f"SELECT * FROM t {order}", rows=100, t=some.source()))


def test_files_that_go_between_listing_and_reading_are_asked_for_again(tmp_path: Path) -> None:
    log = a_log(tmp_path, "a", "b")
    listings = [[log.folder / "gone.parquet"]]
    source = Source(schema.IMAGES, lambda: listings.pop() if listings else log.fragments())
    assert query("SELECT path FROM t ORDER BY path", t=source)["path"].to_pylist() == ["a", "b"]


def test_a_question_that_is_wrong_stays_wrong(tmp_path: Path) -> None:
    with pytest.raises(duckdb.Error):
        query("SELECT nonsense FROM t", t=a_log(tmp_path, "a").source())
