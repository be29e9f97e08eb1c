"""Small workspaces for reports, made in a moment: pictures, manifests, a run's files."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
from blake3 import blake3
from PIL import Image, PngImagePlugin

from manifests.schema import IMAGES, SAMPLES
from omnigen_pipe.config import parse
from omnigen_pipe.images.samples import make_samples, samples_settings
from omnigen_pipe.progress import Progress
from omnigen_pipe.settings import as_text
from omnigen_pipe.workspace import Workspace

QUIET = Progress(quiet=True)


def workspace(root: Path, *datasets: dict[str, Any]) -> Workspace:
    """A workspace with the embedded model."""
    root.mkdir(parents=True, exist_ok=True)
    model = {"pretrained_model_name_or_path": "embedded"}
    return Workspace(root, parse({"model": model, "dataset": list(datasets)}, "test"))


def image(dataset: str, path: str, **values: Any) -> dict[str, Any]:
    """A row of images."""
    row = {
        "dataset": dataset, "path": path, "size": 1, "mtime_ns": 1, "format": "PNG", "mode": "RGB",
        "content_hash": blake3(f"{dataset}:{path}".encode()).hexdigest()[:32],
        "width": 64, "height": 64, "frames": 1, "captions": [path], "status": "ok",
    }  # fmt: skip
    return {**row, **values}


def publish(place: Workspace, images: Iterable[dict[str, Any]], bucketed: bool = True) -> None:
    """Make `images` the images of the workspace, and if `bucketed` the samples of them."""
    rows = sorted(images, key=lambda row: (row["dataset"], row["path"]))
    place.images.replace(pa.Table.from_pylist(rows, schema=IMAGES.schema), fingerprint="test")
    if bucketed:
        samples = list(make_samples(place.images.source(), place.config))
        place.samples.replace(
            samples or SAMPLES.empty(), settings=as_text(samples_settings(place.config))
        )


def filed(place: Workspace, dataset: str, path: str, shown: Image.Image, **values: Any) -> Any:
    """The row of an image that is also written into its dataset's folder, as PNG."""
    folder = next(d.instance_data_dir for d in place.config.datasets if d.id == dataset)
    file = place.root / folder / path
    file.parent.mkdir(parents=True, exist_ok=True)
    shown.save(file, "PNG")
    data = file.read_bytes()
    digest = blake3(data).hexdigest()[:32]
    size = {"width": shown.width, "height": shown.height, "size": len(data)}
    return image(dataset, path, content_hash=digest, **size, **values)


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """A picture of soft spots that looks like no other's of another seed."""
    draw = random.Random(seed)
    small = Image.new("RGB", (6, 6))
    small.putdata([tuple(draw.randrange(256) for _ in range(3)) for _ in range(36)])
    return small.resize(size, Image.Resampling.BICUBIC)


def metrics(steps: int, bins: int = 8) -> list[dict[str, Any]]:
    """Lines as a training writes them, a sample or two in each step."""
    draw = random.Random(steps)
    lines = []
    for step in range(1, steps + 1):
        counts = [0] * bins
        for _ in range(draw.choice((1, 2, 5))):
            counts[draw.randrange(bins)] += 1
        by_t = [draw.uniform(0.2, 2.0) if n else None for n in counts]
        base = [draw.uniform(1.0, 2.0) if n else None for n in counts]
        rows = sum(counts)
        loss = sum(n * (x or 0.0) for n, x in zip(counts, by_t, strict=True)) / rows
        lines.append(
            {
                "step": step, "epoch": 0, "learning_rate": 1e-4 * step, "grad_norm": None,
                "loss": loss, "samples": rows, "samples_by_t": counts, "loss_by_t": by_t,
                "baseline_by_t": base, "samples_per_second": 10.0, "memory_gib": 1.5,
            }
        )  # fmt: skip
    return lines


def run(
    place: Workspace,
    name: str,
    steps: int,
    pictures: dict[str, list[int]],
    prompt: str = "a cat",
    evaluations: int = 0,
) -> Path:
    """The folder of a run of `steps`, with validation `pictures` (name: steps)."""
    folder = place.run_folder(name)
    folder.mkdir(parents=True)
    lines = "".join(json.dumps(line) + "\n" for line in metrics(steps))
    (folder / "metrics.jsonl").write_text(lines)
    rows = [
        {"step": n, "images": 2, "loss": 1.0 / (n + 1), "explained": 0.1,
         "times": [0.5], "losses": [1.0], "baseline": [1.5]}
        for n in range(evaluations)
    ]  # fmt: skip
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = [{"step": n, "clip_score": 20.0 + n, "clip_score_ema": 21.0} for n in (0, 1, 1)]
    (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scores))
    settings = {"seed": 1, "learning_rate": 1e-4, "optimizer": "adamw"}
    start = {"settings": settings, "free": {}, "conditions": {"device": "cpu"}}
    (folder / "run.json").write_text(json.dumps(start))
    for stem, when in pictures.items():
        for step in when:
            file = folder / "validation" / f"step-{step:06d}" / f"{stem}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            info = PngImagePlugin.PngInfo()
            info.add_itxt("prompt", prompt)
            picture(step, (48, 64)).save(file, pnginfo=info)
            preview = file.parent / "previews" / f"{stem}-step-05.png"
            preview.parent.mkdir(exist_ok=True)
            picture(step, (8, 8)).save(preview)
    return folder
