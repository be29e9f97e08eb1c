"""Loss masks: how much each latent of an image counts in training, from 0 to 1.

A mask lies over its image as a transparency would: its own width and height, whatever they are in
pixels, are the image's. What a latent weighs is the mean of the mask over the rectangle that this
latent covers, computed in whole numbers from the mask's own pixels: nothing outside that rectangle
can leak in, black stays exactly 0, white exactly 1, and every machine finds the same. A resample
like the pixels' own (Lanczos) rings, and would let what is masked out count a little.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import ImageChops

from omnigen_pipe.images.pixels import PixelsError, read_upright

#: Raised whenever the same bytes and geometry would give another mask.
MASK_VERSION = 1

#: Pixels a side per latent.
_DOWNSCALE = 8
_WHITE = 255

#: `greyscale`: the picture's lightness; `alpha`: its alpha channel.
Kind = Literal["greyscale", "alpha"]

#: Why bucket leaves an image out whose mask says that nothing in it counts.
EMPTY = "empty mask: it has no weight inside the crop"


def policy(kind: Kind) -> str:
    """A text that differs whenever the same bytes and geometry would give another mask."""
    return f"mask v{MASK_VERSION} {kind}"


def read_mask(data: bytes, kind: Kind) -> npt.NDArray[np.uint8]:
    """The mask in an image file: uint8 `[h, w]`, upright, 0 for nothing and 255 for all.

    A greyscale mask is the picture's lightness, without colour management; where it is transparent
    it is black. Raises `PixelsError` where it cannot be decoded, or has no alpha channel and that
    is the mask; `MemoryError` where memory was too short.
    """
    image = read_upright(data)
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    if kind == "alpha":
        if alpha is None:
            raise PixelsError("the image has no alpha channel")
        return np.asarray(alpha)
    grey = image.convert("RGB" if image.mode in ("CMYK", "RGBA") else image.mode).convert("L")
    return np.asarray(grey if alpha is None else ImageChops.multiply(grey, alpha))


def latent_weights(
    mask: npt.NDArray[np.uint8],
    bucket: tuple[int, int],
    resize: tuple[int, int],
    crop: tuple[int, int],
) -> npt.NDArray[np.float32]:
    """The weight of every latent of an image in one geometry: float32 `[H/8, W/8]`, 0 to 1.

    `bucket` is (W, H), `resize` the size of the whole image after its resample, `crop` the
    (left, top) of the bucket in it; all in pixels, as for `read_pixels`.
    """
    (left, top), (width, height) = crop, bucket
    if min(crop) < 0 or left + width > resize[0] or top + height > resize[1]:
        raise ValueError(f"the crop at {crop} of {bucket} leaves the resized mask of {resize} px")
    rows = _sums(mask, resize[1], top, height // _DOWNSCALE)
    cells = _sums(np.ascontiguousarray(rows.T), resize[0], left, width // _DOWNSCALE).T
    # Each sum counts a pixel of the mask `resize` times, over a cell of 8 mask heights and widths.
    whole = _WHITE * _DOWNSCALE**2 * mask.shape[0] * mask.shape[1]
    weights: npt.NDArray[np.float32] = (cells / whole).astype(np.float32)
    return weights


def _sums(
    values: npt.NDArray[np.generic], scaled: int, start: int, cells: int
) -> npt.NDArray[np.int64]:
    """Sums along the first axis over cells, in whole numbers: `[cells, …]`.

    The axis, n long, is stretched to `scaled`; cell k reaches from `start` + 8k to `start` + 8k + 8
    of that. Positions are counted in units of 1/`scaled` of a value, so that all of them are whole:
    a value is `scaled` units long, a cell 8n.
    """
    n = values.shape[0]
    found = np.empty((cells, *values.shape[1:]), np.int64)
    for k in range(cells):
        begin = (start + _DOWNSCALE * k) * n
        end = begin + _DOWNSCALE * n
        first, last = begin // scaled, -(-end // scaled)
        covered = np.full(last - first, scaled, np.int64)
        covered[0] -= begin - first * scaled
        covered[-1] -= last * scaled - end
        found[k] = np.tensordot(covered, values[first:last].astype(np.int64), 1)
    return found
