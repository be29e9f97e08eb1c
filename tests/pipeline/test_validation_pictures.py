"""Validation pictures of whole runs: whose pictures they are, and that training never notices."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from forked import signal_at, start, start_all
from PIL import Image
from pipeline_project import Project, configured
from training_project import change, copied, draw_turned, metrics, run_first_four

from omnigen_pipe.runs import pushing
from omnigen_pipe.runs.run import Run
from omnigen_pipe.training import validation

VALIDATION = """
[validation]
validation_prompt = "a red circle"
user_prompt_library = "library.json"
validation_negative_prompt = "blurry"
validation_seed = 7
validation_resolution = "32x32,48x32"
validation_guidance = 3.0
validation_num_inference_steps = 2
validation_step_interval = 2
"""
NAMES = ["Cat-token", "validation"]
SIZES = ["32x32", "48x32"]
TRAIN = ("train", "--device", "cpu")


def _prepare(root: Path, model: Path, folder: Path, **train: object) -> Project:
    """A workspace whose first four stages are done: four pictures, four steps."""
    pictures = folder / "pictures"
    draw_turned(pictures, 4)
    options = {
        "max_train_steps": 4,
        "learning_rate": 1e-2,
        "use_ema": True,
        "checkpoint_step_interval": 2,
        **train,
    }
    here = configured(root, model, pictures, train=options, extra=VALIDATION)
    (root / "library.json").write_text(json.dumps({"Cat <token>": "a cat"}))
    run_first_four(here)
    return here


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, small_omnigen: Path) -> Project:
    """Ready for training: whoever trains makes a copy."""
    folder = tmp_path_factory.mktemp("validation")
    return _prepare(folder / "workspace", small_omnigen, folder)


@pytest.fixture(scope="module")
def drawn(prepared: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Trained and drawn in one go: nobody changes it."""
    here = copied(prepared, tmp_path_factory.mktemp("drawn"))
    here.run(*TRAIN)
    return here


def _pictures(here: Project, run: str = "default") -> dict[str, bytes]:
    """The bytes of a run's validation pictures; also that nothing else lies beside them."""
    folder = here.root / "runs" / run / "validation"
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _expected(steps: tuple[int, ...] = (0, 2, 4)) -> set[str]:
    return {
        f"step-{step:06d}/{name}-{size}{end}.png"
        for step in steps
        for name in NAMES
        for size in SIZES
        for end in (("", "-ema") if step else ("",))
    }


def _checkpoint(here: Project, step: int, run: str = "default") -> dict[str, bytes]:
    folder = here.root / "runs" / run / "checkpoints" / f"step-{step:08d}"
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _times(here: Project) -> dict[str, int]:
    folder = here.root / "runs" / "default" / "validation"
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*.png")}


def _check_against_generate(here: Project, steps: tuple[int, ...], run: str = "default") -> None:
    """Byte for byte, with what they say of themselves: `generate` takes all the rest from the
    workspace."""
    found = _pictures(here, run)
    for step in steps:
        place = f"runs/{run}/checkpoints/step-{step:08d}"
        for size in SIZES:
            for end in ("", "-ema"):
                folder = here.root / f"again-{run}-{step}-{size}{end}"
                average = ["--ema"] if end else []
                here.run(
                    "generate", "--adapter", place, *average, "--size", size,
                    "--device", "cpu", "-o", folder.name,
                )  # fmt: skip
                for name in NAMES:
                    same = (folder / f"{name}-7.png").read_bytes()
                    assert found[f"step-{step:06d}/{name}-{size}{end}.png"] == same


def test_pictures_are_those_that_generate_draws_with_the_checkpoint(
    drawn: Project, tmp_path: Path
) -> None:
    here = copied(drawn, tmp_path)
    found = _pictures(here)
    assert found.keys() == _expected()
    _check_against_generate(here, (2, 4))
    # Before the first step the adapter changes nothing.
    here.run("generate", "--size", "32x32", "--device", "cpu", "-o", "base")
    folder = here.root / "runs" / "default" / "validation"
    for name in NAMES:
        with (
            Image.open(here.root / "base" / f"{name}-7.png") as base,
            Image.open(folder / "step-000000" / f"{name}-32x32.png") as first,
        ):
            assert base.tobytes() == first.tobytes()
            assert first.info["adapter_step"] == "0"
    # They are of the weights of their time, of which there are several.
    assert len({found[f"step-{step:06d}/validation-32x32.png"] for step in (0, 2, 4)}) == 3
    assert found["step-000004/Cat-token-32x32.png"] != found["step-000004/Cat-token-32x32-ema.png"]


