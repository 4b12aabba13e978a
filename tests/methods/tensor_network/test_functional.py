"""Laws of trains and of the low-rank solvers."""

import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from hf_compact.functional.factor import coefficients, energies, spectrum, whitening_factor
from hf_compact.methods.tensor_network.functional import (
    candidate_factors,
    check_factors,
    contract,
    decompose,
    fit_train,
    full_ranks,
    low_rank_for,
    low_rank_values,
    multiply_adds,
    num_parameters,
    peak_values,
    pivot,
    ranks_for,
    rebuild_multiply_adds,
    regression_target,
    splits,
    suffix_norms,
    truncate_energy,
)

TRAINS = {
    "low rank": ([12, 1], [1, 10]),
    "kronecker": ([3, 4], [5, 2]),
    "three cores": ([2, 3, 2], [5, 1, 2]),
    "four cores": ([2, 2, 3, 2], [2, 2, 2, 3]),
}
trains = pytest.mark.parametrize(("out_factors", "in_factors"), TRAINS.values(), ids=TRAINS)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(size: int, seed: int = 1) -> torch.Tensor:
    """`[T, in]` with strong correlations."""
    return normal(300, size, seed=seed) @ normal(size, size, seed=seed + 1)


@trains
def test_full_rank_is_exact(out_factors, in_factors):
    weight = normal(math.prod(out_factors), math.prod(in_factors))
    before = weight.clone()
    cores = decompose(weight, out_factors, in_factors, full_ranks(out_factors, in_factors))
    torch.testing.assert_close(contract(cores), weight, rtol=0, atol=1e-12)
    assert torch.equal(weight, before)


