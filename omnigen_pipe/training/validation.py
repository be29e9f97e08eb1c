"""Validation pictures: what the adapter draws as it is now, of the same prompts and seeds always.

They are the pictures that `omnigen-pipe generate` draws with the checkpoint of that step, and
training goes on as if none had been drawn. Each is published when it is drawn; one that says it
was made of these weights in this way is not drawn again. A picture that fails is reported.

Several processes share the pictures, and the first one decodes and writes them. Those that share
a sharded base model run it together, on the same picture.

Given up: drawing several pictures in one batch, whose last bits would depend on their neighbours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from manifests.errors import PipeError, first_line
from manifests.publish import publishing
from omnigen_pipe.config import LokrConfig
from omnigen_pipe.device import free_memory
from omnigen_pipe.events import EventFile, Events
from omnigen_pipe.model import lokr
from omnigen_pipe.model.provenance import Provenance, provenance_of
from omnigen_pipe.model.transformer import check_fits
from omnigen_pipe.progress import Advance, Progress
from omnigen_pipe.runs.checkpoints import ADAPTER_NAME, EMA_NAME
from omnigen_pipe.runs.metrics import MetricsWriter
from omnigen_pipe.sampling import validation
from omnigen_pipe.sampling.clip import ClipScorer
from omnigen_pipe.sampling.files import save_picture, says
from omnigen_pipe.sampling.metadata import picture_metadata
from omnigen_pipe.sampling.pipeline import (
    build_pipeline,
    decoded,
    draw_latents,
    largest_token,
    load_scheduler,
    set_strength,
)
from omnigen_pipe.sampling.source import Source
from omnigen_pipe.sampling.validation import Wanted
from omnigen_pipe.stop import Stopped, StopRequest
from omnigen_pipe.summary import Summary
from omnigen_pipe.training.adapted import Adapted
from omnigen_pipe.training.previews import Previews
from omnigen_pipe.training.processes import Processes
from omnigen_pipe.training.state import adapter_said, weights_in_use
from omnigen_pipe.training.trainee import Trainee
from omnigen_pipe.workspace import Workspace

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class _Drawn:
    """What one process made of its picture: a latent `[4, H/8, W/8]` on the CPU, or why there is
    none; and the signal that has asked it to stop, if any has."""

    latent: torch.Tensor | None = None
    failure: str | None = None
    signal: int | None = None


@dataclass(frozen=True)
class _Made:
    """What pictures say of what drew them; see `sampling.metadata`."""

    source: Source
    base_precision: str
    provenance: Provenance


@dataclass(frozen=True)
class Painter:
    """What draws the pictures of a training: its own transformer, and the VAE.

    The VAE is in main memory, and on the device only while it decodes; processes that decode
    nothing have none.
    """

    source: Source
    pictures: list[Wanted]
    pipe: Any


def load_painter(workspace: Workspace, trainee: Trainee, processes: Processes) -> Painter:
    """The painter of `trainee`; raises `UsageError` where a part of the model cannot be used, or
    a picture cannot be drawn by it."""
    source = Source.of(workspace).pinned()
    pictures = validation.wanted(workspace, source.settings())
    tokenizer = source.tokenizer()
    prompts = [picture.request.prompt for picture in pictures]
    token = largest_token(tokenizer, [*prompts, pictures[0].settings.negative_prompt])
    sizes = [picture.settings.size for picture in pictures]
    check_fits(trainee.transformer.config, sizes, token, "Lower validation_resolution.")
    scheduler = load_scheduler(source.part("scheduler"))
    vae = source.decoder(_CPU) if processes.is_first else None
    pipe = build_pipeline(trainee.transformer, vae, scheduler, tokenizer, trainee.network)
    return Painter(source, pictures, pipe)


@dataclass
class Validator:
    """Draws the validation pictures of a run in `folder`, which goes on after step `start`."""

    workspace: Workspace
    folder: Path
    start: int
    trainee: Trainee
    painter: Painter
    lokr: LokrConfig
    #: What an adapter's file says of what it was trained on.
    origin: dict[str, str]
    processes: Processes
    stop: StopRequest
    progress: Progress
    summary: Summary
    #: Where pictures are shown; in the first process only.
    metrics: MetricsWriter | None
    #: Is told of pictures that were drawn; of the first process only.
    events: Events
    #: What shows pictures while they are drawn; in the first process only, where that is wanted.
    previews: Previews | None = None
    #: What scores pictures; in the first process only, where that is wanted.
    scorer: ClipScorer | None = None
    _texts: dict[Wanted, dict[str, str]] = field(default_factory=dict)
    #: Those that were published of the step that is being drawn.
    _published: list[Path] = field(default_factory=list)

    def draw(self, step: int, advance: Advance) -> int | None:
        """Draw what is lacking of the pictures after `step`; `advance` is told how it goes.

        Returns the signal that ended it early, the same in every process; None where none did.
        """
        began = time.monotonic()
        counts = {"drawn": 0, "failed": 0}
        self._published.clear()
        asked = None
        with in_use(self.trainee):
            pictures = validation.of_step(self.painter.pictures, step)
            for average in dict.fromkeys(picture.average for picture in pictures):
                of_kind = [picture for picture in pictures if picture.average == average]
                with weights_in_use(self.trainee, average):
                    lacking = self.processes.on_first(
                        lambda kind=of_kind: self._lacking(step, kind)  # type: ignore[misc]
                    )
                    if lacking and not counts["drawn"] + counts["failed"]:
                        self.progress.note(f"Drawing validation pictures {_when(step)}.")
                    if lacking and self.previews is not None:
                        self.previews.clear(step, lacking)
                    asked = self._draw(step, lacking, counts, advance)
                if asked is not None:
                    break
        free_memory()
        seconds = time.monotonic() - began
        scores = self._scores(step, pictures) if asked is None else {}
        self._report(step, counts, scores, asked, seconds)
        return asked

    def _scores(self, step: int, pictures: list[Wanted]) -> dict[str, Any]:
        """The scores of those of `pictures` that are there, as a line of `scores.jsonl`; nothing
        where they are not wanted, or recorded already."""
        if self.scorer is None or self.metrics is None:
            return {}
        if not self._published and self.metrics.has_scores(step):
            return {}
        there = [one for one in pictures if says(one.file(self.folder, step), self._texts[one])]
        asked = [(one.file(self.folder, step), one.request.prompt) for one in there]
        failure = None
        try:
            found = list(self.scorer.scores(asked, self.trainee.device))
        # Of a damaged file, and torch's own; of memory, too.
        except (OSError, SyntaxError, RuntimeError, ValueError, MemoryError) as error:
            failure = first_line(error)
        free_memory()
        if failure is not None:
            self._say(
                f"The CLIP scores of the pictures {_when(step)} could not be computed, and "
                f"training goes on: {failure}"
            )
            return {}
        if not found:
            return {}
        scores = dict(zip(there, found, strict=True))
        line = _as_line(scores)
        self.metrics.write_scores(step, line, _as_board(scores))
        return line

    def _lacking(self, step: int, pictures: list[Wanted]) -> list[Wanted]:
        """Those of `pictures` that are not there yet; the others are shown to trackers, where
        these have forgotten the steps after the last checkpoint."""
        average = pictures[0].average
        said = adapter_said(self.trainee, step, **self.origin)
        file = lokr.adapter_file(lokr.weights(self.trainee.network), self.lokr, **said)
        name = EMA_NAME if average else ADAPTER_NAME
        precision = self.workspace.config.train.base_model_precision
        made = _Made(self.painter.source, precision, provenance_of(name, file, said))
        dtype = str(self.trainee.dtype).removeprefix("torch.")
        lacking = []
        for one in pictures:
            self._texts[one] = picture_metadata(made, dtype, one.settings, one.request)
            if not says(one.file(self.folder, step), self._texts[one]):
                lacking.append(one)
            elif step > self.start or self.start == 0:
                self._show(step, one)
        return lacking

    def _draw(
        self, step: int, lacking: list[Wanted], counts: dict[str, int], advance: Advance
    ) -> int | None:
        """Draw `lacking` in turns, a picture for each process; see `draw`."""
        together = self.trainee.sharded
        size = 1 if together else self.processes.size
        for first in range(0, len(lacking), size):
            place = first if together else first + self.processes.rank

            def tell(done: int, total: int, number: int = place + 1) -> None:
                advance(0, f"drawing {number} of {len(lacking)}, step {done} of {total}")

            mine = lacking[place] if place < len(lacking) else None
            found: list[_Drawn] = self.processes.gathered(self._latent(step, mine, tell))
            if self.processes.is_first:
                for picture, one in zip(lacking[first : first + size], found, strict=False):
                    self._finish(step, picture, one, counts)
            signals = [one.signal for one in found if one.signal is not None]
            if signals:
                return signals[0]
        return None

    def _latent(
        self, step: int, picture: Wanted | None, tell: Callable[[int, int], object]
    ) -> _Drawn:
        """What this process draws in its turn; nothing where there is no `picture` for it."""
        if picture is None:
            return _Drawn(signal=self.stop.signal)
        settings, done = picture.settings, 0

        def on_step() -> None:
            nonlocal done
            done += 1
            tell(done, settings.num_inference_steps)
            if not self.trainee.sharded:  # else the others would wait in the middle of the model
                self.stop.obey()

        previews = self.previews

        def show(number: int, latents: torch.Tensor) -> None:
            assert previews is not None  # else it is not called
            previews.show(step, picture, number, latents[0], self._texts[picture])

        pipe = self.painter.pipe
        set_strength(pipe, 1.0)
        try:
            (latent,) = draw_latents(
                pipe,
                [picture.request],
                settings,
                self.trainee.autocast(),
                on_step,
                None if previews is None else show,
            )
            return _Drawn(latent.to(_CPU), signal=self.stop.signal)
        except Stopped as stopped:
            if self.trainee.sharded:  # a second signal, which ends the process
                raise
            return _Drawn(signal=stopped.signal)
        except (RuntimeError, MemoryError) as error:  # torch's own, of its memory, too
            failure = _said(error, self.trainee.device, picture)
            if self.trainee.sharded:
                raise PipeError(failure) from error
            return _Drawn(failure=failure, signal=self.stop.signal)

    def _finish(self, step: int, picture: Wanted, drawn: _Drawn, counts: dict[str, int]) -> None:
        """Decode, publish and show a picture, or say why there is none."""
        if drawn.latent is None and drawn.failure is None:
            return  # a signal came first
        failure = drawn.failure
        if drawn.latent is not None:
            try:
                failure = self._publish(step, picture, drawn.latent)
            except PipeError as error:
                failure = str(error)
        counts["drawn" if failure is None else "failed"] += 1
        if failure is None:
            self._show(step, picture)
        else:
            kind = " of the average" if picture.average else ""
            self.summary.say(
                self.progress,
                f"The validation picture {picture.name}{kind} {_when(step)} could not be made, and "
                f"training goes on: {failure}",
            )

    def _publish(self, step: int, picture: Wanted, latent: torch.Tensor) -> str | None:
        """Decode `latent`, publish the picture and show it; returns why that failed, if it did."""
        vae = self.painter.pipe.vae
        try:
            vae.to(self.trainee.device)
            found = decoded(vae, latent.to(self.trainee.device), self._say)
        except (RuntimeError, MemoryError) as error:
            return _said(error, self.trainee.device, picture)
        finally:
            vae.to(_CPU)
        if found is None:
            return (
                "the model's numbers overflowed. A wider mixed_precision, no base_model_precision "
                "or a lower learning_rate may mend that."
            )
        with publishing(self.workspace.staging, picture.file(self.folder, step)) as unfinished:
            save_picture(found, unfinished, "PNG", self._texts[picture])
        self._published.append(picture.file(self.folder, step))
        return None

    def _show(self, step: int, picture: Wanted) -> None:
        if self.metrics is not None:
            room = "validation_ema" if picture.average else "validation"
            path = picture.file(self.folder, step)
            try:
                with Image.open(path) as found:
                    found.load()
            # What Pillow says of damage, and of a short memory.
            except (OSError, SyntaxError, ValueError, MemoryError) as error:
                self._say(f"{path} is shown in no tracker: {first_line(error)}")
                return
            name = f"{room}/{picture.name}"
            self.metrics.show_picture(step, name, path, picture.request.prompt)

    def _say(self, sentence: str) -> None:
        self.summary.say(self.progress, sentence)

    def _files(self) -> list[EventFile]:
        """Those that were published, for listeners; what cannot be read any more is left out."""
        files = []
        for path in self._published:
            try:
                files.append(EventFile(path.name, path.read_bytes()))
            except OSError as error:
                self._say(f"{path} is sent to no webhook: it cannot be read ({error.strerror}).")
        return files

    def _report(
        self,
        step: int,
        counts: dict[str, int],
        scores: dict[str, Any],
        asked: int | None,
        seconds: float,
    ) -> None:
        folder = self.painter.pictures[0].file(self.folder, step).parent
        self.summary.details["validation"] = {
            "step": step,
            **counts,
            **scores,
            "folder": str(folder),
        }
        self.summary.changed = self.summary.changed or counts["drawn"] > 0
        if self._published or counts["failed"]:
            files = self._files() if self.events.listeners else []
            self.events.send("validation", *files, step=step, **counts, **scores)
        if scores:
            self.progress.note(_sentence(step, scores))
        if counts["drawn"]:
            left = ", and the rest when the run goes on" if asked is not None else ""
            self.progress.note(
                f"Drew {counts['drawn']} validation pictures {_when(step)} in {seconds:.0f} s"
                f"{left}: {folder}"
            )


@contextmanager
def in_use(model: Adapted) -> Iterator[None]:
    """Within it `model` is used, not trained; after it every module's mode and the adapter's
    strength are what they were."""
    modules = [*model.transformer.modules(), *model.network.modules()]
    modes = [module.training for module in modules]
    strength = model.network.multiplier
    model.transformer.eval()
    model.network.eval()
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        model.network.set_multiplier(strength)


def _as_line(scores: Mapping[Wanted, float]) -> dict[str, Any]:
    """The scores as a line of `scores.jsonl`: of each picture, and their mean."""
    line: dict[str, Any] = {}
    for end, average in (("", False), ("_ema", True)):
        of_kind = [score for picture, score in scores.items() if picture.average == average]
        if of_kind:
            line[f"clip_score{end}"] = sum(of_kind) / len(of_kind)
    return {**line, "clip_scores": {one.label: score for one, score in scores.items()}}


def _as_board(scores: Mapping[Wanted, float]) -> dict[str, float]:
    """The scores as trackers show them: of each picture, and mean, least and most."""
    board: dict[str, float] = {}
    for room, average in (("clip", False), ("clip_ema", True)):
        of_kind = {one.name: score for one, score in scores.items() if one.average == average}
        board |= {f"{room}/{name}": score for name, score in of_kind.items()}
        values = list(of_kind.values())
        if values:
            board[f"{room}/mean"] = sum(values) / len(values)
            board |= {f"{room}/min": min(values), f"{room}/max": max(values)}
    return board


def _sentence(step: int, scores: Mapping[str, Any]) -> str:
    """The mean scores in words."""
    said = [
        f"{scores[name]:.2f}{of}"
        for name, of in (("clip_score", ""), ("clip_score_ema", " of the average"))
        if name in scores
    ]
    return f"CLIP score {_when(step)}: {', '.join(said)}"


def _when(step: int) -> str:
    return f"after step {step}" if step else "before the first step"


def _said(error: Exception, device: torch.device, picture: Wanted) -> str:
    """What drawing has failed with, and what to do about it where that is known."""
    if not isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return first_line(error)
    place = device if isinstance(error, torch.OutOfMemoryError) else "this machine"
    return (
        f"{place} ran out of memory at {picture.settings.size}. Lower validation_resolution, or "
        "set vae_enable_tiling where decoding is what fails."
    )
