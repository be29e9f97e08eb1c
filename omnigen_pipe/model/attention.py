"""OmniGen's attention without its mask.

Prompt and time tokens are plainly causal and do not see the image; image tokens see
everything. That is two calls of scaled-dot-product attention for rows with prompts of one length,
each on a part that leaves the padding out, so the dense [B, S, S] mask of diffusers' collator is
never built and flash attention can serve both calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F

from omnigen_pipe.model.rope import rotate


@dataclass
class Spans:
    """What the processor needs to know of a batch: per row, where its prompt begins (the padding
    before it), and where the image begins (after the longest prompt and the time token).

    Plain numbers, so that no block waits for the GPU to read them, and so that a pass can be
    traced by shapes alone. Not frozen: torch.compile would make constants of a frozen one.
    """

    rows: tuple[tuple[int, int], ...]

    def dim(self) -> int:
        """What diffusers' forward pass asks of a mask: 3 would be a dense one."""
        return 2

    def to(self, device: torch.device) -> Spans:
        """Itself: diffusers' pipeline moves a mask to the device, and these are plain numbers."""
        return self


def spans(prompt_lengths: list[int]) -> Spans:
    """The spans of a batch of prompts of these lengths, padded on the left."""
    longest = max(prompt_lengths)
    return Spans(tuple((longest - n, longest + 1) for n in prompt_lengths))


class MaskFreeAttention:
    """The attention processor: takes `spans` where diffusers passes a mask.

    A dense mask (as diffusers' own collator makes) still works.
    """

    def __init__(self) -> None:
        #: What follows the projections and the rotation; compilation puts it outside the graph.
        self.core: Callable[..., torch.Tensor] = by_spans

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | Spans | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Attention of `hidden_states` `[B, S, width]` over itself; same shape out."""
        batch, length, _ = hidden_states.shape
        query = attn.to_q(hidden_states)
        key = attn.to_k(encoder_hidden_states)
        value = attn.to_v(encoder_hidden_states)
        head_dim = query.shape[-1] // attn.heads
        query, key, value = (
            x.view(batch, length, -1, head_dim).transpose(1, 2) for x in (query, key, value)
        )
        if image_rotary_emb is not None:
            query = rotate(query, *image_rotary_emb)
            key = rotate(key, *image_rotary_emb)

        if isinstance(attention_mask, Spans):
            out = self.core(query, key, value, attention_mask)
        else:
            grouped = key.shape[1] != query.shape[1]
            out = F.scaled_dot_product_attention(
                query, key, value, attn_mask=attention_mask, enable_gqa=grouped
            )
        out = out.transpose(1, 2).reshape(batch, length, -1)
        projected: torch.Tensor = attn.to_out[0](out)
        return projected


def by_spans(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, span: Spans
) -> torch.Tensor:
    """`[B, heads, S, head_dim]` in and out; the padding's rows come out as zeros.

    Neighbours with prompts of one length are computed together. They are split off, not sliced: in
    the backward pass every slice would fill, and add, a tensor of the whole batch's size.
    """
    runs = [(row, len(list(same))) for row, same in groupby(span.rows)]
    if len(runs) == 1:
        return _one_span(query, key, value, *span.rows[0])
    split = [x.split_with_sizes([count for _, count in runs]) for x in (query, key, value)]
    return torch.cat([_one_span(*part, *row) for (row, _), *part in zip(runs, *split, strict=True)])


def _one_span(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, start: int, image: int
) -> torch.Tensor:
    """Rows that share one layout: padding up to `start`, prompt and time up to `image`."""
    grouped = key.shape[1] != query.shape[1]
    length = query.shape[2]
    _, of_prompt, of_picture = query.split_with_sizes([start, image - start, length - image], dim=2)
    _, keys = key.split_with_sizes([start, length - start], dim=2)
    _, values = value.split_with_sizes([start, length - start], dim=2)
    before = image - start
    prompt = F.scaled_dot_product_attention(
        of_prompt, keys[:, :, :before], values[:, :, :before], is_causal=True, enable_gqa=grouped
    )
    picture = F.scaled_dot_product_attention(of_picture, keys, values, enable_gqa=grouped)
    padding = prompt.new_zeros(*prompt.shape[:2], start, prompt.shape[-1])
    return torch.cat((padding, prompt, picture), dim=2)
