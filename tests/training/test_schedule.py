"""The rate of every step: bounds and shape for any setting, and diffusers' rates after warm-up."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import optimization
from hypothesis import given
from hypothesis import strategies as st

from manifests.errors import UsageError
from omnigen_pipe import config
from omnigen_pipe.config import TrainConfig
from omnigen_pipe.training.schedule import learning_rate, note

CONSTANT = ("constant", "constant_with_warmup")
FALLING = ("linear", "cosine", "cosine_with_restarts", "polynomial")
TOP = 3e-4

settings = st.fixed_dictionaries(
    {
        "learning_rate": st.just(TOP),
        "lr_scheduler": st.sampled_from(CONSTANT + FALLING),
        "lr_warmup_steps": st.integers(0, 30),
        "lr_end": st.sampled_from([0.0, 1e-6, TOP]),
        "lr_power": st.floats(0.1, 5),
        "lr_num_cycles": st.integers(1, 5),
    }
)
totals = st.integers(1, 60)


@given(settings, totals)
def test_the_rate_rises_over_the_warm_up_and_then_keeps_between_its_ends(
    options: dict[str, Any], total: int
) -> None:
    train = TrainConfig.model_validate(options)
    warm_up = train.lr_warmup_steps
    rates = [learning_rate(step, total, train) for step in range(total)]
    assert rates[:warm_up] == pytest.approx(
        [TOP * (k + 1) / warm_up for k in range(warm_up)][:total]
    )
    after = rates[warm_up:]
    if train.lr_scheduler in CONSTANT:
        assert after == [TOP] * len(after)
        return
    if after:
        assert after[0] == pytest.approx(TOP), "the fall begins at the top"
    assert all(train.lr_end * (1 - 1e-12) <= rate <= TOP * (1 + 1e-12) for rate in after)
    if train.lr_scheduler != "cosine_with_restarts":
        assert after == sorted(after, reverse=True)
    else:
        rises = sum(b > a for a, b in pairwise(after))
        assert rises < train.lr_num_cycles


@given(settings, totals, st.integers(0, 100))
def test_from_the_end_on_the_rate_is_the_last_one(
    options: dict[str, Any], total: int, beyond: int
) -> None:
    train = TrainConfig.model_validate(options)
    step = max(total, train.lr_warmup_steps) + beyond
    end = TOP if train.lr_scheduler in CONSTANT else train.lr_end
    assert learning_rate(step, total, train) == end


@given(settings, totals, st.integers(1, 64), st.integers(1, 64))
def test_the_rate_never_scales_with_the_batch(
    options: dict[str, Any], total: int, batch: int, accumulation: int
) -> None:
    small = TrainConfig.model_validate(options)
    large = {"train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    other = TrainConfig.model_validate(options | large)
    for step in range(total):
        assert learning_rate(step, total, small) == learning_rate(step, total, other)


def _rates(scheduler: Any, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def _optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=TOP)


@pytest.mark.parametrize("total", [7, 40])
@pytest.mark.parametrize("warm_up", [0, 1, 6])
@pytest.mark.parametrize("name", CONSTANT + FALLING)
def test_rates_after_warm_up_are_those_of_diffusers(name: str, warm_up: int, total: int) -> None:
    optimizer = _optimizer()
    if name == "polynomial":
        scheduler = optimization.get_polynomial_decay_schedule_with_warmup(
            optimizer, warm_up, total, lr_end=1e-6, power=2.5
        )
    else:
        scheduler = optimization.get_scheduler(
            name,
            optimizer,
            num_warmup_steps=warm_up,
            num_training_steps=total,
            num_cycles=3,
        )
    reference = _rates(scheduler, optimizer, total)
    train = TrainConfig(
        learning_rate=TOP,
        lr_scheduler=name,  # type: ignore[arg-type]
        lr_warmup_steps=warm_up,
        lr_end=1e-6 if name == "polynomial" else 0,
        lr_power=2.5,
        lr_num_cycles=3,
    )
    ours = [learning_rate(step, total, train) for step in range(total)]
    assert ours[warm_up:] == pytest.approx(reference[warm_up:], abs=1e-15)
    # The stated difference: one step ahead in the warm-up, which `constant` there has none of.
    if name != "constant":
        assert ours[:warm_up] == pytest.approx(reference[1 : warm_up + 1])


def test_lr_end_is_the_floor_of_every_falling_schedule() -> None:
    total, end = 24, 2e-5
    references = {
        "linear": lambda o: optimization.get_linear_schedule_with_warmup(
            o, 0, total, f_min=end / TOP
        ),
        "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, total, eta_min=end),
        "cosine_with_restarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
            o, total // 4, eta_min=end
        ),
    }
    for name, build in references.items():
        optimizer = _optimizer()
        options = {"learning_rate": TOP, "lr_scheduler": name, "lr_end": end}
        train = TrainConfig.model_validate({**options, "lr_warmup_steps": 0, "lr_num_cycles": 4})
        ours = [learning_rate(step, total, train) for step in range(total)]
        assert ours == pytest.approx(_rates(build(optimizer), optimizer, total)), name


def test_examples() -> None:
    train = TrainConfig(learning_rate=1e-3, lr_warmup_steps=4)
    rates = [learning_rate(step, 6, train) for step in range(6)]
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])
    train = TrainConfig(learning_rate=1e-3, lr_warmup_steps=2, lr_scheduler="linear")
    rates = [learning_rate(step, 6, train) for step in range(8)]
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3, 7.5e-4, 5e-4, 2.5e-4, 0, 0])


def test_a_warm_up_that_the_run_does_not_outlast_is_noted() -> None:
    options = {"learning_rate": 1e-3, "lr_warmup_steps": 100}
    constant = TrainConfig.model_validate(options)
    assert "rises to 0.0004 only, of 0.001" in str(note(40, constant))
    assert note(100, constant) is None
    linear = TrainConfig.model_validate({**options, "lr_scheduler": "linear"})
    assert "never falls" in str(note(100, linear))
    assert note(101, linear) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adamw_schedulefree", "lr_scheduler": "cosine"}, "takes the place"),
        ({"optimizer": "adamw_schedulefree", "adam_beta1": 0.0}, "above 0"),
        ({"lr_scheduler": "polynomial", "lr_end": 1.0}, "lr_end is 1.0, above learning_rate"),
        ({"lr_scheduler": "sine"}, "lr_scheduler"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config.parse({"train": options}, "omnigen-pipe.toml")
    allowed = {"optimizer": "adamw_schedulefree", "lr_scheduler": "constant_with_warmup"}
    assert config.parse({"train": {**allowed, "lr_end": 1.0}}, "omnigen-pipe.toml")
