"""What is wanted: in an order that lets an image be decoded once, and few shards be open."""

from __future__ import annotations

import random
from itertools import groupby
from typing import Any

import pyarrow as pa
import pytest

from manifests.schema import SAMPLES
from omnigen_pipe.latents.wanted import wanted_latents, with_files

#: Buckets at about 512 and 1024 pixels: what is one of the small ones is two of the large.
_PAIRS = [
    ("512x512", "1024x1024"),
    ("512x512", "1040x1008"),
    ("592x448", "1184x880"),
    ("592x448", "1168x896"),
]


def _samples(generator: random.Random, images: int) -> list[dict[str, Any]]:
    """Samples of so many images: each at one or two resolutions, and some in several crops."""
    rows = []
    for image in range(images):
        pair = generator.choice(_PAIRS)
        content_hash = f"{generator.getrandbits(128):032x}"
        buckets = generator.choice([pair, pair, pair[:1], pair[1:], (pair[0], *pair)])
        for number, bucket in enumerate(buckets):
            rows.append(
                {
                    "dataset": f"at {bucket}",
                    "path": f"{image}.png",
                    "content_hash": content_hash,
                    "bucket": bucket,
                    "pixels_key": f"{generator.getrandbits(128):032x}",
                    "resize_width": 1200,
                    "resize_height": 1200,
                    "crop_left": number,
                    "crop_top": 0,
                    "status": "ok",
                }
            )
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_images_lie_together_and_so_do_those_of_the_same_buckets(seed: int) -> None:
    generator = random.Random(seed)
    rows = _samples(generator, 60)
    samples = pa.Table.from_pylist(rows, schema=SAMPLES.schema)
    found = with_files(wanted_latents(samples), samples)
    assert sorted(found["pixels_key"].to_pylist()) == sorted(row["pixels_key"] for row in rows)

    images = [list(rows) for _, rows in groupby(found.to_pylist(), lambda r: r["content_hash"])]
    assert len(images) == 60
    sets = [frozenset(row["bucket"] for row in image) for image in images]
    groups = [group for group, _ in groupby(sets)]
    assert len(groups) == len(set(sets))
    # Small buckets are left once; large ones of images without a small one come again.
    for small in {pair[0] for pair in _PAIRS}:
        runs = [in_it for in_it, _ in groupby(small in group for group in groups)]
        assert runs.count(True) == 1

    generator.shuffle(rows)
    shuffled = pa.Table.from_pylist(rows, schema=SAMPLES.schema)
    assert with_files(wanted_latents(shuffled), shuffled).equals(found)
