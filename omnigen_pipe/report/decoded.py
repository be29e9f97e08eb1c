"""Latents beside the pixels that they were made of: what the VAE gives back, and how near it is.

Decoded is the posterior's mean. PSNR is 10·log₁₀(255² / mean squared error) over all pixels and
channels, both images in 8 bits; equal images have no finite one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from manifests.errors import PipeError
from omnigen_pipe.images.pixels import read_pixels
from omnigen_pipe.latents.shards import read_latent, shard_path
from omnigen_pipe.latents.vae import LATENT_CHANNELS, scaling_factor
from omnigen_pipe.model_files import Model, local_model_part
from omnigen_pipe.progress import Progress
from omnigen_pipe.report.sheets import Sheets
from omnigen_pipe.report.thumbnails import Album, fitted, read_file
from omnigen_pipe.workspace import Workspace

#: The longer side in pixels at which both are shown; they are compared at their own size.
_SHOWN = 320


@dataclass(frozen=True)
class Pair:
    """An image's pixels as the VAE got them and what its latent decodes to; `psnr` in dB, infinite
    where they are equal. Without pictures `problem` says why."""

    name: str
    bucket: str
    pixels: str | None = None
    decoded: str | None = None
    psnr: float | None = None
    size: tuple[int, int] = (0, 0)
    problem: str | None = None


@dataclass(frozen=True)
class Decoded:
    """The pairs, and why there are none where there are none."""

    pairs: list[Pair] = field(default_factory=list)
    why_none: str | None = None

    @property
    def mean(self) -> float | None:
        """The mean of all finite PSNRs, dB; None where there are none."""
        found = [p.psnr for p in self.pairs if p.psnr is not None and math.isfinite(p.psnr)]
        return sum(found) / len(found) if found else None


def psnr(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> float:
    """The peak signal-to-noise ratio of two images of one shape, in dB; infinite where equal."""
    error = float(np.mean((one.astype(np.float64) - other.astype(np.float64)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def compare(
    workspace: Workspace,
    progress: Progress,
    roots: dict[str, Path],
    album: Album,
    sheets: Sheets,
    count: int,
    device: str | None,
) -> Decoded:
    """Decode the latents of `count` samples of the `sheets`, from as many buckets as possible.

    The VAE is loaded only where there is something to decode, and never downloaded. Where it
    cannot be, the reason is in what is returned. Raises `UsageError` for a `device` that is none.
    """
    if count == 0:
        return Decoded(why_none="Left out with --decoded 0.")
    found = [
        (place, number, card)
        for number, sheet in enumerate(sheets.sheets)
        for place, card in enumerate(sheet.cards)
        if (card.sample["latent"] or {}).get("status") == "ok"
    ]
    cards = [card for _, _, card in sorted(found, key=lambda item: item[:2])[:count]]
    folder = local_model_part(workspace, "vae")
    if folder is None:
        return Decoded(why_none="The model's VAE is not on this machine: encode-vae fetches it.")
    if sheets.sheets and not sheets.cards and not sheets.refused:
        return Decoded(
            why_none="Only images of the contact sheets are decoded, and --samples 0 leaves them "
            "out."
        )
    if not cards:
        return Decoded(
            why_none="None of the images shown above has a latent: run `omnigen-pipe encode-vae`."
        )
    import torch

    from omnigen_pipe.device import pick_device
    from omnigen_pipe.sampling.source import Source

    place = pick_device(device)
    progress.note(f"inspect: decoding {len(cards)} latents on {place}")
    source = Source.of(workspace)
    try:
        vae = source.decoder(place)
        scale = scaling_factor(folder)
    except (torch.OutOfMemoryError, MemoryError):
        return unusable(
            f"{place} has too little memory for it. Free some, or choose another --device."
        )
    except (PipeError, RuntimeError) as error:
        return unusable(source.without_folders(" ".join(str(error).split())))
    return Decoded(
        [_pair(workspace, roots, album, card.sample, vae, place, scale) for card in cards]
    )


def unusable(why: str) -> Decoded:
    """What there is where the VAE cannot be used, which `why` explains."""
    return Decoded(why_none=f"The model's VAE cannot be used: {why}")


def _pair(
    workspace: Workspace,
    roots: dict[str, Path],
    album: Album,
    sample: dict[str, Any],
    vae: Any,
    device: Any,
    scale: float,
) -> Pair:
    """Raises nothing for what is wrong with one image or latent: the pair says it."""
    name, geometry = f"{sample['dataset']}: {sample['path']}", sample["geometry"]
    try:
        pixels = _pixels(workspace, roots, sample)
        decoded = _decoded(workspace, sample["latent"], vae, device, scale)
    except PipeError as error:
        # Where the workspace lies is nobody's business who reads the page.
        said = Model.of(workspace).without_folders(str(error))
        return Pair(name, geometry["bucket"], problem=said)
    except MemoryError:
        return Pair(name, geometry["bucket"], problem="too little memory to decode it")
    if decoded is None:
        return Pair(name, geometry["bucket"], problem="the decoded numbers are not finite")
    shown = fitted((pixels.shape[1], pixels.shape[0]), _SHOWN)
    small = [
        Image.fromarray(each).resize(shown, Image.Resampling.LANCZOS) for each in (pixels, decoded)
    ]
    uris = [album.add(each) for each in small]
    problem = None if all(uris) else "the page has no room for more pictures"
    ratio = psnr(pixels, decoded)
    return Pair(name, geometry["bucket"], uris[0], uris[1], ratio, shown, problem)


def _pixels(
    workspace: Workspace, roots: dict[str, Path], sample: dict[str, Any]
) -> npt.NDArray[np.uint8]:
    """What the VAE got: uint8 `[H, W, 3]`."""
    geometry, image = sample["geometry"], sample["image"]
    if image is None:
        raise PipeError("it is no longer in images.parquet")
    data = read_file(roots, [(sample["dataset"], sample["path"])], image["content_hash"])
    width, height = (int(side) for side in geometry["bucket"].split("x"))
    return read_pixels(
        data,
        (width, height),
        (geometry["resize_width"], geometry["resize_height"]),
        (geometry["crop_left"], geometry["crop_top"]),
        workspace.config.pixels,
    )


def _decoded(
    workspace: Workspace, row: dict[str, Any], vae: Any, device: Any, scale: float
) -> npt.NDArray[np.uint8] | None:
    """What the mean of the latent in `row` decodes to, uint8 `[H, W, 3]`; None where it is not
    finite. Raises `PipeError` where the shard does not hold it, or torch cannot decode it."""
    import torch

    from omnigen_pipe.sampling.pipeline import decoded

    path = shard_path(workspace.root, row["shard"])
    shape = tuple(row["shape"])
    if len(shape) != 3 or shape[0] != 2 * LATENT_CHANNELS:
        raise PipeError(f"its latent has the shape {list(shape)}")
    moments = read_latent(path, row["offset"], row["nbytes"], row["checksum"], shape, row["dtype"])
    mean = torch.from_numpy(moments[:LATENT_CHANNELS].astype(np.float32))
    try:
        mean = mean.to(device)
        picture = decoded(vae, mean * scale)
    except torch.OutOfMemoryError as error:
        raise PipeError(f"{device} has too little memory to decode it") from error
    except RuntimeError as error:  # what a device or a library of it raises
        raise PipeError(f"it cannot be decoded: {' '.join(str(error).split())}") from error
    return None if picture is None else np.asarray(picture.convert("RGB"), np.uint8)
