"""Decoded latents: what the VAE makes of them, and the figure that says how near that is."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made import QUIET, filed, picture, publish, workspace
from PIL import Image, ImageChops, ImageStat

from manifests.errors import UsageError
from omnigen_pipe.images.pixels import read_pixels
from omnigen_pipe.images.sources import reachable_roots
from omnigen_pipe.latents.encoder import encode_pixels
from omnigen_pipe.latents.shards import ShardWriter
from omnigen_pipe.latents.vae import load_vae, vae_key
from omnigen_pipe.model_files import model_part
from omnigen_pipe.report.decoded import Decoded, compare, psnr
from omnigen_pipe.report.model_here import model_here
from omnigen_pipe.report.sheets import draw
from omnigen_pipe.report.thumbnails import Album
from omnigen_pipe.sampling.source import Source
from omnigen_pipe.workspace import Workspace


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 255))
def test_psnr_is_that_of_the_mean_squares(seed: int, spread: int) -> None:
    """Against Pillow's own sums of squares."""
    random = np.random.default_rng(seed)
    one = random.integers(0, 256, (9, 13, 3), np.uint8)
    noise = random.integers(-spread, spread + 1, one.shape)
    other = np.clip(one.astype(int) + noise, 0, 255).astype(np.uint8)
    difference = ImageChops.difference(Image.fromarray(one), Image.fromarray(other))
    squares = sum(ImageStat.Stat(difference).sum2) / one.size
    if squares == 0:
        assert psnr(one, other) == math.inf
    else:
        assert psnr(one, other) == pytest.approx(20 * math.log10(255 / math.sqrt(squares)))


def test_equal_images_have_an_infinite_one_and_opposite_ones_none() -> None:
    black, white = (np.full((4, 4, 3), value, np.uint8) for value in (0, 255))
    assert psnr(black, black) == math.inf
    assert psnr(black, white) == 0


@pytest.fixture
def place(tmp_path: Path) -> Workspace:
    """Three images in two buckets, each with its latent by the embedded VAE."""
    place = workspace(
        tmp_path,
        {"id": "a", "instance_data_dir": "a", "resolution": 64, "resolution_type": "pixel",
         "aspect_bucket_alignment": 16},
    )  # fmt: skip
    sizes = [(64, 64), (64, 64), (96, 64)]
    publish(place, [filed(place, "a", f"{n}.png", picture(n, s)) for n, s in enumerate(sizes)])
    folder = model_part(place, "vae")
    key, vae = vae_key(place, folder), load_vae(folder, place.config.vae, torch.device("cpu"))
    with ShardWriter(place, key, {}) as writer:
        for row in place.samples.read().to_pylist():
            pixels = _pixels(place, row["path"])
            (moments,) = encode_pixels(pixels[None], vae, torch.device("cpu"))
            writer.add(row["pixels_key"], row["bucket"], moments.astype("float16"), {})
    return place


def _pixels(place: Workspace, path: str) -> np.ndarray:
    with Image.open(place.root / "a" / path) as image:
        size = image.size
    data = (place.root / "a" / path).read_bytes()
    return read_pixels(data, size, size, (0, 0), place.config.pixels)


def compared(place: Workspace, count: int, room: int = 10**7, samples: int = 8) -> Decoded:
    roots, album = reachable_roots(place), Album(room)
    sheets = draw(place, roots, Album(10**7), samples, 0, model_here(place).keys)
    return compare(place, QUIET, roots, album, sheets, count, "cpu")


def test_a_pair_is_the_pixels_and_what_the_vae_gives_back(place: Workspace) -> None:
    found = compared(place, 5)
    assert len(found.pairs) == 3
    vae = load_vae(model_part(place, "vae"), place.config.vae, torch.device("cpu"))
    for pair in found.pairs:
        pixels = _pixels(place, pair.name.removeprefix("a: "))
        moments = encode_pixels(pixels[None], vae, torch.device("cpu")).astype("float16")
        with torch.no_grad():
            shown = vae.decode(torch.from_numpy(moments[:, :4].astype("float32"))).sample[0]
        there = ((shown.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
        error = np.mean((there.astype(float) - pixels.astype(float)) ** 2)
        assert pair.psnr == pytest.approx(10 * math.log10(65025 / error), abs=0.05)
        assert pair.pixels is not None
        seen = Image.open(io.BytesIO(base64.b64decode(pair.pixels.split(",")[1])))
        assert psnr(np.asarray(seen.convert("RGB")), pixels) > 25
    assert found.mean == pytest.approx(np.mean([pair.psnr for pair in found.pairs]))


def test_few_pairs_are_of_different_buckets(place: Workspace) -> None:
    assert {pair.bucket for pair in compared(place, 2).pairs} == {"64x64", "96x64"}


def test_what_cannot_be_compared_says_why(place: Workspace) -> None:
    (place.root / "a" / "0.png").unlink()
    for shard in (place.root / "latents" / "96x64").glob("*.tar"):
        content = bytearray(shard.read_bytes())
        content[2000:2004] = bytes(4)
        shard.write_bytes(content)
    problems = {pair.name: pair.problem for pair in compared(place, 5).pairs}
    assert "No such file" in (problems["a: 0.png"] or "")
    assert problems["a: 1.png"] is None
    assert not any(str(place.root) in (problem or "") for problem in problems.values())
    assert "is not what was written" in (problems["a: 2.png"] or "")


def test_without_room_the_figure_is_still_told(place: Workspace) -> None:
    found = compared(place, 5, room=0)
    assert all(pair.psnr is not None and "no room" in (pair.problem or "") for pair in found.pairs)


def test_nothing_is_decoded_where_nothing_is_asked_for(place: Workspace) -> None:
    found = compared(place, 0)
    assert (found.pairs, found.mean) == ([], None)
    assert "--decoded 0" in (found.why_none or "")


def _fails(error: Exception) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("gigabytes"), "cpu has too little memory for it"),
        (RuntimeError("CUDA error: the GPU\n  is lost"), "CUDA error: the GPU is lost"),
        (UsageError("The VAE cannot be loaded."), "The VAE cannot be loaded."),
    ],
)
def test_a_vae_that_cannot_be_loaded_is_a_reason(
    place: Workspace, monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    monkeypatch.setattr(Source, "decoder", _fails(error))
    found = compared(place, 2)
    assert found.pairs == []
    assert told in (found.why_none or "")


def test_a_latent_that_torch_cannot_decode_is_a_problem_of_its_own(
    place: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = RuntimeError("cuDNN error:\n mapping")
    monkeypatch.setattr("omnigen_pipe.sampling.pipeline.decoded", _fails(error))
    pairs = compared(place, 2).pairs
    assert [pair.problem for pair in pairs] == ["it cannot be decoded: cuDNN error: mapping"] * 2


def test_without_contact_sheets_the_reason_is_told(place: Workspace) -> None:
    assert "--samples 0" in (compared(place, 2, samples=0).why_none or "")
