"""From a micro-batch to the loss of each of its samples."""

from __future__ import annotations

import torch

from omnigen_pipe.model import flow
from omnigen_pipe.model.transformer import predict_velocity
from omnigen_pipe.training.batches import Batch
from omnigen_pipe.training.trainee import Trainee


def micro_batch_losses(trainee: Trainee, batch: Batch) -> torch.Tensor:
    """The loss of each sample of `batch`, `[B]`, float32, with gradients to the adapter.

    The target of regularisation data is the base model's own prediction, that is, the one with
    the adapter at strength 0, on the same x_t, t and prompt.
    """
    device = trainee.device
    x1, x0, t = (x.to(device) for x in (batch.x1, batch.x0, batch.t))
    x_t = flow.interpolate(x1, x0, t)
    wanted = flow.target(x1, x0)
    enabled = trainee.dtype != torch.float32
    with torch.autocast(device.type, dtype=trainee.dtype, enabled=enabled):
        if batch.regularisation.any():
            rows = batch.regularisation.nonzero()[:, 0].tolist()
            prompts = [batch.prompts[row] for row in rows]
            strength = trainee.network.multiplier
            # Before the forward pass: recomputation under checkpointing rereads the multiplier.
            trainee.network.set_multiplier(0.0)
            try:
                with torch.no_grad():
                    base = predict_velocity(trainee.transformer, x_t[rows], t[rows], prompts)
            finally:
                trainee.network.set_multiplier(strength)
            wanted = wanted.index_copy(0, torch.tensor(rows, device=device), base.float())
        velocity = predict_velocity(trainee.transformer, x_t, t, batch.prompts)
    return flow.sample_losses(velocity, wanted)


def long_table_rows(trainee: Trainee, batch: Batch) -> int:
    """How many rows are long enough for RoPE's long factor table."""
    transformer = trainee.transformer
    limit = transformer.rope.original_max_position_embeddings
    patch = transformer.config.patch_size
    image = (batch.x1.shape[-2] // patch) * (batch.x1.shape[-1] // patch)
    return sum(1 for prompt in batch.prompts if len(prompt) + 1 + image > limit)
