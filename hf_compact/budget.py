"""The best choice for every layer under one byte budget.

Errors add up over layers, bytes add up over layers: a multiple-choice knapsack. `allocate_exact` keeps the whole
frontier of partial sums and is exact; `allocate` prices bytes by one multiplier, takes milliseconds for any number of
layers, and is optimal for the bytes that it uses.

Source: L-GreCo (arXiv 2210.17357) poses the same programme; differs by the frontier in place of a discretised budget.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import ConfigError


@dataclass(frozen=True)
class Choice:
    """One way to store one layer."""

    num_bytes: int
    """Storage."""
    error: float
    """What it costs in quality; any unit that adds up over layers."""


def allocate_exact(layers: Sequence[Sequence[Choice]], budget_bytes: int) -> list[int]:
    """Indices of the choices with the least total error within the budget.

    The frontier can grow exponentially when no two sums are alike; meant for some dozens of layers.

    Raises:
        ConfigError: even the smallest choices exceed the budget.

    >>> allocate_exact([[Choice(1, 4.0), Choice(2, 1.0)], [Choice(1, 9.0), Choice(2, 2.0)]], budget_bytes=3)
    [0, 1]
    """
    _check(layers, budget_bytes)
    rest = [0] * (len(layers) + 1)  # the least that the layers from here on need
    for i in range(len(layers) - 1, -1, -1):
        rest[i] = rest[i + 1] + min(choice.num_bytes for choice in layers[i])
    frontier: list[tuple[int, float, tuple[int, ...]]] = [(0, 0.0, ())]
    for i, choices in enumerate(layers):
        sums = sorted(
            (used + choice.num_bytes, error + choice.error, (*path, index))
            for used, error, path in frontier
            for index, choice in enumerate(choices)
            if used + choice.num_bytes + rest[i + 1] <= budget_bytes
        )
        frontier, best = [], math.inf
        for entry in sums:
            if entry[1] < best:
                best = entry[1]
                frontier.append(entry)
    return list(frontier[-1][2])


def allocate(layers: Sequence[Sequence[Choice]], budget_bytes: int) -> list[int]:
    """Indices of choices within the budget, by bisection on the price of a byte.

    Every layer takes the choice with the least `error + price * bytes`. The result has the least error of all tables
    that use as many bytes; up to one layer's step of the budget may stay unused.

    Raises:
        ConfigError: even the smallest choices exceed the budget.
    """
    _check(layers, budget_bytes)

    def at(price: float) -> list[int]:
        return [
            min(range(len(choices)), key=lambda i: (choices[i].error + price * choices[i].num_bytes, choices[i].num_bytes))
            for choices in layers
        ]

    def used(table: list[int]) -> int:
        return sum(choices[i].num_bytes for choices, i in zip(layers, table, strict=True))

    if used(at(0.0)) <= budget_bytes:
        return at(0.0)
    low, high = 0.0, 1e-30
    while used(at(high)) > budget_bytes:
        low, high = high, high * 10
        if math.isinf(high):  # every price is finite, so only ties are left: the smallest choices
            return [min(range(len(choices)), key=lambda i: choices[i].num_bytes) for choices in layers]
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if used(at(middle)) > budget_bytes else (low, middle)
    return at(high)


def _check(layers: Sequence[Sequence[Choice]], budget_bytes: int) -> None:
    least = sum(min(choice.num_bytes for choice in choices) for choices in layers)
    if least > budget_bytes:
        raise ConfigError(f"budget must be at least {least} bytes for these choices, got {budget_bytes}")
