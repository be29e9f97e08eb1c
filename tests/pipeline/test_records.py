"""What a run writes down of itself: numbers that add up, and the same ones after a resume."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pipeline_project import Project
from test_guards import TRAIN, _back_to, _copy, prepared, trained
from training_project import change, evaluations, metrics

from omnigen_pipe.runs.time_bins import CENTRES

__all__ = ["prepared", "trained"]


@pytest.fixture
def boarded(trained: Project, tmp_path: Path) -> Project:
    """The run once more, with TensorBoard, stopped after every second step."""
    here = _copy(trained, tmp_path)
    change(here, report_to="tensorboard", tracker_run_name="boarded")
    for steps in (2, 4, 6):
        change(here, max_train_steps=steps)
        here.run(*TRAIN)
    return here


def test_losses_of_all_kinds_add_up_to_the_loss(trained: Project) -> None:
    """Plain rows by t, regularisation rows and rolled-out ones are all there are, and the loss is
    the mean over all of them."""
    kinds = set()
    for line in metrics(trained):
        plain = [
            count * loss
            for count, loss in zip(line["samples_by_t"], line["loss_by_t"], strict=True)
            if count
        ]
        total, samples = math.fsum(plain), sum(line["samples_by_t"])
        for kind in ("regularisation", "rollout"):
            if f"{kind}_samples" in line:
                kinds.add(kind)
                samples += line[f"{kind}_samples"]
                total += line[f"{kind}_samples"] * line[f"{kind}_loss"]
        assert samples == line["samples"]
        assert total / samples == pytest.approx(line["loss"], rel=1e-12)
        assert all(
            (loss is None) == (n == 0)
            for n, loss in zip(line["samples_by_t"], line["loss_by_t"], strict=True)
        )
    assert kinds == {"regularisation", "rollout"}


def _scalars(here: Project) -> Iterator[tuple[str, list[tuple[int, float]]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = here.root / "runs" / "boarded" / "tensorboard"
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    for name in events.Tags()["scalars"]:
        yield name, [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_shows_what_the_files_hold(boarded: Project) -> None:
    shown = dict(_scalars(boarded))
    assert all(math.isfinite(value) for points in shown.values() for _, value in points)
    lines, scores = metrics(boarded, "boarded"), evaluations(boarded, "boarded")
    for name in ("loss", "learning_rate", "grad_norm", "baseline", "regularisation_loss"):
        kept = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        assert [step for step, _ in shown[f"train/{name}"]] == [step for step, _ in kept]
        assert [value for _, value in shown[f"train/{name}"]] == pytest.approx(
            [value for _, value in kept], rel=1e-6
        )
    assert [line["step"] for line in scores] == [0, 2, 4, 6]
    for room, get in (("eval", lambda line: line), ("eval_ema", lambda line: line["ema"])):
        expected = [(line["step"], get(line)["loss"]) for line in scores]
        assert shown[f"{room}/loss"] == [(s, pytest.approx(x, rel=1e-6)) for s, x in expected]
        by_t = [shown[f"{room}/loss_by_t/{t:.2f}"] for t in CENTRES]
        np.testing.assert_allclose(
            [[value for _, value in points] for points in by_t],
            [[get(line)["losses"][k] for line in scores] for k in range(8)],
            rtol=1e-6,
        )
    windows = {f"train/window/{name}" for name in ("loss", "baseline", "explained")}
    assert windows <= shown.keys()
    assert any(name.startswith("train/loss_by_t/") for name in shown)


def test_the_window_of_losses_is_that_of_a_run_that_never_stopped(
    trained: Project, boarded: Project, tmp_path: Path
) -> None:
    """A window of the last steps is over those before the resume, too."""
    lines = metrics(trained)
    expected = []
    for number in range(1, len(lines) + 1):
        rows = [
            (count, count * (loss or 0))
            for line in lines[:number]
            for count, loss in zip(line["samples_by_t"], line["loss_by_t"], strict=True)
        ]
        expected.append(sum(x for _, x in rows) / sum(n for n, _ in rows))
    shown = dict(_scalars(boarded))["train/window/loss"]
    assert [value for _, value in shown] == pytest.approx(expected, rel=1e-6)

    here = _copy(trained, tmp_path / "again")
    _back_to(here, 4)
    recent = here.json(*TRAIN)["recent"]
    assert recent["loss"] == pytest.approx(expected[-1])
    assert sum(recent["samples_by_t"]) == sum(sum(line["samples_by_t"]) for line in lines)


def test_a_run_begun_anew_has_one_evaluation_before_its_first_step(
    prepared: Project, tmp_path: Path
) -> None:
    """Killed before its first checkpoint it begins again, perhaps with other settings: what was
    evaluated then is no part of it."""
    here = _copy(prepared, tmp_path)
    folder = here.root / "runs" / "default"
    folder.mkdir(parents=True)
    change(here, max_train_steps=1)
    (folder / "evaluations.jsonl").write_text('{"step": 0, "loss": 77.0}\n')
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 77.0}\n')
    here.run(*TRAIN)
    assert [line["step"] for line in evaluations(here)] == [0, 1]
    assert len(metrics(here)) == 1
    assert 77.0 not in (evaluations(here)[0]["loss"], metrics(here)[0]["loss"])