@trains
def test_error_is_bounded_by_what_the_bonds_cut_off(out_factors, in_factors):
    """Equality for two cores; for more the bound, and the error cannot be below the largest single cut."""
    weight = normal(math.prod(out_factors), math.prod(in_factors))
    ranks = [max(1, rank // 2) for rank in full_ranks(out_factors, in_factors)]
    d = len(out_factors)
    interleaved = weight.reshape(*out_factors, *in_factors).permute([a for k in range(d) for a in (k, d + k)])
    tails = []
    for k in range(1, d):
        size = math.prod(out_factors[:k]) * math.prod(in_factors[:k])
        tails.append(torch.linalg.svdvals(interleaved.reshape(size, -1))[ranks[k - 1] :].square().sum().item())
    error = (weight - contract(decompose(weight, out_factors, in_factors, ranks))).square().sum().item()
    assert max(tails) * (1 - 1e-9) <= error <= sum(tails) * (1 + 1e-9)
    if d == 2:
        assert error == pytest.approx(tails[0], rel=1e-9)


def test_two_cores_are_a_sum_of_kronecker_products():
    weight = normal(12, 10)
    first, second = decompose(weight, [3, 4], [5, 2], [6])
    total = sum(torch.kron(first[0, :, :, a], second[a, :, :, 0]) for a in range(6))
    torch.testing.assert_close(contract([first, second]), total)


def test_two_cores_with_factors_of_one_are_the_truncated_svd():
    weight = normal(12, 10)
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(contract(decompose(weight, [12, 1], [1, 10], [4])), (u[:, :4] * s[:4]) @ vt[:4])


@trains
def test_counts_equal_brute_force(out_factors, in_factors):
    ranks = [max(1, rank // 2) for rank in full_ranks(out_factors, in_factors)]
    cores = decompose(normal(math.prod(out_factors), math.prod(in_factors)), out_factors, in_factors, ranks)
    assert num_parameters(out_factors, in_factors, ranks) == sum(core.numel() for core in cores)
    state = torch.ones(*in_factors, 1)  # contract the last core first and count what every step multiplies
    done, peak, rest = 0, math.prod(in_factors), []
    for core in reversed(cores):
        bond, o, i, right = core.shape
        before = math.prod(in_factors[: len(cores) - 1 - len(rest)])
        done += before * bond * o * i * right * math.prod(rest)
        rest = [o, *rest]
        peak = max(peak, before * bond * math.prod(rest))
    assert state.numel() == math.prod(in_factors)
    assert (multiply_adds(out_factors, in_factors, ranks), peak_values(out_factors, in_factors, ranks)) == (done, peak)
    matrix, made = cores[0].reshape(-1, cores[0].shape[-1]), 0
    for core in cores[1:]:
        right = core.reshape(core.shape[0], -1)
        made += matrix.shape[0] * matrix.shape[1] * right.shape[1]
        matrix = (matrix @ right).reshape(-1, core.shape[-1])
    assert rebuild_multiply_adds(out_factors, in_factors, ranks) == made


@pytest.mark.parametrize(
    ("factors", "match"),
    [
        (([4, 3], [5, 2], [3, 3]), "d - 1 >= 1 ranks"),
        (([4, 3], [5, 3], [3]), "do not multiply"),
        (([3, 4], [5, 2], [9]), r"ranks\[0\] must be in \[1, 8\], got 9"),
        (([3, 4], [5, 2], [0]), r"ranks\[0\]"),
    ],
    ids=["ranks", "shape", "too large", "zero"],
)
def test_wrong_factors_name_themselves(factors, match):
    with pytest.raises(ValueError, match=match):
        check_factors((12, 10), *factors)


@given(st.integers(2, 400), st.integers(1, 4))
def test_splits_multiply_back_and_are_complete(size, num_cores):
    found = splits(size, num_cores)
    assert all(math.prod(factors) == size and len(factors) == num_cores and min(factors) > 1 for factors in found)
    if num_cores == 2:
        assert len(found) == sum(size % k == 0 for k in range(2, size // 2 + 1))


def test_a_prime_side_has_no_candidates():
    assert candidate_factors(7, 12, 2, most=3) == []


@pytest.mark.parametrize("num_values", [1, 50, 77, 100])
@pytest.mark.parametrize("is_pivoted", [False, True], ids=["plain", "pivoted"])
def test_the_largest_rank_within_a_budget(num_values, is_pivoted):
    rank = low_rank_for(12, 10, num_values, is_pivoted)
    fits = [r for r in range(1, 11) if low_rank_values(12, 10, r, is_pivoted) <= num_values]
    assert rank == max(fits, default=1)


def test_bonds_grow_together_within_a_budget():
    ranks = ranks_for([2, 3, 2], [5, 1, 2], 60)
    assert num_parameters([2, 3, 2], [5, 1, 2], ranks) <= 60
    bigger = [min(rank + 1, most) for rank, most in zip(ranks, full_ranks([2, 3, 2], [5, 1, 2]), strict=True)]
    assert num_parameters([2, 3, 2], [5, 1, 2], bigger) > 60


# Trains in a metric.


CUT = [((3, 4), (5, 4), [5]), ((2, 3, 2), (5, 2, 2), [3, 4])]


@pytest.mark.parametrize("train", CUT, ids=["two cores", "three cores"])
@pytest.mark.parametrize("is_left", [False, True], ids=["inputs", "inputs and outputs"])
def test_the_weighted_error_of_a_train_falls_with_every_sweep(train, is_left):
    weight, x, g = normal(12, 20), inputs(20), inputs(12, seed=5)
    right, left = whitening_factor(x.T @ x, 0.01), whitening_factor(g.T @ g, 0.01) if is_left else None

    def error(cores):
        lost = (weight - contract(cores)) @ right
        return (lost if left is None else left.T @ lost).square().sum().item()

    errors = [error(fit_train(weight, *train, right, left, num_sweeps=n)) for n in range(5)]
    assert all(high >= low * (1 - 1e-9) for high, low in itertools.pairwise(errors))
    assert errors[3] < 0.9 * errors[0] < 0.9 * error(decompose(weight, *train))


def test_where_nothing_weighs_a_fit_is_the_decomposition():
    for train in CUT:
        torch.testing.assert_close(contract(fit_train(normal(12, 20), *train)), contract(decompose(normal(12, 20), *train)))


def test_the_metric_of_a_kronecker_product_needs_no_sweeps():
    """In its coordinates two cores are a truncated singular value decomposition, which nothing beats."""
    weight = normal(12, 20)
    right = torch.kron(*(whitening_factor(inputs(n).T @ inputs(n), 0.01) for n in (5, 4)))
    left = torch.kron(*(whitening_factor(inputs(n, seed=5).T @ inputs(n, seed=5), 0.01) for n in (3, 4)))
    start, fitted = (contract(fit_train(weight, (3, 4), (5, 4), [5], right, left, num_sweeps=n)) for n in (0, 5))
    torch.testing.assert_close(start, fitted, rtol=1e-6, atol=1e-8)
    plain = contract(decompose(weight, (3, 4), (5, 4), [5]))
    best, other = ((left.T @ (weight - matrix) @ right).square().sum() for matrix in (start, plain))
    assert best < 0.9 * other


def test_a_train_of_two_matrices_is_the_low_rank_optimum_and_full_rank_is_exact():
    weight, x, g = normal(12, 20), inputs(20), inputs(12, seed=5)
    right, left = whitening_factor(x.T @ x, 0.0), whitening_factor(g.T @ g, 0.0)
    up, down = spectrum(weight, right, left).truncate(4)
    fitted = contract(fit_train(weight, (12, 1), (1, 20), [4], right, left, num_sweeps=2))
    torch.testing.assert_close(fitted, up @ down, rtol=1e-6, atol=1e-8)
    for o, i, _ in CUT:
        whole = contract(fit_train(weight, o, i, full_ranks(o, i), right, left, num_sweeps=1))
        torch.testing.assert_close(whole, weight, rtol=0, atol=1e-8)


def test_the_left_factor_of_a_given_basis_is_the_best_one():
    weight, x = normal(12, 20), inputs(20)
    right = whitening_factor(x.T @ x, 0.0)
    up, down = spectrum(weight, right).truncate(4)
    torch.testing.assert_close(coefficients(weight, down, right), up)
    basis = normal(4, 20, seed=7)
    best = coefficients(weight, basis, right)
    gradient = (weight - best @ basis) @ (right @ right.T) @ basis.T
    assert gradient.abs().max() < 1e-8 * (weight @ (right @ right.T) @ basis.T).abs().max()


def test_stacked_matrices_lose_the_energy_that_is_cut_off():
    """The law of a shared basis: over all matrices together, for inputs that they have in common."""
    weights, x = [normal(12, 20), normal(8, 20, seed=3)], inputs(20)
    right = whitening_factor(x.T @ x, 0.0)
    found = spectrum(torch.cat(weights), right)
    for rank in (3, 9):
        basis = found.truncate(rank)[1]
        lost = sum(((w - coefficients(w, basis, right) @ basis) @ x.T).square().sum().item() for w in weights)
        assert lost == pytest.approx(found.error(rank), rel=1e-6)


# Low rank in a metric.


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)], ids=str)
def test_the_lost_outputs_are_the_cut_singular_values(shape):
    """|(W - W') X^T|^2 is exactly the energy that is cut off (SVD-LLM), for every rank."""
    weight, x = normal(*shape), inputs(shape[1])
    found = spectrum(weight, whitening_factor(x.T @ x, damp=0.0))
    for rank in (1, 5, 11):
        up, down = found.truncate(rank)
        assert ((weight - up @ down) @ x.T).square().sum().item() == pytest.approx(found.error(rank), rel=1e-6)
    assert torch.linalg.matrix_rank(up @ down) == 11


def test_the_error_falls_with_the_rank_and_full_rank_is_exact():
    weight, x, g = normal(12, 20), inputs(20), inputs(12, seed=5)
    found = spectrum(weight, whitening_factor(x.T @ x, 0.0), whitening_factor(g.T @ g, 0.0))
    errors = [found.error(rank) for rank in range(13)]
    assert all(high > low for high, low in itertools.pairwise(errors))
    up, down = found.truncate(12)
    torch.testing.assert_close(up @ down, weight, rtol=0, atol=1e-8)


def test_no_other_matrix_of_that_rank_is_closer_in_both_metrics():
    weight, x, g = normal(12, 20), inputs(20), inputs(12, seed=5)
    right, left = whitening_factor(x.T @ x, 0.0), whitening_factor(g.T @ g, 0.0)
    found = spectrum(weight, right, left)

    def error(matrix):
        return (left.T @ (weight - matrix) @ right).square().sum().item()

    up, down = found.truncate(4)
    best = error(up @ down)
    assert best == pytest.approx(found.error(4), rel=1e-8)
    plain = spectrum(weight).truncate(4)
    assert best < 0.9 * error(plain[0] @ plain[1])
    for seed in range(5):
        assert best <= error((up + 1e-3 * normal(12, 4, seed=seed)) @ (down + 1e-3 * normal(4, 20, seed=seed)))
    torch.testing.assert_close(energies(weight, right, left), found.energy, rtol=1e-8, atol=1e-6)


@pytest.mark.parametrize("kind", ["rank deficient", "zero"])
def test_a_singular_gram_matrix_is_repaired(kind):
    x = inputs(20)[:5] if kind == "rank deficient" else torch.zeros(5, 20, dtype=torch.float64)
    factor = whitening_factor(x.T @ x, damp=0.0)
    assert torch.linalg.inv(factor).isfinite().all()
    up, down = spectrum(normal(12, 20), factor).truncate(12)
    torch.testing.assert_close(up @ down, normal(12, 20), rtol=0, atol=1e-4)


def test_a_gram_matrix_with_a_hole_is_refused():
    with pytest.raises(ValueError, match="not finite"):
        whitening_factor(torch.tensor([[float("nan")]]), damp=0.1)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)], ids=str)
