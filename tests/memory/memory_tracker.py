"""torch's own memory tracker around one step: what our count is compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker

from omnigen_pipe.memory.trace import step


class _FrozenMemTracker(MemTracker):
    """Without the hooks on gradients, which fail for frozen parameters."""

    def _track_module_params_and_buffers(
        self, module: nn.Module, install_grad_hooks: bool = True
    ) -> tuple[int, int]:
        return super()._track_module_params_and_buffers(module, install_grad_hooks=False)


def tracked(
    transformer: Any, network: Any, bucket: tuple[int, int], batch: int, prompt_tokens: int
) -> tuple[int, int]:
    """Bytes that are held before a bfloat16 step on the CPU, and the most it adds to them."""
    tracker, cpu = _FrozenMemTracker(), torch.device("cpu")
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tracker.track_external(transformer, network, [p.grad for p in network.parameters()])
    held = tracker.get_tracker_snapshot()[cpu]["Total"]
    with tracker:
        step(transformer, network, torch.bfloat16, bucket, batch, prompt_tokens)
    return held, tracker.get_tracker_snapshot("peak")[cpu]["Total"] - held
