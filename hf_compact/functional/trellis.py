"""Trellis-coded quantization: two interleaved grids, and codes that say by their parity which of them comes next.

The even and the odd multiples of a step take turns as the grid of an entry. Which of them it is follows from the parities
of the codes before it, so nothing but the codes is stored, and each costs what a scalar quantizer with twice the step
would. The encoder follows four states and keeps, for each, the best path into it (Viterbi): of the 1.53 dB that a scalar
quantizer loses to the bound at high rates that wins back about one.

State `2 a + b` at an entry: its value is `2 code - a`; the next state is `2 (b xor parity) + a`.
Source: Marcellin and Fischer 1990; the four states are those of dependent quantization in VVC and in ISO/IEC 15938-17,
without the zero that their odd grid has as well.
"""

import numpy as np
import torch
from torch import Tensor

STATES = 4
_GRID = torch.tensor([0.0, 0.0, 1.0, 1.0])[:, None]
_PARITY = torch.tensor([0.0, 1.0])[None, :, None]
# Into each state lead two branches, `2 * state + parity` of the entry before.
_BRANCHES = torch.tensor([[0, 4, 1, 5], [3, 7, 2, 6]])[..., None]


def initial_cost(num_paths: int) -> Tensor:
    """`[4, num_paths]`: every path starts in state 0."""
    cost = torch.full((STATES, num_paths), torch.inf)
    cost[0] = 0
    return cost


def advance(units: Tensor, cost: Tensor, weight: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One entry of many trellises: the best way into each state.

    Args:
        units: `[4, n]` float32, the entry in steps, as the path into each state has left it.
        cost: `[4, n]` of these paths.
        weight: of the entry's squared error.

    Returns:
        By the state that follows, all `[4, n]`: codes and values float32, the state before int64, cost.

    >>> codes, values, before, cost = advance(torch.full((4, 1), 3.2), initial_cost(1), 1.0)
    >>> codes[::2].flatten().tolist(), values[::2].flatten().tolist(), before[::2].flatten().tolist()
    ([2.0, 1.0], [4.0, 2.0], [0, 0])
    """
    codes = (units + _GRID)[:, None].sub(2 * _PARITY).mul_(0.25).round_().mul_(2).add_(_PARITY)
    values = 2 * codes - _GRID[:, None]
    costs = (units[:, None] - values).square_().mul_(weight).add_(cost[:, None]).flatten(0, 1)
    first, second = costs[_BRANCHES[0, :, 0]], costs[_BRANCHES[1, :, 0]]
    branch = torch.where(second < first, _BRANCHES[1], _BRANCHES[0])
    return codes.flatten(0, 1).gather(0, branch), values.flatten(0, 1).gather(0, branch), branch >> 1, first.minimum(second)


def trace_back(codes: Tensor, before: Tensor, cost: Tensor) -> Tensor:
    """The codes of the cheapest path.

    Args:
        codes: `[T, 4, n]` of `advance`, entry by entry.
        before: `[T, 4, n]` likewise.
        cost: `[4, n]` at the end.

    Returns:
        `[T, n]`, of the dtype of `codes`.
    """
    state = cost.argmin(0, keepdim=True)
    best = torch.empty_like(codes[:, 0])
    for entry in range(len(codes) - 1, -1, -1):
        best[entry] = codes[entry].gather(0, state)[0]
        state = before[entry].gather(0, state).long()
    return best


def values_of(codes: Tensor) -> Tensor:
    """What codes stand for, in steps; the inverse of the encoder's choice.

    Args:
        codes: `[n, T]` int8 on the CPU, magnitudes below 64; every row is a path.

    Returns:
        `[n, T]` int8.

    >>> values_of(torch.tensor([[2, 1, 1, 0]], dtype=torch.int8)).tolist()
    [[4, 2, 1, -1]]
    """
    parities = np.zeros((len(codes), codes.shape[1] + codes.shape[1] % 2), np.uint8)
    np.bitwise_and(codes.numpy().view(np.uint8), 1, out=parities[:, : codes.shape[1]])
    # The grid of an entry is the sum of the parities one, three, five ... entries before it: two sums side by side.
    grid = np.bitwise_xor.accumulate(parities.view(np.uint16), axis=1).view(np.int8)
    values = codes * 2
    values[:, 1:] -= torch.from_numpy(grid)[:, : codes.shape[1] - 1]
    return values
