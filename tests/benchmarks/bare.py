"""Bare loops: what is unavoidable of a stage's work, in a few plain lines with the libraries alone.

Most are run in a process of their own and say how long they took, without the imports; those of
training are called by `train_rows.py`.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from table import answer

#: As many threads as discover reads with.
READERS = 8
#: How many times the size wanted encode-vae decodes at least, where it reduces.
MARGIN = 1.5


def walk(root: str) -> dict[str, Any]:
    """Walk a folder and ask each file's size and time."""
    started = time.perf_counter()
    files = [
        (path, facts.st_size, facts.st_mtime_ns)
        for path in _files(root)
        for facts in [os.stat(path)]
    ]
    return {"seconds": time.perf_counter() - started, "files": len(files)}


def read_hash_header(root: str) -> dict[str, Any]:
    """Read each file of a folder, hash it, and look at the header, EXIF orientation included."""
    import io

    from blake3 import blake3
    from PIL import Image

    def facts(path: str) -> tuple[str, tuple[int, int], int]:
        with open(path, "rb") as handle:
            data = handle.read()
        image = Image.open(io.BytesIO(data))
        return blake3(data).hexdigest(), image.size, image.getexif().get(274, 1)

    Image.init()
    started = time.perf_counter()
    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(facts, _files(root)))
    return {"seconds": time.perf_counter() - started, "files": len(found)}


def copy_parquet(source: str, target: str) -> dict[str, Any]:
    """Copy a Parquet file through DuckDB."""
    import duckdb

    connection = duckdb.connect()
    started = time.perf_counter()
    connection.sql(f"COPY (FROM '{source}') TO '{target}' (FORMAT parquet, COMPRESSION zstd)")
    return {"seconds": time.perf_counter() - started}


def encode_batch(tokenizer_json: str, texts_json: str) -> dict[str, Any]:
    """Tokenise a list of texts, some thousands at a time."""
    from tokenizers import Tokenizer

    texts = json.loads(Path(texts_json).read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(tokenizer_json)
    started = time.perf_counter()
    tokens = 0
    for start in range(0, len(texts), 2048):
        encodings = tokenizer.encode_batch(texts[start : start + 2048])
        tokens += sum(len(encoding) for encoding in encodings)
    return {"seconds": time.perf_counter() - started, "tokens": tokens}


def decode_resize(jobs_json: str, decode: str) -> dict[str, Any]:
    """Decode, resize and crop images on all cores: jobs of path, size and box in pixels. With
    `decode` "reduced" JPEGs are decoded at the smallest scale of at least MARGIN times the size."""
    import numpy as np
    from PIL import Image

    def pixels(job: tuple[str, tuple[int, int], tuple[int, int, int, int]]) -> Any:
        path, size, box = job
        image = Image.open(path)
        if decode == "reduced":
            image.draft("RGB", tuple(math.ceil(MARGIN * side) for side in size))
        image = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        return np.asarray(image.crop(box)).mean()

    jobs = json.loads(Path(jobs_json).read_text(encoding="utf-8"))
    started = time.perf_counter()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = list(pool.map(pixels, jobs))
    return {"seconds": time.perf_counter() - started, "images": len(found)}


def vae_loop(folder: str, number: str, bucket: str, batch: str) -> dict[str, Any]:
    """Encode batches of decoded images with a VAE: `number` images of `bucket`, WIDTHxHEIGHT."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads wait as those of encode-vae do
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder, use_safetensors=True).eval()
    width, height = (int(side) for side in bucket.split("x"))
    pixels = torch.rand(int(batch), 3, height, width) * 2 - 1
    started = time.perf_counter()
    for _ in range(0, int(number), int(batch)):
        with torch.inference_mode():
            posterior = vae.encode(pixels).latent_dist
            torch.cat([posterior.mean, posterior.logvar], dim=1).numpy()
    return {"seconds": time.perf_counter() - started}


def read_latents(batches: list[list[tuple[str, int]]], shape: tuple[int, ...]) -> Iterator[Any]:
    """Copy float16 latents of `shape` from mapped files, each given by its path and offset, into
    an array for each batch."""
    import numpy as np

    mapped: dict[str, mmap.mmap] = {}
    count = math.prod(shape)
    for batch in batches:
        rows = []
        for path, offset in batch:
            if path not in mapped:
                with open(path, "rb") as handle:
                    mapped[path] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
            rows.append(np.frombuffer(mapped[path], "<f2", count, offset).reshape(shape))
        yield np.stack(rows)


def training_step(
    predict: Callable[[], Any], target: Any, parameters: list[Any], optimizer: Any
) -> None:
    """Forward, backward, clip and optimizer step; `predict` runs the model."""
    import torch

    loss = torch.nn.functional.mse_loss(predict().float(), target)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


def _files(root: str) -> list[str]:
    walked = os.walk(root)
    return [os.path.join(folder, name) for folder, _, names in walked for name in names]


if __name__ == "__main__":
    works = (walk, read_hash_header, copy_parquet, encode_batch, decode_resize, vae_loop)
    answer({work.__name__: partial(work) for work in works})
