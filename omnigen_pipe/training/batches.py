"""From a micro-batch of the order to the tensors of one forward pass."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from omnigen_pipe.config import TrainConfig
from omnigen_pipe.latents.shards import MissingShardError, read_latent, shard_path
from omnigen_pipe.model import flow
from omnigen_pipe.runs.frozen import FrozenSamples, Locations, locate
from omnigen_pipe.runs.order import MicroBatch
from omnigen_pipe.training.draws import Appearance
from omnigen_pipe.workspace import Workspace

#: Micro-batches that are read ahead of the one being computed.
READ_AHEAD = 4

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the CPU, float32: clean latents x1 and noise x0 `[B, 4, H/8, W/8]`,
    times t `[B]`, token ids per row, and which rows are regularisation data `[B]`."""

    sample_ids: list[str]
    bucket: str
    x1: torch.Tensor
    x0: torch.Tensor
    t: torch.Tensor
    prompts: list[list[int]]
    regularisation: torch.Tensor


@dataclass
class BatchReader:
    """Assembles micro-batches from frozen samples and the shards that hold their latents."""

    workspace: Workspace
    frozen: FrozenSamples
    locations: Locations
    config: TrainConfig

    def read(self, micro: MicroBatch, epoch: int) -> Batch:
        """The tensors of `micro` in `epoch`, with every sample's own draws."""
        rows = self.frozen.table.take(micro.samples).to_pylist()
        dropout = self.frozen.dropout_prompt()
        moments, noise, posterior, normals, prompts = [], [], [], [], []
        for row, index, repeat in zip(rows, micro.samples, micro.repeats, strict=True):
            draw = Appearance(self.config.seed, row["sample_id"], epoch, int(repeat))
            latent = torch.from_numpy(self._latent(row, int(index)))
            shape = (latent.shape[0] // 2, *latent.shape[1:])
            moments.append(latent)
            noise.append(draw.normal("noise", shape))
            if self.config.vae_posterior == "sample":
                posterior.append(draw.normal("posterior", shape))
            normals.append(draw.normal("time", (1,))[0])
            caption = row["prompts"][draw.choice("caption", len(row["prompts"]))]
            dropped = draw.chance("dropout", self.config.caption_dropout_probability)
            prompts.append(dropout if dropped else list(caption))
        return Batch(
            sample_ids=[row["sample_id"] for row in rows],
            bucket=rows[0]["bucket"],
            x1=flow.clean_latents(
                torch.stack(moments),
                torch.stack(posterior) if posterior else None,
                float(self.frozen.metadata["scaling_factor"]),
            ),
            x0=torch.stack(noise),
            t=flow.times(torch.stack(normals)),
            prompts=prompts,
            regularisation=torch.tensor([row["split"] == "regularisation" for row in rows]),
        )

    def _latent(self, row: dict[str, Any], index: int) -> np.ndarray:
        """The moments of one frozen row `[8, H/8, W/8]`; looks again where its shard is gone."""
        try:
            return self._read(row, index)
        except MissingShardError:
            # Maintenance may have moved latents to other shards since the last look.
            self.locations = locate(self.workspace, self.frozen)
            return self._read(row, index)

    def _read(self, row: dict[str, Any], index: int) -> np.ndarray:
        places = self.locations
        return read_latent(
            shard_path(self.workspace.root, places.shards[index]),
            int(places.offsets[index]),
            row["nbytes"],
            int(places.checksums[index]),
            tuple(row["shape"]),
            row["dtype"],
        )


def read_ahead(
    items: Iterable[Item], read: Callable[[Item], Result]
) -> Generator[Result, None, None]:
    """`read` of each item, in order, computed in a thread a few items ahead of use."""
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as pool:
        try:
            for item in items:
                pending.append(pool.submit(read, item))
                if len(pending) > READ_AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
