"""Where images come from: a folder, a list of paths, or a dataset repository on the hub.

All three end as candidates: files that may be images, each listed once, sorted by path, so
that nothing depends on the order in which a file system names them. Files are found and their
sizes and times asked for here; none but lists is opened.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from manifests.errors import UsageError
from omnigen_pipe.config import DatasetConfig
from omnigen_pipe.images.candidates import Candidates
from omnigen_pipe.images.captions import LIST_STRATEGIES
from omnigen_pipe.images.hub_dataset import hub_root, is_cached, why_no_images
from omnigen_pipe.images.listing import Listing, list_path, listed_candidates, read_listing
from omnigen_pipe.images.mask_files import MaskFiles, find_masks, mask_root
from omnigen_pipe.images.walk import walk
from omnigen_pipe.workspace import Workspace

#: Folders of the workspace in which pictures may lie that are no training data.
_WORKSPACE_FOLDERS = ("manifests", "latents", "staging", "runs")


@dataclass
class Found:
    """What `find` found under `root`: candidates, sorted by path, the dataset's list and its
    folder of masks, if it has them, and what to tell the user."""

    root: Path
    candidates: Candidates
    listing: Listing | None = None
    notes: list[str] = field(default_factory=list)
    masks: MaskFiles | None = None


def dataset_root(workspace: Workspace, dataset: DatasetConfig, refresh: bool = False) -> Path:
    """The absolute folder that the paths of `dataset` start at.

    For a dataset on the hub that is a folder of huggingface_hub's cache. With `refresh` the hub
    is asked for the newest state of the revision, and what is missing is downloaded; without,
    what is in the cache is used as it is. Raises `UsageError` where there is no such folder.
    """
    if dataset.instance_data_dir.startswith("hf://"):
        return hub_root(dataset, refresh)
    root = workspace.path(dataset.instance_data_dir)
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise UsageError(
            f"dataset `{dataset.id}`: instance_data_dir {root} {what}. Correct the path in "
            f"{workspace.root / 'omnigen-pipe.toml'}, or mount the disk it is on."
        )
    return root


def reachable_roots(workspace: Workspace) -> dict[str, Path]:
    """The folder of each dataset that is within reach without a download, by the dataset's id."""
    roots = {}
    for dataset in workspace.config.datasets:
        if dataset.instance_data_dir.startswith("hf://") and not is_cached(dataset):
            continue
        try:
            roots[dataset.id] = dataset_root(workspace, dataset)
        except UsageError:
            continue
    return roots


def find(workspace: Workspace, dataset: DatasetConfig, root: Path) -> Found:
    """Every file of `dataset` under `root` that may be an image.

    Raises `UsageError` where the root or the list cannot be used.
    """
    listing = None
    if dataset.source == "list" or dataset.caption_strategy in LIST_STRATEGIES:
        listing = read_listing(workspace, dataset, root)
    if dataset.source == "list":
        assert listing is not None  # said by the branch above
        found = Found(root, listed_candidates(root, listing), listing)
    else:
        found = _walked(workspace, dataset, root)
        found.listing = listing
        if listing is not None:
            there = set(found.candidates.paths)
            absent = len(listing.outside) + sum(path not in there for path in listing.rows)
            if absent:
                found.notes.append(
                    f"dataset `{dataset.id}`: {absent:,} paths in {dataset.list_file} name no "
                    f"image that the walk of {root} found."
                )
    if not found.candidates:
        if dataset.instance_data_dir.startswith("hf://"):
            raise UsageError(why_no_images(dataset))
        found.notes.append(f"dataset `{dataset.id}`: there are no images in {root}.")
    found.masks = find_masks(workspace, dataset, found.candidates.paths)
    if found.masks is not None:
        found.notes += found.masks.notes
    return found


def _walked(workspace: Workspace, dataset: DatasetConfig, root: Path) -> Found:
    if not os.access(root, os.R_OK | os.X_OK):
        raise UsageError(f"dataset `{dataset.id}`: {root} may not be read. Check its permissions.")
    not_data = [workspace.root / name for name in _WORKSPACE_FOLDERS]
    masks = mask_root(workspace, dataset)
    candidates, notes = walk(
        root,
        frozenset(map(os.path.realpath, not_data if masks is None else [*not_data, masks])),
        textfiles=dataset.caption_strategy == "textfile",
        list_file=None if dataset.list_file is None else list_path(workspace, dataset, root),
        # In the hub's cache a link is how a file is stored: several names of equal bytes are
        # several files.
        distinct=not dataset.instance_data_dir.startswith("hf://"),
    )
    return Found(root, candidates, None, [f"dataset `{dataset.id}`: {note}" for note in notes])
