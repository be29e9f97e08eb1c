"""Trackers: the real wandb, offline, where it is installed; and what is said where it is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from unittest.mock import Mock

import pytest
from PIL import Image
from pydantic import BaseModel

from manifests.errors import PipeError, UsageError
from omnigen_pipe.runs import trackers


def test_wandb_offline_keeps_pictures_and_its_id_over_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The picture's file to the byte; and it prints nothing."""
    pytest.importorskip("wandb")
    folder, picture = offline(tmp_path, monkeypatch), tmp_path / "a.png"
    Image.radial_gradient("L").convert("RGB").save(picture)
    for done in (0, 2):
        (tracker,) = trackers.opened("wandb", folder, tmp_path / "staging", done, "project", print)
        tracker.describe({"train": {"seed": done}}, {"samples": {"train": 1}})
        tracker.scalars(done + 1, {"train/loss": 1.0})
        tracker.picture(done + 1, "validation/a-8x8", picture, "a")
        tracker.close(False)
    kept = list(folder.glob("wandb/offline-run-*/files/media/images/validation/*.png"))
    assert [path.read_bytes() for path in kept] == [picture.read_bytes()] * 2
    assert len({path.stem for path in folder.glob("wandb/*/run-*.wandb")}) == 1
    assert capfd.readouterr() == ("", "")


def test_wandb_is_told_the_configuration_the_data_and_the_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the file that it sends later, as its own protocol says it."""
    wandb = pytest.importorskip("wandb")
    folder = offline(tmp_path, monkeypatch)
    (tracker,) = trackers.opened("wandb", folder, tmp_path / "staging", 0, "odd-project", print)
    tracker.describe({"train": {"seed": 4711}}, {"odd-data": {"train": 4712}})
    tracker.scalars(1, {"odd/loss": 47.13})
    tracker.close(False)
    wandb.teardown()  # waits for its service, which writes the file
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    kept = file.read_bytes()
    for said in (b"odd-project", b"odd-run", b"4711", b"odd-data", b"4712", b"odd/loss", b"47.13"):
        assert said in kept, said


class OldSettings(BaseModel, extra="forbid"):
    """What is used of the wandb.Settings of 0.25, which has no finish_timeout."""

    silent: bool
    console: str
    disable_git: bool
    save_code: bool


def test_a_wandb_that_knows_no_finish_timeout_is_given_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(wandb, "Settings", OldSettings)
    init = Mock(return_value=Mock(step=0))
    monkeypatch.setattr(wandb, "init", init)
    trackers.opened("wandb", tmp_path / "run", tmp_path / "staging", 0, "project", print)
    assert init.call_args.kwargs["settings"].silent


def test_whatever_wandb_cannot_start_for_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its service does not answer it raises a plain Exception."""
    wandb = pytest.importorskip("wandb")

    def silent_service(**_: object) -> None:
        raise Exception("Failed to connect to the service\nand more")

    monkeypatch.setattr(wandb, "init", silent_service)
    with pytest.raises(PipeError, match="did not start: Failed to connect to the service"):
        trackers.opened("wandb", tmp_path / "run", tmp_path / "staging", 0, "project", print)


def test_where_wandb_s_service_is_gone_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed, as where memory is short. TensorBoard is shown the rest."""
    pytest.importorskip("wandb")
    folder, said = offline(tmp_path, monkeypatch), []
    both = trackers.opened("all", folder, tmp_path / "staging", 0, "project", said.append)
    assert {type(each) for each in both} == {trackers.TensorBoard, trackers.Wandb}
    for each in both:
        each.scalars(1, {"train/loss": 1.0})
    for process in services():
        os.kill(process, signal.SIGKILL)
    for step in (2, 3):
        for each in both:
            each.scalars(step, {"train/loss": 1.0})
    for each in both:
        each.close(True)
    (sentence,) = said
    assert sentence.startswith("wandb has failed, and is shown no more of this run")
    assert list(folder.glob("tensorboard/events.*"))


def offline(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run; wandb reaches no network, and keeps its own files here."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(root / "home"))
    folder = root / "odd-run"
    folder.mkdir()
    return folder


def services() -> list[int]:
    """wandb's own processes, below this one."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                fields = (entry / "stat").read_text().rsplit(")", 1)
                if "wandb-core" in fields[0] and int(fields[1].split()[1]) == os.getpid():
                    found.append(int(entry.name))
    assert found
    return found


