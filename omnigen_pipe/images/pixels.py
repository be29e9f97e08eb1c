"""From a file's bytes and a geometry to the pixels that the VAE gets.

Every kind of image ends as upright sRGB with 8 bits a channel, resampled once. Pillow decodes,
LittleCMS converts colours. Given up: more than 8 bits (a 16-bit greyscale image is rounded; of
16-bit colour Pillow keeps the upper byte), gamma and HDR tags outside ICC profiles, and
floating-point images, for which no format says what white is.
"""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from PIL import Image, ImageCms, ImageColor

from manifests.errors import PipeError
from omnigen_pipe.config import PixelsConfig
from omnigen_pipe.images.probe import FORMATS, PILLOW_ERRORS, SIDEWAYS, orientation

#: Raised whenever the same bytes and geometry would give other pixels.
PIXELS_VERSION = 1

#: `decode = "reduced"` leaves at least this many times the size after the resize.
REDUCTION_MARGIN = 1.5

#: What decoding and converting may need at once, in bytes a pixel and in all: measured over the
#: formats, and rounded up.
_NEEDED_PER_PIXEL, _NEEDED = 16, 64 * 2**20

#: The size taken for granted where even the header cannot be read, in pixels.
_ASSUMED_PIXELS = 64 * 2**20

#: So many pixels of a deep greyscale image are scaled at once: their numbers take 8 bytes each.
_BLOCK_PIXELS = 2**20

#: What undoes each EXIF orientation (EXIF 2.32, tag 0x0112).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_SAMPLE_FORMAT = 258, 262, 339


class PixelsError(PipeError):
    """The bytes of an image cannot become pixels; a fact about the bytes, and no accident."""


@dataclass(frozen=True)
class Decoded:
    """A decoded image, in mode L, RGB, CMYK, LA or RGBA, in its own colours.

    Where it was reduced, `box` is the part of it that the full image covers (its last row and
    column may be padded), and it lies as it is stored, still to be turned by the EXIF orientation
    `turned`. Otherwise it is upright.
    """

    image: Image.Image
    box: tuple[float, float, float, float] | None
    turned: int


@dataclass
class Made:
    """What was made of the bytes of one file so far, for its next geometry to start from.

    Decoded images by the size in pixels that they were reduced to, None where they were not; and
    upright ones by their size after the resize.
    """

    decoded: dict[tuple[int, int] | None, Decoded] = field(default_factory=dict)
    resized: dict[tuple[int, int], Image.Image] = field(default_factory=dict)


def policy(config: PixelsConfig) -> str:
    """A text that differs whenever the same bytes and geometry would give other pixels."""
    return f"v{PIXELS_VERSION} {config.decode} lanczos srgb {config.alpha_background}"


def read_pixels(
    data: bytes,
    bucket: tuple[int, int],
    resize: tuple[int, int],
    crop: tuple[int, int],
    config: PixelsConfig,
    made: Made | None = None,
) -> np.ndarray:
    """The pixels of an image file in one geometry: uint8 `[H, W, 3]`, upright sRGB.

    `bucket` is (W, H), `resize` the size of the whole image after its one Lanczos resample,
    `crop` the (left, top) of the bucket in it; all in pixels. The first frame counts. A colour
    profile that is broken, or made for another kind of image, is ignored.

    `made`, handed from one geometry of the same `data` and `config` to the next, lets several cost
    one decoding for each scale and one resample for each size. It changes no pixel.

    Raises `PixelsError` when the bytes cannot be decoded to the end, and `MemoryError` where
    memory was too short to try: that is no fact about the bytes.
    """
    left, top = crop
    box = (left, top, left + bucket[0], top + bucket[1])
    if min(crop) < 0 or box[2] > resize[0] or box[3] > resize[1]:
        raise ValueError(f"the crop {box} leaves the resized image of {resize} px")
    made = made or Made()
    with _decoding(data):
        with _any_size():
            # Some versions of Pillow hold crops against the limit too.
            if resize not in made.resized:
                made.resized[resize] = _resized(data, resize, config, made)
            image = made.resized[resize].crop(box)
        return _finish(image, config)


def read_upright(data: bytes) -> Image.Image:
    """The first frame of an image file, upright, at its own size, in mode L, RGB, CMYK, LA or RGBA
    and in its own colours.

    Raises as `read_pixels` does.
    """
    with _decoding(data), _any_size():
        return _decoded(data, (1, 1), PixelsConfig(), Made()).image


