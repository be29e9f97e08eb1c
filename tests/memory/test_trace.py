"""A traced step: exact against real tensors and torch's own tracker, and linear in depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from omnigen_pipe.config import LokrConfig
from omnigen_pipe.memory import trace
from omnigen_pipe.memory.skeleton import OMNIGEN_V1, Architecture, adapted
from omnigen_pipe.memory.trace import activation_bytes, materialise, step, step_bytes
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


class _FrozenMemTracker(MemTracker):
    """torch's tracker, without the hooks on gradients that fail for frozen parameters."""

    def _track_module_params_and_buffers(
        self, module: nn.Module, install_grad_hooks: bool = True
    ) -> tuple[int, int]:
        return super()._track_module_params_and_buffers(module, install_grad_hooks=False)


def _modules(checkpointing: bool) -> tuple[Any, Any]:
    """Two blocks of true width on the meta device."""
    transformer, network = adapted(OMNIGEN_V1, 2, LokrConfig(), BF16)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    return transformer, network


def _tracked(transformer: Any, network: Any) -> int:
    """What torch's tracker counts for the step that `step_bytes` counts."""
    tracker, cpu = _FrozenMemTracker(), torch.device("cpu")
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tracker.track_external(transformer, network, [p.grad for p in network.parameters()])
    held = tracker.get_tracker_snapshot()[cpu]["Total"]
    with tracker:
        step(transformer, network, BF16, (256, 256), 2, 40)
    return tracker.get_tracker_snapshot("peak")[cpu]["Total"] - held


@pytest.mark.parametrize("checkpointing", [True, False])
def test_it_counts_what_torchs_own_tracker_counts(checkpointing: bool) -> None:
    counts = []
    for count in (lambda *pair: step_bytes(*pair, BF16, (256, 256), 2, 40), _tracked):
        pair = _modules(checkpointing)
        with FakeTensorMode():
            for module in pair:
                materialise(module)
            counts.append(count(*pair))
    assert counts[0] == counts[1]


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
