"""What a checkpoint holds of a trainee comes back to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from manifests.errors import UsageError
from omnigen_pipe.config import LokrConfig, parse
from omnigen_pipe.model import lokr
from omnigen_pipe.runs import checkpoints
from omnigen_pipe.runs.checkpoints import Position
from omnigen_pipe.training.state import read_state, write_state
from omnigen_pipe.training.trainee import Trainee, load_trainee
from omnigen_pipe.training.validation import in_use
from omnigen_pipe.workspace import Workspace


def _trainee(model: Path, **options: object) -> Trainee:
    train = {"mixed_precision": "no", "gradient_checkpointing": False, **options}
    config = parse({"model": {"pretrained_model_name_or_path": str(model)}, "train": train}, "test")
    return load_trainee(Workspace(model, config), LokrConfig(), torch.device("cpu"))


def _move(trainee: Trainee, steps: int, seed: int) -> None:
    """Take optimizer steps on drawn gradients."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        trainee.gradients.flat.normal_(generator=generator)
        trainee.scaler.scale(torch.zeros(()))
        trainee.scaler.unscale_(trainee.optimizer)
        trainee.scaler.step(trainee.optimizer)
        trainee.scaler.update()
        if trainee.ema is not None:
            trainee.ema.update(step)


def _save(folder: Path, trainee: Trainee) -> checkpoints.Checkpoint:
    return checkpoints.save(
        folder / "checkpoints",
        folder / "staging",
        Position(3),
        lambda path: write_state(trainee, path, LokrConfig(), 3, base="ann/omnigen"),
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_ema": True},
        {"optimizer": "adamw_schedulefree"},
        {"optimizer": "lion", "use_ema": True},
        {"mixed_precision": "fp16"},
    ],
    ids=str,
)
def test_a_trainee_read_from_a_checkpoint_goes_on_as_the_one_that_wrote_it(
    small_omnigen: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    original = _trainee(small_omnigen, **options)
    _move(original, 3, seed=1)
    saved = _save(tmp_path, original)
    other = _trainee(small_omnigen, **options)
    read_state(other, saved)
    for trainee in (original, other):
        _move(trainee, 2, seed=2)
    for one, two in zip(original.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    assert original.scaler.state_dict() == other.scaler.state_dict()
    if original.ema is not None:
        assert other.ema is not None
        averages = (original.ema.weights, other.ema.weights)
        assert all(torch.equal(averages[0][name], averages[1][name]) for name in averages[0])


def test_the_average_lies_beside_the_adapter_in_the_same_form(
    small_omnigen: Path, tmp_path: Path
) -> None:
    trainee = _trainee(small_omnigen, use_ema=True, ema_decay=0.5)
    start = lokr.weights(trainee.network)
    _move(trainee, 1, seed=1)
    saved = _save(tmp_path, trainee)
    (weights, metadata), (average, same) = map(lokr.read_adapter, (saved.adapter, saved.ema))
    assert metadata == same
    assert (metadata["step"], metadata["base"]) == ("3", "ann/omnigen")
    assert weights.keys() == average.keys()
    decay = 2 / 11  # of the first step: (1 + 1) / (10 + 1)
    for name, tensor in average.items():
        expected = decay * start[name] + (1 - decay) * weights[name]
        torch.testing.assert_close(tensor, expected)


def test_schedule_free_saves_the_averaged_weights_to_use_and_trains_on_from_the_others(
    small_omnigen: Path, tmp_path: Path
) -> None:
    trainee = _trainee(small_omnigen, optimizer="adamw_schedulefree")
    _move(trainee, 5, seed=1)
    before = lokr.weights(trainee.network)
    saved, _ = lokr.read_adapter(_save(tmp_path, trainee).adapter)
    after = lokr.weights(trainee.network)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(saved[name], after[name]) for name in after)
    trainee.optimizer.eval()  # type: ignore[attr-defined]
    used = lokr.weights(trainee.network)
    assert all(torch.equal(saved[name], used[name]) for name in used)


def test_another_precision_is_refused(small_omnigen: Path, tmp_path: Path) -> None:
    saved = _save(tmp_path, _trainee(small_omnigen))
    with pytest.raises(UsageError, match=r"trained in float32.*bfloat16"):
        read_state(_trainee(small_omnigen, mixed_precision="bf16"), saved)


def test_what_is_used_meanwhile_is_afterwards_as_it_was(small_omnigen: Path) -> None:
    """Each module's mode by itself, and the adapter's strength; also where using it fails."""
    trainee = _trainee(small_omnigen)
    modules = [*trainee.transformer.modules(), *trainee.network.modules()]
    for number, module in enumerate(modules):
        module.training = number % 3 != 0
    trainee.network.set_multiplier(0.7)
    modes = [module.training for module in modules]

    def fail() -> None:
        with in_use(trainee):
            assert not any(module.training for module in modules)
            trainee.network.set_multiplier(0.0)
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    assert [module.training for module in modules] == modes
    assert trainee.network.multiplier == 0.7
