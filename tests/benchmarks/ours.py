"""The stages as the benchmark runs them: each in a process of its own, imports not counted."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from process_memory import memory_of_process
from table import answer

from manifests.query import query
from omnigen_pipe.progress import Progress
from omnigen_pipe.summary import Summary
from omnigen_pipe.workspace import Workspace

Run = Callable[[Workspace, Progress], Summary]


def _timed(run: Run, root: str) -> dict[str, Any]:
    """How long `run` took, and what it counted."""
    workspace, quiet = Workspace.open(root), Progress(quiet=True)
    # Ready are DuckDB, and what Arrow imports with its first array.
    query("SELECT 1")
    pa.array([""]).take(pa.array([0])).to_pylist()
    started = time.perf_counter()
    summary = run(workspace, quiet)
    return {"seconds": time.perf_counter() - started, "counts": summary.counts}


def discover(root: str) -> dict[str, Any]:
    """discover of the workspace `root`."""
    import pyarrow.dataset  # noqa: F401  # imported at the first Parquet file

    from stages import discover

    return _timed(discover.run, root)


def bucket(root: str) -> dict[str, Any]:
    """bucket of the workspace `root`."""
    from stages import bucket

    return _timed(bucket.run, root)


def tokenize(root: str) -> dict[str, Any]:
    """tokenize of the workspace `root`, loading the tokenizer included."""
    from stages import tokenize

    return _timed(tokenize.run, root)


def status(root: str, how: str) -> dict[str, Any]:
    """status of the workspace `root`; `how` is "quick" or "full"."""
    from omnigen_pipe.maintenance import status

    def run(workspace: Workspace, progress: Progress) -> Summary:
        found = status.run(workspace, progress, quick=how == "quick")
        return Summary("status", False, {stage.stage: stage.current for stage in found.stages})

    return _timed(run, root)


def plan_encoding(root: str) -> dict[str, Any]:
    """encode-vae of the workspace `root`, where nothing is missing."""
    from stages import encode_vae

    found = _timed(encode_vae.run, root)
    return {**found, "torch": "torch" in sys.modules}


def plan_missing(root: str) -> dict[str, Any]:
    """Which latents the workspace `root` lacks, and where their images lie, in encoding's order."""
    from omnigen_pipe.images.samples import current_samples
    from omnigen_pipe.latents.vae import inputs_key, vae_inputs
    from omnigen_pipe.latents.wanted import (
        STATUS_COLUMNS,
        known_latents,
        wanted_latents,
        with_files,
        with_status,
    )
    from omnigen_pipe.model_files import model_part

    def run(workspace: Workspace, progress: Progress) -> Summary:
        samples = current_samples(workspace)
        key = inputs_key(vae_inputs(workspace, model_part(workspace, "vae")))
        known = known_latents(workspace, key, STATUS_COLUMNS)
        wanted = with_status(wanted_latents(samples), known)
        missing = with_files(wanted.filter(pc.is_null(wanted["status"])), samples)
        return Summary("encode-vae", False, {"missing": missing.num_rows})

    return _timed(run, root)


def encode(root: str) -> dict[str, Any]:
    """encode-vae of the workspace `root`; its seconds begin when the VAE is loaded."""
    from stages import encode_vae

    summary = encode_vae.run(Workspace.open(root), Progress(quiet=True))
    encoded = summary.counts["encoded"]
    rate = summary.details["images_per_second"]
    return {"seconds": encoded / rate, "counts": summary.counts}


def plan_epoch(number: str) -> dict[str, Any]:
    """The order of an epoch of so many samples in forty buckets."""
    import numpy as np

    from omnigen_pipe.runs.order import epoch_order

    buckets = np.random.default_rng(0).integers(0, 40, int(number))
    repeats = np.zeros(int(number), np.int64)
    started = time.perf_counter()
    order = epoch_order(buckets, repeats, seed=0, epoch=0, batch_size=4, micro_batches=4)
    return {"seconds": time.perf_counter() - started, "counts": {"steps": len(order)}}


def memory_of_epochs(root: str, epochs: str) -> dict[str, Any]:
    """Read so many epochs of whole batches of the run `bench`: how long each took, and the bytes of
    memory that were resident after each (none where the system does not say)."""
    import gc

    from omnigen_pipe.runs.frozen import FrozenSamples, locate
    from omnigen_pipe.training.batches import BatchReader, read_ahead

    workspace = Workspace.open(root)
    config = workspace.config.train
    frozen = FrozenSamples.open(workspace.run_folder("bench") / "samples.arrow")
    reader = BatchReader(workspace, frozen, locate(workspace, frozen), config)
    orders = [frozen.order(epoch, config, 1) for epoch in range(int(epochs))]
    micros = (
        (micro, epoch)
        for epoch, order in enumerate(orders)
        for index in range(len(order))
        for micro in order.global_batch(index)
    )
    # As in training, one pair of threads reads all epochs.
    batches = read_ahead(micros, lambda item: reader.read(*item, 0))
    seconds, resident = [], []
    for order in orders:
        started = time.perf_counter()
        for _ in range(len(order)):  # of one micro-batch each
            next(batches)
        seconds.append(time.perf_counter() - started)
        gc.collect()
        resident += _resident()
    return {"seconds": seconds, "resident": resident}


def _resident() -> list[int]:
    """The process' resident memory, bytes, where the system says it."""
    return [memory_of_process("VmRSS")] if Path("/proc/self/status").exists() else []


def loss_of_reduction(root: str, number: str) -> dict[str, Any]:
    """Decibels between full and reduced decoding of the first so many images: median and least."""
    import numpy as np

    from omnigen_pipe.config import PixelsConfig
    from omnigen_pipe.images.pixels import read_pixels

    workspace = Workspace.open(root)
    rows = query(
        "SELECT * FROM samples WHERE status = 'ok' ORDER BY path LIMIT $1",
        int(number),
        samples=workspace.samples.source(),
    ).to_pylist()
    decibels = []
    for row in rows:
        width, height = (int(side) for side in row["bucket"].split("x"))
        geometry = (
            (width, height),
            (row["resize_width"], row["resize_height"]),
            (row["crop_left"], row["crop_top"]),
        )
        data = (workspace.path("photos") / row["path"]).read_bytes()
        full, reduced = (
            read_pixels(data, *geometry, PixelsConfig(decode=decode)).astype(float)
            for decode in ("full", "reduced")
        )
        error = np.square(full - reduced).mean()
        decibels.append(10 * np.log10(255**2 / max(error, 1e-9)))
    return {"median": float(np.median(decibels)), "least": float(min(decibels))}


if __name__ == "__main__":
    works = (
        discover, bucket, tokenize, status, plan_encoding, plan_missing, encode, plan_epoch,
        memory_of_epochs, loss_of_reduction,
    )  # fmt: skip
    answer({work.__name__: work for work in works})
