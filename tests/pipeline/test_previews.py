"""Previews of validation pictures in whole runs: they are shown, and nothing else notices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import start_all
from listening import HANG, listener
from PIL import Image
from pipeline_project import Project, configured
from training_project import change, copied, draw_turned, metrics, run_first_four

from manifests.errors import WriteError
from omnigen_pipe import webhooks
from omnigen_pipe.events import Event, Events
from omnigen_pipe.sampling.requests import Request, Settings
from omnigen_pipe.sampling.validation import Wanted
from omnigen_pipe.training import previews
from small_tiny import build_small_tiny

VALIDATION = """
[validation]
validation_prompt = "a red circle"
validation_resolution = "32x32,48x32"
validation_guidance = 3.0
validation_num_inference_steps = 5
validation_step_interval = 1
validation_preview_model = "tiny"
"""
PREVIEWS = "validation_preview = true\nvalidation_preview_steps = 2\n"
TRAIN = ("train", "--device", "cpu")
PICTURES = [f"validation-{size}{end}" for size in ("32x32", "48x32") for end in ("", "-ema")]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, small_omnigen: Path) -> Project:
    """Ready for training, two steps with three validations, still without previews: whoever trains
    makes a copy."""
    folder = tmp_path_factory.mktemp("previews")
    pictures = folder / "pictures"
    draw_turned(pictures, 2)
    options = {"max_train_steps": 2, "learning_rate": 1e-2, "use_ema": True}
    root = folder / "workspace"
    here = configured(root, small_omnigen, pictures, train=options, extra=VALIDATION)
    build_small_tiny(root / "tiny")
    run_first_four(here)
    return here


@pytest.fixture(scope="module")
def plain(prepared: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Trained without previews: nobody changes it."""
    here = copied(prepared, tmp_path_factory.mktemp("plain"))
    here.run(*TRAIN)
    return here


def _files(here: Project, pattern: str) -> dict[str, bytes]:
    """The files of the run that match `pattern`, by their paths in it."""
    run = here.root / "runs" / "default"
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.glob(pattern))}


def _same(here: Project, plain: Project) -> None:
    """Pictures, checkpoints and numbers are those of a run without previews, to the byte."""
    for pattern in ("validation/*/*.png", "checkpoints/*/*"):
        found = _files(here, pattern)
        assert found
        assert found == _files(plain, pattern)
    assert metrics(here) == metrics(plain)


def _previews(here: Project) -> dict[str, bytes]:
    found = _files(here, "validation/*/previews/*")
    return {name.removeprefix("validation/"): data for name, data in found.items()}


def _webhook(address: str, *events: str) -> str:
    return f'\n[[webhook]]\nurl = "{address}"\nevents = {list(events)}\n'.replace("'", '"')


def test_previews_are_told_and_kept_and_change_nothing(
    prepared: Project, plain: Project, tmp_path: Path
) -> None:
    with listener() as (address, got):
        here = copied(prepared, tmp_path, PREVIEWS + _webhook(address, "preview", "validation"))
        said = here.run(*TRAIN)
    _same(here, plain)
    assert "did not reach" not in said.stdout
    # Each comes before its picture, in the order of drawing.
    for step in (0, 1, 2):
        events = [event for event in got if event["step"] == step]
        of_step = [name for name in PICTURES if step or not name.endswith("-ema")]
        of_step.sort(key=lambda name: name.endswith("-ema"))
        told = [
            (e.get("picture"), e.get("inference_step"), e.get("num_inference_steps"))
            for e in events
        ]
        shown = [(name, number, 5) for name in of_step for number in (2, 4)]
        assert told == [*shown, (None, None, None)]
        assert [event["event"] for event in events] == [*["preview"] * len(shown), "validation"]
    # Those of the last validation are kept, and are what was told.
    assert _previews(here).keys() == {
        f"step-000002/previews/{name}-step-{number:02}.png"
        for name in PICTURES
        for number in (2, 4)
    }
    last = [e["files"] for e in got if e["event"] == "preview" and e["step"] == 2]
    assert {Path(k).name: v for k, v in _previews(here).items()} == {
        name: data for files in last for name, data in files.items()
    }
    folder = here.root / "runs/default/validation/step-000002"
    with (
        Image.open(folder / "previews/validation-48x32-step-04.png") as one,
        Image.open(folder / "previews/validation-48x32-step-02.png") as earlier,
        Image.open(folder / "validation-48x32.png") as picture,
    ):
        assert one.size == (48, 32)
        assert one.mode == "RGB"
        assert np.asarray(one).std() > 0
        assert one.tobytes() != earlier.tobytes()
        made = dict(one.info)
        assert made.pop("preview") == "step 4 of 5"
        assert made == picture.info
    assert not [path for path in (here.root / "staging").rglob("*") if path.is_file()]
    # A complete run draws nothing, and shows nothing.
    count, kept = len(got), _previews(here)
    here.run(*TRAIN)
    assert (len(got), _previews(here)) == (count, kept)


