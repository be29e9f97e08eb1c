"""Which latents and loss masks are wanted, and what the log holds of them. Imports no torch.

A million latents are planned by their keys alone; where an image lies and how it is cropped is
looked up only for those that there is something to do about, or to say.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from manifests.query import Source, query
from manifests.schema import LATENTS
from manifests.views import current_latents
from omnigen_pipe.latents.shards import MASKS_KEY, shard_paths
from omnigen_pipe.workspace import Workspace

#: The columns of a known latent that `with_status` reads.
STATUS_COLUMNS = ("pixels_key", "status", "reason")


def wanted_latents(samples: pa.Table | Source) -> pa.Table:
    """One row per distinct pixels_key of the usable samples, with `bucket` and `content_hash`.

    Ordered by bucket and pixels_key.
    """
    return query(
        """
        SELECT DISTINCT bucket, pixels_key, content_hash FROM samples WHERE status = 'ok'
        ORDER BY bucket, pixels_key
        """,
        samples=samples,
    )


def known_latents(
    workspace: Workspace, vae_key: str, columns: Sequence[str] = LATENTS.schema.names
) -> pa.Table:
    """The rows of the latents log that count for the VAE `vae_key`.

    Raises `ShardError` where the log names a shard outside the workspace's `latents/`.
    """
    return current_latents(
        workspace.latents.source(), workspace.root, vae_key, columns, shard_paths(workspace.root)
    )


def wanted_masks(samples: pa.Table | Source) -> pa.Table:
    """One row per distinct mask_key of the usable samples: as `pixels_key`, with `bucket`,
    `content_hash` (of the mask's file) and `mask_key`. Ordered by bucket and key.
    """
    return query(
        """
        SELECT DISTINCT bucket, mask_key AS pixels_key, mask_hash AS content_hash, mask_key
        FROM samples WHERE status = 'ok' AND mask_key IS NOT NULL ORDER BY bucket, mask_key
        """,
        samples=samples,
    )


def known_masks(workspace: Workspace, wanted: pa.Table) -> pa.Table:
    """What the log holds of masks: `STATUS_COLUMNS`. Not looked at where none are `wanted`."""
    if not wanted.num_rows:
        return LATENTS.schema.empty_table().select(STATUS_COLUMNS)
    return known_latents(workspace, MASKS_KEY, STATUS_COLUMNS)


def with_status(wanted: pa.Table, known: pa.Table) -> pa.Table:
    """`wanted` with the `status` and `reason` of its `known` latent; null where it is missing."""
    return query(
        """
        SELECT wanted.*, status, reason FROM wanted LEFT JOIN known USING (pixels_key)
        ORDER BY bucket, pixels_key
        """,
        wanted=wanted,
        known=known.select(STATUS_COLUMNS),
    )


def with_files(latents: pa.Table, samples: pa.Table | Source) -> pa.Table:
    """Rows of `wanted_latents` with their geometry and all `files` that hold it.

    The geometry is as in the samples; `files` are structs of `dataset` and `path`, in order. The
    rows of one image lie together, and so do the images that are wanted in the same buckets, and
    those that share their smallest one.
    """
    return query(
        """
        WITH found AS (
            SELECT pixels_key, resize_width, resize_height, crop_left, crop_top,
                   list_sort(list(DISTINCT struct_pack(dataset, path))) AS files
            FROM samples SEMI JOIN latents USING (pixels_key)
            WHERE samples.status = 'ok' GROUP BY ALL
        ), images AS (
            SELECT content_hash, list_sort(list(DISTINCT struct_pack(
                area := split_part(bucket, 'x', 1)::INTEGER * split_part(bucket, 'x', 2)::INTEGER,
                bucket
            ))) AS buckets
            FROM latents GROUP BY content_hash
        )
        SELECT latents.*, found.* EXCLUDE (pixels_key)
        FROM latents JOIN found USING (pixels_key) JOIN images USING (content_hash)
        ORDER BY buckets, content_hash, bucket, pixels_key
        """,
        latents=latents,
        samples=samples,
    )
