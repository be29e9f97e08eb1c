"""The answers to the questions of `omnigen-pipe init`, and the configuration that they ask for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omnigen_pipe.config import EMBEDDED
from omnigen_pipe.starting.contents import Contents
from omnigen_pipe.starting.folders import folder_of, from_workspace, model_from_workspace
from omnigen_pipe.starting.tables import Table


@dataclass(frozen=True)
class DatasetAnswers:
    """The answers for one dataset, and what its folder holds, if it was looked into."""

    images: str
    resolution: float
    caption_strategy: str
    instance_prompt: str | None = None
    repeats: int = 0
    is_regularisation_data: bool = False
    contents: Contents | None = None


@dataclass(frozen=True)
class Answers:
    """All answers."""

    datasets: tuple[DatasetAnswers, ...]
    model: str
    run_name: str
    learning_rate: float
    train_batch_size: int = 1
    max_train_steps: int = 1000


def configured(answers: Answers, root: Path, here: Path) -> dict[str, Any]:
    """The configuration, shaped as the file is, that the answers ask for.

    Paths in answers start at the folder `here`; in the file they start at the workspace `root`,
    or are absolute where they lead out of it. What holds for all datasets stands in `defaults`.
    """
    model = answers.model
    if model != EMBEDDED and (here / Path(model).expanduser()).is_dir():
        model = model_from_workspace(model, root, here)
    options = [_options(each) for each in answers.datasets]
    shared = {
        name: value
        for name, value in options[0].items()
        if name not in _OF_ONE and all(each.get(name) == value for each in options)
    }
    ids = dataset_ids([each.images for each in answers.datasets])
    datasets = []
    for name, each, own in zip(ids, answers.datasets, options, strict=True):
        folder = folder_of(each.images, root, here)
        place = each.images if folder is None else from_workspace(str(folder), root, here)
        entry: dict[str, Any] = {"id": name, "instance_data_dir": place}
        table = _table(each)
        if table is not None:
            entry["list_file"] = from_workspace(str(table.path), root, here)
        if each.is_regularisation_data:
            entry["is_regularisation_data"] = True
        entry |= {name: value for name, value in own.items() if name not in shared}
        datasets.append(entry)
    return {
        "model": {"pretrained_model_name_or_path": model},
        "defaults": {"resolution_type": "pixel_area", **shared},
        "dataset": datasets,
        "train": {
            "tracker_run_name": answers.run_name,
            "max_train_steps": answers.max_train_steps,
            "train_batch_size": answers.train_batch_size,
            "learning_rate": answers.learning_rate,
        },
    }


#: Options that say something of one dataset's folder, and of no other that may come later.
_OF_ONE = ("repeats", "caption_column", "path_column")


def _table(answers: DatasetAnswers) -> Table | None:
    """The table that captions come from, if they come from one that was found."""
    if answers.contents is None:
        return None
    kind = answers.caption_strategy
    tables = [table for table in answers.contents.tables if table.kind == kind]
    return max(tables, key=lambda table: table.captioned, default=None)


def _options(answers: DatasetAnswers) -> dict[str, Any]:
    """The dataset's options that may stand in `[defaults]`."""
    options: dict[str, Any] = {
        "resolution": answers.resolution,
        "caption_strategy": answers.caption_strategy,
    }
    if answers.instance_prompt is not None:
        options["instance_prompt"] = answers.instance_prompt
    table = _table(answers)
    if table is not None:
        options |= {"caption_column": table.caption_column, "path_column": table.path_column}
    if answers.repeats:
        options["repeats"] = answers.repeats
    return options


def dataset_ids(folders: list[str]) -> list[str]:
    """A distinct, valid dataset id for each folder, from its last part."""
    ids: list[str] = []
    for folder in folders:
        last = folder.split("@")[0].rstrip("/").rsplit("/", 1)[-1]
        name = base = valid_name(last)
        number = 2
        while name in ids:
            name, number = f"{base}-{number}", number + 1
        ids.append(name)
    return ids


def valid_name(text: str) -> str:
    """`text` with what a dataset's id or a run's name cannot hold replaced by `-`."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._") or "images"
