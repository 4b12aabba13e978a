"""Double rounding: one int8 container whose leading bits, rounded and not cut off, are quantizations of their own.

With `q` the container, its view of `l` bits is `q_l = min(floor(q / 2^(8-l) + 1/2), 2^(l-1) - 1)`, and a weight is
`multiplier[view, row] * scale[row, group] * (2^(8-l) q_l - zero[row, group])`. The 8-bit view is the container itself.

All views are solved at once. For every weight each view has a value that it would like best (its own feedback, its own
sweep); the solver tries the 256 containers and takes the one with the least weighted sum of the views' errors. The
weights decide: with all weight on four bits the rest fills up its codes as well as the rounding rule allows.

Source: Double Rounding (arXiv 2502.01542), for its rule; it trains the views, we solve them from a gram matrix.
Alternative rejected: solve the 4-bit view alone, then the low bits for 4-bit codes that stay as they are. That is the limit
of a weight that outgrows all others, and a 4-bit view that may give way a little is repaid many times at 8 and 6 bits.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...functional.feedback import half_precision, scale_groups_, search_clipping

_CHUNK = 2**14  # weights whose 256 candidates are compared at a time


class Nested(NamedTuple):
    """A quantized matrix `[out, in]`; `G` groups of `group_size` inputs each, the last one may be shorter."""

    codes: Tensor
    """`[out, in]` int8, the container."""
    scale: Tensor
    """`[out, G]` step of the container, rounded to float16 values."""
    zero: Tensor
    """`[out, G]` offset in units of that step, whole numbers that int8 holds."""
    multiplier: Tensor
    """`[views, out]` positive, rounded to float16 values; 1 for the 8-bit view."""


def view_codes(container: Tensor, bits: int) -> Tensor:
    """Codes of the view of `bits` bits: halves round up, and the top code takes what would round beyond it.

    Args:
        container: any shape, int8. Not written to.
        bits: width of the view, in [1, 8].

    >>> view_codes(torch.tensor([-128, -9, -8, 7, 8, 127], dtype=torch.int8), bits=4).tolist()
    [-8, -1, 0, 0, 1, 7]
    """
    if bits == 8:
        return container
    shift = 8 - bits
    rounded = (container.to(torch.int16) + (1 << shift - 1)) >> shift
    return rounded.clamp_(max=2 ** (bits - 1) - 1).to(torch.int8)


def view_levels(widths: Sequence[int]) -> Tensor:
    """What each container stands for in each view, `[views, 256]` float32 in steps of the container, -128 first.

    >>> view_levels((8, 4))[:, 126:130].tolist()
    [[-2.0, -1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
    """
    container = torch.arange(-128, 128, dtype=torch.int8)
    return torch.stack([view_codes(container, bits).float() * 2 ** (8 - bits) for bits in widths])


def dequantize(
    codes: Tensor, bits: int, scale: Tensor, zero: Tensor, group_size: int | None, multiplier: Tensor | None = None
) -> Tensor:  # fmt: skip
    """The matrix that a view stands for, `[out, in]` in the dtype of `scale`.

    Args:
        codes: `[out, in]` int8, the container.
        bits: width of the view.
        scale: `[out, G]`.
        zero: `[out, G]`.
        group_size: inputs per group, None for the row.
        multiplier: `[out]` of this view, None for 1.

    >>> q = torch.tensor([[-128, 7, 24]], dtype=torch.int8)
    >>> dequantize(q, 4, torch.tensor([[0.5]]), torch.tensor([[16]]), group_size=None).tolist()
    [[-72.0, -8.0, 8.0]]
    """
    values = view_codes(codes, bits).to(scale.dtype).mul_(2 ** (8 - bits))
    scale = scale if multiplier is None else scale * multiplier[:, None].to(scale.dtype)
    return scale_groups_(values, scale, zero.to(scale.dtype), group_size)


def round_container(weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The container nearest to `weight`, float32; `scale` and `zero` broadcast to it."""
    return (weight / scale).add_(zero + 0.5).floor_().clamp_(-128, 127)


def search_scale(
    weight: Tensor, widths: Sequence[int], view_weights: Sequence[float], group_size: int | None, importance: Tensor,
    shrink_steps: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scale and offset of every group with the least `sum_l view_weights_l * error_l` of the rounded container's views.

    Offsets are multiples of a 4-bit step where there are lower views: a weight of zero then stays zero at 4 bits and more.
    The full range is what codes of that step span; see `search_clipping`.

    Args:
        weight: `[out, in]` float32. Not written to.
        widths: bits of the views.
        view_weights: their weights.
        group_size: inputs per group, None for the row.
        importance: `[in]` non-negative.
        shrink_steps: candidates, `>= 1`.

    Returns:
        `(scale, zero)`, both `[out, G]` float32.
    """
    steps = [2 ** (8 - bits) for bits in widths]
    tops = [128 - step for step in steps]
    zero_step = 1 if len(widths) == 1 else 16

    def full_range(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        full = ((high - low) / (256 - zero_step)).clamp_min(1e-7)
        return full, (-128 - low / full).div_(zero_step).round_().mul_(zero_step).clamp_(-128, 128 - zero_step)

    def squared_error(groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        container = round_container(groups, scale, zero)
        error = torch.zeros_like(groups)
        for step, top, share in zip(steps, tops, view_weights, strict=True):
            view = container.add(step / 2).div_(step).floor_().mul_(step).clamp_(max=top) if step > 1 else container
            error += (((view - zero) * scale) - groups).square_() * share
        return error

    return search_clipping(weight, group_size, importance, shrink_steps, full_range, squared_error)


class Rounder:
    """Finds the container whose views are nearest to the targets of all views; see `functional/feedback.py`.

    To the solvers it is one matrix `[views * out, in]`, every view's target below the other.
    """

    def __init__(self, widths: Sequence[int], view_weights: Sequence[float], multiplier: Tensor) -> None:
        """Prepare for a matrix with the given `multiplier [views, out]`."""
        self.levels = view_levels(widths)
        # float64: the weights may differ by many orders of magnitude, and squares of levels reach 2^14.
        self.table = torch.cat([self.levels.square(), -2 * self.levels]).double()  # [2 views, 256]
        self.multiplier = multiplier[..., None]  # [views, out, 1]
        self.gain = self.multiplier.square() * torch.tensor(view_weights)[:, None, None]

    def __call__(self, values: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (uint8, the container plus 128) and dequantized values of `values [views * out, n]`.

        `scale` and `zero` broadcast to `[out, n]`.
        """
        views, rows, _ = self.multiplier.shape
        scale = scale * self.multiplier
        unit = values.view(views, rows, -1) / scale + zero
        gain = self.gain.expand_as(unit)
        both = torch.cat([gain, gain * unit]).flatten(1).T.double()  # [weights, 2 views]
        best = torch.cat([(part @ self.table).argmin(1) for part in both.split(_CHUNK)]).view(rows, -1)
        chosen = (self.levels[:, best] - zero).mul_(scale)
        return best.to(torch.uint8).repeat(views, 1), chosen.view(views * rows, -1)


def refit_multiplier(weight: Tensor, views: Tensor, multiplier: Tensor, gram: Tensor) -> Tensor:
    """Factors of the rows of every view that minimise its output error, in closed form: `m = (w G v) / (v G v)`.

    Args:
        weight: `[out, in]` float32. Not written to.
        views: `[views, out, in]` float32, dequantized at multiplier 1; the first is the container.
        multiplier: `[views, out]` that stand where the solution is not positive or rounding it would not help.
        gram: `[in, in]` float32.

    Returns:
        `[views, out]`, rounded to float16 values; 1 for the first view.
    Source: the least-squares rescale of LSQ (arXiv 1902.08153), solved instead of learned.
    """
    through = views @ gram
    target, energy = (through * weight).sum(-1).double(), (through * views).sum(-1).double()
    solution = half_precision((target / energy).float())

    def excess(candidate: Tensor) -> Tensor:
        return candidate * (candidate * energy - 2 * target)

    better = solution.isfinite() & (solution > 0) & (excess(solution) < excess(multiplier))
    found = torch.where(better, solution, multiplier)
    found[0] = 1.0
    return found
