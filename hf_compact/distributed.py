"""The few collectives that calibration needs; each does nothing on a single rank. The engine is torch.distributed."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def rank() -> int:
    """This process's rank, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def share(items: Sequence[T]) -> list[T]:
    """The items that this rank works on: every `world_size`-th one.

    >>> share([1, 2, 3])
    [1, 2, 3]
    """
    return list(items[rank() :: world_size()])


def owners(costs: Sequence[float]) -> list[int]:
    """The rank that computes each item: the most expensive first, each to the rank with the least so far.

    >>> owners([1.0, 5.0])
    [0, 0]
    """
    loads = [0.0] * world_size()
    chosen = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
        chosen[item] = min(range(len(loads)), key=loads.__getitem__)
        loads[chosen[item]] += costs[item]
    return chosen


def sum_(tensors: Iterable[Tensor]) -> None:
    """Add tensors over all ranks, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def broadcast_(tensors: Iterable[Tensor], source: int) -> None:
    """Overwrite tensors with those of rank `source`."""
    if world_size() > 1:
        for tensor in tensors:
            # A byte view: some backends cannot move every dtype, and the bits are what counts.
            dist.broadcast(tensor.view(torch.uint8), src=source)


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()
