"""Histograms of the images' shapes: buckets, aspects, sizes, and what cropping takes away."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from manifests.query import query
from omnigen_pipe.images.buckets import mean_cropped_away, tally
from omnigen_pipe.report.left_out import PICTURES
from omnigen_pipe.workspace import Workspace

#: So many buckets have a bar of their own, the largest; the rest is one bar.
MOST_BUCKETS = 40

#: Aspects are counted in steps of a quarter of a doubling, up to 4:1 and 1:4.
_ASPECT_STEPS, _ASPECT_LIMIT = 4, 8
#: Sizes are counted by powers of two of a megapixel, from 1/64 to 64.
_SIZE_LIMIT = 6
#: Shares that are cropped away, in percent: the bars' lower ends.
_CROPPED = (0, 1, 2, 5, 10, 15, 20, 30, 40, 50)


@dataclass(frozen=True)
class Bar:
    """One bar of a histogram; `parts` are counts by split where the bar is divided."""

    label: str
    count: int
    parts: dict[str, int]
    note: str = ""


@dataclass(frozen=True)
class Shapes:
    """The histograms; `buckets` counts all buckets, also those without a bar of their own."""

    bars: list[Bar]
    buckets: int
    aspects: list[Bar]
    sizes: list[Bar]
    cropped: list[Bar]
    cropped_away: float


def shapes(workspace: Workspace) -> Shapes:
    """The histograms of a workspace; those of buckets are empty before `bucket` has run."""
    found = tally(workspace.samples.source())
    bars = _bucket_bars(found)
    return Shapes(
        bars[:MOST_BUCKETS] + _rest(bars[MOST_BUCKETS:]),
        len(bars),
        _aspects(workspace),
        _sizes(workspace),
        _cropped(workspace),
        mean_cropped_away(found),
    )


def _bucket_bars(found: list[dict[str, Any]]) -> list[Bar]:
    by_bucket: dict[str, dict[str, int]] = {}
    most: dict[str, float] = {}
    for row in found:
        by_bucket.setdefault(row["bucket"], {})[row["split"]] = row["samples"]
        most[row["bucket"]] = max(most.get(row["bucket"], 0.0), row["cropped_away_most"])
    return [
        Bar(bucket, sum(parts.values()), parts, f"at most {most[bucket]:.0f} % cropped away")
        for bucket, parts in sorted(
            by_bucket.items(), key=lambda item: (-sum(item[1].values()), item[0])
        )
    ]


def _rest(bars: list[Bar]) -> list[Bar]:
    if not bars:
        return []
    parts: dict[str, int] = {}
    for bar in bars:
        for split, count in bar.parts.items():
            parts[split] = parts.get(split, 0) + count
    return [Bar(f"{len(bars):,} other buckets", sum(parts.values()), parts)]


def _aspects(workspace: Workspace) -> list[Bar]:
    """Width by height of all images whose size is known, used or not."""
    counts = _counted(
        workspace,
        f"round({_ASPECT_STEPS} * log2(width / height))",
        "width > 0 AND height > 0",
        (-_ASPECT_LIMIT, _ASPECT_LIMIT),
    )
    return [Bar(_aspect_label(place), count, {}) for place, count in counts]


def _aspect_label(place: int) -> str:
    ratio = 2 ** (abs(place) / _ASPECT_STEPS)
    text = f"{ratio:.2f}".rstrip("0").rstrip(".")
    beyond = " and more" if abs(place) == _ASPECT_LIMIT else ""
    return "1:1" if place == 0 else (f"{text}:1" if place > 0 else f"1:{text}") + beyond


def _sizes(workspace: Workspace) -> list[Bar]:
    counts = _counted(
        workspace,
        "floor(log2(width::BIGINT * height / 1e6))",
        "width > 0 AND height > 0",
        (-_SIZE_LIMIT - 1, _SIZE_LIMIT),
    )
    return [Bar(_size_label(place), count, {}) for place, count in counts]


def _size_label(place: int) -> str:
    if place < -_SIZE_LIMIT:
        return f"under {_megapixels(-_SIZE_LIMIT)} MP"
    if place == _SIZE_LIMIT:
        return f"{_megapixels(place)} MP and more"
    return f"{_megapixels(place)}–{_megapixels(place + 1)} MP"


def _megapixels(power: int) -> str:
    return f"1/{2**-power}" if power < 0 else str(2**power)


def _counted(
    workspace: Workspace, place: str, where: str, limits: tuple[int, int]
) -> list[tuple[int, int]]:
    """Pictures per `place`, held within `limits`; without the empty places at both ends."""
    rows = query(
        f"""
        WITH {PICTURES}
        SELECT greatest($1, least($2, {place}))::INTEGER AS place, count(*) AS n
        FROM pictures WHERE {where} GROUP BY place ORDER BY place
        """,
        *limits,
        images=workspace.images.source(),
        samples=workspace.samples.source(),
    ).to_pylist()
    counts = {row["place"]: row["n"] for row in rows}
    return (
        [(place, counts.get(place, 0)) for place in range(min(counts), max(counts) + 1)]
        if counts
        else []
    )


def _cropped(workspace: Workspace) -> list[Bar]:
    """Samples by the share of the resized image that lies outside of the bucket."""
    place = " + ".join(f"(share >= {low})::INTEGER" for low in _CROPPED[1:])
    rows = query(
        f"""
        SELECT {place} AS place, count(*) AS n FROM (
            SELECT 100 - 100.0 * split_part(bucket, 'x', 1)::BIGINT
                   * split_part(bucket, 'x', 2)::BIGINT / (resize_width::BIGINT * resize_height)
                   AS share
            FROM samples WHERE status = 'ok'
        ) GROUP BY place
        """,
        samples=workspace.samples.source(),
    ).to_pylist()
    counts = {row["place"]: row["n"] for row in rows}
    if not counts:
        return []
    ends = [*_CROPPED[1:], math.inf]
    labels = [
        f"{low}–{high} %" if math.isfinite(high) else f"{low} % and more"
        for low, high in zip(_CROPPED, ends, strict=True)
    ]
    return [Bar(label, counts.get(n, 0), {}) for n, label in enumerate(labels)]
