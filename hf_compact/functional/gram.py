"""Second moments of layer inputs, and the factor of their inverse that error feedback needs."""

import torch
from torch import Tensor

_COLUMN_BLOCK = 512


def add_gram_(gram: Tensor, inputs: Tensor) -> None:
    """Add `sum x x^T` of a batch to `gram`, in place.

    One batch is summed in float32, the total in float64. Only blocks on and above the diagonal are
    multiplied; the rest is mirrored, which saves up to half of the time.

    Args:
        gram: `[in, in]` float64, written to (unit: activation^2).
        inputs: `[..., in]`, any float dtype.

    Raises:
        ValueError: the last axis of `inputs` does not fit `gram`.

    >>> g = torch.zeros(2, 2, dtype=torch.float64); add_gram_(g, torch.tensor([[1., 2.]])); g.tolist()
    [[1.0, 2.0], [2.0, 4.0]]
    """
    size = gram.shape[0]
    if inputs.shape[-1] != size:
        raise ValueError(f"inputs must have {size} features like the gram matrix, got {inputs.shape[-1]}")
    x = inputs.reshape(-1, size).float()
    for start in range(0, size, _COLUMN_BLOCK):
        stop = min(start + _COLUMN_BLOCK, size)
        block = x[:, start:stop].T @ x[:, start:]
        gram[start:stop, start:] += block
        gram[stop:, start:stop] += block[:, stop - start :].T


def without_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """The positions `[N, ...]` of `x [B, T, ...]` or `[B * T, features]` that are not padding; all of `x` without a mask of its shape.

    >>> without_padding(torch.zeros(1, 3, 5), torch.tensor([[1, 1, 0]])).shape
    torch.Size([2, 5])
    >>> without_padding(torch.zeros(3, 5), torch.tensor([[1, 1, 0]])).shape  # as OPT's MLP reads it
    torch.Size([2, 5])
    """
    if mask is not None and mask.dim() == 2 and x.dim() == 2 and mask.numel() == len(x):
        mask = mask.flatten()
    return x[mask.bool()] if mask is not None and mask.shape == x.shape[: mask.dim()] else x


def centered(gram: Tensor, total: Tensor) -> Tensor:
    """Gram matrix of the inputs less their mean: what is left for a layer whose bias takes up the mean's error.

    Args:
        gram: `[in, in]` float64, sum of x x^T. Not written to.
        total: `[in + 1]` float64, sum of x and behind it the number of inputs.

    >>> centered(torch.tensor([[5.0]]), torch.tensor([3.0, 2.0])).tolist()
    [[0.5]]
    """
    mean = total[:-1] / total[-1]
    result = gram - torch.outer(mean, total[:-1])
    diagonal = result.diagonal()
    # Rounding can leave a constant input slightly below zero.
    diagonal.clamp_(min=0.0)
    return result


def damped_gram(gram: Tensor, damp: float) -> Tensor:
    """The matrix that `inverse_factor` inverts, `G + damp * mean(diag G) I` in float32, before any repair.

    Args:
        gram: `[in, in]` sum of x x^T. Not written to.
        damp: ridge as a fraction of the mean diagonal, `>= 0`.

    >>> damped_gram(torch.diag(torch.tensor([4.0, 0.0])), damp=0.5).tolist()
    [[5.0, 0.0], [0.0, 1.0]]
    """
    damped = gram.to(torch.float32, copy=True)
    diagonal, mean = _diagonal(gram, damp)
    damped.diagonal().copy_(diagonal + damp * mean)
    return damped


def _diagonal(gram: Tensor, damp: float) -> tuple[Tensor, float]:
    """Float64, and its mean. Without a ridge an input that never fired has the mean: any unit of the inputs gives the same."""
    diagonal = gram.diagonal().double()
    mean = diagonal.mean().item() or 1.0
    return diagonal if damp else torch.where(diagonal == 0, mean, diagonal), mean


def inverse_factor(gram: Tensor, damp: float, order: Tensor | None = None) -> Tensor:
    """Upper Cholesky factor `U` of the inverse of a damped gram matrix: `(G + damp * mean(diag G) I)^-1 = U^T U`.

    With the rows and columns of `G` reversed, `G = L L^T` gives `U` as the reversed inverse of `L`: one factorisation
    and one triangular inverse, and no matrix beside those two. A matrix that stays indefinite after damping is repaired: the
    damping grows tenfold until the factorisation exists. Inputs that never fired (zero diagonal) have the ridge alone, or
    the mean moment where there is none.

    Args:
        gram: `[in, in]` symmetric PSD, sum of x x^T. Not written to.
        damp: ridge as a fraction of the mean diagonal, `>= 0`.
        order: `[in]` a permutation that `G` is taken in; None leaves it as it is.

    Returns:
        `[in, in]` upper triangular float32, in that order.

    Raises:
        ValueError: `gram` holds a value that is not finite, or cannot be repaired.
    Source: GPTQ, arXiv 2210.17323; differs by float64 and by the repair.

    >>> inverse_factor(torch.diag(torch.tensor([4., 1.])), damp=0.0).diagonal().tolist()
    [0.5, 1.0]
    """
    if not gram.isfinite().all():
        raise ValueError("the gram matrix of the layer inputs holds values that are not finite")
    order = (torch.arange(len(gram), device=gram.device) if order is None else order).flip(0)
    diagonal, mean = _diagonal(gram, damp)
    diagonal, ridge = diagonal[order], damp * mean
    for _ in range(8):
        lower = gram[order[:, None], order].double()
        lower.diagonal().copy_(diagonal + ridge)
        failed = torch.linalg.cholesky_ex(lower, out=(lower, torch.empty((), dtype=torch.int32, device=lower.device))).info
        if not failed:
            identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device).T
            inverse = torch.linalg.solve_triangular(lower, identity, upper=False, out=identity)
            if inverse.isfinite().all():
                del lower
                return inverse.float().flip(0, 1)
        ridge = 10 * ridge if ridge else 1e-8 * mean
    raise ValueError(f"the gram matrix stays indefinite with a ridge of {ridge / mean:.1e} of its mean diagonal")


def output_energy(weight: Tensor, gram: Tensor | None = None) -> float:
    """Energy of a layer's output over the calibration inputs, `tr(W G W^T)`; without a gram matrix, of the weight.

    With a difference of two weights it is the squared output error that every solver minimises.

    Args:
        weight: `[out, in]`, any float dtype.
        gram: `[in, in]` or None for the identity.

    >>> output_energy(torch.tensor([[1.0, 2.0]])), output_energy(torch.tensor([[1.0, 2.0]]), torch.diag(torch.tensor([4.0, 0.0])))
    (5.0, 4.0)
    """
    weight = weight.float()
    through = weight if gram is None else weight @ gram.to(weight.device, torch.float32)
    return (through * weight).sum().item()
