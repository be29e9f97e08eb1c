"""What a model is made of is written down first, and a folder goes on with that only."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from manifests.errors import PipeError, UsageError
from omnigen_pipe.embedded.making import PLAN_NAME, Making, begin, note_versions, read_plan

MAKING = Making(seed=3, vae_steps=4, pictures=5, steps=6)


def test_a_plan_is_read_as_it_was_begun(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "w"
    begin(folder, MAKING)
    assert read_plan(folder) == (MAKING, [])
    begin(folder, MAKING)
    for versions in ("one", "two", "two", "one"):
        note_versions(folder, versions)
    begin(folder, MAKING)
    assert read_plan(folder) == (MAKING, ["one", "two"])


@pytest.mark.parametrize("name", asdict(MAKING))
def test_a_folder_begun_with_another_plan_is_refused(tmp_path: Path, name: str) -> None:
    begin(tmp_path, MAKING)
    other = Making(**{**asdict(MAKING), name: 7})
    with pytest.raises(UsageError) as raised:
        begin(tmp_path, other)
    assert MAKING.options() in str(raised.value)
    assert other.options() in str(raised.value)
    assert read_plan(tmp_path)[0] == MAKING


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "staging").mkdir()
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(UsageError, match=r"holiday\.jpg"):
        begin(tmp_path, MAKING)
    with pytest.raises(UsageError, match="is a file"):
        begin(tmp_path / "holiday.jpg", MAKING)
    (tmp_path / "holiday.jpg").unlink()
    begin(tmp_path, MAKING)  # a start was killed before it wrote its plan
    assert read_plan(tmp_path)[0] == MAKING


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        json.dumps({**asdict(MAKING), "made_with": "x"}),
        json.dumps({**asdict(MAKING), "steps": "6", "made_with": []}),
        json.dumps({**asdict(MAKING), "steps": True, "made_with": []}),
    ],
)
def test_a_damaged_plan_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / PLAN_NAME).write_text(text)
    with pytest.raises(PipeError, match=str(tmp_path / PLAN_NAME)):
        begin(tmp_path, MAKING)
