"""The plan of a training: which global batches come, in which order, from where to where."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from omnigen_pipe.runs.checkpoints import Position
from omnigen_pipe.runs.order import Epoch, MicroBatch


@dataclass(frozen=True)
class Plan:
    """Where training starts and ends, and how to get each epoch's order."""

    start: Position
    total_steps: int
    epoch_order: Callable[[int], Epoch]


@dataclass(frozen=True)
class Step:
    """One optimizer step: its global batch, the epoch it belongs to, and the position after it."""

    batches: list[MicroBatch]
    epoch: int
    after: Position

    @property
    def samples(self) -> int:
        """Samples of the global batch."""
        return sum(len(micro.samples) for micro in self.batches)

    def share(self, rank: int, size: int) -> list[MicroBatch]:
        """The micro-batches that process `rank` of `size` computes: each of them is one's."""
        return self.batches[rank::size]

    def rounds(self, size: int) -> int:
        """The most micro-batches that any of `size` processes computes."""
        return -(-len(self.batches) // size)


def steps(plan: Plan) -> Iterator[Step]:
    """Every step from the plan's start to its end: an index into the order, not a replay."""
    step, epoch, index = plan.start.step, plan.start.epoch, plan.start.global_batch
    while step < plan.total_steps:
        order = plan.epoch_order(epoch)
        while index < len(order) and step < plan.total_steps:
            batches = order.global_batch(index)
            step, index = step + 1, index + 1
            ended = index == len(order)
            after = Position(step, epoch + 1, 0) if ended else Position(step, epoch, index)
            yield Step(batches, epoch, after)
        epoch, index = epoch + 1, 0
