"""Thumbnails: small pictures as `data:` URIs, and the text that stands by them, within what a page
may weigh."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from manifests.errors import PipeError
from omnigen_pipe.config import PixelsConfig
from omnigen_pipe.images.originals import ChangedSourceError, read_original
from omnigen_pipe.images.pixels import read_pixels

_QUALITY = 78


@dataclass
class Album:
    """The pictures of one page, and text by them: they are refused once all weigh `limit` bytes.

    `refused` counts the pictures that found no room.
    """

    limit: int
    used: int = 0
    refused: int = 0

    def take(self, size: int) -> bool:
        """Whether there is room for text of `size` bytes, which it then takes."""
        if self.used + size > self.limit:
            return False
        self.used += size
        return True

    def add(self, picture: Image.Image, text: int = 0) -> str | None:
        """The `data:` URI of `picture` (RGB); None where there is no room for it, and for the
        `text` bytes that stand by it.

        As JPEG, or as PNG where that is no larger, as of plain drawings.
        """
        if self.used >= self.limit:
            self.refused += 1
            return None
        jpeg, png = io.BytesIO(), io.BytesIO()
        picture.save(jpeg, "JPEG", quality=_QUALITY, optimize=True)
        picture.save(png, "PNG")
        plain = png.tell() <= jpeg.tell()
        kind, file = ("png", png) if plain else ("jpeg", jpeg)
        uri = data_uri(kind, file.getvalue())
        if not self.take(len(uri) + text):
            self.refused += 1
            return None
        return uri


def data_uri(kind: str, picture: bytes) -> str:
    """The file `picture` of an image of that `kind` (png, jpeg), as an address of a page."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode('ascii')}"


def fitted(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """`size` in pixels, made smaller so that its longer side is at most `longest`."""
    scale = min(1.0, longest / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def whole_image(data: bytes, size: tuple[int, int], background: str) -> Image.Image:
    """The whole upright image in the file `data` at `size`, RGB.

    Raises `PixelsError` where it cannot be decoded, and `MemoryError`.
    """
    config = PixelsConfig(decode="reduced", alpha_background=background)
    return Image.fromarray(read_pixels(data, size, size, (0, 0), config))


def file_of(root: Path, path: str) -> Path:
    """The file that a manifest's `path` names in the dataset's folder `root`.

    Raises `PipeError` for a path that leads out of it: a manifest may come from somebody else.
    """
    relative = PurePosixPath(path)
    if relative.is_absolute() or ".." in relative.parts:
        raise PipeError("its path leads out of the dataset's folder")
    return root / relative


def read_file(roots: dict[str, Path], files: Iterable[tuple[str, str]], content_hash: str) -> bytes:
    """The bytes that discover saw, from the first of `files` (dataset, path) that holds them.

    `roots` are the datasets' folders. Raises `PipeError` that says why there is none, without the
    folders: a page may be given to others.
    """
    faults = []
    for dataset, path in files:
        if dataset not in roots:
            faults.append("its dataset's folder is out of reach")
            continue
        file = file_of(roots[dataset], path)
        try:
            return read_original([file], content_hash)
        except ChangedSourceError as error:
            faults += [fault.removeprefix(f"{file}: ") for fault in error.faults]
    raise PipeError("; ".join(dict.fromkeys(faults)))
