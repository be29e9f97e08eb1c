"""Geometry: from an image's size and a dataset's options to bucket, resize and crop box.

One pure function over columns, in integers from end to end, so that the same image gets the
same numbers on every machine and in any order of rows. Sizes and ratios that a user wrote as
decimals are taken as the exact decimals they are; square roots are integer square roots. All
products stay below 2**62 for images of up to a gigapixel.

Gives up: nothing here looks at the pixels, so a crop knows nothing of what it shows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from fractions import Fraction
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from omnigen_pipe.config import (
    MAX_BUCKET_SIDE,
    DatasetOptions,
    in_unit,
    nearest_whole,
    square_side,
)

#: Raised whenever the same image and options would give another geometry.
GEOMETRY_VERSION = 1

#: `crop_aspect_buckets`, and the aspects compared with them, count to six decimals.
_CLOSEST_UNIT = 10**6
_LARGEST = 2**62

Ints = npt.NDArray[np.int64]


class Fault(IntEnum):
    """Why an image is left out, in the order in which it is asked."""

    NONE = 0
    TOO_SMALL = 1
    TOO_LARGE = 2
    TOO_LONG = 3
    UPSCALED = 4


@dataclass(frozen=True)
class Geometry:
    """Columns of int64, one entry per image, in pixels; `fault` holds `Fault` values.

    Where `fault` is `UPSCALED`, the resize is the enlargement that would be needed; where it is
    `TOO_LONG`, the bucket is the one that would be too long. Otherwise a row with a fault holds
    numbers without meaning.
    """

    bucket_width: Ints
    bucket_height: Ints
    resize_width: Ints
    resize_height: Ints
    crop_left: Ints
    crop_top: Ints
    fault: Ints


def plan(
    width: Ints,
    height: Ints,
    options: DatasetOptions,
    random_x: npt.NDArray[np.uint64],
    random_y: npt.NDArray[np.uint64],
) -> Geometry:
    """The geometry of images of `width` x `height` pixels (after EXIF orientation, at least 1).

    `random_x` and `random_y` are uniform 64-bit numbers per row; only `crop_style = "random"`
    looks at them.
    """
    width, height = width.astype(np.int64), height.astype(np.int64)
    measure = np.minimum(width, height) if options.resolution_type == "pixel" else width * height
    too_small = measure < math.ceil(_in_unit(options.minimum_image_size, options))
    too_large = np.zeros_like(too_small)
    if options.maximum_image_size and not options.target_downsample_size:
        too_large = measure > math.floor(_in_unit(options.maximum_image_size, options))

    bucket_width, bucket_height = _buckets(width, height, options)
    too_long = np.maximum(bucket_width, bucket_height) > MAX_BUCKET_SIDE

    cover_width, cover_height = _cover(width, height, bucket_width, bucket_height)
    upscaled = (cover_width > width) | (cover_height > height)
    canvas_width, canvas_height = _canvas(width, height, measure, options)
    resize_width = np.maximum(np.minimum(canvas_width, width), cover_width)
    resize_height = np.maximum(np.minimum(canvas_height, height), cover_height)

    over_x, over_y = resize_width - bucket_width, resize_height - bucket_height
    if options.crop and options.crop_style == "corner":
        left, top = np.zeros_like(over_x), np.zeros_like(over_y)
    elif options.crop and options.crop_style == "random":
        left = (random_x % (over_x + 1).astype(np.uint64)).astype(np.int64)
        top = (random_y % (over_y + 1).astype(np.uint64)).astype(np.int64)
    else:
        left, top = over_x // 2, over_y // 2

    fault = np.select(
        [too_small, too_large, too_long, upscaled & (not options.upscale)],
        [Fault.TOO_SMALL, Fault.TOO_LARGE, Fault.TOO_LONG, Fault.UPSCALED],
        Fault.NONE,
    ).astype(np.int64)
    return Geometry(bucket_width, bucket_height, resize_width, resize_height, left, top, fault)


def _in_unit(size: float, options: DatasetOptions) -> Fraction:
    return in_unit(size, options.resolution_type)


def _nearest_quotient(numerator: Ints | int, denominator: Ints | int) -> Ints:
    """numerator / denominator, rounded to whole numbers, halves up."""
    return np.asarray((2 * numerator + denominator) // (2 * denominator), np.int64)


def _nearest_root(fourfold: Ints) -> Ints:
    """The whole number nearest to sqrt(x), halves up, given floor(4 x), below 2**62.

    k rounds sqrt(x) when k - 1/2 <= sqrt(x), that is (2k - 1)**2 <= 4x, and k is the largest.
    """
    root = np.sqrt(fourfold.astype(np.float64)).astype(np.int64)
    # The float root may be off by one either way.
    root -= root * root > fourfold
    root += (root + 1) * (root + 1) <= fourfold
    return (root + 1) // 2


def _buckets(width: Ints, height: Ints, options: DatasetOptions) -> tuple[Ints, Ints]:
    """The bucket of each image: width and height, multiples of the alignment."""
    if options.crop and options.crop_aspect == "square":
        side = np.full_like(width, max(square_side(options), options.aspect_bucket_alignment))
        return side, side
    if options.crop and options.crop_aspect == "closest":
        listed = sorted(
            {
                max(1, nearest_whole(Fraction(repr(a)) * _CLOSEST_UNIT))
                for a in options.crop_aspect_buckets
            }
        )
        listed = [min(a, _LARGEST) for a in listed]
        # Nearest in log ratio: below the geometric mean of two neighbours, the smaller wins.
        means = [min(math.isqrt(a * b), _LARGEST) for a, b in pairwise(listed)]
        aspect = _nearest_quotient(width * _CLOSEST_UNIT, height)
        choice = np.searchsorted(np.array(means, np.int64), aspect, side="left")
        sides = _bucket_sides(np.array(listed, np.int64), _CLOSEST_UNIT, options)
        return sides[0][choice], sides[1][choice]
    unit = 10**options.aspect_bucket_rounding
    aspect = np.maximum(_nearest_quotient(width * unit, height), 1)
    return _bucket_sides(aspect, unit, options)


def _bucket_sides(aspect: Ints, unit: int, options: DatasetOptions) -> tuple[Ints, Ints]:
    """Width and height of the buckets of the aspects `aspect / unit`."""
    step = options.aspect_bucket_alignment
    target = max(1, nearest_whole(_in_unit(options.resolution, options)))
    pixels = target**2 if options.resolution_type == "pixel" else target
    # Aspects beyond this make a side far over the limit anyway; within it no product overflows.
    aspect = np.minimum(aspect, _LARGEST // max(4 * pixels, step * step))
    if options.resolution_type == "pixel":
        wide = aspect >= unit
        short = np.full_like(aspect, (2 * target + step) // (2 * step))
        long = np.where(
            wide,
            _nearest_quotient(target * aspect, unit * step),
            _nearest_quotient(np.full_like(aspect, target * unit), aspect * step),
        )
        across, down = np.where(wide, long, short), np.where(wide, short, long)
    else:
        across = _nearest_root(4 * pixels * aspect // (unit * step * step))
        down = _nearest_root(4 * pixels * unit // (aspect * (step * step)))
    return np.maximum(across, 1) * step, np.maximum(down, 1) * step


def _cover(width: Ints, height: Ints, bucket_width: Ints, bucket_height: Ints) -> tuple[Ints, Ints]:
    """The smallest resize, in the image's own aspect, that covers the bucket.

    One side is the bucket's, the other at least as long as the bucket's.
    """
    by_width = bucket_width * height >= bucket_height * width
    return (
        np.where(by_width, bucket_width, _nearest_quotient(width * bucket_height, height)),
        np.where(by_width, _nearest_quotient(height * bucket_width, width), bucket_height),
    )


def _canvas(width: Ints, height: Ints, measure: Ints, options: DatasetOptions) -> tuple[Ints, Ints]:
    """The size an image is brought to before it is cropped; 1x1 where only the bucket decides."""
    if not (options.crop and options.target_downsample_size):
        return np.ones_like(width), np.ones_like(height)
    limit = math.floor(
        _in_unit(options.maximum_image_size or options.target_downsample_size, options)
    )
    target = max(1, nearest_whole(_in_unit(options.target_downsample_size, options)))
    size = np.minimum(measure, min(target, _LARGEST))  # never larger than the image
    if options.resolution_type == "pixel":
        shrunk = _nearest_quotient(width * size, measure), _nearest_quotient(height * size, measure)
    else:
        shrunk = (
            _nearest_root(4 * size * width // height),
            _nearest_root(4 * size * height // width),
        )
    keep = measure <= limit
    return np.where(keep, width, shrunk[0]), np.where(keep, height, shrunk[1])