def test_a_picture_that_is_drawn_again_replaces_its_previews(
    prepared: Project, tmp_path: Path
) -> None:
    """Those of its neighbours stay, and so does whatever else lies there."""
    here = copied(prepared, tmp_path, PREVIEWS)
    here.run(*TRAIN)
    folder = here.root / "runs/default/validation/step-000002"
    (folder / "validation-32x32.png").unlink()
    (folder / "previews/mine.png").write_bytes(b"mine")
    old = folder / "previews/validation-32x32-step-05.png"
    old.write_bytes(b"of other options")
    before = _previews(here)
    here.run(*TRAIN)
    assert _previews(here) == {n: d for n, d in before.items() if not n.endswith(old.name)}


@pytest.mark.parametrize("place", ["preview", "publishing"])
def test_a_preview_that_fails_is_said_once_and_the_pictures_are_drawn(
    prepared: Project,
    plain: Project,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    def failing(*_: Any) -> Any:
        if place == "preview":
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        raise WriteError(tmp_path, PermissionError(13, "Permission denied"))

    monkeypatch.setattr(previews, place, failing)
    here = copied(prepared, tmp_path, PREVIEWS)
    said = here.run(*TRAIN).stderr
    assert said.count("A preview failed, and there are none from here on") == 1
    assert ("CUDA out of memory." if place == "preview" else str(tmp_path)) in said
    assert _previews(here) == {}
    _same(here, plain)


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("preview", MemoryError()),
        ("_encoded", MemoryError("Unable to allocate 3 MiB")),
        ("_encoded", OSError("encoder error -2 when writing image file")),
        ("_encoded", ValueError("cannot write mode")),
    ],
)
def test_drawing_goes_on_whatever_a_preview_fails_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: Exception
) -> None:
    """Neither Python's own memory nor Pillow ends it; it is said once, and not tried again."""
    tried = []

    def failing(*_: Any) -> Any:
        tried.append(place)
        raise error

    monkeypatch.setattr(previews, "preview", lambda *_: Image.new("RGB", (8, 8)))
    monkeypatch.setattr(previews, place, failing)
    said: list[str] = []
    told: list[Event] = []
    one = previews.Previews(
        torch.nn.Identity(), 1, tmp_path, tmp_path / "staging", Events([told.append]), said.append
    )
    picture = Wanted(Request("a", "a cat", 1), Settings(), average=False)
    for number in (1, 2):
        one.show(0, picture, number, torch.zeros(4, 1, 1), {})
    assert tried == [place]
    assert [sentence.rpartition(": ")[2] for sentence in said] == [str(error) or "MemoryError"]
    assert told == []


@pytest.mark.parametrize("status", [500, HANG])
def test_a_server_that_fails_or_hangs_costs_only_previews(
    prepared: Project,
    plain: Project,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
) -> None:
    monkeypatch.setattr(webhooks, "PAUSES", ())
    monkeypatch.setattr(webhooks, "PATIENCE", 0.0)
    monkeypatch.setattr(webhooks, "QUEUE_LENGTH", 4)
    with listener(status) as (address, _):
        here = copied(prepared, tmp_path, PREVIEWS + _webhook(address, "preview", "end"))
        said = here.run(*TRAIN).stdout
    assert "of 21 events did not reach webhook 1 (127.0.0.1)" in said
    _same(here, plain)
    assert len(_previews(here)) == 8


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_with_two_processes_the_first_shows_what_it_draws(
    prepared: Project, tmp_path: Path, sharded: bool
) -> None:
    """All where the base model is sharded, for then both draw each picture together."""
    here = copied(prepared, tmp_path, PREVIEWS)
    change(here, fsdp_enable=sharded)
    first, second = start_all(here.root, 2, *TRAIN, "--json")
    report = first.json()
    second.ended()
    assert report["validation"]["drawn"] == 4
    ours = PICTURES if sharded else [name for name in PICTURES if "-32x32" in name]
    assert _previews(here).keys() == {
        f"step-000002/previews/{name}-step-{number:02}.png" for name in ours for number in (2, 4)
    }
    told = [note for note in report["notes"] if "the first process draws" in note]
    assert len(told) == (0 if sharded else 1)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('validation_preview_model = "gone"', "The model folder"),
        ("validation_preview_steps = 0", "validation_preview_steps"),
        ('validation_preview_model = "runs"', "cannot be read as that of an AutoencoderTiny"),
    ],
)
def test_what_cannot_decode_is_refused_before_the_first_step(
    prepared: Project, tmp_path: Path, lines: str, message: str
) -> None:
    here = copied(prepared, tmp_path)
    (here.root / "runs").mkdir(exist_ok=True)
    path = here.root / "omnigen-pipe.toml"
    text = path.read_text().replace('validation_preview_model = "tiny"\n', "")
    tail = "" if "steps" in lines else PREVIEWS.split("\n")[0] + "\n"
    path.write_text(f"{text}\n{lines}\n{tail}")
    assert message in " ".join(here.run(*TRAIN, status=2).stderr.split())
    assert not (here.root / "runs" / "default" / "checkpoints").exists()


def test_previews_without_validation_are_said_to_have_no_effect(
    prepared: Project, tmp_path: Path
) -> None:
    here = copied(prepared, tmp_path, PREVIEWS)
    path = here.root / "omnigen-pipe.toml"
    path.write_text(path.read_text().replace("step_interval = 1", "step_interval = 0"))
    assert "validation_preview has no effect" in here.run(*TRAIN).stderr
    assert _previews(here) == {}
