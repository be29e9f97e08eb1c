"""A workspace with all that training knows: two buckets, repeats, regularisation and eval data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from pipeline_project import Project

OTHER_DATASETS = """
[[dataset]]
id = "held-out"
instance_data_dir = "held-out"
dataset_type = "eval"
resolution = 64
aspect_bucket_alignment = 16

[[dataset]]
id = "kept"
instance_data_dir = "kept"
is_regularisation_data = true
resolution = 64
aspect_bucket_alignment = 16
"""

#: Everything at once.
OPTIONS: dict[str, object] = {
    "max_train_steps": 8,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "learning_rate": 1e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
    "use_ema": True,
    "eval_steps_interval": 4,
    "caption_dropout_probability": 0.2,
    "scheduled_sampling_probability": 0.5,
    "scheduled_sampling_max_step_offset": 2,
    "gradient_checkpointing": False,
}


def draw_turned(folder: Path, number: int) -> None:
    """Make `folder`, and in it so many pictures of 80x80 px, each turned further."""
    folder.mkdir()
    for turn in range(number):
        turned = Image.radial_gradient("L").resize((80, 80)).rotate(30 * turn)
        turned.convert("RGB").save(folder / f"picture {turn}.png")


def run_first_four(here: Project) -> None:
    """Run the stages before `train`."""
    for stage in ("discover", "bucket", "encode-vae", "tokenize"):
        here.run(stage)


def copied(ready: Project, folder: Path, extra: str = "") -> Project:
    """A copy of `ready` in `folder`, with `extra` at the end of its configuration."""
    here = Project(Path(shutil.copytree(ready.root, folder / "workspace")))
    with (here.root / "omnigen-pipe.toml").open("a") as file:
        file.write(extra)
    return here


def prepare(project: Callable[..., Project], folder: Path, **train: object) -> Project:
    """A project whose first four stages are done, with `OPTIONS` and `train` over them."""
    pictures = folder / "pictures"
    here = project(
        pictures, dataset={"repeats": 1}, train={**OPTIONS, **train}, extra=OTHER_DATASETS
    )
    sizes = [(pictures, 7), (here.root / "held-out", 3), (here.root / "kept", 2)]
    for place, count in sizes:
        place.mkdir(exist_ok=True)
        for number in range(count):
            size = (80, 80) if number < 4 else (112, 64)
            turned = Image.radial_gradient("L").resize(size).rotate(30 * number + count)
            turned.convert("RGB").save(place / f"picture {number}.png")
    run_first_four(here)
    return here


def change(here: Project, **train: object) -> None:
    """Set options of `[train]` in the project's configuration."""
    path = here.root / "omnigen-pipe.toml"
    lines = path.read_text().splitlines()
    for key, value in train.items():
        lines = [line for line in lines if not line.startswith(f"{key} =")]
        lines.insert(lines.index("[train]") + 1, f"{key} = {json.dumps(value)}")
    path.write_text("\n".join(lines) + "\n")


#: What a line of metrics says of the machine, not of the training.
_OF_THE_MACHINE = ("samples_per_second", "memory_gib")


def metrics(here: Project, run: str = "default") -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, without what differs between equal runs."""
    lines = (here.root / "runs" / run / "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    return [{k: v for k, v in e.items() if k not in _OF_THE_MACHINE} for e in entries]


def losses(here: Project, run: str = "default") -> list[float]:
    """The loss of every step of a run."""
    return [entry["loss"] for entry in metrics(here, run)]


def evaluations(here: Project, run: str = "default") -> list[dict[str, Any]]:
    """The lines of a run's evaluations.jsonl."""
    lines = (here.root / "runs" / run / "evaluations.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
