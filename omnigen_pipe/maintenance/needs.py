"""What is needed: by the configuration as it is now, and by every run in the workspace."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from manifests.query import Source, query
from omnigen_pipe.latents.shards import MASKS_KEY
from omnigen_pipe.runs import frozen
from omnigen_pipe.workspace import Workspace


def needed_latents(workspace: Workspace, samples: pa.Table | Source, vae_key: str) -> pa.Table:
    """`pixels_key` and `vae_key` of every latent and mask that is needed, each once, in order.

    That is what `samples` want of the VAE `vae_key`, and what the runs have frozen. Raises
    `ManifestError` for a run whose frozen samples are damaged.
    """
    wanted = query(
        """
        SELECT DISTINCT pixels_key, $1::VARCHAR AS vae_key FROM samples WHERE status = 'ok'
        UNION ALL
        SELECT DISTINCT mask_key, $2::VARCHAR FROM samples
        WHERE status = 'ok' AND mask_key IS NOT NULL
        """,
        vae_key,
        MASKS_KEY,
        samples=samples,
    )
    return query(
        "SELECT DISTINCT pixels_key, vae_key FROM needs ORDER BY ALL",
        needs=pa.concat_tables([wanted, needed_by_runs(workspace)]),
    )


def needed_by_runs(workspace: Workspace) -> pa.Table:
    """`pixels_key` and `vae_key` of the latents and masks that runs have frozen."""
    names = pa.schema([("pixels_key", pa.string()), ("vae_key", pa.string())])
    runs = [_of_run(path) for path in sorted(workspace.root.glob("runs/*/samples.arrow"))]
    return pa.concat_tables([names.empty_table(), *runs])


def _of_run(path: Path) -> pa.Table:
    """The latents and masks that the run with the frozen samples `path` needs."""
    table, metadata = frozen.read(path)
    vae = pa.repeat(pa.scalar(metadata["vae_key"], pa.string()), table.num_rows)
    latents = table.select(["pixels_key"]).append_column("vae_key", vae)
    masks = frozen.mask_keys(table).drop_null()
    of_masks = pa.repeat(pa.scalar(MASKS_KEY, pa.string()), len(masks))
    return pa.concat_tables([latents, pa.table({"pixels_key": masks, "vae_key": of_masks})])
