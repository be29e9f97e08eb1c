"""A small OmniGen with random weights, in diffusers' folder layout, built in seconds.

It computes exactly what the real one computes, only with fewer and narrower layers, and every
number in it is random, so that none is left out unnoticed. It has learned nothing: where learning
matters, the tests use the embedded model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omnigen_pipe.embedded.layout import write_scheduler_and_index
from omnigen_pipe.embedded.tokenizer import build_tokenizer
from omnigen_pipe.quiet import quiet_imports

_VOCABULARY = 512
_CORPUS = (
    "Generate an image according to the following instructions",
    "a large red circle left of a small blue square on a white background",
    "a small green triangle above a yellow star on a black background, photograph, drawing",
    "low quality, jpeg artifacts, ugly, blurry, deformed, bad anatomy, too many fingers",
    "two brown dogs looking out of a wooden house, seen from a summit under a blue sky",
)


def _spread_latents(vae: Any) -> None:
    """Scale the encoder's output so that scaled latents of pictures spread as SDXL's do.

    Random weights make them almost equal: then there would be nothing in them but noise to learn,
    and a loss of 1 would be the best one.
    """
    import torch

    with torch.no_grad():
        ramp = torch.linspace(-1, 1, 64)
        pictures = torch.stack(
            (ramp.expand(64, 64), ramp[:, None].expand(64, 64), ramp.outer(ramp))
        )
        encoded = vae.encode(pictures[None]).latent_dist.mean
        factor = 1 / (vae.config.scaling_factor * encoded.std(dim=(0, 2, 3)))
        channels = len(factor)
        vae.quant_conv.weight[:channels] *= factor[:, None, None, None]
        vae.quant_conv.bias[:channels] *= factor


def build_small_omnigen(
    folder: Path,
    *,
    seed: int = 0,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 2,
    vae_channels: tuple[int, ...] = (8, 16, 16, 16),
) -> Path:
    """Build transformer, VAE, tokenizer and scheduler with random weights; returns `folder`.

    Unlike a freshly constructed model, every bias and norm is random too, so that a mistake in
    any of them shows. Leaves torch's global random state as it was.
    """
    import torch

    with quiet_imports():
        from diffusers import (
            AutoencoderKL,
            OmniGenTransformer2DModel,
        )

    build_tokenizer(folder / "tokenizer", _CORPUS * 2, _VOCABULARY)
    half_head = hidden_size // num_heads // 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = OmniGenTransformer2DModel(
            hidden_size=hidden_size,
            num_attention_heads=num_heads,
            num_key_value_heads=num_heads,
            intermediate_size=2 * hidden_size,
            num_layers=num_layers,
            vocab_size=_VOCABULARY,
            pad_token_id=2,
            time_step_dim=64,
            rope_scaling={
                "type": "su",
                "short_factor": [1.0 + 0.02 * i for i in range(half_head)],
                "long_factor": [1.0 + 0.9 * i for i in range(half_head)],
            },
        )
        for name, parameter in transformer.named_parameters():
            if parameter.ndim == 1:
                base = 1.0 if name.endswith("norm.weight") else 0.0
                torch.nn.init.normal_(parameter, base, 0.05)
        vae = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * len(vae_channels),
            up_block_types=("UpDecoderBlock2D",) * len(vae_channels),
            block_out_channels=vae_channels,
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=4,
            sample_size=256,
            scaling_factor=0.13025,
            force_upcast=True,
        )
        _spread_latents(vae)
    transformer.save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    write_scheduler_and_index(folder)
    return folder
