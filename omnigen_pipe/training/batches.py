"""From a micro-batch of the order to the tensors of one forward pass."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from omnigen_pipe.config import TrainConfig
from omnigen_pipe.latents.shards import read_latent, shard_path
from omnigen_pipe.model import flow
from omnigen_pipe.training.draws import Moment
from omnigen_pipe.training.frozen import FrozenSamples, Locations
from omnigen_pipe.training.order import MicroBatch

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


@dataclass(frozen=True)
class BatchReader:
    """Assembles micro-batches from frozen samples and the shards that hold their latents."""

    workspace: Path
    frozen: FrozenSamples
    locations: Locations
    config: TrainConfig

    def read(self, micro: MicroBatch, epoch: int) -> Batch:
        """The tensors of `micro` in `epoch`, with every sample's own draws."""
        rows = self.frozen.table.take(micro.samples).to_pylist()
        dropout = self.frozen.dropout_prompt()
        moments, noise, posterior, normals, prompts = [], [], [], [], []
        for row, index, repeat in zip(rows, micro.samples, micro.repeats, strict=True):
            draw = Moment(self.config.seed, row["sample_id"], epoch, int(repeat))
            latent = torch.from_numpy(
                read_latent(
                    shard_path(self.workspace, self.locations.shards[index]),
                    int(self.locations.offsets[index]),
                    row["nbytes"],
                    row["checksum"],
                    tuple(row["shape"]),
                    row["dtype"],
                )
            )
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
