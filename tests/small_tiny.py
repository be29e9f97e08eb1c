"""A small AutoencoderTiny with random weights, which decodes latents of SDXL's shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omnigen_pipe.quiet import quiet_imports


def build_small_tiny(folder: Path, seed: int = 0, **options: Any) -> Path:
    """Build it in diffusers' layout; `options` are those of AutoencoderTiny. Returns `folder`."""
    import torch

    with quiet_imports():
        from diffusers import AutoencoderTiny

    shape = {
        "encoder_block_out_channels": (8, 8, 8, 8),
        "decoder_block_out_channels": (8, 8, 8, 8),
        "num_encoder_blocks": (1, 1, 1, 1),
        "num_decoder_blocks": (1, 1, 1, 1),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        AutoencoderTiny(**{**shape, **options}).save_pretrained(folder)
    return folder
