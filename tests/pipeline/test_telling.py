"""Runs that are pushed to a hub and told to webhooks, both servers on this machine."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import close_session
from listening import SECRET, listener
from PIL import Image, PngImagePlugin
from pipeline_project import Project
from training_project import change, draw_turned, run_first_four

from manifests.errors import PipeError
from omnigen_pipe import hub, webhooks
from omnigen_pipe.training import loop, session
from omnigen_pipe.training.validation import Validator
from writable_hub import TOKEN, State, writable_hub

REPOSITORY = "tester/cats"
HUB = f"""
[hub]
push_to_hub = true
hub_model_id = "{REPOSITORY}"
model_card_private = true
model_card_note = "Only a test."
"""

PICTURES = """
[validation]
validation_prompt = "a zxq cat"
validation_step_interval = 2
validation_num_inference_steps = 1
validation_resolution = "32x32"
"""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[State]:
    with writable_hub() as state:
        monkeypatch.setattr(constants, "ENDPOINT", state.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(hub, "PAUSES", ())
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        close_session()
        yield state
        close_session()


def prepared(project: Callable[..., Project], folder: Path, extra: str, **train: object) -> Project:
    pictures = folder / "private pictures"
    draw_turned(pictures, 4)
    dataset = {"caption_strategy": "instanceprompt", "instance_prompt": "a zxq cat"}
    here = project(pictures, dataset=dataset, train={"max_train_steps": 2, **train}, extra=extra)
    run_first_four(here)
    return here


def everything(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_a_complete_run_is_pushed_once(
    project: Callable[..., Project], tmp_path: Path, server: State
) -> None:
    """And again once there are other pictures."""
    here = prepared(project, tmp_path, HUB, use_ema=True)
    here.run("train")
    pictures = here.root / "runs" / "default" / "validation" / "step-000002"
    pictures.mkdir(parents=True)
    said = PngImagePlugin.PngInfo()
    said.add_itxt("prompt", "a [zxq]:\ncat")
    said.add_itxt("adapter", "ema.safetensors")
    Image.new("RGB", (8, 8)).save(pictures / "a cat.png", pnginfo=said)
    done = here.run("train")
    assert server.repositories == {REPOSITORY: True}
    assert server.commits == ["default: step 2"] * 2
    assert "Pushed: http" in done.stdout
    checkpoint = here.root / "runs" / "default" / "checkpoints" / "step-00000002"
    for name in ("adapter.safetensors", "ema.safetensors"):
        assert server.files[name] == (checkpoint / name).read_bytes()
    picture = "validation/step-000002/a cat.png"
    assert server.files[picture] == (pictures / "a cat.png").read_bytes()
    assert json.loads(server.files["lycoris_config.json"])["algo"] == "lokr"
    assert json.loads(server.files["training.json"])["settings"]["max_train_steps"] == 2

    card = server.files["README.md"].decode()
    for wanted in (
        "license: mit",
        "instance_prompt: a zxq cat",
        "Only a test.",
        "`a zxq cat`",
        "| main | train | 4 | 4 |",
        "64x64 (4)",
        "![a \\[zxq\\]: cat (of the average)](validation/step-000002/a%20cat.png)\\\n"
        "a \\[zxq\\]: cat (of the average)\n",
        f"hf download {REPOSITORY} adapter.safetensors",
        "ema.safetensors",
    ):
        assert wanted in card, wanted
    assert ModelCard(card).data.to_dict()["widget"] == [
        {
            "text": "a [zxq]: cat (of the average)",
            "output": {"url": "validation/step-000002/a%20cat.png"},
        }
    ]
    texts = [content for name, content in server.files.items() if not name.endswith(".png")]
    assert str(tmp_path).encode() not in b"".join(texts)
    assert b"private pictures" not in b"".join(texts)
    kept = everything(here.root) + (done.stdout + done.stderr).encode()
    assert TOKEN.encode() not in kept + b"".join(server.files.values())

    server.requests.clear()
    assert "complete" in here.run("train").stdout
    assert "up to date" in here.run("run").stdout
    assert server.requests == []  # what is pushed is known without the hub


def test_a_push_takes_out_what_the_run_before_has_left(
    project: Callable[..., Project], tmp_path: Path, server: State
) -> None:
    server.files = {
        name: b"of another run"
        for name in ("ema.safetensors", "validation/step-000900/a-8x8.png", "samples.zip")
    }
    prepared(project, tmp_path, HUB).run("train")
    assert sorted(server.files) == [
        "README.md",
        "adapter.safetensors",
        "lycoris_config.json",
        "samples.zip",
        "training.json",
    ]


def test_a_push_that_fails_is_made_up_for_later(
    project: Callable[..., Project], tmp_path: Path, server: State
) -> None:
    here = prepared(project, tmp_path, HUB)
    server.refusals["commit"] = [500, 403]
    done = here.run("train", status=1)
    assert "complete and saved, and was not pushed" in done.stdout
    assert "omnigen-pipe train" in done.stdout
    adapter = here.root / "runs/default/checkpoints/step-00000002/adapter.safetensors"
    trained = adapter.read_bytes()
    here.run("train", status=1)
    assert server.commits == []
    found = here.json("train")
    assert (found["counts"]["steps now"], found["failed"]) == (0, False)
    assert server.files["adapter.safetensors"] == trained == adapter.read_bytes()


@pytest.mark.parametrize(("action", "status"), [("whoami", 401), ("may_write", 403)])
def test_a_refusal_comes_before_training(
    project: Callable[..., Project], tmp_path: Path, server: State, action: str, status: int
) -> None:
    here = prepared(project, tmp_path, HUB)
    for command in ("train", "run"):
        server.refusals[action] = [status]
        done = here.run(command, status=2)
        assert "push_to_hub" in done.stderr
        assert not list((here.root / "runs").glob("*/checkpoints/*"))
    assert server.commits == []


def test_checkpoints_are_pushed_beside_the_training(
    project: Callable[..., Project], tmp_path: Path, server: State
) -> None:
    """At least the first one; and a push that fails is said, and fails nothing."""
    with listener() as (address, got):
        hook = f'[[webhook]]\nurl = "{address}"\nevents = ["error"]\n'
        extra = HUB + "push_checkpoints_to_hub = true\n" + hook
        options = {"checkpoint_step_interval": 2, "checkpoints_total_limit": 1}
        here = prepared(project, tmp_path, extra, max_train_steps=4, **options)
        here.run("train")
        assert server.commits == ["default: step 2", "default: step 4"]

        change(here, max_train_steps=8)
        server.refusals["preupload"] = [403]
        done = here.run("train")
    assert [(event["kind"], event["step"]) for event in got] == [("push", 6)]
    assert got[0]["message"].startswith("A checkpoint was not pushed, step 6: ")
    assert "A checkpoint was not pushed, step 6" in done.stdout
    assert server.commits[-1] == "default: step 8"
    assert not [path for path in (here.root / "staging").rglob("*") if path.is_file()]


def test_a_checkpoint_is_pushed_with_the_pictures_of_its_step(
    project: Callable[..., Project], tmp_path: Path, server: State
) -> None:
    extra = HUB + "push_checkpoints_to_hub = true\n" + PICTURES
    here = prepared(project, tmp_path, extra, max_train_steps=4, checkpoint_step_interval=2)
    seen: dict[str, list[str]] = {}
    upload = hub.upload

    def seeing(repository: str, files: dict[str, Any], message: str, *rest: Any) -> str:
        seen[message] = sorted(files)
        return upload(repository, files, message, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "upload", seeing)
        here.run("train")
    steps = [name.split("/")[1] for name in seen["default: step 2"] if "/" in name]
    assert steps == ["step-000000", "step-000002"]


def test_webhooks_are_told_and_their_addresses_are_nowhere(
    project: Callable[..., Project], tmp_path: Path
) -> None:
    with listener() as (address, got):
        extra = f"""
