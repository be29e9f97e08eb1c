"""Pushing a run to the hub: its newest adapter, how it was made, validation pictures and a card.

    README.md              the model card
    adapter.safetensors    and ema.safetensors, where there is one
    lycoris_config.json    the adapter's configuration
    training.json          the settings of the run
    validation/            the pictures of the run

`runs/NAME/hub.json` says what was pushed last, so that what was not can be pushed later. A push
that fails costs the training nothing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3
from PIL import Image

from manifests.errors import PipeError
from manifests.publish import make_folder, publishing, staged
from omnigen_pipe import hub
from omnigen_pipe.config import LokrConfig
from omnigen_pipe.events import Event, Events
from omnigen_pipe.images.probe import PILLOW_ERRORS
from omnigen_pipe.model_files import Model
from omnigen_pipe.runs import frozen, pictures
from omnigen_pipe.runs.card import Shown, card
from omnigen_pipe.runs.checkpoints import ADAPTER_NAME, EMA_NAME, Checkpoint, names, read
from omnigen_pipe.runs.run import Run
from omnigen_pipe.workspace import Workspace

RECORD_NAME = "hub.json"
_PICTURE_TYPES = (".png", ".jpg", ".jpeg", ".webp")
#: The path of a picture in the repository.
_PICTURE = re.compile(
    rf"{pictures.FOLDER_NAME}/step-\d+/[^/]+({'|'.join(map(re.escape, _PICTURE_TYPES))})",
    re.IGNORECASE,
)
#: Settings that are paths of this machine.
_PATHS = ("init_lora", "lycoris_config")


@dataclass(frozen=True)
class Pusher:
    """Pushes checkpoints of one run to `repository`, an OWNER/NAME that may be written to."""

    workspace: Workspace
    run: Run
    lokr: LokrConfig
    repository: str

    def push(self, checkpoint: Checkpoint) -> str:
        """Push `checkpoint` and note it in the run; returns the commit's address.

        Raises `PipeError` where it cannot be pushed.
        """
        address = self.commit(checkpoint.folder, checkpoint.position.step)
        record = _record(self.workspace, self.run, checkpoint)
        with publishing(self.workspace.staging, self.run.folder / RECORD_NAME) as unfinished:
            unfinished.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        return address

    def commit(self, folder: Path, step: int) -> str:
        """Push the files of a checkpoint, which lie in `folder`; raises `PipeError`."""
        adapters = [n for n in (ADAPTER_NAME, EMA_NAME) if (folder / n).is_file()]
        drawn = validation_pictures(self.run, step)
        samples, _ = frozen.read(self.run.samples)
        text = card(
            self.workspace,
            self.lokr,
            samples,
            name=self.run.name,
            repository=self.repository,
            step=step,
            averaged=EMA_NAME in adapters,
            pictures=[_shown(self.run, path) for path in _newest(drawn)],
        )
        files: dict[str, Path | bytes] = {
            "README.md": text.encode("utf-8"),
            "lycoris_config.json": _as_json(self.lokr.model_dump(mode="json", exclude_none=True)),
            "training.json": _as_json(self._settings(step)),
            **{name: folder / name for name in adapters},
            **{path.relative_to(self.run.folder).as_posix(): path for path in drawn},
        }
        return hub.upload(self.repository, files, f"{self.run.name}: step {step}", _is_ours)

    def _settings(self, step: int) -> dict[str, Any]:
        start = self.run.start()
        settings = {
            name: value
            for name, value in {**start.settings, **start.free}.items()
            if name not in _PATHS
        }
        return {
            "base": Model.of(self.workspace).label,
            "step": step,
            "micro_batches": start.micro_batches,
            "samples_blake3": start.samples,
            "settings": settings,
        }


class CheckpointPusher:
    """Pushes checkpoints beside the training, in a thread of its own; `tell` is a listener.

    A push begins when what is due after that step is done, so that its pictures go with it. One at
    a time: what is saved while the last one is still on its way is passed over, since a later one
    comes. Files are linked first, so that a checkpoint may be pruned meanwhile.
    """

    def __init__(self, pusher: Pusher, last_step: int, events: Events) -> None:
        """The checkpoint of `last_step` is left to who pushes the complete run; `events` are told
        of the first push that fails."""
        self._pusher = pusher
        self._last_step = last_step
        self._events = events
        self._saved: Event | None = None
        self._thread: threading.Thread | None = None
        self._failures: list[str] = []
        self._passed_over = 0

    def tell(self, event: Event) -> None:
        """Push a checkpoint that was saved, once its step's pictures are drawn or the next step is
        taken."""
        if event.name == "checkpoint" and event.fields["step"] != self._last_step:
            self._saved = event
        elif event.name in ("validation", "step") and self._saved is not None:
            saved, self._saved = self._saved, None
            self._start(int(saved.fields["step"]), str(saved.fields["folder"]))

    def _start(self, step: int, name: str) -> None:
        """Push the checkpoint in the folder `name`, unless another push is on its way."""
        if self._thread is not None and self._thread.is_alive():
            self._passed_over += 1
            return
        source = self._pusher.run.checkpoints / name
        try:
            folder = staged(self._pusher.workspace.staging, source)
            _link(source, folder)
        except (OSError, PipeError) as error:
            self._fail(step, error)
            return
        self._thread = threading.Thread(
            target=self._push, args=(folder, step), daemon=True, name="hub"
        )
        self._thread.start()

    def _push(self, folder: Path, step: int) -> None:
        try:
            self._pusher.commit(folder, step)
        except (PipeError, OSError) as error:
            self._fail(step, error)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _fail(self, step: int, error: Exception) -> None:
        failure = f"step {step}: {getattr(error, 'strerror', None) or error}"
        self._failures.append(failure)
        if len(self._failures) == 1:
            message = f"A checkpoint was not pushed, {failure}"
            self._events.send("error", kind="push", step=step, message=message)

    def wait(self) -> None:
        """Wait for the push that is on its way, if one is."""
        if self._thread is not None:
            self._thread.join()

    def close(self) -> list[str]:
        """What went wrong, in sentences; a push that is on its way is given up."""
        on_its_way = self._thread is not None and self._thread.is_alive()
        notes = []
        if on_its_way or self._saved is not None:
            notes.append("The push of a checkpoint was on its way, and was given up.")
        notes += [f"A checkpoint was not pushed, {failure}" for failure in self._failures]
        passed_over = self._passed_over + (on_its_way and self._saved is not None)
        if passed_over:
            notes.append(
                "Checkpoints that were not pushed, since one before was still on its way: "
                f"{passed_over}."
            )
        return notes


def is_pushed(workspace: Workspace, run: Run, checkpoint: Checkpoint) -> bool:
    """Whether `checkpoint` and today's pictures are what was pushed last, to where it goes now."""
    try:
        known = json.loads((run.folder / RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(known == _record(workspace, run, checkpoint))


def validation_pictures(run: Run, step: int) -> list[Path]:
    """The pictures of the run's validations up to `step`, in the order of their steps; no links."""
    return [
        path
        for _, folder in pictures.validations(run.folder, step)
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in _PICTURE_TYPES and path.is_file() and not path.is_symlink()
    ]


def _newest(drawn: list[Path]) -> list[Path]:
    """Those of the last step of `drawn`."""
    return [path for path in drawn if path.parent == drawn[-1].parent]


def _shown(run: Run, path: Path) -> Shown:
    """A picture for the card, with what it says of itself, where it does."""
    said: dict[Any, Any] = {}
    with suppress(*PILLOW_ERRORS, Image.DecompressionBombError), Image.open(path) as picture:
        said = picture.info
    prompt = said.get("prompt")
    return Shown(
        path.relative_to(run.folder).as_posix(),
        prompt if isinstance(prompt, str) else "",
        said.get("adapter") == EMA_NAME,
    )


def _record(workspace: Workspace, run: Run, checkpoint: Checkpoint) -> dict[str, Any]:
    hasher = blake3()
    for path in validation_pictures(run, checkpoint.position.step):
        hasher.update(path.relative_to(run.folder).as_posix().encode() + b"\0")
        hasher.update(path.read_bytes())
    return {
        "hub_model_id": workspace.config.hub.hub_model_id,
        "step": checkpoint.position.step,
        "adapter": checkpoint.hashes[ADAPTER_NAME],
        "pictures": hasher.hexdigest(),
    }


def _is_ours(name: str) -> bool:
    """Whether a file of the repository is one that only some pushes bring, of this run or another:
    the average, or a picture of a validation."""
    return name == EMA_NAME or _PICTURE.fullmatch(name) is not None


def _link(source: Path, folder: Path) -> None:
    """The adapters of a checkpoint once more, in `folder`, as links or else copies."""
    make_folder(folder)
    for name in (ADAPTER_NAME, EMA_NAME):
        if not (source / name).is_file():
            continue
        try:
            os.link(source / name, folder / name)
        except OSError:  # a file system without links
            shutil.copyfile(source / name, folder / name)


def _as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode("utf-8")


def newest(run: Run) -> Checkpoint | None:
    """The newest checkpoint by its name, whose files are not looked at; None where it is none."""
    found = names(run.checkpoints)
    try:
        return read(run.checkpoints / found[-1]) if found else None
    except PipeError:
        return None


def check(workspace: Workspace) -> str:
    """The repository that may be written to; raises `UsageError` as `hub.check_writable` does."""
    config = workspace.config.hub
    assert config.hub_model_id is not None  # the configuration is checked
    return hub.check_writable(config.hub_model_id, config.model_card_private)
