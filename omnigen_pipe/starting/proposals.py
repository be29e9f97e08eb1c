"""What `init` proposes for a dataset, from what its folder holds. Each comes with its reason.

These are rules of thumb, written down so that they can be looked up: docs/init.md has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from omnigen_pipe.config import DatasetOptions
from omnigen_pipe.images.geometry import Fault, plan
from omnigen_pipe.starting.contents import Contents

#: Resolutions that are proposed, largest first. OmniGen-v1 is made for 1024.
RESOLUTIONS = (1024, 768, 512, 256, 128, 64)
#: This share of the images must reach a resolution for it to be proposed.
REACHED = 0.8
#: An epoch has at least about so many samples.
EPOCH = 200
#: For the sake of a larger dataset, a smaller one is seen at most so many times an epoch.
BALANCE = 10


@dataclass(frozen=True)
class Proposal:
    """A value and, in a sentence, why this one."""

    value: Any
    reason: str


def resolution(contents: Contents, longest: int | None = None) -> Proposal:
    """The largest of `RESOLUTIONS` that most images reach without being enlarged.

    `longest` is the longest side in pixels that the model takes, where that is known: half of it
    is the most that is proposed, so that there are buckets of up to 4:1.
    """
    sizes = [size for size in RESOLUTIONS if longest is None or 2 * size <= longest]
    sizes = sizes or [RESOLUTIONS[-1]]
    reached = {size: _reaching(contents, size) for size in sizes}
    usable = contents.usable
    made, bound = f" The model is made for {RESOLUTIONS[0]}.", "the model is made for it"
    if sizes[0] != RESOLUTIONS[0]:
        made, bound = "", f"the model takes at most {longest:,} px a side"
    for size, number in reached.items():
        if number >= REACHED * usable:
            reason = f"{number:,} of {usable:,} images reach it without being enlarged"
            if size == sizes[0]:
                return Proposal(size, f"{reason}, and {bound}.")
            larger = sizes[sizes.index(size) - 1]
            rest = f"{larger} only {reached[larger]:,}. The rest is left out.{made}"
            return Proposal(size, f"{reason}, {rest}")
    smallest = sizes[-1]
    return Proposal(
        smallest,
        f"Only {reached[smallest]:,} of {usable:,} images reach even this without being enlarged. "
        "The rest is left out unless upscale = true.",
    )


def _reaching(contents: Contents, size: int) -> int:
    """How many images have a bucket at this resolution that they cover."""
    width, height = np.array(contents.sizes, np.int64).reshape(-1, 2).T
    options = DatasetOptions(resolution=size, resolution_type="pixel_area")
    anywhere = np.zeros(len(width), np.uint64)
    faults = plan(width, height, options, anywhere, anywhere).fault
    return int((faults == Fault.NONE).sum())


def caption_strategy(contents: Contents) -> Proposal:
    """Where most images have a caption: a `.txt`, a table, their name; else an instance prompt.

    Where both texts and a table do, the one with more captions, and the texts where they are
    even: those are written for this purpose.
    """
    usable, table = contents.usable, contents.best_table
    most = usable / 2
    in_table = 0 if table is None else table.captioned
    if contents.captioned > most and contents.captioned >= in_table:
        reason = f"{contents.captioned:,} of {usable:,} images have a .txt beside them."
        return Proposal("textfile", reason + _left_out(usable - contents.captioned))
    if table is not None and in_table > most:
        reason = f"{table.path.name} has captions for {in_table:,} of {usable:,} images."
        return Proposal(table.kind, reason + _left_out(usable - in_table))
    few = ""
    if contents.captioned or in_table:
        few = f" Only {max(contents.captioned, in_table):,} have another caption."
    if contents.worded > most:
        reason = f"{contents.worded:,} of {usable:,} names read like captions."
        return Proposal("filename", reason + few)
    reason = "Most images have neither a .txt, nor a row in a table, nor a name like a caption."
    return Proposal("instanceprompt", reason + few)


def _left_out(number: int) -> str:
    return f" The other {number:,} are left out." if number else ""


def repeats(images: Sequence[int]) -> list[Proposal]:
    """`repeats` of each dataset, from how many images each has.

    Every dataset comes often enough for about `EPOCH` samples an epoch; beside a larger one, for
    about as many samples as that, but then at most `BALANCE` times.
    """
    largest = max(images, default=0)
    proposals = []
    for number in images:
        if number == 0:
            proposals.append(Proposal(0, "There are no images to count yet."))
            continue
        alone = -(-EPOCH // number)
        beside = min(round(largest / number), BALANCE)
        times = max(alone, beside, 1)
        if times == 1:
            reason = f"{number:,} images are enough for an epoch."
        elif alone >= beside:
            reason = f"So {number:,} images make an epoch of {number * times:,} samples."
        else:
            reason = (
                f"So {number:,} images make {number * times:,} samples beside the {largest:,} of "
                "the largest dataset."
            )
        proposals.append(Proposal(times - 1, reason))
    return proposals
