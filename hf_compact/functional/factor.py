"""Low-rank factors of a matrix for a weighted error.

The error is `||R^T (W - W') L||_F` with `L L^T` the gram matrix of the inputs and `R R^T` that of the gradients at the
outputs. With both it is the quadratic model of the loss (K-FAC), which a truncated SVD of `R^T W L` minimises; singular
values of different matrices are then in one unit.
"""

from typing import NamedTuple

import torch
from torch import Tensor


def whitening_factor(gram: Tensor, damp: float) -> Tensor:
    """`L` with `L L^T = gram + damp * mean(diag gram) I`: lower triangular, or of eigenvectors where that fails.

    Args:
        gram: `[n, n]` symmetric PSD. Not written to.
        damp: ridge as a fraction of the mean diagonal, `>= 0`.

    Returns:
        `[n, n]` float64, invertible.

    Raises:
        ValueError: `gram` holds a value that is not finite.
    Source: SVD-LLM (arXiv 2403.07378), with the repair of its second version (2503.12340): eigenvalues are clamped.

    >>> whitening_factor(torch.diag(torch.tensor([4.0, 9.0])), damp=0.0).diagonal().tolist()
    [2.0, 3.0]
    """
    if not gram.isfinite().all():
        raise ValueError("a gram matrix holds values that are not finite")
    damped = gram.double().clone()
    mean = damped.diagonal().mean()
    if mean <= 0:
        return torch.eye(len(damped), dtype=damped.dtype, device=damped.device)
    damped.diagonal().add_(damp * mean)
    lower, info = torch.linalg.cholesky_ex(damped)
    # A factor that exists only by the grace of rounding cannot be divided by.
    if not info and lower.diagonal().square().min() > 1e-12 * mean:
        return lower
    values, vectors = torch.linalg.eigh(damped)
    return vectors * values.clamp_min(1e-8 * values[-1]).sqrt()


class Spectrum(NamedTuple):
    """A matrix `[out, in]` as weighted singular triplets; the first `r` of them are its best rank-`r` approximation."""

    up: Tensor
    """`[out, m]` float64 with `m = min(out, in)`."""
    down: Tensor
    """`[m, in]` float64."""
    energy: Tensor
    """`[m]` squared singular values of `R^T W L`, falling: what leaving a triplet out costs."""

    def truncate(self, rank: int) -> tuple[Tensor, Tensor]:
        """`(up [out, rank], down [rank, in])`."""
        return self.up[:, :rank], self.down[:rank]

    def error(self, rank: int) -> float:
        """The weighted squared error of the best approximation of that rank."""
        return self.energy[rank:].sum().item()


def spectrum(weight: Tensor, right: Tensor | None = None, left: Tensor | None = None) -> Spectrum:
    """Singular triplets of `left^T W right`, with the factors taken out again.

    Args:
        weight: `[out, in]`, any float dtype; solved in float64. Not written to.
        right: `[in, in]` invertible, see `whitening_factor`; None for the identity.
        left: `[out, out]` invertible; None for the identity.

    Returns:
        The triplets, the singular value split evenly between both sides.
    Source: SVD-LLM (arXiv 2403.07378) for the inputs' side; both sides as in GFWSVD (arXiv 2505.17974).

    >>> spectrum(torch.eye(2), right=torch.diag(torch.tensor([3.0, 1.0]))).energy.tolist()
    [9.0, 1.0]
    """
    seen = _seen(weight, right, left)
    is_wide = seen.shape[0] <= seen.shape[1]
    energy, vectors = torch.linalg.eigh(seen @ seen.T if is_wide else seen.T @ seen)
    energy, vectors = energy.flip(0).clamp_min(0), vectors.flip(1)
    # The vectors of the shorter side are orthonormal to the last, so the product is exact; the square roots only share it out.
    root = energy.sqrt().sqrt()
    root = root.clamp_min(1e-6 * root[0]) if root[0] > 0 else torch.ones_like(root)
    if is_wide:
        up, down = vectors * root, (vectors.T @ seen) / root[:, None]
    else:
        up, down = (seen @ vectors) / root, root[:, None] * vectors.T
    if right is not None:
        down = torch.linalg.solve(right.double(), down, left=False)
    if left is not None:
        up = torch.linalg.solve(left.double().T, up)
    return Spectrum(up, down, energy)


def energies(weight: Tensor, right: Tensor | None = None, left: Tensor | None = None) -> Tensor:
    """The `energy` of `spectrum` alone, `[min(out, in)]`, in a fraction of the time.

    >>> energies(torch.eye(2), right=torch.diag(torch.tensor([3.0, 1.0]))).tolist()
    [9.0, 1.0]
    """
    seen = _seen(weight, right, left)
    small = seen @ seen.T if seen.shape[0] <= seen.shape[1] else seen.T @ seen
    return torch.linalg.eigvalsh(small).flip(0).clamp_min(0)


def coefficients(weight: Tensor, basis: Tensor, right: Tensor | None = None) -> Tensor:
    """The matrix `[out, r]` whose product with a given basis comes closest to `weight`: `||(W - U B) L||_F` is least.

    Weights of the outputs would change nothing: every row has its own optimum.

    Args:
        weight: `[out, in]`, any float dtype; solved in float64. Not written to.
        basis: `[r, in]` of full rank.
        right: `[in, in]` invertible, see `whitening_factor`; None for the identity.

    >>> coefficients(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]])).tolist()
    [[3.0]]
    """
    rows = _seen(basis, right, None)
    axes, triangle = torch.linalg.qr(rows.T)
    return torch.linalg.solve_triangular(triangle.T, _seen(weight, right, None) @ axes, upper=False, left=False)


def _seen(weight: Tensor, right: Tensor | None, left: Tensor | None) -> Tensor:
    seen = weight.double() if right is None else weight.double() @ right.double()
    return seen if left is None else left.double().T @ seen
