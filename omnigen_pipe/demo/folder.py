"""The demo's folder: whether the demo lies in it, or may be written into it.

What a user put there is never taken for the demo's: a start goes on only from what an earlier
start of the same version has left.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from manifests.errors import UsageError
from manifests.publish import is_id
from omnigen_pipe.demo.pictures import file_names

#: Begins the demo's configuration: tells it from a user's own.
MARK = "# The demo of omnigen-pipe: the embedded model learns a new shape."
#: Lies in the folder while the demo is being written, so that a killed one can be begun again, and
#: says by which version it was begun.
UNFINISHED = ".demo-unfinished"
STAGING = "staging"


def is_written(path: Path, first_line: str) -> bool:
    """Whether the configuration `path` is this version's demo, which begins with `first_line`;
    False where it is not there.

    Raises `UsageError` where it is anything else.
    """
    if not path.exists():
        return False
    first, *_ = path.read_text(encoding="utf-8", errors="replace").split("\n", 1)
    if first == first_line:
        return True
    whose = "of another version of omnigen-pipe" if first.startswith(MARK) else "not the demo's"
    raise UsageError(f"{path} is {whose}. Name a new folder for the demo with --workspace.")


def check_free(root: Path, first_line: str, pictures: Mapping[str, int]) -> None:
    """Raise `UsageError` where the demo, which is not there, cannot be written into `root`, or
    where `root` holds what no start of this version's demo has left.

    `first_line` begins this version's demo; `pictures` is how many it draws into each folder.
    """
    there = root.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise UsageError(f"{there} is a file. Name a folder for the demo with --workspace.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(
            f"{there} is write-protected. Name another folder for the demo with --workspace."
        )
    if not root.exists():
        return
    names = {path.name for path in root.iterdir()}
    unfinished = root / UNFINISHED
    own = {STAGING}
    if unfinished.exists():
        own |= {UNFINISHED, *pictures}
        if unfinished.read_text(encoding="utf-8", errors="replace") != first_line + "\n":
            raise UsageError(
                f"{root} is the unfinished demo of another version of omnigen-pipe. Name a new "
                "folder for the demo with --workspace."
            )
    foreign = sorted(names - own)
    if STAGING in names:
        # What was being written when a start was killed has an id before its name.
        left = sorted(path.name for path in (root / STAGING).iterdir())
        foreign += [f"{STAGING}/{name}" for name in left if not is_id(name[:32])]
    if foreign:
        raise UsageError(
            f"{root} holds other files already, such as {foreign[0]}. Name a new folder for the "
            "demo with --workspace."
        )
    for name, number in pictures.items():
        if name in names:
            inside = {path.name for path in (root / name).iterdir()}
            if others := sorted(inside ^ file_names(number)):
                how = "holds" if others[0] in inside else "lacks"
                raise UsageError(
                    f"{root / name} {how} {others[0]}: it is not as the demo has written it. Move "
                    "that folder away, or name a new one for the demo with --workspace."
                )
