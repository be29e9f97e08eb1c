"""The objective, against the formulas of the authors' `loss.py` written out by hand."""

from __future__ import annotations

import math

import torch

from omnigen_pipe.model import flow


def test_t_one_is_clean_and_t_zero_is_noise() -> None:
    x1, x0 = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    assert torch.equal(flow.interpolate(x1, x0, torch.tensor([1.0, 0.0]))[0], x1[0])
    assert torch.equal(flow.interpolate(x1, x0, torch.tensor([1.0, 0.0]))[1], x0[1])


def test_following_the_target_from_any_time_ends_at_the_clean_latent() -> None:
    x1, x0 = torch.randn(4, 4, 6, 6), torch.randn(4, 4, 6, 6)
    t = torch.tensor([0.1, 0.4, 0.7, 0.95])
    x_t = flow.interpolate(x1, x0, t)
    arrived = x_t + (1 - t)[:, None, None, None] * flow.target(x1, x0)
    torch.testing.assert_close(arrived, x1)


def test_times_are_the_sigmoid_of_the_draws() -> None:
    assert flow.times(torch.tensor([0.0]))[0] == 0.5
    assert math.isclose(
        flow.times(torch.tensor([1.0])).item(), 1 / (1 + math.exp(-1)), rel_tol=1e-6
    )


def test_clean_latents_are_scaled_after_the_draw() -> None:
    mean, log_variance = torch.full((1, 4, 2, 2), 3.0), torch.full((1, 4, 2, 2), math.log(4.0))
    moments = torch.cat((mean, log_variance), dim=1).half()
    noise = torch.ones(1, 4, 2, 2)
    torch.testing.assert_close(
        flow.clean_latents(moments, noise, 0.5), torch.full((1, 4, 2, 2), 2.5), rtol=1e-3, atol=0
    )
    torch.testing.assert_close(
        flow.clean_latents(moments, None, 0.5), torch.full((1, 4, 2, 2), 1.5)
    )


def test_the_loss_is_a_mean_per_sample_in_float32() -> None:
    velocity = torch.zeros(2, 4, 3, 3, dtype=torch.bfloat16)
    wanted = torch.stack([torch.full((4, 3, 3), 2.0), torch.full((4, 3, 3), 0.5)])
    losses = flow.sample_losses(velocity, wanted)
    assert losses.dtype == torch.float32
    assert losses.tolist() == [4.0, 0.25]


def test_the_known_baseline_of_a_linear_predictor() -> None:
    """Unit-variance latents: the best linear guess leaves 1 / (t^2 + (1-t)^2), 1.74 on average."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(200_000, generator=generator)
    t = flow.times(normal)
    x1 = torch.randn(len(t), 1, generator=generator)
    x0 = torch.randn(len(t), 1, generator=generator)
    x_t = flow.interpolate(x1, x0, t)
    variance = t**2 + (1 - t) ** 2
    guess = ((2 * t - 1) / variance)[:, None] * x_t
    assert abs(flow.sample_losses(guess, flow.target(x1, x0)).mean().item() - 1.74) < 0.02
