"""Low-bit levels, their steps, straight-through rounding, and packing.

A weight is `factor * level` with `level` on a grid of step 1: {-1, 0, 1} at 1.58 bits, {-1.5, -0.5, 0.5, 1.5} at 2 (no
zero, so that both signs have as many levels), whole numbers from -4 to 3 and from -8 to 7 at 3 and 4 bits, and from -127 to
127 at 8 for rows of embeddings. `level = nearest(weight / step)`; the factor need not be the step.

Sources: BitNet b1.58 (arXiv 2402.17764) for absmean, int8 inputs per token and straight-through gradients; BitNet b1.58
Reloaded (arXiv 2407.09527) for absmedian; ParetoQ (arXiv 2502.02631) for the grids at other widths; LSQ (arXiv 1902.08153)
for the learned step. We differ by factors of least squares, and by the initial learned step, which has the least squared
error in place of ParetoQ's maximum: one step per matrix would be the size of its largest outlier.
"""

import math

import torch
from torch import Tensor

from ...functional.packing import look_up, pack_bits, packed_row_bytes, unpack_numbers

EPSILON = 1e-5
"""Least step of weights and least absolute maximum of inputs, as in BitNet."""

#: bits -> (lowest level, highest level, bits of a packed code)
GRIDS: dict[float, tuple[float, float, int]] = {
    1.58: (-1.0, 1.0, 2), 2: (-1.5, 1.5, 2), 3: (-4.0, 3.0, 3), 4: (-8.0, 7.0, 4), 8: (-127.0, 127.0, 8),
}  # fmt: skip

#: Steps of the uniform quantizers with the least squared error for a standard normal variable (Max 1960, table II).
_NORMAL_STEPS: dict[float, float] = {2: 0.9957, 3: 0.5860, 4: 0.3352}
_NORMAL_MEAN, _NORMAL_MEDIAN = math.sqrt(2 / math.pi), 0.674490
_POWERS = (1, 3, 9, 27, 81)


def statistic_step(weight: Tensor, scale: str, bits: float, granularity: str = "tensor") -> Tensor:
    """The step from the mean or median of absolute weights.

    At 1.58 bits it is the statistic itself; at other widths the multiple of it that is best for normal weights.

    Args:
        weight: `[out, in]`, computed in float32. Not written to.
        scale: `absmean` or `absmedian` (the lower one of two middle values).
        bits: 1.58, 2, 3 or 4.
        granularity: `tensor` or `row`.

    Returns:
        `[1, 1]` or `[out, 1]` float32, at least 1e-5.

    >>> statistic_step(torch.tensor([[1.0, -2.0, 6.0]]), "absmean", 1.58).item()
    3.0
    >>> statistic_step(torch.tensor([[1.0, -2.0, 6.0]]), "absmedian", 1.58).item()
    2.0
    """
    sizes = weight.float().abs()
    sizes = sizes.reshape(1, -1) if granularity == "tensor" else sizes
    if scale == "absmean":
        step, normal = sizes.mean(1, keepdim=True), _NORMAL_MEAN
    else:
        step, normal = sizes.median(1, keepdim=True).values, _NORMAL_MEDIAN
    if bits in _NORMAL_STEPS:
        step = step * (_NORMAL_STEPS[bits] / normal)
    return step.clamp_min(EPSILON)


def search_step(weight: Tensor, bits: float, granularity: str = "tensor", num_candidates: int = 40) -> Tensor:
    """The step with the least squared error of the weights, by search from the one that clips nothing down to 1/64 of it.

    Args:
        weight: `[out, in]`, computed in float32. Not written to.
        bits: a key of `GRIDS`.
        granularity: `tensor` or `row`.
        num_candidates: in equal ratios, at least 2.

    Returns:
        `[1, 1]` or `[out, 1]` float32, at least 1e-5.

    >>> round(search_step(torch.tensor([[3.0, -3.0, 0.1]]), 1.58).item(), 1)
    3.0
    """
    rows = weight.float().reshape(1, -1) if granularity == "tensor" else weight.float()
    full = rows.abs().amax(1, keepdim=True) / GRIDS[bits][1]
    best = full.clamp_min(EPSILON)
    least = torch.full_like(best, torch.inf)
    for number in range(num_candidates):
        step = (full * 64 ** (-number / (num_candidates - 1))).clamp_min(EPSILON)
        error = (round_levels(rows, step, bits) * step - rows).square().sum(1, keepdim=True)
        best, least = torch.where(error < least, step, best), torch.minimum(error, least)
    return best


