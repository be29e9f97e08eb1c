"""Which latents are wanted, and what the log holds of them. Imports no torch."""

from __future__ import annotations

import pyarrow as pa

from manifests.query import Source, query
from manifests.views import current_latents
from omnigen_pipe.latents.shards import shard_path
from omnigen_pipe.workspace import Workspace


def wanted_latents(samples: pa.Table | Source) -> pa.Table:
    """One row per distinct pixels_key of the usable samples, with all `files` that hold it.

    Ordered by bucket and pixels_key. The other columns are `content_hash`, `bucket` and the
    geometry, as in the samples.
    """
    return query(
        """
        SELECT pixels_key, content_hash, bucket, resize_width, resize_height, crop_left, crop_top,
               list_sort(list(DISTINCT struct_pack(dataset, path))) AS files
        FROM samples WHERE status = 'ok' GROUP BY ALL ORDER BY bucket, pixels_key
        """,
        samples=samples,
    )


def known_latents(workspace: Workspace, vae_key: str) -> pa.Table:
    """The rows of the latents log that count for the VAE `vae_key`.

    Raises `ShardError` where the log names a shard outside the workspace's `latents/`.
    """
    named = query(
        "SELECT DISTINCT shard FROM latents WHERE vae_key = ? AND shard IS NOT NULL",
        vae_key,
        latents=workspace.latents.source(),
    )
    for shard in named["shard"].to_pylist():
        shard_path(workspace.root, shard)
    return current_latents(workspace.latents.source(), workspace.root, vae_key)


def with_status(wanted: pa.Table, known: pa.Table) -> pa.Table:
    """`wanted` with the `status` and `reason` of its `known` latent; null where it is missing."""
    return query(
        """
        SELECT wanted.*, status, reason FROM wanted LEFT JOIN known USING (pixels_key)
        ORDER BY wanted.bucket, pixels_key
        """,
        wanted=wanted,
        known=known.select(["pixels_key", "status", "reason"]),
    )
