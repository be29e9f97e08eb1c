"""A run: one training's folder, with its frozen inputs, checkpoints and logs.

    runs/<name>/
        samples.arrow        the frozen samples
        run.json             the settings, frozen too, and on what the run was started
        config.toml          the configuration as it was at the start
        checkpoints/         see `checkpoints`
        metrics.jsonl        one line per optimizer step
        evaluations.jsonl    one line per evaluation
        scores.jsonl         one line per validation whose pictures are scored
        training.lock        held by the command that trains
        variance.json        the latents' own variance, measured at the first start
        tensorboard/

A run goes on only with the settings it started with where another value would change what it
means; what may change (learning rate, intervals, logging) is said and taken.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from blake3 import blake3

from manifests.errors import PipeError, UsageError
from manifests.lock import holder, locked, sign
from manifests.publish import publishing
from omnigen_pipe.config import CONFIG_NAME, LokrConfig
from omnigen_pipe.runs import checkpoints
from omnigen_pipe.runs.checkpoints import Checkpoint
from omnigen_pipe.runs.configuration_copy import without_addresses
from omnigen_pipe.runs.terms import check_settings, free_settings, frozen_settings, taken_changes
from omnigen_pipe.workspace import Workspace

SETTINGS_NAME = "run.json"
VARIANCE_NAME = "variance.json"
LOCK_NAME = "training.lock"


@dataclass(frozen=True)
class Start:
    """What `run.json` holds: settings that are frozen and those that were free to change, the
    micro-batches per global batch, the BLAKE3 of the frozen samples, and `conditions`, on which
    the last bits of a loss depend (versions, device, threads, processes)."""

    settings: dict[str, Any]
    free: dict[str, Any]
    micro_batches: int
    samples: str
    conditions: dict[str, str]


@dataclass(frozen=True)
class Run:
    """The folder of one run."""

    name: str
    folder: Path

    @property
    def samples(self) -> Path:
        """The frozen samples."""
        return self.folder / "samples.arrow"

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.folder / "checkpoints"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within it no other command trains this run; raises `UsageError` where one does.

        On a file system without locks it cannot be known, and nothing is refused.
        """
        with locked(self.folder / LOCK_NAME) as lock:
            if lock.held is False:
                raise UsageError(
                    f"Another command is training the run `{self.name}` now: "
                    f"{holder(lock.handle)}. Wait for it or stop it, or set another "
                    "tracker_run_name."
                )
            sign(lock.handle)
            yield

    def has_begun(self) -> bool:
        """Whether it has a checkpoint; until then it may be frozen anew.

        Raises `PipeError` where there are checkpoints, but not what they were trained on.
        """
        if not checkpoints.names(self.checkpoints):
            return False
        for path in (self.samples, self.folder / SETTINGS_NAME):
            if not path.is_file():
                raise PipeError(
                    f"The run `{self.name}` has checkpoints, but {path} is gone. Restore it, or "
                    "set another tracker_run_name to start a new run."
                )
        return True

    def start(self) -> Start:
        """What it was started with; raises `PipeError` where that or the samples are damaged."""
        path = self.folder / SETTINGS_NAME
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
            found = Start(**{name: entries[name] for name in Start.__dataclass_fields__})
            kinds = [(found.settings, dict), (found.free, dict), (found.conditions, dict)]
            for value, kind in [*kinds, (found.micro_batches, int), (found.samples, str)]:
                if not isinstance(value, kind):
                    raise TypeError(f"{value!r} is no {kind.__name__}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PipeError(
                f"{path} cannot be read: {error!r}. Restore it, or set another tracker_run_name "
                "to start a new run."
            ) from error
        try:
            digest = blake3().update_mmap(self.samples).hexdigest()
        except OSError as error:
            why = error.strerror or error  # of blake3 only a text
            raise PipeError(f"{self.samples} cannot be read: {why}.") from error
        if digest != found.samples:
            raise PipeError(
                f"{self.samples} is damaged: it is not what the run `{self.name}` was started "
                "with. Restore it, or set another tracker_run_name to start a new run."
            )
        return found

    def write_start(self, workspace: Workspace, start: Start) -> None:
        """Publish `run.json`."""
        with publishing(workspace.staging, self.folder / SETTINGS_NAME) as unfinished:
            unfinished.write_text(json.dumps(asdict(start), indent=2) + "\n", "utf-8")

    def begin(
        self, workspace: Workspace, lokr: LokrConfig, processes: int, freeze: Callable[[], object]
    ) -> Start:
        """Freeze the run: its samples by `freeze`, then the settings, which the samples' hash
        seals; with a copy of the configuration file where there is one."""
        config = workspace.config.train
        source = workspace.root / CONFIG_NAME
        if source.exists():
            text = without_addresses(source.read_text("utf-8"), workspace.config.webhook)
            with publishing(workspace.staging, self.folder / "config.toml") as copy:
                copy.write_text(text, "utf-8", newline="")
        # Of an earlier start that came to no checkpoint, perhaps on other data.
        (self.folder / VARIANCE_NAME).unlink(missing_ok=True)
        freeze()
        start = Start(
            frozen_settings(config, lokr),
            free_settings(config),
            config.gradient_accumulation_steps * processes,
            blake3().update_mmap(self.samples).hexdigest(),
            {},
        )
        self.write_start(workspace, start)
        return start

    def go_on(
        self, workspace: Workspace, lokr: LokrConfig, processes: int
    ) -> tuple[Start, list[str]]:
        """What it was started with, for going on with today's configuration, and what to say.

        Raises `UsageError` where a setting differs that must not.
        """
        config = workspace.config.train
        start = self.start()
        check_settings(self.name, start.settings, frozen_settings(config, lokr))
        free = free_settings(config)
        notes = taken_changes(start.free, free)
        now = config.gradient_accumulation_steps * processes
        if now != start.micro_batches:
            notes.append(
                f"A global batch stays at the {start.micro_batches} micro-batches that the run "
                f"began with, though gradient_accumulation_steps and {processes} "
                f"process{'es' if processes > 1 else ''} now come to {now}."
            )
        if processes > start.micro_batches:
            idle = processes - start.micro_batches
            notes.append(f"{idle} of the {processes} processes have nothing to compute.")
        return replace(start, free=free), notes

    def note_conditions(
        self, workspace: Workspace, start: Start, conditions: Mapping[str, str]
    ) -> list[str]:
        """Write down `start` and on what the run computes now, once it does; a sentence where
        that was other before."""
        differing = [
            f"{name} {old} → {conditions.get(name, 'none')}"
            for name, old in start.conditions.items()
            if conditions.get(name) != old
        ]
        self.write_start(workspace, replace(start, conditions=dict(conditions)))
        if not differing:
            return []
        return [f"Losses may differ in their last bits from here on: {', '.join(differing)}."]

    def variance(self) -> tuple[float, ...] | None:
        """The latents' own variance per channel, if it has been measured."""
        path = self.folder / VARIANCE_NAME
        try:
            return tuple(float(v) for v in json.loads(path.read_text("utf-8"))["variance"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PipeError(f"{path} cannot be read: {error!r}. Delete it; it is made anew.") from (
                error
            )

    def write_variance(self, workspace: Workspace, variance: Sequence[float], latents: int) -> None:
        """Publish what was measured on so many of the frozen latents."""
        entries = {"variance": list(variance), "latents": latents}
        with publishing(workspace.staging, self.folder / VARIANCE_NAME) as unfinished:
            unfinished.write_text(json.dumps(entries, indent=2) + "\n", "utf-8")

    def resume_point(self, wanted: str) -> tuple[Checkpoint | None, list[str]]:
        """The checkpoint to go on from, if any, with what there is to say about it.

        `wanted` is `latest`, the name of a checkpoint, or `none`, which refuses an existing run.
        """
        if wanted == "none":
            if checkpoints.names(self.checkpoints):
                raise UsageError(
                    f"The run `{self.name}` has checkpoints, and resume_from_checkpoint is "
                    '"none". Set another tracker_run_name, or resume_from_checkpoint = "latest".'
                )
            return None, []
        if wanted == "latest":
            checkpoint, skipped = checkpoints.latest(self.checkpoints)
            if checkpoint is None and skipped:
                raise PipeError(
                    f"No checkpoint of the run `{self.name}` is whole:\n  "
                    + "\n  ".join(skipped)
                    + f"\nRestore one, or move {self.checkpoints} away to begin at step 0."
                )
            return checkpoint, skipped
        names = checkpoints.names(self.checkpoints)
        if wanted not in names:
            raise UsageError(
                f"The run `{self.name}` has no checkpoint `{wanted}`; there are: "
                f"{', '.join(names) or 'none'}."
            )
        later = names[names.index(wanted) + 1 :]
        if later:
            raise UsageError(
                f"The run `{self.name}` has checkpoints after `{wanted}`, which going on from it "
                f"would contradict: {', '.join(later)}. Move them away, or start a new run with "
                "another tracker_run_name."
            )
        checkpoint = checkpoints.read(self.checkpoints / wanted)
        damage = checkpoint.damage()
        if damage is not None:
            raise PipeError(f"The checkpoint {checkpoint.folder} cannot be used: {damage}.")
        return checkpoint, []