def round_levels(weight: Tensor, step: Tensor, bits: float) -> Tensor:
    """The nearest level of every weight, in the dtype of `weight`; halves go to the even side.

    >>> round_levels(torch.tensor([-3.0, -0.4, 0.6, 0.1]), torch.tensor(1.0), 2).tolist()
    [-1.5, -0.5, 0.5, 0.5]
    """
    low, high, _ = GRIDS[bits]
    shift = low % 1
    levels = (weight / step).sub_(shift).round_() if shift else (weight / step).round_()
    levels = levels.clamp_(low - shift, high - shift)
    return levels.add_(shift) if shift else levels


def least_squares_factor(weight: Tensor, levels: Tensor, granularity: str = "tensor", gram: Tensor | None = None) -> Tensor:
    """The factor `a` that minimises `|| (weight - a levels) x ||` over inputs with the given second moments.

    Closed form: `a = <W, T>_G / <T, T>_G` with `<A, B>_G = trace(A G B^T)`, over the matrix or over each row.

    Args:
        weight: `[out, in]`. Not written to.
        levels: `[out, in]`. Not written to.
        granularity: `tensor` or `row`.
        gram: `[in, in]` sum of x x^T; None for the weights' own error.

    Returns:
        `[1, 1]` or `[out, 1]` float32, at least 1e-5; where all levels are zero it does not matter.

    >>> least_squares_factor(torch.tensor([[1.0, 3.0, 0.2]]), torch.tensor([[1.0, 1.0, 0.0]])).item()
    2.0
    """
    weight, levels = weight.float(), levels.float()
    through = levels if gram is None else levels @ gram.to(levels.device, torch.float32)
    over = (0, 1) if granularity == "tensor" else (1,)
    cross = (through * weight).sum(over, keepdim=True)
    energy = (through * levels).sum(over, keepdim=True)
    return (cross / energy.clamp_min(torch.finfo(torch.float32).tiny)).clamp_min(EPSILON)


def quantize_activations(x: Tensor, bits: int = 8) -> Tensor:
    """Round to `2^(bits-1) - 1` steps of the largest absolute value of every token (the last axis), and back.

    Args:
        x: `[..., in]`, computed in float32. Not written to.
        bits: width.

    Returns:
        `[..., in]` in the dtype of `x`.

    >>> quantize_activations(torch.tensor([[127.0, 1.4, -2.6]])).tolist()
    [[127.0, 1.0, -3.0]]
    """
    top = 2 ** (bits - 1) - 1
    values = x.float()
    inverse = top / values.abs().amax(-1, keepdim=True).clamp_min(EPSILON)
    return ((values * inverse).round_().clamp_(-top - 1, top) / inverse).to(x.dtype)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, rounded: Tensor, strength: Tensor) -> Tensor:
        return torch.lerp(x, rounded, strength)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad, None, None


def straight_through(x: Tensor, rounded: Tensor, strength: Tensor) -> Tensor:
    """`x + strength * (rounded - x)`, exact at strengths 0 and 1, with the gradient of `x` alone.

    Args:
        x: any shape.
        rounded: as `x`; no gradient reaches it.
        strength: 0-d, of the same dtype.

    >>> x = torch.tensor([0.3], requires_grad=True)
    >>> y = straight_through(x, x.detach().round(), torch.tensor(1.0)); y.backward(); (y.item(), x.grad.item())
    (0.0, 1.0)
    """
    return _StraightThrough.apply(x, rounded.detach(), strength)


def fake_quantize(
    weight: Tensor, strength: Tensor, *, scale: str, bits: float, granularity: str, dequantization: str
) -> Tensor:  # fmt: skip
    """Weights between themselves (strength 0) and their levels (strength 1), gradients straight through.

    Args:
        weight: `[out, in]`. Not written to.
        strength: 0-d, in [0, 1].
        scale: `absmean` or `absmedian`.
        bits: 1.58, 2, 3 or 4.
        granularity: `tensor` or `row`.
        dequantization: `shared`, or anything else for the factor of least squares.

    Returns:
        `[out, in]` float32.

    >>> fake_quantize(torch.tensor([[1.0, -2.0, 6.0]]), torch.tensor(1.0), scale="absmean", bits=1.58, granularity="row",
    ...               dequantization="shared").tolist()
    [[0.0, -3.0, 3.0]]
    """
    latent = weight.float()
    with torch.no_grad():
        levels, factor = quantize(latent, scale=scale, bits=bits, granularity=granularity, dequantization=dequantization)
        rounded = levels.mul_(factor)
    return straight_through(latent, rounded, strength.float())


