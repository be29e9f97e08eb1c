"""Perceptual hashes, and the pairs among many of them that differ in a few bits.

The hash is the usual one of the discrete cosine transform: 64 of an image's lowest frequencies,
each a bit that says whether it is above their median (Zauner, "Implementation and Benchmarking of
Perceptual Image Hash Functions", 2010). Given up: rotated, mirrored and strongly cropped copies.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

#: The side in pixels of what is transformed, and of the square of frequencies that is kept.
SIDE, _KEPT = 32, 8

#: Pairs are found by bands of bits: hashes that differ in at most 3 bits agree in one of 4 bands.
_BANDS, _BAND_BITS = 4, 16
MOST_DISTANCE = _BANDS - 1

Hashes = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]


def _cosines() -> npt.NDArray[np.float64]:
    """The rows 0 … `_KEPT` - 1 of the DCT-II of `SIDE` points, unscaled."""
    k, n = np.arange(_KEPT)[:, None], np.arange(SIDE)[None, :]
    return np.asarray(np.cos(np.pi * k * (2 * n + 1) / (2 * SIDE)))


_COSINES = _cosines()


def grey(picture: Image.Image) -> npt.NDArray[np.uint8]:
    """What is hashed of an RGB picture: uint8 `[SIDE, SIDE]`, its luma without its shape."""
    small = picture.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return np.asarray(small, np.uint8)


def perceptual_hash(luma: npt.NDArray[np.uint8]) -> int:
    """The 64 bits of `luma`, uint8 `[SIDE, SIDE]`; of one that is plain all are 0 but the first."""
    frequencies = (_COSINES @ luma.astype(np.float64) @ _COSINES.T).round(6).ravel()
    bits = frequencies > np.median(frequencies[1:])
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def near_pairs(hashes: Hashes, distance: int) -> tuple[Ints, Ints]:
    """All pairs i < j of different hashes that differ in at most `distance` bits, sorted.

    `hashes` must be distinct, and `distance` at most `MOST_DISTANCE`. Memory is in proportion to
    the hashes and the pairs that are found: those that agree in a band are compared row by row.
    """
    if not 0 <= distance <= MOST_DISTANCE:
        raise ValueError(f"pairs are found up to a distance of {MOST_DISTANCE}")
    found: list[Ints] = []
    for band in range(_BANDS):
        values = (hashes >> np.uint64(band * _BAND_BITS)) & np.uint64(2**_BAND_BITS - 1)
        order = np.argsort(values, kind="stable")
        edges = np.flatnonzero(np.diff(values[order])) + 1
        for group in np.split(order, edges):
            for place in range(len(group) - 1):
                one, others = group[place], group[place + 1 :]
                near = others[np.bitwise_count(hashes[others] ^ hashes[one]) <= distance]
                if len(near):
                    pair = np.stack([np.full_like(near, one), near])
                    found.append(np.sort(pair, axis=0))
    if not found:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    # A pair may agree in several bands.
    first, second = np.unique(np.concatenate(found, axis=1), axis=1)
    return first, second
