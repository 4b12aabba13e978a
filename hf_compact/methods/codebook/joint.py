"""Jointly learned codebooks and assignments (JLCM): similar rows share a table, and codes move to neighbouring levels.

Both parts of the idea are local. Rows are put in an order in which similar ones are neighbours, so that a table serves
a run of rows. Codes are learned by gradient on the output error in gram form, from where error feedback has put them,
and can only pass to the next level: a jump between distant codewords, which the plain gradient of an assignment
favours, is impossible. Codebooks and scales are refitted in closed form between rounds, which no gradient step beats.

Rows do not depend on each other once the tables stand, so every row keeps the better of what it had and what was found.
"""

import torch
from torch import Tensor

from ...functional.feedback import spread_groups
from .functional import Quantized, Rounder, dequantize

_QUANTILES = 16
_MOMENTUM = 0.8
_RATES = {"proximal": 0.05, "soft": 0.02}  # of a Newton step along each weight; halved ones gain less, doubled ones diverge
_PENALTY = (0.1, 3.0)  # of an undecided assignment, from the first step to the last, in units of its curvature


def similarity(weight: Tensor) -> Tensor:
    """One number per row by which rows of like shape come to lie next to each other.

    The shape of a row is its quantiles, skewness and kurtosis at unit spread, and the spread's logarithm; the number is
    its coordinate along the direction in which the rows' shapes differ most.

    Args:
        weight: `[out, in]` float32.

    Returns:
        `[out]`; its sign is fixed by the row of the largest magnitude.

    >>> flat, peaked = torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64) ** 5
    >>> similarity(torch.stack([flat, peaked, flat, peaked])).argsort(stable=True).tolist() in ([0, 2, 1, 3], [1, 3, 0, 2])
    True
    """
    spread = weight.std(1, keepdim=True).clamp_min(1e-12)
    unit = (weight - weight.mean(1, keepdim=True)) / spread
    ranks = torch.linspace(0.02, 0.98, _QUANTILES, dtype=weight.dtype)
    positions = (ranks * (weight.shape[1] - 1)).round().long()
    moments = [unit.pow(3).mean(1), unit.pow(4).mean(1).clamp_min(1e-12).log(), spread[:, 0].log()]
    shape = torch.cat([unit.sort(1).values[:, positions], torch.stack(moments, 1)], 1).double()
    shape = (shape - shape.mean(0)) / shape.std(0, correction=0).clamp_min(1e-9)
    direction = torch.linalg.eigh(shape.T @ shape).eigenvectors[:, -1]
    score = shape @ direction
    return score * score[score.abs().argmax()].sign()


def learn_codes(
    weight: Tensor, quantized: Quantized, group_size: int | None, gram: Tensor, steps: int, variant: str
) -> Quantized:
    """Move codes to neighbouring levels where that lowers the output error of their row.

    `proximal`: latent weights start at the levels and follow the gradient; a code is the level nearest to its latent.
    `soft`: every code slides between its level and the neighbour it is drawn to; a concave penalty that grows
    pushes it to one of the two.

    Args:
        weight: `[out, in]` float32 target. Not written to.
        quantized: where to start. Not written to.
        group_size: inputs per group, None for the row.
        gram: `[in, in]` float32, with a positive diagonal.
        steps: gradient steps.
        variant: `proximal` or `soft`.

    Returns:
        The same tables, scales and offsets with codes whose error is at most the old one, row by row.
    Source: JLCM's proximal assignment; the soft form after AdaRound (arXiv 2004.10568) on uneven levels. Both differ by
    steps in units of each weight's own curvature and by keeping the best per row.
    """
    dense = dequantize(quantized, group_size)
    found = (_soft if variant == "soft" else _proximal)(weight, quantized, dense, group_size, gram, steps)
    value = dequantize(quantized._replace(codes=found), group_size)
    is_better = _row_errors(value - weight, gram) < _row_errors(dense - weight, gram)
    return quantized._replace(codes=torch.where(is_better[:, None], found, quantized.codes))


def _proximal(weight: Tensor, quantized: Quantized, dense: Tensor, group_size: int | None, gram: Tensor, steps: int) -> Tensor:
    """Codes of the best step of every row."""
    scale, zero = _spread(quantized, group_size, weight.shape[1])
    rounder = Rounder(quantized.levels, len(weight))
    latent, codes, value = dense.clone(), quantized.codes, dense
    best_codes, best = codes.clone(), _row_errors(dense - weight, gram)
    for step in range(steps):
        rate = _RATES["proximal"] * (1 - step / steps)
        latent -= rate * ((value - weight) @ gram) / gram.diagonal()
        codes, value = rounder(latent, scale, zero)
        errors = _row_errors(value - weight, gram)
        is_better = errors < best
        best = torch.where(is_better, errors, best)
        best_codes = torch.where(is_better[:, None], codes, best_codes)
    return best_codes


def _soft(weight: Tensor, quantized: Quantized, dense: Tensor, group_size: int | None, gram: Tensor, steps: int) -> Tensor:
    """Codes that the slides end on."""
    last = quantized.levels.shape[1] - 1
    alone = dense - ((dense - weight) @ gram) / gram.diagonal()  # where the code would go if it went alone
    below = torch.where(alone >= dense, quantized.codes.int(), quantized.codes.int() - 1).clamp_(0, last - 1)
    low, high = (
        dequantize(quantized._replace(codes=(below + side).to(torch.uint8)), group_size) for side in (0, 1)
    )  # fmt: skip
    width = high - low
    curvature = (gram.diagonal() * width.square()).clamp_min(1e-30)
    share = (quantized.codes.int() - below).float()
    speed = torch.zeros_like(share)
    for step in range(steps):
        penalty = _PENALTY[0] * (_PENALTY[1] / _PENALTY[0]) ** (step / max(1, steps - 1))
        slope = ((low + share * width - weight) @ gram) * width / curvature - penalty * (2 * share - 1)
        speed = _MOMENTUM * speed + slope
        share = (share - _RATES["soft"] * speed).clamp_(0, 1)
        speed[(share == 0) | (share == 1)] = 0.0
    return (below + (share >= 0.5)).to(torch.uint8)


def _spread(quantized: Quantized, group_size: int | None, columns: int) -> tuple[Tensor, Tensor | None]:
    zero = None if quantized.zero is None else spread_groups(quantized.zero, group_size, columns)
    return spread_groups(quantized.scale, group_size, columns), zero


def _row_errors(difference: Tensor, gram: Tensor) -> Tensor:
    """`[out]` output error of each row."""
    return ((difference @ gram) * difference).sum(1)
