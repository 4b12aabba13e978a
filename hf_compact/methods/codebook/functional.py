"""Weight-only quantization to codebooks: nearest or with error feedback, then closed-form refits.

Every grid is one thing: a weight is `scale[row, group] * (levels[table, code] - zero[row, group])`. A uniform grid
has the levels 0..2^b-1, NF4 sixteen fixed ones, a learned grid one table for every `rows_per_codebook` rows, a power
or split grid one table for the matrix. The
solvers (`functional/feedback.py`) never look inside a grid: they ask for the nearest value.

Alternative rejected: one solver per grid, as most libraries have; rounding and grid are independent choices.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...functional.feedback import (
    half_precision,
    num_groups,
    quadratic,
    scale_groups_,
    search_clipping,
    spread_groups,
    stored_scale,
)
from ...functional.packing import look_up

#: Levels of NormalFloat-4, QLoRA (arXiv 2305.14314), appendix E.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
SPLIT_PARTS = 3
_EXPONENTS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
_EXPONENT_RANGE = (0.2, 1.4)  # what gradient steps may reach
_POWER_ROWS = 256  # rows on which exponents are tried
_POWER_STEPS = 4  # of Gauss and Newton on the exponent; the objective is smooth and one-dimensional
_SPLIT_STEPS = 20  # of Lloyd's algorithm on equal steps


class Quantized(NamedTuple):
    """A quantized matrix `[out, in]`; `G` groups of `group_size` inputs each, the last one may be shorter."""

    codes: Tensor
    """`[out, in]` uint8 indices into the levels."""
    scale: Tensor
    """`[out, G]`, rounded to float16 values."""
    zero: Tensor | None
    """`[out, G]` integer offset in units of the levels, or None for a grid without offset."""
    levels: Tensor
    """`[tables, grid_size]` ascending; row `r` uses table `r // ceil(out / tables)`."""


def grid_size(grid: str, bits: int) -> int:
    """Levels of a table. A code takes as many bits as their numbers need: two more than `bits` on the split grid.

    >>> grid_size("uniform", bits=2), grid_size("split", bits=2)
    (4, 12)
    """
    return (SPLIT_PARTS if grid == "split" else 1) * 2**bits


def has_offset(grid: str, symmetric: bool) -> bool:
    """Whether the groups of a grid store an offset beside their scale."""
    return grid in ("uniform", "learned") and not symmetric


def fixed_levels(grid: str, bits: int, symmetric: bool) -> Tensor:
    """Levels of a grid that needs no learning, `[1, 2**bits]` float32 ascending.

    >>> fixed_levels("uniform", bits=2, symmetric=True).tolist()
    [[-2.0, -1.0, 0.0, 1.0]]
    """
    if grid == "nf4":
        return torch.tensor([NF4])
    if grid == "pot":
        powers = 2.0 ** torch.arange(2 ** (bits - 1))
        return torch.cat([-powers.flip(0), powers])[None]
    return torch.arange(2**bits, dtype=torch.float32)[None] + lowest_level(bits, symmetric)


def lowest_level(bits: int, symmetric: bool) -> int:
    """Of the uniform grid, whose levels are consecutive integers.

    >>> lowest_level(bits=2, symmetric=True)
    -2
    """
    return -(2 ** (bits - 1)) if symmetric else 0


def power_levels(bits: int, exponent: float) -> Tensor:
    """Integers `q` from `-2^(b-1)` drawn together towards zero: `sign(q) |q|^(1/a)`, scaled back to the same range.

    Args:
        bits: width of a code.
        exponent: `a`, positive; 1 gives equal steps.

    Returns:
        `[1, 2**bits]` ascending, rounded to float16 values.
    Source: the automorphisms of PowerQuant (arXiv 2301.09858) and NUPES (arXiv 2308.05600), for weights only.

    >>> power_levels(bits=2, exponent=0.5).tolist()
    [[-2.0, -0.5, 0.0, 0.5]]
    """
    integers = fixed_levels("uniform", bits, symmetric=True)
    largest = 2.0 ** (bits - 1)
    return half_precision(integers.sign() * largest * (integers.abs() / largest) ** (1 / exponent))


def search_power(
    weight: Tensor, bits: int, group_size: int | None, importance: Tensor, shrink_steps: int, scale_bits: int | None
) -> float:
    """The exponent with the least weighted error, each tried with its own best clipping, on some rows.

    Args:
        weight: `[out, in]` float32.
        bits: width of a code.
        group_size: inputs per group, None for the row.
        importance: `[in]` non-negative.
        shrink_steps: see `search_scale`.
        scale_bits: see `stored_scale`.

    Returns:
        What `power_levels` takes; 1 where no other is better.
    """
    rows = weight[:: max(1, len(weight) // _POWER_ROWS)]
    best, least = 1.0, math.inf
    for exponent in _EXPONENTS:
        levels = power_levels(bits, exponent)
        scale, _ = search_scale(rows, levels, group_size, True, importance, shrink_steps, scale_bits)
        value = Rounder(levels, len(rows))(rows, spread_groups(scale, group_size, rows.shape[1]), None)[1]
        error = ((value - rows).square() * importance).sum().item()
        if error < least:
            best, least = exponent, error
    return best


def refit_power(
    weight: Tensor, codes: Tensor, scale: Tensor, exponent: float, bits: int, group_size: int | None, gram: Tensor
) -> float:
    """The exponent that minimises the output error for codes and scales that stay as they are, by gradient.

    With `p = 1 / a` a level is `sign(q) L exp(p log(|q| / L))` and its slope `level * log(|q| / L)`, 0 at `q = 0`, where the
    logarithm is never taken. Steps are those of Gauss and Newton: `<E G, J> / <J G, J>` with the error `E` and the slope `J`.

    Args:
        weight: `[out, in]` float32. Not written to.
        codes: `[out, in]` indices into the levels.
        scale: `[out, G]` as stored.
        exponent: to start from; it stands unless the error of the levels as stored falls.
        bits: width of a code.
        group_size: inputs per group, None for the row.
        gram: `[in, in]` float32.

    Returns:
        The exponent, in [0.2, 1.4] if it changed.
    Source: the learned exponent of NUPES (arXiv 2308.05600). It moves the integers by gradient too; `descend_codes` moves
        them exactly.
    """
    integers = fixed_levels("uniform", bits, symmetric=True)
    largest = 2.0 ** (bits - 1)
    logarithm = torch.where(integers == 0, 1.0, integers.abs() / largest).log()

    def values(table: Tensor) -> Tensor:
        return dequantize(Quantized(codes, scale, None, table), group_size, is_uniform=False)

    def loss(candidate: float) -> float:
        difference = values(power_levels(bits, candidate)) - weight
        return (difference @ gram * difference).sum().item()

    inverse = 1 / exponent
    for _ in range(_POWER_STEPS):
        levels = integers.sign() * largest * (inverse * logarithm).exp()
        slope = values(levels * logarithm)
        through = slope @ gram
        curvature = (through * slope).sum().item()
        if not curvature > 0:  # two bits of which only the ends are in use, or zeros alone
            return exponent
        step = (through * (values(levels) - weight)).sum().item() / curvature
        inverse = min(max(inverse - step, 1 / _EXPONENT_RANGE[1]), 1 / _EXPONENT_RANGE[0])
    return 1 / inverse if loss(1 / inverse) < loss(exponent) else exponent


def split_borders(unit: Tensor, importance: Tensor) -> Tensor:
    """Where SplitQuant cuts a matrix into a lower, a middle and an upper part, `[2]`: between the centres of 3-means.

    >>> split_borders(torch.tensor([[-4.0, -4.0, 0.0, 0.0, 8.0, 8.0]]), torch.ones(6)).tolist()
    [-2.0, 4.0]
    """
    centres = lloyd_levels(unit, importance, SPLIT_PARTS, tables=1)[0]
    return (centres[1:] + centres[:-1]) / 2


def split_levels(unit: Tensor, bits: int, importance: Tensor) -> Tensor:
    """`2**bits` equal steps in each of three parts of the range, as one table.

    A code is the merged index: the part and the step in it, `bits + 2` bits as stored. The outer ranges end where
    their weights end, so none of their levels is spent on zero.

    Args:
        unit: `[out, in]`, scaled weights. Not written to.
        bits: of a part.
        importance: `[out, in]` or `[in]` non-negative.

    Returns:
        `[1, 3 * 2**bits]` ascending, rounded to float16 values.
    Source: SplitQuant (arXiv 2501.12428), three layers of `bits` bits each whose outputs add up. That form is not offered:
        the same values take `3 * bits` bits, two thirds of them for zeros, and three products. Differs too by rows that
        are brought to one scale first and by steps fitted by Lloyd's algorithm, not from the smallest to the largest weight.
    """
    borders = split_borders(unit, importance)
    part = torch.bucketize(unit, borders)
    importance = importance.expand_as(unit)
    tables = []
    for number in range(SPLIT_PARTS):
        inside = part == number
        values, mass = unit[inside].double(), importance[inside].double() + 1e-12
        low, high = values.aminmax() if len(values) else 2 * (borders[min(number, 1)].double(),)
        tables.append(_fit_steps(values, mass, low, high, 2**bits))
    return half_precision(torch.cat(tables).float())[None]


def _fit_steps(values: Tensor, mass: Tensor, low: Tensor, high: Tensor, count: int) -> Tensor:
    """Equally spaced levels inside [low, high] for weighted values: nearest codes and regression on them in turns."""
    first, step = low, (high - low) / (count - 1)
    for _ in range(_SPLIT_STEPS if high > low else 0):
        codes = ((values - first) / step).round_().clamp_(0, count - 1)
        mean_code, mean = (mass * codes).sum() / mass.sum(), (mass * values).sum() / mass.sum()
        spread = (mass * (codes - mean_code).square()).sum()
        if not spread > 0:
            break
        step = (mass * (codes - mean_code) * (values - mean)).sum() / spread
        first = mean - step * mean_code
    last = torch.minimum(first + step * (count - 1), high)
    first = torch.maximum(first, low)
    return first + (last - first) * torch.arange(count, device=values.device) / (count - 1)


def dequantize(quantized: Quantized, group_size: int | None, is_uniform: bool | None = None) -> Tensor:
    """The matrix that the codes stand for, `[out, in]` in the dtype of `quantized.scale`.

    `is_uniform` says that the levels are consecutive integers, where the caller knows; it saves a look at them.

    >>> q = Quantized(torch.tensor([[0, 3]], dtype=torch.uint8), torch.tensor([[0.5]]), None, torch.tensor([[-1., 0., 1., 2.]]))
    >>> dequantize(q, group_size=None).tolist()
    [[-0.5, 1.0]]
    """
    codes, scale, zero, levels = quantized
    rows = len(codes)
    levels = levels.to(scale.dtype)
    if _is_uniform(levels) if is_uniform is None else is_uniform:
        values = codes.to(scale.dtype) + levels[0, 0]
    else:
        tables = torch.arange(rows, device=codes.device) // math.ceil(rows / len(levels))
        values = look_up(levels.flatten(), codes.long() + (tables * levels.shape[1])[:, None])
    return scale_groups_(values, scale, None if zero is None else zero.to(scale.dtype), group_size)


def search_scale(
    weight: Tensor, levels: Tensor, group_size: int | None, symmetric: bool, importance: Tensor, shrink_steps: int,
    scale_bits: int | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Scale and offset of every group, clipping the range where that lowers the weighted squared error.

    The full range of a group is shrunk in `shrink_steps` steps down to half; each group keeps its best.

    Args:
        weight: `[out, in]` float32. Not written to.
        levels: `[1, K]` ascending.
        group_size: inputs per group, None for the row.
        symmetric: no offset; the levels are scaled to the largest magnitude.
        importance: `[in]` non-negative weights of the columns, the diagonal of the gram matrix or ones.
        shrink_steps: candidates, `>= 1`; 1 keeps the full range.
        scale_bits: see `stored_scale`.

    Returns:
        `(scale [out, G], zero [out, G] | None)` float32, the scale rounded to what storage keeps.
    """
    rounder = Rounder(levels, len(weight))

    def full_range(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        full = torch.maximum(high / levels.max(), low / levels.min()) if symmetric else (high - low) / (levels.shape[1] - 1)
        full = full.clamp_min(1e-7)
        return full, torch.zeros_like(full) if symmetric else (-low / full).round_().clamp_(0, levels.shape[1] - 1)

    def squared_error(groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return (rounder(groups, scale, zero)[1] - groups).square_()

    scale, zero = search_clipping(weight, group_size, importance, shrink_steps, full_range, squared_error, scale_bits)
    return scale, None if symmetric else zero


def group_scale(weight: Tensor, group_size: int | None, scale_bits: int | None = None) -> Tensor:
    """Root mean square of every group, `[out, G]`, as stored: the unit in which rows share a codebook."""
    padding = 0 if group_size is None else -weight.shape[1] % group_size
    groups = torch.nn.functional.pad(weight, (0, padding)).reshape(len(weight), num_groups(weight.shape[1], group_size), -1)
    counts = torch.full((groups.shape[1],), groups.shape[2], dtype=weight.dtype)
    counts[-1] -= padding
    return stored_scale((groups.square().sum(-1) / counts).sqrt(), scale_bits)


class Rounder:
    """Finds the nearest level. Made once per matrix, because a column loop calls it thousands of times."""

    def __init__(self, levels: Tensor, rows: int) -> None:
        """Prepare `levels [tables, K]` ascending for a matrix of `rows` rows."""
        self.first, self.last = levels[0, 0].item(), levels[0, -1].item()
        self.is_uniform = _is_uniform(levels)
        self.levels = _expand_tables(levels, rows)
        self.midpoints = ((self.levels[:, 1:] + self.levels[:, :-1]) / 2).contiguous()

    def __call__(self, values: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor]:
        """Codes (uint8) and dequantized values of `values [out, n]`; `scale` and `zero` broadcast to it."""
        unit = values / scale
        if zero is not None:
            unit += zero
        if self.is_uniform:
            chosen = unit.round_().clamp_(self.first, self.last)
            codes = (chosen - self.first).to(torch.uint8)
        else:
            if len(self.levels) == 1:
                index = torch.bucketize(unit, self.midpoints[0])
                chosen = self.levels[0][index]
            else:
                index = torch.searchsorted(self.midpoints, unit.contiguous())
                chosen = self.levels.gather(1, index)
            codes = index.to(torch.uint8)
        if zero is not None:
            chosen = chosen - zero
        return codes, chosen * scale


def lloyd_levels(unit: Tensor, importance: Tensor, num_levels: int, tables: int, iterations: int = 100) -> Tensor:
    """One-dimensional weighted k-means of the rows of `unit`, one table for every `ceil(out / tables)` rows.

    The values are sorted once; an iteration then only moves `num_levels - 1` borders over cumulative sums.

    Args:
        unit: `[out, in]`, scaled weights. Not written to.
        importance: `[out, in]` or `[in]` non-negative.
        num_levels: levels of a table, `2**bits`.
        tables: how many tables the rows share.
        iterations: at most; fewer if nothing moves any more.

    Returns:
        `[tables, num_levels]` float32 ascending, rounded to float16 values.
    Source: Lloyd 1982; weights as in SqueezeLLM, arXiv 2306.07629, with the gram diagonal instead of the Fisher one.

    >>> lloyd_levels(torch.tensor([[0., 0., 1., 1.]]), torch.ones(4), num_levels=2, tables=1).tolist()
    [[0.0, 1.0]]
    """
    rows, columns = unit.shape
    per_table = math.ceil(rows / tables)
    padding = per_table * tables - rows
    importance = importance.expand_as(unit)
    if padding:
        unit = torch.cat([unit, unit[-1:].expand(padding, -1)])
        importance = torch.cat([importance, importance.new_zeros(padding, columns)])
    values, order = unit.reshape(tables, -1).sort(1)
    mass = importance.reshape(tables, -1).gather(1, order).double() + 1e-12
    zeros = mass.new_zeros(tables, 1)
    mass_below = torch.cat([zeros, mass.cumsum(1)], 1)
    moment_below = torch.cat([zeros, (mass * values).cumsum(1)], 1)
    # Quantiles put a level into every cluster, but too few into the tails, which take their time: at four bits, 30
    # iterations still leave 12 % more error on normal values than 100.
    positions = torch.linspace(0, 1, num_levels + 2, dtype=torch.float64, device=unit.device)[1:-1]
    levels = values.gather(1, (positions * (values.shape[1] - 1)).long().expand(tables, -1)).double()
    ends = torch.full((tables, 1), values.shape[1], device=unit.device)
    for _ in range(iterations):
        borders = torch.searchsorted(values, ((levels[:, 1:] + levels[:, :-1]) / 2).to(values.dtype))
        borders = torch.cat([torch.zeros_like(ends), borders, ends], 1)
        mass_in = mass_below.gather(1, borders).diff(dim=1)
        moment_in = moment_below.gather(1, borders).diff(dim=1)
        levels = torch.where(mass_in > 0, moment_in / mass_in.clamp_min(1e-30), levels).sort(1).values
    return half_precision(levels.float())


def refit_levels(
    weight: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, levels: Tensor, group_size: int | None, gram: Tensor
) -> Tensor:
    """Codebooks that minimise the output error for codes and scales that stay as they are, in closed form.

    With `S_k` the scaled indicator of level k, a table solves the K x K system `(sum_rows S G S^T) c = sum_rows S G w`.
    A table whose error rounding to float16 would raise keeps its levels.

    Args:
        weight: `[out, in]` float32. Not written to.
        codes: `[out, in]` indices into the levels.
        scale: `[out, G]` as stored.
        zero: `[out, G]` or None.
        levels: `[tables, K]`, the ridge pulls towards it; it stands where a level is not used.
        group_size: inputs per group, None for the row.
        gram: `[in, in]` float32.

    Returns:
        `[tables, K]`, rounded to float16 values; not sorted.
    Source: the codebook step of AQLM (arXiv 2401.06118) and LeanQuant, per table and with a 1e-4 ridge.
    """
    tables, num_levels = levels.shape
    per_table = math.ceil(len(weight) / tables)
    spread = spread_groups(scale, group_size, weight.shape[1]).expand_as(weight)
    indicators = [spread * (codes == k) for k in range(num_levels)]
    if zero is not None:  # the levels have to make up for the offset too
        weight = weight + spread * spread_groups(zero, group_size, weight.shape[1])
    response = weight @ gram

    def per_row_group(values: Tensor) -> Tensor:
        rows = torch.nn.functional.pad(values.sum(1).double(), (0, per_table * tables - len(weight)))
        return rows.view(tables, per_table).sum(1)

    normal = torch.empty(tables, num_levels, num_levels, dtype=torch.float64)
    target = torch.empty(tables, num_levels, dtype=torch.float64)
    for k, indicator in enumerate(indicators):
        through = indicator @ gram
        target[:, k] = per_row_group(response * indicator)
        for other in range(k, num_levels):
            normal[:, k, other] = normal[:, other, k] = per_row_group(through * indicators[other])
    ridge = 1e-4 * normal.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).clamp_min(1e-12)
    normal.diagonal(dim1=1, dim2=2).add_(ridge)
    target += ridge * levels
    solution = half_precision(torch.linalg.solve(normal, target).float())
    return torch.where(quadratic(normal, target, solution) <= quadratic(normal, target, levels), solution, levels)


def sort_levels(codes: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Tables in ascending order, with codes that stand for the values they stood for.

    >>> sort_levels(torch.tensor([[0, 1, 1]], dtype=torch.uint8), torch.tensor([[2.0, 1.0]]))
    (tensor([[1, 0, 0]], dtype=torch.uint8), tensor([[1., 2.]]))
    """
    levels, order = levels.sort(1)
    rank = _expand_tables(order.argsort(1), len(codes)).expand(len(codes), -1)
    return rank.gather(1, codes.long()).to(torch.uint8), levels


def _is_uniform(levels: Tensor) -> bool:
    """Whether one table of consecutive integers serves all rows."""
    return len(levels) == 1 and bool((levels[0].diff() == 1).all())


def _expand_tables(tables: Tensor, rows: int) -> Tensor:
    """One table per row, or the single shared one as it is."""
    return tables if len(tables) == 1 else tables.repeat_interleave(math.ceil(rows / len(tables)), 0)[:rows].contiguous()
