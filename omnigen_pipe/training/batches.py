"""From a micro-batch of the order to the tensors of one forward pass."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from omnigen_pipe.ahead import Item, Result, done_ahead
from omnigen_pipe.config import TrainConfig
from omnigen_pipe.latents.shards import DTYPES, MissingShardError, OpenShards
from omnigen_pipe.model import flow
from omnigen_pipe.runs.frozen import FrozenSamples, Locations, Places, locate
from omnigen_pipe.runs.order import Integers, MicroBatch
from omnigen_pipe.training.draws import Appearance
from omnigen_pipe.workspace import Workspace

#: Later times are not rolled out: the target divides by 1 - t.
ROLLOUT_LATEST = 0.9
#: Micro-batches that are read ahead of the one being computed, and threads that read them.
READ_AHEAD, READERS = 4, 2


@dataclass(frozen=True)
class Rollout:
    """Which rows of a batch are rolled out: steps `[B]` (0: not) from the times t0 `[B]`."""

    starts: torch.Tensor
    steps: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the CPU, float32: clean latents x1 and noise x0 `[B, 4, H/8, W/8]`,
    times t `[B]`, token ids per row, which rows are regularisation data `[B]`, which are rolled
    out, if any may be, and the weights `[B, 1, H/8, W/8]` where a row's loss is masked (ones in
    rows where it is not)."""

    sample_ids: list[str]
    bucket: str
    x1: torch.Tensor
    x0: torch.Tensor
    t: torch.Tensor
    prompts: list[list[int]]
    regularisation: torch.Tensor
    rollout: Rollout | None = None
    mask: torch.Tensor | None = None


@dataclass(frozen=True)
class EvalSample:
    """One sample of an evaluation, float32: x1 and x0 `[4, H/8, W/8]`, its token ids, and its loss
    mask `[1, H/8, W/8]` if it has one."""

    x1: torch.Tensor
    x0: torch.Tensor
    prompt: list[int]
    mask: torch.Tensor | None = None


def rollout_share(step: int, config: TrainConfig) -> float:
    """The share of samples that is rolled out in optimizer step `step` (0, 1, …)."""
    if config.scheduled_sampling_max_step_offset == 0:
        return 0.0
    since = step - config.scheduled_sampling_start_step + 1
    ramp = max(1, config.scheduled_sampling_ramp_steps)
    return config.scheduled_sampling_probability * min(1.0, max(0, since) / ramp)


