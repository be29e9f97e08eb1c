"""One start of a run: what the loop is given is put together, and what it reached is reported."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from manifests.errors import PipeError
from omnigen_pipe.config import LokrConfig
from omnigen_pipe.device import exact_float32, pick_device, release_memory
from omnigen_pipe.events import Events
from omnigen_pipe.model.transformer import check_fits
from omnigen_pipe.model_files import Model
from omnigen_pipe.progress import Progress
from omnigen_pipe.runs import checkpoints, pictures
from omnigen_pipe.runs.checkpoints import Checkpoint, Position, locate_adapter
from omnigen_pipe.runs.conditions import processor, versions
from omnigen_pipe.runs.frozen import FrozenSamples, describe, locate
from omnigen_pipe.runs.metrics import (
    EVALUATIONS_NAME,
    METRICS_NAME,
    SCORES_NAME,
    MetricsWriter,
    truncate,
)
from omnigen_pipe.runs.run import Run, Start
from omnigen_pipe.runs.trackers import opened
from omnigen_pipe.sampling import clip
from omnigen_pipe.sampling.clip import ClipScorer
from omnigen_pipe.sampling.validation import is_due, without_effect
from omnigen_pipe.stop import stop_on_signal
from omnigen_pipe.summary import Summary
from omnigen_pipe.training import evaluation, optimizers, schedule
from omnigen_pipe.training.baseline import Measured, channel_variance, chosen
from omnigen_pipe.training.batches import Batch, BatchReader
from omnigen_pipe.training.loop import LESS_MEMORY, Course, Progressed, train
from omnigen_pipe.training.loss_window import WINDOW_STEPS, LossWindow, sums_of
from omnigen_pipe.training.plan import Plan
from omnigen_pipe.training.preflight import largest_batch, rehearse
from omnigen_pipe.training.previews import Previews, load_previews
from omnigen_pipe.training.processes import Processes
from omnigen_pipe.training.state import read_state, write_state
from omnigen_pipe.training.trainee import Trainee, load_trainee
from omnigen_pipe.training.validation import Painter, Validator, load_painter
from omnigen_pipe.workspace import Workspace


@dataclass(frozen=True)
class Session:
    """A start of the run `this`, whose samples are frozen, in each of its processes."""

    workspace: Workspace
    progress: Progress
    this: Run
    start: Start
    frozen: FrozenSamples
    lokr: LokrConfig
    processes: Processes
    #: Bytes that training on such batches should allocate on a GPU at its peak.
    estimate: Callable[[Batch], int]
    #: Is told of what happens; of the first process only.
    events: Events = field(default_factory=Events)

    def train(
        self, device_name: str | None, checkpoint: Checkpoint | None, summary: Summary
    ) -> None:
        """Train from `checkpoint` (None: from the beginning) to the end or a signal, and fill in
        `summary`."""
        config = self.workspace.config.train
        device = pick_device(device_name)
        release_memory()  # of the VAE, where `run` has just encoded
        position = checkpoint.position if checkpoint else Position()
        reader = self._reader(self.frozen, summary)
        variance = self.processes.on_first(lambda: self._variance(reader))
        trainee = self._trainee(device, checkpoint, summary)
        largest = largest_batch(self.frozen, config, trainee.transformer.config.patch_size)
        rehearse(trainee, largest, config, LESS_MEMORY)
        if device.type == "cuda" and not trainee.sharded:  # the estimate knows whole models only
            self._compare_memory(device, largest, summary)

        order = lru_cache(maxsize=2)(
            lambda epoch: self.frozen.order(epoch, config, self.start.micro_batches)
        )
        saver = _Saver(self, trainee, checkpoint)
        with ExitStack() as stack:
            stack.enter_context(exact_float32())
            stop = stack.enter_context(stop_on_signal())
            window = LossWindow()
            total = summary.details["total_steps"]
            metrics = self._metrics(trainee, total, position, window, stack, summary)
            course = Course(
                read=reader.read,
                save=saver.save,
                variance=variance,
                progress=self.progress,
                stop=stop,
                metrics=metrics,
                evaluate=self._evaluation(trainee, variance, metrics, summary),
                processes=self.processes,
                window=window,
                events=self.events,
            )
            if self.workspace.config.validation.validation_step_interval:
                course.validates = lambda step: is_due(step, total, self.workspace.config)
                course.validate = self._validator(trainee, position, course, summary).draw
            plan = Plan(position, total, order)
            reached = train(trainee, plan, config, course)
        summary.signal = stop.signal
        _report(summary, trainee, position, reached, saver.last)
        summary.counts = {"samples": len(self.frozen), **summary.counts}

    def _reader(self, frozen: FrozenSamples, summary: Summary) -> BatchReader:
        reader = BatchReader(
            self.workspace, frozen, locate(self.workspace, frozen), self.workspace.config.train
        )
        if reader.locations.reencoded:
            summary.say(
                self.progress,
                f"{reader.locations.reencoded} latents were encoded again since the run began, "
                "and may differ in their last bits.",
            )
        return reader

    def _variance(self, reader: BatchReader) -> tuple[float, ...]:
        """The latents' own variance, which is measured once in a run's life."""
        known = self.this.variance()
        if known is not None:
            return known
        # Regularisation data have targets of their own; they count only where there is no other.
        ours = self.frozen.in_split.get("train")
        rows = np.arange(len(self.frozen)) if ours is None else np.flatnonzero(ours)
        picked = [int(rows[place]) for place in chosen(len(rows))]
        self.progress.note(f"Measuring the variance of {len(picked)} latents.")
        variance = channel_variance(
            (measured for row in picked for measured in self._measured(reader, row)),
            float(self.frozen.metadata["scaling_factor"]),
            posterior=self.workspace.config.train.vae_posterior != "mean",
        )
        self.this.write_variance(self.workspace, variance, len(picked))
        return tuple(variance)

    def _measured(self, reader: BatchReader, row: int) -> Iterator[Measured]:
        """Row `row` as it counts in an epoch: so often with its mask, and so often without."""
        moments, shown = reader.moments(row), float(self.frozen.repeats[row] + 1)
        mask = reader.mask(row)
        masked = 0.0
        if mask is not None:
            masked = self.workspace.config.train.masked_loss_probability
        if masked > 0:
            yield moments, shown * masked, mask
        if masked < 1:
            yield moments, shown * (1 - masked)

    def _trainee(
        self, device: torch.device, checkpoint: Checkpoint | None, summary: Summary
    ) -> Trainee:
        """The model and the adapter as `checkpoint` has it, or as the run begins."""
        config = self.workspace.config.train
        initial = None
        if checkpoint is None and config.init_lora is not None:
            initial, passed_over = locate_adapter(self.workspace.path(config.init_lora))
            for sentence in passed_over:
                summary.say(self.progress, sentence)
        sharded = config.fsdp_enable and self.processes.size > 1
        trainee = load_trainee(self.workspace, self.lokr, device, initial=initial, sharded=sharded)
        shape = trainee.transformer.config
        check_fits(shape, self.frozen.bucket_names, self.frozen.largest_token())
        for target in trainee.targets:
            self.progress.note(target.describe())
        total = summary.details["total_steps"]
        remarks = (
            self.lokr.unused_factor(),
            optimizers.note(config, device),
            schedule.note(total, config),
            without_effect(self.workspace.config.validation),
        )
        for remark in remarks:
            if remark is not None:
                summary.say(self.progress, remark)
        if "train" not in self.frozen.in_split:
            summary.say(
                self.progress,
                "There are regularisation data only: they hold the adapter where the base model "
                "is, so a fresh one learns nothing.",
            )
        if checkpoint is not None:
            read_state(trainee, checkpoint)
            self.progress.note(f"Going on from {checkpoint.folder}")
        conditions = {
            **versions(),
            "processor": processor(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": str(torch.get_num_threads()),
            "processes": str(self.processes.size),
        }
        for note in self.processes.on_first(
            lambda: self.this.note_conditions(self.workspace, self.start, conditions)
        ):
            summary.say(self.progress, note)
        return trainee

    def _compare_memory(self, device: torch.device, largest: Batch, summary: Summary) -> None:
        """Say what the largest batch took on the GPU, beside what was estimated."""
        if not self.processes.is_first:
            return
        measured = torch.cuda.max_memory_allocated(device)
        estimated = self.estimate(largest)
        summary.details["memory"] = {"measured": measured, "estimated": estimated}
        self.progress.note(
            f"Peak memory, tried on {len(largest.sample_ids)} samples of {largest.bucket}: "
            f"{measured / 2**30:.2f} GiB allocated, {estimated / 2**30:.2f} GiB estimated"
        )

    def _metrics(
        self,
        trainee: Trainee,
        total: int,
        position: Position,
        window: LossWindow,
        stack: ExitStack,
        summary: Summary,
    ) -> MetricsWriter | None:
        """Where numbers go, rid of what a resumed run computes again; in the first process only.

        Fills `window` with the losses of the steps before.
        """
        if not self.processes.is_first:
            return None
        checkpoints.set_aside(self.this.checkpoints, after=position.step)
        folder, staging = self.this.folder, self.workspace.staging
        pictures.set_aside(
            folder, position.step, lambda step: is_due(step, total, self.workspace.config)
        )
        for line in truncate(folder / METRICS_NAME, position.step, staging)[-WINDOW_STEPS:]:
            if "samples_by_t" in line:  # not of earlier versions
                window.add(sums_of(line))
        # The evaluation before the first step is of a checkpoint's past only where there is one.
        for name in (EVALUATIONS_NAME, SCORES_NAME):
            truncate(folder / name, position.step or -1, staging)
        config = self.workspace.config.train
        trackers = opened(
            config.report_to,
            folder,
            staging,
            position.step,
            config.tracker_project_name,
            lambda sentence: summary.say(self.progress, sentence),
        )
        metrics = stack.enter_context(MetricsWriter(folder, trackers))
        for tracker in trackers:
            tracker.describe(*self._described(trainee, total))
        return metrics

    def _described(
        self, trainee: Trainee, total_steps: int
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The whole configuration, and what the run's data are, for trackers."""
        configuration = self.workspace.config.model_dump(mode="json")
        configuration["lokr"] = self.lokr.model_dump(mode="json")  # wherever it comes from
        data = {
            **describe(self.this.samples),
            "steps": total_steps,
            "micro_batches": self.start.micro_batches,
            "base": Model.of(self.workspace).label,
            "adapter_parameters": {one.target: one.parameters for one in trainee.targets},
            "samples_blake3": self.start.samples,
        }
        return configuration, data

    def _evaluation(
        self,
        trainee: Trainee,
        variance: tuple[float, ...],
        metrics: MetricsWriter | None,
        summary: Summary,
    ) -> Callable[[int], None] | None:
        """What evaluates after a step and records it; None where nothing is evaluated."""
        config = self.workspace.config.train
        if config.eval_steps_interval == 0:
            return None
        reader = self._reader(FrozenSamples.open(self.this.samples, ("eval",)), summary)
        count = evaluation.images(len(reader.frozen), config)
        evaluator = evaluation.Evaluator(trainee, count, reader.read_eval, variance, self.processes)

        def evaluate(step: int) -> None:
            results = evaluator.results()
            if not all(math.isfinite(result.loss) for result in results.values()):
                self.processes.raise_together(PipeError(evaluation.not_finite(step, results)))
            self.progress.note(evaluation.sentence(step, results))
            summary.details["evaluation"] = {"step": step, **evaluation.as_line(results)}
            if metrics is not None:
                metrics.write_evaluation(
                    step, evaluation.as_line(results), evaluation.as_board(results)
                )
                self.events.send("evaluation", step=step, **evaluation.as_line(results))

        return evaluate

    def _validator(
        self, trainee: Trainee, position: Position, course: Course, summary: Summary
    ) -> Validator:
        """What draws validation pictures."""
        painter = load_painter(self.workspace, trainee, self.processes)
        return Validator(
            self.workspace,
            self.this.folder,
            position.step,
            trainee,
            painter,
            self.lokr,
            self.origin,
            self.processes,
            course.stop,
            self.progress,
            summary,
            course.metrics,
            self.events,
            self._previews(summary),
            self._scorer(painter, summary),
        )

    def _scorer(self, painter: Painter, summary: Summary) -> ClipScorer | None:
        """What scores pictures, where that is wanted; in the first process."""
        if not self.processes.is_first or not clip.is_wanted(self.workspace.config.validation):
            return None
        scorer = clip.load_scorer(self.workspace)
        prompts = {picture.request.prompt for picture in painter.pictures}
        cut = sum(scorer.is_cut(prompt) for prompt in prompts)
        if cut:
            summary.say(
                self.progress,
                f"{cut} of {len(prompts)} validation prompts are longer than CLIP reads: their "
                "ends do not count in the scores.",
            )
        return scorer

    def _previews(self, summary: Summary) -> Previews | None:
        """What shows pictures while they are drawn, where that is wanted; in the first process."""
        if not self.processes.is_first:
            return None
        sharded = self.workspace.config.train.fsdp_enable
        if self.workspace.config.validation.validation_preview and not sharded:
            others = self.processes.size - 1
            if others:
                summary.say(
                    self.progress,
                    "Previews are of the pictures that the first process draws: the other "
                    f"{others} draw theirs without.",
                )
        return load_previews(
            self.workspace,
            self.this.folder,
            self.events,
            lambda sentence: summary.say(self.progress, sentence),
        )

    @property
    def origin(self) -> dict[str, str]:
        """What an adapter's file says of what it was trained on."""
        return {
            "base": Model.of(self.workspace).label,
            "transformer_key": self.frozen.metadata["transformer_key"],
        }


