"""The frozen base model spread over several processes (FSDP2), for cards that cannot hold it.

Each block's weights are gathered when it runs, and let go afterwards. Nothing of the adapter is
sharded: it is small, and its gradients are summed by the loop. Gives up sharding of quantised
weights: those fit one card.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch


def shard(transformer: Any, device: torch.device) -> Any:
    """Spread the frozen `transformer` over all processes in place; returns it.

    It may lie on the CPU; its shard is moved to `device`. Needs connected processes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # It returns a view; nobody here changes that in place, which is what the warning is about.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in transformer.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(transformer, mesh=mesh)
    return transformer.to(device)
