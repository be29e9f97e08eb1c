"""Pixels: every kind of image file against Pillow used plainly, or against known colours."""

from __future__ import annotations

import io
import math
import struct
import subprocess
import sys
import threading
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageCms, ImageFile, ImageOps

from omnigen_pipe.config import PixelsConfig
from omnigen_pipe.images import pixels, probe
from omnigen_pipe.images.pixels import Made, PixelsError, policy, read_pixels

LANCZOS = Image.Resampling.LANCZOS
FULL = PixelsConfig()
REDUCED = PixelsConfig(decode="reduced")


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A colourful picture without two equal quarters: smooth waves and a little noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    waves = [128 + 100 * np.sin(x / (9 + 4 * c) + y / (13 - 3 * c) + c) for c in range(3)]
    values = (
        np.stack(waves, -1) + rng.normal(0, 8, (height, width, 3)) + (x / width * 20)[..., None]
    )
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def whole(data: bytes, config: PixelsConfig = FULL) -> np.ndarray:
    """All pixels of an image file, neither resized nor cropped."""
    with Image.open(io.BytesIO(data)) as image:
        size = ImageOps.exif_transpose(image).size
    return read_pixels(data, size, size, (0, 0), config)


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: bytes) -> bytes:
    """A PNG built by hand (RFC 2083): Pillow cannot write every kind it must read."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    extra = b"".join(chunk(body[:4], body[4:]) for body in chunks)
    stride = len(rows) // height
    lines = b"".join(b"\0" + rows[y * stride : (y + 1) * stride] for y in range(height))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in decibels of two uint8 arrays."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_resize_and_crop_equal_pillow(data: st.DataObject) -> None:
    width, height = data.draw(st.integers(16, 90)), data.draw(st.integers(16, 90))
    resize = (data.draw(st.integers(16, 64)), data.draw(st.integers(16, 64)))
    left, top = data.draw(st.integers(0, resize[0] - 16)), data.draw(st.integers(0, resize[1] - 16))
    image = picture(width, height)
    expected = image.resize(resize, LANCZOS).crop((left, top, left + 16, top + 16))
    found = read_pixels(encoded(image, "PNG"), (16, 16), resize, (left, top), FULL)
    assert np.array_equal(found, np.asarray(expected))


def test_shape_is_height_width_channels() -> None:
    found = read_pixels(encoded(picture(60, 40), "PNG"), (48, 32), (48, 32), (0, 0), FULL)
    assert (found.shape, found.dtype) == ((32, 48, 3), np.uint8)


@pytest.mark.parametrize("crop", [(-1, 0), (0, -1), (17, 0), (0, 17)])
def test_a_crop_outside_is_refused(crop: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="leaves the resized image"):
        read_pixels(encoded(picture(64, 64), "PNG"), (32, 32), (48, 48), crop, FULL)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(picture(96, 64), kind, exif=exif, **options)
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    assert upright.size == ((96, 64) if orientation < 5 else (64, 96))
    size = (upright.width * 2 // 3, upright.height // 2)
    box = (3, 5, 3 + 16, 5 + 16)
    found = read_pixels(data, (16, 16), size, (3, 5), FULL)
    assert np.array_equal(found, np.asarray(upright.resize(size, LANCZOS).crop(box)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_reduced_decoding_minds_the_orientation(orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encoded(picture(803, 405).resize((1203, 805), LANCZOS), "JPEG", exif=exif, quality=95)
    with Image.open(io.BytesIO(data)) as image:
        width, height = ImageOps.exif_transpose(image).size
    size = (width // 7, height // 7)
    full = read_pixels(data, size, size, (0, 0), FULL)
    reduced = read_pixels(data, size, size, (0, 0), REDUCED)
    assert not np.array_equal(full, reduced)
    assert psnr(full, reduced) > 40


@pytest.mark.parametrize(
    ("size", "resize", "decoded"),
    [
        ((1200, 800), (100, 66), (150, 100)),  # an eighth: 1.5 times exactly
        ((1200, 800), (100, 67), (300, 200)),  # an eighth would leave 100 of 100.5 rows
        ((1200, 800), (200, 133), (300, 200)),
        ((1200, 800), (201, 133), (600, 400)),
        ((1200, 800), (400, 266), (600, 400)),
        ((1200, 800), (401, 266), (1200, 800)),
        ((1201, 801), (100, 66), (151, 101)),  # Pillow's reduced sizes are rounded up
        ((1200, 800), (1200, 800), (1200, 800)),
    ],
)
def test_reduction_is_the_largest_that_leaves_the_margin(
    size: tuple[int, int],
    resize: tuple[int, int],
    decoded: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, int]] = []
    load = ImageFile.ImageFile.load

    def spy(image: ImageFile.ImageFile) -> Any:
        seen.append(image.size)
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", spy)
    read_pixels(encoded(picture(*size), "JPEG"), resize, resize, (0, 0), REDUCED)
    assert seen[0] == decoded


def _files_of_all_sorts() -> dict[str, bytes]:
    """Files of 400 x 300 pixels that take different ways to their pixels."""
    turned, plain = Image.Exif(), picture(400, 300)
    turned[ExifTags.Base.Orientation] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    alpha = plain.copy()
    alpha.putalpha(picture(400, 300, seed=1).convert("L"))
    deep = Image.fromarray(np.arange(400 * 300, dtype=np.uint16).reshape(300, 400))
    return {
        "JPEG": encoded(plain, "JPEG"),
        "turned JPEG with a profile": encoded(plain, "JPEG", exif=turned, icc_profile=profile),
        "CMYK JPEG": encoded(plain.convert("CMYK"), "JPEG"),
        "PNG with alpha": encoded(alpha, "PNG"),
        "turned WebP": encoded(plain, "WEBP", exif=turned, lossless=True),
        "16-bit PNG": encoded(deep, "PNG"),
        "palette": encoded(plain.quantize(16), "GIF"),
    }


@pytest.mark.parametrize("config", [FULL, REDUCED], ids=["full", "reduced"])
@pytest.mark.parametrize("sort", list(_files_of_all_sorts()))
def test_several_geometries_of_a_file_are_what_each_is_alone(
    sort: str, config: PixelsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, in any order; and decoded once for each scale, resized once for each size."""
    data = _files_of_all_sorts()[sort]
    geometries = [
        ((32, 32), (44, 33), (5, 1)),  # of JPEGs a quarter
        ((32, 48), (100, 75), (9, 20)),  # a half
        ((32, 48), (100, 75), (60, 3)),
        ((48, 64), (300, 225), (100, 80)),
        ((400, 300), (400, 300), (0, 0)),
    ]
    alone = [read_pixels(data, *geometry, config) for geometry in geometries]
    decoded: list[tuple[int, int]] = []
    prepare = ImageFile.ImageFile.load_prepare

    def spy(image: ImageFile.ImageFile) -> None:
        decoded.append(image.size)
        prepare(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load_prepare", spy)
    reducible = config is REDUCED and "JPEG" in sort
    for order in (range(5), reversed(range(5)), (2, 0, 4, 1, 3)):
        decoded.clear()
        made = Made()
        for index in order:
            found = read_pixels(data, *geometries[index], config, made)
            assert np.array_equal(found, alone[index])
        assert len(decoded) == len(set(decoded)) == (3 if reducible else 1)
        assert len(made.resized) == 4


def test_reduced_only_touches_jpeg() -> None:
    data = encoded(picture(640, 480), "PNG")
    args = ((64, 48), (64, 48), (0, 0))
    assert np.array_equal(read_pixels(data, *args, FULL), read_pixels(data, *args, REDUCED))


def test_reduced_is_close_to_full_on_photographs(photos: Path) -> None:
    distances = []
    for path in sorted(photos.glob("*.jpg")):
        data = path.read_bytes()
        with Image.open(path) as image:
            width, height = image.size
        scale = 512 / math.sqrt(width * height)  # resolution = 512, resolution_type = pixel_area
        size = (round(width * scale), round(height * scale))
        full = read_pixels(data, size, size, (0, 0), FULL)
        distances.append(psnr(full, read_pixels(data, size, size, (0, 0), REDUCED)))
    assert len(distances) == 12
    # 48 dB is the worst; without the fraction of the padded last row it would be 39.
    assert 45 <= min(distances) < math.inf


def test_greyscale_and_bilevel() -> None:
    grey = picture(40, 30).convert("L")
    assert np.array_equal(whole(encoded(grey, "PNG")), np.asarray(grey.convert("RGB")))
    bilevel = grey.convert("1")
    expected = np.asarray(bilevel.convert("L").convert("RGB"))
    assert np.array_equal(whole(encoded(bilevel, "PNG")), expected)
    # Resampled as greys: a bilevel image would otherwise lose its antialiasing.
    half = read_pixels(encoded(bilevel, "PNG"), (20, 15), (20, 15), (0, 0), FULL)
    assert np.array_equal(half[..., 0], np.asarray(bilevel.convert("L").resize((20, 15), LANCZOS)))


def test_palette() -> None:
    flat = picture(40, 30).quantize(16)
    assert np.array_equal(whole(encoded(flat, "PNG")), np.asarray(flat.convert("RGB")))
    assert np.array_equal(whole(encoded(flat, "GIF")), np.asarray(flat.convert("RGB")))


def over(image: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    """`image` over a plain background, by Pillow."""
    background = Image.new("RGBA", image.size, (*colour, 255))
    return np.asarray(Image.alpha_composite(background, image.convert("RGBA")).convert("RGB"))


COLOURS = [("white", (255, 255, 255)), ("#102030", (16, 32, 48)), ("#10203080", (16, 32, 48))]


@pytest.mark.parametrize(("name", "colour"), COLOURS)
def test_alpha_lies_over_the_background(name: str, colour: tuple[int, int, int]) -> None:
    config = PixelsConfig(alpha_background=name)
    ramp = Image.linear_gradient("L").resize((40, 30))
    for mode in ("RGBA", "LA"):
        image = picture(40, 30).convert(mode)
        image.putalpha(ramp)
        assert np.array_equal(whole(encoded(image, "PNG"), config), over(image, colour))


def test_transparent_colours_do_not_bleed_into_edges() -> None:
    # Red where it is visible, green where it is not: no green may appear when it is resized.
    image = Image.new("RGBA", (64, 64), (0, 255, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 33, 64))
    config = PixelsConfig(alpha_background="black")
    found = read_pixels(encoded(image, "PNG"), (16, 16), (16, 16), (0, 0), config)
    assert found[..., 1].max() == 0
    assert found[0, 0].tolist() == [255, 0, 0]
    assert found[0, 15].tolist() == [0, 0, 0]


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palette_with_transparency(kind: str) -> None:
    flat = Image.new("P", (20, 20), 0)
    flat.putpalette([255, 0, 0, 0, 0, 255])
    flat.paste(1, (0, 0, 10, 20))
    data = encoded(flat, kind, transparency=1)
    found = whole(data, PixelsConfig(alpha_background="lime"))
    assert found[0, 0].tolist() == [0, 255, 0]
    assert found[0, 19].tolist() == [255, 0, 0]


def test_palette_with_an_alpha_for_every_colour() -> None:
    flat = Image.new("P", (20, 10), 0)
    flat.putpalette([200, 0, 0, 0, 0, 200])
    flat.paste(1, (0, 0, 10, 10))
    data = encoded(flat, "PNG", transparency=bytes([255, 128]))
    found = whole(data, PixelsConfig(alpha_background="black"))
    assert found[0, 19].tolist() == [200, 0, 0]
    assert abs(int(found[0, 0, 2]) - round(200 * 128 / 255)) <= 1


def test_colour_key_of_greyscale_and_colour() -> None:
    grey = Image.new("L", (20, 10), 100)
    grey.paste(7, (0, 0, 10, 10))
    red = Image.new("RGB", (20, 10), (100, 100, 100))
    red.paste((7, 8, 9), (0, 0, 10, 10))
    for image, key in ((grey, 7), (red, (7, 8, 9))):
        found = whole(encoded(image, "PNG", transparency=key), PixelsConfig(alpha_background="red"))
        assert found[0, 0].tolist() == [255, 0, 0]
        assert found[0, 19].tolist() == [100, 100, 100]


def gradient16() -> np.ndarray:
    """Every 16-bit level once: `[256, 256]`."""
    return np.arange(65536, dtype=np.uint16).reshape(256, 256)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_16_bit_greyscale_is_rounded_not_cut(kind: str) -> None:
    levels = gradient16()
    found = whole(encoded(Image.fromarray(levels), kind))
    expected = np.rint(levels * (255 / 65535))
    assert np.array_equal(found, np.repeat(expected[..., None], 3, axis=2))
    assert (found[0, 0, 0], found[-1, -1, 0]) == (0, 255)


def test_16_bit_big_endian_tiff() -> None:
    levels = gradient16()
    image = Image.frombytes("I;16B", (256, 256), levels.astype(">u2").tobytes())
    assert np.array_equal(whole(encoded(image, "TIFF"))[..., 1], np.rint(levels * (255 / 65535)))


@pytest.mark.parametrize("transparent", [None, 7])
@pytest.mark.parametrize("block", [1, 1000, 2**20])
def test_deep_greyscale_is_scaled_in_blocks_as_if_at_once(
    block: int, transparent: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixels, "_BLOCK_PIXELS", block)
    levels = np.random.default_rng(0).integers(0, 65536, (37, 53)).astype(np.uint16)
    levels[::5] = 7
    rows = levels.astype(">u2").tobytes()
    chunks = [] if transparent is None else [b"tRNS" + struct.pack(">H", transparent)]
    expected = np.rint(levels.astype(np.float64) / 65535 * 255).astype(np.uint8)
    if transparent is not None:
        expected = np.where(levels == transparent, 255, expected)
    found = whole(png(53, 37, 16, 0, rows, *chunks))
    assert np.array_equal(found, np.repeat(expected[..., None], 3, axis=-1))


def test_deep_greyscale_takes_no_multiple_of_its_size() -> None:
    image = Image.new("I;16", (4000, 4000), 1234)
    data = encoded(image, "PNG")
    small = (64, 64)
    tracemalloc.start()
    try:
        read_pixels(data, small, small, (0, 0), FULL)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # A byte a pixel for the result, and blocks of 8-byte numbers.
    assert peak < 4000 * 4000 + 8 * 8 * 2**20


def test_32_bit_tiff_spans_its_signed_range() -> None:
    levels = np.array([[0, 2**30, 2**31 - 1, -5] * 8] * 16, np.int32)
    found = whole(encoded(Image.fromarray(levels), "TIFF"))
    assert found[0, :4, 0].tolist() == [0, 128, 255, 0]


def tiff(values: np.ndarray, bits: int, sample_format: int, photometric: int) -> bytes:
    """An uncompressed little-endian greyscale TIFF built by hand (TIFF 6.0)."""
    height, width = values.shape
    body = values.tobytes()
    entries = [
        (256, 3, width), (257, 3, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric),
        (273, 4, 8), (277, 3, 1), (278, 3, height), (279, 4, len(body)), (339, 3, sample_format),
    ]  # fmt: skip
    directory = struct.pack("<H", len(entries)) + b"".join(
        struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries
    )
    return struct.pack("<2sHI", b"II", 42, 8 + len(body)) + body + directory + struct.pack("<I", 0)


def test_tiff_ranges_follow_its_tags() -> None:
    unsigned = np.array([[0, 2**31, 2**32 - 1, 2**30] * 4] * 4, "<u4")
    assert whole(tiff(unsigned, 32, 1, 1))[0, :4, 0].tolist() == [0, 128, 255, 64]
    signed = np.array([[0, 16384, 32767, -9] * 4] * 4, "<i2")
    assert whole(tiff(signed, 16, 2, 1))[0, :4, 0].tolist() == [0, 128, 255, 0]
    white_is_zero = np.array([[0, 65535, 32768, 257] * 4] * 4, "<u2")
    assert whole(tiff(white_is_zero, 16, 1, 0))[0, :4, 0].tolist() == [255, 0, 127, 254]


def test_floating_point_pixels_are_refused() -> None:
    data = encoded(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF")
    with pytest.raises(PixelsError, match="floating-point"):
        whole(data)


def test_16_bit_colour_and_its_colour_key() -> None:
    rows = struct.pack(">6H", 0, 32768, 65535, 1000, 2000, 3000) * 2
    found = whole(png(2, 2, 16, 2, rows))
    assert found[0, 0].tolist() == [0, 128, 255]
    keyed = png(2, 2, 16, 2, rows, b"tRNS" + struct.pack(">3H", 1000, 2000, 3000))
    found = whole(keyed, PixelsConfig(alpha_background="red"))
    assert found[0].tolist() == [[0, 128, 255], [255, 0, 0]]


def test_16_bit_greyscale_with_a_colour_key() -> None:
    rows = struct.pack(">2H", 40000, 1000) * 2
    found = whole(png(2, 2, 16, 0, rows, b"tRNS" + struct.pack(">H", 1000)))
    assert found[0].tolist() == [[156, 156, 156], [255, 255, 255]]


def test_cmyk_without_profile() -> None:
    image = picture(64, 48).convert("CMYK")
    data = encoded(image, "TIFF")
    assert np.array_equal(whole(data), np.asarray(image.convert("RGB")))
    jpeg = encoded(image, "JPEG", quality=95)
    with Image.open(io.BytesIO(jpeg)) as reopened:
        assert reopened.mode == "CMYK"
        expected = np.asarray(reopened.convert("RGB"))
    assert np.array_equal(whole(jpeg), expected)
    assert psnr(whole(jpeg), np.asarray(picture(64, 48))) > 30  # not inverted


def test_ycbcr_and_lab_tiff() -> None:
    image = picture(40, 30)
    lab = ImageCms.profileToProfile(
        image,
        ImageCms.createProfile("sRGB"),
        ImageCms.createProfile("LAB"),
        outputMode="LAB",
    )
    assert lab is not None
    assert psnr(whole(encoded(lab, "TIFF")), np.asarray(image)) > 35


def matrix_profile(*, swapped: bool = False, linear: bool = False) -> bytes:
    """An sRGB profile, with red and blue exchanged, or with gamma 1, by editing its tags."""
    raw = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    (count,) = struct.unpack_from(">I", raw, 128)
    for index in range(count):
        at = 132 + 12 * index
        name, offset, size = struct.unpack_from(">4sII", raw, at)
        if swapped and name in (b"rXYZ", b"bXYZ"):
            raw[at : at + 4] = b"bXYZ" if name == b"rXYZ" else b"rXYZ"
        if linear and name in (b"rTRC", b"gTRC", b"bTRC"):
            # curveType without entries is the identity (ICC.1:2010, 10.5).
            raw[offset : offset + 12] = b"curv" + bytes(8)
            struct.pack_into(">I", raw, at + 8, 12 if size >= 12 else size)
    return bytes(raw)


def test_profile_with_other_primaries() -> None:
    # Its red primary is sRGB's blue: the colours of a correct reader are exchanged.
    image = picture(40, 30)
    data = encoded(image, "PNG", icc_profile=matrix_profile(swapped=True))
    difference = whole(data).astype(int) - np.asarray(image)[..., ::-1].astype(int)
    assert np.abs(difference).max() <= 1


def test_linear_profile_follows_the_srgb_curve() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.repeat(levels[..., None], 3, axis=2))
    found = whole(encoded(image, "PNG", icc_profile=matrix_profile(linear=True)))
    linear = levels / 255
    curve = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    assert np.abs(found[..., 1] - 255 * curve).max() <= 1.5  # IEC 61966-2-1


def test_profile_of_colour_applies_to_grey_and_beside_alpha() -> None:
    profile = matrix_profile(linear=True)
    grey = Image.new("L", (16, 16), 55)
    assert whole(encoded(grey, "JPEG", icc_profile=profile))[0, 0].tolist() == [128] * 3
    clear = Image.new("RGBA", (16, 16), (55, 55, 55, 255))
    clear.paste((55, 55, 55, 0), (8, 0, 16, 16))
    found = whole(
        encoded(clear, "PNG", icc_profile=profile), PixelsConfig(alpha_background="#010203")
    )
    assert found[0, 0].tolist() == [128] * 3
    assert found[0, 15].tolist() == [1, 2, 3]  # the background is sRGB already


def test_palette_with_profile() -> None:
    flat = Image.new("P", (16, 16), 0)
    flat.putpalette([55, 55, 55])
    data = encoded(flat, "PNG", icc_profile=matrix_profile(linear=True))
    assert whole(data)[0, 0].tolist() == [128] * 3


@pytest.mark.parametrize(
    "profile", [b"not a profile", matrix_profile()[:200], matrix_profile()[:-40]]
)
def test_broken_profiles_are_ignored(profile: bytes) -> None:
    image = picture(40, 30)
    found = whole(encoded(image, "PNG", icc_profile=profile))
    assert np.abs(found.astype(int) - np.asarray(image)).max() <= 1


def test_profile_of_another_colour_space_is_ignored() -> None:
    image = picture(40, 30)
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert np.array_equal(whole(encoded(image, "PNG", icc_profile=lab)), np.asarray(image))
    cmyk = image.convert("CMYK")
    data = encoded(cmyk, "TIFF", icc_profile=matrix_profile())
    assert np.array_equal(whole(data), np.asarray(cmyk.convert("RGB")))


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "PNG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert whole(data)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "GIF", "WEBP"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_truncated_files_are_refused(kind: str, share: float) -> None:
    data = encoded(picture(200, 160), kind)
    for config in (FULL, REDUCED):
        with pytest.raises(PixelsError, match=r"cannot be decoded: ."):
            read_pixels(data[: int(len(data) * share)], (32, 32), (40, 32), (0, 0), config)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=60), st.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP"]))
def test_damage_is_either_decoded_or_named(noise: bytes, kind: str) -> None:
    data = bytearray(encoded(picture(40, 30), kind))
    at = len(data) // 3
    data[at : at + len(noise)] = noise
    try:
        found = read_pixels(bytes(data), (16, 16), (20, 16), (0, 0), FULL)
    except PixelsError:
        return
    assert found.shape == (16, 16, 3)


LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from omnigen_pipe.config import PixelsConfig
from omnigen_pipe.images.pixels import read_pixels

small, large = (Path(name).read_bytes() for name in sys.argv[1:])
for data, extra in [(small, 0), *((large, 4 * step) for step in range(30))]:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + extra * 2**20 if extra else -1
    resource.setrlimit(resource.RLIMIT_AS, (limit, -1))
    try:
        read_pixels(data, (16, 16), (16, 16), (0, 0), PixelsConfig())
        found = "decoded"
    except MemoryError:
        found = "too little memory"
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    print(found)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the memory in use")
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("JPEG", {"progressive": True}),
        ("WEBP", {"lossless": True, "method": 0}),
        ("JPEG2000", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ],
)
def test_too_little_memory_is_no_fact_about_the_bytes(
    tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    """Under whatever limit, a good image is decoded or has too little memory: never damaged."""
    (tmp_path / "small").write_bytes(encoded(picture(16, 16), kind, **options))
    (tmp_path / "large").write_bytes(encoded(Image.new("RGB", (2000, 2000)), kind, **options))
    done = subprocess.run(
        [sys.executable, "-c", LITTLE_MEMORY, str(tmp_path / "small"), str(tmp_path / "large")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.splitlines()) == {"decoded", "too little memory"}


def test_pillows_pixel_limit_does_not_apply_and_is_put_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = encoded(picture(64, 64), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(data))
    threads = [threading.Thread(target=whole_unlimited, args=(data,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert whole_unlimited(data).shape == (64, 64, 3)
    assert Image.MAX_IMAGE_PIXELS == 100
    with pytest.raises(PixelsError):
        whole_unlimited(data[:60])
    assert Image.MAX_IMAGE_PIXELS == 100


def whole_unlimited(data: bytes) -> np.ndarray:
    return read_pixels(data, (64, 64), (64, 64), (0, 0), FULL)


def test_truncated_images_stay_refused_globally() -> None:
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_policy_names_whatever_changes_pixels() -> None:
    configs = [FULL, REDUCED, PixelsConfig(alpha_background="black")]
    assert len({policy(config) for config in configs}) == 3
    assert str(pixels.PIXELS_VERSION) in policy(FULL)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_is_no_orientation() -> None:
    # As discover sees it: the two must agree on which side is up.
    data = encoded(picture(48, 32), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f" + bytes(20))
    assert whole_as(data, (48, 32)).shape == (32, 48, 3)
    assert (probe.probe(data).width, probe.probe(data).height) == (48, 32)


def test_exif_behind_the_pixels_of_a_png_counts() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    body = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    plain = encoded(picture(48, 32), "PNG")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    late = plain[:-12] + chunk + plain[-12:]
    assert (probe.probe(late).width, probe.probe(late).height) == (32, 48)
    expected = picture(48, 32).transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(whole_as(late, (32, 48)), np.asarray(expected))


def whole_as(data: bytes, size: tuple[int, int]) -> np.ndarray:
    return read_pixels(data, size, size, (0, 0), FULL)
