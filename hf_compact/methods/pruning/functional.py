"""Scores of hidden units and closed-form compensation, on tensors alone.

A hidden state `h [in]` is read by `W [out, in]`. Units are columns of `W`, or sets of columns that go together.
"""

import torch
from torch import Tensor

from ...functional.gram import centered

#: Rows that are stacked up before they are taken off the matrices together.
_STACKED = 64


def ridged(gram: Tensor, damp: float) -> Tensor:
    """The gram matrix with a ridge, float64.

    Args:
        gram: `[in, in]` symmetric PSD, sum of h h^T. Not written to.
        damp: ridge as a fraction of the mean diagonal; 1e-9 at least, so that there is an inverse.

    >>> ridged(torch.diag(torch.tensor([3.0, 1.0])), damp=0.5).diagonal().tolist()
    [4.0, 2.0]
    """
    result = gram.to(torch.float64, copy=True)
    mean = result.diagonal().mean()
    result.diagonal().add_(max(damp, 1e-9) * mean if mean > 0 else 1.0)
    return result


def unit_energy(weight: Tensor, gram: Tensor, index: Tensor) -> Tensor:
    """Energy of what each unit alone adds to the output, `tr(W_J G_JJ W_J^T)`: `[units]` float64.

    With one column per unit it is the squared Wanda-sp score; with the covariance in the place of `G`, FLAP's.

    Args:
        weight: `[out, in]`.
        gram: `[in, in]`.
        index: `[units, width]` columns.
    Source: Wanda (arXiv 2306.11695), FLAP (arXiv 2312.11983).

    >>> unit_energy(torch.tensor([[1.0, 2.0]]), torch.eye(2), torch.tensor([[0], [1]])).tolist()
    [1.0, 4.0]
    """
    w = weight.double()
    blocks = gram.double()[index[:, :, None], index[:, None, :]]  # [units, width, width]
    columns = w[:, index].transpose(0, 1)  # [units, out, width]
    return torch.einsum("uow,uwv,uov->u", columns, blocks, columns)


def loss_increase(weight: Tensor, gram: Tensor, index: Tensor, outputs: Tensor) -> Tensor:
    """Second-order Taylor score of each unit, with K-FAC's approximation of the Fisher matrix: `[units]` float64.

    Removing unit J changes the output by `-W_J h_J`; the loss grows by half of `E (g . W_J h_J)^2`, here
    `1/2 sum_ij in J G_ij (W^T F W)_ij`.

    Args:
        weight: `[out, in]`.
        gram: `[in, in]`.
        index: `[units, width]` columns.
        outputs: `[out, out]` second moment F of the gradients at the output.
    Source: Fisher pruning (arXiv 1801.05787) with K-FAC (1503.05671), which the original does without.

    >>> loss_increase(torch.tensor([[1.0, 2.0]]), torch.eye(2), torch.tensor([[0], [1]]), torch.tensor([[2.0]])).tolist()
    [1.0, 4.0]
    """
    w = weight.double()
    inner = w.T @ outputs.double() @ w
    pairs = index[:, :, None], index[:, None, :]
    return 0.5 * (gram.double()[pairs] * inner[pairs]).sum((1, 2))


