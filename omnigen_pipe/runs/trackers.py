"""Trackers: TensorBoard and Weights & Biases, shown the same things by the same few calls.

What they hold is in the run's own files, too: a tracker is for looking at it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from manifests.errors import PipeError, UsageError, WriteError, first_line
from manifests.publish import new_id, publishing

#: Of the folder of events, and of the file that holds the id that wandb knows a run by.
_TENSORBOARD, _WANDB_ID = "tensorboard", "wandb-id.json"
#: Seconds in which, at the end, wandb may send what it has not sent: it lies in the run's folder.
_WANDB_PATIENCE = 120.0
_NO_WANDB = (
    "report_to names wandb, which is not installed: `pip install 'omnigen-pipe[wandb]'`, or set "
    'report_to = "tensorboard".'
)


class Tracker(Protocol):
    """What is shown a run, step by step; steps are those that are done."""

    def describe(self, configuration: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        """Show the whole configuration and what the run's data are, once in a run's life."""
        ...

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Show numbers by name."""
        ...

    def picture(self, step: int, name: str, path: Path, caption: str) -> None:
        """Show the picture in the file `path`."""
        ...

    def flush(self) -> None:
        """Bring what was shown to where it outlives this process, however that ends."""
        ...

    def close(self, failed: bool) -> None:
        """Bring everything to where it is kept; `failed` where an error ends the run."""
        ...


def check_trackers(report_to: str) -> None:
    """Raise `UsageError` where what `report_to` names is not installed."""
    if report_to in ("wandb", "all"):
        try:
            version("wandb")
        except PackageNotFoundError as error:
            raise UsageError(_NO_WANDB) from error


def opened(
    report_to: str,
    folder: Path,
    staging: Path,
    steps_done: int,
    project: str,
    say: Callable[[str], object],
) -> list[Tracker]:
    """The trackers that `report_to` names, of the run in `folder` that goes on after `steps_done`.

    `say` is told where wandb fails later on, which ends no training. Raises `PipeError` where it
    does not start.
    """
    trackers: list[Tracker] = []
    if report_to in ("wandb", "all"):  # first, for it may fail
        trackers.append(Wandb(folder, staging, steps_done, project, say))
    if report_to in ("tensorboard", "all"):
        trackers.append(TensorBoard(folder / _TENSORBOARD, steps_done))
    return trackers


