"""How much of the distribution of a weight its quantized values keep, from the weight alone."""

import torch
from torch import Tensor

_BINS = 256
_SMOOTHING = 1e-6


def histogram_divergence(weight: Tensor, approximation: Tensor) -> float:
    """`KL(hist(weight) || hist(approximation))` in nats, 256 bins over the range of the weight.

    Args:
        weight: any shape and float dtype. Not written to.
        approximation: of the same shape; values outside the range of the weight count in the outermost bins.

    Returns:
        At least 0, finite: every bin holds a millionth more than was counted.
    Source: AdaPT (arXiv 2107.13490), PushDown; differs by the smoothing, without which few levels give infinity.

    >>> histogram_divergence(torch.arange(8.0), torch.arange(8.0))
    0.0
    """
    flat, other = weight.flatten().float(), approximation.flatten().float()
    low, high = flat.min(), flat.max()
    if low == high:
        return 0.0
    share, estimate = (
        torch.histc(values.clamp(low, high), _BINS, low.item(), high.item()).double().div_(values.numel()).add_(_SMOOTHING)
        for values in (flat, other)
    )
    share, estimate = share / share.sum(), estimate / estimate.sum()
    return max(0.0, (share * (share / estimate).log()).sum().item())
