"""Loss by time: sums add up over any cut, the window forgets, the bins share out (0, 1)."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnigen_pipe.training.baseline import linear_error
from omnigen_pipe.training.loss_window import (
    BINS,
    CENTRES,
    EDGES,
    LossWindow,
    step_metrics,
    step_sums,
    sums_of,
)


def _rows(number: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    t = torch.sigmoid(torch.randn(number, generator=generator))
    baselines = linear_error(t, [1.2, 0.6, 0.7, 0.5])
    losses = (baselines * (0.5 + torch.rand(number, generator=generator))).float()
    return t, losses, baselines


# Laws.


@given(cuts=st.lists(st.integers(0, 40), max_size=6), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_the_sums_of_any_cut_add_up_to_the_whole(cuts: list[int], seed: int) -> None:
    rows = _rows(40, seed)
    bounds = [0, *sorted(cuts), 40]
    parts = [step_sums(*(x[a:b] for x in rows)) for a, b in itertools.pairwise(bounds)]
    torch.testing.assert_close(torch.stack(parts).sum(dim=0), step_sums(*rows))


@given(order=st.permutations(list(range(12))))
@settings(max_examples=30, deadline=None)
def test_the_order_of_rows_does_not_matter(order: list[int]) -> None:
    rows = _rows(12)
    torch.testing.assert_close(step_sums(*(x[order] for x in rows)), step_sums(*rows))


@given(t=st.floats(0, 1, width=32))
@settings(max_examples=200, deadline=None)
def test_every_time_is_in_exactly_one_bin_and_in_its_own(t: float) -> None:
    counts = step_sums(*(torch.tensor([x]) for x in (t, 1.0, 1.0)))[:BINS]
    assert counts.sum() == 1
    index = int(counts.argmax())
    assert (0.0, *EDGES)[index] <= t <= (*EDGES, 1.0)[index]


def test_the_bins_have_equal_mass_and_the_evaluations_grid_as_medians() -> None:
    """By torch's normal distribution, not by the one that made the edges."""
    normal = torch.distributions.Normal(
        torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    )
    below = normal.cdf(torch.logit(torch.tensor(EDGES, dtype=torch.float64)))
    torch.testing.assert_close(below, torch.arange(1, BINS, dtype=torch.float64) / BINS)
    shares = (torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS
    grid = torch.sigmoid(normal.icdf(shares))
    torch.testing.assert_close(torch.tensor(CENTRES, dtype=torch.float64), grid)
    assert len({f"{centre:.2f}" for centre in CENTRES}) == BINS

    drawn = torch.sigmoid(torch.randn(80_000, generator=torch.Generator().manual_seed(0)))
    counts = step_sums(drawn, drawn, drawn)[:BINS]
    assert (counts - 10_000).abs().max() < 4 * math.sqrt(80_000 * (1 / 8) * (7 / 8))


def test_the_sums_are_those_of_a_loop_over_rows() -> None:
    t, losses, baselines = _rows(200)
    table = np.zeros((3, BINS))
    for one, loss, baseline in zip(t.tolist(), losses.tolist(), baselines.tolist(), strict=True):
        table[:, sum(one >= edge for edge in EDGES)] += 1, loss, baseline
    np.testing.assert_allclose(step_sums(t, losses, baselines).reshape(3, BINS), table)


def test_the_window_holds_the_last_steps_and_no_more() -> None:
    steps = [step_sums(*_rows(4, seed)) for seed in range(60)]
    window = LossWindow(50)
    for number, sums in enumerate(steps, start=1):
        window.add(sums)
        kept = steps[max(0, number - 50) : number]
        assert len(window) == len(kept)
        assert torch.equal(window.sums(), torch.stack(kept).sum(dim=0))


def test_a_huge_loss_is_forgotten_without_a_trace() -> None:
    """A running sum would keep the rounding of what it subtracts."""
    small = step_sums(*_rows(4))
    window = LossWindow(2)
    window.add(small * 1e30)
    window.add(small)
    window.add(small)
    assert torch.equal(window.sums(), small + small)


def test_what_was_added_cannot_be_changed_from_outside() -> None:
    sums = step_sums(*_rows(4))
    window = LossWindow()
    window.add(sums)
    before = window.sums()
    sums.zero_()
    assert torch.equal(window.sums(), before)


def test_the_windows_values_are_plain_means_over_its_rows() -> None:
    t, losses, baselines = _rows(150)
    window = LossWindow()
    for start in range(0, 150, 3):
        part = slice(start, start + 3)
        window.add(step_sums(t[part], losses[part], baselines[part]))
    values = window.values()
    assert values["loss"] == pytest.approx(losses.double().mean().item())
    assert values["baseline"] == pytest.approx(baselines.mean().item())
    assert values["explained"] == pytest.approx(
        1 - (losses.double().sum() / baselines.sum()).item()
    )
    assert sum(values["samples_by_t"]) == 150
    lowest = t < EDGES[0]
    assert values["loss_by_t"][0] == pytest.approx(losses[lowest].double().mean().item())


def test_rows_at_the_baseline_explain_nothing() -> None:
    t, _, baselines = _rows(400)
    window = LossWindow()
    window.add(step_sums(t, baselines, baselines))
    board = window.board()
    assert all(value == 0 for name, value in board.items() if "explained" in name)
    assert "explains 0 %" in window.progress_text()


# What is written.


def test_a_line_of_metrics_gives_its_sums_back() -> None:
    for number in (0, 1, 4, 100):
        sums = step_sums(*_rows(number))
        line = json.loads(json.dumps(step_metrics(sums), allow_nan=False))
        torch.testing.assert_close(sums_of(line), sums)


def test_bins_without_rows_are_null_in_metrics_and_absent_on_the_board() -> None:
    t = torch.tensor([0.46, 0.47, 0.9])
    sums = step_sums(t, torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2.0, 2.0, 2.0]))
    assert step_metrics(sums) == {
        "baseline": 2.0,
        "explained": pytest.approx(1 - 7 / 6),
        "samples_by_t": [0, 0, 0, 2, 0, 0, 0, 1],
        "loss_by_t": [None, None, None, 1.5, None, None, None, 4.0],
        "baseline_by_t": [None, None, None, 2.0, None, None, None, 2.0],
    }
    window = LossWindow()
    window.add(sums)
    assert window.board() == {
        "train/window/loss": pytest.approx(7 / 3),
        "train/window/baseline": 2.0,
        "train/window/explained": pytest.approx(1 - 7 / 6),
        "train/loss_by_t/0.46": 1.5,
        "train/baseline_by_t/0.46": 2.0,
        "train/explained_by_t/0.46": 0.25,
        "train/loss_by_t/0.82": 4.0,
        "train/baseline_by_t/0.82": 2.0,
        "train/explained_by_t/0.82": -1.0,
    }
    assert window.progress_text() == "loss 2.333 (linear 2.000, explains -17 %)"


def test_without_rows_nothing_is_claimed() -> None:
    window = LossWindow()
    assert window.progress_text() == ""
    window.add(step_sums(*_rows(0)))  # a step of regularisation data alone
    assert window.progress_text() == ""
    assert window.board() == {}
    assert window.values()["loss"] is None


def test_the_progress_text_reads_like_a_sentence() -> None:
    window = LossWindow()
    window.add(step_sums(*(torch.tensor([x]) for x in (0.5, 1.2134, 1.402))))
    assert window.progress_text() == "loss 1.213 (linear 1.402, explains 13 %)"


def test_the_text_of_the_bins_has_one_loss_a_bin() -> None:
    window = LossWindow()
    assert window.bins_text() == "by t – – – – – – – –"
    t = torch.tensor([CENTRES[1], CENTRES[6]])
    window.add(step_sums(t, torch.tensor([1.25, 0.5]), torch.ones(2)))
    assert window.bins_text() == "by t – 1.25 – – – – 0.50 –"
