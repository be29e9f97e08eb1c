"""The embedded model's VAE: trained from nothing on drawings, made at every step anew.

It sees the little world and, so that it can show what the world does not have, scribbles of any
shape and colour; never the new shape. Its latents are scaled as SDXL's are: what the transformer
sees has mean 0 and variance 1 in every channel, at a `scaling_factor` of 0.13025.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from omnigen_pipe.config import TrainConfig
from omnigen_pipe.embedded.saved_state import load_state, save_state
from omnigen_pipe.progress import Progress
from omnigen_pipe.quiet import quiet_imports
from omnigen_pipe.stop import stop_on_signal
from omnigen_pipe.training.schedule import learning_rate
from omnigen_pipe.world.drawing import SECOND_COLOUR, SUPERSAMPLING, paint
from omnigen_pipe.world.scenes import BACKGROUNDS, BUCKETS, COLOURS, FINER_SHAPES, imagine

SCALING_FACTOR = 0.13025
#: Of the AutoencoderKL.
_ARCHITECTURE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (16, 32, 64, 96),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 4,
    "sample_size": 64,
    "scaling_factor": SCALING_FACTOR,
    "force_upcast": True,
}
_BATCH = 8
_LEARNING_RATE, _WARMUP = 5e-4, 100
#: Weight of the posterior's divergence from N(0, 1), both summed over a picture's elements.
_DIVERGENCE = 0.001
#: How much more a shape counts than the background, and a colour's hue than its brightness.
_FOREGROUND, _HUE = 6.0, 3.0
_SAVE_EVERY = 100
#: The posterior's log-variance at the start: much noise would hide the picture from the decoder.
_FIRST_LOG_VARIANCE = -6.0
#: How many of the pictures are scribbles, and the colours that they have.
_SCRIBBLED = 0.25
_COLOURS = (*COLOURS.values(), *BACKGROUNDS.values(), SECOND_COLOUR, (240, 130, 180), (110, 70, 30))
#: Pictures of the world by which the latents are scaled, and others by which they are judged.
_SCALED_BY, _JUDGED_BY = 512, 256


def new_vae() -> Any:
    """An untrained AutoencoderKL of 1.7 M parameters: 8x down, 4 channels."""
    with quiet_imports():
        from diffusers import AutoencoderKL

    vae = AutoencoderKL(**_ARCHITECTURE)
    with torch.no_grad():
        vae.quant_conv.weight[4:] *= 0.1
        vae.quant_conv.bias[4:] = _FIRST_LOG_VARIANCE
    return vae


def train_vae(state: Path, staging: Path, seed: int, steps: int, progress: Progress) -> Any:
    """Train for `steps` steps, or go on from the file `state`; returns the scaled VAE, float32.

    Raises `Stopped` where a signal asks for it, after the step and with its state saved.
    """
    subject = f"pictures of the seed {seed} for {steps} steps"
    rates = TrainConfig(
        learning_rate=_LEARNING_RATE, lr_scheduler="cosine", lr_warmup_steps=_WARMUP
    )
    torch.manual_seed(seed)
    vae = new_vae().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=1e-4)
    step = load_state(state, subject, vae, optimizer)
    with (
        stop_on_signal() as stop,
        progress.task("Training the VAE", steps, done=step) as advance,
    ):
        while step < steps:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, rates)
            torch.manual_seed(seed + step)  # the posterior's draws, also after going on
            loss, error = _losses(vae, batch(seed, step))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            step += 1
            advance(1, f"{_decibels(float(error)):.1f} dB")
            if step % _SAVE_EVERY == 0 or step == steps or stop.signal is not None:
                save_state(state, staging, subject, step, vae, optimizer)
            stop.obey()
    return _scaled(vae.eval().requires_grad_(False), seed)


def psnr(vae: Any, seed: int) -> float:
    """Peak signal-to-noise ratio in dB of `vae` over new pictures of the world: 10 log10 of the
    squared range over the mean squared error."""
    draw = random.Random(f"{seed}:judge")
    errors = []
    with torch.no_grad():
        for _ in range(_JUDGED_BY):
            picture = pixels([paint(imagine(draw))])
            decoded = vae.decode(vae.encode(picture).latent_dist.mode()).sample.clamp(-1, 1)
            errors.append(float((decoded - picture).square().mean()))
    return _decibels(sum(errors) / len(errors))


def pixels(images: list[Image.Image]) -> torch.Tensor:
    """`[B, 3, H, W]`, float32 in -1 … 1, of RGB images of one size."""
    stacked = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1


def batch(seed: int, step: int) -> torch.Tensor:
    """The pictures of one step, all of one size, `[B, 3, H, W]` as of `pixels`."""
    draw = random.Random(f"{seed}:{step}")
    size = draw.choices(list(BUCKETS), list(BUCKETS.values()))[0]
    return pixels(
        [
            _scribble(draw, size)
            if draw.random() < _SCRIBBLED
            else paint(imagine(draw, size=size, shapes=FINER_SHAPES))
            for _ in range(_BATCH)
        ]
    )


def _scribble(draw: random.Random, size: tuple[int, int]) -> Image.Image:
    """Up to four polygons and ellipses of any place and size."""
    large = (size[0] * SUPERSAMPLING, size[1] * SUPERSAMPLING)
    image = Image.new("RGB", large, draw.choice(_COLOURS))
    canvas = ImageDraw.Draw(image)
    for _ in range(draw.randint(1, 4)):
        x, y = (draw.uniform(0, side) for side in large)
        reach = draw.uniform(0.08, 0.4) * min(large)
        if draw.random() < 0.3:
            across, down = reach, draw.uniform(0.5, 1) * reach
            canvas.ellipse((x - across, y - down, x + across, y + down), fill=draw.choice(_COLOURS))
        else:
            angles = sorted(draw.uniform(0, 2 * math.pi) for _ in range(draw.randint(3, 9)))
            canvas.polygon(
                [
                    (x + r * math.cos(angle), y + r * math.sin(angle))
                    for angle in angles
                    for r in [draw.uniform(0.4, 1) * reach]
                ],
                fill=draw.choice(_COLOURS),
            )
    return image.resize(size, Image.Resampling.BOX)


def _losses(vae: Any, picture: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What is minimised, and the mean squared error of the reconstruction."""
    posterior = vae.encode(picture.to(memory_format=torch.channels_last)).latent_dist
    difference = vae.decode(posterior.sample()).sample - picture
    background = picture.flatten(2).median(dim=-1).values[:, :, None, None]
    shapes = ((picture - background).abs().amax(dim=1, keepdim=True) > 0.1).float()
    weights = 1 + _FOREGROUND * shapes  # most pixels are background, which is soon learned
    weights = weights / weights.mean()
    hue = difference - difference.mean(dim=1, keepdim=True)
    loss = (weights * (difference.square() + _HUE * hue.square())).mean()
    # Squares alone leave edges soft.
    loss = loss + 0.2 * difference.abs().mean()
    divergence = posterior.kl().mean() / picture[0].numel()
    return loss + _DIVERGENCE * divergence, difference.detach().square().mean()


def _decibels(error: float) -> float:
    return 10 * math.log10(4 / error)


def _scaled(vae: Any, seed: int) -> Any:
    """Move each channel's mean to 0 and its variance to 1 / scaling_factor², without changing
    what is decoded: the encoder's last layer is scaled, and the decoder's first one back."""
    draw = random.Random(f"{seed}:scale")
    with torch.no_grad():
        means = [
            vae.encode(pixels([paint(imagine(draw))])).latent_dist.mean.flatten(2)
            for _ in range(_SCALED_BY)
        ]
        values = torch.cat([m.transpose(1, 2).flatten(0, 1) for m in means])  # [N, 4]
        mean, factor = values.mean(0), values.std(0) * SCALING_FACTOR
        channels = len(mean)
        into, out_of = vae.quant_conv, vae.post_quant_conv
        out_of.bias += (out_of.weight[:, :, 0, 0] * mean).sum(1)
        out_of.weight *= factor[None, :, None, None]
        into.weight[:channels] /= factor[:, None, None, None]
        into.bias[:channels] = (into.bias[:channels] - mean) / factor
        into.bias[channels:] -= 2 * factor.log()
    return vae