@dataclass
class BatchReader:
    """Assembles micro-batches from frozen samples and the shards that hold their latents.

    Several threads may read at once; each keeps shards of its own open.
    """

    workspace: Workspace
    frozen: FrozenSamples
    locations: Locations
    config: TrainConfig

    def __post_init__(self) -> None:
        """Nothing is open yet."""
        self._of_thread = threading.local()

    @property
    def _shards(self) -> OpenShards:
        """Those that this thread has open."""
        found: OpenShards | None = getattr(self._of_thread, "shards", None)
        if found is None:
            found = self._of_thread.shards = OpenShards(self.workspace.root)
        return found

    def read(self, micro: MicroBatch, epoch: int, step: int) -> Batch:
        """The tensors of `micro` in `epoch`, with every sample's own draws.

        `step` (0, 1, …) decides only how many samples are rolled out.
        """
        frozen, samples = self.frozen, micro.samples
        ids = frozen.sample_ids(samples)
        moments = torch.from_numpy(self.latents(samples))
        noise = np.empty((len(ids), moments.shape[1] // 2, *moments.shape[2:]), np.float32)
        posterior = None if self.config.vae_posterior == "mean" else np.empty_like(noise)
        normals = np.empty((len(ids), 1), np.float32)
        dropout = frozen.dropout_prompt()
        share = rollout_share(step, self.config)
        prompts, rolled, masked = [], [], []
        rows = zip(ids, samples.tolist(), micro.repeats.tolist(), strict=True)
        for place, (name, row, repeat) in enumerate(rows):
            draw = Appearance(self.config.seed, name, epoch, repeat)
            draw.fill("noise", noise[place])
            if posterior is not None:
                fresh = self.config.vae_posterior == "fresh"
                kept = draw if fresh else Appearance(self.config.seed, name, 0, 0)
                kept.fill("posterior", posterior[place])
            draw.fill("time", normals[place])
            caption = draw.choice("caption", frozen.captions(row))
            dropped = draw.chance("dropout", self.config.caption_dropout_probability)
            prompts.append(dropout if dropped else frozen.prompt(row, caption))
            if share > 0:
                rolled.append(self._rollout(draw, share))
            masked.append(
                bool(frozen.masked[row])
                and draw.chance("mask", self.config.masked_loss_probability)
            )
        regularisation = torch.from_numpy(frozen.regularised(samples))
        t = flow.times(torch.from_numpy(normals[:, 0]))
        return Batch(
            sample_ids=ids,
            bucket=frozen.bucket_names[frozen.buckets[samples[0]]],
            x1=flow.clean_latents(
                moments,
                None if posterior is None else torch.from_numpy(posterior),
                float(frozen.metadata["scaling_factor"]),
            ),
            x0=torch.from_numpy(noise),
            t=t,
            prompts=prompts,
            regularisation=regularisation,
            rollout=_rollouts(rolled, t, regularisation) if rolled else None,
            mask=torch.from_numpy(self.masks(samples, np.array(masked))) if any(masked) else None,
        )

    def moments(self, index: int) -> np.ndarray:
        """The latent of frozen row `index`: mean and log-variance, unscaled, `[8, H/8, W/8]`."""
        latent: np.ndarray = self.latents(np.array([index]))[0]
        return latent

    def latents(self, rows: Integers) -> np.ndarray:
        """The latents of frozen `rows`, all of one bucket, as they are stored: mean and
        log-variance, unscaled, `[B, 8, H/8, W/8]`; looks again where a shard is gone."""
        shape, dtype = self.frozen.forms[self.frozen.buckets[rows[0]]]
        found = np.empty((len(rows), *shape), DTYPES[dtype])
        self._fill(found, rows, lambda: self.locations.latents)
        return found

    def masks(self, rows: Integers, masked: NDArray[np.bool_]) -> np.ndarray:
        """The loss masks of frozen `rows`, all of one bucket, float32 `[B, 1, H/8, W/8]`; ones in
        rows that are not `masked`. Looks again where a shard is gone."""
        shape, _ = self.frozen.forms[self.frozen.buckets[rows[0]]]
        found = np.ones((len(rows), 1, *shape[1:]), np.float32)
        places = np.flatnonzero(masked)
        weights = np.empty((len(places), *found.shape[1:]), DTYPES["float32"])
        self._fill(weights, rows[places], self._mask_places)
        found[places] = weights
        return found

    def mask(self, index: int) -> np.ndarray | None:
        """The loss mask of frozen row `index`, float32 `[1, H/8, W/8]`; None where it has none."""
        if not self.frozen.masked[index]:
            return None
        mask: np.ndarray = self.masks(np.array([index]), np.array([True]))[0]
        return mask

    def _mask_places(self) -> Places:
        assert self.locations.masks is not None  # of rows with masks
        return self.locations.masks

    def _fill(self, arrays: np.ndarray, rows: Integers, places: Callable[[], Places]) -> None:
        """Read the arrays of frozen `rows`, which lie at `places`, into `arrays`."""
        try:
            self._read(arrays, rows, places())
        except MissingShardError:
            # Maintenance may have moved them to other shards since the last look.
            self._shards.forget()
            self.locations = locate(self.workspace, self.frozen)
            self._read(arrays, rows, places())

    def _rollout(self, draw: Appearance, share: float) -> tuple[int, float]:
        """Steps of a sample's rollout (0: none), and where it starts, as a part of its t."""
        if not draw.chance("rollout", share):
            return 0, 1.0
        most = self.config.scheduled_sampling_max_step_offset
        return 1 + draw.choice("rollout steps", most), draw.uniform("rollout start")

    def read_eval(self, index: int) -> EvalSample:
        """Frozen row `index` for evaluation: the posterior's mean, its first caption, and noise
        that depends on nothing but the evaluation's seed and the sample."""
        latents = torch.from_numpy(self.latents(np.array([index])))
        x1 = flow.clean_latents(latents, None, float(self.frozen.metadata["scaling_factor"]))
        (name,) = self.frozen.sample_ids(np.array([index]))
        draw = Appearance(self.config.eval_seed, name, 0, 0)
        noise = draw.normal("evaluation", tuple(x1.shape[1:]))
        mask = self.mask(index)
        weights = None if mask is None else torch.from_numpy(mask)
        return EvalSample(x1[0], noise, self.frozen.prompt(index, 0), weights)

    def _read(self, arrays: np.ndarray, rows: Integers, places: Places) -> None:
        content = arrays.reshape(-1).view(np.uint8).data
        nbytes = len(content) // len(rows)
        shards = self._shards
        where = zip(
            range(0, len(content), nbytes),
            places.shards[rows],
            places.offsets[rows].tolist(),
            places.checksums[rows].tolist(),
            strict=True,
        )
        for start, shard, offset, checksum in where:
            shards.read(shard, offset, checksum, content[start : start + nbytes])


def _rollouts(
    drawn: list[tuple[int, float]], t: torch.Tensor, regularisation: torch.Tensor
) -> Rollout | None:
    """What was drawn, for the rows where it applies: t ≤ 0.9, and no regularisation data."""
    steps = torch.tensor([number for number, _ in drawn])
    steps[(t > ROLLOUT_LATEST) | regularisation] = 0
    if not steps.any():
        return None
    return Rollout(t * torch.tensor([part for _, part in drawn]), steps)


def read_ahead(
    items: Iterable[Item], read: Callable[[Item], Result]
) -> Generator[Result, None, None]:
    """`read` of each item, in order, computed in threads a few items ahead of use."""
    torch.get_num_threads()  # settles how many the calling thread computes with, before those below
    return done_ahead(items, read, READERS, READ_AHEAD, _compute_alone)


def _compute_alone() -> None:
    """Let torch compute in this thread alone. It would give each thread that reads threads of its
    own for as little as an exponential, and these, waiting for more, take the cores of the step:
    a tenth of its time on two. Threads that begin later have one, too, until they ask for more;
    those that have begun, as the one that trains, keep theirs."""
    torch.set_num_threads(1)
