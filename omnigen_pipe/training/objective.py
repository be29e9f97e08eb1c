"""From a micro-batch to the loss of each of its samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from omnigen_pipe.model import flow
from omnigen_pipe.model.transformer import PADDING_TOKEN, predict_velocity
from omnigen_pipe.training.adapted import Adapted
from omnigen_pipe.training.batches import Batch
from omnigen_pipe.training.rollout import rollout, rollout_target


@dataclass(frozen=True)
class Problem:
    """What the model is asked and should answer: noisy latents x_t and velocities
    `[B, 4, H/8, W/8]`, times `[B]`, float32 on the device."""

    x_t: torch.Tensor
    wanted: torch.Tensor
    t: torch.Tensor


def pose(model: Adapted, batch: Batch) -> Problem:
    """Noise the latents of `batch`, and say the velocities to learn; without gradients.

    Rolled-out rows: x_t comes from the model's own steps, and the target leads from there to x1.
    Regularisation rows: the target is the base model's own prediction, that is, the one with the
    adapter at strength 0, on the same x_t, t and prompt.
    """
    x1, x0, t = (x.to(model.device) for x in (batch.x1, batch.x0, batch.t))
    x_t, wanted = flow.interpolate(x1, x0, t), flow.target(x1, x0)
    with torch.no_grad(), model.autocast():
        if batch.rollout is not None:
            x_t = rollout(
                lambda x, times, rows: _velocity(model, x, times, batch, rows),
                x1,
                x0,
                t,
                batch.rollout.starts.to(model.device),
                batch.rollout.steps,
            )
            rolled = batch.rollout.steps.nonzero()[:, 0].to(model.device)
            wanted[rolled] = rollout_target(x1[rolled], x_t[rolled], t[rolled])
        if batch.regularisation.any():
            rows = batch.regularisation.nonzero()[:, 0].tolist()
            with model.base_only():
                wanted[rows] = _velocity(model, x_t[rows], t[rows], batch, rows)
    return Problem(x_t, wanted, t)


def sample_losses(model: Adapted, problem: Problem, batch: Batch) -> torch.Tensor:
    """The loss of each sample of `batch`, `[B]`, float32, with gradients to the adapter; weighted
    by its mask where it has one."""
    with model.autocast():
        velocity = predict_velocity(model.transformer, problem.x_t, problem.t, batch.prompts)
    mask = None if batch.mask is None else batch.mask.to(model.device)
    return flow.sample_losses(velocity, problem.wanted, mask)


def passes_without_gradients(batch: Batch) -> int:
    """How often `pose` runs the model."""
    rolled = int(batch.rollout.steps.max()) if batch.rollout is not None else 0
    return rolled + int(batch.regularisation.any())


def _velocity(
    model: Adapted, x: torch.Tensor, t: torch.Tensor, batch: Batch, rows: list[int]
) -> torch.Tensor:
    """The model's velocity for `rows` of the batch at other latents and times, float32."""
    prompts = [batch.prompts[row] for row in rows]
    return predict_velocity(model.transformer, x, t, prompts).float()


def run_idle(model: Adapted, passes: int, gradients: bool = False) -> torch.Tensor:
    """Run the model `passes` times on next to nothing; with `gradients` also backwards, where
    nothing is added to them. Returns the losses of no sample, `[0]`.

    Processes that share a sharded base model have to run it equally often.
    """
    device, patch = model.device, model.transformer.config.patch_size
    for _ in range(passes):
        nothing = torch.zeros(1, 4, patch, patch, device=device)
        time = torch.full((1,), 0.5, device=device)
        with torch.set_grad_enabled(gradients), model.autocast():
            velocity = predict_velocity(model.transformer, nothing, time, [[PADDING_TOKEN]])
        if gradients:
            (0 * velocity.sum()).backward()  # type: ignore[no-untyped-call]
    return torch.zeros(0, device=device)


def long_table_rows(model: Adapted, batch: Batch) -> int:
    """How many rows are long enough for RoPE's long factor table."""
    transformer = model.transformer
    limit = transformer.rope.original_max_position_embeddings
    patch = transformer.config.patch_size
    image = (batch.x1.shape[-2] // patch) * (batch.x1.shape[-1] // patch)
    return sum(1 for prompt in batch.prompts if len(prompt) + 1 + image > limit)
