"""The state of a training: whole, of that training, and refused where it is neither."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from manifests.errors import PipeError, WriteError
from omnigen_pipe.embedded.saved_state import load_state, save_state


def training() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    model, optimizer = training()
    save_state(tmp_path / "state", tmp_path / "staging", "this", 7, model, optimizer)
    other, its = training()
    assert load_state(tmp_path / "state", "this", other, its) == 7
    assert torch.equal(other.weight, model.weight)
    moments = [opt.state[net.weight]["exp_avg"] for net, opt in ((model, optimizer), (other, its))]
    assert torch.equal(*moments)
    assert load_state(tmp_path / "none", "this", other, its) == 0


def test_another_training_s_is_refused_and_takes_nothing_over(tmp_path: Path) -> None:
    model, optimizer = training()
    save_state(tmp_path / "state", tmp_path / "staging", "this", 7, model, optimizer)
    other, its = training()
    before = other.weight.clone()
    with pytest.raises(PipeError, match="training on this, and there is now that"):
        load_state(tmp_path / "state", "that", other, its)
    assert torch.equal(other.weight, before)


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_a_torn_one_is_named(tmp_path: Path, kept: int) -> None:
    model, optimizer = training()
    path = tmp_path / "state"
    save_state(path, tmp_path / "staging", "this", 7, model, optimizer)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(PipeError, match=f"{path} cannot be read: .*delete it"):
        load_state(path, "this", model, optimizer)


def test_one_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = training()
    path, staging = tmp_path / "state", tmp_path / "staging"
    save_state(path, staging, "this", 7, model, optimizer)

    def fail(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(WriteError, match="Make room"):
        save_state(path, staging, "this", 8, model, optimizer)
    assert load_state(path, "this", model, optimizer) == 7
    assert not list(staging.iterdir())
