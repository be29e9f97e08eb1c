"""What a folder of images holds, at a look: how many images, how large, and how captioned.

The folder is walked as discover walks it, and the headers and captions of a sample of the images
are read as discover reads them, so that what is said here is what discover will find. No pixel is
decoded and nothing is written. Given up: damage beyond the headers, and images in few places
that a sample misses.
"""

from __future__ import annotations

import random
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from omnigen_pipe.config import Config, DatasetConfig
from omnigen_pipe.images.captions import from_name, from_textfile
from omnigen_pipe.images.catalogue import unwanted
from omnigen_pipe.images.probe import Facts, on_threads, read_header
from omnigen_pipe.images.sources import find
from omnigen_pipe.starting.names import reads_like_caption
from omnigen_pipe.starting.tables import Table, find_tables
from omnigen_pipe.workspace import Workspace

#: Images whose headers are read: enough to know a share to two or three percent.
SAMPLE = 2000
_SEED = 0
#: Sides that differ by less than this factor make a square.
_SQUARE = 1.05


@dataclass(frozen=True)
class Contents:
    """What was found in `folder`.

    `files` counts all that have the name of a picture. All further numbers are of the `sample`
    that was looked at: `sizes` (width, height, pixels) of the images that can be used, `faults`
    the numbers of the others by reason, `captioned` images with a text in their `.txt`, `bare`
    those whose `.txt` cannot be used, `worded` images with a name that reads like a caption.
    """

    folder: Path
    files: int
    sample: int
    sizes: tuple[tuple[int, int], ...]
    faults: dict[str, int]
    captioned: int
    bare: int
    worded: int
    #: An example of a name that reads like a caption, and of one that does not.
    names: tuple[str | None, str | None]
    tables: tuple[Table, ...]
    notes: tuple[str, ...]

    @property
    def usable(self) -> int:
        """How many images of the sample can be used."""
        return len(self.sizes)

    @property
    def images(self) -> int:
        """How many images of the whole folder can be used, by the sample's share."""
        return round(self.files * self.usable / self.sample) if self.sample else 0

    @property
    def best_table(self) -> Table | None:
        """The table that gives a caption to the most images; None where none gives any."""
        tables = [table for table in self.tables if table.captioned]
        return max(tables, key=lambda table: table.captioned, default=None)

    def as_json(self) -> dict[str, Any]:
        """A machine-readable form; `sizes` as shortest, median and longest sides in pixels."""
        found: dict[str, Any] = {
            "folder": str(self.folder),
            "files": self.files,
            "looked_at": self.sample,
            "usable": self.usable,
            "faults": self.faults,
            "textfiles": {"with_text": self.captioned, "unusable": self.bare},
            "names_like_captions": self.worded,
            "tables": [
                {
                    "path": str(table.path),
                    "caption_strategy": table.kind,
                    "path_column": table.path_column,
                    "caption_column": table.caption_column,
                    "captioned": table.captioned,
                }
                for table in self.tables
            ],
            "notes": list(self.notes),
        }
        if self.sizes:
            found["shorter_side"] = _three([min(size) for size in self.sizes])
            found["longer_side"] = _three([max(size) for size in self.sizes])
            found["megapixels"] = _three([w * h / 1e6 for w, h in self.sizes])
            found["shapes"] = _shapes(self.sizes)
        return found

    def sentences(self) -> list[str]:
        """The same for a person."""
        if not self.files:
            return [f"There are no images in {self.folder} yet.", *self.notes]
        looked = ""
        if self.sample < self.files:
            looked = f"; looked at {self.sample:,} of them, drawn at random"
        said = [f"{_number(self.files, 'image')} in {self.folder}{looked}."]
        if self.faults:
            reasons = ", ".join(f"{number:,} {reason}" for reason, number in self.faults.items())
            total = sum(self.faults.values())
            said.append(f"Cannot be used: {total:,} ({reasons}).")
        if self.sizes:
            short, long = (_three([side(s) for s in self.sizes]) for side in (min, max))
            area = _three([width * height / 1e6 for width, height in self.sizes])
            said.append(
                f"Shorter side {_range(short)} px, longer side {_range(long)} px, "
                f"{_range(area, '.2f')} megapixels (least, median, most)."
            )
            shapes = ", ".join(f"{n:,} {shape}" for shape, n in _shapes(self.sizes).items() if n)
            ratio = [width / height for width, height in self.sizes]
            said.append(f"Shapes: {shapes}; width / height {min(ratio):.2f} to {max(ratio):.2f}.")
        if self.captioned or self.bare:
            rest = self.usable - self.captioned - self.bare
            said.append(
                f"Texts: {self.captioned:,} have a .txt beside them, {self.bare:,} one that is "
                f"empty or unreadable, {rest:,} none."
            )
        said += [
            f"{table.path.name} has captions for {table.captioned:,} of them, in the column "
            f"`{table.caption_column}`."
            for table in self.tables
        ]
        worded, other = self.names
        if self.usable:
            likes = f"Names: {self.worded:,} read like captions"
            likes += f" (`{worded}`)" if worded else ""
            likes += f", {self.usable - self.worded:,} do not" if other else ""
            said.append(likes + (f" (`{other}`)." if other else "."))
        return [*said, *self.notes]