def test_pivots_change_the_count_and_nothing_else(shape):
    up, down = spectrum(normal(*shape)).truncate(5)
    found = pivot(up, down)
    assert found.combinations.numel() + found.rows.numel() == low_rank_values(*shape, 5, True) == 5 * (sum(shape) - 5)
    rebuilt = torch.cat([found.rows, found.combinations @ found.rows])[found.order]
    torch.testing.assert_close(rebuilt, up @ down, rtol=0, atol=1e-10)
    assert found.combinations.abs().max() < 10


@pytest.mark.parametrize("kind", ["zero", "dead rows", "dead columns", "equal rows"])
def test_a_product_of_a_lesser_rank_has_pivots_too(kind):
    """As matrices with pruned units have."""
    weight = normal(20, 12)
    if kind == "equal rows":
        weight[:] = weight[:1].clone()
    else:
        weight[(slice(None), slice(3, None)) if kind == "dead columns" else slice(0 if kind == "zero" else 3, None)] = 0
    up, down = spectrum(weight).truncate(6)
    found = pivot(up, down)
    rebuilt = torch.cat([found.rows, found.combinations @ found.rows])[found.order]
    torch.testing.assert_close(rebuilt, weight, rtol=0, atol=1e-6)
    assert found.combinations.abs().max() < 10


