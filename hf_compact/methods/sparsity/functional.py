"""Masks of single weights, their schedule, and a product whose two directions have masks of their own."""

from typing import Any

import torch
from torch import Tensor

from ...functional.packing import INTEGERS, PART, look_up, unpack_bits


def scheduled_sparsity(step: int, first: int, last: int, interval: int, final: float) -> float:
    """Sparsity that is due after a step: from 0 at the first one to `final` along a cubic, held from the last update on.

    Args:
        step: counted from 1.
        first: step of the first mask.
        last: no update comes later.
        interval: steps between two updates.
        final: zeros / all in the end.
    Source: Zhu and Gupta, arXiv 1710.01878.

    >>> [round(scheduled_sparsity(step, first=2, last=6, interval=2, final=0.8), 3) for step in (1, 2, 3, 4, 6, 7)]
    [0.0, 0.0, 0.0, 0.7, 0.8, 0.8]
    """
    updates = (last - first) // interval
    done = min((step - first) // interval, updates)
    if step < first:
        return 0.0
    return final * (1 - (1 - done / updates) ** 3) if updates else final


def lowest_mask(scores: Tensor, sparsity: float) -> Tensor:
    """Where weights stay: the share with the lowest scores goes, `floor(sparsity * n)` of each row; ties by position.

    Args:
        scores: `[rows, n]`, at least 0.
        sparsity: zeros / all.

    Returns:
        `[rows, n]` bool.

    >>> lowest_mask(torch.tensor([[3.0, 1.0, 1.0, 2.0]]), 0.25).tolist()
    [[True, False, True, True]]
    """
    count = int(sparsity * scores.shape[1] + 1e-9)
    if not count:
        return torch.ones_like(scores, dtype=torch.bool)
    limit = scores.kthvalue(count, dim=1, keepdim=True).values
    below, level = scores < limit, scores == limit
    missing = count - below.sum(1, keepdim=True)
    return ~(below | (level & (level.cumsum(1) <= missing)))


def spread_values(values: Tensor, bitmap: Tensor, columns: int) -> Tensor:
    """Put values where the bits of a bitmap are set, row by row, and zero elsewhere: `dense[mask] = values`, without gradients.

    The place of a value is the number of bits before its own: those of all bytes before, and those in its byte, from a table.

    Args:
        values: `[n]`, of 2, 4 or 8 bytes. Not written to.
        bitmap: `[rows, ceil(columns / 8)]` uint8, the lowest bit first, with `n` bits set.
        columns: of the result.

    Returns:
        `[rows, columns]` in the dtype of `values`.

    >>> spread_values(torch.tensor([0.5, 1.5]), torch.tensor([[1], [4]], dtype=torch.uint8), columns=3).tolist()
    [[0.5, 0.0, 0.0], [0.0, 0.0, 1.5]]
    """
    bits = torch.arange(256, device=bitmap.device)[:, None] >> torch.arange(8, device=bitmap.device) & 1
    before = (bits.cumsum(1) - bits).to(torch.int8).view(torch.int64)[:, 0]  # eight counts are looked up as one
    counts = look_up(bits.sum(1), bitmap.long())
    starts = (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts)
    padded = torch.nn.functional.pad(values, (0, 1))  # bits that are not set may point behind the last one
    dense = values.new_empty(len(bitmap), columns)
    step = max(1, PART // max(1, columns))
    for start in range(0, len(bitmap), step):
        part, found = bitmap[start : start + step], dense[start : start + step]
        places = look_up(before, part.long()).view(torch.int8).unflatten(1, (bitmap.shape[1], 8))
        index = (starts[start : start + step, :, None] + places).flatten(1)[:, :columns]
        torch.gather(padded.expand(len(part), -1), 1, index, out=found)
        # Of the others no bit stays, be they infinite; a fill by a mask is slower.
        integer = INTEGERS[values.element_size()]
        found.view(integer).bitwise_and_(unpack_bits(part, 1, columns).to(integer).neg_())
    return dense


def n_m_mask(scores: Tensor, n: int, m: int, dim: int = 1) -> Tensor:
    """Where weights stay: the `n` highest of every `m` that follow each other along a dimension; ties by position.

    Args:
        scores: `[out, in]`.
        n: how many stay.
        m: of how many.
        dim: 1 along the inputs, 0 along the outputs.

    Returns:
        `[out, in]` bool.

    Raises:
        ValueError: the dimension is no multiple of `m`.

    >>> n_m_mask(torch.tensor([[1.0, 3.0, 2.0, 2.0]]), 2, 4).tolist()
    [[False, True, True, False]]
    """
    if scores.shape[dim] % m:
        raise ValueError(f"{m} must divide the size of dimension {dim}, got {scores.shape[dim]}")
    runs = scores.movedim(dim, -1).unflatten(-1, (-1, m))
    order = runs.argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(runs, dtype=torch.bool).scatter_(-1, order[..., :n], True)
    return mask.flatten(-2).movedim(-1, dim).contiguous()


class TwoMasks(torch.autograd.Function):
    """`y = x (W * F)^T`, `dx = dy (W * B)`, `dW = dy^T x`: dense for the weights, masked for what passes through.

    `x [..., in]`, `W`, `F`, `B` `[out, in]`. With `B = F` this is the straight-through estimator.
    Source: BDWP, arXiv 2309.13015.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, forward_mask: Tensor, backward_mask: Tensor) -> Tensor:
        """The product with `W * F`."""
        ctx.save_for_backward(x, weight, backward_mask)
        return x @ (weight * forward_mask).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of `x` through `W * B` and of all of `W`."""
        (grad,) = grads
        x, weight, mask = ctx.saved_tensors
        return grad @ (weight * mask), grad.flatten(0, -2).T @ x.flatten(0, -2), None, None
