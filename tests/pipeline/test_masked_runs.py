"""Loss masks through all stages: each is made once, follows its image, and weights its loss."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pipeline_project import Project

from omnigen_pipe.images import weighing
from omnigen_pipe.images.masks import latent_weights, read_mask
from omnigen_pipe.latents.shards import MASKS_KEY, read_latent
from omnigen_pipe.latents.wanted import known_latents
from omnigen_pipe.runs.frozen import FrozenSamples, locate
from omnigen_pipe.runs.order import MicroBatch
from omnigen_pipe.training.batches import BatchReader
from omnigen_pipe.workspace import Workspace

#: A modification time so old that no reading comes within two seconds of it.
LONG_AGO = 1_600_000_000


def draw(path: Path, image: Image.Image) -> None:
    """Save `image`, with a comment, so that no two files have equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    comment = PngInfo()
    comment.add_text("Comment", path.as_posix())
    image.save(path, **({"pnginfo": comment} if path.suffix == ".png" else {}))
    os.utime(path, (LONG_AGO, LONG_AGO))


def noise(number: int) -> Image.Image:
    size = (96, 80) if number % 2 else (80, 112)
    values = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(values)


def half(size: tuple[int, int], left: bool = True) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]) if left else (size[0] // 2, 0, *size))
    return mask


def lay_out(folder: Path, count: int = 4) -> None:
    for number in range(count):
        image = noise(number)
        draw(folder / "pictures" / "deep" / f"{number}.png", image)
        draw(folder / "masks" / "deep" / f"{number}.png", half(image.size))


@pytest.fixture
def here(project: Callable[..., Project], tmp_path: Path) -> Project:
    """Four pictures with masks of their left halves."""
    lay_out(tmp_path)
    return project(tmp_path / "pictures", dataset={"mask": str(tmp_path / "masks")})


def stages(here: Project) -> list[Any]:
    return [here.json(stage) for stage in ("discover", "bucket", "encode-vae")]


def samples(here: Project) -> dict[str, dict[str, Any]]:
    rows = Workspace.open(here.root).samples.read().to_pylist()
    return {row["path"]: row for row in rows}


def masks(here: Project) -> dict[str, dict[str, Any]]:
    rows = known_latents(Workspace.open(here.root), MASKS_KEY).to_pylist()
    return {row["pixels_key"]: row for row in rows}


def stored(here: Project, row: dict[str, Any]) -> np.ndarray:
    names = ("offset", "nbytes", "checksum", "shape", "dtype")
    return read_latent(here.root / row["shard"], *(row[name] for name in names))


def test_all_stages_and_all_that_looks_after_them(here: Project, tmp_path: Path) -> None:
    discovered, bucketed, encoded = stages(here)
    assert discovered["counts"]["images"] == 4
    assert discovered["counts"]["files opened"] == 8
    assert (bucketed["counts"]["masks"], bucketed["counts"]["masks opened"]) == (4, 4)
    assert (encoded["counts"]["masks wanted"], encoded["counts"]["masks made"]) == (4, 4)

    known = masks(here)
    for path, row in samples(here).items():
        width, height = map(int, row["bucket"].split("x"))
        kept = stored(here, known[row["mask_key"]])
        assert kept.shape == (1, height // 8, width // 8)
        data = (tmp_path / "masks" / path).read_bytes()
        resize, crop = (
            (row["resize_width"], row["resize_height"]),
            (row["crop_left"], row["crop_top"]),
        )
        expected = latent_weights(read_mask(data, "greyscale"), (width, height), resize, crop)
        assert np.array_equal(kept[0], expected)
        assert (kept[0, :, : width // 16] == 1).all()
        assert (kept[0, :, width // 16 + 1 :] == 0).all()

    again = stages(here)
    assert not any(summary["changed"] for summary in again)
    assert [again[0]["counts"]["files opened"], again[1]["counts"]["masks opened"]] == [0, 0]

    here.run("tokenize")
    here.run("train")
    assert here.json("status")["up_to_date"]
    verified = here.json("verify")
    assert verified["counts"]["latents"] == 8
    explained = here.json("status", "--sample", "deep/0.png")
    assert "masks-" in json.dumps(explained)
    lines = (here.root / "runs" / "default" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 4

    # What the run has frozen stays, and its masks with it, whatever the configuration says now.
    config = here.root / "omnigen-pipe.toml"
    text = config.read_text()
    config.write_text("\n".join(line for line in text.splitlines() if "mask =" not in line))
    here.run("discover")
    here.run("bucket")
    before = masks(here)
    here.run("gc", "--yes", "--grace-hours", "0")
    assert {key: stored(here, row).tobytes() for key, row in masks(here).items()} == {
        key: stored(here, row).tobytes() for key, row in before.items()
    }
    frozen = FrozenSamples.open(here.root / "runs" / "default" / "samples.arrow")
    places = locate(Workspace.open(here.root), frozen)
    assert places.masks is not None
    (here.root / "runs" / "default" / "samples.arrow").unlink()
    here.run("gc", "--yes", "--grace-hours", "0")
    assert masks(here) == {}


def test_another_mask_costs_that_mask_alone(here: Project, tmp_path: Path) -> None:
    stages(here)
    before = samples(here), masks(here)
    draw(tmp_path / "masks" / "deep" / "1.png", half(noise(1).size, left=False))
    os.utime(tmp_path / "masks" / "deep" / "1.png", (LONG_AGO + 9, LONG_AGO + 9))
    standing = {stage["stage"]: stage for stage in here.json("status")["stages"]}
    assert standing["discover"]["cost"]["files to open"] == 1
    discovered, bucketed, encoded = stages(here)
    assert discovered["counts"]["files opened"] == 1
    assert bucketed["counts"]["masks opened"] == 1
    assert encoded["counts"]["masks made"] == 1
    assert encoded["counts"]["encoded"] == 0
    after = samples(here)
    changed = [path for path, row in after.items() if row != before[0][path]]
    assert changed == ["deep/1.png"]
    assert after["deep/1.png"]["pixels_key"] == before[0]["deep/1.png"]["pixels_key"]
    kept = stored(here, masks(here)[after["deep/1.png"]["mask_key"]])[0]
    assert (kept[:, 0] == 0).all()
    assert (kept[:, -1] == 1).all()


def test_every_image_whose_mask_cannot_be_used_says_why(here: Project, tmp_path: Path) -> None:
    lay_out(tmp_path, 8)
    place = tmp_path / "masks" / "deep"
    (place / "0.png").unlink()
    draw(place / "1.webp", half(noise(1).size))
    draw(place / "2.png", Image.new("L", (112, 80), 255))
    (place / "3.png").write_bytes(b"no picture")
    draw(place / "4.png", Image.new("L", noise(4).size))
    whole = (place / "5.png").read_bytes()
    draw(place / "5.png", Image.effect_noise(noise(5).size, 90))
    damaged = (place / "5.png").read_bytes()
    assert damaged != whole
    (place / "5.png").write_bytes(damaged[: len(damaged) // 2])
    draw(place / "nobody.png", Image.new("L", (8, 8), 255))
    discovered, bucketed, encoded = stages(here)
    reasons = {row["path"][-5]: row["reason"] for row in samples(here).values()}
    expected = ["no mask: ", "several masks: ", "mask of another aspect: ", "mask cannot be used: "]
    expected += ["empty mask: ", "mask cannot be used: cannot be decoded"]
    for number, beginning in enumerate(expected):
        assert str(reasons[str(number)]).startswith(beginning), reasons
    assert reasons["6"] is reasons["7"] is None
    assert sum(discovered["left_out"].values()) == 4
    assert sum(bucketed["left_out"].values()) == 6
    assert encoded["counts"]["wanted"] == encoded["counts"]["masks made"] == 2
    assert any("belong to no image" in note for note in discovered["notes"])
    # What was found of them is remembered; what cannot be read, another Pillow may.
    assert here.json("bucket")["counts"]["masks opened"] == 1


def test_empty_is_what_has_no_weight_inside_the_crop(
    project: Callable[..., Project], tmp_path: Path
) -> None:
    """A wide picture cropped to a square: what is painted at its end is cropped away."""
    draw(tmp_path / "pictures" / "wide.png", Image.new("RGB", (200, 80), "red"))
    mask = Image.new("L", (200, 80))
    mask.paste(255, (150, 0, 200, 80))
    draw(tmp_path / "masks" / "wide.png", mask)
    options = {"mask": str(tmp_path / "masks"), "crop": True, "crop_style": "corner"}
    here = project(tmp_path / "pictures", dataset=options)
    stages(here)
    assert samples(here)["wide.png"]["reason"].startswith("empty mask: ")
    config = here.root / "omnigen-pipe.toml"
    config.write_text(config.read_text().replace("crop = true", "crop = false"))
    stages(here)
    assert samples(here)["wide.png"]["status"] == "ok"


def test_masks_in_the_images_own_alpha_channel(
    project: Callable[..., Project], tmp_path: Path
) -> None:
    image = noise(0)
    image.putalpha(half(image.size))
    draw(tmp_path / "pictures" / "cut out.png", image)
    draw(tmp_path / "pictures" / "opaque.png", noise(2))
    here = project(tmp_path / "pictures", dataset={"mask": "alpha"})
    _, _, encoded = stages(here)
    found = samples(here)
    assert "no alpha channel" in found["opaque.png"]["reason"]
    kept = stored(here, masks(here)[found["cut out.png"]["mask_key"]])[0]
    assert (kept[:, 0] == 1).all()
    assert (kept[:, -1] == 0).all()
    assert encoded["counts"]["masks made"] == 1


def test_killed_between_two_masks_goes_on_with_the_next(
    here: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = here.root / "omnigen-pipe.toml"
    config.write_text(config.read_text() + "[vae]\nshard_seconds = 1e-9\n")
    here.run("discover")
    here.run("bucket")
    made = 0

    def ends(*arguments: Any) -> np.ndarray:
        nonlocal made
        made += 1
        if made > 2:
            raise KeyboardInterrupt
        return latent_weights(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(weighing, "latent_weights", ends)
        here.run("encode-vae", status=None)
    before = len(masks(here))
    assert before < 4
    encoded = here.json("encode-vae")
    assert encoded["counts"]["masks made"] == 4 - before
    assert encoded["counts"]["encoded"] == 0
    assert len(masks(here)) == 4


def test_a_damaged_mask_is_never_trained_on_and_is_made_again(here: Project) -> None:
    stages(here)
    row = min(masks(here).values(), key=lambda row: row["offset"])
    path = here.root / row["shard"]
    content = bytearray(path.read_bytes())
    content[row["offset"] + 3] ^= 1
    path.write_bytes(content)
    here.run("verify", status=1)
    here.run("verify", "--repair")
    assert here.json("encode-vae")["counts"]["masks made"] == 1
    here.run("verify")


def test_the_reader_gives_each_sample_its_mask_as_often_as_it_is_wanted(
    here: Project, tmp_path: Path
) -> None:
    draw(tmp_path / "plain" / "0.png", noise(0))
    config = here.root / "omnigen-pipe.toml"
    other = f'[[dataset]]\nid = "plain"\ninstance_data_dir = "{tmp_path}/plain"\n'
    other += "resolution = 64\naspect_bucket_alignment = 16\n"
    config.write_text(config.read_text() + other)
    here.run("run")
    workspace = Workspace.open(here.root)
    frozen = FrozenSamples.open(here.root / "runs" / "default" / "samples.arrow")
    assert sorted(frozen.masked.tolist()) == [False, True, True, True, True]
    reader = BatchReader(workspace, frozen, locate(workspace, frozen), workspace.config.train)
    plain = int(np.flatnonzero(~frozen.masked)[0])
    rows = np.flatnonzero(frozen.buckets == frozen.buckets[plain])
    batch = reader.read(MicroBatch(rows, np.zeros_like(rows)), 0, 0)
    assert batch.mask is not None
    for row, mask in zip(rows.tolist(), batch.mask, strict=True):
        assert bool((mask == 1).all()) == (row == plain)
    alone = reader.read(MicroBatch(np.array([plain]), np.array([0])), 0, 0)
    assert alone.mask is None

    half_of = workspace.config.train.model_copy(update={"masked_loss_probability": 0.5})
    reader = BatchReader(workspace, frozen, reader.locations, half_of)
    row = np.array([int(np.flatnonzero(frozen.masked)[0])])
    drawn = [
        reader.read(MicroBatch(row, np.array([0])), epoch, 0).mask is not None
        for epoch in range(60)
    ]
    assert 15 < sum(drawn) < 45
    sample = reader.read_eval(int(row[0]))  # always by its mask
    assert sample.mask is not None
    assert torch.equal(sample.mask, torch.from_numpy(reader.masks(row, np.array([True]))[0]))
