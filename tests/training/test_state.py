"""What a checkpoint holds of a trainee comes back to the last bit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from manifests.errors import UsageError
from omnigen_pipe.config import LokrConfig
from omnigen_pipe.runs import checkpoints
from omnigen_pipe.runs.checkpoints import Position
from omnigen_pipe.training.state import read_state, write_state


class _Network(torch.nn.Module):
    """As much of LyCORIS' network as a checkpoint needs."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)
        torch.nn.init.constant_(self.layer.weight, value)


def _trainee(value: float = 0.5) -> Any:
    network = _Network(value)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    network.layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return SimpleNamespace(network=network, optimizer=optimizer, dtype=torch.float32)


def _save(folder: Path, trainee: Any) -> checkpoints.Checkpoint:
    return checkpoints.save(
        folder / "checkpoints",
        folder / "staging",
        Position(7),
        lambda path: write_state(trainee, path, LokrConfig(), 7),
    )


def test_weights_and_optimizer_come_back_exactly(tmp_path: Path) -> None:
    original, other = _trainee(0.25), _trainee(9.0)
    read_state(other, _save(tmp_path, original))
    assert torch.equal(other.network.layer.weight, original.network.layer.weight)
    first, second = (t.optimizer.state_dict()["state"][0] for t in (other, original))
    assert torch.equal(first["exp_avg"], second["exp_avg"])
    assert first["step"] == second["step"]


def test_another_precision_is_refused(tmp_path: Path) -> None:
    saved = _save(tmp_path, _trainee())
    trainee = _trainee()
    trainee.dtype = torch.bfloat16
    with pytest.raises(UsageError, match=r"trained in float32.*bfloat16"):
        read_state(trainee, saved)
