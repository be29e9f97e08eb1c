"""Thumbnails: within their room, and only of what the manifests name."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from made import picture
from PIL import Image

from manifests.errors import PipeError
from omnigen_pipe.report.thumbnails import Album, file_of, fitted, read_file


@given(st.integers(0, 20_000), st.integers(1, 12))
def test_an_album_is_never_heavier_than_its_limit(limit: int, count: int) -> None:
    album = Album(limit)
    uris = [album.add(picture(n, (40, 30))) for n in range(count)]
    kept = [uri for uri in uris if uri is not None]
    assert sum(map(len, kept)) == album.used <= limit
    assert album.refused == count - len(kept)


def opened(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))


def test_a_drawing_is_kept_exactly_and_a_photograph_small() -> None:
    album = Album(10**6)
    plain = Image.new("RGB", (64, 64), (10, 200, 30))
    uri = album.add(plain)
    assert uri is not None
    assert opened(uri).convert("RGB").tobytes() == plain.tobytes()
    noisy = album.add(picture(1, (200, 200)))
    assert noisy is not None
    assert opened(noisy).format == "JPEG"


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 500))
def test_a_thumbnail_fits_and_is_never_enlarged(width: int, height: int, longest: int) -> None:
    found = fitted((width, height), longest)
    assert 1 <= max(found) <= longest
    assert found[0] <= width
    assert found[1] <= height


@pytest.mark.parametrize("path", ["/etc/passwd", "../secret.png", "a/../../secret.png"])
def test_no_path_leads_out_of_the_dataset(tmp_path: Path, path: str) -> None:
    with pytest.raises(PipeError, match="out of the dataset's folder"):
        file_of(tmp_path, path)


def test_only_the_bytes_that_discover_saw_are_read(tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(b"one")
    (tmp_path / "two.png").write_bytes(b"two")
    digest = blake3(b"two").hexdigest()[:32]
    files = [("main", "one.png"), ("elsewhere", "two.png"), ("main", "two.png")]
    assert read_file({"main": tmp_path}, files, digest) == b"two"
    with pytest.raises(PipeError, match="it has changed"):
        read_file({"main": tmp_path}, files[:1], digest)
    with pytest.raises(PipeError, match="out of reach"):
        read_file({}, files, digest)
