"""Shares: disjoint, complete, and by whole images, however many encoders there are."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.errors import UsageError
from manifests.keys import key
from omnigen_pipe.latents.share import Share, from_environment, parse

WANTED = pa.table(
    {
        "bucket": [f"{64 * (1 + n % 3)}x64" for n in range(600)],
        "pixels_key": [key("pixels", n) for n in range(600)],
        "content_hash": [key("content", n // 2) for n in range(600)],
    }
).sort_by([("bucket", "ascending"), ("pixels_key", "ascending")])


@given(st.integers(1, 40))
@settings(max_examples=15, deadline=None)
def test_shares_are_disjoint_and_hold_everything(count: int) -> None:
    shares = [Share(number, count).of(WANTED) for number in range(1, count + 1)]
    together = pa.concat_tables(shares).sort_by(
        [("bucket", "ascending"), ("pixels_key", "ascending")]
    )
    assert together.equals(WANTED)
    for one in shares:
        assert one.equals(one.sort_by([("bucket", "ascending"), ("pixels_key", "ascending")]))
    images = [set(one["content_hash"].to_pylist()) for one in shares]
    assert sum(len(one) for one in images) == 300, "all geometries of an image lie in one share"
    if count <= 4:
        assert min(one.num_rows for one in shares) > 0.7 * 600 / count


def test_the_form_of_the_option() -> None:
    assert parse("1/1") == Share()
    assert parse(" 3/8 ") == Share(3, 8)
    for wrong in ("0/4", "5/4", "1", "1/0", "-1/4", "a/b", "1/4/2", ""):
        with pytest.raises(UsageError, match="I from 1 to N"):
            parse(wrong)


def _array(ids: list[int], **more: int) -> list[Share]:
    facts = {"COUNT": len(ids), "MIN": min(ids), "MAX": max(ids), **more}
    names = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in facts.items()}
    return [from_environment(names | {"SLURM_ARRAY_TASK_ID": str(task)}) for task in ids]


@given(st.integers(0, 50), st.integers(1, 20), st.integers(1, 7))
def test_every_task_of_an_array_has_a_share_of_its_own(first: int, count: int, step: int) -> None:
    shares = _array([first + step * n for n in range(count)], STEP=step)
    assert sorted(share.number for share in shares) == list(range(1, count + 1))
    assert {share.count for share in shares} == {count}


@given(st.integers(0, 50), st.integers(1, 20))
def test_without_the_bounds_of_the_array_tasks_in_a_row_do(first: int, count: int) -> None:
    shares = [
        from_environment(
            {"SLURM_ARRAY_TASK_ID": str(first + n), "SLURM_ARRAY_TASK_COUNT": str(count)}
        )
        for n in range(count)
    ]
    assert sorted(share.number for share in shares) == list(range(1, count + 1))


def test_outside_of_an_array_everything_is_wanted() -> None:
    for environment in ({}, {"SLURM_ARRAY_TASK_ID": "3"}, {"SLURM_JOB_ID": "7"}):
        assert from_environment(environment) == Share()


def test_an_array_with_gaps_is_refused() -> None:
    for ids, step in (([1, 4, 9], 1), ([1, 2, 4], 1), ([0, 2, 5], 2)):
        with pytest.raises(UsageError, match="have gaps"):
            _array(ids, STEP=step)
    with pytest.raises(UsageError, match="cannot be read"):
        from_environment({"SLURM_ARRAY_TASK_ID": "x", "SLURM_ARRAY_TASK_COUNT": "2"})
