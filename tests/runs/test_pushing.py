"""Which validation pictures go to the hub: those that training draws, up to the pushed step."""

from __future__ import annotations

from pathlib import Path

import pytest

from omnigen_pipe.runs import pushing
from omnigen_pipe.runs.pushing import validation_pictures
from omnigen_pipe.runs.run import Run
from omnigen_pipe.sampling.requests import Request, Settings
from omnigen_pipe.sampling.validation import Wanted


def test_pictures_are_those_of_validations_up_to_the_step_in_their_order(tmp_path: Path) -> None:
    run = Run("cats", tmp_path)
    files = [
        Wanted(Request("cat", "a cat", 0), Settings(), average).file(tmp_path, step)
        for step in (0, 200_000, 1_000_000, 2_000_000)
        for average in (False, True)
    ]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
    found = validation_pictures(run, 1_000_000)
    assert [path.parent for path in found] == [file.parent for file in files[:6]]
    assert set(found) == set(files[:6])


def test_what_is_no_picture_of_a_validation_is_not_pushed(tmp_path: Path) -> None:
    outside = tmp_path / "private.png"
    outside.write_bytes(b"")
    folder = tmp_path / "run" / "validation" / "step-000002"
    folder.mkdir(parents=True)
    (folder / "linked.png").symlink_to(outside)
    (folder / "notes.txt").write_text("mine")
    (folder.parent / "step-000001").symlink_to(tmp_path, target_is_directory=True)
    (folder.parent / "mine.png").write_bytes(b"")
    assert validation_pictures(Run("run", tmp_path / "run"), 2) == []


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("ema.safetensors", True),
        ("validation/step-000200/cat-64x64.png", True),
        ("validation/step-1000000/a cat.JPG", True),
        ("adapter.safetensors", False),  # every push brings one
        ("old/ema.safetensors", False),
        ("validation/mine.png", False),
        ("validation/step-000200/notes.txt", False),
        ("validation/step-000200/mine/cat.png", False),
        ("validation/step-best/cat.png", False),
        ("mine/validation/step-000200/cat.png", False),
    ],
)
def test_only_what_pushes_bring_is_taken_out_of_the_repository(name: str, ours: bool) -> None:
    assert pushing._is_ours(name) == ours
