"""Laws of the geometry, a second implementation in exact fractions, and the guide's own options."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omnigen_pipe.config import MAX_BUCKET_SIDE, DatasetConfig, DatasetOptions, square_side
from omnigen_pipe.images.geometry import Fault, Geometry, plan

HALF = Fraction(1, 2)


def dataset(**options: Any) -> DatasetConfig:
    return DatasetConfig(id="d", instance_data_dir="images", **options)


def planned(
    sizes: list[tuple[int, int]],
    options: DatasetOptions,
    random: list[tuple[int, int]] | None = None,
) -> Geometry:
    spots = random or [(0, 0)] * len(sizes)
    return plan(
        np.array([w for w, _ in sizes], np.int64),
        np.array([h for _, h in sizes], np.int64),
        options,
        np.array([x for x, _ in spots], np.uint64),
        np.array([y for _, y in spots], np.uint64),
    )


def rows(geometry: Geometry) -> list[tuple[int, ...]]:
    """(fault, bucket, resize, crop) per image."""
    return list(
        zip(
            geometry.fault.tolist(),
            geometry.bucket_width.tolist(),
            geometry.bucket_height.tolist(),
            geometry.resize_width.tolist(),
            geometry.resize_height.tolist(),
            geometry.crop_left.tolist(),
            geometry.crop_top.tolist(),
            strict=True,
        )
    )


def one(width: int, height: int, **options: Any) -> tuple[int, ...]:
    return rows(planned([(width, height)], dataset(**options)))[0]


# The same rules once more: one image at a time, exact fractions, nothing shared with the code.


def nearest(value: Fraction) -> int:
    return math.floor(value + HALF)


def nearest_root(value: Fraction) -> int:
    root = math.isqrt(math.floor(value))
    return root + 1 if (root + HALF) ** 2 <= value else root


def reference(width: int, height: int, o: DatasetConfig, spot: tuple[int, int]) -> tuple[int, ...]:
    def in_unit(size: float) -> Fraction:
        exact = Fraction(str(size))
        return {"pixel": exact, "area": exact * 1_000_000, "pixel_area": exact**2}[
            o.resolution_type
        ]

    by_side = o.resolution_type == "pixel"
    measure = min(width, height) if by_side else width * height
    fault = Fault.NONE
    if measure < in_unit(o.minimum_image_size):
        fault = Fault.TOO_SMALL
    elif 0 < in_unit(o.maximum_image_size) < measure and not o.target_downsample_size:
        fault = Fault.TOO_LARGE

    decimals = 10**o.aspect_bucket_rounding
    aspect = max(
        Fraction(nearest(Fraction(width, height) * decimals), decimals), 1 / Fraction(decimals)
    )
    if o.crop and o.crop_aspect == "square":
        aspect = Fraction(1)
    if o.crop and o.crop_aspect == "closest":
        own = Fraction(nearest(Fraction(width, height) * 10**6), 10**6)
        listed = sorted(Fraction(str(a)) for a in o.crop_aspect_buckets)
        aspect = min(listed, key=lambda a: max(a / own, own / a))
    step, target = o.aspect_bucket_alignment, Fraction(nearest(in_unit(o.resolution)))
    if by_side:
        sides = max(target, target * aspect), max(target, target / aspect)
        bucket = tuple(max(1, nearest(side / step)) * step for side in sides)
    else:
        areas = target * aspect, target / aspect
        bucket = tuple(max(1, nearest_root(area / step**2)) * step for area in areas)
    if not fault and max(bucket) > MAX_BUCKET_SIDE:
        fault = Fault.TOO_LONG

    scale = max(Fraction(bucket[0], width), Fraction(bucket[1], height))
    cover = nearest(width * scale), nearest(height * scale)
    if not fault and scale > 1 and not o.upscale:
        fault = Fault.UPSCALED
    resize = cover
    if o.crop and o.target_downsample_size:
        limit = in_unit(o.maximum_image_size or o.target_downsample_size)
        size = min(nearest(in_unit(o.target_downsample_size)), measure)
        if measure <= limit:
            canvas = width, height
        elif by_side:
            canvas = (
                nearest(Fraction(width * size, measure)),
                nearest(Fraction(height * size, measure)),
            )
        else:
            canvas = (
                nearest_root(Fraction(size * width, height)),
                nearest_root(Fraction(size * height, width)),
            )
        resize = max(min(canvas[0], width), cover[0]), max(min(canvas[1], height), cover[1])

    over = resize[0] - bucket[0], resize[1] - bucket[1]
    if o.crop and o.crop_style == "corner":
        crop = 0, 0
    elif o.crop and o.crop_style == "random":
        crop = spot[0] % (over[0] + 1), spot[1] % (over[1] + 1)
    else:
        crop = over[0] // 2, over[1] // 2
    return (int(fault), *bucket, *resize, *crop)


sides = st.one_of(st.integers(200, 4000), st.integers(1, 65535))
image_sizes = st.lists(st.tuples(sides, sides), min_size=1, max_size=12)
words = st.integers(0, 2**64 - 1)


@st.composite
def datasets(draw: st.DrawFn, **fixed: Any) -> DatasetConfig:
    unit = draw(st.sampled_from(["pixel", "area", "pixel_area"]))

    def size(least: int, most: int) -> float:
        side = draw(st.one_of(st.integers(least, most), st.floats(least, most)))
        return round(side * side / 1e6, 5) if unit == "area" else round(side, 2)

    limits = sorted([size(0, 3000), size(0, 6000)])
    options: dict[str, Any] = {
        "resolution_type": unit,
        "resolution": size(128, 3072),
        "minimum_image_size": draw(st.sampled_from([0, limits[0]])),
        "maximum_image_size": draw(st.sampled_from([0, limits[1]])),
        "target_downsample_size": draw(st.sampled_from([0, size(0, 5000)])),
        "upscale": draw(st.booleans()),
        "crop": draw(st.booleans()),
        "crop_aspect": draw(st.sampled_from(["square", "preserve", "closest"])),
        "crop_aspect_buckets": draw(
            st.lists(
                st.one_of(
                    st.sampled_from([0.5, 0.75, 1.0, 4 / 3, 1.5, 2.0]).map(lambda a: round(a, 6)),
                    st.floats(0.05, 20).map(lambda a: round(a, 6)),
                ),
                min_size=1,
                max_size=6,
            )
        ),
        "crop_style": draw(st.sampled_from(["center", "random", "corner"])),
        "aspect_bucket_alignment": draw(st.sampled_from([16, 32, 48, 64, 128])),
        "aspect_bucket_rounding": draw(st.integers(0, 6)),
    }
    return dataset(**{**options, **fixed})


@given(image_sizes, datasets(), st.lists(st.tuples(words, words), min_size=12, max_size=12))
@settings(max_examples=600, deadline=None)
def test_equals_the_same_rules_in_exact_fractions(
    sizes: list[tuple[int, int]], options: DatasetConfig, spots: list[tuple[int, int]]
) -> None:
    spots = spots[: len(sizes)]
    expected = [reference(w, h, options, spot) for (w, h), spot in zip(sizes, spots, strict=True)]
    assert rows(planned(sizes, options, spots)) == expected


@given(
    st.sampled_from(["pixel", "area", "pixel_area"]),
    st.integers(1, 192).map(lambda n: n * 16),
    st.floats(0.4, 60),
)
@settings(max_examples=300, deadline=None)
def test_a_resolution_is_allowed_where_square_images_have_a_bucket(
    resolution_type: str, step: int, steps: float
) -> None:
    """Squares that are not cropped go through the columns, the check of the options does not."""
    side = round(steps * 2) * step / 2 if steps > 1 else steps * step
    resolution = side * side / 1e6 if resolution_type == "area" else side
    common = {
        "resolution": resolution,
        "resolution_type": resolution_type,
        "aspect_bucket_alignment": step,
    }
    free = DatasetOptions(**common)
    ((fault, width, height, *_),) = rows(planned([(20000, 20000)], free))
    assert width == height == max(square_side(free), step)
    if fault == Fault.TOO_LONG:
        with pytest.raises(ValueError, match="limit is 3072"):
            dataset(**common)
    elif square_side(free) == 0:
        with pytest.raises(ValueError, match="half of aspect_bucket_alignment"):
            dataset(**common)
    else:
        assert fault == Fault.NONE
        cropped = planned([(20000, 20000)], dataset(crop=True, **common))
        assert cropped.bucket_width.tolist() == [width]


@given(image_sizes, datasets(), words, words)
@settings(max_examples=300, deadline=None)
def test_every_used_geometry_keeps_the_laws(
    sizes: list[tuple[int, int]], options: DatasetConfig, x: int, y: int
) -> None:
    found = rows(planned(sizes, options, [(x, y)] * len(sizes)))
    for (width, height), row in zip(sizes, found, strict=True):
        fault, bucket_w, bucket_h, resize_w, resize_h, left, top = row
        if fault != Fault.NONE:
            continue
        for side in (bucket_w, bucket_h):
            assert side % options.aspect_bucket_alignment == 0
            assert 0 < side <= MAX_BUCKET_SIDE
        assert 0 <= left <= resize_w - bucket_w
        assert 0 <= top <= resize_h - bucket_h
        if not options.upscale:
            assert resize_w <= width
            assert resize_h <= height
        if not (options.crop and options.target_downsample_size):
            # The canvas is what covers the bucket: one side fits exactly.
            assert resize_w == bucket_w or resize_h == bucket_h
        # The resize keeps the image's aspect, but for the rounding of each side to a pixel.
        assert abs(resize_w * height - resize_h * width) <= max(width, height)


@given(image_sizes, datasets(), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_does_not_depend_on_the_order_of_rows(
    sizes: list[tuple[int, int]], options: DatasetConfig, random: Any
) -> None:
    spots = [(17 * w, 31 * h) for w, h in sizes]
    order = list(range(len(sizes)))
    random.shuffle(order)
    shuffled = rows(planned([sizes[i] for i in order], options, [spots[i] for i in order]))
    straight = rows(planned(sizes, options, spots))
    assert shuffled == [straight[i] for i in order]


@given(image_sizes, datasets(minimum_image_size=0, maximum_image_size=0), st.data())
@settings(deadline=None)
def test_filters_are_monotonic(
    sizes: list[tuple[int, int]], options: DatasetConfig, data: st.DataObject
) -> None:
    limits = st.floats(0.01, 5000)
    smaller, larger = sorted([data.draw(limits), data.draw(limits)])

    def used(**changes: Any) -> set[int]:
        changed = dataset(**{**options.model_dump(exclude={"id", "instance_data_dir"}), **changes})
        faults = planned(sizes, changed).fault
        return set(np.flatnonzero(faults == Fault.NONE).tolist())

    assert used(minimum_image_size=larger) <= used(minimum_image_size=smaller) <= used()
    alone = {"target_downsample_size": 0}
    assert (
        used(maximum_image_size=smaller, **alone)
        <= used(maximum_image_size=larger, **alone)
        <= used(**alone)
    )
    assert used(upscale=False) <= used(upscale=True)


@given(sides, sides, datasets(crop=False))
@settings(deadline=None)
def test_a_larger_copy_of_a_used_image_is_used(
    width: int, height: int, options: DatasetConfig
) -> None:
    options = options.model_copy(update={"maximum_image_size": 0.0})
    fault, *bucket = one_of_plan(width, height, options)[:3]
    if fault == Fault.NONE:
        assert one_of_plan(3 * width, 3 * height, options)[:3] == (Fault.NONE, *bucket)


def one_of_plan(width: int, height: int, options: DatasetConfig) -> tuple[int, ...]:
    return rows(planned([(width, height)], options))[0]


def test_no_image_gives_no_row() -> None:
    assert rows(planned([], dataset())) == []
    closest = dataset(crop=True, crop_aspect="closest", crop_aspect_buckets=[1.0])
    assert rows(planned([], closest)) == []


@pytest.mark.parametrize("size", [(2**31 - 1, 1), (1, 2**31 - 1), (200_000_000, 1)])
@pytest.mark.parametrize("unit", ["pixel", "area", "pixel_area"])
def test_the_most_extreme_shapes_are_left_out_and_not_miscounted(
    size: tuple[int, int], unit: str
) -> None:
    resolution = 1 if unit == "area" else 1024
    fault, *_ = one(*size, resolution=resolution, resolution_type=unit, upscale=True)
    assert fault == Fault.TOO_LONG


# The options one by one, in numbers a person can follow.

NONE, SMALL, LARGE, LONG, UP = (
    Fault.NONE,
    Fault.TOO_SMALL,
    Fault.TOO_LARGE,
    Fault.TOO_LONG,
    Fault.UPSCALED,
)


@pytest.mark.parametrize(
    ("options", "size", "expected"),
    [
        # 1,500,000 px: sqrt(1024**2 * 1.5) = 1254 -> 1280; 836 -> 832.
        ({}, (3000, 2000), (NONE, 1280, 832, 1280, 853, 0, 10)),
        ({}, (1024, 1024), (NONE, 1024, 1024, 1024, 1024, 0, 0)),
        ({"resolution": 512}, (3000, 2000), (NONE, 640, 448, 672, 448, 16, 0)),
        (
            {"resolution_type": "area", "resolution": 1},
            (2000, 2000),
            (NONE, 1024, 1024, 1024, 1024, 0, 0),
        ),
        (
            {"resolution_type": "pixel", "resolution": 512},
            (3000, 2000),
            (NONE, 768, 512, 768, 512, 0, 0),
        ),
        (
            {"resolution_type": "pixel", "resolution": 512},
            (2000, 3000),
            (NONE, 512, 768, 512, 768, 0, 0),
        ),
        # 1254 is nearer to 1248 than to 1264, and 836 to 832 than to 848.
        ({"aspect_bucket_alignment": 16}, (3000, 2000), (NONE, 1248, 832, 1248, 832, 0, 0)),
        # Without decimals 1.5 rounds up to 2: sqrt(2 * 1024**2) = 1448 -> 1472 (23 * 64 = 1472).
        ({"aspect_bucket_rounding": 0}, (3000, 2000), (NONE, 1472, 704, 1472, 981, 0, 138)),
        # Not enlarged unless asked; the resize says what it would take.
        ({}, (1023, 1023), (UP, 1024, 1024, 1024, 1024, 0, 0)),
        ({"upscale": True}, (500, 500), (NONE, 1024, 1024, 1024, 1024, 0, 0)),
        ({"resolution": 2048}, (65000, 3000), (LONG, 9536, 448, 9707, 448, 85, 0)),
    ],
)
def test_bucket_examples(
    options: dict[str, Any], size: tuple[int, int], expected: tuple[int, ...]
) -> None:
    assert one(*size, **options) == expected


SQUARE = {"crop": True, "resolution": 512}


@pytest.mark.parametrize(
    ("options", "size", "expected"),
    [
        (SQUARE, (3000, 2000), (NONE, 512, 512, 768, 512, 128, 0)),
        (SQUARE | {"crop_style": "corner"}, (3000, 2000), (NONE, 512, 512, 768, 512, 0, 0)),
        (SQUARE | {"crop_aspect": "preserve"}, (3000, 2000), (NONE, 640, 448, 672, 448, 16, 0)),
        # sqrt(512**2 * 0.75) = 443 -> 448; sqrt(512**2 / 0.75) = 591 -> 576.
        (
            SQUARE | {"crop_aspect": "closest", "crop_aspect_buckets": [1.0, 0.75, 1.33]},
            (2000, 3000),
            (NONE, 448, 576, 448, 672, 0, 48),
        ),
        # Above the maximum: shrunk to about 768**2 pixels (941 x 627), then cropped.
        (
            SQUARE | {"maximum_image_size": 1024, "target_downsample_size": 768},
            (3000, 2000),
            (NONE, 512, 512, 941, 627, 214, 57),
        ),
        # At the maximum or below: cropped at its own size.
        (
            SQUARE | {"maximum_image_size": 1024, "target_downsample_size": 768},
            (1024, 1024),
            (NONE, 512, 512, 1024, 1024, 256, 256),
        ),
        # Target alone: what is larger is shrunk to it.
        (
            SQUARE | {"target_downsample_size": 768},
            (3000, 2000),
            (NONE, 512, 512, 941, 627, 214, 57),
        ),
        (
            SQUARE | {"target_downsample_size": 768},
            (768, 768),
            (NONE, 512, 512, 768, 768, 128, 128),
        ),
        # A target that does not cover the bucket gives way to what does.
        (SQUARE | {"target_downsample_size": 64}, (3000, 2000), (NONE, 512, 512, 768, 512, 128, 0)),
        # A target beyond the image does not enlarge it, even where enlarging is allowed.
        (
            SQUARE | {"upscale": True, "maximum_image_size": 600, "target_downsample_size": 4000},
            (1000, 1000),
            (NONE, 512, 512, 1000, 1000, 244, 244),
        ),
        # In pixels of the shorter side: 2000 -> 768.
        (
            SQUARE | {"resolution_type": "pixel", "target_downsample_size": 768},
            (3000, 2000),
            (NONE, 512, 512, 1152, 768, 320, 128),
        ),
        # Without crop there is no canvas: the whole image just covers its bucket.
        (
            {"resolution": 512, "maximum_image_size": 1024, "target_downsample_size": 768},
            (3000, 2000),
            (NONE, 640, 448, 672, 448, 16, 0),
        ),
    ],
)
def test_crop_examples(
    options: dict[str, Any], size: tuple[int, int], expected: tuple[int, ...]
) -> None:
    assert one(*size, **options) == expected


@pytest.mark.parametrize(
    ("options", "size", "fault"),
    [
        ({"minimum_image_size": 512}, (512, 512), NONE),
        ({"minimum_image_size": 512}, (511, 513), SMALL),
        ({"minimum_image_size": 512}, (256, 1024), NONE),
        ({"minimum_image_size": 512, "resolution_type": "pixel"}, (511, 5000), SMALL),
        (
            {"minimum_image_size": 0.25, "resolution_type": "area", "resolution": 0.1},
            (500, 500),
            NONE,
        ),
        (
            {"minimum_image_size": 0.25, "resolution_type": "area", "resolution": 0.1},
            (499, 501),
            SMALL,
        ),
        # 0.3 megapixels are 300,000 pixels, although 0.3 is not exact in binary.
        (
            {"minimum_image_size": 0.3, "resolution_type": "area", "resolution": 0.1},
            (600, 500),
            NONE,
        ),
        ({"maximum_image_size": 512}, (512, 512), NONE),
        ({"maximum_image_size": 512}, (512, 513), LARGE),
        ({"maximum_image_size": 512, "target_downsample_size": 512}, (5120, 5130), NONE),
        ({"maximum_image_size": 512, "resolution_type": "pixel"}, (512, 700), NONE),
        ({"maximum_image_size": 512, "resolution_type": "pixel"}, (513, 513), LARGE),
    ],
)
def test_size_filters(options: dict[str, Any], size: tuple[int, int], fault: Fault) -> None:
    assert one(*size, **{"resolution": 256, "upscale": True, **options})[0] == fault


def guide(side: int, **more: Any) -> dict[str, Any]:
    """minimum, maximum and target all at the resolution, as the OmniGen quickstart has them."""
    return {
        "resolution": side,
        "resolution_type": "pixel_area",
        "minimum_image_size": side,
        "maximum_image_size": side,
        "target_downsample_size": side,
        **more,
    }


@pytest.mark.parametrize(
    ("options", "size", "expected"),
    [
        (guide(512, crop=True), (4000, 3000), (NONE, 512, 512, 683, 512, 85, 0)),
        (guide(512, crop=True), (512, 512), (NONE, 512, 512, 512, 512, 0, 0)),
        (guide(512, crop=True), (640, 400), (SMALL, 512, 512, 819, 512, 153, 0)),
        # Large enough in area, but a square of 512 needs 512 on both sides.
        (guide(512, crop=True), (1000, 400), (UP, 512, 512, 1280, 512, 384, 0)),
        (guide(1024), (4000, 3000), (NONE, 1152, 896, 1195, 896, 21, 0)),
        (guide(512), (4000, 3000), (NONE, 576, 448, 597, 448, 10, 0)),
        (guide(1024), (1000, 1000), (SMALL, 1024, 1024, 1024, 1024, 0, 0)),
    ],
)
def test_the_guides_own_datasets(
    options: dict[str, Any], size: tuple[int, int], expected: tuple[int, ...]
) -> None:
    assert one(*size, **options) == expected


def test_closest_prefers_the_smaller_of_two_equally_near() -> None:
    options = {
        "crop": True,
        "crop_aspect": "closest",
        "crop_aspect_buckets": [2.0, 0.5],
        "resolution": 512,
    }
    assert one(1000, 1000, **options)[1:3] == one(1000, 2000, **options)[1:3]
    assert one(1001, 1000, **options)[1:3] == one(2000, 1000, **options)[1:3]


def test_random_crops_reach_every_offset() -> None:
    options = dataset(crop=True, crop_style="random", resolution=512)
    spots = [(x, 2**64 - 1 - x) for x in range(257)]
    found = planned([(768, 512)] * 257, options, spots)
    assert found.crop_left.tolist() == list(range(257))
    assert set(found.crop_top.tolist()) == {0}
