"""The folders of images that are named to `omnigen-pipe init`: where they lie, as the workspace
writes them, and whether they can be looked into."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from manifests.errors import UsageError
from omnigen_pipe.config import EMBEDDED
from omnigen_pipe.images.candidates import escaped
from omnigen_pipe.starting.contents import Contents, look_into

#: The folder that is meant where none is named: the workspace's own.
DEFAULT = "images"


def folder_of(images: str, root: Path, here: Path) -> Path | None:
    """The folder that the answer `images` means; None for an address on the hub.

    The default one lies in the workspace, unless there is one at `here`.
    """
    if "://" in images:
        return None
    if images == DEFAULT and not (here / images).is_dir():
        here = root
    return Path(_absolute(here / Path(images).expanduser()))


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
    return os.path.abspath(path)


def check_folder(images: str, root: Path, here: Path) -> None:
    """Raise `UsageError` where `images` can be no folder of images."""
    folder = folder_of(images, root, here)
    if folder is None:
        if not images.startswith("hf://datasets/"):
            raise UsageError(f"{images} is no address: write hf://datasets/OWNER/NAME")
    elif folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file")
    elif folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):
        raise UsageError(f"{folder} may not be read")


def is_there(images: str, root: Path, here: Path) -> bool:
    """Whether the folder that `images` names is there; of the hub's that is not asked."""
    folder = folder_of(images, root, here)
    return folder is None or folder.is_dir()


def look(images: str, root: Path, here: Path, say: Callable[[str], None]) -> Contents | None:
    """What the folder that `images` names holds; None where there is none to look into."""
    folder = folder_of(images, root, here)
    if folder is None or not folder.is_dir() or escaped(str(folder)) != str(folder):
        return None
    say(f"Looking into {folder}.")
    try:
        return look_into(folder, root)
    except UsageError as error:
        say(f"{error} It was not looked into.")
        return None
