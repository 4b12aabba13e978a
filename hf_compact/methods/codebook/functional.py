"""Weight-only quantization to codebooks: nearest or with error feedback, then closed-form refits.

Every grid is one thing: a weight is `scale[row, group] * (levels[table, code] - zero[row, group])`. A uniform grid
has the levels 0..2^b-1, NF4 sixteen fixed ones, a learned grid one table for every `rows_per_codebook` rows, a power
grid one table for the matrix. The
solvers never look inside a grid: they ask for the nearest value. They work on the transposed weight [in, out], so
that one input column is contiguous and the rank-1 update of a step touches memory in order.

Alternative rejected: one solver per grid, as most libraries have; rounding and grid are independent choices.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

#: Levels of NormalFloat-4, QLoRA (arXiv 2305.14314), appendix E.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_EXPONENTS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
_POWER_ROWS = 256  # rows on which exponents are tried
_BLOCK = 128  # columns between two delayed updates of the rest of the matrix


class Quantized(NamedTuple):
    """A quantized matrix `[out, in]`; `G` groups of `group_size` inputs each, the last one may be shorter."""

    codes: Tensor
    """`[out, in]` uint8 indices into the levels."""
    scale: Tensor
    """`[out, G]`, rounded to float16 values."""
    zero: Tensor | None
    """`[out, G]` integer offset in units of the levels, or None for a grid without offset."""
    levels: Tensor
    """`[tables, 2**bits]` ascending; row `r` uses table `r // ceil(out / tables)`."""


def num_groups(in_features: int, group_size: int | None) -> int:
    """Groups of a row; `group_size=None` is one group per row.

    >>> num_groups(576, 128)
    5
    """
    return 1 if group_size is None else math.ceil(in_features / group_size)


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
    levels = torch.arange(2**bits, dtype=torch.float32)[None]
    return levels - 2 ** (bits - 1) if symmetric else levels


def power_levels(bits: int, exponent: float) -> Tensor:
    """Integers `q` from `-2^(b-1)` drawn together towards zero: `sign(q) |q|^(1/a)`, scaled back to the same range.

    Args:
        bits: width of a code.
        exponent: `a` in (0, 1]; 1 gives equal steps.

    Returns:
        `[1, 2**bits]` ascending, rounded to float16 values.
    Source: the automorphisms of PowerQuant (arXiv 2301.09858) and NUPES (arXiv 2308.05600), for weights only.

    >>> power_levels(bits=2, exponent=0.5).tolist()
    [[-2.0, -0.5, 0.0, 0.5]]
    """
    integers = fixed_levels("uniform", bits, symmetric=True)
    largest = 2.0 ** (bits - 1)
    return _half_precision(integers.sign() * largest * (integers.abs() / largest) ** (1 / exponent))


def search_power(
    weight: Tensor, bits: int, group_size: int | None, importance: Tensor, shrink_steps: int, scale_bits: int | None
) -> Tensor:
    """Levels of the exponent with the least weighted error, each tried with its own best clipping, on some rows.

    Args:
        weight: `[out, in]` float32.
        bits: width of a code.
        group_size: inputs per group, None for the row.
        importance: `[in]` non-negative.
        shrink_steps: see `search_scale`.
        scale_bits: see `stored_scale`.

    Returns:
        `[1, 2**bits]`, see `power_levels`.
    """
    rows = weight[:: max(1, len(weight) // _POWER_ROWS)]
    best, least = fixed_levels("uniform", bits, symmetric=True), math.inf
    for exponent in _EXPONENTS:
        levels = power_levels(bits, exponent)
        scale, _ = search_scale(rows, levels, group_size, True, importance, shrink_steps, scale_bits)
        value = Rounder(levels, len(rows))(rows, spread_groups(scale, group_size, rows.shape[1]), None)[1]
        error = ((value - rows).square() * importance).sum().item()
        if error < least:
            best, least = levels, error
    return best


def dequantize(quantized: Quantized, group_size: int | None, is_uniform: bool | None = None) -> Tensor:
    """The matrix that the codes stand for, `[out, in]` in the dtype of `quantized.scale`.

    `is_uniform` says that the levels are consecutive integers, where the caller knows; it saves a look at them.

    >>> q = Quantized(torch.tensor([[0, 3]], dtype=torch.uint8), torch.tensor([[0.5]]), None, torch.tensor([[-1., 0., 1., 2.]]))
    >>> dequantize(q, group_size=None).tolist()
    [[-0.5, 1.0]]
    """
    codes, scale, zero, levels = quantized
    rows, columns = codes.shape
    levels = levels.to(scale.dtype)
    if _is_uniform(levels) if is_uniform is None else is_uniform:
        values = codes.to(scale.dtype) + levels[0, 0]
    elif len(levels) == 1:
        values = levels[0][codes.int()]
    else:
        tables = torch.arange(rows, device=codes.device) // math.ceil(rows / len(levels))
        values = levels.flatten()[codes.int() + (tables * levels.shape[1])[:, None].int()]
    if zero is not None:
        values = values - spread_groups(zero.to(scale.dtype), group_size, columns)
    return values.mul_(spread_groups(scale, group_size, columns))


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
    rows, columns = weight.shape
    size = columns if group_size is None else group_size
    padding = -columns % size
    # A short last group is filled with its own first value, which changes neither its range nor, at weight 0, its error.
    groups = torch.cat([weight, weight[:, columns - (size - padding), None].expand(-1, padding)], 1) if padding else weight
    groups = groups.reshape(rows, -1, size)
    importance = torch.nn.functional.pad(importance.float(), (0, padding)).reshape(1, -1, size)
    low, high = groups.amin(-1, keepdim=True).clamp_max(0), groups.amax(-1, keepdim=True).clamp_min(0)
    full = torch.maximum(high / levels.max(), low / levels.min()) if symmetric else (high - low) / (levels.shape[1] - 1)
    full = full.clamp_min(1e-7)
    rounder = Rounder(levels, rows)
    best_error = torch.full_like(full, math.inf)
    best_scale, best_zero = full, torch.zeros_like(full)
    for step in range(shrink_steps):
        scale = _half_scale(full * (1 - 0.5 * step / shrink_steps))
        zero = torch.zeros_like(full) if symmetric else (-low / full).round_().clamp_(0, levels.shape[1] - 1)
        value = rounder(groups, scale, zero)[1]
        error = ((value - groups).square_() * importance).sum(-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    scale = stored_scale(best_scale.squeeze(-1), scale_bits)
    return scale, None if symmetric else best_zero.squeeze(-1)


def scale_codes(scale: Tensor, scale_bits: int) -> tuple[Tensor, Tensor]:
    """Scales as small integers times one step per row: half precision for each group would cost more than it brings.

    Args:
        scale: `[out, G]` positive.
        scale_bits: bits of a code, in [2, 8].

    Returns:
        `(codes [out, G] in 1 … 2**scale_bits - 1, step [out, 1] float16 values)`; their product is a fixed point.
    """
    largest = 2**scale_bits - 1
    step = _half_scale(scale.amax(1, keepdim=True) / largest)
    return (scale / step).round_().clamp_(1, largest), step


def stored_scale(scale: Tensor, scale_bits: int | None) -> Tensor:
    """Scales `[out, G]` rounded to what storage keeps: float16, or `scale_codes` of `scale_bits`."""
    if scale_bits is None:
        return _half_scale(scale)
    codes, step = scale_codes(scale, scale_bits)
    return codes * step


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
    return _half_precision(levels.float())


def round_with_feedback(
    weight: Tensor, rounder: Rounder, scale: Tensor, zero: Tensor | None, group_size: int | None, factor: Tensor, order: Tensor
) -> tuple[Tensor, Tensor]:
    """Round column by column and move each column's error onto the columns that are still free.

    Args:
        weight: `[out, in]` float32. Not written to.
        rounder: finds the nearest level.
        scale: `[out, G]`, fixed before the first step ("static groups").
        zero: `[out, G]` likewise, or None.
        group_size: inputs per group, None for the row.
        factor: `[in, in]` upper factor of the inverse gram matrix, **in processing order** (`inverse_factor`).
        order: `[in]` the input column that each step rounds.

    Returns:
        `(codes uint8, dequantized float32)`, both `[out, in]` in the original column order.
    Source: GPTQ, arXiv 2210.17323, algorithm 1, with delayed updates in blocks of 128 columns.
    """
    free = weight.T[order].contiguous()
    codes, dense = torch.empty_like(free, dtype=torch.uint8), torch.empty_like(free)
    columns = _columns(scale, zero, group_size, order)
    for start in range(0, len(free), _BLOCK):
        stop = min(start + _BLOCK, len(free))
        block = free[start:stop]
        errors = torch.empty_like(block)
        diagonal = factor.diagonal()[start:stop].tolist()
        for step in range(stop - start):
            position = start + step
            code, value = rounder(block[step, :, None], *columns(position))
            codes[position], dense[position] = code[:, 0], value[:, 0]
            torch.sub(block[step], value[:, 0], out=errors[step]).div_(diagonal[step])
            block[step + 1 :].addr_(factor[position, position + 1 : stop], errors[step], alpha=-1)
        free[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    back = order.argsort()
    return codes[back].T.contiguous(), dense[back].T.contiguous()


def descend_codes(
    weight: Tensor,
    quantized: Tensor,
    rounder: Rounder,
    scale: Tensor,
    zero: Tensor | None,
    group_size: int | None,
    gram: Tensor,
    order: Tensor,
) -> tuple[Tensor, Tensor]:
    """One sweep of coordinate descent: every code in turn takes the value that is best given all others.

    Never raises the output error `tr(D G D^T)`, because the value in place is among the candidates.

    Args:
        weight: `[out, in]` float32 target. Not written to.
        quantized: `[out, in]` float32 values on the grid to start from. Not written to.
        rounder: finds the nearest level.
        scale: `[out, G]` as stored.
        zero: `[out, G]` or None.
        group_size: inputs per group, None for the row.
        order: `[in]` the input column that each step visits.
        gram: `[in, in]` float32, with a positive diagonal.

    Returns:
        As `round_with_feedback`.
    """
    gram = gram[order[:, None], order]
    diagonal = gram.diagonal()
    dense = quantized.T[order].contiguous()
    codes = torch.empty_like(dense, dtype=torch.uint8)
    slope = gram @ (dense - weight.T[order])
    columns = _columns(scale, zero, group_size, order)
    for start in range(0, len(dense), _BLOCK):
        stop = min(start + _BLOCK, len(dense))
        local = slope[start:stop]
        changes = torch.empty_like(local)
        for step in range(stop - start):
            position = start + step
            target = dense[position] - local[step] / diagonal[position]
            code, value = rounder(target[:, None], *columns(position))
            torch.sub(value[:, 0], dense[position], out=changes[step])
            codes[position], dense[position] = code[:, 0], value[:, 0]
            local[step + 1 :].addr_(gram[position, start + step + 1 : stop], changes[step])
        slope[stop:].addmm_(gram[start:stop, stop:].T, changes)
    back = order.argsort()
    return codes[back].T.contiguous(), dense[back].T.contiguous()


def refit_scale(
    weight: Tensor, unit: Tensor, scale: Tensor, group_size: int | None, gram: Tensor, scale_bits: int | None = None
) -> Tensor:
    """Scales that minimise the output error for codes that stay as they are, in closed form.

    A row is `sum_g scale_g b_g` with `b_g` its unit values inside group g; the normal equations are G x G per row.
    A row whose error would rise by rounding to what storage keeps, or by a scale that is not positive, keeps its scales.

    Args:
        weight: `[out, in]` float32. Not written to.
        unit: `[out, in]` float32, the dequantized values at scale 1.
        scale: `[out, G]` as stored, kept where the solution would not be positive and finite.
        group_size: inputs per group, None for the row.
        gram: `[in, in]` float32.
        scale_bits: see `stored_scale`.

    Returns:
        `[out, G]`, rounded to what storage keeps.
    """
    groups = scale.shape[1]
    rows = max(1, 2**25 // groups**2)  # at most 256 MB of normal equations at a time; rows do not depend on each other
    if len(weight) > rows:
        parts = zip(weight.split(rows), unit.split(rows), scale.split(rows), strict=True)
        return torch.cat([refit_scale(w, u, s, group_size, gram, scale_bits) for w, u, s in parts])
    size = weight.shape[1] if group_size is None else group_size
    padding = groups * size - weight.shape[1]

    def per_group(values: Tensor) -> Tensor:
        return torch.nn.functional.pad(values, (0, padding)).view(len(weight), groups, size).sum(-1)

    normal = torch.empty(len(weight), groups, groups, dtype=torch.float64)
    for g in range(groups):
        span = slice(g * size, min((g + 1) * size, weight.shape[1]))
        normal[:, g] = per_group((unit[:, span] @ gram[span]).mul_(unit))
    target = per_group(weight @ gram * unit).double()
    ridge = 1e-6 * normal.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
    normal.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    target += ridge[:, None] * scale
    solution = torch.linalg.solve(normal, target).float()
    solution = stored_scale(torch.where(solution.isfinite() & (solution > 0), solution, scale), scale_bits)
    return torch.where(_quadratic(normal, target, solution) <= _quadratic(normal, target, scale), solution, scale)


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
    solution = _half_precision(torch.linalg.solve(normal, target).float())
    return torch.where(_quadratic(normal, target, solution) <= _quadratic(normal, target, levels), solution, levels)


def sort_levels(codes: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Tables in ascending order, with codes that stand for the values they stood for.

    >>> sort_levels(torch.tensor([[0, 1, 1]], dtype=torch.uint8), torch.tensor([[2.0, 1.0]]))
    (tensor([[1, 0, 0]], dtype=torch.uint8), tensor([[1., 2.]]))
    """
    levels, order = levels.sort(1)
    rank = _expand_tables(order.argsort(1), len(codes)).expand(len(codes), -1)
    return rank.gather(1, codes.long()).to(torch.uint8), levels


