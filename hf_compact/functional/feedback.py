"""Rounding with error feedback and what goes with it: sweeps over the codes, closed-form scales, scales as stored.

The solvers never look inside a grid: they ask a `Rounder` for the nearest value. They work on the transposed weight
[in, out], so that one input column is contiguous and the rank-1 update of a step touches memory in order.
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

_BLOCK = 128  # columns between two delayed updates of the rest of the matrix
_SMALLEST_HALF = 2.0**-24  # below the normal numbers, also the distance between two


class Rounder(Protocol):
    """Finds the nearest level."""

    def __call__(self, values: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor]:
        """Codes (uint8) and dequantized values of `values [out, n]`; `scale` and `zero` broadcast to it."""


def num_groups(in_features: int, group_size: int | None) -> int:
    """Groups of a row; `group_size=None` is one group per row.

    >>> num_groups(576, 128)
    5
    """
    return 1 if group_size is None else math.ceil(in_features / group_size)


def search_clipping(
    weight: Tensor, group_size: int | None, importance: Tensor, shrink_steps: int,
    full_range: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], squared_error: Callable[[Tensor, Tensor, Tensor], Tensor],
    scale_bits: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scale and offset of every group, clipping the range where that lowers the weighted squared error.

    The full range of a group is shrunk in `shrink_steps` steps down to half; each group keeps its best.

    Args:
        weight: `[out, in]` float32. Not written to.
        group_size: inputs per group, None for the row.
        importance: `[in]` non-negative weights of the columns, the diagonal of the gram matrix or ones.
        shrink_steps: candidates, `>= 1`; 1 keeps the full range.
        full_range: `(low [out, G, 1] <= 0, high >= 0) -> (scale, zero)` that just covers it.
        squared_error: `(groups [out, G, size], scale, zero) -> [out, G, size]`, of rounding them.
        scale_bits: see `stored_scale`.

    Returns:
        `(scale [out, G], zero [out, G])` float32, the scale rounded to what storage keeps.
    """
    rows, columns = weight.shape
    size = columns if group_size is None else group_size
    padding = -columns % size
    # A short last group is filled with its own first value, which changes neither its range nor, at weight 0, its error.
    groups = torch.cat([weight, weight[:, columns - (size - padding), None].expand(-1, padding)], 1) if padding else weight
    groups = groups.reshape(rows, -1, size)
    importance = torch.nn.functional.pad(importance.float(), (0, padding)).reshape(1, -1, size)
    full, zero = full_range(groups.amin(-1, keepdim=True).clamp_max(0), groups.amax(-1, keepdim=True).clamp_min(0))
    best_error = torch.full_like(full, math.inf)
    best_scale = full
    for step in range(shrink_steps):
        scale = half_scale(full * (1 - 0.5 * step / shrink_steps))
        error = (squared_error(groups, scale, zero) * importance).sum(-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
    return stored_scale(best_scale.squeeze(-1), scale_bits), zero.squeeze(-1)


def scale_codes(scale: Tensor, scale_bits: int) -> tuple[Tensor, Tensor]:
    """Scales as small integers times one step per row: half precision for each group would cost more than it brings.

    Args:
        scale: `[out, G]` positive.
        scale_bits: bits of a code, in [2, 8].

    Returns:
        `(codes [out, G] in 1 … 2**scale_bits - 1, step [out, 1] float16 values)`; their product is a fixed point.
    """
    largest = 2**scale_bits - 1
    # A step below this is rounded by more than 1 / (2 largest): that would leave the largest code out, and storing its scales
    # again change them. Groups of smaller scales get fewer codes, which eight bits feel first.
    step = half_scale((scale.amax(1, keepdim=True) / largest).clamp_min(largest * _SMALLEST_HALF))
    return (scale / step).round_().clamp_(1, largest), step


def stored_scale(scale: Tensor, scale_bits: int | None) -> Tensor:
    """Scales `[out, G]` rounded to what storage keeps: float16, or `scale_codes` of `scale_bits`."""
    if scale_bits is None:
        return half_scale(scale)
    codes, step = scale_codes(scale, scale_bits)
    return codes * step


def spread_groups(per_group: Tensor, group_size: int | None, columns: int) -> Tensor:
    """`[out, G]` to `[out, columns]`, or `[out, 1]` where one group spans the row."""
    if group_size is None or per_group.shape[1] == 1:
        return per_group
    return per_group.repeat_interleave(group_size, 1)[:, :columns]


def scale_groups_(values: Tensor, scale: Tensor, zero: Tensor | None, group_size: int | None) -> Tensor:
    """`(values - zero) * scale`, in `values`.

    Args:
        values: `[out, in]`; written to.
        scale: `[out, G]` in the dtype of `values`.
        zero: likewise, or None.
        group_size: inputs per group, None for the row.

    Returns:
        `values`.

    >>> scale_groups_(torch.ones(1, 4), torch.tensor([[2.0, 3.0]]), None, 2).tolist()
    [[2.0, 2.0, 3.0, 3.0]]
    """
    columns = values.shape[1]
    is_even = group_size is not None and columns % group_size == 0  # groups then broadcast, without a copy of the matrix's size
    groups = values.unflatten(1, (-1, group_size)) if is_even else values

    def spread(per_group: Tensor) -> Tensor:
        return per_group[..., None] if is_even else spread_groups(per_group, group_size, columns)

    if zero is not None:
        groups.sub_(spread(zero))
    groups.mul_(spread(scale))
    return values


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
        weight: `[out, in]` float32, or `[views, out, in]` whose errors add up. Not written to.
        unit: of the same shape, the dequantized values at scale 1.
        scale: `[out, G]` as stored, kept where the solution would not be positive and finite.
        group_size: inputs per group, None for the row.
        gram: `[in, in]` float32.
        scale_bits: see `stored_scale`.

    Returns:
        `[out, G]`, rounded to what storage keeps.
    """
    groups = scale.shape[1]
    rows = max(1, 2**25 // groups**2)  # at most 256 MB of normal equations at a time; rows do not depend on each other
    if len(scale) > rows:
        parts = zip(weight.split(rows, -2), unit.split(rows, -2), scale.split(rows), strict=True)
        return torch.cat([refit_scale(w, u, s, group_size, gram, scale_bits) for w, u, s in parts])
    columns = weight.shape[-1]
    size = columns if group_size is None else group_size
    padding = groups * size - columns

    def per_group(values: Tensor) -> Tensor:
        return torch.nn.functional.pad(values, (0, padding)).view(-1, len(scale), groups, size).sum((0, -1))

    normal = torch.empty(len(scale), groups, groups, dtype=torch.float64)
    for g in range(groups):
        span = slice(g * size, min((g + 1) * size, columns))
        normal[:, g] = per_group((unit[..., span] @ gram[span]).mul_(unit))
    target = per_group(weight @ gram * unit).double()
    ridge = 1e-6 * normal.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
    normal.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    target += ridge[:, None] * scale
    solution = torch.linalg.solve(normal, target).float()
    solution = stored_scale(torch.where(solution.isfinite() & (solution > 0), solution, scale), scale_bits)
    return torch.where(quadratic(normal, target, solution) <= quadratic(normal, target, scale), solution, scale)


def quadratic(normal: Tensor, target: Tensor, candidate: Tensor) -> Tensor:
    """What the solution of `normal x = target` minimises, `[n, 1]` for `n` systems."""
    candidate = candidate.double()
    return (candidate * ((normal @ candidate[..., None])[..., 0] - 2 * target)).sum(1, keepdim=True)


def half_precision(values: Tensor) -> Tensor:
    """Round to what float16 storage keeps, without overflow."""
    limit = torch.finfo(torch.float16).max
    return values.clamp(-limit, limit).half().float()


def half_scale(values: Tensor) -> Tensor:
    """As `half_precision`, for scales, which stay positive.

    They go down to the smallest number of float16, not to the smallest normal one, below which usual weights put the scales
    of eight bits.
    """
    return half_precision(values.clamp_min(_SMALLEST_HALF))


def _columns(
    scale: Tensor, zero: Tensor | None, group_size: int | None, order: Tensor
) -> Callable[[int], tuple[Tensor, Tensor | None]]:
    """A function from a processing position to the `[out, 1]` scale and offset of that column."""
    groups = [0] * len(order) if group_size is None else (order // group_size).tolist()
    scales = scale.T[..., None].contiguous()
    zeros = None if zero is None else zero.T[..., None].contiguous()
    return lambda position: (scales[groups[position]], None if zeros is None else zeros[groups[position]])
