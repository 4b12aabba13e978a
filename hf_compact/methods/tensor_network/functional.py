"""Matrices as tensor trains: exact counts, the decomposition, and what is special about plain low rank.

A train of `d` cores `[r_{k-1}, o_k, i_k, r_k]` stands for a matrix of `prod(o)` rows and `prod(i)` columns. Two cores
with the factors (O, 1) and (1, I) are a plain product of two matrices; any other two are a sum of Kronecker products.

Alternative rejected: a class for each format; the counts and the contraction are the same for all of them.
"""

import functools
import itertools
import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

_STEPS = 4  # of conjugate gradients; the other cores are not at their best either


def full_ranks(out_factors: Sequence[int], in_factors: Sequence[int]) -> list[int]:
    """Largest useful bond dimension at each of the `d - 1` bonds.

    >>> full_ranks([4, 6], [2, 3])
    [8]
    """
    sizes = [o * i for o, i in zip(out_factors, in_factors, strict=True)]
    return [min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, len(sizes))]


def num_parameters(out_factors: Sequence[int], in_factors: Sequence[int], ranks: Sequence[int]) -> int:
    """Values in all cores.

    >>> num_parameters([6, 6, 6], [6, 6, 6], [10, 10])
    4320
    """
    bonds = [1, *ranks, 1]
    return sum(bonds[k] * o * i * bonds[k + 1] for k, (o, i) in enumerate(zip(out_factors, in_factors, strict=True)))


def multiply_adds(out_factors: Sequence[int], in_factors: Sequence[int], ranks: Sequence[int]) -> int:
    """Multiply-adds per token of the product from the last core to the first.

    >>> multiply_adds([8, 1], [1, 6], [3])
    42
    """
    bonds = [1, *ranks, 1]
    total = 0
    for k, (o, i) in enumerate(zip(out_factors, in_factors, strict=True)):
        total += math.prod(in_factors[:k]) * bonds[k] * o * i * bonds[k + 1] * math.prod(out_factors[k + 1 :])
    return total


def rebuild_multiply_adds(out_factors: Sequence[int], in_factors: Sequence[int], ranks: Sequence[int]) -> int:
    """Multiply-adds that make the matrix of the cores, from the first to the last.

    >>> rebuild_multiply_adds([8, 1], [1, 6], [3])
    144
    """
    sizes = [o * i for o, i in zip(out_factors, in_factors, strict=True)]
    bonds = [1, *ranks, 1]
    return sum(math.prod(sizes[: k + 1]) * bonds[k] * bonds[k + 1] for k in range(1, len(sizes)))


def peak_values(out_factors: Sequence[int], in_factors: Sequence[int], ranks: Sequence[int]) -> int:
    """Values per token of the largest tensor that the product goes through, input and output included.

    >>> peak_values([4, 4], [4, 4], [8])
    128
    """
    bonds = [1, *ranks, 1]
    states = [math.prod(in_factors[:k]) * bonds[k] * math.prod(out_factors[k:]) for k in range(len(bonds))]
    return max(states)


