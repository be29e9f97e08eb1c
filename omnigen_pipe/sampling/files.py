"""Where pictures are written, and how: whole or not at all, and over nothing that is there.

A PNG says in text chunks how it was made. JPEG and WebP files do not.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, PngImagePlugin

from manifests.errors import UsageError, WriteError
from manifests.publish import new_id
from omnigen_pipe.sampling.requests import Request

#: Suffixes of files that can be written.
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
#: Suffixes of pictures that a user could mean, and that are not written.
_OTHER_FORMATS = {".avif", ".bmp", ".gif", ".heic", ".jxl", ".tif", ".tiff"}
#: Of JPEG and WebP, out of 100.
_QUALITY = 95


def places(output: Path, requests: Sequence[Request], overwrite: bool) -> list[Path]:
    """The file of each request: `output` itself where that names a file, else one in the folder.

    Raises `UsageError` where that file is there already and `overwrite` is not set, where it is to
    hold several pictures, or where no folder can be.
    """
    if output.suffix.lower() in FORMATS.keys() | _OTHER_FORMATS and not output.is_dir():
        if len(requests) > 1:
            raise UsageError(
                f"--output {output} is one file, but {len(requests)} pictures are asked for. "
                "Name a folder."
            )
        return [file_place("--output", output, overwrite)]
    _check_folder("--output", output)
    return [output / f"{request.stem}.png" for request in requests]


def file_place(option: str, path: Path, overwrite: bool) -> Path:
    """`path`, which `option` names, once it is known that a picture can be written there."""
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"{option} {path}: pictures are written as {', '.join(FORMATS)}.")
    if path.exists() and (path.is_dir() or not overwrite):
        raise UsageError(f"{option} {path} is there already. Name another, or use --overwrite.")
    _check_folder(option, path.parent)
    return path


def _check_folder(option: str, folder: Path) -> None:
    """Raise `UsageError` where `folder` neither is there nor can be made, or is not writable."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UsageError(
            f"{option}: nothing can be written into {folder}: "
            f"{there} is {'write-protected' if there.is_dir() else 'a file'}."
        )


def write_picture(
    picture: Image.Image, path: Path, made: Mapping[str, str], overwrite: bool
) -> Path:
    """Write `picture` as the file `path`, and return where it lies.

    Where that name is taken by now, a number is added to it, unless `overwrite` is set. A PNG says
    in text chunks how it was `made`. Raises `WriteError` where writing fails, and leaves nothing.
    """
    kind = FORMATS[path.suffix.lower()]
    options: dict[str, object] = {"quality": _QUALITY}
    if kind == "PNG":
        chunks = PngImagePlugin.PngInfo()
        for key, value in made.items():
            chunks.add_text(key, value)
        options = {"pnginfo": chunks}
    unfinished = path.with_name(f".{new_id()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            picture.save(unfinished, kind, **options)
            final = path if overwrite else _unused(path)
            os.replace(unfinished, final)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise WriteError(path, error) from error
    return final


def _unused(path: Path) -> Path:
    candidate, number = path, 2
    while candidate.exists():
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
        number += 1
    return candidate
