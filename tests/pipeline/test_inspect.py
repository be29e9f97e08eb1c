"""inspect, as a user types it: of a whole workspace, of a trained run, of an adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pipeline_project import Project
from training_project import prepare

DRAWN = """
[validation]
validation_prompt = "a picture"
validation_step_interval = 1
validation_resolution = "64"
validation_num_inference_steps = 2
"""


@pytest.fixture
def here(project: Callable[..., Project], tmp_path: Path) -> Project:
    return prepare(project, tmp_path, max_train_steps=2, eval_steps_interval=1)


def test_a_workspace_and_its_run_are_reported_on(here: Project) -> None:
    before = {path: path.stat().st_mtime_ns for path in (here.root / "held-out").iterdir()}
    found = here.json("inspect", "--samples", "3", "--decoded", "2")
    counts = found["counts"]
    assert (counts["images"], counts["used"], counts["latents"]) == (12, 12, 12)
    assert [pair["psnr_db"] > 0 for pair in found["decoded"]] == [True, True]
    page = (here.root / "inspect.html").read_text("utf-8")
    assert Path(found["output"]) == here.root / "inspect.html"
    assert len(page.encode()) == counts["bytes written"]
    assert page.count(" dB") == 3  # of each pair, and their mean
    assert {path: path.stat().st_mtime_ns for path in (here.root / "held-out").iterdir()} == before

    configuration = here.root / "omnigen-pipe.toml"
    configuration.write_text(configuration.read_text() + DRAWN)
    here.run("train")
    found = here.json("inspect", "--run", "default")
    assert found["counts"]["steps"] == 2
    assert found["counts"]["evaluations"] == 3
    assert found["counts"]["pictures shown"] == 5  # of step 0, 1 and 2, and two averages
    assert any(row["rows"] for row in found["bins"])
    page = (here.root / "runs" / "default" / "inspect.html").read_text("utf-8")
    for text in ("linear baseline", "Learning rate", "samples/s", "GiB", "loss of the average"):
        assert text in page


def test_options_without_effect_and_runs_that_are_none_are_refused(here: Project) -> None:
    assert "--samples" in here.run("inspect", "--run", "x", "--samples", "3", status=2).stderr
    assert "--run" in here.run("inspect", "runs/default", "--run", "x", status=2).stderr
    refused = here.run("inspect", "runs/default", "-q", "-w", "elsewhere", status=2).stderr
    assert "--workspace, --quiet has no effect with an adapter" in " ".join(refused.split())
    assert "no run `x`" in here.run("inspect", "--run", "x", status=2).stderr
    (here.root / "mine.html").write_text("mine")
    assert "--overwrite" in here.run("inspect", "-o", "mine.html", status=2).stderr
    here.run("inspect", "-o", "mine.html", "--overwrite", "--decoded", "0", "--hash-limit", "0")
    assert (here.root / "mine.html").stat().st_size > 1000
