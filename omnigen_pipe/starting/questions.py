"""The questions of `omnigen-pipe init`: the few settings without which nothing can be trained.

An answer comes from the command line, else from the person at the terminal, else it is the
default. Everything else is left to the commented file.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from manifests.errors import UsageError
from omnigen_pipe.config import EMBEDDED, DatasetOptions, ModelConfig, TrainConfig


@dataclass(frozen=True)
class Question:
    """One setting: its name among the answers, what is asked, and what holds without an answer."""

    name: str
    text: str
    default: Any
    choices: tuple[str, ...] = ()


#: Asks a question at the terminal and returns the answer, of the default's type.
Ask = Callable[[Question], Any]


def _default(model: Any, name: str) -> Any:
    return model.model_fields[name].default


CAPTION_STRATEGIES: tuple[str, ...] = ("filename", "textfile", "instanceprompt")
assert set(CAPTION_STRATEGIES) <= set(
    get_args(DatasetOptions.model_fields["caption_strategy"].annotation)
)

QUESTIONS = (
    Question("images", "Folder of images, or hf://datasets/OWNER/NAME", "images"),
    Question("caption_strategy", "Where captions come from", "filename", CAPTION_STRATEGIES),
    Question("instance_prompt", "The caption of every image", "a photo of my subject"),
    Question("resolution", "Resolution (1024 means about 1024*1024 pixels)", 1024),
    Question(
        "model",
        "Model: hub id or folder",
        _default(ModelConfig, "pretrained_model_name_or_path"),
    ),
    Question("run_name", "Name of the run", _default(TrainConfig, "tracker_run_name")),
    Question("max_train_steps", "Optimizer steps to train", 1000),
    Question("train_batch_size", "Samples per step", _default(TrainConfig, "train_batch_size")),
    Question("learning_rate", "Learning rate", _default(TrainConfig, "learning_rate")),
)


def answered(given: dict[str, Any], ask: Ask | None) -> dict[str, Any]:
    """All answers: the given ones that are not None, asked ones (or defaults) for the rest.

    `instance_prompt` is only asked for, and only has a default, where captions come from it.
    """
    answers = {name: value for name, value in given.items() if value is not None}
    for question in QUESTIONS:
        if question.name in answers:
            continue
        if question.name == "instance_prompt" and answers["caption_strategy"] != "instanceprompt":
            continue
        answers[question.name] = question.default if ask is None else ask(question)
    return answers


def configured(answers: dict[str, Any], root: Path, here: Path) -> dict[str, Any]:
    """The configuration, shaped as the file is, that the answers ask for.

    Paths in answers start at the folder `here`; in the file they start at the workspace `root`,
    or are absolute where they lead out of it. `images` is one folder or a list of them; the
    default one lies in the workspace, unless there is one at `here`.
    """
    model = answers["model"]
    if model != EMBEDDED and (here / Path(model).expanduser()).is_dir():
        model = model_from_workspace(model, root, here)
    images = answers["images"]
    folders = [images] if isinstance(images, str) else list(images)
    if "" in folders:
        raise UsageError("A folder of images is empty: name one, or leave it out.")
    if folders == [QUESTIONS[0].default] and not (here / folders[0]).is_dir():
        here = root
    defaults: dict[str, Any] = {
        "resolution": answers["resolution"],
        "resolution_type": "pixel_area",
        "caption_strategy": answers["caption_strategy"],
    }
    if answers.get("instance_prompt") is not None:
        defaults["instance_prompt"] = answers["instance_prompt"]
    return {
        "model": {"pretrained_model_name_or_path": model},
        "defaults": defaults,
        "dataset": [
            {"id": name, "instance_data_dir": from_workspace(folder, root, here)}
            for name, folder in zip(dataset_ids(folders), folders, strict=True)
        ],
        "train": {
            "tracker_run_name": answers["run_name"],
            "max_train_steps": answers["max_train_steps"],
            "train_batch_size": answers["train_batch_size"],
            "learning_rate": answers["learning_rate"],
        },
    }


def from_workspace(path: str, root: Path, here: Path) -> str:
    """`path`, which starts at `here`, as one that starts at `root`; hub addresses stay."""
    if "://" in path:
        return path
    absolute = Path(_absolute(here / Path(path).expanduser()))
    base = Path(_absolute(root))
    if absolute != base and absolute.is_relative_to(base):
        return absolute.relative_to(base).as_posix()
    return str(absolute)


def model_from_workspace(path: str, root: Path, here: Path) -> str:
    """The same for a model's folder, whose name alone could be that of the embedded model."""
    moved = from_workspace(path, root, here)
    return f"./{moved}" if moved == EMBEDDED else moved


def _absolute(path: Path) -> str:
    """Absolute and without `..`, but with symbolic links as they are."""
    import os.path

    return os.path.abspath(path)


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
