"""A folder as people have them: the good pictures are trained on, the bad ones are listed."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from pipeline_project import Project


def _picture(mode: str = "RGB", size: tuple[int, int] = (96, 80)) -> Image.Image:
    values = np.random.default_rng(sum(size)).integers(0, 255, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(values).resize(size).convert(mode)


def _jpeg(image: Image.Image, **options: object) -> bytes:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=90, **options)
    return data.getvalue()


def _fill(folder: Path) -> tuple[set[str], set[str]]:
    """Write the folder; returns the names that can be trained on, and those that cannot."""
    folder.mkdir()
    plain = _jpeg(_picture())
    (folder / "a plain one.jpg").write_bytes(plain)
    (folder / "cmyk.jpg").write_bytes(_jpeg(_picture("CMYK")))
    deep = np.linspace(0, 65535, 96 * 80).reshape(80, 96).astype(np.uint16)
    Image.fromarray(deep).save(folder / "sixteen bits.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    (folder / "rotated phone photo.jpg").write_bytes(_jpeg(_picture(size=(112, 80)), exif=exif))
    (folder / 'a "quoted"\nname.jpg').write_bytes(_jpeg(_picture(size=(100, 90))))
    good = {p.name for p in folder.iterdir()}

    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("this is no picture")
    (folder / "cut header.jpg").write_bytes(plain[:100])
    (folder / "cut pixels.jpg").write_bytes(_jpeg(_picture(size=(98, 82)))[:-1500])
    frames = [_picture(size=(96, 80)), _picture(size=(96, 80)).rotate(180)]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    bad = {p.name for p in folder.iterdir()} - good
    (folder / os.fsdecode(b"not utf-8 \xff.jpg")).write_bytes(plain + b"\0")
    return good, bad


def test_good_ones_are_trained_on_and_bad_ones_listed_with_reasons(
    tmp_path: Path, project: Callable[..., Project]
) -> None:
    good, bad = _fill(tmp_path / "pictures")
    here = project(tmp_path / "pictures")
    parts = here.json("run")
    encode, train = parts[2], parts[4]
    rows = pq.read_table(here.root / "manifests" / "samples.parquet").to_pylist()
    assert len(rows) == len(good) + len(bad) + 1, "every file is accounted for"

    ok = {row["path"] for row in rows if row["status"] == "ok"}
    assert ok == good | {"cut pixels.jpg"}, "damaged pixels show only when they are decoded"
    reasons = {row["path"]: row["reason"] for row in rows if row["status"] != "ok"}
    assert all(reasons.values())
    assert bad - {"cut pixels.jpg"} <= set(reasons)
    latents = pq.read_table(here.root / "manifests" / "latents").to_pylist()
    failed = [row for row in latents if row["status"] == "failed"]
    assert len(failed) == 1
    assert failed[0]["reason"]
    assert encode["counts"]["failed"] == 1
    assert train["counts"]["samples"] == len(good)
    captions = {row["path"]: row["captions"] for row in rows}
    assert captions['a "quoted"\nname.jpg'] == ['a "quoted"\nname']
    rotated = next(row for row in rows if row["path"] == "rotated phone photo.jpg")
    assert (rotated["width"], rotated["height"]) == (80, 112)

    assert here.json("run", "--strict", status=3)[-1]["changed"] is False


def test_first_frames_are_used_where_asked(tmp_path: Path, project: Callable[..., Project]) -> None:
    _fill(tmp_path / "pictures")
    here = project(tmp_path / "pictures", dataset={"animated": "first"})
    here.run("discover")
    rows = pq.read_table(here.root / "manifests" / "images.parquet").to_pylist()
    assert next(row for row in rows if row["path"] == "animated.gif")["status"] == "ok"
