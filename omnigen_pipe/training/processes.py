"""The processes of one training, as torchrun starts them, and what they say to each other.

Every process holds the whole adapter and computes its share of each global batch; sums are
exchanged, nothing else. One process alone exchanges nothing, and does not even import
`torch.distributed`. Only the first process writes.

The environment's RANK, WORLD_SIZE and LOCAL_RANK say who one is; they are torchrun's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from manifests.errors import PipeError, UsageError

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")

#: How long a process waits for the others (hours): the first one freezes a run's samples, which
#: takes long for millions. A process that died is noticed at once, not by this.
_PATIENCE = timedelta(hours=2)


class SaidElsewhereError(PipeError):
    """What ended another process ends this one, too; that process has said it."""

    said = True


class OtherProcessError(PipeError):
    """Another process is gone: its connection broke."""

    def __init__(self, error: Exception) -> None:
        super().__init__(
            "Another process of this training ended, so this one does too; checkpoints are whole. "
            "Its own message says why."
        )
        self.__cause__ = error


@dataclass(frozen=True)
class Processes:
    """The process `rank` of `size`; `local_rank` counts within this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def sum_(self, tensor: torch.Tensor) -> None:
        """Replace `tensor` by its sum over all processes, the same to the bit in each."""
        self._reduce(tensor, "SUM")

    def max_(self, tensor: torch.Tensor) -> None:
        """Replace `tensor` by its largest values over all processes."""
        self._reduce(tensor, "MAX")

    def _reduce(self, tensor: torch.Tensor, operation: str) -> None:
        if self.size == 1:
            return
        from torch import distributed

        with _broken_connections():
            distributed.all_reduce(tensor, getattr(distributed.ReduceOp, operation))

    def gathered(self, value: Any) -> list[Any]:
        """`value` of every process, in rank order."""
        if self.size == 1:
            return [value]
        from torch import distributed

        values: list[Any] = [None] * self.size
        with _broken_connections():
            distributed.all_gather_object(values, value)
        return values

    def raise_together(self, error: PipeError) -> NoReturn:
        """Raise `error`, which every process found, in the first one; it is said once."""
        if self.is_first:
            raise error
        elsewhere = SaidElsewhereError(str(error))
        elsewhere.exit_status = error.exit_status
        raise elsewhere

    def on_first(self, function: Callable[[], Result]) -> Result:
        """What `function` returns in the first process, to all of them, once it is done there.

        What it raises there ends the others, too.
        """
        if self.size == 1:
            return function()
        from torch import distributed

        outcome: list[Any] = [None, None]
        failure: Exception | None = None
        if self.is_first:
            try:
                outcome[0] = function()
            except (PipeError, OSError) as error:
                failure, outcome[1] = error, isinstance(error, UsageError)
        with _broken_connections():
            distributed.broadcast_object_list(outcome, src=0)
        if failure is not None:
            raise failure
        if outcome[1] is not None:
            elsewhere = SaidElsewhereError("The first process ended with an error.")
            elsewhere.exit_status = 2 if outcome[1] else 1
            raise elsewhere
        result: Result = outcome[0]
        return result


@contextmanager
def _broken_connections() -> Iterator[None]:
    """Turn what torch raises where another process is gone into a `PipeError`."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise OtherProcessError(error) from error


def from_environment() -> Processes:
    """Which process this is, by torchrun's variables; one alone without them."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Processes()
    numbers = (int(os.environ.get(n, "0")) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    return Processes(*numbers)


def device_name(processes: Processes, name: str | None) -> str | None:
    """The device of this process for `--device name`: each has a CUDA device of its own.

    Raises `UsageError` where several processes would share one.
    """
    if processes.size == 1 or name == "cpu":
        return name
    if name not in (None, "cuda"):
        error = UsageError(
            f"--device {name} is one device, and there are {processes.size} processes: leave "
            "--device out, or say cuda or cpu. CUDA_VISIBLE_DEVICES chooses among GPUs."
        )
        processes.raise_together(error)
    import torch

    count = torch.cuda.device_count()
    if count == 0 and name is None:
        return "cpu"
    if processes.local_rank >= count:
        raise UsageError(
            f"There are {count} CUDA devices here for at least {processes.local_rank + 1} "
            "processes: each needs one of its own."
        )
    return f"cuda:{processes.local_rank}"


@contextmanager
def connected(processes: Processes, device_name: str | None) -> Iterator[None]:
    """Within it the processes can talk: of tensors on CUDA by NCCL, of others by gloo."""
    if processes.size == 1:
        yield
        return
    import torch
    from torch import distributed

    device = None
    if device_name != "cpu":
        device = torch.device(device_name or "cuda")
        torch.cuda.set_device(device)
    # What is said is said through the CPU also where gradients go from GPU to GPU: there a process
    # that is gone is noticed at once, and nothing waits for the GPU.
    backend = "gloo" if device is None else "cpu:gloo,cuda:nccl"
    try:
        distributed.init_process_group(backend, timeout=_PATIENCE, device_id=device)
    except RuntimeError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise PipeError(
            f"The {processes.size} processes of this training could not meet at {place}: {error}"
        ) from error
    yield
    # Not after an error: where another process is gone this could wait for it.
    distributed.destroy_process_group()