@contextmanager
def _decoding(data: bytes) -> Iterator[None]:
    """Within it, what decoders raise for `data` becomes `PixelsError`, or `MemoryError`."""
    try:
        yield
    except PILLOW_ERRORS as error:
        if _for_want_of_memory(error, data):
            raise MemoryError(f"while decoding: {error}") from error
        raise PixelsError(f"cannot be decoded: {error or type(error).__name__}") from error


def _for_want_of_memory(error: Exception, data: bytes) -> bool:
    """Whether a decoder may have failed because memory was short.

    Some decoders (progressive JPEG, JPEG 2000, WebP) then say the same as for damaged bytes, so
    it is asked whether what they need can be had now. The pages asked for are never touched.
    """
    if "out of memory" in str(error).lower():
        return True
    try:
        with _any_size(), Image.open(io.BytesIO(data), formats=tuple(FORMATS)) as image:
            pixels = image.width * image.height
    except MemoryError:
        return True
    except PILLOW_ERRORS:
        pixels = _ASSUMED_PIXELS  # a WebP is opened by its decoder, which wants memory first
    try:
        np.empty(pixels * _NEEDED_PER_PIXEL + _NEEDED, np.uint8)
    except MemoryError:
        return True
    return False


_limit_lock = threading.Lock()
_limit_users = 0
_limit: int | None = None


@contextmanager
def _any_size() -> Iterator[None]:
    """Lift Pillow's limit of pixels while at least one image is being read here.

    discover has held these very bytes against `maximum_pixels`, which may lie above Pillow's
    own limit. That one is a global of the process and is put back with the last reader.
    """
    global _limit, _limit_users
    with _limit_lock:
        if _limit_users == 0:
            _limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        _limit_users += 1
    try:
        yield
    finally:
        with _limit_lock:
            _limit_users -= 1
            if _limit_users == 0:
                Image.MAX_IMAGE_PIXELS = _limit


def _resized(data: bytes, size: tuple[int, int], config: PixelsConfig, made: Made) -> Image.Image:
    """The upright image at `size`, in mode L, RGB, CMYK, LA or RGBA, in its own colours."""
    decoded = _decoded(data, size, config, made)
    plain = decoded.image
    if decoded.box is not None:
        # Resized before it is turned, because the box is in the stored image's axes.
        stored = size[::-1] if decoded.turned in SIDEWAYS else size
        plain = plain.resize(stored, Image.Resampling.LANCZOS, box=decoded.box)
        if decoded.turned in _UPRIGHT:
            plain = plain.transpose(_UPRIGHT[decoded.turned])
    if plain.size != size:
        plain = plain.resize(size, Image.Resampling.LANCZOS)
    return plain


def _decoded(data: bytes, size: tuple[int, int], config: PixelsConfig, made: Made) -> Decoded:
    """The image at the scale that `size` needs, decoded unless it is already."""
    if config.decode == "full" and None in made.decoded:
        return made.decoded[None]
    image = Image.open(io.BytesIO(data), formats=tuple(FORMATS))
    box = _reduce(image, size) if config.decode == "reduced" else None
    scale = None if box is None else image.size
    if scale not in made.decoded:
        deep_colour = any("16" in str(tile[3]) for tile in getattr(image, "tile", ()))
        image.load()
        turned = orientation(image)  # after load: Pillow turns TIFFs upright by itself
        plain = _plain(image, deep_colour)
        if box is None and turned in _UPRIGHT:
            plain = plain.transpose(_UPRIGHT[turned])
        if "icc_profile" in image.info:
            plain.info["icc_profile"] = image.info["icc_profile"]
        made.decoded[scale] = Decoded(plain, box, turned)
    return made.decoded[scale]


def _reduce(image: Image.Image, size: tuple[int, int]) -> tuple[float, float, float, float] | None:
    """Let a JPEG decode at the largest reduction that `REDUCTION_MARGIN` allows.

    Returns the part of the reduced image that the full one covers (its last row and column may
    be padded), or None where nothing is reduced.
    """
    if image.format not in ("JPEG", "MPO"):
        return None
    width, height = size[::-1] if orientation(image) in SIDEWAYS else size
    full = image.size
    # draft() picks the largest of 1, 2, 4, 8 that leaves at least the size asked for.
    asked = (math.ceil(REDUCTION_MARGIN * width), math.ceil(REDUCTION_MARGIN * height))
    drafted = image.draft(image.mode, asked)
    return None if drafted is None or image.size == full else drafted[1]


