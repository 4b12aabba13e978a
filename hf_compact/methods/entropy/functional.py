"""Error feedback on a uniform grid without bounds, whose step follows the curvature column by column.

A weight is `scale * row_scale * column_scale * integer`. With `U` the upper factor of the inverse gram matrix, the error
of column j counts `1 / U_jj^2` and costs bits as `-log(step)`, so at a fixed number of bits the best step of a column is
proportional to `U_jj` (WaterSIC). The solvers work in units of the rows' steps, where every row looks alike.
"""

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from ...functional.coding import coded_bits
from ...functional.gram import inverse_factor
from ...functional.trellis import STATES, advance, initial_cost, trace_back, values_of

_BLOCK = 128  # columns between two delayed updates of the rest of the matrix
_TRELLIS_BLOCK = 32  # the same where each path has a matrix of its own
LARGEST = 127
"""Magnitude of an integer: a byte has to hold it."""
_HALF = torch.finfo(torch.float16)
_HEADROOM = 2.0**12  # of a column's scale above 1; the errors of other columns, moved onto it, may need as much again
SEARCH_ROWS = 128
"""Rows of a matrix on which steps are tried."""


class Integers(NamedTuple):
    """A quantized matrix `[out, in]`."""

    codes: Tensor
    """`[out, in]` int8, what is stored."""
    values: Tensor
    """`[out, in]` int8, what they stand for: on a trellis not the same."""
    scale: float
    """Of the whole matrix, as float32 keeps it: rows and columns lie around 1, in the middle of what float16 can say."""
    row_scale: Tensor
    """`[out]` float32, rounded to float16 values."""
    column_scale: Tensor
    """`[in]` float32, rounded to float16 values."""


def dequantize(integers: Integers) -> Tensor:
    """The matrix `[out, in]` float32."""
    return integers.values.float() * integers.column_scale * (integers.scale * integers.row_scale[:, None])


