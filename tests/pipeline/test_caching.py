"""Exactly the necessary work: one test for each row of the table in docs/caching.md.

Each is also a test of status: what it says beforehand is what the stages then do, and it changes
nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pipeline_project import Project

from manifests.keys import key
from omnigen_pipe.images import samples
from omnigen_pipe.prompts import template
from omnigen_pipe.workspace import Workspace

#: Prompts that are wanted besides captions: `<cfg>`, the empty one, and diffusers' negative one.
OTHERS = 3


@dataclass
class Work:
    """What the four stages did: files opened, rows changed, latents and prompts made."""

    opened: int = 0
    images: int = 0
    samples: int = 0
    encoded: int = 0
    tokenised: int = 0


def picture(path: Path, seed: int) -> None:
    """Noise in one of two shapes as BMP, which always takes the same number of bytes."""
    size = (96, 80) if seed % 2 else (80, 112)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(path)
    age(path)


def caption(path: Path, text: str) -> None:
    path.with_suffix(".txt").write_text(text)
    age(path.with_suffix(".txt"))


def age(path: Path, seconds: float = 60) -> None:
    """Set the modification time back: what is read within two seconds of it is read again."""
    os.utime(path, (time.time() - seconds,) * 2)


@dataclass
class Cache:
    """Two datasets, `cats` and `dogs`, of four pictures each, and the stages over them."""

    root: Path
    model: Path

    def draw(self) -> None:
        for number, name in enumerate(("cats", "dogs")):
            (self.root / name).mkdir(parents=True)
            for n in range(4):
                path = self.root / name / f"{n}.bmp"
                picture(path, 10 * number + n)
                caption(path, f"picture {n} of {name}")

    def configure(self, **tables: dict[str, object]) -> None:
        """Write the configuration: `cats`, `dogs` and `vae` are tables of options."""
        base = {"resolution": 64, "aspect_bucket_alignment": 16, "caption_strategy": "textfile"}
        lines = ["[model]", f"pretrained_model_name_or_path = {json.dumps(str(self.model))}"]
        lines += ["[vae]", *(f"{k} = {json.dumps(v)}" for k, v in tables.get("vae", {}).items())]
        for name in ("cats", "dogs"):
            options = {"id": name, "instance_data_dir": name, **base, **tables.get(name, {})}
            lines += ["[[dataset]]", *(f"{k} = {json.dumps(v)}" for k, v in options.items())]
        lines += ["[train]", "max_train_steps = 1", 'report_to = "none"']
        (self.root / "omnigen-pipe.toml").write_text("\n".join(lines) + "\n")

    @property
    def project(self) -> Project:
        return Project(self.root)

    def status(self) -> dict[str, dict[str, Any]]:
        """What status says of each stage; fails where it changes anything."""
        before = self.files()
        found = self.project.json("status")
        assert self.files() == before, "status changed something"
        return {stage["stage"]: stage for stage in found["stages"]}

    def files(self) -> dict[str, tuple[int, int, int]]:
        facts = {str(p): p.stat() for p in sorted(self.root.rglob("*"))}
        return {name: (f.st_size, f.st_mtime_ns, f.st_ino) for name, f in facts.items()}

    def rows(self) -> tuple[dict[Any, Any], dict[Any, Any]]:
        place = Workspace.open(self.root)
        images = {(r["dataset"], r["path"]): r for r in place.images.read().to_pylist()}
        return images, {r["sample_id"]: r for r in place.samples.read().to_pylist()}

    def work(self) -> Work:
        """Ask status, run the four stages, and compare what was said with what was done."""
        said = self.status()
        before = self.rows()
        done = {
            stage: self.project.json(stage)
            for stage in ("discover", "bucket", "encode-vae", "tokenize")
        }
        after = self.rows()
        images, some_samples = (_changed(*pair) for pair in zip(before, after, strict=True))
        assert done["discover"]["changed"] == (images > 0)
        assert done["bucket"]["changed"] == (some_samples > 0 or said["bucket"]["why"] != [])
        result = Work(
            done["discover"]["counts"]["files opened"],
            images,
            some_samples,
            done["encode-vae"]["counts"]["encoded"],
            done["tokenize"]["counts"]["tokenised"],
        )
        assert said["discover"]["cost"]["files to open"] == result.opened
        if not result.opened:
            assert said["encode-vae"]["missing"] == result.encoded
            assert said["tokenize"]["missing"] == result.tokenised
        again = self.status()
        assert [stage["missing"] for stage in again.values()] == [0, 0, 0, 0, 1]
        return result


def _changed(before: dict[Any, Any], after: dict[Any, Any]) -> int:
    """How many rows differ; one that leaves and one that comes are one that moved."""
    edited = sum(before[k] != after[k] for k in before.keys() & after.keys())
    return edited + max(len(before.keys() - after.keys()), len(after.keys() - before.keys()))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, small_omnigen: Path) -> Path:
    """A workspace with everything done once. Do not change it."""
    made = Cache(tmp_path_factory.mktemp("caching") / "w", small_omnigen)
    made.draw()
    made.configure()
    for stage in ("discover", "bucket", "encode-vae", "tokenize"):
        made.project.run(stage)
    return made.root


@pytest.fixture
def cache(tmp_path: Path, done: Path, small_omnigen: Path) -> Cache:
    """A copy of it: keys know nothing of where a workspace lies."""
    shutil.copytree(done, tmp_path / "w")
    return Cache(tmp_path / "w", small_omnigen)


#: Names of files opened, while a test listens: hooks cannot be removed.
_listening: list[set[str]] = []


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _listening:
        _listening[-1].add(str(arguments[0]))


sys.addaudithook(_hear)


def test_nothing_changed(cache: Cache) -> None:
    _listening.append(set())
    try:
        assert cache.work() == Work()
        heard = _listening.pop()
    finally:
        _listening.clear()
    assert any(name.endswith("omnigen-pipe.toml") for name in heard), "the hook hears"
    assert not [name for name in heard if name.endswith((".bmp", ".txt"))]


def test_mtime_touched(cache: Cache) -> None:
    age(cache.root / "cats" / "1.bmp", 30)
    assert cache.work() == Work(opened=1, images=1)


def test_image_renamed_or_moved(cache: Cache) -> None:
    cats = cache.root / "cats"
    (cats / "1.bmp").rename(cats / "new name.bmp")
    (cats / "1.txt").rename(cats / "new name.txt")
    assert cache.work() == Work(opened=1, images=1, samples=1)
    (cats / "inner").mkdir()
    (cats / "2.bmp").rename(cats / "inner" / "2.bmp")
    caption(cats / "inner" / "2.bmp", "another caption")
    assert cache.work() == Work(opened=1, images=1, samples=1, tokenised=1)


def test_a_second_copy(cache: Cache) -> None:
    cats = cache.root / "cats"
    for end in (".bmp", ".txt"):
        shutil.copy2(cats / f"1{end}", cats / f"copy{end}")
    assert cache.work() == Work(opened=1, images=1, samples=1)


def test_image_replaced_under_the_same_name_and_size(cache: Cache) -> None:
    path = cache.root / "dogs" / "1.bmp"
    size = path.stat().st_size
    picture(path, 31)
    age(path, 30)
    assert path.stat().st_size == size
    assert cache.work() == Work(opened=1, images=1, samples=1, encoded=1)


def test_caption_edited(cache: Cache) -> None:
    path = cache.root / "dogs" / "1.bmp"
    caption(path, "something else")
    assert cache.status()["tokenize"]["why"] == ["1: new or edited captions"]
    assert cache.work() == Work(images=1, samples=1, tokenised=1)


def test_image_deleted(cache: Cache) -> None:
    (cache.root / "dogs" / "1.bmp").unlink()
    (cache.root / "dogs" / "1.txt").unlink()
    assert cache.work() == Work(images=1, samples=1)
    standing = cache.status()
    assert (standing["encode-vae"]["unused"], standing["tokenize"]["unused"]) == (1, 1)


@pytest.mark.parametrize(
    "options",
    [
        {"crop": True},
        {"crop": True, "crop_style": "corner"},
        {"resolution": 48},
        {"aspect_bucket_alignment": 32},
    ],
)
def test_geometry_of_one_dataset(cache: Cache, options: dict[str, object]) -> None:
    _, before = cache.rows()
    cache.configure(cats=options)
    why = cache.status()["bucket"]["why"]
    assert any(reason.endswith("of dataset cats: false → true") for reason in why) == (
        "crop" in options
    )
    done = cache.work()
    _, after = cache.rows()
    moved = {name for name in after if after[name]["pixels_key"] != before[name]["pixels_key"]}
    assert {after[name]["dataset"] for name in moved} == {"cats"}
    assert done == Work(samples=len(moved), encoded=len(moved))
    cache.configure()
    assert cache.work() == Work(samples=len(moved)), "back to an earlier setting"


def test_only_the_changed_geometries_of_a_dataset(cache: Cache) -> None:
    """A coarser alignment moves pictures of 80x112 to another bucket; those of 96x80 stay."""
    _, before = cache.rows()
    cache.configure(cats={"aspect_bucket_alignment": 32})
    done = cache.work()
    _, after = cache.rows()
    moved = [n for n, row in after.items() if row["pixels_key"] != before[n]["pixels_key"]]
    assert {(after[n]["width"], after[n]["height"]) for n in moved} == {(80, 112)}
    assert done == Work(samples=2, encoded=2)


@pytest.mark.parametrize(
    ("option", "value", "why"),
    [
        ("latent_dtype", "fp32", "latent_dtype: fp16 → fp32"),
        ("vae_dtype", "bf16", "vae_dtype: fp32 → bf16"),
    ],
)
def test_precision_changed_and_back(cache: Cache, option: str, value: str, why: str) -> None:
    cache.configure(vae={option: value})
    assert cache.status()["encode-vae"]["why"] == [f"8: {why}"]
    assert cache.work() == Work(encoded=8)
    cache.configure()
    assert cache.work() == Work()
    assert cache.status()["encode-vae"]["unused"] == 8


def _other_model(cache: Cache, file: str, change: bytes | None) -> None:
    """The same model with one file edited: a byte flipped, or `change` appended."""
    moved = cache.root.parent / "model"
    shutil.copytree(cache.model, moved)
    path = moved / file
    data = bytearray(path.read_bytes())
    if change is None:
        data[-2] ^= 1
    path.write_bytes(data + (change or b""))
    cache.model = moved
    cache.configure()


def test_vae_weights_changed_and_back(cache: Cache) -> None:
    first = cache.model
    _other_model(cache, "vae/diffusion_pytorch_model.safetensors", None)
    assert cache.status()["encode-vae"]["why"] == ["8: weights of the VAE (1) changed"]
    assert cache.work() == Work(encoded=8)
    cache.model = first
    cache.configure()
    assert cache.work() == Work()


def test_tokenizer_changed_and_back(cache: Cache) -> None:
    first = cache.model
    _other_model(cache, "tokenizer/tokenizer.json", b"\n")
    assert cache.status()["tokenize"]["why"] == [f"{8 + OTHERS}: tokenizer.json changed"]
    assert cache.work() == Work(tokenised=8 + OTHERS)
    cache.model = first
    cache.configure()
    assert cache.work() == Work()


def test_template_changed_and_back(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(template, "_PREFIX", "<|user|>\nDraw\n")
        other = key("<|user|>\nDraw\n", template._SUFFIX)
        patch.setattr(template, "TEMPLATE_KEY", other)
        patch.setattr(samples, "TEMPLATE_KEY", other)
        assert any(w.startswith("prompt template") for w in cache.status()["bucket"]["why"])
        assert cache.work() == Work(samples=8, tokenised=8 + OTHERS)
    assert cache.work() == Work(samples=8)


def test_why_latents_are_missing_is_told_apart(cache: Cache) -> None:
    shard = sorted(cache.root.glob("latents/*/*.tar"))[0]
    lost = len([row for row in _latents(cache) if row["shard"].endswith(shard.name)])
    shard.unlink()
    picture(cache.root / "cats" / "new.bmp", 77)
    caption(cache.root / "cats" / "new.bmp", "new")
    cache.configure(dogs={"crop": True, "crop_style": "corner"})
    cache.project.run("discover")
    _, before = cache.rows()
    cache.project.run("bucket")
    _, after = cache.rows()
    dogs = [n for n in before if before[n]["pixels_key"] != after[n]["pixels_key"]]
    gone = [r["pixels_key"] for r in _latents(cache) if r["shard"].endswith(shard.name)]
    lost = len({row["pixels_key"] for row in after.values()} & set(gone))
    said = cache.status()["encode-vae"]
    assert said["missing"] == len(dogs) + 1 + lost
    assert said["why"] == [
        f"{len(dogs)}: images that have latents in another geometry (crop of dataset dogs: "
        "false → true; crop_style of dataset dogs: center → corner)",
        f"{lost}: their shard is gone, cut short or damaged",
        "1: images that have no latents yet",
    ]
    assert cache.project.json("encode-vae")["counts"]["encoded"] == said["missing"]


def _latents(cache: Cache) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = Workspace.open(cache.root).latents.read().to_pylist()
    return rows


def test_the_cost_is_close_to_what_is_written(cache: Cache) -> None:
    cache.configure(vae={"latent_dtype": "fp32"})
    cost = cache.status()["encode-vae"]["cost"]
    assert (cost["images to decode"], cost["latents to encode"]) == (8, 8)
    sizes = [path.stat().st_size for path in cache.root.glob("*/*.bmp")]
    assert cost["bytes to read"] == sum(sizes)
    written = cache.project.json("encode-vae")["counts"]["bytes written"]
    assert 0.5 < cost["bytes to write"] / written < 2


def test_a_status_before_anything_was_done(tmp_path: Path, small_omnigen: Path) -> None:
    fresh = Cache(tmp_path / "w", small_omnigen)
    fresh.draw()
    fresh.configure()
    said = fresh.status()
    assert said["discover"]["cost"]["files to open"] == 8
    assert said["discover"]["why"] == ["8 new"]
    assert not (fresh.root / "manifests").exists()
    text = fresh.project.run("status").stdout
    assert "discover: 8 new" in text
    assert "up to date" not in text


def test_a_run_that_counts_in_epochs_is_to_be_done(cache: Cache) -> None:
    path = cache.root / "omnigen-pipe.toml"
    path.write_text(path.read_text().replace("max_train_steps = 1", "num_train_epochs = 3"))
    assert cache.status()["train"]["missing"] == 3 * 8
    assert cache.project.json("status")["up_to_date"] is False


def test_a_quick_status_does_not_look_at_the_pictures(cache: Cache) -> None:
    shutil.rmtree(cache.root / "cats")
    quick = {s["stage"]: s for s in cache.project.json("status", "--quick")["stages"]}
    assert quick["discover"]["current"] == 8
    full = cache.project.json("status")
    assert {s["stage"]: s for s in full["stages"]}["discover"]["unused"] == 4
    assert any("cats" in note for note in full["notes"])


def test_a_sample_is_explained_from_file_to_batch(cache: Cache) -> None:
    cache.project.run("train")
    _, rows = cache.rows()
    row = next(r for r in rows.values() if (r["dataset"], r["path"]) == ("cats", "1.bmp"))
    latent = next(r for r in _latents(cache) if r["pixels_key"] == row["pixels_key"])
    (first,) = cache.project.json("status", "--sample", row["sample_id"][:10])
    for name in ("cats/1.bmp", "cats:1.bmp", str(cache.root / "cats" / "1.bmp")):
        assert cache.project.json("status", "--sample", name) == [first]
    assert len(cache.project.json("status", "--sample", "1.bmp")) == 2, "one in each dataset"
    assert first["image"]["content_hash"] == row["content_hash"]
    assert first["geometry"]["pixels_key"] == row["pixels_key"]
    assert first["file"]["path"] == str(cache.root / "cats" / "1.bmp")
    assert (first["latent"]["shard"], first["latent"]["offset"]) == (
        latent["shard"],
        latent["offset"],
    )
    assert first["prompts"][0]["text"] == "picture 1 of cats"
    assert len(first["prompts"][0]["input_ids"]) == first["prompts"][0]["length"] > 0
    steps = [cache.project.json("status", "--sample", name)[0]["runs"][0]["steps"] for name in rows]
    assert sorted(steps) == [[n] for n in range(1, 9)], "each once in an epoch of eight steps"
    text = cache.project.run("status", "--sample", row["sample_id"]).stdout
    for part in (row["pixels_key"], latent["shard"], "run default, epoch 0: step"):
        assert part in text


def test_a_sample_that_is_left_out_or_unknown_is_explained(cache: Cache) -> None:
    (cache.root / "cats" / "broken.bmp").write_bytes(b"BM no picture")
    picture(cache.root / "cats" / "late.bmp", 50)
    text = cache.project.run("status", "--sample", "cats/late.bmp", status=2).stderr
    assert "run `omnigen-pipe discover`" in text
    cache.project.run("discover")
    cache.project.run("bucket")
    text = cache.project.run("status", "--sample", "cats/broken.bmp").stdout
    assert "left out  rejected: " in text
    text = cache.project.run("status", "--sample", "LATE", status=2).stderr
    assert "There is cats:late.bmp." in text
