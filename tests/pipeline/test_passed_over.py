"""Every command that picks a run's checkpoint names the newer ones that it passed over, and why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pipeline_project import Project
from training_project import change, prepare

#: Commands that take the adapter of a run's newest whole checkpoint.
TAKING = {
    "inspect": ("inspect", "runs/default"),
    "eval": ("eval", "--device", "cpu", "--quiet"),
    "generate": (
        *("generate", "a cat", "--adapter", "runs/default", "--size", "32x32", "--steps", "1"),
        *("--device", "cpu", "--quiet"),
    ),
    "export": ("export", "runs/default", "-o", "merged", "--quiet"),
    "init_lora": ("train", "--device", "cpu", "--quiet"),
}


def test_every_command_names_what_it_passed_over_and_takes_the_one_before(
    project: Callable[..., Project], tmp_path: Path
) -> None:
    """Three checkpoints: one is whole, the next has lost its index, and the newest is cut."""
    here = prepare(project, tmp_path, max_train_steps=6, checkpoint_step_interval=2)
    here.run("train", "--device", "cpu")
    assert "Passed over" not in here.run("inspect", "runs/default").stderr
    checkpoints = here.root / "runs" / "default" / "checkpoints"
    cut, incomplete, whole = (checkpoints / f"step-{step:08d}" for step in (6, 4, 2))
    assert whole.is_dir()
    file = cut / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    (incomplete / "checkpoint.json").unlink()
    first = f"{cut.name}: adapter.safetensors is damaged"
    second = f"{incomplete.name} is not a whole checkpoint"

    configured = (here.root / "omnigen-pipe.toml").read_text()
    for name, command in TAKING.items():
        if name == "init_lora":
            change(here, tracker_run_name="other", init_lora="runs/default", max_train_steps=1)
        said = here.run(*command)
        text = " ".join((said.stdout + said.stderr).split())
        assert text.count("Passed over") == 2, (name, said)
        assert text.count(first) == text.count(second) == 1, (name, said)
        if name != "init_lora":
            assert whole.name in text or "(step 2, " in text, (name, said)

    (here.root / "omnigen-pipe.toml").write_text(configured)
    change(here, max_train_steps=8)
    report = here.json("inspect", "runs/default")
    assert report["metadata"]["step"] == "2"
    (standing,) = here.json("status", "--sample", "main:picture 0.png")
    (run,) = (run for run in standing["runs"] if run["run"] == "default")
    trained = here.json("train", "--device", "cpu")
    for notes in (report["notes"], run["notes"], trained["notes"]):
        assert [first in notes[0], second in notes[1]] == [True, True]
    # They are set aside now: nothing newer is passed over.
    assert "Passed over" not in here.run("inspect", "runs/default").stderr