def look_into(folder: Path, root: Path, most: int = SAMPLE) -> Contents:
    """Look into `folder`, of which at most `most` images are opened.

    `root` is the workspace-to-be: its own folders hold no training data. Raises `UsageError`
    where the folder cannot be read.
    """
    dataset = DatasetConfig(id="images", instance_data_dir=str(folder), caption_strategy="textfile")
    found = find(Workspace(root, Config()), dataset, folder)
    candidates = found.candidates
    chosen = range(len(candidates))
    if len(candidates) > most:
        chosen = sorted(random.Random(_SEED).sample(chosen, most))  # type: ignore[assignment]
    sample = candidates.take(chosen)

    def looked(number: int) -> tuple[Facts, int]:
        """Facts of an image, and whether its `.txt` has (1), lacks (-1) or is no text (0)."""
        if sample.reasons[number] is not None:
            return Facts("", reason=sample.reasons[number]), 0
        facts = read_header(sample.reals[number])
        captions = from_textfile(folder, sample.paths[number], dataset)
        if captions.texts:
            return facts, 1
        return facts, -1 if captions.path is not None else 0

    paths: list[str] = []
    sizes: list[tuple[int, int]] = []
    faults: Counter[str] = Counter()
    texts: Counter[int] = Counter()
    for path, (facts, text) in zip(
        sample.paths, on_threads(looked, range(len(sample))), strict=True
    ):
        reason = facts.reason or unwanted(facts, dataset)
        if reason is None and facts.width is not None and facts.height is not None:
            paths.append(path)
            sizes.append((facts.width, facts.height))
            texts[text] += 1
        else:
            faults[(reason or "without a size").split(":")[0]] += 1
    tables, notes = find_tables(folder, paths)
    worded = [path for path in paths if reads_like_caption(path)]
    other = next((path for path in paths if not reads_like_caption(path)), None)
    own = {f"dataset `images`: there are no images in {folder}."}
    notes = [
        *(n.removeprefix("dataset `images`: ") for n in found.notes if n not in own),
        *notes,
    ]
    return Contents(
        folder,
        len(candidates),
        len(sample),
        tuple(sizes),
        dict(faults.most_common()),
        texts[1],
        texts[-1],
        len(worded),
        (_example(worded[0] if worded else None), _example(other)),
        tuple(tables),
        tuple(notes),
    )


def _example(path: str | None) -> str | None:
    """The name of the image at `path` as a caption, no longer than can be shown."""
    return None if path is None else textwrap.shorten(from_name(path), 60, placeholder=" ...")


def _three(values: list[Any]) -> tuple[Any, Any, Any]:
    """Least, median and most."""
    return min(values), median(values), max(values)


def _range(three: tuple[Any, Any, Any], form: str = ",.0f") -> str:
    return " / ".join(format(value, form) for value in three)


def _shapes(sizes: tuple[tuple[int, int], ...]) -> dict[str, int]:
    counts = {"landscape": 0, "portrait": 0, "square": 0}
    for width, height in sizes:
        if max(width, height) <= _SQUARE * min(width, height):
            counts["square"] += 1
        else:
            counts["landscape" if width > height else "portrait"] += 1
    return counts


def _number(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
