"""Rotary positions, row by row.

diffusers' `OmniGenSuScaledRotaryEmbedding` has two faults in a batch of unequal prompts: it
keeps the positions of row 0 only, and it picks the "short" or "long" factor table by the
longest row. Here each row has its own positions and its own table, so that a sample's result
does not depend on its neighbours.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn


class RowwiseRotaryEmbedding(nn.Module):
    """Takes the place of `transformer.rope`, with the settings of the module it replaces."""

    short_factor: torch.Tensor
    long_factor: torch.Tensor

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.dim = int(original.dim)
        self.base = float(original.base)
        self.original_max_position_embeddings = int(original.original_max_position_embeddings)
        scale = original.max_position_embeddings / self.original_max_position_embeddings
        #: Longer contexts than the original get their rotation scaled (LongRoPE's "su").
        self.attention_factor = 1.0
        if scale > 1.0:
            self.attention_factor = math.sqrt(
                1 + math.log(scale) / math.log(self.original_max_position_embeddings)
            )
        for name in ("short_factor", "long_factor"):
            table = torch.tensor(getattr(original, name), dtype=torch.float32)
            self.register_buffer(name, table, persistent=False)

    def forward(
        self, hidden_states: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine, each float32 `[B, S, head_dim]`, for integer positions `[B, S]`.

        A row whose last position is beyond the original context (4096) uses the long table. No
        value is read back from the device.
        """
        device = hidden_states.device
        positions = position_ids.to(device)
        is_long = positions.amax(dim=1, keepdim=True) + 1 > self.original_max_position_embeddings
        factors = torch.where(is_long, self.long_factor, self.short_factor)  # [B, head_dim / 2]
        exponents = torch.arange(0, self.dim, 2, dtype=torch.int64, device=device).float()
        inverse_frequency = 1.0 / (factors * self.base ** (exponents / self.dim))
        # float32 whatever the autocast: bfloat16 cannot tell positions in the thousands apart.
        with torch.autocast(device_type=device.type, enabled=False):
            angles = positions[:, :, None].float() * inverse_frequency[:, None, :]
            angles = torch.cat((angles, angles), dim=-1)
            return angles.cos() * self.attention_factor, angles.sin() * self.attention_factor


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotate `x` `[B, heads, S, head_dim]` by angles `[B, S, head_dim]`; keeps x's dtype.

    The two halves of a head are the real and the imaginary parts.
    """
    real, imaginary = x.float().chunk(2, dim=-1)
    turned = torch.cat((-imaginary, real), dim=-1)
    return (x.float() * cosine[:, None] + turned * sine[:, None]).to(x.dtype)
