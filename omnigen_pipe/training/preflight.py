"""Before the first step: the largest batch forward and back, so that too little memory shows now.

Without it a run could fail hours later, at the first batch of its largest bucket that has a
long prompt.
"""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc
import torch

from manifests.errors import PipeError
from omnigen_pipe.config import TrainConfig
from omnigen_pipe.model.transformer import PADDING_TOKEN
from omnigen_pipe.model_files import PIXELS_PER_LATENT
from omnigen_pipe.runs.frozen import FrozenSamples
from omnigen_pipe.training.batches import Batch
from omnigen_pipe.training.objective import pose, sample_losses
from omnigen_pipe.training.optimizers import state_bytes
from omnigen_pipe.training.trainee import Trainee


def largest_batch(frozen: FrozenSamples, config: TrainConfig, patch_size: int) -> Batch:
    """A micro-batch of zeros, as large as any of the run's: of most tokens, where every row has
    the longest prompt, and a bucket that never fills a micro-batch counts with what it has.

    An image token is `patch_size` latent elements wide and high. Memory goes with the tokens, not
    with the pixels: of equal pixels, many small images with their prompts are more.
    """
    shown = np.bincount(frozen.buckets, weights=frozen.repeats + 1).astype(int)
    rows = {
        name: min(config.train_batch_size, int(number))
        for name, number in zip(frozen.bucket_names, shown, strict=True)
    }
    longest = max(longest_prompt(frozen), len(frozen.dropout_prompt()))
    side = patch_size * PIXELS_PER_LATENT
    bucket = max(rows, key=lambda name: rows[name] * (longest + _area(name) // side**2))
    width, height = (int(side) // PIXELS_PER_LATENT for side in bucket.split("x"))
    latents = torch.zeros(rows[bucket], 4, height, width)
    regularised = "regularisation" in frozen.in_split
    return Batch(
        sample_ids=["the largest batch"] * rows[bucket],
        bucket=bucket,
        x1=latents,
        x0=latents,
        t=torch.full((rows[bucket],), 0.5),
        prompts=[[PADDING_TOKEN] * longest] * rows[bucket],
        regularisation=torch.full((rows[bucket],), regularised),
    )


def longest_prompt(frozen: FrozenSamples) -> int:
    """The most tokens that any prompt has."""
    return int(pc.max(pc.list_value_length(pc.list_flatten(frozen.table["prompts"]))).as_py())


def _area(bucket: str) -> int:
    width, height = (int(side) for side in bucket.split("x"))
    return width * height


def rehearse(trainee: Trainee, batch: Batch, config: TrainConfig, advice: str) -> None:
    """Run `batch` forward and back, with as much memory taken as the optimizer's state will need.

    Leaves weights, gradients (zero) and random state as they were. Raises `PipeError` with
    `advice` where memory does not suffice.
    """
    held = sum(
        value.numel() * value.element_size()
        for state in trainee.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    paged = config.optimizer.endswith("-paged")  # its state need not fit
    needed = 0 if paged else max(0, state_bytes(trainee.parameters(), config) - held)
    try:
        reserved = torch.empty(needed, dtype=torch.uint8, device=trainee.device)
        losses = sample_losses(trainee, pose(trainee, batch), batch)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        del reserved
    except torch.OutOfMemoryError as error:
        raise PipeError(
            f"{trainee.device} has too little memory for this training: its largest batch, "
            f"{len(batch.sample_ids)} samples of {batch.bucket} with {len(batch.prompts[0])} "
            f"tokens, was tried before the first step. {advice}"
        ) from error
    trainee.gradients.zero()
