"""What a model is made of is written down first, and a folder goes on with that only."""

from __future__ import annotations

import errno
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from manifests.errors import PipeError, UsageError
from manifests.lock import locked
from omnigen_pipe.embedded.making import (
    LOCK_NAME,
    PLAN_NAME,
    Making,
    Plan,
    begun,
    note_versions,
    read_plan,
)

MAKING = Making(seed=3, vae_steps=4, pictures=5, steps=6)
RECIPE = "0123456789abcdef"


def begin(folder: Path, making: Making) -> None:
    """Begin a making, or go on with it, and do nothing."""
    with begun(folder, making, RECIPE):
        pass


def test_a_plan_is_read_as_it_was_begun(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "w"
    begin(folder, MAKING)
    assert read_plan(folder) == Plan(MAKING, RECIPE)
    begin(folder, MAKING)
    for versions in ("one", "two", "two", "one"):
        note_versions(folder, versions)
    begin(folder, MAKING)
    assert read_plan(folder) == Plan(MAKING, RECIPE, ("one", "two"))


@pytest.mark.parametrize("name", asdict(MAKING))
def test_a_folder_begun_with_another_plan_is_refused(tmp_path: Path, name: str) -> None:
    begin(tmp_path, MAKING)
    other = Making(**{**asdict(MAKING), name: 7})
    with pytest.raises(UsageError) as raised:
        begin(tmp_path, other)
    assert MAKING.options() in str(raised.value)
    assert other.options() in str(raised.value)
    assert read_plan(tmp_path).making == MAKING


def test_a_folder_begun_by_another_recipe_is_refused(tmp_path: Path) -> None:
    begin(tmp_path, MAKING)
    other = "fedcba9876543210"
    with (
        pytest.raises(UsageError, match=f"by the recipe {RECIPE}, .* is {other}"),
        begun(tmp_path, MAKING, other),
    ):
        pass
    assert read_plan(tmp_path) == Plan(MAKING, RECIPE)


def test_a_folder_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    """Its plan names no recipe."""
    (tmp_path / PLAN_NAME).write_text(json.dumps({**asdict(MAKING), "made_with": []}))
    assert read_plan(tmp_path) == Plan(MAKING, "")
    with pytest.raises(UsageError, match="of an earlier version"):
        begin(tmp_path, MAKING)


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "staging").mkdir()
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(UsageError, match=r"holiday\.jpg"):
        begin(tmp_path, MAKING)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["holiday.jpg", "staging"]
    with pytest.raises(UsageError, match="is a file"):
        begin(tmp_path / "holiday.jpg", MAKING)
    (tmp_path / "holiday.jpg").unlink()
    (tmp_path / LOCK_NAME).touch()
    begin(tmp_path, MAKING)  # a start was killed before it wrote its plan
    assert read_plan(tmp_path).making == MAKING


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        json.dumps({**asdict(MAKING), "made_with": "x"}),
        json.dumps({**asdict(MAKING), "recipe": 1, "made_with": []}),
        json.dumps({**asdict(MAKING), "steps": "6", "made_with": []}),
        json.dumps({**asdict(MAKING), "steps": True, "made_with": []}),
    ],
)
def test_a_damaged_plan_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / PLAN_NAME).write_text(text)
    with pytest.raises(PipeError, match=str(tmp_path / PLAN_NAME)):
        begin(tmp_path, MAKING)


def test_within_it_no_other_making_works_there(tmp_path: Path) -> None:
    with begun(tmp_path / "w", MAKING, RECIPE):
        with locked(tmp_path / "w" / LOCK_NAME) as lock:
            assert lock.held is False
        with (
            pytest.raises(UsageError, match="is being made in"),
            begun(tmp_path / "w", MAKING, RECIPE),
        ):
            pass
    begin(tmp_path / "w", MAKING)


def test_what_was_left_unfinished_is_removed_by_one_that_works_alone(tmp_path: Path) -> None:
    staging = tmp_path / "staging"
    begin(tmp_path, MAKING)
    outside = tmp_path / "outside"
    outside.mkdir()
    (staging / "1-tokenizer").mkdir()
    (staging / "1-tokenizer" / "half").touch()
    (staging / "2-plan.json").touch()
    (staging / "3-link").symlink_to(outside)
    with begun(tmp_path, MAKING, RECIPE):
        assert list(staging.iterdir()) == []
        (staging / "4-vae").touch()
        with pytest.raises(UsageError):
            begin(tmp_path, MAKING)
        assert [path.name for path in staging.iterdir()] == ["4-vae"], "it may still be written"
    assert outside.is_dir()


def test_where_the_file_system_knows_no_locks_nothing_is_refused_nor_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unknown)
    with begun(tmp_path, MAKING, RECIPE):
        (tmp_path / "staging" / "1-vae").touch()
        begin(tmp_path, MAKING)
        assert [path.name for path in (tmp_path / "staging").iterdir()] == ["1-vae"]
