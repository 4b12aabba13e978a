"""The best choice for every layer under one budget of bytes, or under a ceiling of error.

Errors add up over layers, bytes add up over layers: a multiple-choice knapsack. `allocate` and `allocate_within` solve
it by dynamic programming over buckets of the budget; `front` prices bytes by one multiplier instead, which gives
the whole convex front at once and is fast for any number of layers.

Source: L-GreCo (arXiv 2210.17357), the discretised programme; differs by rounding to the nearest bucket where L-GreCo
rounds up, and by a check of the true sum: rounding up would leave half a bucket per layer unused.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError

_BUCKETS = 20_000
_MOST_LAYERS = 2_000  # of the dynamic programme: beyond, one layer's step is less than a bucket

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Choice:
    """One way to store one layer."""

    num_bytes: int
    """Storage."""
    error: float
    """What it costs in quality; any unit that adds up over layers."""


def allocate(layers: Sequence[Sequence[Choice]], budget_bytes: int) -> list[int]:
    """Indices of the choices with the least total error within the budget, which is never exceeded.

    Exact where the budget has at most 20,000 bytes to deal out; else up to the rounding of every layer's bytes to that
    many buckets. More than 2,000 layers get the last table of the `front` within the budget.

    Raises:
        ConfigError: even the smallest choices exceed the budget.

    >>> allocate([[Choice(1, 4.0), Choice(2, 1.0)], [Choice(1, 9.0), Choice(2, 2.0)]], budget_bytes=3)
    [0, 1]
    """
    least = sum(min(choice.num_bytes for choice in choices) for choices in layers)
    if least > budget_bytes:
        raise ConfigError(f"budget must be at least {least} bytes for these choices, got {budget_bytes}")
    if len(layers) > _MOST_LAYERS:
        return _last_within(layers, budget_bytes)
    return _solve(_sizes(layers), _errors(layers), budget_bytes, unit=1.0)


def allocate_within(layers: Sequence[Sequence[Choice]], max_error: float) -> list[int]:
    """Indices of the choices with the least bytes whose errors add up to at most `max_error`.

    The dual of `allocate`, with the same rounding.

    Raises:
        ConfigError: even the choices with the least error exceed the ceiling.

    >>> allocate_within([[Choice(1, 4.0), Choice(2, 1.0)], [Choice(1, 9.0), Choice(2, 2.0)]], max_error=6.0)
    [0, 1]
    """
    least = sum(min(choice.error for choice in choices) for choices in layers)
    if least > max_error:
        raise ConfigError(f"max_error must be at least {least:.3g} for these choices, got {max_error:.3g}")
    return _solve(_errors(layers), _sizes(layers), max_error, unit=0.0)


def front(layers: Sequence[Sequence[Choice]]) -> Iterator[list[int]]:
    """Every table that has the least `error + price * bytes` for some price, from the fewest bytes to the least error.

    Neighbours differ in one layer. No table of the same bytes has less error.

    >>> list(front([[Choice(1, 4.0), Choice(2, 1.0)], [Choice(1, 9.0), Choice(2, 2.0)]]))
    [[0, 0], [0, 1], [1, 1]]
    """
    table, moves = _moves(layers)
    yield list(table)
    for layer, index in moves:
        table[layer] = index
        yield list(table)


def totals(layers: Sequence[Sequence[Choice]], table: Sequence[int]) -> Choice:
    """Bytes and error of a whole table."""
    chosen = [choices[index] for choices, index in zip(layers, table, strict=True)]
    return Choice(sum(choice.num_bytes for choice in chosen), sum(choice.error for choice in chosen))


def _sizes(layers: Sequence[Sequence[Choice]]) -> list[Floats]:
    return [np.array([choice.num_bytes for choice in choices], dtype=np.float64) for choices in layers]


def _errors(layers: Sequence[Sequence[Choice]]) -> list[Floats]:
    return [np.array([choice.error for choice in choices], dtype=np.float64) for choices in layers]


def _solve(costs: Sequence[Floats], values: Sequence[Floats], budget: float, unit: float) -> list[int]:
    """Indices with the least total value whose costs stay within the budget, which the least costs do.

    `best[e]` is the least value of the layers so far with at most `e` buckets above the least costs. Sums of rounded
    costs can be off by half a bucket per layer either way: the programme runs that far beyond the budget, and the first
    table from the top whose true sum stays within it is taken.
    """
    cheapest = [int(np.lexsort((value, cost))[0]) for cost, value in zip(costs, values, strict=True)]
    room = budget - sum(cost[index] for cost, index in zip(costs, cheapest, strict=True))
    width = max(unit, room / _BUCKETS) or 1.0
    most = int(room / width) + (len(costs) + 1) // 2
    buckets = [
        np.minimum(np.rint((cost - cost[index]) / width), most + 1).astype(np.int64)
        for cost, index in zip(costs, cheapest, strict=True)
    ]
    best = np.zeros(most + 1)
    taken = np.zeros((len(costs), most + 1), dtype=np.int16)
    for layer, (steps, value) in enumerate(zip(buckets, values, strict=True)):
        total = np.full(most + 1, np.inf)
        for index in np.argsort(steps, kind="stable"):
            step = steps[index]
            if step > most:
                break
            candidate = best[: most + 1 - step] + value[index]
            is_better = candidate < total[step:]
            total[step:][is_better] = candidate[is_better]
            taken[layer, step:][is_better] = index
        best = total
    for end in range(most, -1, -1):
        table, at = [0] * len(costs), end
        for layer in range(len(costs) - 1, -1, -1):
            table[layer] = int(taken[layer, at])
            at -= int(buckets[layer][table[layer]])
        if sum(cost[index] for cost, index in zip(costs, table, strict=True)) <= budget:
            return table
    return cheapest


def _moves(layers: Sequence[Sequence[Choice]]) -> tuple[list[int], Iterator[tuple[int, int]]]:
    """The smallest table, and the (layer, choice) steps up from it by falling gain per byte.

    The gains of one layer fall along its own hull, so merging the layers' steps keeps their order.
    """
    start, steps = [], []
    for layer, (sizes, errors) in enumerate(zip(_sizes(layers), _errors(layers), strict=True)):
        here = int(np.lexsort((errors, sizes))[0])
        start.append(here)
        mine = []
        while (gain := errors[here] - errors).max() > 0:
            slope = np.where((gain > 0) & (sizes > sizes[here]), gain / np.maximum(sizes - sizes[here], 1.0), 0.0)
            here = int(np.lexsort((-sizes, -slope))[0])  # of equal slopes the longest step
            mine.append((-float(slope[here]), layer, here))
        steps.append(mine)
    return start, ((layer, index) for _, layer, index in heapq.merge(*steps, key=lambda step: step[0]))


def _last_within(layers: Sequence[Sequence[Choice]], budget_bytes: int) -> list[int]:
    table, moves = _moves(layers)
    used = totals(layers, table).num_bytes
    for layer, index in moves:
        used += layers[layer][index].num_bytes - layers[layer][table[layer]].num_bytes
        if used > budget_bytes:
            break
        table[layer] = index
    return table
