"""The batch that a new workspace begins with: what the GPU that is here can hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

from manifests.errors import PipeError
from omnigen_pipe.device import pick_device
from omnigen_pipe.workspace import Workspace

if TYPE_CHECKING:
    from omnigen_pipe.memory.estimate import Prospect

#: Larger batches are not proposed: the default learning rate is one for small ones.
LARGEST = 8


def proposed_batch(workspace: Workspace) -> tuple[int, str]:
    """A `train_batch_size` for the largest bucket of `workspace`, and in a sentence why.

    1 where there is no GPU, and where the estimate cannot be made.
    """
    import torch

    device = pick_device(None)
    if device.type != "cuda":
        return 1, "There is no GPU here to reckon with."
    # Imported late: without a GPU, nobody has to wait for diffusers.
    from omnigen_pipe.memory.report import square_prospect

    try:
        bucket, ahead = square_prospect(workspace)
    except PipeError as error:
        return 1, f"The memory that training takes could not be estimated: {error}"
    return batch_within(ahead, bucket, torch.cuda.get_device_properties(device).total_memory)


def batch_within(ahead: Prospect, bucket: str, memory: int) -> tuple[int, str]:
    """The same for `bucket` on a GPU with `memory` bytes."""
    largest = ahead.largest_batch(bucket, memory)
    held = f"the {memory / 2**30:.1f} GiB of the GPU"
    if largest < 1:
        return 1, (
            f"Not even one sample of {bucket} fits {held}, by the estimate; `omnigen-pipe "
            "estimate` says what helps."
        )
    more = f"; more than {LARGEST} are not proposed" if largest > LARGEST else ""
    return min(largest, LARGEST), f"By the estimate, {largest:,} of {bucket} fit {held}{more}."
