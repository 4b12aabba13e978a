"""Distances between what two models put out, position by position."""

import torch
from torch import Tensor


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """`KL(p || q)` of every position.

    Args:
        log_p: `[..., C]` log-probabilities.
        log_q: `[..., C]` log-probabilities.

    Returns:
        `[...]`, in nats.

    >>> round(kl_divergence(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()).exp().square().item(), 4)
    1.3333
    """
    return torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def lost_energy(output: Tensor, target: Tensor) -> Tensor:
    """Share of the target's energy that is lost, of every position.

    Args:
        output: `[..., features]`.
        target: `[..., features]`.

    Returns:
        `[...]` float32, without a unit.

    >>> lost_energy(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 2.0])).item()
    0.25
    """
    target = target.float()
    return (output.float() - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-12)
