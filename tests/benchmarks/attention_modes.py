"""One layer's attention of true width, forwards and backwards: in spans, and with a dense mask."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from process_memory import memory_of_process
from table import answer

from omnigen_pipe.model.attention import Spans, by_spans, spans

#: Tokens of two prompts of one batch; the model has 32 heads of 96, of which these are an eighth.
PROMPTS, HEADS, WIDTH = (25, 60), 4, 96

#: Query, key and value `[B, heads, S, 96]`, where everything lies, and the dense mask.
Problem = tuple[list[torch.Tensor], Spans, torch.Tensor]
MODES = ("spans", "dense mask")


def build(picture: int) -> Problem:
    """The problem of pictures of so many tokens."""
    where, total = spans(list(PROMPTS)), max(PROMPTS) + 1 + picture
    generator = torch.Generator().manual_seed(0)
    shape = (len(PROMPTS), HEADS, total, WIDTH)
    tensors = [torch.randn(shape, generator=generator).requires_grad_() for _ in range(3)]
    seen = torch.zeros(len(PROMPTS), 1, total, total)
    for row, (start, image) in enumerate(where.rows):
        seen[row, 0, start:image, start:image] = torch.ones(image - start, image - start).tril()
        seen[row, 0, image:, start:] = 1
    return tensors, where, seen


def attend(mode: str, problem: Problem) -> Callable[[], torch.Tensor]:
    """The attention in `mode`; the mask is made here, as diffusers makes it once for all layers."""
    tensors, where, seen = problem
    if mode == "spans":
        return lambda: by_spans(*tensors, where)
    mask = (1 - seen) * torch.finfo(torch.float32).min
    return lambda: F.scaled_dot_product_attention(*tensors, attn_mask=mask)


def step(attention: Callable[[], torch.Tensor]) -> float:
    """Seconds of one forward and backward pass."""
    started = time.perf_counter()
    attention().sum().backward()
    return time.perf_counter() - started


def difference(problem: Problem) -> float:
    """The largest difference of outputs and gradients of the two, the padding aside."""
    tensors, where, _ = problem
    kept = torch.zeros_like(tensors[0])
    for row, (start, _) in enumerate(where.rows):
        kept[row, :, start:] = 1
    found = []
    for mode in MODES:
        out = attend(mode, problem)() * kept
        found.append([out.detach(), *torch.autograd.grad(out.square().sum(), tensors)])
    return max(float(((a - b) * kept).abs().max()) for a, b in zip(*found, strict=True))


def peak(mode: str, picture: str) -> dict[str, Any]:
    """Bytes that one step in `mode` needs over query, key and value, its float32 mask included;
    none where the system does not tell."""
    problem = build(int(picture))
    mask = problem[2].nbytes if mode == "dense mask" else 0
    attention = attend(mode, problem)
    del problem
    try:
        # Forgets the peak so far, which building had.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return {}
    before = memory_of_process("VmRSS") - mask
    step(attention)
    return {"bytes": memory_of_process("VmHWM") - before}


if __name__ == "__main__":
    answer({"peak": peak})
