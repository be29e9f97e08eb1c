"""Keys: the same in Python and in DuckDB, and different for different fields."""

from __future__ import annotations

import hashlib

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.keys import KEY_DIGITS, key, key_sql
from manifests.query import query

texts = st.text(st.characters(codec="utf-8"), max_size=20)
fields = st.one_of(texts, st.integers(-(2**63), 2**63 - 1))


def in_sql(rows: list[tuple[str | int, ...]]) -> list[str | None]:
    columns = [f"c{i}" for i in range(len(rows[0]))]
    table = pa.table(
        {
            name: pa.array(values)
            for name, values in zip(columns, zip(*rows, strict=True), strict=True)
        }
    )
    result: list[str | None] = query(f"SELECT {key_sql(*columns)} AS key FROM t", t=table)[
        "key"
    ].to_pylist()
    return result


@given(st.lists(st.tuples(texts, st.integers(-(2**63), 2**63 - 1), texts), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None)
def test_python_and_duckdb_agree(rows: list[tuple[str, int, str]]) -> None:
    assert in_sql(list(rows)) == [key(*row) for row in rows]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "é",
        "e\N{COMBINING ACUTE ACCENT}",
        "日本語",
        "👩‍👩‍👧",
        "a\0b",
        "a'b\"c\\d",
        "\n\t ",
        "1:a",
        "x" * 100_000,
    ],
    ids=repr,
)
def test_python_and_duckdb_agree_on_awkward_text(text: str) -> None:
    assert in_sql([(text, 0)]) == [key(text, 0)]


def test_is_the_documented_hash() -> None:
    assert key("ab", 12) == hashlib.sha256(b"2:ab2:12").hexdigest()[:32]
    assert key("é") == hashlib.sha256("2:é".encode()).hexdigest()[:32]
    assert len(key("")) == KEY_DIGITS


@given(st.lists(fields, max_size=4), st.lists(fields, max_size=4))
@settings(max_examples=300)
def test_different_fields_have_different_keys(a: list[str | int], b: list[str | int]) -> None:
    same = [str(field) for field in a] == [str(field) for field in b]
    assert (key(*a) == key(*b)) == same


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (("ab", "c"), ("a", "bc")),
        (("a", ""), ("", "a")),
        (("a",), ("a", "")),
        (("1:a",), ("a",)),
        (("a1:b",), ("a", "b")),
        (("é",), ("e\N{COMBINING ACUTE ACCENT}",)),
    ],
)
def test_the_boundaries_between_fields_count(a: tuple[str, ...], b: tuple[str, ...]) -> None:
    assert key(*a) != key(*b)


def test_a_missing_field_has_no_key() -> None:
    table = pa.table({"a": pa.array(["x", None]), "b": pa.array([1, 2])})
    found = query(f"SELECT {key_sql('a', 'b')} AS key FROM t ORDER BY b", t=table)
    assert found["key"].to_pylist() == [key("x", 1), None]