def select_by_residual(
    weight: Tensor, gram: Tensor, index: Tensor, num_removed: int, per_pool: int, damp: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Remove units one by one, each time the one that costs least when all that stay are refitted (OBS).

    With `C = (G + damp)^-1` and `M = W^T W` the cost of J is `tr(C_JJ^-1 M_JJ)`; then `W -= W_J C_JJ^-1 C_J` and C loses J.
    With `C_JJ = L L^T`, `V = L^-1 C_J` and `P = L^-1 M_J - L^-1 M_JJ L^-T V / 2` this takes `V^T V` off C and `P^T V + V^T P`
    off M; V and P of several removals are taken off together. The sum of the costs is the Schur complement of what is removed.

    Args:
        weight: `[out, in]`. Not written to.
        gram: `[in, in]`. Not written to.
        index: `[units, width]` columns.
        num_removed: units to remove.
        per_pool: the units fall into pools of this size, in order, of which equally many are removed.
        damp: ridge, as a fraction of the mean diagonal.

    Returns:
        Numbers of the removed units in the order of removal, and what each has cost, both `[num_removed]`.

    Raises:
        ValueError: the gram matrix with its ridge is not positive definite but for rounding.
    Source: SparseGPT's and OBC's elimination (arXiv 2208.11580) for whole columns, as in ZipLM (arXiv 2302.04089).

    >>> weight, index = torch.tensor([[1.0, 1.0, 0.5]]), torch.arange(3)[:, None]
    >>> order, cost = select_by_residual(weight, torch.eye(3, dtype=torch.float64), index, 1, 3, damp=0.0)
    >>> order.tolist(), round(cost.item(), 6)
    ([2], 0.25)
    """
    units, width = index.shape
    num_pools = units // per_pool
    inverse, w = torch.linalg.inv(ridged(gram, damp)), weight.double()
    c, m = 0.5 * (inverse + inverse.T), w.T @ w
    pairs = index[:, :, None], index[:, None, :]
    own_c, own_m = c[pairs], m[pairs]  # [units, width, width], up to date
    v, p = c.new_zeros(0, len(c)), c.new_zeros(0, len(c))
    is_gone = torch.zeros(units, dtype=torch.bool)
    removed: list[int] = []
    costs: list[float] = []
    for turn in range(num_removed):
        # Solving many systems of one unknown takes many times as long as dividing.
        solved = own_m / own_c if width == 1 else torch.linalg.solve(own_c, own_m)
        cost = solved.diagonal(dim1=1, dim2=2).sum(1).masked_fill(is_gone, torch.inf)
        if num_pools > 1:  # pools take turns: none is ahead of another by more than one
            counts = is_gone.view(num_pools, per_pool).sum(1)
            cost = cost.masked_fill((counts > turn // num_pools).repeat_interleave(per_pool), torch.inf)
        best = int(cost.argmin())
        costs.append(float(cost[best]))
        removed.append(best)
        is_gone[best] = True
        at = index[best]
        factor, is_broken = torch.linalg.cholesky_ex(own_c[best])
        if is_broken or not factor.isfinite().all():
            raise ValueError("the gram matrix is not positive definite: raise damp, or calibrate on more tokens")
        rows = torch.stack((c[at] - v[:, at].T @ v, m[at] - p[:, at].T @ v - v[:, at].T @ p))  # [2, width, in]
        new_v, inner = torch.linalg.solve_triangular(factor, rows, upper=False)
        shared = torch.linalg.solve_triangular(factor, inner[:, at].T, upper=False)  # [width, width]
        new_p = inner - 0.5 * shared @ new_v
        v, p = torch.cat((v, new_v)), torch.cat((p, new_p))
        vs, ps = (part[:, index].permute(1, 0, 2) for part in (new_v, new_p))  # [units, width, width]
        own_c -= _product(vs, vs)
        crossed = _product(ps, vs)
        own_m -= crossed + crossed.mT
        own_c[best], own_m[best] = torch.eye(width, dtype=torch.float64), 0
        if len(v) >= _STACKED:
            c -= v.T @ v
            m -= p.T @ v + v.T @ p
            v, p = v[:0], p[:0]
    return torch.tensor(removed, dtype=torch.long), torch.tensor(costs, dtype=torch.float64)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """`left^T right` of batches; many products of single numbers are one of vectors."""
    return left * right if left.shape[1:] == (1, 1) else left.mT @ right


def refit_columns(weight: Tensor, gram: Tensor, kept: Tensor, damp: float) -> Tensor:
    """Columns that stay, refitted by least squares to the output of all: `W C_:K (G_KK + damp)^-1`.

    The error is the Schur complement, `W_P (G_PP - G_PK G_KK^-1 G_KP) W_P^T`.

    Args:
        weight: `[out, in]`. Not written to.
        gram: `[in, in]` second moment of the inputs that are given.
        kept: columns, ascending.
        damp: ridge towards the columns as they are, as a fraction of the mean diagonal.

    Returns:
        `[out, kept]` in `weight.dtype`.
    Source: UDFC (arXiv 2308.06619) for transformers, with moments from data.

    >>> gram = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    >>> refit_columns(torch.tensor([[1.0, 2.0]]), gram, torch.tensor([0]), damp=0.0).tolist()
    [[3.0]]
    """
    w = weight.double()
    target = w @ gram.double()[:, kept]
    inner = gram.double()[kept][:, kept]
    ridge = ridged(inner, damp) - inner if damp or not inner.diagonal().any() else torch.zeros_like(inner)
    solved = torch.linalg.lstsq((inner + ridge).T, (target + w[:, kept] @ ridge).T).solution.T
    return solved.to(weight.dtype)


def refit(
    weight: Tensor, gram: Tensor, total: Tensor, kept: Tensor, has_bias: bool, damp: float
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """As `refit_columns`; with a bias the inputs count less their mean, and what the mean loses goes into the bias.

    Args:
        weight: `[out, in]`. Not written to.
        gram: `[in, in]` sum of h h^T.
        total: `[in + 1]` sum of h and behind it their number.
        kept: columns, ascending.
        has_bias: whether there is one.
        damp: as there.

    Returns:
        `[out, kept]` in `weight.dtype`, and what is added to the bias, `[out]` float64, or None.

    >>> new, change = refit(torch.tensor([[1.0, 2.0]]), torch.eye(2), torch.tensor([1.0, 1.0, 2.0]), torch.tensor([0]), True, 0.0)
    >>> new.tolist(), change.tolist()
    ([[-1.0]], [2.0])
    """
    new = refit_columns(weight, centered(gram, total) if has_bias else gram, kept, damp)
    if not has_bias:
        return new, None
    lost = weight.double().clone()
    lost[:, kept] -= new.double()
    return new, lost @ (total[:-1] / total[-1]).double()


def lowest(scores: Tensor, num_removed: int, per_pool: int) -> Tensor:
    """Numbers of the units with the lowest scores, equally many of each pool; ties by number.

    >>> lowest(torch.tensor([0.0, 0.1, 5.0, 6.0]), 2, per_pool=2).tolist()
    [0, 2]
    """
    pools = scores.view(-1, per_pool)
    each = pools.argsort(dim=1, stable=True)[:, : num_removed // len(pools)]
    return (each + torch.arange(len(pools))[:, None] * per_pool).flatten()


def saliency(
    outputs: Tensor, squares: Tensor, products: Tensor, directions: Tensor, sizes: Tensor, weights: tuple[float, ...]
) -> Tensor:  # fmt: skip
    """Score of each group in training, from what it adds and from sums over its weights `w` and what a step takes off them, `d`.

    Six scores, each over its own norm: root of the output energy, and HESSO's `||w||`, `||w|| / n`, `1 + cos(w, d)`,
    `|w . d|`, `(w . d)^2 / 2`.

    Args:
        outputs: `[groups]` energy of what each adds to the output of what reads it.
        squares: `[groups]` sums of `w^2`.
        products: `[groups]` sums of `w d`.
        directions: `[groups]` sums of `d^2`.
        sizes: `[groups]` weights in a group.
        weights: of the six.
    Source: HESSO, arXiv 2409.09085; the direction is measured and not derived, so that it is any optimizer's. The output energy is
    Wanda-sp's (arXiv 2306.11695, 2312.11983).

    >>> one, two = torch.tensor([1.0, 4.0]), torch.ones(2)
    >>> saliency(two, one, two, two, two, (0.0, 1.0, 0.0, 0.0, 0.0, 0.0)).argsort().tolist()
    [0, 1]
    """
    norms = squares.sqrt()
    scores = (
        outputs.sqrt(),
        norms,
        norms / sizes,
        1 + products / ((norms + 1e-8) * (directions.sqrt() + 1e-8)),
        products.abs(),
        products.square() / 2,
    )
    return sum((w * s / (s.norm() + 1e-8) for w, s in zip(weights, scores, strict=True)), torch.zeros_like(squares))
