"""Every optimizer resumes exactly, takes the memory it says, and is what its name says."""

from __future__ import annotations

import io
import sys
from typing import Any, get_args

import numpy as np
import pytest
import torch
from lion_pytorch import Lion
from schedulefree import AdamWScheduleFree

from manifests.errors import UsageError
from omnigen_pipe.config import TrainConfig
from omnigen_pipe.training.optimizers import (
    averaged_weights,
    build_optimizer,
    has_averaged_weights,
    note,
    state_bytes,
)
from omnigen_pipe.training.schedule import learning_rate

NAMES: tuple[str, ...] = get_args(TrainConfig.model_fields["optimizer"].annotation)
BITSANDBYTES = [name for name in NAMES if name.startswith("bnb-")]
CPU = torch.device("cpu")

#: Below, at and above the 4096 numbers from which 8 bits are used; whole and broken blocks; and
#: zeros, as half of an adapter's factors are at the start.
SHAPES = [(16, 16), (64, 64), (129, 130), (7,), (4095,), (80, 64)]
STEPS = 9

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


def _config(name: str, **options: Any) -> TrainConfig:
    falling = "constant" if name == "adamw_schedulefree" else "cosine"
    rate = 1.0 if name == "prodigy" else 1e-2
    settings = {"learning_rate": rate, "lr_warmup_steps": 3, "lr_scheduler": falling, **options}
    return TrainConfig.model_validate({"optimizer": name, **settings})


def _weights(zeros: bool = True) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(shape, generator=generator) for shape in SHAPES]
    if zeros:
        tensors[-1].zero_()
    return [torch.nn.Parameter(tensor) for tensor in tensors]


def _built(
    weights: list[torch.nn.Parameter], config: TrainConfig, device: torch.device = CPU
) -> torch.optim.Optimizer:
    if config.optimizer in BITSANDBYTES:
        pytest.importorskip("bitsandbytes")
    return build_optimizer(weights, config, device)


