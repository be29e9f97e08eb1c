"""torch.compile for the transformer's blocks.

Block by block, not the whole model: all blocks share their graphs, so the time to compile does
not grow with the depth, and gradient checkpointing stays outside of the graphs. Lengths are
dynamic, so neither another bucket nor another prompt length compiles anew. The core of attention
stays eager: it cuts by the prompts' lengths, which would be constants in a graph, and is two
fused kernels for each of them anyway.
"""

from __future__ import annotations

from typing import Any

import torch

from omnigen_pipe.model.attention import by_spans


def compile_blocks(transformer: Any, backend: str, mode: str = "default") -> None:
    """Compile each of `transformer.layers` in place, for `dynamo_backend` and `dynamo_mode`.

    `backend` "no" does nothing. To be called last: after quantising, attaching the adapter, and
    moving to the device. Nothing is compiled before the first forward pass.
    """
    if backend == "no":
        return
    core: Any = torch.compiler.disable(by_spans)  # type: ignore[no-untyped-call]
    for block in transformer.layers:
        block.self_attn.processor.core = core
        block.compile(backend=backend, mode=mode, dynamic=True)
