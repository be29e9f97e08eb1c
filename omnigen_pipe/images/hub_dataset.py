"""Datasets on the hub: which files of a repository are wanted, and where they lie once fetched.

Given up: pictures embedded in Parquet or in archives.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

from manifests.errors import UsageError
from omnigen_pipe import hub
from omnigen_pipe.config import DatasetConfig
from omnigen_pipe.images.probe import PICTURE_EXTENSIONS

_HUB = re.compile(
    r"hf://datasets/(?P<repository>[^/@]+/[^/@]+)"
    r"(?:@(?P<revision>refs/(?:convert|pr)/[^/]+|[^/]+))?(?:/(?P<folder>.*))?"
)


def _parts(dataset: DatasetConfig) -> tuple[str, str | None, str]:
    """Repository, revision and subfolder of `hf://datasets/OWNER/NAME@REVISION/SUBFOLDER`."""
    match = _HUB.fullmatch(dataset.instance_data_dir)
    folder = "" if match is None else (match["folder"] or "").strip("/")
    if match is None or ".." in folder.split("/"):
        raise UsageError(
            f"dataset `{dataset.id}`: instance_data_dir {dataset.instance_data_dir} is not of the "
            "form hf://datasets/OWNER/NAME, with an optional @REVISION and /SUBFOLDER."
        )
    revision = unquote(match["revision"]) if match["revision"] else None
    return match["repository"], revision, folder


def _patterns(dataset: DatasetConfig, folder: str) -> list[str]:
    """The files to download, as huggingface_hub's patterns: pictures and captions."""
    extensions = sorted(PICTURE_EXTENSIONS)
    if dataset.caption_strategy == "textfile":
        extensions.append(".txt")
    start = _plain(folder + "/" if folder else "")
    patterns = []
    for extension in extensions:
        # The patterns know upper from lower case, and extensions come in both.
        either = "".join(f"[{c}{c.upper()}]" if c.isalpha() else c for c in extension)
        patterns.append(f"{start}*{either}")
    if dataset.list_file is not None:
        patterns.append(start + _plain(dataset.list_file))
    return patterns


def _plain(path: str) -> str:
    """A pattern that matches `path` alone."""
    return re.sub(r"([*?[])", r"[\1]", path)


def hub_root(dataset: DatasetConfig, refresh: bool) -> Path:
    """The folder of huggingface_hub's cache with the pictures and captions of `dataset`.

    With `refresh` the hub is asked for the newest state, and what is missing is downloaded.
    Raises `UsageError` where there is no such repository, or no picture in it.
    """
    repository, revision, folder = _parts(dataset)
    root = hub.fetch(
        repository,
        "dataset",
        revision,
        _patterns(dataset, folder),
        what=f"dataset `{dataset.id}`: {dataset.instance_data_dir}",
        refresh=refresh,
    )
    root = root / folder if folder else root
    if not root.is_dir():
        raise UsageError(why_no_images(dataset))
    return root


def is_cached(dataset: DatasetConfig) -> bool:
    """Whether the cache holds anything of the repository of `dataset`."""
    repository, revision, folder = _parts(dataset)
    return hub.cached(repository, "dataset", revision, _patterns(dataset, folder)) is not None


def why_no_images(dataset: DatasetConfig) -> str:
    """A sentence for a repository in which no picture was found, with what it holds instead."""
    from huggingface_hub import HfApi

    repository, revision, folder = _parts(dataset)
    try:
        names = HfApi().list_repo_files(repository, revision=revision, repo_type="dataset")
        inside = [name for name in names if not folder or name.startswith(folder + "/")]
        kinds = Counter(os.path.splitext(name)[1] or "without extension" for name in inside)
        listed = ", ".join(f"{number:,} {kind}" for kind, number in kinds.most_common(5))
        holds = f"It holds {listed}." if listed else "It holds no file at all."
    except hub.errors():
        holds = "What it holds instead could not be asked."
    return (
        f"dataset `{dataset.id}`: {dataset.instance_data_dir} has no image files. {holds} Pictures "
        "embedded in Parquet files or archives are not supported: export them as image files "
        "first, and name their folder in instance_data_dir."
    )
