"""Loss masks: where the picture lies, there its mask lies, whatever is done to the picture."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from omnigen_pipe.config import DatasetOptions, PixelsConfig
from omnigen_pipe.images.geometry import Fault, plan
from omnigen_pipe.images.masks import latent_weights, read_mask
from omnigen_pipe.images.pixels import PixelsError, read_pixels


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def by_hand(mask: np.ndarray, bucket: tuple, resize: tuple, crop: tuple) -> np.ndarray:
    """The mean of the stretched mask over every cell, pixel by pixel, in floating point."""
    found = np.zeros((bucket[1] // 8, bucket[0] // 8))
    scale = resize[0] / mask.shape[1], resize[1] / mask.shape[0]
    for row, column in np.ndindex(found.shape):
        x, y = crop[0] + 8 * column, crop[1] + 8 * row
        for (j, i), value in np.ndenumerate(mask):
            across = min(x + 8, (i + 1) * scale[0]) - max(x, i * scale[0])
            down = min(y + 8, (j + 1) * scale[1]) - max(y, j * scale[1])
            found[row, column] += max(0, across) * max(0, down) * int(value) / 255 / 64
    return found


geometries = st.tuples(
    st.tuples(st.integers(1, 3), st.integers(1, 3)),  # the bucket, in steps of 16
    st.tuples(st.integers(0, 20), st.integers(0, 20)),  # what the resize leaves over
    st.tuples(st.floats(0, 1), st.floats(0, 1)),  # where in that the crop lies
)


def geometry(drawn: tuple) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    (width, height), over, place = drawn
    bucket = (16 * width, 16 * height)
    resize = (bucket[0] + over[0], bucket[1] + over[1])
    return bucket, resize, (int(over[0] * place[0]), int(over[1] * place[1]))


sizes = st.tuples(st.integers(1, 30), st.integers(1, 30))


@given(geometries, sizes, st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_a_weight_is_the_mean_of_the_mask_over_the_latents_rectangle(
    drawn: tuple, size: tuple[int, int], seed: int
) -> None:
    mask = np.random.default_rng(seed).integers(0, 256, size[::-1]).astype(np.uint8)
    weights = latent_weights(mask, *geometry(drawn))
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, by_hand(mask, *geometry(drawn)), atol=1e-6)


@given(geometries, sizes)
def test_white_is_exactly_one_and_black_exactly_nothing(
    drawn: tuple, size: tuple[int, int]
) -> None:
    for value, weight in ((255, 1.0), (0, 0.0)):
        mask = np.full(size[::-1], value, np.uint8)
        assert (latent_weights(mask, *geometry(drawn)) == weight).all()


@given(geometries, st.integers(0, 2**32 - 1), st.sampled_from([(0, 1), (1, 0), (1, 1)]))
def test_a_mirrored_mask_in_a_mirrored_crop_has_mirrored_weights(
    drawn: tuple, seed: int, axes: tuple[int, int]
) -> None:
    bucket, resize, crop = geometry(drawn)
    mask = np.random.default_rng(seed).integers(0, 256, (13, 17)).astype(np.uint8)
    mirrored = tuple(resize[i] - bucket[i] - crop[i] if axes[1 - i] else crop[i] for i in range(2))
    steps = tuple(-1 if axis else 1 for axis in axes)
    there = latent_weights(mask[:: steps[0], :: steps[1]], bucket, resize, mirrored)
    np.testing.assert_array_equal(
        there[:: steps[0], :: steps[1]], latent_weights(mask, bucket, resize, crop)
    )


def test_a_crop_outside_of_the_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="leaves the resized mask"):
        latent_weights(np.zeros((9, 9), np.uint8), (16, 16), (20, 20), (5, 0))


def painted(width: int, height: int) -> tuple[Image.Image, Image.Image]:
    """A picture that is white in some blocks and black elsewhere, and the mask of the white."""
    rng = np.random.default_rng(width * height)
    white = np.kron(rng.integers(0, 2, (9, 11)), np.ones((40, 40))).astype(bool)
    white = white[:height, :width]
    grey = Image.fromarray(np.where(white, 255, 0).astype(np.uint8))
    return grey.convert("RGB"), grey


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"crop": True},
        {"crop": True, "crop_style": "corner"},
        {"crop": True, "crop_style": "random"},
        {"crop": True, "crop_aspect": "closest", "crop_aspect_buckets": (0.5, 1.6)},
        {"crop": True, "maximum_image_size": 300, "target_downsample_size": 250},
        {"upscale": True, "resolution": 512},
    ],
    ids=str,
)
def test_a_mask_painted_from_the_picture_follows_it_through_every_geometry(
    options: dict, orientation: int, scale: int
) -> None:
    """What the picture's own pixels say after decoding, turning, resizing and cropping, the mask
    says too; also where it has half as many pixels, and lies turned otherwise in its file."""
    image, mask = painted(420, 330)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, exif=exif)
    mask = mask.resize((420 // scale, 330 // scale), Image.Resampling.BOX)
    sideways = orientation in (5, 6, 7, 8)
    width, height = (330, 420) if sideways else (420, 330)
    spot = np.array([0x9E3779B97F4A7C15], np.uint64)
    found = plan(
        np.array([width]),
        np.array([height]),
        DatasetOptions(**{"resolution": 160, "aspect_bucket_alignment": 16, **options}),
        spot,
        spot,
    )
    assert found.fault[0] == Fault.NONE
    bucket = (int(found.bucket_width[0]), int(found.bucket_height[0]))
    resize = (int(found.resize_width[0]), int(found.resize_height[0]))
    crop = (int(found.crop_left[0]), int(found.crop_top[0]))

    pixels = read_pixels(data, bucket, resize, crop, PixelsConfig())[..., 0] / 255
    seen = pixels.reshape(bucket[1] // 8, 8, bucket[0] // 8, 8).mean(axis=(1, 3))
    read = read_mask(encoded(mask, exif=exif), "greyscale")
    weights = latent_weights(read, bucket, resize, crop)
    assert weights.shape == seen.shape
    assert 0.1 < weights.mean() < 0.9
    # Lanczos sharpens an edge a little, which the mean over 8x8 pixels hardly sees; a shift by a
    # single latent, or a mask that lies turned, would be wrong by far more.
    assert np.abs(weights - seen).max() < 0.12
    assert np.abs(np.roll(weights, 1, axis=1) - seen).max() > 0.5


def test_alpha_and_greyscale_read_the_same_shape() -> None:
    image, mask = painted(64, 48)
    transparent = image.copy()
    transparent.putalpha(mask)
    np.testing.assert_array_equal(read_mask(encoded(transparent), "alpha"), np.asarray(mask))
    palette = image.quantize(4)
    palette.info["transparency"] = palette.getpixel((0, 0))
    alpha = read_mask(encoded(palette, transparency=palette.getpixel((0, 0))), "alpha")
    np.testing.assert_array_equal(
        alpha == 0, np.asarray(image)[..., 0] == np.asarray(image)[0, 0, 0]
    )


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16", "CMYK"])
def test_a_mask_may_be_kept_in_any_mode(mode: str) -> None:
    _, mask = painted(64, 48)
    if mode == "I;16":
        stored = Image.fromarray(np.asarray(mask).astype(np.uint16) * 257)
    else:
        stored = mask.convert("RGB").convert(mode) if mode in ("CMYK", "P") else mask.convert(mode)
    data = encoded(stored, "TIFF" if mode == "CMYK" else "PNG")
    np.testing.assert_array_equal(read_mask(data, "greyscale"), np.asarray(mask))


def test_what_is_transparent_in_a_greyscale_mask_does_not_count() -> None:
    stored = Image.new("RGBA", (8, 8), (255, 255, 255, 255))
    stored.paste((255, 255, 255, 0), (0, 0, 4, 8))
    mask = read_mask(encoded(stored), "greyscale")
    assert (mask[:, :4] == 0).all()
    assert (mask[:, 4:] == 255).all()


@pytest.mark.parametrize(
    ("data", "kind", "reason"),
    [
        (encoded(Image.new("RGB", (8, 8))), "alpha", "no alpha channel"),
        (b"no picture", "greyscale", "cannot be decoded"),
        (encoded(Image.effect_noise((64, 64), 9))[:-900], "greyscale", "cannot be decoded"),
    ],
)
def test_what_is_no_mask_is_said_to_be_none(data: bytes, kind: str, reason: str) -> None:
    with pytest.raises(PixelsError, match=reason):
        read_mask(data, kind)
