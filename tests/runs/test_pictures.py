"""Validation pictures of a run as it is now, and of one that was left."""

from __future__ import annotations

from pathlib import Path

from omnigen_pipe.runs import pictures


def made(run: Path, *steps: int) -> None:
    for step in steps:
        folder = run / pictures.FOLDER_NAME / f"step-{step:06d}"
        folder.mkdir(parents=True)
        (folder / "cat.png").write_text(str(step))


def steps(run: Path, last_step: int | None = None) -> list[int]:
    return [step for step, _ in pictures.validations(run, last_step)]


def test_validations_are_those_up_to_a_step_in_their_order(tmp_path: Path) -> None:
    assert steps(tmp_path) == []
    made(tmp_path, 1_000_000, 0, 200)
    (tmp_path / pictures.FOLDER_NAME / "step-best").mkdir()
    assert steps(tmp_path) == [0, 200, 1_000_000]
    assert steps(tmp_path, 200) == [0, 200]


def test_what_is_due_no_more_after_the_step_gone_on_from_is_set_aside(tmp_path: Path) -> None:
    """And nothing of before it, whatever is due now; nothing is lost, however often."""
    made(tmp_path, 0, 200, 400, 600, 750, 800)
    for _ in range(2):
        pictures.set_aside(tmp_path, 500, lambda step: step % 250 == 0)
        assert steps(tmp_path) == [0, 200, 400, 750]
        made(tmp_path, 600)
    aside = sorted((tmp_path / pictures.FOLDER_NAME).glob("left-*/cat.png"))
    found = [(path.parent.name, path.read_text()) for path in aside]
    assert found == [
        ("left-0-step-000600", "600"),
        ("left-0-step-000800", "800"),
        ("left-1-step-000600", "600"),
    ]