def splits(size: int, num_cores: int) -> list[tuple[int, ...]]:
    """Ordered factorisations into `num_cores` factors above 1, the most even first.

    >>> splits(12, 2)
    [(3, 4), (4, 3), (2, 6), (6, 2)]
    """
    if num_cores == 1:
        return [(size,)] if size > 1 else []
    found = [
        (first, *rest) for first in range(2, size // 2 + 1) if size % first == 0 for rest in splits(size // first, num_cores - 1)
    ]
    return sorted(found, key=lambda factors: (max(factors) / min(factors), factors))


def decompose(weight: Tensor, out_factors: Sequence[int], in_factors: Sequence[int], ranks: Sequence[int]) -> list[Tensor]:
    """Tensor-train SVD: cores whose squared error is at most the sum of all energies that the bonds cut off.

    Args:
        weight: `[out, in]`, any float dtype; solved in float64. Not written to.
        out_factors: `d` factors of `out`.
        in_factors: `d` factors of `in`.
        ranks: `d - 1` bond dimensions; a larger one than the rank of its unfolding is filled with zeros.

    Returns:
        `d` cores `[r_{k-1}, o_k, i_k, r_k]` float64.

    Raises:
        ValueError: the factors do not fit the matrix, or a rank is out of range.
    Source: Oseledets, Tensor-train decomposition (2011), with the row and column indices of a core beside each other.

    >>> w = torch.arange(24.0).reshape(4, 6)
    >>> torch.allclose(contract(decompose(w, [2, 2], [2, 3], [4])), w.double())
    True
    """
    check_factors(weight.shape, out_factors, in_factors, ranks)
    d = len(out_factors)
    order = [axis for k in range(d) for axis in (k, d + k)]
    rest = weight.double().reshape(*out_factors, *in_factors).permute(order)
    cores, bond = [], 1
    for k in range(d - 1):
        rest = rest.reshape(bond * out_factors[k] * in_factors[k], -1)
        left, values, right = torch.linalg.svd(rest, full_matrices=False)
        missing = max(0, ranks[k] - len(values))
        left, right = left[:, : ranks[k]], (values[:, None] * right)[: ranks[k]]
        left = torch.nn.functional.pad(left, (0, missing))
        rest = torch.nn.functional.pad(right, (0, 0, 0, missing))
        cores.append(left.reshape(bond, out_factors[k], in_factors[k], ranks[k]))
        bond = ranks[k]
    cores.append(rest.reshape(bond, out_factors[-1], in_factors[-1], 1))
    return cores


def fit_train(
    weight: Tensor, out_factors: Sequence[int], in_factors: Sequence[int], ranks: Sequence[int],
    right: Tensor | None = None, left: Tensor | None = None, num_sweeps: int = 0,
) -> list[Tensor]:  # fmt: skip
    """A train near the matrix in a weighted norm: `||left^T (W - train) right||_F` is small.

    A metric that is a Kronecker product over the factors is a change of coordinates of single cores, in which `decompose` is
    as good as it is in the plain norm. What the metrics are beyond that is left to the sweeps: one core at a time, least
    squares with all others fixed by a few steps of conjugate gradients, so that the error never grows. The normal equations
    themselves have `(r_{k-1} o_k i_k r_k)^2` entries, as both metrics couple them.

    Args:
        weight: `[out, in]`, any float dtype; solved in float64. Not written to.
        out_factors: `d` factors of `out`.
        in_factors: `d` factors of `in`.
        ranks: `d - 1` bond dimensions.
        right: `[in, in]` invertible, see `whitening_factor`; None for the identity.
        left: `[out, out]` invertible; None for the identity.
        num_sweeps: times that every core is solved for.

    Returns:
        As `decompose`.

    Raises:
        ValueError: as of `decompose`.
    Source: Holtz, Rohwedder, Schneider, The alternating linear scheme for tensor optimization in the tensor train format
        (2012); differs by the metrics and by inexact solves.

    >>> x = torch.diag(torch.tensor([3.0, 1.0]))
    >>> contract(fit_train(torch.eye(2), [2, 1], [1, 2], [1], right=x)).round().tolist()
    [[1.0, 0.0], [0.0, 0.0]]
    """
    rows, columns = _kronecker_factors(left, out_factors), _kronecker_factors(right, in_factors)
    row, column = (functools.reduce(torch.kron, parts) for parts in (rows, columns))
    target = row.T @ weight.double() @ column
    cores = decompose(target, out_factors, in_factors, ranks)
    outputs, inputs = (_rest(metric, known) for metric, known in ((left, row), (right, column)))
    for _ in range(num_sweeps):
        for k in reversed(range(len(cores))):
            cores[k] = _solve_core(cores, k, target, outputs, inputs)
            _orthogonalise_(cores, k, -1)
        for k in range(len(cores)):
            _orthogonalise_(cores, k, 1)
    return [
        torch.einsum("aoib,po,iq->apqb", core, torch.linalg.inv(row).T, torch.linalg.inv(column))
        for core, row, column in zip(cores, rows, columns, strict=True)
    ]


def _kronecker_factors(metric: Tensor | None, factors: Sequence[int]) -> list[Tensor]:
    """Lower triangular `L_k [f_k, f_k]`: `L_k L_k^T` is what is left of `metric metric^T` when the other factors are summed over."""
    if metric is None:
        return [torch.eye(factor, dtype=torch.float64) for factor in factors]
    gram = (metric.double() @ metric.double().T).reshape(*factors, *factors)
    d = len(factors)
    parts = [
        torch.einsum(gram, [*range(d), *(d if axis == k else axis for axis in range(d))], [k, d])  # the others' diagonals
        for k in range(d)
    ]
    return [torch.linalg.cholesky(part / part.diagonal().mean()) for part in parts]


def _rest(metric: Tensor | None, known: Tensor) -> Tensor | None:
    """The gram matrix of a metric in the coordinates of its Kronecker factors."""
    if metric is None:
        return None
    seen = torch.linalg.solve_triangular(known, metric.double(), upper=False)
    return seen @ seen.T


def _solve_core(cores: Sequence[Tensor], k: int, target: Tensor, outputs: Tensor | None, inputs: Tensor | None) -> Tensor:
    """A few steps of conjugate gradients on one core: every one takes the weighted error down, or is not made."""

    def apply(core: Tensor) -> Tensor:
        return contract([*cores[:k], core, *cores[k + 1 :]])

    def weigh(matrix: Tensor) -> Tensor:
        matrix = matrix if inputs is None else matrix @ inputs
        return matrix if outputs is None else outputs @ matrix

    matrix, back = torch.func.vjp(apply, cores[k])
    core = cores[k]
    (residual,) = back(weigh(target - matrix))
    direction, energy = residual, residual.square().sum()
    start = energy
    for _ in range(_STEPS):
        if energy <= 1e-24 * start:
            break
        (curved,) = back(weigh(apply(direction)))
        step = energy / (direction * curved).sum()
        core, residual = core + step * direction, residual - step * curved
        energy, before = residual.square().sum(), energy
        direction = residual + (energy / before) * direction
    return core


def _orthogonalise_(cores: list[Tensor], k: int, towards: Literal[-1, 1]) -> None:
    """Let a core's neighbour take over all but its directions: the train is the same, the next core's equations are better."""
    core, other = cores[k], k + towards
    flat = core.flatten(1).T if towards < 0 else core.flatten(0, 2)
    if not 0 <= other < len(cores) or flat.shape[0] < flat.shape[1]:
        return
    axes, mix = torch.linalg.qr(flat)
    if towards < 0:
        cores[k], cores[other] = axes.T.reshape(core.shape), cores[other] @ mix.T
    else:
        cores[k], cores[other] = axes.reshape(core.shape), torch.tensordot(mix, cores[other], dims=1)


def contract(cores: Sequence[Tensor]) -> Tensor:
    """The matrix `[out, in]` of a train: inverse of `decompose` at full rank."""
    result = cores[0]
    for core in cores[1:]:
        result = torch.tensordot(result, core, dims=1)
    result = result.squeeze(0).squeeze(-1)
    d = len(cores)
    result = result.permute(*range(0, 2 * d, 2), *range(1, 2 * d, 2))
    return result.reshape(math.prod(core.shape[1] for core in cores), -1)


def check_factors(shape: Sequence[int], out_factors: Sequence[int], in_factors: Sequence[int], ranks: Sequence[int]) -> None:
    """Raise ValueError unless the factors multiply to the shape and every rank is between 1 and its bond's full rank."""
    if len(out_factors) != len(in_factors) or len(ranks) != len(out_factors) - 1 or not ranks:
        raise ValueError(
            f"a train of d cores needs d out_factors, d in_factors and d - 1 >= 1 ranks, "
            f"got {len(out_factors)}, {len(in_factors)} and {len(ranks)}"
        )
    if (math.prod(out_factors), math.prod(in_factors)) != tuple(shape):
        raise ValueError(f"factors {list(out_factors)} x {list(in_factors)} do not multiply to the shape {list(shape)}")
    for k, (rank, most) in enumerate(zip(ranks, full_ranks(out_factors, in_factors), strict=True)):
        if not 1 <= rank <= most:
            raise ValueError(f"ranks[{k}] must be in [1, {most}], got {rank}")


def regression_target(weight: Tensor, gram: Tensor, cross: Tensor, damp: float, blend: float) -> Tensor:
    """The matrix that, fed with the inputs of a compressed prefix, comes closest to what `weight` made of the dense ones.

    `M = W C (G + ridge)^-1` minimises `sum ||W x_o - M x_c||^2`; its rank-`r` approximation in the metric of `G` is the
    solution of the reduced-rank regression.

    Args:
        weight: `[out, in]`.
        gram: `[in, in]` sum of x_c x_c^T.
        cross: `[in, in]` sum of x_o x_c^T.
        damp: ridge as a fraction of the mean diagonal of `gram`.
        blend: share of `cross` in `C`; the rest is `gram`, which keeps few tokens from being fitted too closely.

    Returns:
        `[out, in]` float64.

    Raises:
        ValueError: the gram matrix cannot be inverted.
    Source: Izenman, Reduced-rank regression (1975).

    >>> g = torch.eye(2); regression_target(torch.ones(1, 2), g, 2 * g, damp=0.0, blend=1.0).tolist()
    [[2.0, 2.0]]
    """
    damped = gram.double().clone()
    ridge = damp * damped.diagonal().mean()
    damped.diagonal().add_(ridge)
    mixed = blend * cross.double() + (1 - blend) * gram.double()
    mixed.diagonal().add_(ridge)
    try:
        return torch.linalg.solve(damped, weight.double() @ mixed, left=False)
    except torch.linalg.LinAlgError as error:
        raise ValueError(f"gram matrix cannot be inverted with damp {damp}: give it a larger one") from error


class Pivoted(NamedTuple):
    """A matrix of rank `r` as `r` of its own rows, and all others as combinations of them."""

    order: Tensor
    """`[out]` int32: where row `j` of the matrix lies in `[rows; combinations @ rows]`."""
    combinations: Tensor
    """`[out - r, r]`."""
    rows: Tensor
    """`[r, in]`."""


def pivot(up: Tensor, down: Tensor) -> Pivoted:
    """The same product `up @ down` in `r (out + in - r)` values instead of `r (out + in)`.

    The gauge freedom of a product of two matrices is an invertible `r x r` matrix; it is spent on making `r` rows of
    `up` the identity. The rows are the pivots of an LU factorisation, which keeps the combinations small.

    Args:
        up: `[out, r]`.
        down: `[r, in]`.

    Source: PIFA (arXiv 2501.19090); differs by pivoting in an orthonormal basis of the product's rows.

    >>> found = pivot(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0]]))
    >>> found.rows.tolist(), found.combinations.tolist(), found.order.tolist()
    ([[6.0, 8.0]], [[0.5]], [1, 0])
    """
    up, down = up.double(), down.double()
    rank = up.shape[1]
    mix = torch.linalg.qr(down.T).R  # rows of the product in an orthonormal basis: up @ mix^T
    permutation, lower, _ = torch.linalg.lu(up @ mix.T)
    places = permutation.argmax(0)
    chosen, (rest, by_row) = places[:rank], places[rank:].sort()
    # `lower` has ones on its diagonal, so that it divides where the product, of a lesser rank, would not.
    others = lower[rank:][by_row]
    combinations = torch.linalg.solve_triangular(lower[:rank], others, upper=False, left=False, unitriangular=True)
    order = torch.empty(len(up), dtype=torch.int32)
    order[torch.cat([chosen, rest])] = torch.arange(len(up), dtype=torch.int32)
    return Pivoted(order, combinations, up[chosen] @ down)


def balance(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with the singular values shared evenly between two orthogonal factors, as gradients like it.

    Args:
        up: `[out, r]`.
        down: `[r, in]`.

    >>> [factor.abs().tolist() for factor in balance(torch.tensor([[1.0]]), torch.tensor([[4.0]]))]
    [[[2.0]], [[2.0]]]
    """
    left, right = torch.linalg.qr(up.double()), torch.linalg.qr(down.double().T)
    u, values, v = torch.linalg.svd(left.R @ right.R.T)
    root = values.sqrt()
    return (left.Q @ (u * root)).to(up.dtype), ((root[:, None] * v) @ right.Q.T).to(down.dtype)


def low_rank_values(out_features: int, in_features: int, rank: int, is_pivoted: bool) -> int:
    """Values of a plain product of that rank.

    >>> low_rank_values(8, 6, 3, is_pivoted=False), low_rank_values(8, 6, 3, is_pivoted=True)
    (42, 33)
    """
    return rank * (out_features + in_features - (rank if is_pivoted else 0))


def low_rank_for(out_features: int, in_features: int, num_values: int, is_pivoted: bool) -> int:
    """The largest rank with at most that many values (1 at least).

    >>> low_rank_for(8, 6, 33, is_pivoted=True)
    3
    """
    ranks = range(1, min(out_features, in_features) + 1)
    return max(1, bisect_right(ranks, num_values, key=lambda rank: low_rank_values(out_features, in_features, rank, is_pivoted)))


def ranks_for(out_factors: Sequence[int], in_factors: Sequence[int], num_values: int, multiple: int = 1) -> list[int]:
    """Equal bond dimensions, each up to its full rank, with at most that many values in all cores (1 at least).

    They are multiples, where the budget is enough for one and the full rank does not come first.

    >>> ranks_for([4, 4], [4, 4], 128), ranks_for([4, 4], [4, 4], 128, multiple=3)
    ([4], [3])
    """
    full = full_ranks(out_factors, in_factors)
    best = [1] * len(full)
    for rank in [*range(2, multiple), *range(multiple, max(full) + multiple, multiple)]:
        ranks = [min(rank, most) for most in full]
        if num_parameters(out_factors, in_factors, ranks) > num_values:
            break
        best = ranks
    return best


def truncate_energy(weight: Tensor, energy: float, shrink: float, right: Tensor | None = None) -> tuple[Tensor, int]:
    """The matrix with the fewest singular values that keep a share of its energy, each made smaller by `shrink`.

    A step along the sub-gradient `U V^T` of the nuclear norm at the truncated matrix takes the same amount off every
    singular value that is left, so both are one operation.

    Args:
        weight: `[out, in]`. Not written to.
        energy: kept share of the sum of squares, in (0, 1].
        shrink: taken off the kept singular values, learning rate times weight of the norm.
        right: `[in, in]` invertible; the singular values are those of `W right`.

    Returns:
        The matrix, in the dtype of `weight`, and its rank.
    Source: Trained Rank Pruning (arXiv 1812.02402); differs by the metric of the inputs.

    >>> truncate_energy(torch.diag(torch.tensor([4.0, 1.0])), energy=0.9, shrink=0.5)
    (tensor([[3.5000, 0.0000], [0.0000, 0.0000]]), 1)
    """
    seen = weight.double() if right is None else weight.double() @ right
    u, values, vt = torch.linalg.svd(seen, full_matrices=False)
    kept = values.square().cumsum(0)
    rank = min(int((kept < energy * kept[-1] * (1 - 1e-12)).sum()) + 1, len(values))
    result = (u[:, :rank] * (values[:rank] - shrink).clamp_min(0)) @ vt[:rank]
    result = result if right is None else torch.linalg.solve(right, result, left=False)
    return result.to(weight.dtype), rank


def suffix_norms(matrix: Tensor) -> Tensor:
    """Norm of all rows from each one on, `[n]` of `[n, m]`; a suffix of zeros has the sub-gradient 0.

    >>> suffix_norms(torch.tensor([[3.0], [4.0]])).tolist()
    [5.0, 4.0]
    """
    energy = matrix.square().sum(1).flip(0).cumsum(0).flip(0)
    return energy.clamp_min(torch.finfo(energy.dtype).tiny).sqrt() * (energy > 0)


def candidate_factors(
    out_features: int, in_features: int, num_cores: int, most: int
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Pairs of factorisations of both sides, the most even ones first.

    >>> candidate_factors(4, 6, 2, most=1)
    [((2, 2), (2, 3))]
    """
    pairs = itertools.product(splits(out_features, num_cores), splits(in_features, num_cores))
    ordered = sorted(pairs, key=lambda pair: max(max(f) / min(f) for f in pair))
    return ordered[:most]