def _train(
    weights: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    steps: range,
) -> None:
    """Towards 0.5 everywhere, by noisy gradients that depend on the weights and the step."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for weight in weights:
            noise = 0.1 * torch.randn(weight.shape, generator=generator)
            weight.grad = weight.detach() - 0.5 + noise
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, STEPS, config)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _equal(some: list[torch.nn.Parameter], others: list[torch.nn.Parameter]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def _distance(weights: list[torch.nn.Parameter]) -> float:
    return sum(float((weight.detach() - 0.5).square().sum()) for weight in weights)


# Laws of every optimizer


@pytest.mark.parametrize("stops", [[4], [1, 3, 8]])
@pytest.mark.parametrize("name", NAMES)
def test_first_steps_saved_loaded_and_rest_are_all_steps(name: str, stops: list[int]) -> None:
    config = _config(name, adam_weight_decay=0.01)
    whole = _weights()
    _train(whole, _built(whole, config), config, range(STEPS))

    weights = _weights()
    optimizer = _built(weights, config)
    for start, end in zip([0, *stops], [*stops, STEPS], strict=True):
        _train(weights, optimizer, config, range(start, end))
        file = io.BytesIO()
        saved = [weight.detach() for weight in weights]
        torch.save({"weights": saved, "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        loaded = torch.load(file, map_location="cpu", weights_only=True)
        weights = [torch.nn.Parameter(tensor) for tensor in loaded["weights"]]
        optimizer = _built(weights, config)
        optimizer.load_state_dict(loaded["optimizer"])
    assert _equal(weights, whole)
    assert not _equal(weights, _weights())


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_moves_at_every_step_and_towards_the_target(name: str) -> None:
    config = _config(name, lr_scheduler="constant", learning_rate=1.0 if name == "prodigy" else 0.1)
    weights = _weights()
    optimizer = _built(weights, config)
    start = _distance(weights)
    for step in range(STEPS):
        before = [weight.detach().clone() for weight in weights]
        _train(weights, optimizer, config, range(step, step + 1))
        assert not any(torch.equal(*pair) for pair in zip(weights, before, strict=True))
    # Prodigy begins at a rate of 1e-6, and needs more steps to find its own.
    assert _distance(weights) < start * (1 if name == "prodigy" else 0.8)


@pytest.mark.parametrize("name", NAMES)
def test_options_arrive(name: str) -> None:
    options = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-7}
    options |= {"lion_beta1": 0.7, "lion_beta2": 0.96, "adam_weight_decay": 0.02}
    (group,) = _built(_weights(), _config(name, **options)).param_groups
    assert tuple(group["betas"]) == ((0.7, 0.96) if "lion" in name else (0.8, 0.95))
    assert group["weight_decay"] == 0.02
    if "lion" not in name:
        assert group["eps"] == 1e-7
    (group,) = _built(_weights(), _config(name)).param_groups
    assert tuple(group["betas"]) == ((0.9, 0.99) if "lion" in name else (0.9, 0.999))
    assert group["weight_decay"] == 0


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_state_takes_the_bytes_foretold(name: str, zeros: bool) -> None:
    config = _config(name)
    weights = _weights(zeros)
    optimizer = _built(weights, config)
    foretold = state_bytes(weights, config)
    assert foretold == state_bytes([torch.empty(s, device="meta") for s in SHAPES], config)
    _train(weights, optimizer, config, range(1))
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    }
    not_kept = 4 * weights[-1].numel() - 4 if zeros and name == "prodigy" else 0
    assert sum(storages.values()) == foretold - not_kept


@pytest.mark.parametrize("name", NAMES)
def test_visits_to_the_averaged_weights_change_nothing(name: str) -> None:
    config = _config(name)
    plain, visited = _weights(), _weights()
    _train(plain, _built(plain, config), config, range(STEPS))
    optimizer = _built(visited, config)
    for step in range(STEPS):
        with averaged_weights(optimizer):
            before = [weight.detach().clone() for weight in visited]
            with averaged_weights(optimizer):
                assert _equal(visited, before), "a visit inside a visit changes nothing"
            assert _equal(visited, before)
        _train(visited, optimizer, config, range(step, step + 1))
        y = [weight.detach().clone() for weight in visited]
        with averaged_weights(optimizer):
            # At the first step x and y are still the same.
            assert _equal(visited, y) != (has_averaged_weights(optimizer) and step > 0)
        assert _equal(visited, y)
        with pytest.raises(KeyError), averaged_weights(optimizer):
            raise KeyError
        assert _equal(visited, y)
    assert _equal(visited, plain)
    assert has_averaged_weights(optimizer) == (name == "adamw_schedulefree")


# Each against an independent reference


def test_schedule_free_trains_y_and_averages_z_into_x() -> None:
    """Defazio et al. 2024, algorithm 1: x is z's mean weighted by the squared rate so far."""
    config = _config("adamw_schedulefree")
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = _built([weight], config)
    x = z = np.array([1.0, -2.0])
    moment, total, highest = np.zeros(2), 0.0, 0.0
    for step in range(STEPS):
        y = 0.1 * z + 0.9 * x
        assert weight.detach().numpy() == pytest.approx(y, rel=1e-5)
        gradient = y - 0.5
        weight.grad = torch.tensor(gradient, dtype=torch.float32)
        rate = learning_rate(step, STEPS, config)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        moment = 0.999 * moment + 0.001 * gradient**2
        z = z - rate * gradient / (np.sqrt(moment / (1 - 0.999 ** (step + 1))) + 1e-8)
        highest = max(highest, rate)
        total += highest**2
        x = x + highest**2 / total * (z - x)
        with averaged_weights(optimizer):
            assert weight.detach().numpy() == pytest.approx(x, rel=1e-5)


def test_warm_up_is_that_of_the_schedule_free_library() -> None:
    config = _config("adamw_schedulefree")
    ours, theirs = _weights(), _weights()
    _train(ours, _built(ours, config), config, range(STEPS))
    reference = AdamWScheduleFree(theirs, lr=1e-2, warmup_steps=3)
    reference.train()
    _train(theirs, reference, _config("adamw_schedulefree", lr_warmup_steps=0), range(STEPS))
    assert all(
        torch.allclose(*pair, rtol=1e-6, atol=1e-7) for pair in zip(ours, theirs, strict=True)
    )


