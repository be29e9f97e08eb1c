"""The linear baseline against least squares, and the measured variance against NumPy's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from omnigen_pipe.training.baseline import (
    MEASURED_LATENTS,
    channel_variance,
    chosen,
    explained,
    linear_error,
)

SCALE = 0.13025


def _latents(number: int, seed: int = 0) -> list[tuple[NDArray[np.float32], float]]:
    """Moments of several sizes, with channels of unlike means and spreads, and repeats."""
    draw = np.random.default_rng(seed)
    latents = []
    for index in range(number):
        size = (4, *[(4, 6), (8, 8), (2, 10)][index % 3])
        mean = draw.normal([[[30.0]], [[-2.0]], [[0.0]], [[5.0]]], [[[8.0]], [[6.0]], [[1]], [[5]]])
        means = mean + draw.standard_normal(size)
        latents.append(
            (np.concatenate([means, draw.normal(-2, 1, size)]).astype("float32"), 1.0 + index % 4)
        )
    return latents


# Laws of the measured variance.


@pytest.mark.parametrize("posterior", [True, False])
def test_the_variance_is_that_of_all_elements_weighted_at_once(posterior: bool) -> None:
    latents = _latents(30)
    expected = []
    for channel in range(4):
        values, weights, second = [], [], 0.0
        for moments, weight in latents:
            flat = moments[channel].astype("float64").ravel()
            values.append(flat)
            weights.append(np.full(flat.size, weight / flat.size))
            second += weight * np.exp(moments[4 + channel].astype("float64")).mean()
        x, w = np.concatenate(values), np.concatenate(weights)
        variance = np.average((x - np.average(x, weights=w)) ** 2, weights=w)
        expected.append(SCALE**2 * (variance + (second / w.sum() if posterior else 0)))
    np.testing.assert_allclose(channel_variance(latents, SCALE, posterior), expected, rtol=1e-12)


def test_draws_of_the_posterior_have_the_variance() -> None:
    """Not only its formula: latents drawn as training draws them scatter by s²."""
    latents = [(moments, 1.0) for moments, _ in _latents(40)]
    generator = torch.Generator().manual_seed(0)
    rows = []
    for moments, _ in latents:
        mean, log_variance = torch.from_numpy(moments).double().chunk(2)
        noise = torch.randn((2000, *mean.shape), dtype=torch.float64, generator=generator)
        draws = SCALE * (mean + torch.exp(log_variance / 2) * noise)
        rows.append(torch.stack([draws.mean(dim=(0, 2, 3)), draws.square().mean(dim=(0, 2, 3))]))
    first, second = torch.stack(rows).mean(dim=0)
    np.testing.assert_allclose(
        channel_variance(latents, SCALE, posterior=True), second - first**2, rtol=2e-3
    )


def test_a_repeat_is_the_sample_once_more() -> None:
    repeated = [(moments, 1.0) for moments, weight in _latents(9) for _ in range(int(weight))]
    np.testing.assert_allclose(
        channel_variance(_latents(9), SCALE, True),
        channel_variance(repeated, SCALE, True),
        rtol=1e-12,
    )


def test_the_order_of_latents_changes_only_rounding() -> None:
    latents = _latents(50)
    np.testing.assert_allclose(
        channel_variance(latents, SCALE, True),
        channel_variance(latents[::-1], SCALE, True),
        rtol=1e-12,
    )


def test_a_large_mean_does_not_eat_the_variance() -> None:
    """Sums of squares would be lost here: the mean is a million times the deviation."""
    rows = np.random.default_rng(0).standard_normal((200, 4, 8, 8))
    far = [(np.concatenate([1e6 + row, np.zeros((4, 8, 8))]), 1.0) for row in rows]
    expected = rows.var(axis=(0, 2, 3))
    np.testing.assert_allclose(channel_variance(far, 1.0, False), expected, rtol=1e-9)


def test_half_precision_latents_are_summed_in_double() -> None:
    moments = np.zeros((8, 32, 32), dtype=np.float16)
    moments[:4] = 200
    moments[:4, ::2] = -200  # 200² is near the end of float16
    moments[4:] = 15  # and exp(15) beyond it
    assert channel_variance([(moments, 1)], 1.0, True) == pytest.approx([4e4 + np.exp(15)] * 4)


def test_without_latents_there_is_no_variance() -> None:
    with pytest.raises(ValueError, match="no latents"):
        channel_variance([], SCALE, True)


# Laws of the baseline.


@pytest.mark.parametrize("s2", [0.05, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("t", [0.03, 0.25, 0.5, 0.8, 0.97])
def test_the_baseline_is_what_least_squares_leaves(t: float, s2: float) -> None:
    draw = np.random.default_rng(int(1000 * t + s2))
    number = 200_000
    x1, x0 = draw.normal(-3.0, np.sqrt(s2), number), draw.standard_normal(number)
    design = np.stack([t * x1 + (1 - t) * x0, np.ones(number)], axis=1)
    _, squares, _, _ = np.linalg.lstsq(design, x1 - x0, rcond=None)
    # The mean of squares of n normal errors scatters by √(2/n): 0.3 %.
    assert linear_error(torch.tensor([t]), [s2]).item() == pytest.approx(
        squares[0] / number, rel=0.013
    )


def test_the_baseline_holds_for_what_is_not_normal() -> None:
    draw = np.random.default_rng(0)
    number, t = 400_000, 0.6
    x1, x0 = draw.choice([-1.0, 1.0, 4.0], number), draw.standard_normal(number)
    design = np.stack([t * x1 + (1 - t) * x0, np.ones(number)], axis=1)
    _, squares, _, _ = np.linalg.lstsq(design, x1 - x0, rcond=None)
    expected = linear_error(torch.tensor([t]), [38 / 9]).item()
    assert squares[0] / number == pytest.approx(expected, rel=0.01)


def test_the_baseline_at_both_ends() -> None:
    ends = torch.tensor([0.0, 1.0])
    for s2 in (0.3, 1.0, 2.0):
        assert linear_error(ends, [s2]).tolist() == pytest.approx([s2, 1.0])
    assert linear_error(torch.tensor([0.0, 0.5, 1.0]), [0.0]).tolist() == [0.0, 0.0, 1.0]


def test_the_baseline_is_the_mean_over_channels() -> None:
    t = torch.rand(20, generator=torch.Generator().manual_seed(0))
    each = [linear_error(t, [s2]) for s2 in (1.2, 0.6, 0.7, 0.5)]
    torch.testing.assert_close(linear_error(t, [1.2, 0.6, 0.7, 0.5]), torch.stack(each).mean(dim=0))


def test_the_baseline_peaks_at_one_plus_the_variance() -> None:
    """D is least at t = 1/(1 + s²), and s²/D is 1 + s² there."""
    t = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    for s2 in (0.5, 1.0, 2.0):
        error = linear_error(t, [s2])
        assert error.max().item() == pytest.approx(1 + s2, rel=1e-8)
        assert t[error.argmax()].item() == pytest.approx(1 / (1 + s2), abs=1e-5)


@pytest.mark.parametrize(("s2", "mean"), [(0.5, 1.21), (1.0, 1.74), (2.0, 2.42)])
def test_the_baseline_on_average_over_the_times_of_training(s2: float, mean: float) -> None:
    """By the trapezium rule over the normal density; no draws."""
    n = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    density = torch.exp(-(n**2) / 2) / np.sqrt(2 * np.pi)
    average = torch.trapezoid(density * linear_error(torch.sigmoid(n), [s2]), n).item()
    assert average == pytest.approx(mean, abs=0.005)


def test_explained_is_one_at_no_loss_and_zero_at_the_baseline() -> None:
    assert explained(0.0, 1.4) == 1
    assert explained(1.4, 1.4) == 0
    assert explained(2.8, 1.4) == -1


# The subset.


@pytest.mark.parametrize("count", [0, 1, 7, 4095, 4096, 4097, 10_000, 12_345_678])
def test_the_chosen_are_distinct_even_and_within(count: int) -> None:
    indexes = chosen(count)
    assert len(indexes) == min(count, MEASURED_LATENTS)
    gaps = np.diff(indexes)
    if count <= MEASURED_LATENTS:
        assert indexes.tolist() == list(range(count))
    else:
        assert gaps.min() >= count // MEASURED_LATENTS
        assert gaps.max() <= count // MEASURED_LATENTS + 1
        assert 0 <= indexes[0] <= indexes[-1] < count
        # Both ends are near: nothing is left out systematically.
        assert count - indexes[-1] <= count // MEASURED_LATENTS + 1


def test_a_subset_errs_by_its_standard_error() -> None:
    """Over many random key orders, the subset's s² scatters as the docstring says."""
    draw = np.random.default_rng(1)
    number, limit = 3000, 300
    own_mean = draw.normal(2.0, 0.7, number)
    own_variance = draw.lognormal(-1, 0.8, number)
    s2 = own_variance.mean() + own_mean.var()
    scatter = (own_variance + (own_mean - own_mean.mean()) ** 2).std()
    predicted = scatter / np.sqrt(limit) * np.sqrt(1 - limit / number)

    errors, shifts = [], []
    t = torch.tensor([0.2, 0.5, 0.8])
    for _ in range(2000):
        order = draw.permutation(number)  # keys are hashes
        taken = order[chosen(number, limit)]
        subset = own_variance[taken].mean() + own_mean[taken].var()
        errors.append(subset - s2)
        shifts.append((linear_error(t, [subset]) / linear_error(t, [s2]) - 1).numpy())
    assert np.std(errors) == pytest.approx(predicted, rel=0.08)
    assert abs(np.mean(errors)) < predicted / 5
    relative = ((1 - t) ** 2 / (t**2 * s2 + (1 - t) ** 2)).numpy() * predicted / s2
    np.testing.assert_allclose(np.std(shifts, axis=0), relative, rtol=0.08)


def test_elements_count_in_the_variance_as_they_do_in_the_loss() -> None:
    """Masked to one half, a latent is that half; with weights, elements repeated so often."""
    rng = np.random.default_rng(4)
    moments = rng.normal(size=(8, 6, 10)).astype(np.float32)
    half = np.zeros((1, 6, 10), np.float32)
    half[..., :5] = 0.5
    np.testing.assert_allclose(
        channel_variance([(moments, 1.0, half)], SCALE, True),
        channel_variance([(moments[..., :5], 1.0)], SCALE, True),
    )
    weights = np.ones((1, 6, 10), np.float32)
    weights[:, :2] = 3
    np.testing.assert_allclose(
        channel_variance([(moments, 1.0, weights)], SCALE, True),
        channel_variance(
            [(np.concatenate([moments, moments[:, :2], moments[:, :2]], axis=1), 1.0)], SCALE, True
        ),
    )
