"""Packing: latents move from shards that are mostly unused, or small, into new ones.

Every array is checked against the log on the way, and keeps its bytes: what was frozen into a
run stays what it was. The old shards stay as they are.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import pyarrow as pa

from manifests.query import fingerprint
from omnigen_pipe.latents.checking import check_shard
from omnigen_pipe.latents.shards import (
    FACTS_SUFFIX,
    ShardError,
    ShardWriter,
    read_latent,
    shard_path,
)
from omnigen_pipe.settings import as_text
from omnigen_pipe.workspace import Workspace


@dataclass
class Packed:
    """What became of the latents: the `faults` of shards that do not lie in new ones whole."""

    faults: dict[str, str] = field(default_factory=dict)
    bytes_written: int = 0


def pack(
    rows: pa.Table,
    workspace: Workspace,
    inputs: dict[str, dict[str, Any]],
    marked: set[str],
    advance: Callable[[int], object],
) -> Packed:
    """Write the latents of `rows` of the log, all `ok`, once more, into as few shards as fit.

    `inputs` says what each vae_key is made of; the shards in `marked` are known to hold damage
    elsewhere. A shard with a latent that cannot be read right
    is left out with its fault. Raises `OSError` where new shards cannot be written; the old
    ones lie where they were.
    """
    done = Packed()
    order = [(name, "ascending") for name in ("vae_key", "bucket", "shard", "offset")]
    entries = rows.sort_by(order).to_pylist()
    for vae_key, of_vae in groupby(entries, lambda row: str(row["vae_key"])):
        moving = list(of_vae)
        keys = pa.table({"pixels_key": [row["pixels_key"] for row in moving]})
        metadata = {
            "fingerprint": fingerprint(keys, ["pixels_key"]),
            "inputs": as_text({vae_key: inputs[vae_key]} if vae_key in inputs else {}),
        }
        # A clock that stands still: shards close by size alone, since all this lies elsewhere too.
        with ShardWriter(workspace, vae_key, metadata, clock=lambda: 0.0) as writer:
            for shard, of_shard in groupby(moving, lambda row: str(row["shard"])):
                in_shard = list(of_shard)
                writer.close_all_but({in_shard[0]["bucket"]})
                try:
                    _copy(shard, in_shard, shard in marked, workspace, writer, advance)
                except (ShardError, tarfile.TarError, KeyError, ValueError, OSError) as error:
                    done.faults[shard] = str(error)
        done.bytes_written += writer.bytes_written
    return done


def _copy(
    shard: str,
    rows: list[dict[str, Any]],
    marked: bool,
    workspace: Workspace,
    writer: ShardWriter,
    advance: Callable[[int], object],
) -> None:
    """Add the latents of `rows`, all of `shard`, to `writer`."""
    path = shard_path(workspace.root, shard)
    for problem in check_shard(path, rows, marked=marked).problems:
        if problem:
            raise ShardError(f"{path}: {problem}.")
    with tarfile.open(path, "r:") as tar:
        for row in rows:
            member = tar.extractfile(row["pixels_key"] + FACTS_SUFFIX)
            if member is None:
                raise KeyError(f"{row['pixels_key']}{FACTS_SUFFIX} is no file in {path}")
            facts = json.loads(member.read())
            if (facts["pixels_key"], facts["vae_key"]) != (row["pixels_key"], row["vae_key"]):
                raise ValueError(f"{path} says of {row['pixels_key']} that it is another latent")
            latent = read_latent(
                path,
                row["offset"],
                row["nbytes"],
                row["checksum"],
                tuple(row["shape"]),
                row["dtype"],
            )
            writer.add(row["pixels_key"], row["bucket"], latent, facts)
            advance(row["nbytes"])