[[webhook]]
url = "{address}"
events = ["start", "step", "checkpoint", "end", "error"]
step_interval = 2
"""
        here = prepared(project, tmp_path, extra, max_train_steps=4, checkpoint_step_interval=3)
        done = here.run("train")
        told = [(event["event"], event.get("step")) for event in got]
        assert told == [
            ("start", 0),
            ("step", 2),
            ("checkpoint", 3),
            ("step", 4),
            ("checkpoint", 4),
            ("end", 4),
        ]
        assert {event["run"] for event in got} == {"default"}
        assert got[1]["loss"] > 0
        here.run("train")
        assert len(got) == 6  # of a run that is complete there is nothing to tell

        copy = here.root / "runs" / "default" / "config.toml"
        assert "[[webhook]]" in copy.read_text()
        assert SECRET.encode() not in everything(here.root / "runs")
        assert SECRET not in done.stdout + done.stderr


def test_webhooks_get_the_validation_pictures_as_files(
    project: Callable[..., Project], tmp_path: Path
) -> None:
    with listener() as (address, got):
        hook = f'[[webhook]]\nurl = "{address}"\nevents = ["validation"]\n'
        here = prepared(project, tmp_path, PICTURES + hook)
        here.run("train")
        assert [(event["event"], event["step"], event["drawn"]) for event in got] == [
            ("validation", 0, 1),
            ("validation", 2, 1),
        ]
        for event in got:
            folder = here.root / "runs/default/validation" / f"step-{event['step']:06}"
            assert event["files"] == {path.name: path.read_bytes() for path in folder.iterdir()}


def at_call(number: int, function: Callable[..., Any], then: Callable[[], Any]) -> Any:
    """`function`, which does `then` before its call of this `number`, counted from 1."""
    calls = count(1)

    def counting(*arguments: Any, **options: Any) -> Any:
        if next(calls) == number:
            then()
        return function(*arguments, **options)

    return counting


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM]
)
def test_a_signal_while_the_run_is_pushed_is_told_and_costs_only_the_push(
    project: Callable[..., Project], tmp_path: Path, server: State, number: signal.Signals
) -> None:
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with listener() as (address, got):
        hook = f'[[webhook]]\nurl = "{address}"\nevents = ["end", "error"]\n'
        here = prepared(project, tmp_path, HUB + hook)
        with pytest.MonkeyPatch.context() as patch:
            stopping = at_call(1, hub.upload, lambda: os.kill(os.getpid(), number))
            patch.setattr(hub, "upload", stopping)
            done = here.run("train", status=128 + number)
        assert [(e["event"], e["step"], e["signal"]) for e in got] == [("end", 2, number)]
    assert "The run is complete and saved." in done.stdout
    assert server.commits == []
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert here.json("train")["counts"]["steps now"] == 0
    assert server.commits == ["default: step 2"]


def test_signals_that_cannot_wait_for_a_step_are_told(
    project: Callable[..., Project], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the model is loaded, and a second one in a step."""

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    def interrupt_twice() -> None:
        interrupt()
        interrupt()

    with listener() as (address, got):
        hook = f'[[webhook]]\nurl = "{address}"\nevents = ["start", "end", "error"]\n'
        here = prepared(project, tmp_path, hook, max_train_steps=4, checkpoint_step_interval=1)
        monkeypatch.setattr(session, "load_trainee", at_call(1, session.load_trainee, interrupt))
        assert "No checkpoint was saved yet" in here.run("train", status=130).stdout
        monkeypatch.setattr(loop, "_take", at_call(3, loop._take, interrupt_twice))
        assert "The newest checkpoint is of step 2." in here.run("train", status=130).stdout
    assert [(event["event"], event["step"], event.get("signal")) for event in got] == [
        ("start", 0, None),
        ("end", 0, signal.SIGINT),
        ("start", 0, None),
        ("end", 2, signal.SIGINT),
    ]


