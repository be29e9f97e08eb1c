"""What a file's bytes say before any pixel is decoded: its hash, format, size and frames.

The header is read by Pillow's own format readers, but without `Image.open`: that one warns or
raises by a process-wide limit, where the limit here is a dataset's `maximum_pixels`, applied
later to the facts. Given up: damage beyond the header, which only decoding can find.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import time
import warnings
import zlib
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import BinaryIO

from blake3 import blake3
from PIL import ExifTags, Image

from omnigen_pipe.ahead import Item, Result, done_ahead

#: Pillow's formats that are tried, by a file's first bytes, and the extensions they go by.
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif", ".avifs"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "PPM": (".pbm", ".pgm", ".ppm", ".pnm"),
}
#: Pictures that cannot be read here. They are listed all the same, as rejected, so that nobody
#: wonders where they are.
_UNREAD_EXTENSIONS = (".heic", ".heif", ".hif", ".jxl")

#: Extensions of picture files, in lower case.
PICTURE_EXTENSIONS = frozenset(
    {extension for extensions in FORMATS.values() for extension in extensions}
    | set(_UNREAD_EXTENSIONS)
)

#: What Pillow's readers and decoders raise for bytes they cannot use; there is no common base.
#: `MemoryError` is none of them: it says nothing of the bytes.
PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    EOFError,
    RuntimeError,
    struct.error,
    zlib.error,
)

#: EXIF orientations that swap width and height.
SIDEWAYS = (5, 6, 7, 8)

#: Files up to this size (bytes) are held in memory while they are read; larger ones are hashed
#: piece by piece and probed through their handle.
_WHOLE = 256 * 2**20
_PIECE = 4 * 2**20

#: Files open at once. Reading waits on disks and networks, and hashing frees the interpreter.
READERS = 8


_HASH_BYTES = 16
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_METADATA = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")


@dataclass(frozen=True, slots=True)
class Facts:
    """What reading a file found; true as long as its bytes are the same.

    `width` and `height` are pixels after EXIF orientation. `reason` says why no image can be
    had from these bytes, and is None where one can, as far as the header tells.
    """

    content_hash: str
    format: str | None = None
    width: int | None = None
    height: int | None = None
    mode: str | None = None
    frames: int | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """One attempt to read a file: its facts, or why it could not be read this time."""

    read_at_ns: int
    facts: Facts | None
    unreadable: str | None = None


def read_file(path: str, size: int, mtime_ns: int) -> Reading:
    """Read the file once, hash it and look at its header.

    `size` (bytes) and `mtime_ns` are what the walk saw. A file that is another one by now, or
    that changes while it is read, counts as unreadable: its bytes belong to no known state.
    """
    read_at_ns = time.time_ns()
    try:
        with open(path, "rb", opener=_open_without_waiting) as handle:
            before = os.fstat(handle.fileno())
            if not stat.S_ISREG(before.st_mode):
                return Reading(read_at_ns, None, "not a regular file")
            if before.st_size <= _WHOLE:
                content = handle.read()
                facts, nbytes = probe(content), len(content)
            else:
                content_hash, nbytes = _hash_pieces(handle)
                facts = _header(handle, content_hash, nbytes)
            after = os.fstat(handle.fileno())
            if (size, mtime_ns) != (after.st_size, after.st_mtime_ns) or nbytes != size:
                return Reading(read_at_ns, None, "unreadable: it changed during discover")
            return Reading(read_at_ns, facts)
    except OSError as error:
        return Reading(read_at_ns, None, f"unreadable: {error.strerror or error}")
    except MemoryError:
        return Reading(read_at_ns, None, "unreadable: too little memory")


def _open_without_waiting(path: str, flags: int) -> int:
    # Without O_NONBLOCK, a pipe that took the file's place since the walk would be waited on.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_files(wanted: Iterable[tuple[str, int, int]]) -> Generator[Reading, None, None]:
    """`read_file` of each (path, size, mtime_ns), in order, as `on_threads` does it."""
    return on_threads(lambda file: read_file(*file), wanted)


def on_threads(
    call: Callable[[Item], Result], items: Iterable[Item]
) -> Generator[Result, None, None]:
    """`call` of each item, in order, on `READERS` threads.

    At most twice as many are ahead of the one that is yielded, so memory stays flat.
    """
    # Pillow warns of odd metadata in words that name no file. One filter around all threads,
    # since filters are global to the process.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield from done_ahead(items, call, READERS, 2 * READERS - 1)


def read_header(path: str) -> Facts:
    """What the header of the file at `path` says, with an empty `content_hash`.

    Only as much is read as Pillow's reader of the format asks for. What keeps a file from being
    read is the `reason`.
    """
    try:
        with open(path, "rb", opener=_open_without_waiting) as handle:
            state = os.fstat(handle.fileno())
            if not stat.S_ISREG(state.st_mode):
                return Facts("", reason="not a regular file")
            return _header(handle, "", state.st_size)
    except OSError as error:
        return Facts("", reason=f"unreadable: {error.strerror or error}")
    except MemoryError:
        return Facts("", reason="unreadable: too little memory")


def probe(content: bytes) -> Facts:
    """The facts of `content`, a whole file."""
    return _header(io.BytesIO(content), blake3(content).digest(_HASH_BYTES).hex(), len(content))


def _hash_pieces(handle: BinaryIO) -> tuple[str, int]:
    digest, nbytes = blake3(), 0
    while piece := handle.read(_PIECE):
        digest.update(piece)
        nbytes += len(piece)
    return digest.digest(_HASH_BYTES).hex(), nbytes


def _header(data: BinaryIO, content_hash: str, nbytes: int) -> Facts:
    if nbytes == 0:
        return Facts(content_hash, reason="empty file")
    data.seek(0)
    prefix = data.read(16)
    damaged = None
    for name in FORMATS:
        if not _accepts(name, prefix):
            continue
        try:
            return _facts_of(_opened(name, data), content_hash)
        except Image.DecompressionBombError:
            return Facts(content_hash, name, reason="too large: Pillow refuses to open it")
        except PILLOW_ERRORS as error:
            detail = " ".join(str(error).split()) or type(error).__name__
            damaged = f"truncated or damaged header: {name}: {detail}"
    if damaged is None:
        damaged = _unsupported(prefix) or "not an image: the first bytes are of no known format"
    return Facts(content_hash, reason=damaged)


def _accepts(name: str, prefix: bytes) -> bool:
    if name not in Image.OPEN:
        Image.init()
    accept = Image.OPEN[name][1] if name in Image.OPEN else None
    # A text instead of a truth value says that this Pillow was built without the format.
    return accept is not None and accept(prefix) is True


def _opened(name: str, data: BinaryIO) -> Image.Image:
    """Pillow's image of the format `name`, with its header read and no pixel decoded."""
    factory = Image.OPEN[name][0]
    if name == "PNG":
        moved = _metadata_first(data)
        if moved is not None:
            try:
                return factory(io.BytesIO(moved), "")
            except PILLOW_ERRORS:
                pass  # what follows the pixels is broken, and does not matter to them
    data.seek(0)
    return factory(data, "")


