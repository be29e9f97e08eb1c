"""Buckets: how the samples fall into them, what is cropped away, and which are too small."""

from __future__ import annotations

import math
from typing import Any

import pyarrow as pa
from rich.table import Table

from manifests.query import Source, query
from omnigen_pipe.config import Config, DatasetConfig

#: So many small buckets are explained one by one; the rest is counted.
_EXPLAINED = 5

#: Options that decide nothing with `crop = false`; `target_downsample_size` is one more.
_CROP_OPTIONS = ("crop_aspect", "crop_aspect_buckets", "crop_style", "crop_seed")


def tally(samples: pa.Table | Source) -> list[dict[str, Any]]:
    """One entry per split and bucket of the `ok` samples.

    `samples` counts them, `per_epoch` counts them with their repeats; `cropped_away` is the mean
    share of the resized image that lies outside the bucket, in percent, `cropped_away_most` the
    largest.
    """
    rows = query(
        """
        WITH used AS (
            SELECT *, split_part(bucket, 'x', 1)::INTEGER AS w,
                   split_part(bucket, 'x', 2)::INTEGER AS h
            FROM samples WHERE status = 'ok'
        )
        SELECT split, bucket, count(*) AS samples, sum(repeats::BIGINT + 1)::BIGINT AS per_epoch,
               round(avg(100 - 100 * w * h / (resize_width::BIGINT * resize_height)), 2)
                   AS cropped_away,
               round(max(100 - 100 * w * h / (resize_width::BIGINT * resize_height)), 2)
                   AS cropped_away_most
        FROM used GROUP BY split, bucket, w, h
        ORDER BY array_position(['train', 'regularisation', 'eval'], split), w, h
        """,
        samples=samples,
    )
    found: list[dict[str, Any]] = rows.to_pylist()
    return found


def mean_cropped_away(buckets: list[dict[str, Any]]) -> float:
    """The mean over all samples of what is cropped away, in percent."""
    total = sum(b["samples"] for b in buckets)
    lost = sum(b["samples"] * b["cropped_away"] for b in buckets)
    return round(lost / total, 2) if total else 0.0


def as_table(buckets: list[dict[str, Any]]) -> Table:
    """The tally for a person."""
    table = Table(show_footer=True)
    table.add_column("split", "all")
    table.add_column("bucket")
    table.add_column("samples", f"{sum(b['samples'] for b in buckets):,}", justify="right")
    table.add_column("per epoch", f"{sum(b['per_epoch'] for b in buckets):,}", justify="right")
    table.add_column("cropped away", f"{mean_cropped_away(buckets):.1f} %", justify="right")
    most = max((b["cropped_away_most"] for b in buckets), default=0.0)
    table.add_column("at most", f"{most:.1f} %", justify="right")
    for b in buckets:
        table.add_row(
            b["split"],
            b["bucket"],
            f"{b['samples']:,}",
            f"{b['per_epoch']:,}",
            f"{b['cropped_away']:.1f} %",
            f"{b['cropped_away_most']:.1f} %",
        )
    return table


def small_buckets(samples: pa.Table | Source, config: Config) -> list[str]:
    """Sentences on the trained buckets that have fewer samples an epoch than the batch size.

    Each names the bucket, how many it has, and the settings that mend it. Training and
    regularisation data share a bucket's batches; evaluation data is not trained on.
    """
    batch = config.train.train_batch_size
    rows = query(
        """
        WITH parts AS (
            SELECT bucket, dataset, count(*) AS samples,
                   sum(repeats::BIGINT + 1)::BIGINT AS per_epoch
            FROM samples WHERE status = 'ok' AND split <> 'eval' GROUP BY bucket, dataset
        ), whole AS (
            SELECT *, sum(per_epoch) OVER (PARTITION BY bucket)::BIGINT AS bucket_epoch FROM parts
        )
        SELECT * FROM whole WHERE bucket_epoch < ?
        QUALIFY row_number() OVER (PARTITION BY bucket ORDER BY samples DESC, dataset) = 1
        ORDER BY bucket_epoch, bucket
        """,
        batch,
        samples=samples,
    ).to_pylist()
    by_id = {dataset.id: dataset for dataset in config.datasets}
    notes = []
    for row in rows[:_EXPLAINED]:
        others = row["bucket_epoch"] - row["per_epoch"]
        repeats = math.ceil((batch - others) / row["samples"]) - 1
        dataset = by_id[row["dataset"]]
        remedies = [f"repeats = {repeats} on dataset `{dataset.id}`", "a smaller train_batch_size"]
        if not dataset.crop or dataset.crop_aspect == "preserve":
            remedies.append(
                "a larger aspect_bucket_alignment or lower aspect_bucket_rounding, so that "
                "buckets merge"
            )
        count = row["bucket_epoch"]
        notes.append(
            f"Bucket {row['bucket']} has {count} image{'s' if count != 1 else ''} per epoch, fewer "
            f"than train_batch_size = {batch}: its batches stay short. To mend it, set "
            f"{', or '.join(remedies)}."
        )
    if len(rows) > _EXPLAINED:
        notes.append(
            f"{len(rows) - _EXPLAINED} more buckets have fewer images per epoch than "
            f"train_batch_size = {batch}."
        )
    return notes


def unused_options(config: Config) -> list[str]:
    """A sentence for each dataset that sets options of cropping but does not crop."""
    notes = []
    for dataset in config.datasets:
        unused = _unused(dataset)
        if unused:
            notes.append(
                f"Dataset `{dataset.id}`: {', '.join(unused)} ha{'s' if len(unused) == 1 else 've'}"
                " no effect with crop = false."
            )
    return notes


def _unused(dataset: DatasetConfig) -> list[str]:
    """The options of `dataset`, its own or inherited, that differ from what has no effect."""
    if dataset.crop:
        return []
    names = list(_CROP_OPTIONS)
    # With a maximum it still decides that larger images are kept.
    if not dataset.maximum_image_size:
        names.append("target_downsample_size")
    defaults = type(dataset).model_fields
    return [name for name in names if getattr(dataset, name) != defaults[name].default]