def test_an_error_says_what_became_of_the_push_that_was_on_its_way(
    project: Callable[..., Project],
    tmp_path: Path,
    server: State,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    extra = HUB + "push_checkpoints_to_hub = true\n"
    here = prepared(project, tmp_path, extra, max_train_steps=4, checkpoint_step_interval=1)
    server.gates["preupload"] = threading.Event()
    server.refusals["preupload"] = [403]

    def fail() -> None:
        raise PipeError("The step has failed.")

    monkeypatch.setattr(loop, "_take", at_call(4, loop._take, fail))
    said = here.run("train", status=1).stderr
    server.gates["preupload"].set()
    for thread in threading.enumerate():
        if thread.name == "hub":
            thread.join(60)
    assert "The push of a checkpoint was on its way, and was given up." in said
    assert "since one before was still on its way: 2." in said
    assert "The step has failed." in said


@pytest.mark.parametrize("heard", [False, True])
def test_a_picture_that_is_moved_away_ends_no_run(
    project: Callable[..., Project],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    heard: bool,
) -> None:
    """It is read back for whoever listens, and for nobody else."""

    def moving(validator: Validator, step: int, *_: Any) -> dict[str, Any]:
        for path in validator.folder.glob(f"validation/step-{step:06}/*.png"):
            path.unlink()
        return {}

    monkeypatch.setattr(Validator, "_scores", moving)
    with listener() as (address, got):
        hook = f'[[webhook]]\nurl = "{address}"\nevents = ["validation"]\n'
        here = prepared(project, tmp_path, PICTURES + hook * heard)
        said = here.run("train").stderr
    assert [event["drawn"] for event in got] == ([1, 1] if heard else [])
    assert ("is sent to no webhook" in said) == heard
    assert not any("files" in event for event in got)


def test_an_error_is_told_and_ends_as_ever(
    project: Callable[..., Project], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with listener() as (address, got):
        monkeypatch.setenv("HOOK", address)
        here = prepared(project, tmp_path, '\n[[webhook]]\nurl_env = "HOOK"\n')
        for tar in here.root.glob("latents/*/*.tar"):
            tar.unlink()
        here.run("train", status=1)
        assert [event["event"] for event in got] == ["error"]
        assert "encode-vae" in got[0]["message"]


def test_a_webhook_that_fails_costs_the_training_nothing(
    project: Callable[..., Project], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "PAUSES", ())
    with listener(500) as (address, _):
        monkeypatch.setenv("HOOK", address)
        here = prepared(project, tmp_path, '\n[[webhook]]\nurl_env = "HOOK"\n')
        done = here.run("train")
    assert "3 of 3 events did not reach webhook 1 (127.0.0.1) (3: HTTP 500)." in done.stdout


@pytest.mark.parametrize(
    "table",
    [
        '[[webhook]]\nurl_env = "NOT_THERE"',
        f'[[webhook]]\nurl = "{SECRET}"',
        f'[[webhook]]\nurl = "https://a.test/{SECRET}"\nurl_env = "B"',
        f'[webhook]\nurl = "https://a.test/{SECRET}"',
        f'[[webhook]]\nurl = ["https://a.test/{SECRET}"]',
        f'[[webhook]]\nevents = "https://a.test/{SECRET}"',
    ],
)
def test_a_wrong_webhook_is_said_before_anything_and_not_shown(
    project: Callable[..., Project], tmp_path: Path, table: str
) -> None:
    here = project(tmp_path, extra=f"\n{table}\n")
    done = here.run("train", status=2)
    assert "webhook" in done.stderr
    assert SECRET not in done.stderr + done.stdout
