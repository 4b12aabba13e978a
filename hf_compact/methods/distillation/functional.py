"""Terms of distillation losses, position by position, and the largest log-probabilities that stand for a whole row.

A row of logits is kept as its `K` largest log-probabilities and the mass of all others, one more outcome: divergences of
such rows are those of distributions of `K + 1` outcomes, so nothing is assumed about the tail.

Sources: TinyViT (arXiv 2207.10666) for stored sparse outputs, which spreads the tail evenly, we do not; BD-KD (arXiv
2212.12965) for the balance; MiniLMv2 (arXiv 2012.15828) for the relations.
"""

import torch
from torch import Tensor

from ...functional.divergence import kl_divergence

_LEAST_MASS = 1e-8


def log_probs_of(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities `[..., C]` float32 of logits that are divided by the temperature.

    >>> log_probs_of(torch.tensor([0.0, 2.0]), 2.0).exp().tolist() == torch.tensor([0.0, 1.0]).softmax(0).tolist()
    True
    """
    values = logits.float()
    return (values if temperature == 1 else values / temperature).log_softmax(-1)  # a copy as large as the vocabulary is saved


def top_log_probs(logits: Tensor, count: int, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """The largest log-probabilities of every position.

    Args:
        logits: `[..., C]`.
        count: `K`, how many, at most C.
        temperature: logits are divided by it.

    Returns:
        `(ids [..., K] int64, log_probs [..., K] float32, tail [...] float32, the mass of all others)`.

    >>> ids, log_probs, tail = top_log_probs(torch.tensor([0.1, 0.6, 0.3]).log(), 2)
    >>> ids.tolist(), round(log_probs.exp().sum().item(), 3), round(tail.item(), 3)
    ([1, 2], 0.9, 0.1)
    """
    log_probs, ids = log_probs_of(logits, temperature).topk(count, -1)
    return ids, log_probs, (1 - log_probs.exp().sum(-1)).clamp_min(0.0)


def with_tail(log_probs: Tensor, tail: Tensor) -> Tensor:
    """Log-probabilities `[..., K + 1]` of the kept outcomes and of all others together, whose mass is at least 1e-8."""
    return torch.cat([log_probs, tail.clamp_min(_LEAST_MASS).log()[..., None]], -1)


def gather_log_probs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of the given outcomes and of all others, `[..., K + 1]` float32.

    >>> [round(p, 3) for p in gather_log_probs(torch.tensor([0.1, 0.6, 0.3]).log(), torch.tensor([1])).exp().tolist()]
    [0.6, 0.4]
    """
    log_probs = log_probs_of(logits, temperature).gather(-1, ids)
    return with_tail(log_probs, 1 - log_probs.exp().sum(-1))


def balanced_kl(log_p: Tensor, log_q: Tensor, balance: str = "hard", weight: float = 2.0, slope: float = 1.0) -> Tensor:
    """`a KL(p || q) + b KL(q || p)` of every position, by the gap of entropies `H(p) - H(q)`.

    Hard: the forward direction has the weight where the student `q` is surer than the teacher `p`, else the reverse one.
    Sigmoid: `a = sigmoid(slope * gap)`, `b = 1 - a`. No gradient passes through the gap.

    Args:
        log_p: `[..., C]`, the teacher's.
        log_q: `[..., C]`, the student's.
        balance: `hard` or `sigmoid`.
        weight: of the favoured direction, the other has 1.
        slope: per nat.

    Returns:
        `[...]` in nats.

    >>> sure, unsure = torch.tensor([0.98, 0.02]).log(), torch.tensor([0.5, 0.5]).log()
    >>> round(balanced_kl(unsure, sure).item(), 2), round((2 * kl_divergence(unsure, sure) + kl_divergence(sure, unsure)).item(), 2)
    (3.14, 3.14)
    """
    gap = (entropy(log_p) - entropy(log_q)).detach()
    if balance == "sigmoid":
        forward = torch.sigmoid(slope * gap)
        reverse = 1 - forward
    else:
        is_sure = gap > 0
        forward = torch.where(is_sure, weight, 1.0)
        reverse = torch.where(is_sure, 1.0, weight)
    return forward * kl_divergence(log_p, log_q) + reverse * kl_divergence(log_q, log_p)


def entropy(log_p: Tensor) -> Tensor:
    """Entropy `[...]` of log-probabilities `[..., C]`, in nats.

    >>> round(entropy(torch.tensor([0.5, 0.5]).log()).item(), 4)
    0.6931
    """
    return -(log_p.exp() * log_p).sum(-1)


def relation_divergence(student: Tensor, teacher: Tensor, num_heads: int, mask: Tensor | None = None) -> Tensor:
    """How far self-relations `softmax(A A^T / sqrt(d))` of the student are from the teacher's, KL(teacher || student).

    Args:
        student: `[B, T, D]` queries, keys or values.
        teacher: `[B, T, D']`.
        num_heads: relation heads, which divide D and D'; so widths may differ.
        mask: `[B, T]`, 0 for padding, which no position then looks at.

    Returns:
        `[B, T]` float32, a mean over heads, in nats.

    Raises:
        ValueError: the heads do not divide a width.

    >>> x = torch.eye(4)[None]
    >>> relation_divergence(x, x, 2).abs().max().item()
    0.0
    """
    mine, theirs = (_relations(values, num_heads, mask) for values in (student, teacher))
    return kl_divergence(theirs, mine).mean(1)


def _relations(values: Tensor, num_heads: int, mask: Tensor | None) -> Tensor:
    width = values.shape[-1]
    if width % num_heads:
        raise ValueError(f"relation_heads must divide the width {width}, got {num_heads}")
    heads = values.float().unflatten(-1, (num_heads, -1)).transpose(1, 2)  # [B, heads, T, d]
    scores = heads @ heads.transpose(-1, -2) / (width // num_heads) ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask.bool()[:, None, None, :], torch.finfo(scores.dtype).min)
    return scores.log_softmax(-1)