_KILLED = """
import os, signal, sys
from pathlib import Path
from test_trackers import services
from omnigen_pipe.runs import trackers
root = Path(sys.argv[1])
(tracker,) = trackers.opened("wandb", root / "odd-run", root / "staging", 0, "project", print)
tracker.scalars(1, {"train/loss": 1.0})
for process in services():
    os.kill(process, signal.SIGKILL)
tracker.close(False)
"""


def test_where_wandb_s_service_is_gone_the_process_ends_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is known at the end at the latest, and said in one sentence."""
    pytest.importorskip("wandb")
    offline(tmp_path, monkeypatch)
    here = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    ended = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": here},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0
    assert "Traceback" not in ended.stderr  # wandb may say in a line of its own what was lost
    (sentence,) = ended.stdout.splitlines()
    assert sentence.startswith("wandb has failed")


@pytest.mark.parametrize("failed", [False, True])
def test_a_run_is_finished_though_something_was_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failed: bool
) -> None:
    """And wandb is told how it ended; its service lives, and is left alone."""
    wandb = pytest.importorskip("wandb")
    run = Mock(step=0)
    run.log.side_effect = ValueError("no room")
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    monkeypatch.setattr(wandb, "teardown", pytest.fail)
    said: list[str] = []
    (tracker,) = trackers.opened("wandb", tmp_path / "r", tmp_path / "s", 0, "p", said.append)
    for step in (1, 2):
        tracker.scalars(step, {"train/loss": 1.0})
    tracker.close(failed)
    assert [sentence.rsplit(": ", 1)[1] for sentence in said] == ["no room"]
    run.log.assert_called_once()
    run.finish.assert_called_once_with(exit_code=int(failed))


@pytest.mark.parametrize(("done", "known"), [(500, 501), (500, 950), (500, 502), (0, 0)])
def test_steps_that_wandb_keeps_as_they_were_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int, known: int
) -> None:
    """`known` is the next step that it takes; it is told no step before, and all from there on."""
    wandb = pytest.importorskip("wandb")
    run = Mock(step=known)
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    said: list[str] = []
    (tracker,) = trackers.opened("wandb", tmp_path / "r", tmp_path / "s", done, "p", said.append)
    for step in range(done + 1, done + 5):
        tracker.scalars(step, {"train/loss": 1.0})
    expected = [step for step in range(done + 1, done + 5) if step >= known]
    assert [call.kwargs["step"] for call in run.log.call_args_list] == expected
    dropped = known > done + 1
    assert [f"the steps {done + 1} to {known - 1}," in sentence for sentence in said] == (
        [True] if dropped else []
    )
    if dropped:
        assert str(tmp_path / "r" / "wandb-id.json") in said[0]


_SHOWN = """
import os, signal, sys
from pathlib import Path
from omnigen_pipe.runs import metrics, trackers
root, act = Path(sys.argv[1]), sys.argv[2]
writer = metrics.MetricsWriter(root, trackers.opened("tensorboard", root, root, 0, "p", print))
for step in range(1, 6):
    writer.write(step, {"loss": float(step)})
os.fsync = lambda _: None  # it takes time, in which TensorBoard's thread may write by itself
if act == "flush":
    writer.flush()
elif act == "picture":
    writer.show_picture(5, "validation/a", root / "a.png", "a")
elif act == "scores":
    writer.write_scores(5, {}, {"clip/a": 20.0})
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    ("act", "tag"),
    [("flush", "train/loss"), ("picture", "validation/a"), ("scores", "clip/a")],
)
def test_what_is_flushed_outlives_a_kill(tmp_path: Path, act: str, tag: str) -> None:
    """Also what a thread of TensorBoard had not written by then."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Image.radial_gradient("L").save(tmp_path / "a.png")
    killed = subprocess.run(
        [sys.executable, "-c", _SHOWN, str(tmp_path), act],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [each.step for each in events.Scalars("train/loss")] == [1, 2, 3, 4, 5]
    kept = events.Images(tag) if act == "picture" else events.Scalars(tag)
    assert kept[-1].step == 5


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(trackers, "version", missing)
    for report_to in ("none", "tensorboard"):
        trackers.check_trackers(report_to)
    for report_to in ("wandb", "all"):
        with pytest.raises(UsageError, match=r"pip install 'omnigen-pipe\[wandb\]'"):
            trackers.check_trackers(report_to)