def quantize(
    weight: Tensor, *, scale: str, bits: float, granularity: str, dequantization: str, gram: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Levels `[out, in]` and their factor, `[1, 1]` or `[out, 1]`, float32; see `TernaryConfig` for the settings."""
    weight = weight.float()
    step = search_step(weight, bits, granularity) if scale == "lsq" else statistic_step(weight, scale, bits, granularity)
    levels = round_levels(weight, step, bits)
    if dequantization == "shared" or scale == "lsq":
        return levels, step
    return levels, least_squares_factor(weight, levels, granularity, gram)


def learned_quantize(weight: Tensor, step: Tensor, strength: Tensor, bits: float) -> Tensor:
    """As `fake_quantize` with a step that takes gradients; weights beyond the grid take none.

    The gradient of the step is scaled by `1 / sqrt(weights per step * highest level)`, as in LSQ.

    Args:
        weight: `[out, in]`. Not written to.
        step: `[1, 1]` or `[out, 1]`, positive.
        strength: 0-d, in [0, 1].
        bits: 1.58, 2, 3 or 4.

    Returns:
        `[out, in]` float32.

    >>> w, s = torch.tensor([[0.9, 5.0]], requires_grad=True), torch.tensor([[1.0]], requires_grad=True)
    >>> y = learned_quantize(w, s, torch.tensor(1.0), 1.58); y.sum().backward(); (y.tolist(), w.grad.tolist())
    ([[1.0, 1.0]], [[1.0, 0.0]])
    """
    low, high, _ = GRIDS[bits]
    margin = 0.5 if bits < 3 else 0.0  # where ParetoQ clips its balanced grids
    latent = weight.float()
    gain = (latent.numel() / step.numel() * high) ** -0.5
    own = step.float().abs().clamp_min(EPSILON)
    own = own * gain + (own - own * gain).detach()
    unit = (latent / own).clamp(low - margin, high + margin)
    levels = straight_through(unit, round_levels(unit.detach(), torch.ones_like(step), bits), torch.ones_like(strength.float()))
    return torch.lerp(latent, levels * own, strength.float())


def packed_bytes(num_values: int, bits: float, packing: str) -> int:
    """Bytes of a packed row.

    >>> packed_bytes(11, 1.58, "base3"), packed_bytes(11, 1.58, "bits")
    (3, 3)
    """
    if bits == 1.58 and packing == "base3":
        return -(-num_values // len(_POWERS))
    return packed_row_bytes(num_values, GRIDS[bits][2])


def pack_levels(levels: Tensor, bits: float, packing: str) -> Tensor:
    """Pack the last axis of levels, each row on its own: base 3 (five levels in a byte) or whole bits.

    Args:
        levels: `[..., n]` float, on the grid of `bits`. Not written to.
        bits: a key of `GRIDS`.
        packing: `base3` or `bits`; only 1.58 bits know the former.

    Returns:
        `[..., packed_bytes(n)]` uint8.

    >>> pack_levels(torch.tensor([-1.0, 0.0, 1.0, 1.0, 1.0, -1.0]), 1.58, "base3").tolist()
    [237, 0]
    """
    low, _, width = GRIDS[bits]
    codes = (levels - low).round().to(torch.uint8)
    if bits != 1.58 or packing != "base3":
        return pack_bits(codes, width)
    fives = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % len(_POWERS))).unflatten(-1, (-1, len(_POWERS)))
    powers = torch.tensor(_POWERS, dtype=torch.uint8, device=levels.device)
    return (fives * powers).sum(-1, dtype=torch.uint8)


def unpack_levels(packed: Tensor, bits: float, packing: str, num_values: int) -> Tensor:
    """Inverse of `pack_levels`, `[..., num_values]` float32.

    Raises:
        ValueError: the last axis does not hold `num_values` levels.

    >>> unpack_levels(torch.tensor([237, 0], dtype=torch.uint8), 1.58, "base3", 6).tolist()
    [-1.0, 0.0, 1.0, 1.0, 1.0, -1.0]
    """
    low, _, width = GRIDS[bits]
    if bits != 1.58 or packing != "base3":
        return unpack_numbers(packed, width, num_values, low, torch.float32)
    if packed.shape[-1] != packed_bytes(num_values, bits, packing):
        raise ValueError(f"packed rows must have {packed_bytes(num_values, bits, packing)} bytes, got {packed.shape[-1]}")
    bytes_ = torch.arange(256, device=packed.device)
    digits = (torch.stack([bytes_ // power % 3 for power in _POWERS], 1) + low).to(torch.int8)  # [256, 5]
    # The levels of a byte are looked up as one number.
    table = torch.nn.functional.pad(digits, (0, 3)).view(torch.int64).flatten()
    rows = packed.flatten(0, -2) if packed.dim() > 1 else packed[None]
    levels = look_up(table, rows.long()).view(torch.int8).unflatten(1, (packed.shape[-1], 8)).view(*packed.shape, 8)
    return levels[..., :5].float().flatten(-2)[..., :num_values]
