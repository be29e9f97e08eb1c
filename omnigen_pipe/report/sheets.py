"""Contact sheets: for each bucket some of its images, whole, with the crop box over them."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from manifests.errors import PipeError
from manifests.query import query
from omnigen_pipe.images.mask_files import mask_root
from omnigen_pipe.images.masks import Kind, latent_weights, read_mask
from omnigen_pipe.maintenance.explanation import Keys, explain_samples
from omnigen_pipe.report.page import render
from omnigen_pipe.report.thumbnails import Album, data_uri, fitted, read_file, whole_image
from omnigen_pipe.workspace import Workspace

#: So many buckets have a sheet, those with the most samples.
MOST_SHEETS = 24

#: The longer side of a thumbnail in pixels.
_THUMBNAIL = 224

#: What lies over what a mask leaves out, and how much of it, of 255, where nothing counts.
_RED, _OPACITY = (230, 20, 60), 170


@dataclass(frozen=True)
class Box:
    """A crop as percentages of the whole image's sides, from its left and top."""

    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True)
class Veil:
    """A sample's loss mask: the `data:` URI of a picture that lies over the crop, redder the less
    it counts, and the mean weight, 0 to 1; or why it cannot be shown."""

    uri: str | None = None
    mean: float | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Card:
    """One sample: what `explain_samples` says of it, and its thumbnail with the crop, or why there
    is none. `size` is the thumbnail's, in pixels; `veil` is there where it has a mask."""

    sample: dict[str, Any]
    uri: str | None
    problem: str | None
    size: tuple[int, int]
    box: Box
    veil: Veil | None = None


@dataclass(frozen=True)
class Sheet:
    """The cards of one bucket, which has so many `samples`."""

    bucket: str
    samples: int
    cards: list[Card]


@dataclass(frozen=True)
class Sheets:
    """The sheets of the largest buckets; `others` buckets have none. `refused` cards found no room
    on the page."""

    sheets: list[Sheet]
    others: int
    refused: int

    @property
    def cards(self) -> list[Card]:
        """All cards, those of one bucket together."""
        return [card for sheet in self.sheets for card in sheet.cards]


def draw(
    workspace: Workspace,
    roots: dict[str, Path],
    album: Album,
    samples: int,
    seed: int,
    keys: Keys,
) -> Sheets:
    """`samples` random ones of each bucket, the same for the same `seed`; `keys` say which latents
    and prompts count.

    Where the `album` is full, no more cards are made: every bucket has the same number of them, or
    one less, as far as it has samples.
    """
    buckets = query(
        "SELECT bucket, count(*) AS n FROM samples WHERE status = 'ok' GROUP BY bucket "
        "ORDER BY n DESC, bucket",
        samples=workspace.samples.source(),
    ).to_pylist()
    shown = {row["bucket"]: row["n"] for row in buckets[:MOST_SHEETS]}
    rows = _chosen(workspace, list(shown), samples, seed) if samples else []
    places: dict[str, int] = dict.fromkeys(shown, 0)
    for row in rows:
        row["place"] = places[row["bucket"]]
        places[row["bucket"]] += 1
    order = {bucket: number for number, bucket in enumerate(shown)}
    rows.sort(key=lambda row: (row["place"], order[row["bucket"]]))
    explained = explain_samples(workspace, rows, roots, keys)
    sheets: dict[str, list[Card]] = {bucket: [] for bucket in shown}
    made = 0
    for row, sample in zip(rows, explained, strict=True):
        card = _card(workspace, roots, album, row, sample)
        if card is None:
            break
        sheets[row["bucket"]].append(card)
        made += 1
    return Sheets(
        [Sheet(bucket, count, sheets[bucket]) for bucket, count in shown.items()],
        len(buckets) - len(shown),
        len(rows) - made,
    )


def _chosen(
    workspace: Workspace, buckets: list[str], samples: int, seed: int
) -> list[dict[str, Any]]:
    """Rows of `samples` random samples of each bucket, in random order."""
    rows: list[dict[str, Any]] = query(
        """
        WITH chosen AS (
            SELECT unnest(arg_min(sample_id, md5(sample_id || $1), $2)) AS sample_id
            FROM samples WHERE status = 'ok' AND list_contains($3::VARCHAR[], bucket)
            GROUP BY bucket
        )
        SELECT samples.* FROM samples SEMI JOIN chosen USING (sample_id)
        ORDER BY md5(sample_id || $1)
        """,
        str(seed),
        samples,
        buckets,
        samples=workspace.samples.source(),
    ).to_pylist()
    return rows


def crop_box(row: dict[str, Any]) -> Box:
    """The crop of a used row of the samples manifest, over the whole image."""
    width, height = (int(side) for side in row["bucket"].split("x"))
    across, down = 100 / row["resize_width"], 100 / row["resize_height"]
    return Box(row["crop_left"] * across, row["crop_top"] * down, width * across, height * down)


def _card(
    workspace: Workspace,
    roots: dict[str, Path],
    album: Album,
    row: dict[str, Any],
    sample: dict[str, Any],
) -> Card | None:
    """The card of a sample; None where the album has no room for its picture and its text."""
    size = fitted((row["resize_width"], row["resize_height"]), _THUMBNAIL)
    card = Card(sample, None, None, size, crop_box(row), _veil(workspace, roots, row))
    try:
        data = read_file(roots, [(row["dataset"], row["path"])], row["content_hash"])
        background = workspace.config.pixels.alpha_background
        shown = whole_image(data, size, background)
    except PipeError as error:
        card = replace(card, problem=str(error))
    except MemoryError:
        card = replace(card, problem="too little memory to decode it")
    else:
        # By any address: only its length is not known yet.
        uri = album.add(shown, _weight(replace(card, uri="data:"), row["bucket"]))
        return None if uri is None else replace(card, uri=uri)
    return card if album.take(_weight(card, row["bucket"])) else None


def _veil(workspace: Workspace, roots: dict[str, Path], row: dict[str, Any]) -> Veil | None:
    """The loss mask of a sample as training applies it; None where it has none."""
    if row["mask_key"] is None:
        return None
    path: str = row["path"]
    kind: Kind = "alpha"
    if row["mask_path"] is not None:
        path, kind = row["mask_path"], "greyscale"
        folders = {one.id: mask_root(workspace, one) for one in workspace.config.datasets}
        roots = {name: folder for name, folder in folders.items() if folder is not None}
    width, height = (int(side) for side in row["bucket"].split("x"))
    resize = row["resize_width"], row["resize_height"]
    crop = row["crop_left"], row["crop_top"]
    try:
        data = read_file(roots, [(row["dataset"], path)], row["mask_hash"])
        weights = latent_weights(read_mask(data, kind), (width, height), resize, crop)
    except (PipeError, ValueError) as error:  # the latter of a crop that leaves the image
        return Veil(problem=str(error))
    except MemoryError:
        return Veil(problem="too little memory to decode it")
    opacity = Image.fromarray(np.uint8(np.rint((1 - weights) * _OPACITY)))
    opacity = opacity.resize(fitted(opacity.size, _THUMBNAIL), Image.Resampling.BOX)
    picture = Image.new("RGB", opacity.size, _RED)
    picture.putalpha(opacity)
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return Veil(data_uri("png", file.getvalue()), float(weights.mean(dtype=np.float64)))


def _weight(card: Card, bucket: str) -> int:
    """The bytes of a card in the page: captions may be long, and each letter several bytes."""
    return len(render("card.html.jinja", card=card, bucket=bucket).encode("utf-8"))
