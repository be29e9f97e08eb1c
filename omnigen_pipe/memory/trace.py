"""One training step, run for its shapes alone, with the storages that are alive counted.

Under `FakeTensorMode` every operation computes the shape of its result and nothing else, so a
step at true size takes a second or two. The step is made of the pieces that training uses:
diffusers' blocks, our attention and positions, LyCORIS' modules, the objective, checkpointing.

torch's own `MemTracker` gives the same numbers (a test compares them), but keeps a history for
every module, which makes it several times slower.

What it gives up: it traces the CPU's operations. They are CUDA's but for the last norm, which
CUDA's autocast computes in float32, and workspaces inside CUDA's kernels, which no tracker sees.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from omnigen_pipe.config import LokrConfig
from omnigen_pipe.memory.skeleton import Architecture, adapted, blocks
from omnigen_pipe.model import flow
from omnigen_pipe.model.transformer import predict_velocity
from omnigen_pipe.model_files import PIXELS_PER_LATENT

#: The two depths that are traced. The first block differs from the others, as nothing before it
#: wants a gradient; from the second on, each adds the same.
SHALLOW, DEEP = 2, 3
#: Any token that every vocabulary has.
_TOKEN = 5


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages that are alive, and the most there were: those it was shown, and
    those that operations gave within it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0
        self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def hold(self, tensor: torch.Tensor) -> None:
        """Count the tensor's storage, once, until it is gone."""
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._alive:
            return

        def gone(_: object) -> None:
            del self._alive[key]
            self.bytes -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and count what it gave."""
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.hold, result)
        return result


def activation_bytes(
    shapes: Architecture,
    lokr: LokrConfig,
    dtype: torch.dtype,
    checkpointing: bool,
    bucket: tuple[int, int],
    batch: int,
    prompt_tokens: int,
) -> int:
    """Most bytes that a step holds beside weights, adapter and gradients, at full depth.

    `dtype`: of base weights and autocast; `bucket`: width and height in pixels;
    `prompt_tokens`: of every row. Traced at two depths and extended to all blocks, unless there
    are no more than these; then as if `exclude_name` left nothing out, for the blocks that it names
    are not among them: somewhat more than is needed.
    """
    depth = blocks(shapes)
    if depth > DEEP:
        preset = lokr.apply_preset.model_copy(update={"exclude_name": ()})
        lokr = lokr.model_copy(update={"apply_preset": preset})

    def at(depth: int) -> int:
        transformer, network = adapted(shapes, depth, lokr, dtype)
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        with FakeTensorMode():
            materialise(transformer)
            materialise(network)
            return step_bytes(transformer, network, dtype, bucket, batch, prompt_tokens)

    if depth <= DEEP:
        return at(depth)
    shallow, deep = at(SHALLOW), at(DEEP)
    return deep + (depth - DEEP) * (deep - shallow)


def materialise(module: nn.Module) -> None:
    """Put tensors of the CPU in place of those on meta; fake ones under `FakeTensorMode`."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                tensor = torch.empty(parameter.shape, dtype=parameter.dtype)
                part._parameters[name] = nn.Parameter(tensor, parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def step_bytes(
    transformer: Any,
    network: Any,
    dtype: torch.dtype,
    bucket: tuple[int, int],
    batch: int,
    prompt_tokens: int,
) -> int:
    """Most bytes that forward and backward of these modules hold beside what they held before.

    Works alike on fake and on real tensors of the CPU. The adapter's gradients are there from
    the start, as training keeps them.
    """
    live = Live()
    for module in (transformer, network):
        for tensor in (*module.parameters(), *module.buffers()):
            live.hold(tensor)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
        live.hold(parameter.grad)
    held = live.bytes
    with live:
        step(transformer, network, dtype, bucket, batch, prompt_tokens)
    return live.peak - held


def step(
    transformer: Any,
    network: Any,
    dtype: torch.dtype,
    bucket: tuple[int, int],
    batch: int,
    prompt_tokens: int,
) -> None:
    """Forward and backward of one micro-batch of random numbers, as training does them."""
    width, height = bucket
    transformer.train()
    network.train()
    latents = (batch, 4, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)
    x1, x0, t = torch.randn(latents), torch.randn(latents), torch.rand(batch)
    x_t, wanted = flow.interpolate(x1, x0, t), flow.target(x1, x0)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        velocity = predict_velocity(transformer, x_t, t, [[_TOKEN] * prompt_tokens] * batch)
    flow.sample_losses(velocity, wanted).mean().backward()  # type: ignore[no-untyped-call]
