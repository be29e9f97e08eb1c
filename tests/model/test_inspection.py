"""The report of an adapter file, against the Kronecker product written out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from manifests.errors import PipeError
from omnigen_pipe.config import LokrConfig
from omnigen_pipe.model.inspection import inspect_adapter
from omnigen_pipe.model.lokr import save_adapter


def test_full_and_low_rank_modules_are_measured(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    w1, w2 = torch.randn(2, 3, generator=generator), torch.randn(4, 5, generator=generator)
    a, b = torch.randn(4, 2, generator=generator), torch.randn(2, 5, generator=generator)
    tensors = {
        "lycoris_a.lokr_w1": w1,
        "lycoris_a.lokr_w2": w2,
        "lycoris_a.alpha": torch.tensor(10000.0),
        "lycoris_b.lokr_w1": w1.clone(),
        "lycoris_b.lokr_w2_a": a,
        "lycoris_b.lokr_w2_b": b,
        "lycoris_b.alpha": torch.tensor(6.0),
    }
    path = tmp_path / "adapter.safetensors"
    save_adapter(tensors, path, LokrConfig(), step="3")
    report = inspect_adapter(path)
    full, low = report.modules
    assert (full.rows, full.columns, full.parameters) == (8, 15, 26)
    assert (low.rows, low.columns, low.parameters) == (8, 15, 24)
    assert report.parameters == 50
    assert full.delta_rms == pytest.approx(torch.kron(w1, w2).square().mean().sqrt().item())
    expected = (6 / 2) * torch.kron(w1, a @ b)
    assert low.delta_rms == pytest.approx(expected.square().mean().sqrt().item(), rel=1e-5)
    assert report.metadata["step"] == "3"


def test_another_safetensors_file_is_said_to_be_one(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(PipeError, match="no LoKr"):
        inspect_adapter(tmp_path / "other.safetensors")