def _facts_of(image: Image.Image, content_hash: str) -> Facts:
    width, height = image.size
    if width <= 0 or height <= 0:
        raise ValueError(f"size {width}x{height}")
    # Pillow gives the size of a TIFF as it will be after load(), which turns it upright.
    if image.format != "TIFF" and orientation(image) in SIDEWAYS:
        width, height = height, width
    # The further pictures of an MPO are previews or other views of a photograph, no animation.
    frames = 1 if image.format == "MPO" else int(getattr(image, "n_frames", 1))
    return Facts(content_hash, image.format, width, height, image.mode, frames)


def orientation(image: Image.Image) -> int:
    """EXIF orientation of an opened image, 1 to 8, without decoding; 1 where EXIF is broken."""
    try:
        # Not the method of the PNG reader, which decodes the pixels to find EXIF behind them.
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except PILLOW_ERRORS:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _metadata_first(data: BinaryIO) -> bytes | None:
    """A PNG's header with the metadata that follows its pixels put before them.

    PNG allows EXIF behind the pixels (PNG 3rd edition, 5.6), where Pillow would find it only
    by decoding them. None where there is none, or the chunks cannot be followed.
    """
    data.seek(len(_PNG_SIGNATURE))
    before: list[bytes] = [_PNG_SIGNATURE]
    after: list[bytes] = []
    pixels_seen = False
    while len(head := data.read(8)) == 8:
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if kind == b"IEND":
            break
        pixels_seen = pixels_seen or kind == b"IDAT"
        if pixels_seen and kind not in _PNG_METADATA:
            data.seek(length + 4, os.SEEK_CUR)
            continue
        body = data.read(length + 4)
        if len(body) < length + 4:
            break
        (after if pixels_seen else before).append(head + body)
    if not after:
        return None
    return b"".join([*before, *after, b"\0\0\0\0IDAT\x35\xaf\x06\x1e\0\0\0\0IEND\xae\x42\x60\x82"])


def _unsupported(prefix: bytes) -> str | None:
    """Names a picture format that is known by its first bytes but cannot be read here."""
    if prefix[4:8] == b"ftyp" and prefix[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
        return "format not supported: HEIC; convert it to JPEG or PNG"
    if prefix[4:8] == b"ftyp" and prefix[8:12] in (b"avif", b"avis"):
        return "format not supported: this Pillow was built without AVIF"
    if prefix.startswith(b"\xff\x0a") or prefix[4:12] == b"JXL \r\n\x87\n":
        return "format not supported: JPEG XL; convert it to PNG"
    return None