@dataclass
class _Saver:
    """Publishes checkpoints and remembers the last one."""

    session: Session
    trainee: Trainee
    last: Checkpoint | None

    def save(self, position: Position) -> None:
        """Publish a checkpoint of `position` from the first process, and drop old ones."""
        self.last = self.session.processes.on_first(lambda: self._publish(position))

    def _publish(self, position: Position) -> Checkpoint:
        session = self.session
        folder, staging = session.this.checkpoints, session.workspace.staging
        saved = checkpoints.save(
            folder,
            staging,
            position,
            lambda path: write_state(
                self.trainee, path, session.lokr, position.step, **session.origin
            ),
        )
        keep = session.workspace.config.train.checkpoints_total_limit
        checkpoints.prune(folder, staging, keep)
        session.events.send("checkpoint", step=position.step, folder=saved.folder.name)
        return saved


def _report(
    summary: Summary,
    trainee: Trainee,
    start: Position,
    reached: Progressed,
    checkpoint: Checkpoint | None,
) -> None:
    """Say in `summary` what was reached."""
    steps, recent = reached.position.step, reached.recent
    adapter = str(checkpoint.adapter) if checkpoint else None
    summary.changed = summary.changed or steps != start.step
    summary.counts = {"steps": steps, "steps now": steps - start.step}
    summary.details |= {
        "adapter": adapter,
        "loss": recent.get("loss"),
        "recent": recent,
        "targets": [asdict(target) for target in trainee.targets],
        "device": str(trainee.device),
        "dtype": str(trainee.dtype).removeprefix("torch."),
    }
    if reached.text:
        summary.notes.append(f"Of the last steps: {reached.text}")
    if adapter:
        summary.notes.append(f"Adapter: {adapter}")
    if summary.signal is not None and steps < summary.details["total_steps"]:
        saved = ", saved" if checkpoint else ""
        summary.notes.append(
            f"Stopped by a signal at step {steps}{saved}. Run the same command to go on."
        )