def _reference(name: str, weights: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    if "lion" in name:
        return Lion(weights, lr=1.0, betas=(0.9, 0.99), weight_decay=0.01)
    return torch.optim.AdamW(weights, lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)


@pytest.mark.parametrize("name", ["adamw", "adamw_bf16", "lion", *BITSANDBYTES])
def test_adamw_and_lion_are_the_same_from_any_library(name: str) -> None:
    config = _config(name, adam_weight_decay=0.01)
    ours, theirs = _weights(), _weights()
    _train(ours, _built(ours, config), config, range(STEPS))
    _train(theirs, _reference(name, theirs), config, range(STEPS))
    if not name.startswith("bnb"):
        assert _equal(ours, theirs)
        return
    moved = _distance(_weights()) - _distance(theirs)
    # 8 bits keep the direction, not the digits; a rounded momentum can also flip Lion's sign.
    tolerance = 0.05 * moved if "8bit" in name else 1e-4 * moved
    assert _distance(ours) == pytest.approx(_distance(theirs), abs=tolerance)


@pytest.mark.parametrize("name", [name for name in BITSANDBYTES if name.endswith("-paged")])
def test_paged_ones_are_the_unpaged_ones_on_the_cpu(name: str) -> None:
    config, unpaged = _config(name), _config(name.removesuffix("-paged"))
    some, others = _weights(), _weights()
    _train(some, _built(some, config), config, range(STEPS))
    _train(others, _built(others, unpaged), unpaged, range(STEPS))
    assert _equal(some, others)
    assert "does not page" in str(note(config, CPU))
    assert note(config, torch.device("cuda")) is None


def test_prodigy_finds_a_rate_without_being_given_one() -> None:
    config = _config("prodigy", lr_scheduler="constant", lr_warmup_steps=10)
    weights = _weights()
    optimizer = _built(weights, config)
    start = _distance(weights)
    _train(weights, optimizer, config, range(150))
    assert 1e-3 < optimizer.param_groups[0]["d"] < 1
    assert _distance(weights) < start / 2


def test_prodigys_coefficient_scales_its_rate() -> None:
    found = []
    for coefficient in (0.5, 2.0):
        weights = _weights()
        config = _config("prodigy", lr_scheduler="constant", prodigy_d_coef=coefficient)
        optimizer = _built(weights, config)
        _train(weights, optimizer, config, range(50))
        found.append(optimizer.param_groups[0]["d"])
    assert found[0] < found[1] / 4


def test_prodigy_keeps_stdout_clean(capsys: pytest.CaptureFixture[str]) -> None:
    _built(_weights(), _config("prodigy", adam_weight_decay=0.01))
    assert capsys.readouterr().out == ""


# What is said before training


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_bitsandbytes_that_is_not_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    other = "lion" if "lion" in name else "adamw"
    with pytest.raises(UsageError, match=rf"omnigen-pipe\[quantised\].*`{other}`"):
        build_optimizer(_weights(), _config(name), CPU)


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_bitsandbytes_without_a_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")

    def missing(*_: Any, **__: Any) -> None:
        """Calls an operator that has a kernel for no device, as the library would."""
        library = torch.library.Library("omnigen_pipe_test", "FRAGMENT")
        library.define("absent(Tensor x) -> Tensor")
        torch.ops.omnigen_pipe_test.absent(torch.zeros(1))

    for step in ("optimizer_update_32bit", "optimizer_update_8bit_blockwise"):
        monkeypatch.setattr(functional, step, missing)
    with pytest.raises(UsageError, match=r"does not run on cpu .*Could not run .*train on a CUDA"):
        build_optimizer(_weights(), _config(name), CPU)


def test_notes() -> None:
    assert "float32" in str(note(_config("adamw_bf16"), CPU))
    assert "learning_rate = 1" in str(note(_config("prodigy", learning_rate=1e-4), CPU))
    for quiet in (_config("prodigy"), _config("adamw"), _config("bnb-adamw8bit")):
        assert note(quiet, CPU) is None


# Clipping
