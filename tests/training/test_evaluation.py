"""Evaluation: the same numbers whatever trains around it, at times inside (0, 1)."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist, fmean

import numpy as np
import pytest
import torch

from omnigen_pipe.config import Config, LokrConfig, TrainConfig, parse
from omnigen_pipe.model import flow
from omnigen_pipe.model.transformer import predict_velocity
from omnigen_pipe.training import evaluation
from omnigen_pipe.training.adapted import Adapted, load_adapted
from omnigen_pipe.training.batches import EvalSample
from omnigen_pipe.training.evaluation import TIMES, Evaluator, evaluate, images
from omnigen_pipe.training.processes import Processes
from omnigen_pipe.training.trainee import load_trainee
from omnigen_pipe.workspace import Workspace

CPU = torch.device("cpu")
VARIANCE = (1.0, 0.5, 1.0, 2.0)
SIZES = [(8, 8), (6, 10), (8, 8), (4, 4)]


def _config(model: Path, **train: object) -> Config:
    options = {"gradient_checkpointing": False, "seed": 3, **train}
    return parse({"model": {"pretrained_model_name_or_path": str(model)}, "train": options}, "test")


def _read(index: int) -> EvalSample:
    drawn = torch.Generator().manual_seed(index)
    x1, x0 = (torch.randn(4, *SIZES[index], generator=drawn) for _ in range(2))
    prompt = torch.randint(11, 400, (3 + index,), generator=drawn).tolist()
    return EvalSample(x1, x0, prompt)


@pytest.fixture(scope="module")
def model(small_omnigen: Path) -> Adapted:
    return load_adapted(Workspace(small_omnigen, _config(small_omnigen)), LokrConfig(), CPU)


def test_the_times_are_those_of_the_definition() -> None:
    expected = [1 / (1 + math.exp(-NormalDist().inv_cdf((k + 0.5) / 8))) for k in range(8)]
    assert pytest.approx(expected) == TIMES
    assert [round(TIMES[0], 2), round(TIMES[-1], 2)] == [0.18, 0.82]


def test_losses_are_the_objective_at_each_time_written_out(model: Adapted) -> None:
    found = evaluate(model, len(SIZES), _read, VARIANCE)
    for place, time in enumerate(TIMES):
        losses = []
        for index in range(len(SIZES)):
            sample = _read(index)
            t = torch.tensor([time])
            x_t = flow.interpolate(sample.x1[None], sample.x0[None], t)
            with torch.no_grad():
                velocity = predict_velocity(model.transformer, x_t, t, [sample.prompt])
            losses.append(float(((velocity[0] - (sample.x1 - sample.x0)) ** 2).mean()))
        assert found.losses[place] == pytest.approx(fmean(losses), rel=1e-5)
    assert found.loss == pytest.approx(fmean(found.losses))
    s2 = np.array(VARIANCE)
    baseline = [float(np.mean(s2 / (t**2 * s2 + (1 - t) ** 2))) for t in TIMES]
    assert found.baseline == pytest.approx(baseline)
    assert found.explained == pytest.approx(1 - found.loss / fmean(baseline))


def test_a_masked_sample_is_evaluated_on_what_counts_and_one_of_ones_as_without(
    model: Adapted,
) -> None:
    def read(index: int, mask: torch.Tensor) -> EvalSample:
        return replace(_read(index), mask=mask)

    plain = evaluate(model, 1, _read, VARIANCE)
    ones = evaluate(model, 1, lambda i: read(i, torch.ones(1, *SIZES[i])), VARIANCE)
    assert ones == plain
    # The two halves together are the whole.
    left = torch.ones(1, *SIZES[0])
    left[..., 4:] = 0
    halves = [evaluate(model, 1, lambda i, m=m: read(i, m), VARIANCE) for m in (left, 1 - left)]
    assert halves[0].losses != halves[1].losses
    together = [sum(pair) / 2 for pair in zip(*(half.losses for half in halves), strict=True)]
    assert together == pytest.approx(plain.losses, rel=1e-5)


def test_a_sample_does_not_depend_on_the_others(model: Adapted) -> None:
    """To the last bit: each passes through the model alone."""
    whole = evaluate(model, len(SIZES), _read, VARIANCE)
    single = [
        evaluate(model, 1, lambda _, index=i: _read(index), VARIANCE) for i in range(len(SIZES))
    ]
    for place in range(len(TIMES)):
        assert whole.losses[place] == fmean(one.losses[place] for one in single)


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_shares_of_any_number_of_processes_make_the_same_numbers(
    model: Adapted, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process computes its rows and adds zeros elsewhere: summed here by hand."""
    whole = evaluate(model, len(SIZES), _read, VARIANCE)
    parts: list[torch.Tensor] = []
    monkeypatch.setattr(Processes, "sum_", lambda self, tensor: parts.append(tensor.clone()))
    for rank in range(size):
        evaluate(model, len(SIZES), _read, VARIANCE, Processes(rank, size))
    assert tuple(torch.stack(parts).sum(dim=0).mean(dim=0).tolist()) == whole.losses


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_how_passes_are_cut_changes_only_rounding(
    model: Adapted, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(model, len(SIZES), _read, VARIANCE)
    monkeypatch.setattr(evaluation, "_ROWS_PER_PASS", rows)
    assert evaluate(model, len(SIZES), _read, VARIANCE).losses == pytest.approx(
        whole.losses, rel=1e-5
    )


def test_the_average_is_evaluated_too_and_weights_are_as_before(small_omnigen: Path) -> None:
    config = _config(small_omnigen, use_ema=True)
    trainee = load_trainee(Workspace(small_omnigen, config), LokrConfig(), CPU)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainee.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    before = [parameter.detach().clone() for parameter in trainee.parameters()]
    results = Evaluator(trainee, 2, _read, VARIANCE, Processes()).results()
    assert results["weights"].losses != results["ema"].losses
    untouched = load_adapted(Workspace(small_omnigen, config), LokrConfig(), CPU)
    assert results["ema"] == evaluate(untouched, 2, _read, VARIANCE)
    assert all(torch.equal(a, b) for a, b in zip(before, trainee.parameters(), strict=True))


def test_schedule_free_is_evaluated_by_the_weights_to_use(small_omnigen: Path) -> None:
    config = _config(small_omnigen, optimizer="adamw_schedulefree", learning_rate=0.1)
    trainee = load_trainee(Workspace(small_omnigen, config), LokrConfig(), CPU)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        trainee.gradients.flat.normal_(generator=generator)
        trainee.optimizer.step()
    training = evaluate(trainee, 2, _read, VARIANCE)
    found = Evaluator(trainee, 2, _read, VARIANCE, Processes()).results()["weights"]
    assert found != training
    trainee.optimizer.eval()  # type: ignore[attr-defined]
    assert evaluate(trainee, 2, _read, VARIANCE) == found


def test_num_eval_images_takes_the_first_and_zero_takes_all() -> None:
    assert images(10, TrainConfig(num_eval_images=3)) == 3
    assert images(10, TrainConfig(num_eval_images=30)) == 10
    assert images(10, TrainConfig()) == 10
