"""Images that are there more than once: with the same bytes, or nearly the same to the eye.

Equal bytes are known of all images. Looks are compared among a sample of those that are used: each
must be opened for that. Leakage is an image that is trained on and evaluated on. A file that
several datasets of a folder name is one image of each of its splits.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from manifests.errors import PipeError
from manifests.query import query
from omnigen_pipe.cores import usable_cores
from omnigen_pipe.progress import Progress
from omnigen_pipe.report.hashes import SIDE, Hashes, grey, near_pairs, perceptual_hash
from omnigen_pipe.report.thumbnails import Album, fitted, read_file, whole_image
from omnigen_pipe.workspace import Workspace

#: Hashes of nearly the same image differ in at most so many of 64 bits…
DISTANCE = 3
#: …and its colours, at 16x16, by at most so many of 255 (the root of the mean square): hashes of
#: plain drawings agree too easily.
MOST_DIFFERENCE = 12.0
#: The side in pixels at which colours are compared.
_COLOURS = 16

#: So many images are compared with others at once.
_BLOCK = 256

#: So many groups are shown, and so many images of each.
MOST_GROUPS, _SHOWN = 12, 6
#: The longer side of their thumbnails in pixels.
_THUMBNAIL = 128
#: So many images are decoded ahead.
_AHEAD = 64

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Member:
    """An image of a group: its dataset, path and split, and its thumbnail or why it has none."""

    dataset: str
    path: str
    split: str
    uri: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Group:
    """Images that are the same; of `count` some are `members`, and `more` are not named. `leaks`
    where some are trained on and some evaluated on: then there are members of both."""

    count: int
    leaks: bool
    members: list[Member]
    more: int


@dataclass(frozen=True)
class Copies:
    """Groups of images, the ones that leak first; `number` counts all, `surplus` the images beyond
    the first of each, and `leaking` the evaluated images that are trained on as well."""

    number: int = 0
    surplus: int = 0
    leaking: int = 0
    groups: list[Group] = field(default_factory=list)


@dataclass(frozen=True)
class Likeness:
    """`same` are equal in bytes, `near` to the eye. `hashed` of `pictures` different ones were
    compared; `unread` could not be. `evaluated` says whether any image is."""

    same: Copies
    near: Copies
    pictures: int
    hashed: int
    unread: int
    evaluated: bool

    @property
    def all_compared(self) -> bool:
        """Whether looks were compared of every image, so that what was not found is not there."""
        return self.hashed == self.pictures


#: One row per file and split of a used image: it may be a sample several times, by its crops, and
#: by datasets of one folder. `places` has the folder of each dataset.
_USED = """
    used AS (
        SELECT min(struct_pack(dataset := dataset, path := path, split := split)) AS file,
               split = 'eval' AS evaluated, content_hash
        FROM samples JOIN places USING (dataset) WHERE status = 'ok'
        GROUP BY place || '/' || path, split, content_hash
    )
"""

#: Up to `$1` files of one side of a group.
_SIDES = """
    coalesce(min(file, $1) FILTER (evaluated), []) AS evaluated_files,
    coalesce(min(file, $1) FILTER (NOT evaluated), []) AS trained_files
