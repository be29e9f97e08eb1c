"""Every image once: whether it is used, and if not, for which cause.

An image is used where at least one of its crops is. What the images manifest holds and the
samples manifest does not has a cause of its own, so that the totals always add up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from manifests.query import query
from omnigen_pipe.workspace import Workspace

#: One row per image: dataset, path, split, content_hash, width, height, state, reason, cause.
#: A cause is a reason without what is peculiar to a single image.
PICTURES = """
    judged AS (
        SELECT dataset, path, any_value(split) AS split, bool_or(status = 'ok') AS used,
               arg_min(status, crop_index) AS status, arg_min(reason, crop_index) AS reason
        FROM samples GROUP BY dataset, path
    ), stated AS (
        SELECT i.dataset, i.path, j.split, i.content_hash, i.width, i.height,
               CASE WHEN j.used THEN 'used'
                    WHEN j.path IS NOT NULL THEN j.status
                    WHEN i.status = 'rejected' THEN 'rejected'
                    ELSE 'waiting' END AS state,
               CASE WHEN j.used THEN NULL
                    WHEN j.path IS NOT NULL THEN coalesce(j.reason, 'no reason given')
                    WHEN i.status = 'rejected' THEN coalesce(i.reason, 'no reason given')
                    ELSE 'not judged yet: run `omnigen-pipe bucket`' END AS reason
        FROM images AS i LEFT JOIN judged AS j USING (dataset, path)
    ), pictures AS (
        SELECT *, split_part(
            regexp_replace(reason, ' from .* for bucket [0-9]+x[0-9]+', ''), ': ', 1
        ) AS cause FROM stated
    )
"""

#: So many causes are named; the rest is counted as one.
MOST_CAUSES = 40
#: So many images are named for each cause.
_EXAMPLES = 5


@dataclass(frozen=True)
class LeftOut:
    """`datasets` has a row per dataset and split with `images`, `used`, `filtered`, `rejected` and
    `waiting`; `causes` a row per dataset and cause with `state`, `images` and `examples` (path,
    width, height, reason). `others` are the images of causes that are not named, and `gone` the
    rows of samples whose image the last walk did not find."""

    datasets: list[dict[str, Any]]
    causes: list[dict[str, Any]]
    others: int
    gone: int

    @property
    def images(self) -> int:
        """All images, each counted once."""
        return sum(row["images"] for row in self.datasets)

    def total(self, state: str) -> int:
        """The images in one state."""
        return sum(row[state] for row in self.datasets)


def left_out(workspace: Workspace) -> LeftOut:
    """Account for every image of the workspace."""
    sources = {"images": workspace.images.source(), "samples": workspace.samples.source()}
    datasets = query(
        f"""
        WITH {PICTURES}
        SELECT dataset, split, count(*) AS images,
               count(*) FILTER (state = 'used') AS used,
               count(*) FILTER (state = 'filtered') AS filtered,
               count(*) FILTER (state = 'rejected') AS rejected,
               count(*) FILTER (state = 'waiting') AS waiting
        FROM pictures GROUP BY dataset, split ORDER BY dataset, split
        """,
        **sources,
    ).to_pylist()
    causes = query(
        f"""
        WITH {PICTURES}
        SELECT dataset, state, cause, count(*) AS images, min(
            struct_pack(path := path, width := width, height := height, reason := reason), $1
        ) AS examples
        FROM pictures WHERE state <> 'used' GROUP BY dataset, state, cause
        ORDER BY images DESC, dataset, cause
        """,
        _EXAMPLES,
        **sources,
    )
    gone = query(
        "SELECT count(*) AS n FROM samples ANTI JOIN images USING (dataset, path)", **sources
    )
    return LeftOut(
        datasets,
        causes.slice(0, MOST_CAUSES).to_pylist(),
        sum(causes["images"].slice(MOST_CAUSES).to_pylist()),
        gone["n"][0].as_py(),
    )
