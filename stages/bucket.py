"""bucket: give every image its size, crop and bucket. Reads images.parquet, writes samples.parquet.

All samples are made anew each time, which takes seconds for a million images; the snapshot is
written only when they, or what they were made from, differ from what it holds. No file is opened
but masks that it has not seen in this geometry: whether one is empty, only its pixels say.
"""

from __future__ import annotations

import json
from collections import Counter

from manifests.errors import PipeError, UsageError
from manifests.query import Source, query
from omnigen_pipe.config import Config
from omnigen_pipe.images.buckets import (
    as_table,
    mean_cropped_away,
    small_buckets,
    tally,
    unused_options,
)
from omnigen_pipe.images.catalogue import check_discovered
from omnigen_pipe.images.samples import (
    causes_of_absence,
    changed_since_bucket,
    images_hash,
    make_samples,
    samples_fingerprint,
    samples_settings,
)
from omnigen_pipe.images.weighing import Judge, known_verdicts
from omnigen_pipe.progress import Progress
from omnigen_pipe.settings import as_text
from omnigen_pipe.summary import Summary
from omnigen_pipe.workspace import Workspace

#: So many causes are named in the summary; all reasons stand in samples.parquet.
_NAMED_CAUSES = 20


def run(workspace: Workspace, progress: Progress) -> Summary:
    """Publish the samples of today's images and configuration.

    Raises `PipeError` where discover has to run first, `UsageError` where no dataset is enabled.
    """
    config = workspace.config
    if not config.datasets:
        raise UsageError(
            f"{workspace.root} has no [[dataset]] that is not disabled. Add one to its "
            "omnigen-pipe.toml."
        )
    if not workspace.images.exists():
        raise PipeError(f"There is no {workspace.images.path}: run `omnigen-pipe discover` first.")

    check_discovered(workspace.images, config.datasets)
    progress.note("bucket: reading images.parquet")
    images = workspace.images.source()
    changes = changed_since_bucket(workspace) if workspace.samples.exists() else []
    judge = Judge(workspace, known_verdicts(workspace))
    changed = workspace.samples.replace(
        make_samples(images, config, judge=judge),
        # Taken first, like the fingerprint: were images replaced meanwhile, the samples would pass
        # for stale ones.
        {"changes": json.dumps(changes), "images_blake3": images_hash(workspace)},
        fingerprint=samples_fingerprint(images, config),
        settings=as_text(samples_settings(config)),
    )

    samples = workspace.samples.source()
    buckets = tally(samples)
    statuses = _images_per_status(samples)
    summary = Summary(
        "bucket",
        changed,
        counts={
            "images": sum(statuses.values()),
            "samples": sum(b["samples"] for b in buckets),
            "buckets": len({b["bucket"] for b in buckets}),
            "filtered": statuses["filtered"],
            "rejected": statuses["rejected"],
        },
        left_out=_left_out(samples, config),
        notes=[
            *_empty_datasets(samples, workspace),
            *unused_options(config),
            *small_buckets(samples, config),
        ],
        details={"buckets": buckets, "cropped_away": mean_cropped_away(buckets)},
    )
    if any(dataset.mask for dataset in config.datasets):
        summary.counts["masks"] = _masked(samples)
        summary.counts["masks opened"] = judge.opened
    if buckets:
        summary.tables.append(as_table(buckets))
    else:
        summary.notes.append("No image is left to train on.")
    return summary


def _masked(samples: Source) -> int:
    """How many usable samples have a loss mask."""
    rows = query(
        "SELECT count(*) AS n FROM samples WHERE status = 'ok' AND mask_key IS NOT NULL",
        samples=samples,
    )
    return int(rows["n"][0].as_py())


def _images_per_status(samples: Source) -> Counter[str]:
    """How many images, not crops, have each status."""
    rows = query(
        "SELECT status, count(*) AS n FROM samples WHERE crop_index = 0 GROUP BY status",
        samples=samples,
    )
    return Counter({row["status"]: row["n"] for row in rows.to_pylist()})


def _left_out(samples: Source, config: Config) -> dict[str, int]:
    """How many images of each dataset were left out for each cause; rare causes as one."""
    causes = causes_of_absence(samples, config)
    named = {f"{dataset}: {cause}": number for dataset, cause, number in causes[:_NAMED_CAUSES]}
    rest = sum(number for _, _, number in causes[_NAMED_CAUSES:])
    return named | ({"other reasons, see samples.parquet": rest} if rest else {})


def _empty_datasets(samples: Source, workspace: Workspace) -> list[str]:
    """A sentence for each configured dataset that images.parquet knows nothing of."""
    known = query("SELECT DISTINCT dataset FROM samples", samples=samples)["dataset"].to_pylist()
    return [
        f"images.parquet has no image of dataset `{dataset.id}`: check its instance_data_dir "
        f"({dataset.instance_data_dir})."
        for dataset in workspace.config.datasets
        if dataset.id not in known
    ]
