"""The trellis: the best of all paths, and codes that say what they stand for."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from hf_compact.functional.trellis import STATES, advance, initial_cost, trace_back, values_of


def by_hand(codes: list[int]) -> list[int]:
    """The state machine of the module's docstring, entry by entry."""
    state, values = 0, []
    for code in codes:
        grid, other = state >> 1, state & 1
        values.append(2 * code - grid)
        state = 2 * (other ^ (code & 1)) + grid
    return values


@given(arrays("int8", array_shapes(min_dims=2, max_dims=2, max_side=40), elements=st.integers(-63, 63)))
def test_values_follow_the_states(codes):
    assert values_of(torch.from_numpy(codes)).tolist() == [by_hand(row) for row in codes.tolist()]


def encode(units: torch.Tensor, weights: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """`(codes [n, T] int8, cost [n])` of rows `[n, T]`."""
    cost, codes, before = initial_cost(len(units)), [], []
    for column, weight in zip(units.T, weights, strict=True):
        code, _, state, cost = advance(column.expand(STATES, -1), cost, weight)
        codes.append(code.to(torch.int8))
        before.append(state)
    return trace_back(torch.stack(codes), torch.stack(before), cost).T.contiguous(), cost.amin(0)


@pytest.mark.parametrize("seed", range(4))
def test_no_path_is_cheaper(seed):
    """Against all paths through the codes near each entry."""
    generator = torch.Generator().manual_seed(seed)
    units = 3 * torch.randn(5, 6, generator=generator)
    weights = (torch.rand(6, generator=generator) + 0.1).tolist()
    codes, cost = encode(units, weights)
    scale = torch.tensor(weights)
    torch.testing.assert_close(cost, ((values_of(codes) - units).square() * scale).sum(1))
    for row, least in zip(units, cost, strict=True):
        near = [[int(x // 2) + i for i in (-1, 0, 1, 2)] for x in row.tolist()]
        every = torch.tensor(list(itertools.product(*near)), dtype=torch.int8)
        errors = ((values_of(every) - row).square() * scale).sum(1)
        assert least == pytest.approx(errors.min().item(), rel=1e-5)


def test_it_is_worth_a_decibel():
    """At the entropy of one grid with twice the step."""
    units = 8 * torch.randn(200, 200, generator=torch.Generator().manual_seed(0))
    codes, _ = encode(units, [1.0] * 200)
    error = (values_of(codes) - units).square().mean()
    one_grid = (2 * (units / 2).round() - units).square().mean()
    assert 10 * torch.log10(one_grid / error) == pytest.approx(0.99, abs=0.06)

    def entropy(integers):
        share = torch.bincount((integers + 64).flatten().long()).double() / integers.numel()
        return -(share * share.clamp_min(1e-30).log2()).sum()

    assert entropy(codes.float()) - entropy((units / 2).round()) < 0.02
