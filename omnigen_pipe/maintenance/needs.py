"""What is needed: by the configuration as it is now, and by every run in the workspace."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from manifests.query import query
from omnigen_pipe.images.samples import current_samples
from omnigen_pipe.latents.vae import vae_key
from omnigen_pipe.model_files import model_part
from omnigen_pipe.training import frozen
from omnigen_pipe.workspace import Workspace


def needed_latents(workspace: Workspace) -> pa.Table:
    """`pixels_key` and `vae_key` of every latent that is needed, each once, in order.

    Raises `PipeError` where samples.parquet is missing or stale, since then nobody knows what
    the configuration wants, and `ManifestError` for a run whose frozen samples are damaged.
    """
    wanted = query(
        "SELECT DISTINCT pixels_key, ?::VARCHAR AS vae_key FROM samples WHERE status = 'ok'",
        vae_key(workspace, model_part(workspace, "vae")),
        samples=current_samples(workspace),
    )
    runs = [_of_run(path) for path in sorted(workspace.root.glob("runs/*/samples.arrow"))]
    return query(
        "SELECT DISTINCT pixels_key, vae_key FROM needs ORDER BY ALL",
        needs=pa.concat_tables([wanted, *runs]),
    )


def _of_run(path: Path) -> pa.Table:
    """The latents that the run with the frozen samples `path` needs."""
    table, metadata = frozen.read(path)
    vae = pa.array([metadata["vae_key"]] * table.num_rows, pa.string())
    return table.select(["pixels_key"]).append_column("vae_key", vae)