@pytest.mark.parametrize(
    "options",
    [
        {"mixed_precision": "bf16", "base_model_precision": "int8-quanto"},
        {"optimizer": "adamw_schedulefree", "use_ema": False, "gradient_checkpointing": False},
    ],
    ids=["quantised", "schedule-free"],
)
@pytest.mark.slow
def test_they_are_in_every_kind_of_training(
    small_omnigen: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    here = _prepare(tmp_path / "workspace", small_omnigen, tmp_path, **options)
    here.run(*TRAIN)
    found = _pictures(here)
    here.run(
        "generate", "--adapter", "runs/default/checkpoints/step-00000004", "--device", "cpu",
        "-o", "again",
    )  # fmt: skip
    for name in NAMES:
        same = (here.root / "again" / f"{name}-7.png").read_bytes()
        assert found[f"step-000004/{name}-32x32.png"] == same


def test_training_goes_on_as_if_nothing_had_been_drawn(drawn: Project, tmp_path: Path) -> None:
    """Every file of every checkpoint, to the byte, and every number."""
    here = copied(drawn, tmp_path)
    change(here, tracker_run_name="plain")
    _without_drawing(here)
    here.run(*TRAIN)
    assert not (here.root / "runs" / "plain" / "validation").exists()
    for step in (2, 4):
        assert _checkpoint(here, step) == _checkpoint(here, step, "plain")
    assert metrics(here) == metrics(here, "plain")


def _without_drawing(here: Project) -> None:
    path = here.root / "omnigen-pipe.toml"
    on, off = (f"validation_step_interval = {steps}" for steps in (2, 0))
    path.write_text(path.read_text().replace(on, off))


def test_what_is_published_is_not_drawn_again_after_a_resume(
    drawn: Project, tmp_path: Path
) -> None:
    """Those of a lost step neither: it came to the same weights again."""
    here = copied(drawn, tmp_path)
    before, times = _pictures(here), _times(here)
    shutil.rmtree(here.root / "runs" / "default" / "checkpoints" / "step-00000004")
    lost = here.root / "runs" / "default" / "validation" / "step-000004" / "validation-32x32.png"
    lost.unlink()
    summary = here.json(*TRAIN)
    assert summary["validation"]["drawn"] == 1
    assert _pictures(here) == before
    assert {path for path, when in _times(here).items() if when != times[path]} == {str(lost)}
    assert _checkpoint(here, 4) == _checkpoint(drawn, 4)


def test_pictures_of_other_weights_are_drawn_anew(drawn: Project, tmp_path: Path) -> None:
    """A run that goes on otherwise from a checkpoint: what it drew later then was another's."""
    here = copied(drawn, tmp_path)
    shutil.rmtree(here.root / "runs" / "default" / "checkpoints" / "step-00000004")
    change(here, learning_rate=2e-2)
    before = _pictures(here)
    here.run(*TRAIN)
    after = _pictures(here)
    changed = {name for name, data in after.items() if data != before[name]}
    assert changed == {name for name in _expected((4,)) if name.startswith("step-000004")}
    _check_against_generate(here, (4,))


def test_a_complete_run_draws_what_its_end_lacks_and_nothing_else(
    drawn: Project, tmp_path: Path
) -> None:
    here = copied(drawn, tmp_path)
    folder = here.root / "runs" / "default" / "validation"
    (folder / "step-000004" / "Cat-token-48x32-ema.png").unlink()
    (folder / "step-000002" / "Cat-token-48x32-ema.png").unlink()
    assert here.json(*TRAIN)["counts"]["steps now"] == 0
    assert _expected() - _pictures(here).keys() == {"step-000002/Cat-token-48x32-ema.png"}
    assert (
        _pictures(here)["step-000004/Cat-token-48x32-ema.png"]
        == (_pictures(drawn)["step-000004/Cat-token-48x32-ema.png"])
    )
    assert "is complete" in here.run(*TRAIN).stdout


PLACE = "omnigen_pipe.training.validation:save_picture"


def test_a_run_killed_while_it_draws_ends_as_one_that_never_was(
    drawn: Project, prepared: Project, tmp_path: Path
) -> None:
    """Before the first step and between steps: nothing half is left, what is there is not drawn
    again, and what is lacking is drawn."""
    here = copied(prepared, tmp_path)
    whole = _pictures(drawn)
    kept: dict[str, int] = {}
    for call in (3, 6):
        first = partial(signal_at, PLACE, call, signal.SIGKILL)
        start(here.root, *TRAIN, first=first).ended(-signal.SIGKILL)
        kept = _check_part(here, whole, kept)
    _check_ends_as(here, drawn, kept)


def test_a_run_stopped_while_it_draws_ends_as_one_that_never_was(
    drawn: Project, prepared: Project, tmp_path: Path
) -> None:
    """The same by Ctrl-C, which saves, and at the end, where the run has no step left."""
    here = copied(prepared, tmp_path)
    whole = _pictures(drawn)
    kept: dict[str, int] = {}
    for call, step in ((2, 0), (7, 2), (8, 4)):
        with _stopping(call):
            ended = here.run(*TRAIN, status=130)
        assert f"Stopped by a signal at step {step}" in ended.stdout or step == 4
        kept = _check_part(here, whole, kept)
    _check_ends_as(here, drawn, kept)


@contextmanager
def _stopping(call: int) -> Iterator[None]:
    """Within it this process gets a SIGINT when it saves its `call`-th picture."""
    really, calls = validation.save_picture, 0

    def stopping(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGINT)
        really(*arguments)

    with mock.patch.object(validation, "save_picture", stopping):
        yield


def _check_part(here: Project, whole: dict[str, bytes], kept: dict[str, int]) -> dict[str, int]:
    """Some of the pictures are there, whole, and of those the ones of before; when they were
    written."""
    found = _pictures(here)
    assert 0 < len(found) < len(whole)
    assert all(whole[name] == data for name, data in found.items())
    assert kept.items() <= _times(here).items()
    return _times(here)


def _check_ends_as(here: Project, drawn: Project, kept: dict[str, int]) -> None:
    here.run(*TRAIN)
    assert _pictures(here) == _pictures(drawn)
    assert kept.items() <= _times(here).items()
    assert _checkpoint(here, 4) == _checkpoint(drawn, 4)
    assert metrics(here) == metrics(drawn)


@pytest.mark.parametrize(
    ("failure", "place"),
    [(torch.OutOfMemoryError("CUDA out of memory"), "cpu"), (MemoryError(), "this machine")],
    ids=["device", "machine"],
)
def test_a_picture_that_fails_is_reported_and_the_rest_goes_on(
    drawn: Project,
    prepared: Project,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: Exception,
    place: str,
) -> None:
    here = copied(prepared, tmp_path)
    really = validation.draw_latents

    def failing(pipe: Any, requests: Any, settings: Any, *rest: Any) -> torch.Tensor:
        if settings.size == "48x32" and requests[0].name == "validation":
            raise failure
        latents = really(pipe, requests, settings, *rest)
        return latents * torch.inf if settings.size == "48x32" else latents

    monkeypatch.setattr(validation, "draw_latents", failing)
    ended = here.run(*TRAIN, "--json")
    said = ended.stderr
    assert said.count("validation-48x32 before the first step could not be made") == 1
    assert f"{place} ran out of memory at 48x32. Lower validation_resolution" in said
    assert "Cat-token-48x32 of the average after step 4 could not be made" in said
    assert "numbers overflowed" in said
    assert json.loads(ended.stdout)["validation"]["failed"] == 4
    expected = {name: data for name, data in _pictures(drawn).items() if "32x32" in name}
    assert _pictures(here) == expected
    assert _checkpoint(here, 4) == _checkpoint(drawn, 4)


def test_what_is_being_drawn_is_said(prepared: Project, tmp_path: Path) -> None:
    here = copied(prepared, tmp_path)
    said = here.run(*TRAIN).stderr.splitlines()
    assert "Drawing validation pictures before the first step." in said
    assert "Drawing validation pictures after step 4." in said
    assert any(line.startswith("Drew 8 validation pictures after step 4 in ") for line in said)
    assert any(line.endswith("runs/default/validation/step-000004") for line in said)


@pytest.mark.parametrize("sharded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_draw_together_what_generate_draws(
    prepared: Project, tmp_path: Path, sharded: bool
) -> None:
    here = copied(prepared, tmp_path)
    change(here, fsdp_enable=sharded)
    first, second = start_all(here.root, 2, *TRAIN, "--json")
    assert first.json()["validation"]["drawn"] == 8
    ended = second.ended()
    assert (ended.stdout, ended.stderr) == ("", "")
    assert _pictures(here).keys() == _expected()
    _check_against_generate(here, (4,))


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_a_signal_to_any_process_ends_the_drawing_in_all(
    prepared: Project, tmp_path: Path, sharded: bool
) -> None:
    """It goes to the first one while that writes, and every process leaves at the same picture."""
    here = copied(prepared, tmp_path)
    change(here, fsdp_enable=sharded)
    stop = partial(signal_at, PLACE, 6, signal.SIGTERM)
    for child in start_all(here.root, 2, *TRAIN, first=stop):
        assert child.ended(None).status == 128 + signal.SIGTERM
    assert _pictures(here).keys() < _expected()
    for child in start_all(here.root, 2, *TRAIN):
        child.ended()
    assert _pictures(here).keys() == _expected()
    _check_against_generate(here, (4,))


def _tagged(here: Project) -> Iterator[tuple[str, list[int]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = here.root / "runs" / "default" / "tensorboard"
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0}).Reload()
    for tag in events.Tags()["images"]:
        yield tag, [event.step for event in events.Images(tag)]
    for tag in events.Tags()["tensors"]:
        yield tag, [event.step for event in events.Tensors(tag)]


def test_tensorboard_shows_pictures_and_once_what_the_run_is(
    prepared: Project, tmp_path: Path
) -> None:
    """Also when it was stopped twice, the second time after a step that had no checkpoint."""
    here = copied(prepared, tmp_path)
    change(here, report_to="tensorboard", checkpoint_step_interval=0, max_train_steps=1)
    here.run(*TRAIN)
    change(here, max_train_steps=3)
    here.run(*TRAIN)
    shutil.rmtree(here.root / "runs" / "default" / "checkpoints" / "step-00000003")
    here.run(*TRAIN)
    shown = dict(_tagged(here))
    for name in (f"{name}-{size}" for name in NAMES for size in SIZES):
        assert shown[f"validation/{name}"] == [0, 1, 2, 3]
        assert shown[f"validation_ema/{name}"] == [1, 2, 3]
    assert shown["configuration/text_summary"] == [0]
    assert shown["data/text_summary"] == [0]


def test_pictures_of_a_training_that_was_left_are_set_aside(drawn: Project, tmp_path: Path) -> None:
    """Only those of steps that come again, and are not due any more."""
    here = copied(drawn, tmp_path)
    folder = here.root / "runs" / "default"
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    file = here.root / "omnigen-pipe.toml"
    file.write_text(file.read_text().replace("_step_interval = 2\n", "_step_interval = 3\n"))
    change(here, max_train_steps=5, checkpoint_step_interval=2)
    here.run(*TRAIN)
    assert sorted(path.name for path in (folder / "validation").iterdir()) == [
        "left-0-step-000004",
        *(f"step-{step:06d}" for step in (0, 2, 3, 5)),
    ]
    found = [path.parent.name for path in pushing.validation_pictures(Run("default", folder), 5)]
    assert set(found) == {f"step-{step:06d}" for step in (0, 2, 3, 5)}


def test_wandb_and_tensorboard_show_the_same_run(
    prepared: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures to the byte, and what the run is; wandb reaches no network."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    here = copied(prepared, tmp_path)
    change(here, report_to="all", max_train_steps=2, tracker_project_name="odd-project")
    here.run(*TRAIN)
    wandb.teardown()  # waits for its service, which writes its files
    folder = here.root / "runs" / "default"
    media = folder.glob("wandb/offline-run-*/files/media/images/validation*/*.png")
    assert {path.read_bytes() for path in media} == set(_pictures(here).values())
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    kept = file.read_bytes()
    samples = json.loads((folder / "run.json").read_text())["samples"]
    for said in ("odd-project", samples, "Cat-token-32x32", "train/loss"):
        assert said.encode() in kept, said
    shown = dict(_tagged(here))
    assert all(shown[f"validation/{name}-{size}"] == [0, 2] for name in NAMES for size in SIZES)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("validation_step_interval = 2", "there is nothing to draw"),
        ('validation_step_interval = 2\nvalidation_prompt = "<|image_1|>"', "asks for an input"),
        ('validation_resolution = "100x64"', "the nearest is 96x64"),
        ('validation_resolution = "big"', "`big` is no size"),
        ('validation_step_interval = 2\nuser_prompt_library = "gone.json"', "does not exist"),
        ('validation_step_interval = 2\nuser_prompt_library = "bad.json"', "letter or a digit"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_the_first_step(
    prepared: Project, tmp_path: Path, lines: str, message: str
) -> None:
    here = copied(prepared, tmp_path)
    (here.root / "bad.json").write_text('{"***": "a"}')
    path = here.root / "omnigen-pipe.toml"
    start_of = path.read_text().split("[validation]")[0]
    path.write_text(f"{start_of}[validation]\n{lines}\n")
    assert message in " ".join(here.run(*TRAIN, status=2).stderr.split())
    assert not (here.root / "runs" / "default" / "checkpoints").exists()
    assert not (here.root / "runs" / "default" / "validation").exists()


def test_pictures_of_the_prompts_can_be_had_without_training(
    drawn: Project, tmp_path: Path
) -> None:
    """`generate` takes size, steps, guidance and seed of the workspace, unless told otherwise."""
    here = copied(drawn, tmp_path)
    report = here.json("generate", "--device", "cpu", "-o", "plain")
    assert {p["name"] for p in report["pictures"]} == set(NAMES)
    assert {p["seed"] for p in report["pictures"]} == {7}
    assert (report["width"], report["height"]) == (32, 32)
    assert (report["num_inference_steps"], report["guidance_scale"]) == (2, 3.0)
    told = here.json("generate", "--device", "cpu", "--steps", "1", "--seed", "0", "-o", "told")
    assert {p["seed"] for p in told["pictures"]} == {0}
    assert told["num_inference_steps"] == 1
