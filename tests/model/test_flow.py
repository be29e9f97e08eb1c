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


def _masks() -> torch.Tensor:
    """Of three samples: none, half of the latents, and weights between 0 and 1."""
    generator = torch.Generator().manual_seed(1)
    masks = torch.ones(3, 1, 6, 8)
    masks[1, :, :, :4] = 0
    masks[2] = torch.rand(1, 6, 8, generator=generator)
    masks[2, :, :2] = 0
    return masks


def _answers() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    first, second = torch.randn(2, 3, 4, 6, 8, generator=generator)
    return first, second


def test_a_masked_loss_is_the_weighted_mean_of_the_squared_errors() -> None:
    (velocity, wanted), masks = _answers(), _masks()
    squares = (velocity - wanted).double() ** 2
    by_hand = (masks * squares).sum(dim=(1, 2, 3)) / (4 * masks.double().sum(dim=(1, 2, 3)))
    losses = flow.sample_losses(velocity, wanted, masks)
    torch.testing.assert_close(losses, by_hand.float())
    # Half of the elements, each fully: their plain mean.
    torch.testing.assert_close(losses[1], (velocity - wanted)[1, :, :, 4:].square().mean())


def test_the_predictions_gradient_is_zero_outside_of_the_mask_and_only_there() -> None:
    (velocity, wanted), masks = _answers(), _masks()
    velocity.requires_grad_()
    flow.sample_losses(velocity, wanted, masks).sum().backward()
    assert velocity.grad is not None
    outside = (masks == 0).expand_as(velocity)
    assert (velocity.grad[outside] == 0).all()
    assert (velocity.grad[~outside] != 0).all()


def test_a_mask_of_ones_is_no_mask_and_neighbours_are_not_changed_to_the_last_bit() -> None:
    found = []
    for masks in (None, torch.ones(3, 1, 6, 8), _masks()):
        velocity, wanted = _answers()
        velocity.requires_grad_()
        losses = flow.sample_losses(velocity, wanted, masks)
        losses.sum().backward()
        assert velocity.grad is not None
        found.append((losses.detach(), velocity.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert torch.equal(found[0][0][0], found[2][0][0])
    assert torch.equal(found[0][1][0], found[2][1][0])


def test_what_a_mask_weighs_in_all_does_not_matter() -> None:
    (velocity, wanted), masks = _answers(), _masks()
    masks[0] = 0.9
    torch.testing.assert_close(
        flow.sample_losses(velocity, wanted, masks / 4),
        flow.sample_losses(velocity, wanted, masks),
    )