def _quadratic(normal: Tensor, target: Tensor, candidate: Tensor) -> Tensor:
    """What the solution of `normal x = target` minimises, `[n, 1]` for `n` systems."""
    candidate = candidate.double()
    return (candidate * ((normal @ candidate[..., None])[..., 0] - 2 * target)).sum(1, keepdim=True)


def _is_uniform(levels: Tensor) -> bool:
    """Whether one table of consecutive integers serves all rows."""
    return len(levels) == 1 and bool((levels[0].diff() == 1).all())


def _expand_tables(tables: Tensor, rows: int) -> Tensor:
    """One table per row, or the single shared one as it is."""
    return tables if len(tables) == 1 else tables.repeat_interleave(math.ceil(rows / len(tables)), 0)[:rows].contiguous()


def spread_groups(per_group: Tensor, group_size: int | None, columns: int) -> Tensor:
    """`[out, G]` to `[out, columns]`, or `[out, 1]` where one group spans the row."""
    return per_group if per_group.shape[1] == 1 else per_group.repeat_interleave(group_size, 1)[:, :columns]


def _half_precision(values: Tensor) -> Tensor:
    """Round to what float16 storage keeps, without overflow."""
    limit = torch.finfo(torch.float16).max
    return values.clamp(-limit, limit).half().float()


def _half_scale(values: Tensor) -> Tensor:
    """The same for scales, which stay positive."""
    return _half_precision(values.clamp_min(torch.finfo(torch.float16).smallest_normal))


def _columns(
    scale: Tensor, zero: Tensor | None, group_size: int | None, order: Tensor
) -> Callable[[int], tuple[Tensor, Tensor | None]]:
    """A function from a processing position to the `[out, 1]` scale and offset of that column."""
    groups = [0] * len(order) if group_size is None else (order // group_size).tolist()
    scales = scale.T[..., None].contiguous()
    zeros = None if zero is None else zero.T[..., None].contiguous()
    return lambda position: (scales[groups[position]], None if zeros is None else zeros[groups[position]])