class TensorBoard:
    """Event files in `folder`, without what a resumed run shows again after `steps_done`."""

    def __init__(self, folder: Path, steps_done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        self._steps_done = steps_done
        self._is_new = steps_done == 0 or not folder.is_dir()
        self._thread_hook = threading.excepthook
        threading.excepthook = self._thread_failed
        # A beginning takes back the evaluation before the first step, too.
        self._writer: Any = SummaryWriter(
            log_dir=str(folder), purge_step=steps_done + 1 if steps_done else 0
        )

    def _thread_failed(self, args: threading.ExceptHookArgs) -> None:
        """Say nothing of a disk that is full for TensorBoard's thread: the next write raises it."""
        if not isinstance(args.exc_value, OSError):
            self._thread_hook(args)

    def describe(self, configuration: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        """See `Tracker`: two texts."""
        if not self._is_new:
            return
        for name, entries in (("configuration", configuration), ("data", data)):
            text = json.dumps(entries, indent=2, ensure_ascii=False)
            indented = "".join(f"    {line}\n" for line in text.splitlines())  # Markdown's code
            self._write("add_text", name, indented, self._steps_done)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        for name, value in values.items():
            self._write("add_scalar", name, value, step)

    def picture(self, step: int, name: str, path: Path, caption: str) -> None:
        """See `Tracker`; TensorBoard shows no caption."""
        import numpy as np
        from PIL import Image

        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        self._write("add_image", name, pixels, step, dataformats="HWC")

    def _write(self, method: str, *values: Any, **options: Any) -> None:
        try:
            getattr(self._writer, method)(*values, **options)
        except OSError as error:
            raise WriteError(self._folder, error) from error

    def flush(self) -> None:
        """See `Tracker`: into the file, which a thread does by itself within two minutes."""
        self._write("flush")

    def close(self, failed: bool) -> None:
        """See `Tracker`."""
        threading.excepthook = self._thread_hook
        try:
            self._writer.close()
        except OSError as error:
            raise WriteError(self._folder, error) from error


class Wandb:
    """A run of Weights & Biases, online or, with WANDB_MODE=offline, in `folder/wandb/`.

    It keeps its id over resumes. Of steps that it knows already it takes nothing more: a resumed
    run shows it only those after them, and says so.
    """

    def __init__(
        self,
        folder: Path,
        staging: Path,
        steps_done: int,
        project: str,
        say: Callable[[str], object],
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UsageError(f"{_NO_WANDB} ({error})") from error

        self._wandb: Any = wandb
        self._say = say
        self._failed = False
        settings: dict[str, Any] = {"silent": True, "console": "off"}
        settings |= {"disable_git": True, "save_code": False}
        if "finish_timeout" in wandb.Settings.model_fields:  # older ones wait without end
            settings["finish_timeout"] = _WANDB_PATIENCE
        run_id = _wandb_id(folder / _WANDB_ID, staging, steps_done)
        try:
            self._run: Any = wandb.init(
                project=project,
                name=folder.name,
                id=run_id,
                resume="allow",
                dir=str(folder),
                settings=wandb.Settings(**settings),
            )
        # Not all that wandb raises is a wandb.Error: where its service does not answer it is not.
        except Exception as error:
            raise PipeError(
                f"wandb did not start: {first_line(error)}. Log in by `wandb login`, set "
                'WANDB_MODE=offline, or set report_to = "tensorboard".'
            ) from error
        last = self._run.step - 1  # its step is the next one that it takes
        if last > steps_done:
            say(
                f"wandb knows this run up to step {last}, and can take nothing back: it goes on "
                f"showing its old numbers and pictures of the steps {steps_done + 1} to {last}, "
                "and none of what is trained now, which is the same only where no setting was "
                "changed. metrics.jsonl has what is trained now. To see it in wandb, as a run of "
                f"its own: stop, delete {folder / _WANDB_ID}, and start again."
            )

    def describe(self, configuration: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        """See `Tracker`: as the run's config, where a resumed run's takes the old one's place."""
        entries = {"configuration": dict(configuration), "data": dict(data)}
        self._show(lambda: self._run.config.update(entries, allow_val_change=True))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._show(lambda: self._log(step, dict(values)))

    def picture(self, step: int, name: str, path: Path, caption: str) -> None:
        """See `Tracker`."""
        self._show(lambda: self._log(step, {name: self._wandb.Image(str(path), caption=caption)}))

    def flush(self) -> None:
        """See `Tracker`: its service has it, which is a process of its own."""

    def _log(self, step: int, values: dict[str, Any]) -> None:
        if values and step >= self._run.step:  # what lies before can be added to no more
            self._run.log(values, step=step)

    def _show(self, show: Callable[[], object]) -> None:
        """Show something, unless something failed before: all of it is in the run's own files, and
        the training is worth more."""
        if not self._failed:
            self._works(show)

    def _works(self, act: Callable[[], object]) -> bool:
        """Whether `act` does not fail; the first failure is said."""
        try:
            act()
        # As above; and its teardown ends the process where its service ended badly.
        except (Exception, SystemExit) as error:  # noqa: BLE001
            if not self._failed:
                self._say(
                    "wandb has failed, and is shown no more of this run until it goes on: "
                    f"{first_line(error)}"
                )
            self._failed = True
            return False
        return True

    def close(self, failed: bool) -> None:
        """See `Tracker`: what could not be sent lies in its folder."""
        code = int(failed)
        if not self._works(lambda: self._run.finish(exit_code=code)):
            # Where its service is gone, a hook of its own would print that when the process ends.
            self._works(lambda: self._wandb.teardown(exit_code=code))


def _wandb_id(path: Path, staging: Path, steps_done: int) -> str:
    """The id of the run, which is written to `path` when the run begins."""
    if steps_done:
        with suppress(OSError, ValueError, KeyError, TypeError):
            return str(json.loads(path.read_text("utf-8"))["id"])
    fresh = new_id()
    with publishing(staging, path) as unfinished:
        unfinished.write_text(json.dumps({"id": fresh}) + "\n", "utf-8")
    return fresh
