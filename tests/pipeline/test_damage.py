"""A disk that lies: damage is found, marked and made again, and training never learns from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pipeline_project import Project

from manifests.views import current_latents
from omnigen_pipe.runs.frozen import FrozenSamples
from omnigen_pipe.workspace import Workspace


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Six pictures of noise in two shapes."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(6):
        size = (96, 80) if number % 2 else (80, 112)
        noise = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    return folder


def _latents(here: Project) -> dict[str, dict[str, Any]]:
    """The latents that count, by pixels_key."""
    place = Workspace.open(here.root)
    found = current_latents(place.latents.source(), place.root).to_pylist()
    return {row["pixels_key"]: row for row in found}


def _flip(path: Path, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 0x40
    path.write_bytes(data)


def test_repair_and_encode_vae_make_exactly_what_was_damaged_again(
    pictures: Path, project: Callable[..., Project]
) -> None:
    here = project(pictures)
    for stage in ("discover", "bucket", "encode-vae"):
        here.run(stage)
    assert here.json("verify")["failed"] is False
    before = _latents(here)
    bucket, other = sorted({row["bucket"] for row in before.values()})
    hit = next(row for row in before.values() if row["bucket"] == bucket)
    _flip(here.root / hit["shard"], hit["offset"] + 5)
    gone = [row for row in before.values() if row["bucket"] == other]
    (here.root / gone[0]["shard"]).unlink()
    damaged = {row["pixels_key"] for row in [hit, *gone]}

    assert {f["pixels_key"] for f in here.json("verify", "--quick", status=1)["faults"]} == (
        damaged - {hit["pixels_key"]}
    )
    found = here.json("verify", status=1)
    assert {fault["pixels_key"] for fault in found["faults"]} == damaged
    shown = here.run("verify", status=1).stdout
    assert hit["shard"] in shown
    assert "omnigen-pipe verify --repair" in shown

    assert here.json("verify", "--repair")["counts"]["marked"] == len(damaged)
    assert "all as it was written" in here.run("verify").stdout
    assert here.json("encode-vae")["counts"]["encoded"] == len(damaged)
    after = _latents(here)
    assert set(after) == set(before)
    assert {key for key, row in after.items() if row["shard"] != before[key]["shard"]} == damaged
    again = here.json("verify", "--repair")
    assert (again["failed"], again["changed"], again["counts"]["marked"]) == (False, False, 0)
    assert here.json("encode-vae")["changed"] is False
    rows = pq.read_table(here.root / "manifests" / "latents").to_pylist()
    assert sum(row["status"] == "damaged" for row in rows) == len(damaged)


def test_training_stops_before_it_learns_from_a_damaged_latent(
    pictures: Path, project: Callable[..., Project]
) -> None:
    options: dict[str, object] = {"train_batch_size": 1, "checkpoint_step_interval": 1}
    here = project(pictures, train={**options, "max_train_steps": 2})
    for stage in ("discover", "bucket", "encode-vae", "tokenize", "train"):
        here.run(stage)
    run = here.root / "runs" / "default"
    frozen = FrozenSamples.open(run / "samples.arrow")
    order = frozen.order(0, Workspace.open(here.root).config.train, micro_batches=1)
    last = len(order) - 1
    (row,) = frozen.table.take(order.global_batch(last)[0].samples).to_pylist()
    place = _latents(here)[row["pixels_key"]]
    _flip(here.root / place["shard"], place["offset"] + 100)

    here = project(pictures, train={**options, "max_train_steps": len(order) + 2})
    ended = here.run("train", status=1)
    assert f"The latent at byte {place['offset']} of" in ended.stderr
    assert "omnigen-pipe verify --repair" in ended.stderr
    assert "omnigen-pipe encode-vae" in ended.stderr
    assert "check the disk" in ended.stderr
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, last + 1)), "every step before it, and not its own"
    checkpoints = {path.name for path in (run / "checkpoints").iterdir()}
    assert checkpoints == {f"step-{step:08}" for step in steps}

    here.run("verify", "--repair")
    assert here.json("encode-vae")["counts"]["encoded"] == 1
    summary = here.json("train")
    assert summary["counts"]["steps"] == len(order) + 2
    assert summary["counts"]["steps now"] == 3, "it goes on from the last checkpoint"
