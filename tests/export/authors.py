"""The authors' model, read and computed from the description of its layout alone.

The blocks are transformers' own Phi-3, loaded with strict names; what is around them is written out
here after the paper and the names in the file. None of our code and nothing of diffusers' is used.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file


class AuthorsModel:
    """The weights of a folder in the authors' layout; `used` are the names that were needed."""

    def __init__(self, folder: Path) -> None:
        from transformers import Phi3Config, Phi3Model

        self.state = {n: t.float() for n, t in load_file(folder / "model.safetensors").items()}
        self.used: set[str] = set()
        config = Phi3Config.from_pretrained(folder)
        config._attn_implementation = "eager"
        self.llm: Any = Phi3Model(config).eval()
        inner = {n.removeprefix("llm."): t for n, t in self.state.items() if n.startswith("llm.")}
        self.llm.load_state_dict(inner, strict=True)
        self.used |= {f"llm.{name}" for name in inner}

    def _take(self, name: str) -> torch.Tensor:
        self.used.add(name)
        return self.state[name]

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._take(f"{name}.weight"), self._take(f"{name}.bias"))

    def _time(self, name: str, t: torch.Tensor) -> torch.Tensor:
        """The time, as cosines and then sines of falling frequencies, through two layers."""
        half = self._take(f"{name}.mlp.0.weight").shape[1] // 2
        angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / half)
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)
        return self._linear(f"{name}.mlp.2", F.silu(self._linear(f"{name}.mlp.0", waves)))

    def velocity(self, x_t: torch.Tensor, t: torch.Tensor, prompt: list[int]) -> torch.Tensor:
        """The velocity of one sample: `x_t` `[1, 4, H/8, W/8]`, `t` `[1]`."""
        kernel = self._take("x_embedder.proj.weight")
        image = F.conv2d(x_t, kernel, self._take("x_embedder.proj.bias"), stride=2)
        rows, columns = image.shape[2:]
        grid = self._take("pos_embed")
        side = math.isqrt(grid.shape[1])
        top, left = (side - rows) // 2, (side - columns) // 2
        grid = grid.reshape(side, side, -1)[top : top + rows, left : left + columns]
        tokens = image.flatten(2).transpose(1, 2) + grid.reshape(1, rows * columns, -1)

        words = self.llm.embed_tokens(torch.tensor([prompt]))
        sequence = torch.cat([words, self._time("time_token", t)[:, None], tokens], dim=1)
        before, total = len(prompt) + 1, sequence.shape[1]
        visible = torch.ones(total, total, dtype=torch.bool).tril()
        visible[before:] = True  # the image sees everything
        mask = torch.zeros(1, 1, total, total).masked_fill(~visible, torch.finfo(torch.float32).min)
        hidden = self.llm(
            inputs_embeds=sequence,
            attention_mask=mask,
            position_ids=torch.arange(total)[None],
            use_cache=False,
        ).last_hidden_state[:, before:]

        condition = F.silu(self._time("t_embedder", t))
        shift, scale = self._linear("final_layer.adaLN_modulation.1", condition).chunk(2, dim=1)
        normed = F.layer_norm(hidden, hidden.shape[-1:], eps=1e-6)
        patches = self._linear("final_layer.linear", normed * (1 + scale) + shift)
        patches = patches.reshape(rows, columns, 2, 2, 4)  # row, column, within the patch, channel
        return patches.permute(4, 0, 2, 1, 3).reshape(1, 4, 2 * rows, 2 * columns)