def round_with_feedback(unit: Tensor, steps: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Integers for a matrix whose rows are in units of their step, column by column, each column's error moved on.

    The scale of a column is its step, shrunk to what minimises its squared error and rounded to what storage keeps
    before the error is taken, so that the columns behind it make up for that too. The order of the columns does not
    matter: with these steps every one of them gets what is left in all others.

    Args:
        unit: `[out, in]` float32. Not written to.
        steps: `[in]` the step of each column.
        factor: `[in, in]` upper factor of the inverse gram matrix.

    Returns:
        `(codes [out, in] int8, column_scale [in] float32)`.
    Source: GPTQ (arXiv 2210.17323), algorithm 1, with the steps of WaterSIC.
    """
    free = unit.T.contiguous()
    codes = torch.empty_like(free, dtype=torch.int8)
    scales = [0.0] * len(free)
    wanted, diagonal = steps.tolist(), factor.diagonal().tolist()
    for start in range(0, len(free), _BLOCK):
        stop = min(start + _BLOCK, len(free))
        block = free[start:stop]
        errors = torch.empty_like(block)
        for step in range(stop - start):
            position = start + step
            column = block[step]
            # Inputs of massive activations ask for steps so small that bytes would overflow: eight bits have to do.
            step_size = max(wanted[position], column.abs().max().item() / LARGEST)
            integers = torch.div(column, step_size).round_()
            scales[position] = _column_scale(integers, column, step_size)
            torch.sub(column, integers, alpha=scales[position], out=errors[step]).div_(diagonal[position])
            codes[position] = integers
            block[step + 1 :].addr_(factor[position, position + 1 : stop], errors[step], alpha=-1)
        free[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return codes.T.contiguous(), torch.tensor(scales)


def round_on_trellis(unit: Tensor, steps: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """As `round_with_feedback`, with the grids of `functional.trellis`: a row is a path over the columns.

    Each of a row's four paths moves its own errors on, so the squared errors along it, in units of `U_jj`, add up to the
    error of the layer's output: the path that is kept is the best in what the solver minimises (per-survivor processing).

    Args:
        unit: `[out, in]` float32. Not written to.
        steps: `[in]` the distance between two values of the two grids together.
        factor: `[in, in]` upper factor of the inverse gram matrix.

    Returns:
        `(codes [out, in] int8, column_scale [in] float32)`; a value is `column_scale * values_of(codes)`.
    """
    rows, columns = unit.shape
    free = unit.T[:, None].repeat(1, STATES, 1)
    cost = initial_cost(rows)
    codes = torch.empty(columns, STATES, rows, dtype=torch.int8)
    before = torch.empty_like(codes)
    scales = [0.0] * columns
    wanted, diagonal = steps.tolist(), factor.diagonal().tolist()
    same = torch.arange(STATES)[:, None].expand(STATES, rows)
    for start in range(0, columns, _TRELLIS_BLOCK):
        stop = min(start + _TRELLIS_BLOCK, columns)
        errors = torch.empty(stop - start, STATES, rows)
        origin = same  # the state at the start of the block that a path has come from
        for step in range(stop - start):
            position = start + step
            target = free[position].gather(0, origin)
            target.view(-1).addmv_(errors[:step].flatten(1).T, factor[start:position, position], alpha=-1)
            # Two less than a byte holds: a path may have to go two steps further out for its parity.
            step_size = max(wanted[position], target.abs().max().item() / (LARGEST - 2))
            code, value, state, cost = advance(target / step_size, cost, (step_size / diagonal[position]) ** 2)
            codes[position], before[position] = code, state
            target, best = target.gather(0, state), cost.argmin(0, keepdim=True)
            scales[position] = _column_scale(value.gather(0, best)[0], target.gather(0, best)[0], step_size)
            errors[:step] = errors[:step].gather(1, state.expand(step, -1, -1))
            torch.sub(target, value, alpha=scales[position], out=errors[step]).div_(diagonal[position])
            origin = origin.gather(0, state)
        free[stop:] = free[stop:].gather(1, origin.expand(columns - stop, -1, -1))
        free[stop:].flatten(1).addmm_(factor[start:stop, stop:].T, errors.flatten(1), alpha=-1)
    return trace_back(codes, before, cost).T.contiguous(), torch.tensor(scales)


def _column_scale(integers: Tensor, column: Tensor, step: float) -> float:
    """What the integers of a column are best multiplied by, as float16 keeps it; the step where all are zero."""
    energy = torch.dot(integers, integers).item()
    best = torch.dot(integers, column).item() / energy if energy else step
    return torch.tensor(min(max(best, _HALF.smallest_normal), _HALF.max), dtype=torch.float16).item()


def refit_rows(weight: Tensor, values: Tensor, column_scale: Tensor, gram: Tensor | None, fallback: Tensor) -> Tensor:
    """Row scales that minimise the output error for integers that stay as they are.

    Args:
        weight: `[out, in]` float32 target.
        values: `[out, in]` int8.
        column_scale: `[in]` float32.
        gram: `[in, in]`, or None for the identity.
        fallback: `[out]` for rows whose integers are all zero or whose best scale is not positive.

    Returns:
        `[out]` float32, rounded to float16 values.
    """
    value = values.float() * column_scale
    through = value if gram is None else value @ gram.float()
    best = (through * weight).sum(1) / (through * value).sum(1)
    best = torch.where(best.isfinite() & (best > 0), best, fallback)
    return best.clamp(_HALF.smallest_normal, _HALF.max).half().float()


def bits_per_weight(codes: Tensor, num_rows: int) -> float:
    """Bits on disk: the coded integers, a float16 per row and per column.

    Args:
        codes: `[n, in]` int8, all rows or some.
        num_rows: rows of the whole matrix, which share what columns and tables take.

    Returns:
        Forecast for the whole matrix.
    """
    entries, side = coded_bits(codes)
    rows, columns = codes.shape
    return entries / codes.numel() + 20 / columns + (side - 4 * rows + 16 * columns + 32) / (num_rows * columns)


def fixed_bits(rows: int, columns: int) -> float:
    """Bits per weight of scales and levels alone: what a matrix takes with all integers zero.

    >>> fixed_bits(16, 32)
    1.9375
    """
    return 20 / rows + 20 / columns + 32 / (rows * columns)


def center_rows(row_steps: Tensor) -> tuple[float, Tensor]:
    """`(scale, row steps)`: the steps around 1, none so far from the others that float16 could not say it."""
    scale = torch.tensor(row_steps.double().log().mean().exp().item()).item()
    return scale, (row_steps / scale).clamp(_HALF.smallest_normal, 2.0**12)


class Rounder:
    """One matrix at any step of the grid: factorised once, every step tried costs one pass over the columns."""

    def __init__(
        self, weight: Tensor, gram: Tensor | None, damp: float, row_steps: Tensor | None = None, num_rows: int | None = None,
        *, is_trellis: bool = True,
    ) -> None:  # fmt: skip
        """Factorise.

        Args:
            weight: `[out, in]` float32, or some rows of it to try steps on.
            gram: `[in, in]` or None.
            damp: see `inverse_factor`.
            row_steps: `[out]` steps of these rows relative to each other; None makes them equal.
            num_rows: rows of the whole matrix if these are some.
            is_trellis: two grids that take turns; else one.

        Raises:
            ValueError: the gram matrix cannot be factorised.
        """
        self.weight, self.num_rows, self.is_trellis = weight, num_rows or len(weight), is_trellis
        self.factor = torch.eye(weight.shape[1]) if gram is None else inverse_factor(gram, damp)
        diagonal = self.factor.diagonal()
        middle = diagonal.log().mean().exp()
        self.steps = diagonal / middle
        self.scale, self.row_steps = center_rows(torch.ones(len(weight)) if row_steps is None else row_steps)
        self.scale *= middle.item()

    def some(self) -> "Rounder":
        """Itself on some of its rows."""
        other = copy.copy(self)
        rows = slice(None, None, max(1, len(self.weight) // SEARCH_ROWS))
        other.weight, other.row_steps = self.weight[rows], self.row_steps[rows]
        return other

    @property
    def finest(self) -> float:
        """The least step, in units of `U_jj`, at which float16 can still say the scale of every column.

        Integers fill their byte long before; it stops a search for bits that a matrix with many zeros does not have.
        """
        largest = (self.weight / self.row_steps[:, None]).abs().amax(0) / self.steps
        return largest.max().item() / self.scale / (LARGEST * _HEADROOM)

    def guess(self, bits: float) -> float:
        """A step with about that many bits: a normal value of `2**(bits - 2)` steps carries so much."""
        spread = (self.weight / self.row_steps[:, None]).square().mean().sqrt().item()
        return spread / self.scale * 2 ** (2 - bits)

    def forecast(self, step: float) -> float:
        """About the bits per weight at a step, at a tenth of the cost of a trellis: its codes take little more than one grid's."""
        return bits_per_weight(round_with_feedback(self._unit(step), self.steps, self.factor)[0], self.num_rows)

    def bits(self, step: float) -> float:
        """Bits per weight, as they would be stored."""
        return bits_per_weight(self._codes(step)[0], self.num_rows)

    def integers(self, step: float, gram: Tensor | None) -> Integers:
        """The matrix, with the best row scales."""
        codes, column_scale = self._codes(step)
        values = values_of(codes) if self.is_trellis else codes
        scale = torch.tensor(step * self.scale).item()
        row_scale = refit_rows(self.weight / scale, values, column_scale, gram, self.row_steps)
        return Integers(codes, values, scale, row_scale, column_scale)

    def _unit(self, step: float) -> Tensor:
        return self.weight / (step * self.scale) / self.row_steps[:, None]

    def _codes(self, step: float) -> tuple[Tensor, Tensor]:
        if not self.is_trellis:
            return round_with_feedback(self._unit(step), self.steps, self.factor)
        # Two grids of that step each, so that a step costs the same bits as without a trellis.
        return round_on_trellis(self._unit(step), self.steps / 2, self.factor)
