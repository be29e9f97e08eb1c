"""Where pictures are written, and how: whole or not at all, and over nothing that is there.

A PNG says in text chunks how it was made. JPEG and WebP files do not. What a killed process leaves
is a hidden file `.<id>.part`, which nothing reads.
"""

from __future__ import annotations

import difflib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image, PngImagePlugin

from manifests.errors import PipeError, UsageError, WriteError
from manifests.publish import new_id
from omnigen_pipe.sampling.requests import Request, exact

#: Suffixes of files that can be written.
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
#: Suffixes of pictures that a user could mean, and that are not written.
_OTHER_FORMATS = {
    *(".apng", ".avif", ".bmp", ".exr", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe"),
    *(".jxl", ".pdf", ".ppm", ".psd", ".svg", ".tga", ".tif", ".tiff"),
}
#: From this likeness on, of 1, a suffix is taken for a slip of the pen.
_LIKENESS = 0.7
#: Pixels a side that a format can hold.
LIMITS = {"JPEG": 65_500, "WEBP": 16_383}
#: Of JPEG and WebP, out of 100.
_QUALITY = 95


def output_paths(output: Path, requests: Sequence[Request], overwrite: bool) -> list[Path]:
    """The file of each request: `output` itself where that names a file, else one in the folder.

    Where several strengths of the adapter are drawn, they are part of the names.

    Raises `UsageError` where that file is there already and `overwrite` is not set, where it is to
    hold several pictures, or where no folder can be.
    """
    if _names_file(output, alone=len(requests) == 1):
        if len(requests) > 1:
            raise UsageError(
                f"--output {output} is one file, but {len(requests)} pictures are asked for. "
                "Name a folder."
            )
        return [checked_path("--output", output, overwrite)]
    _check_folder("--output", output)
    several = len({request.strength for request in requests}) > 1
    ends = [
        f"-strength-{exact(request.strength)}" if several and request.strength is not None else ""
        for request in requests
    ]
    return [output / f"{r.stem}{end}.png" for r, end in zip(requests, ends, strict=True)]


def _names_file(output: Path, alone: bool) -> bool:
    """Whether `output` is to be a file; one picture `alone` may be one whose suffix is misspelt."""
    suffix, known = output.suffix.lower(), FORMATS.keys() | _OTHER_FORMATS
    if output.is_dir():
        return False
    return suffix in known or (
        alone and bool(difflib.get_close_matches(suffix, known, cutoff=_LIKENESS))
    )


def checked_path(option: str, path: Path, overwrite: bool) -> Path:
    """`path`, which `option` names, once it is known that a picture can be written there."""
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"{option} {path}: pictures are written as {', '.join(FORMATS)}.")
    if path.exists() and (path.is_dir() or not overwrite):
        raise UsageError(f"{option} {path} is there already. Name another, or use --overwrite.")
    _check_folder(option, path.parent)
    return path


def check_size(option: str, path: Path, size: tuple[int, int], remedy: str) -> None:
    """Raise `UsageError` where a file of the format of `path`, which `option` names, holds no
    picture of `size` in pixels; `remedy` says what else to do."""
    limit = LIMITS.get(FORMATS[path.suffix.lower()])
    if limit is not None and max(size) > limit:
        raise UsageError(
            f"{option} {path}: {size[0]}x{size[1]} pixels are more than the {limit} a side that "
            f"such a file can hold. Write a .png, or {remedy}."
        )


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
    in text chunks how it was `made`. Raises `PipeError` where writing fails, and leaves nothing.
    """
    unfinished = path.with_name(f".{new_id()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_picture(picture, unfinished, FORMATS[path.suffix.lower()], made)
            if not overwrite:
                return _placed(unfinished, path)
            os.replace(unfinished, path)
            return path
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise WriteError(path, error) from error
    except ValueError as error:  # from Pillow, for what a format cannot hold
        raise PipeError(f"{path} could not be written: {error}. Write a .png instead.") from error


def save_picture(picture: Image.Image, path: Path, kind: str, made: Mapping[str, str]) -> None:
    """Write `picture` in the format `kind` as `path`; a PNG says how it was `made`."""
    options: dict[str, object] = {"quality": _QUALITY}
    if kind == "PNG":
        chunks = PngImagePlugin.PngInfo()
        for key, value in made.items():
            chunks.add_text(key, value)
        options = {"pnginfo": chunks}
    picture.save(path, kind, **options)


def says(path: Path, made: Mapping[str, str]) -> bool:
    """Whether there is a PNG `path` that says it was `made` so; of its pixels nothing is read."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return all(picture.info.get(key) == value for key, value in made.items())
    # Also what Pillow raises for chunks that are damaged.
    except (OSError, SyntaxError, ValueError):
        return False


def _placed(unfinished: Path, path: Path) -> Path:
    """Give the file `unfinished` the first name of `_names` that is free, also of names that
    other processes take at this moment; returns it."""
    for candidate in _names(path):
        try:
            os.link(unfinished, candidate)
        except FileExistsError:
            continue
        except OSError:  # no hard links here: the name is taken by an empty file, then filled
            try:
                candidate.touch(exist_ok=False)
            except FileExistsError:
                continue
            os.replace(unfinished, candidate)
        return candidate
    raise AssertionError("names do not end")


def _names(path: Path) -> Iterator[Path]:
    """`path`, and then the same with a number, from 2 on."""
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")
