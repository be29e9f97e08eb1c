"""A traced step: exact against real tensors and torch's own tracker, and linear in depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from memory_tracker import tracked
from torch._subclasses.fake_tensor import FakeTensorMode

from omnigen_pipe.config import LokrConfig
from omnigen_pipe.memory import trace
from omnigen_pipe.memory.skeleton import OMNIGEN_V1, Architecture, adapted
from omnigen_pipe.memory.trace import activation_bytes, materialise, step_bytes
from omnigen_pipe.model.lokr import attach
from omnigen_pipe.model.transformer import load_transformer

BF16 = torch.bfloat16
#: OmniGen's proportions, narrower, so that real tensors of it fit a test.
NARROW: Architecture = {
    **OMNIGEN_V1,
    "hidden_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 512,
    "num_layers": 3,
}


def _modules(checkpointing: bool) -> tuple[Any, Any]:
    """Two blocks of true width on the meta device."""
    transformer, network = adapted(OMNIGEN_V1, 2, LokrConfig(), BF16)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    return transformer, network


@pytest.mark.parametrize("checkpointing", [True, False])
def test_it_counts_what_torchs_own_tracker_counts(checkpointing: bool) -> None:
    micro_batch = ((256, 256), 2, 40)
    modules = _modules(checkpointing)
    with FakeTensorMode():
        for module in modules:
            materialise(module)
        ours = step_bytes(*modules, BF16, *micro_batch)
    modules = _modules(checkpointing)
    with FakeTensorMode():
        for module in modules:
            materialise(module)
        _, theirs = tracked(*modules, *micro_batch)
    assert ours == theirs


@pytest.mark.parametrize(
    ("dtype", "checkpointing"), [(torch.float32, False), (BF16, True), (BF16, False)], ids=str
)
def test_a_step_of_shapes_is_a_step_of_numbers(
    small_omnigen: Path, dtype: torch.dtype, checkpointing: bool
) -> None:
    """The loaded model with real tensors peaks at the same byte as its skeleton with fake ones."""
    transformer = load_transformer(small_omnigen / "transformer", dtype, torch.device("cpu"))
    network = attach(transformer, LokrConfig(), 0)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    real = step_bytes(transformer, network, dtype, (128, 96), 2, 30)
    shapes = dict(transformer.config)
    assert real == activation_bytes(shapes, LokrConfig(), dtype, checkpointing, (128, 96), 2, 30)
    assert real > 0


@pytest.mark.parametrize("checkpointing", [True, False])
def test_two_depths_tell_the_third(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def at(depth: int) -> int:
        shapes = {**NARROW, "num_layers": depth}
        return activation_bytes(shapes, LokrConfig(), BF16, checkpointing, (256, 256), 2, 40)

    extended = at(4)
    monkeypatch.setattr(trace, "DEEP", 4)  # trace all four
    assert at(4) == extended


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [True, False])
def test_two_depths_tell_the_third_at_true_width(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def at(depth: int) -> int:
        shapes = {**OMNIGEN_V1, "num_layers": depth}
        return activation_bytes(shapes, LokrConfig(), BF16, checkpointing, (1024, 1024), 1, 60)

    extended = at(6)
    monkeypatch.setattr(trace, "DEEP", 6)
    assert at(6) == extended