"""


def likeness(
    workspace: Workspace,
    progress: Progress,
    roots: dict[str, Path],
    album: Album,
    limit: int,
    seed: int,
) -> Likeness:
    """Find both kinds; at most `limit` images are opened, random ones drawn with `seed`, of which
    the evaluated ones are at most half unless there are too few others."""
    sources = {"samples": workspace.samples.source(), "places": _places(workspace, roots)}
    (facts,) = query(
        f"""
        WITH {_USED}
        SELECT count(DISTINCT content_hash) AS pictures,
               count(*) FILTER (evaluated) AS evaluated FROM used
        """,
        **sources,
    ).to_pylist()
    same = _same_bytes(workspace, roots, album, sources)
    chosen = _chosen(sources, limit, seed)
    looks = _looks(workspace, progress, roots, chosen)
    near = _near(workspace, roots, album, looks)
    return Likeness(
        same,
        near,
        facts["pictures"],
        len(looks.known),
        len(chosen) - len(looks.known),
        facts["evaluated"] > 0,
    )


def _places(workspace: Workspace, roots: dict[str, Path]) -> pa.Table:
    """`place` of each `dataset` in the samples: its folder, the same for datasets of one folder."""
    datasets = query("SELECT DISTINCT dataset FROM samples", samples=workspace.samples.source())[
        "dataset"
    ].to_pylist()
    configured = {
        each.id: each.instance_data_dir
        if each.instance_data_dir.startswith("hf://")
        else str(workspace.path(each.instance_data_dir))
        for each in workspace.config.datasets
    }

    def place(dataset: str) -> str:
        if dataset in roots:
            return str(roots[dataset].resolve())
        # Of one that is configured no more nothing is known.
        return configured.get(dataset, f"the dataset {dataset}")

    return pa.table(
        {"dataset": datasets, "place": [place(dataset) for dataset in datasets]},
        schema=pa.schema([("dataset", pa.string()), ("place", pa.string())]),
    )


def both_sides(
    evaluated: Sequence[_Item], trained: Sequence[_Item], most: int = _SHOWN
) -> list[_Item]:
    """At most `most` of both, the evaluated ones first, and of each half as far as there are."""
    first = max(most - most // 2, most - len(trained))
    shown = list(evaluated[:first])
    return shown + list(trained[: most - len(shown)])


def _same_bytes(
    workspace: Workspace, roots: dict[str, Path], album: Album, sources: dict[str, Any]
) -> Copies:
    (counts,) = query(
        f"""
        WITH {_USED}, sums AS (
            SELECT count(*) AS n, count(*) FILTER (evaluated) AS evaluated
            FROM used GROUP BY content_hash HAVING count(*) > 1
        )
        SELECT count(*) AS number, coalesce(sum(n) - count(*), 0)::BIGINT AS surplus,
               coalesce(sum(evaluated) FILTER (evaluated < n), 0)::BIGINT AS leaking FROM sums
        """,
        **sources,
    ).to_pylist()
    rows = query(
        f"""
        WITH {_USED}
        SELECT content_hash, count(*) AS n,
               bool_or(evaluated) AND NOT bool_and(evaluated) AS leaks, {_SIDES}
        FROM used GROUP BY content_hash HAVING count(*) > 1
        ORDER BY leaks DESC, n DESC, content_hash LIMIT $2
        """,
        _SHOWN,
        MOST_GROUPS,
        **sources,
    ).to_pylist()
    found = []
    for row in rows:
        files = both_sides(row["evaluated_files"], row["trained_files"])
        # One picture is enough: the others have the same bytes.
        first = _member(workspace, roots, album, row["content_hash"], files)
        rest = [Member(**file) for file in files[1:]]
        found.append(Group(row["n"], row["leaks"], [first, *rest], row["n"] - len(files)))
    return Copies(counts["number"], counts["surplus"], counts["leaking"], found)


def _member(
    workspace: Workspace,
    roots: dict[str, Path],
    album: Album,
    content_hash: str,
    files: list[dict[str, str]],
) -> Member:
    """The first of `files`, with a thumbnail of the bytes that they all hold."""
    uri = problem = None
    try:
        data = read_file(roots, [(file["dataset"], file["path"]) for file in files], content_hash)
        size = query(
            "SELECT width, height FROM images WHERE content_hash = $1 AND width > 0 LIMIT 1",
            content_hash,
            images=workspace.images.source(),
        ).to_pylist()
        shape = (size[0]["width"], size[0]["height"]) if size else (1, 1)
        background = workspace.config.pixels.alpha_background
        uri = album.add(whole_image(data, fitted(shape, _THUMBNAIL), background))
    except PipeError as error:
        problem = str(error)
    except MemoryError:
        problem = "too little memory to decode it"
    return Member(**files[0], uri=uri, problem=problem)


def _chosen(sources: dict[str, Any], limit: int, seed: int) -> list[dict[str, Any]]:
    """`content_hash`, `evaluated_files` and `trained_files` of the images to be compared."""
    if limit == 0:
        return []
    found: list[dict[str, Any]] = query(
        f"""
        WITH {_USED}, turns AS (
            SELECT content_hash, bool_or(evaluated) AS evaluated, md5(content_hash || $2) AS turn
            FROM used GROUP BY content_hash
        ), ranked AS (
            SELECT *, row_number() OVER (PARTITION BY evaluated ORDER BY turn) AS rank FROM turns
        ), chosen AS (
            -- Without the trained ones there is no leak to be found.
            SELECT content_hash, turn, CASE WHEN NOT evaluated THEN 1
                                            WHEN rank <= $3 // 2 THEN 0 ELSE 2 END AS class
            FROM ranked ORDER BY class, turn LIMIT $3
        )
        SELECT content_hash, {_SIDES}
        FROM used JOIN chosen USING (content_hash) GROUP BY content_hash
        ORDER BY any_value(class), any_value(turn)
        """,
        _SHOWN,
        str(seed),
        limit,
        **sources,
    ).to_pylist()
    return found


@dataclass(frozen=True)
class Looks:
    """What images look like: `hashes` `[N]`, `colours` uint8 `[N, 16, 16, 3]`; and the rows of
    `_chosen` that they are of."""

    hashes: Hashes
    colours: npt.NDArray[np.uint8]
    known: list[dict[str, Any]]


def look(picture: Image.Image) -> tuple[int, npt.NDArray[np.uint8]]:
    """The hash of an RGB picture, and its colours: uint8 `[16, 16, 3]`."""
    small = picture.resize((_COLOURS, _COLOURS), Image.Resampling.BOX)
    return perceptual_hash(grey(picture)), np.asarray(small, np.uint8)


def _looks(
    workspace: Workspace, progress: Progress, roots: dict[str, Path], chosen: list[dict[str, Any]]
) -> Looks:
    """The looks of those of `chosen` that can be read."""
    background = workspace.config.pixels.alpha_background

    def one(row: dict[str, Any]) -> tuple[int, npt.NDArray[np.uint8]] | None:
        try:
            files = [*row["evaluated_files"], *row["trained_files"]]
            names = [(file["dataset"], file["path"]) for file in files]
            data = read_file(roots, names, row["content_hash"])
            return look(whole_image(data, (2 * SIDE, 2 * SIDE), background))
        except (PipeError, MemoryError):
            return None

    hashes, colours, known = [], [], []
    with (
        progress.task("inspect: comparing images", len(chosen)) as advance,
        ThreadPoolExecutor(usable_cores(), thread_name_prefix="hash") as pool,
    ):
        waiting = iter(chosen)
        while part := list(islice(waiting, _AHEAD)):
            for row, found in zip(part, pool.map(one, part), strict=True):
                if found is not None:
                    hashes.append(found[0])
                    colours.append(found[1])
                    known.append(row)
            advance(len(part))
    shape = (-1, _COLOURS, _COLOURS, 3)
    return Looks(np.array(hashes, np.uint64), np.array(colours, np.uint8).reshape(shape), known)


def grouped(hashes: Hashes, colours: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """The group of each image, named by one of its members: two images are in one group where they
    are alike, or both like a third. The arguments are those of `Looks`.

    Alike are images whose hashes differ in at most `DISTANCE` bits, and whose colours differ by at
    most `MOST_DIFFERENCE`.
    """
    flat = colours.reshape(len(hashes), 3 * _COLOURS**2)
    limit = MOST_DIFFERENCE**2 * flat.shape[1]
    names = np.arange(len(hashes))

    def join(some: npt.NDArray[np.int64], others: npt.NDArray[np.int64]) -> None:
        for block in _blocks(some):
            for beside in _blocks(others):
                # So many equal images cost little more than few.
                name = names[block[0]]
                if (names[block] == name).all() and (names[beside] == name).all():
                    continue
                alike = _apart(flat, block, beside) <= limit
                for one, near in zip(block.tolist(), alike, strict=True):
                    strange = names[beside[near]]
                    for name in np.unique(strange[strange != names[one]]):
                        names[names == name] = names[one]

    values, place = np.unique(hashes, return_inverse=True)
    order = np.argsort(place, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(place))[:-1]) if len(values) else []
    for items in members:
        if len(items) > 1:
            join(items, items)
    for first, second in zip(*near_pairs(values, DISTANCE), strict=True):
        join(members[first], members[second])
    return names


def _blocks(places: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    return [places[start : start + _BLOCK] for start in range(0, len(places), _BLOCK)]


def _apart(
    flat: npt.NDArray[np.uint8], some: npt.NDArray[np.int64], others: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """The sums of squared differences `[len(some), len(others)]` between rows of `flat`, exact."""
    # As float64 all of them would take eight times the memory.
    one, other = (flat[places].astype(np.float64) for places in (some, others))
    squares = (one**2).sum(axis=1)[:, None] + (other**2).sum(axis=1)
    return np.asarray(squares - 2 * one @ other.T)


def _near(
    workspace: Workspace,
    roots: dict[str, Path],
    album: Album,
    looks: Looks,
) -> Copies:
    known, names = looks.known, grouped(looks.hashes, looks.colours)
    members: dict[int, list[int]] = {}
    for place, name in enumerate(names.tolist()):
        members.setdefault(name, []).append(place)
    several = [places for places in members.values() if len(places) > 1]
    leaking: set[int] = set()
    for places in several:
        if any(known[place]["trained_files"] for place in places):
            leaking |= {place for place in places if known[place]["evaluated_files"]}
    several.sort(key=lambda places: (leaking.isdisjoint(places), -len(places), places[0]))
    found = []
    for places in several[:MOST_GROUPS]:
        # The evaluated ones first: they are what to take away.
        evaluated = [place for place in places if known[place]["evaluated_files"]]
        trained = [place for place in places if not known[place]["evaluated_files"]]
        shown = []
        for place in both_sides(evaluated, trained):
            row = known[place]
            files = [*row["evaluated_files"], *row["trained_files"]]
            shown.append(_member(workspace, roots, album, row["content_hash"], files))
        also = [known[place]["trained_files"] for place in evaluated]
        if not trained and any(also):
            # All that are trained on are evaluated on as well: name one where it is trained on.
            shown.append(Member(**next(files[0] for files in also if files)))
        leaks = not leaking.isdisjoint(places)
        found.append(Group(len(places), leaks, shown, len(places) - min(len(places), _SHOWN)))
    surplus = sum(len(places) - 1 for places in several)
    return Copies(len(several), surplus, len(leaking), found)