def _plain(image: Image.Image, deep_colour: bool) -> Image.Image:
    """`image` in mode L, RGB, CMYK, LA or RGBA, with transparency as an alpha channel."""
    mode = image.mode
    if mode.startswith("I"):
        return _scaled(image)
    if mode == "F":
        raise ValueError("its pixels are floating-point numbers, and nothing says what white is")
    if mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return _transform(image, lab, srgb, "LAB")
    if mode in ("LA", "RGBA"):
        return image
    if mode == "La":
        return image.convert("LA")
    colour_key = image.info.get("transparency")
    if deep_colour and isinstance(colour_key, tuple):
        # The transparent colour of a 16-bit PNG; its pixels have lost their lower bytes.
        image.info["transparency"] = tuple(value >> 8 for value in colour_key)
    if image.has_transparency_data:
        return image.convert("RGBA")
    if mode in ("L", "RGB", "CMYK"):
        return image
    return image.convert("L" if mode == "1" else "RGB")


def _scaled(image: Image.Image) -> Image.Image:
    """A greyscale image of more than 8 bits as L, or LA where one value is transparent."""
    black, white = _grey_range(image)
    # Pillow keeps unsigned 32-bit values in signed ones.
    mask = 2**32 - 1 if (black, white) == (0, 2**32 - 1) else -1
    span = abs(white - black)
    transparent = image.info.get("transparency")
    grey = np.empty((image.height, image.width), np.uint8)
    alpha = np.empty_like(grey) if isinstance(transparent, int) else None
    rows = max(1, _BLOCK_PIXELS // image.width)
    for top in range(0, image.height, rows):
        block = image.crop((0, top, image.width, min(top + rows, image.height)))
        values = np.asarray(block).astype(np.int64) & mask
        levels = np.clip(values - black if white > black else black - values, 0, span)
        grey[top : top + rows] = (levels * 255 + span // 2) // span
        if alpha is not None:
            alpha[top : top + rows] = np.where(values == transparent, 0, 255)
    if alpha is None:
        return Image.fromarray(grey)
    return Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))


def _grey_range(image: Image.Image) -> tuple[int, int]:
    """The values of black and white in a greyscale image of more than 8 bits, by its format."""
    if image.format != "TIFF":
        # PNG, PPM and JPEG 2000: Pillow gives 16 bits, scaled up where the file has fewer.
        if image.format not in ("PNG", "PPM", "JPEG2000") and not image.mode.startswith("I;16"):
            raise ValueError(
                f"its {image.format} holds pixels of mode {image.mode}, and nothing says what "
                "white is"
            )
        return 0, 65535
    tags = getattr(image, "tag_v2", {})
    bits = int(tags.get(_TIFF_BITS, (16,))[0])
    signed = int(tags.get(_TIFF_SAMPLE_FORMAT, (1,))[0]) == 2
    white = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    return (white, 0) if tags.get(_TIFF_PHOTOMETRIC) == 0 else (0, white)


def _finish(image: Image.Image, config: PixelsConfig) -> np.ndarray:
    """Colours to sRGB, alpha over the background: uint8 `[H, W, 3]`."""
    alpha = None
    if image.mode in ("LA", "RGBA"):
        alpha = image.getchannel("A")
        image = image.convert("L" if image.mode == "LA" else "RGB")
    image = _to_srgb(image)
    if alpha is not None:
        colour = ImageColor.getrgb(config.alpha_background)[:3]
        background = Image.new("RGBA", image.size, (*colour, 255))
        image.putalpha(alpha)
        image = Image.alpha_composite(background, image).convert("RGB")
    return np.array(image, dtype=np.uint8)


#: Pillow's modes and the colour spaces, in ICC's spelling, of profiles that describe them.
_PROFILE_SPACES = {"L": "GRAY", "RGB": "RGB ", "CMYK": "CMYK"}


def _to_srgb(image: Image.Image) -> Image.Image:
    """An L, RGB or CMYK image as RGB in sRGB, by its ICC profile if it has a usable one."""
    raw = image.info.get("icc_profile")
    if raw:
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(raw))
            space = profile.profile.xcolor_space
            if space == "RGB " and image.mode == "L":
                image = image.convert("RGB")  # a grey picture in a colour profile: R = G = B
            if space == _PROFILE_SPACES[image.mode]:
                return _transform(image, profile, ImageCms.createProfile("sRGB"), image.mode)
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            pass  # broken profile: the pixels are taken as sRGB, as a viewer would
    return image.convert("RGB")


def _transform(image: Image.Image, source: object, target: object, mode: str) -> Image.Image:
    """Apply a perceptual colour transform; both profiles are ImageCms's."""
    build = partial(ImageCms.buildTransform, inMode=mode, outMode="RGB")
    converted = ImageCms.applyTransform(image, build(source, target))  # type: ignore[arg-type]
    if converted is None:
        raise ImageCms.PyCMSError("LittleCMS returned no image")
    return converted
