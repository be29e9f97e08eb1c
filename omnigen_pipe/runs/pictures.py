"""Which validation pictures are of a run as it is now, and not of a training that was left.

    runs/<name>/validation/step-000200/            of this one, once step 200 is trained
                           left-0-step-000600/     of one that was left

A run that goes on from an earlier step draws the pictures of later ones anew, where they are due
again. Those that never are, because the interval has changed, are set aside.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

FOLDER_NAME = "validation"
_STEP = re.compile(r"step-(\d{6,})")


def validations(folder: Path, last_step: int | None = None) -> list[tuple[int, Path]]:
    """The steps up to `last_step` (None: all) that the run in `folder` has pictures of, each with
    their folder, in order; no links.

    Those beyond the last step that was trained are of a training that was left.
    """
    found = [
        (int(match[1]), place)
        for place in (folder / FOLDER_NAME).glob("step-*")
        if (match := _STEP.fullmatch(place.name)) and place.is_dir() and not place.is_symlink()
    ]
    return sorted(one for one in found if last_step is None or one[0] <= last_step)


def set_aside(folder: Path, after: int, is_due: Callable[[int], bool]) -> None:
    """Rename the folders of pictures of steps beyond `after`, from which the run in `folder` goes
    on, that are no more of a step that `is_due`."""
    for step, place in validations(folder):
        if step > after and not is_due(step):
            number = len(list(place.parent.glob(f"left-*-{place.name}")))
            place.rename(place.with_name(f"left-{number}-{place.name}"))
