"""Facts from headers, held against Pillow's own full decoding, and what broken bytes give."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from omnigen_pipe.images import probe as probing
from omnigen_pipe.images.probe import Reading, probe, read_file, read_files

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")


def encoded(
    format: str, mode: str = "RGB", size: tuple[int, int] = (30, 20), **options: object
) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, format, **options)
    return buffer.getvalue()


def oriented(format: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(format, exif=exif)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def exif_behind_the_pixels(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    plain = encoded("PNG")
    end = png_chunk(b"IEND", b"")
    assert plain.endswith(end)
    return plain[: -len(end)] + png_chunk(b"eXIf", exif.tobytes()[6:]) + end


def upright_size(content: bytes) -> tuple[int, int]:
    """What a full decode by Pillow gives."""
    return ImageOps.exif_transpose(Image.open(io.BytesIO(content))).size


@pytest.mark.parametrize("format", FORMATS)
def test_facts_are_what_a_full_decode_gives(format: str) -> None:
    content = encoded(format)
    facts = probe(content)
    image = Image.open(io.BytesIO(content))
    assert facts.reason is None
    assert (facts.format, facts.mode) == (image.format, image.mode)
    assert (facts.width, facts.height) == upright_size(content) == (30, 20)
    assert facts.frames == 1
    assert facts.content_hash == blake3(content).hexdigest()[:32]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_size_is_after_exif_orientation(format: str, orientation: int) -> None:
    content = oriented(format, orientation)
    facts = probe(content)
    assert (facts.width, facts.height) == upright_size(content)
    assert (facts.width, facts.height) == ((20, 30) if orientation >= 5 else (30, 20))


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_exif_behind_the_pixels_of_a_png_counts(orientation: int) -> None:
    content = exif_behind_the_pixels(orientation)
    facts = probe(content)
    assert (facts.width, facts.height) == upright_size(content)


def test_broken_exif_leaves_the_image_as_it_is_stored() -> None:
    facts = probe(encoded("JPEG", exif=b"Exif\0\0not a TIFF header at all"))
    assert (facts.width, facts.height, facts.reason) == (30, 20, None)


@pytest.mark.parametrize(
    ("content", "format", "mode"),
    [
        (encoded("JPEG", "CMYK"), "JPEG", "CMYK"),
        (encoded("PNG", "I;16"), "PNG", "I;16"),
        (encoded("PNG", "P"), "PNG", "P"),
        (encoded("PNG", "RGBA"), "PNG", "RGBA"),
        (encoded("TIFF", "L"), "TIFF", "L"),
    ],
)
def test_unusual_modes_are_good(content: bytes, format: str, mode: str) -> None:
    facts = probe(content)
    assert (facts.format, facts.mode, facts.reason) == (format, mode, None)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_frames_are_counted(format: str) -> None:
    more = [Image.new("RGB", (30, 20), colour) for colour in ("red", "green")]
    facts = probe(encoded(format, save_all=True, append_images=more))
    assert (facts.frames, facts.reason) == (3, None)


def test_the_previews_of_a_photograph_are_no_animation() -> None:
    content = encoded("MPO", save_all=True, append_images=[Image.new("RGB", (30, 20), "red")])
    assert Image.open(io.BytesIO(content)).n_frames == 2
    assert (probe(content).format, probe(content).frames) == ("MPO", 1)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"a photograph, I promise", "not an image"),
        (encoded("JPEG")[:30], "truncated or damaged header"),
        (encoded("PNG")[:20], "truncated or damaged header"),
        (encoded("GIF")[:8], "truncated or damaged header"),
        (encoded("TIFF")[:12], "truncated or damaged header"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "format not supported"),
        (b"\xff\x0a\xfa\x1f\x01\x91\x08\x06\x01\x00", "format not supported"),
    ],
)
def test_unusable_bytes_have_a_reason(content: bytes, reason: str) -> None:
    facts = probe(content)
    assert facts.reason is not None
    assert facts.reason.split(": ")[0] == reason
    assert (facts.format, facts.width) == (None, None)
    assert facts.content_hash == blake3(content).hexdigest()[:32]


def test_a_bomb_is_measured_and_not_decoded() -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        facts = probe(bomb)
    assert (facts.width, facts.height, facts.reason) == (60_000, 60_000, None)


def test_no_pixel_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = [oriented(format, 6) for format in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF")]
    contents += [encoded(format) for format in FORMATS] + [exif_behind_the_pixels(6)]

    def load(self: ImageFile.ImageFile) -> None:
        raise AssertionError(f"{self.format} was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert [probe(content).reason for content in contents] == [None] * len(contents)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(FORMATS), st.data())
def test_damaged_bytes_give_facts_and_no_crash(format: str, data: st.DataObject) -> None:
    content = bytearray(encoded(format, size=(5, 3)))
    for _ in range(data.draw(st.integers(0, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        facts = probe(bytes(content[:cut]))
    if facts.reason is None:
        assert facts.width is not None
        assert facts.width > 0
        assert facts.frames is not None
    else:
        assert facts.frames is None


@given(st.binary(max_size=200))
def test_any_bytes_give_facts(content: bytes) -> None:
    assert len(probe(content).content_hash) == 32


def read(path: Path) -> Reading:
    facts = path.stat()
    return read_file(str(path), facts.st_size, facts.st_mtime_ns)


def test_a_large_file_is_hashed_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(exif_behind_the_pixels(6))
    whole = read(path).facts
    monkeypatch.setattr(probing, "_WHOLE", 10)
    monkeypatch.setattr(probing, "_PIECE", 7)
    assert read(path).facts == whole == probe(path.read_bytes())


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    image.write_bytes(encoded("PNG"))
    facts = image.stat()
    changed = read_file(str(image), facts.st_size, facts.st_mtime_ns - 1)
    assert (changed.facts, changed.unreadable) == (
        None,
        "unreadable: it changed during discover",
    )
    gone = read_file(str(tmp_path / "b.png"), 1, 1)
    assert (gone.facts, gone.unreadable) == (None, "unreadable: No such file or directory")
    os.mkfifo(tmp_path / "pipe.png")
    assert read(tmp_path / "pipe.png").unreadable == "not a regular file"


def test_many_files_come_in_order(tmp_path: Path) -> None:
    wanted = []
    for number in range(100):
        path = tmp_path / f"{number}.png"
        path.write_bytes(encoded("PNG", size=(number + 1, 2)))
        wanted.append((str(path), path.stat().st_size, path.stat().st_mtime_ns))
    widths = [reading.facts.width for reading in read_files(iter(wanted)) if reading.facts]
    assert widths == list(range(1, 101))


def test_reading_runs_ahead_only_so_far(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded("PNG"))
    asked = 0

    def wanted():  # type: ignore[no-untyped-def]
        nonlocal asked
        while True:
            asked += 1
            yield (str(path), path.stat().st_size, path.stat().st_mtime_ns)

    readings = read_files(wanted())
    for _ in range(50):
        next(readings)
    readings.close()
    assert 50 <= asked <= 50 + 2 * probing.READERS
