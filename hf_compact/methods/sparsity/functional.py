"""Masks of single weights, their schedule, and a product whose two directions have masks of their own."""

from typing import Any

import torch
from torch import Tensor


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