def test_regression_fits_the_dense_outputs_better_than_plain_whitening():
    """Against the inputs of a compressed prefix, which differ from the dense ones."""
    weight, dense = normal(12, 20), inputs(20)
    compressed = dense + 0.3 * normal(300, 20, seed=9) * dense.std(0)
    gram, cross = compressed.T @ compressed, dense.T @ compressed
    right = whitening_factor(gram, 0.0)

    def loss(matrix, rank):
        up, down = spectrum(matrix, right).truncate(rank)
        return (dense @ weight.T - compressed @ (up @ down).T).square().sum().item()

    target = regression_target(weight, gram, cross, damp=0.0, blend=1.0)
    for rank in (2, 6, 12):
        assert loss(target, rank) < loss(weight, rank)
    torch.testing.assert_close(regression_target(weight, gram, gram, 0.01, 1.0), weight)
    torch.testing.assert_close(regression_target(weight, gram, cross, 0.01, 0.0), weight)


def test_truncation_keeps_the_energy_and_the_sub_gradient_shrinks_what_is_left():
    weight, x = normal(12, 20), inputs(20)
    right = whitening_factor(x.T @ x, 0.0)
    matrix, rank = truncate_energy(weight, 0.9, 0.0, right)
    values = torch.linalg.svdvals(weight @ right).square()
    assert values[:rank].sum() >= 0.9 * values.sum() > values[: rank - 1].sum()
    assert (matrix @ right).square().sum().item() == pytest.approx(values[:rank].sum().item(), rel=1e-9)
    smaller, same = truncate_energy(weight, 0.9, 0.1)
    whole, _ = truncate_energy(weight, 0.9, 0.0)
    u, _, vt = torch.linalg.svd(whole, full_matrices=False)
    torch.testing.assert_close(whole - smaller, 0.1 * u[:, :same] @ vt[:same])


def test_suffix_norms_have_the_gradient_of_a_group_lasso():
    matrix = normal(4, 3).requires_grad_()
    suffix_norms(matrix).sum().backward()
    expected = torch.zeros_like(matrix)
    for b in range(4):
        expected[b:] += matrix.detach()[b:] / matrix.detach()[b:].norm()
    torch.testing.assert_close(matrix.grad, expected)


def test_a_suffix_of_zeros_has_a_gradient():
    matrix = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    norms = suffix_norms(matrix)
    norms.sum().backward()
    assert norms.tolist() == [5.0, 0.0]
    torch.testing.assert_close(matrix.grad, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
