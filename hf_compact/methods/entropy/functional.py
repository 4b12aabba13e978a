"""Error feedback on a uniform grid without bounds, whose step follows the curvature column by column.

A weight is `row_scale * column_scale * integer`. With `U` the upper factor of the inverse gram matrix, the error
of column j counts `1 / U_jj^2` and costs bits as `-log(step)`, so at a fixed number of bits the best step of a column is
proportional to `U_jj` (WaterSIC). The solvers work in units of the rows' steps, where every row looks alike.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ...functional.coding import coded_bits
from ...functional.gram import inverse_factor

_BLOCK = 128  # columns between two delayed updates of the rest of the matrix
_LARGEST = 127
_SEARCH_ROWS = 128


class Integers(NamedTuple):
    """A quantized matrix `[out, in]`."""

    codes: Tensor
    """`[out, in]` int8."""
    row_scale: Tensor
    """`[out]` float32, rounded to float16 values."""
    column_scale: Tensor
    """`[in]` float32, rounded to float16 values, about 1."""


def dequantize(integers: Integers) -> Tensor:
    """The matrix `[out, in]` float32."""
    return integers.codes.float() * integers.column_scale * integers.row_scale[:, None]


def round_with_feedback(unit: Tensor, steps: Tensor, factor: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Integers for a matrix whose rows are in units of their step, column by column, each column's error moved on.

    The scale of a column is its step, shrunk to what minimises its squared error and rounded to what storage keeps
    before the error is taken, so that the columns behind it make up for that too.

    Args:
        unit: `[out, in]` float32. Not written to.
        steps: `[in]` the step of each column.
        factor: `[in, in]` upper factor of the inverse gram matrix, in processing order.
        order: `[in]` the input column that each step rounds.

    Returns:
        `(codes [out, in] int8, column_scale [in] float32)` in the original column order.
    Source: GPTQ (arXiv 2210.17323), algorithm 1, with the steps of WaterSIC.
    """
    free = unit.T[order].contiguous()
    codes = torch.empty_like(free, dtype=torch.int8)
    scales = [0.0] * len(free)
    wanted = steps[order].tolist()
    diagonal = factor.diagonal().tolist()
    for start in range(0, len(free), _BLOCK):
        stop = min(start + _BLOCK, len(free))
        block = free[start:stop]
        errors = torch.empty_like(block)
        for step in range(stop - start):
            position = start + step
            column = block[step]
            # Inputs of massive activations ask for steps so small that bytes would overflow: eight bits have to do.
            step_size = max(wanted[position], column.abs().max().item() / _LARGEST)
            integers = torch.div(column, step_size).round_()
            energy = torch.dot(integers, integers).item()
            best = torch.dot(integers, column).item() / energy if energy else step_size
            scales[position] = _half(best)
            torch.sub(column, integers, alpha=scales[position], out=errors[step]).div_(diagonal[position])
            codes[position] = integers
            block[step + 1 :].addr_(factor[position, position + 1 : stop], errors[step], alpha=-1)
        free[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    back = order.argsort()
    return codes[back].T.contiguous(), torch.tensor(scales)[back]


def refit_rows(weight: Tensor, codes: Tensor, column_scale: Tensor, gram: Tensor | None, fallback: Tensor) -> Tensor:
    """Row scales that minimise the output error for integers that stay as they are, `[out]`, as stored.

    Args:
        weight: `[out, in]` float32 target.
        codes: `[out, in]` int8.
        column_scale: `[in]` float32.
        gram: `[in, in]`, or None for the identity.
        fallback: `[out]` for rows whose integers are all zero or whose best scale is not positive.
    """
    value = codes.float() * column_scale
    through = value if gram is None else value @ gram.float()
    best = (through * weight).sum(1) / (through * value).sum(1)
    best = torch.where(best.isfinite() & (best > 0), best, fallback)
    half = torch.finfo(torch.float16)
    return best.clamp(half.smallest_normal, half.max).half().float()


def bits_per_weight(codes: Tensor, num_rows: int) -> float:
    """Bits on disk: the coded integers, a float16 per row and per column.

    Args:
        codes: `[n, in]` int8, all rows or some.
        num_rows: rows of the whole matrix, which share what columns and tables take.
    """
    entries, side = coded_bits(codes)
    rows, columns = codes.shape
    return entries / codes.numel() + 16 / columns + 4 / columns + (side - 4 * rows + 16 * columns) / (num_rows * columns)


class Rounder:
    """One matrix at any step of the grid: factorised once, every step tried costs one pass over the columns."""

    def __init__(self, weight: Tensor, gram: Tensor | None, damp: float, row_steps: Tensor | None = None) -> None:
        """Factorise.

        Args:
            weight: `[out, in]` float32.
            gram: `[in, in]` or None.
            damp: see `inverse_factor`.
            row_steps: `[out]` steps of the rows relative to each other; None makes them equal.

        Raises:
            ValueError: the gram matrix cannot be factorised.
        """
        self.weight = weight
        size = weight.shape[1]
        self.order = torch.arange(size) if gram is None else gram.diagonal().argsort(descending=True)
        self.factor = torch.eye(size) if gram is None else inverse_factor(gram, damp, self.order)
        diagonal = self.factor.diagonal()
        self.middle = diagonal.log().mean().exp().item()
        self.steps = (diagonal / self.middle)[self.order.argsort()]
        self.row_steps = torch.ones(len(weight)) if row_steps is None else row_steps
        self.some_rows = slice(None, None, max(1, len(weight) // _SEARCH_ROWS))

    def guess(self, bits: float) -> float:
        """A step with about that many bits: a normal value of `2**(bits - 2)` steps carries so much."""
        return (self.weight / self.row_steps[:, None]).square().mean().sqrt().item() / self.middle * 2 ** (2 - bits)

    def codes(self, step: float, rows: slice) -> tuple[Tensor, Tensor]:
        """`(codes, column_scale)` of some rows at a step in units of `U_jj`."""
        unit = self.weight[rows] / (step * self.middle * self.row_steps[rows, None])
        return round_with_feedback(unit, self.steps, self.factor, self.order)

    def bits(self, step: float, rows: slice) -> float:
        """Bits per weight of some rows, as they would be stored."""
        codes, _ = self.codes(step, rows)
        return bits_per_weight(codes, len(self.weight))

    def integers(self, step: float, gram: Tensor | None) -> Integers:
        """The whole matrix, with the best row scales."""
        codes, column_scale = self.codes(step, slice(None))
        fallback = step * self.middle * self.row_steps
        return Integers(codes, refit_rows(self.weight, codes, column_scale, gram, fallback), column_scale)


def _half(value: float) -> float:
    """A positive scale as float16 keeps it."""
    half = torch.finfo(torch.float16)
    return torch.tensor(min(max(value, half.smallest_normal), half.max), dtype=torch.float16).item()
