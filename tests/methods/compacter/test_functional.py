"""PHM maps against the definition by `torch.kron`, and the kernel features of SNNK against their kernels."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from hf_compact.methods.compacter.functional import (
    bundle,
    draw_frequencies,
    init_glorot_,
    kernel_features,
    low_rank_linear,
    phm_linear,
    phm_linear_factored,
    phm_weight,
    round_bottleneck,
)

#: id -> (n, in, out, rank)
SHAPES = {
    "narrowing": (4, 32, 8, 1),
    "widening": (4, 8, 32, 1),
    "square": (2, 6, 6, 1),
    "rank 3": (2, 12, 8, 3),
    "one product": (1, 5, 7, 2),
    "as narrow as n": (4, 16, 4, 1),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))


def factors(shape, dtype=torch.float64, seed=0):
    n, inputs, outputs, rank = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=dtype).requires_grad_()

    return draw(n, n, n), draw(n, inputs // n, rank), draw(n, outputs // n, rank), draw(outputs)


def by_definition(slow, s, t):
    """The sum of Kronecker products, term by term."""
    return sum(torch.kron(a, left @ right.T) for a, left, right in zip(slow, s, t, strict=True))


@shapes
def test_weight_is_the_sum_of_kronecker_products(shape):
    slow, s, t, _ = factors(shape)
    torch.testing.assert_close(phm_weight(slow, s, t), by_definition(slow, s, t), rtol=1e-12, atol=1e-12)
    whole = s @ t.mT
    torch.testing.assert_close(phm_weight(slow, whole), by_definition(slow, s, t), rtol=1e-12, atol=1e-12)


@shapes
@pytest.mark.parametrize("lead", [(), (3,), (2, 5), (0,)], ids=str)
@pytest.mark.parametrize("function", [phm_linear, phm_linear_factored])
def test_forward_and_gradients_are_those_of_the_definition(shape, lead, function):
    slow, s, t, bias = factors(shape)
    x = torch.randn(*lead, shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    wanted = x @ by_definition(slow, s, t) + bias
    found = function(x, slow, s, t, bias)
    assert found.shape == (*lead, shape[2])
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    weights = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    inputs = (x, slow, s, t, bias)
    for ours, theirs in zip(
        torch.autograd.grad((found * weights).sum(), inputs), torch.autograd.grad((wanted * weights).sum(), inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(2, 4, 2, 1), (2, 2, 4, 1), (2, 4, 4, 2)], ids=str)
def test_gradcheck(shape):
    x = torch.randn(3, shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert gradcheck(phm_linear_factored, (x, *factors(shape)))
    assert gradcheck(phm_linear, (x, *factors(shape)))


@shapes
def test_float32_is_within_rounding(shape):
    slow, s, t, bias = (p.detach() for p in factors(shape, torch.float32))
    x = torch.randn(300, shape[1], generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(phm_linear(x, slow, s, t, bias), x @ by_definition(slow, s, t) + bias, rtol=1e-5, atol=1e-4)


def test_whole_matrices_need_no_second_factor():
    slow, s, t, bias = factors((2, 6, 4, 3))
    x = torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(phm_linear(x, slow, s @ t.mT, bias=bias), phm_linear(x, slow, s, t, bias))


def test_the_way_with_fewer_multiplications_is_taken(monkeypatch):
    calls = []
    monkeypatch.setattr("hf_compact.methods.compacter.functional.phm_linear_factored", lambda *args: calls.append(args))
    with torch.no_grad():
        phm_linear(torch.zeros(1000, 768), *factors((4, 768, 24, 1), torch.float32)[:3])
        assert len(calls) == 1
        phm_linear(torch.zeros(1000, 768), *factors((4, 768, 24, 24), torch.float32)[:3])
        assert len(calls) == 1


def test_inputs_are_not_written_to():
    slow, s, t, bias = (p.detach() for p in factors((4, 8, 8, 1)))
    x = torch.ones(3, 8, dtype=torch.float64)
    before = [tensor.clone() for tensor in (x, slow, s, t, bias)]
    phm_linear(x, slow, s, t, bias)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, slow, s, t, bias), strict=True))


def test_low_rank_is_right_for_every_rank():
    s, t = torch.randn(6, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    x, bias = torch.randn(2, 6, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    torch.testing.assert_close(low_rank_linear(x, s, t, bias), x @ (s @ t.T) + bias)


@pytest.mark.parametrize(
    ("width", "factor", "division", "expected"),
    [(768, 32, 4, 24), (576, 32, 4, 16), (384, 32, 4, 12), (64, 32, 4, 4), (960, 32, 4, 32), (768, 16, 5, 50), (8, 32, 1, 1)],
)
def test_bottleneck_is_a_multiple_of_the_division(width, factor, division, expected):
    assert round_bottleneck(width, factor, division) == expected
    assert expected % division == 0


def test_glorot_bound_is_per_slice():
    values = init_glorot_(torch.empty(4, 96, 1), torch.Generator().manual_seed(0))
    bound = math.sqrt(2) * math.sqrt(6 / 97)
    assert values.abs().max() <= bound
    assert values.abs().max() > 0.97 * bound
    torch.testing.assert_close(values.var(), torch.tensor(bound**2 / 3), rtol=0.15, atol=0)


# SNNK.


def test_frequencies_depend_on_the_seed_alone_and_are_orthogonal_in_blocks():
    first = draw_frequencies(10, 8, seed=3)
    assert torch.equal(first, draw_frequencies(10, 8, seed=3))
    assert not torch.equal(first, draw_frequencies(10, 8, seed=4))
    products = first[:8] @ first[:8].T
    torch.testing.assert_close(products, torch.diag(products.diag()), rtol=0, atol=1e-4)
    torch.testing.assert_close(draw_frequencies(4000, 16, 0).square().sum(1).mean(), torch.tensor(16.0), rtol=0.05, atol=0)


def test_no_more_frequencies_are_drawn_than_asked_for(monkeypatch):
    """Each adapter of a model draws its own whenever it is loaded; a whole square of width 4096 takes seconds."""
    sizes = []
    square = torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda matrix: sizes.append([*matrix.shape]) or square(matrix))
    draw_frequencies(20, 16, seed=0)
    assert sizes == [[16, 16], [16, 4]]


def arc_cosine(x, y):
    """Of degree one."""
    angle = torch.arccos((x @ y / (x.norm() * y.norm())).clamp(-1, 1))
    return x.norm() * y.norm() / math.pi * (angle.sin() + (math.pi - angle) * angle.cos())


def gaussian(x, y):
    return (-(x / x.norm() - y / y.norm()).square().sum() / 2).exp()


@pytest.mark.parametrize(("feature", "kernel"), [("relu", arc_cosine), ("sincos", gaussian)])
def test_features_approach_their_kernel_as_one_over_the_root_of_their_number(feature, kernel):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 16, generator=generator)
    errors = []
    for count in (32, 2048):
        found = [kernel_features(torch.stack([x, y]), draw_frequencies(count, 16, seed), feature) for seed in range(40)]
        errors.append(torch.stack([a @ b - kernel(x, y) for a, b in found]).square().mean().sqrt())
    assert errors[1] < errors[0] / 4
    assert errors[1] < 0.04 * kernel(x, x)


def test_unknown_features_are_refused():
    with pytest.raises(ValueError, match="feature must be one of relu, sincos, got 'tanh'"):
        kernel_features(torch.ones(2), torch.ones(2, 2), "tanh")


def test_bundling_is_at_least_as_good_as_gradient_descent():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 8, generator=generator)
    target = torch.nn.functional.gelu(x @ torch.randn(8, 3, generator=generator))
    phi = kernel_features(x, draw_frequencies(128, 8, 0), "relu")
    solution = bundle(phi, target, ridge=1e-6)
    weight = torch.zeros(3, 128, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        (phi @ weight.T - target).square().mean().backward()
        optimizer.step()
    closed, trained = ((phi @ w.T - target).square().mean() for w in (solution, weight.detach()))
    assert closed <= trained
    assert closed < 0.1 * target.square().mean()


def test_ridge_shrinks_the_solution():
    phi, target = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)), torch.ones(50, 1)
    norms = [bundle(phi, target, ridge).norm() for ridge in (0.0, 1.0, 100.0)]
    assert norms[0] > norms[1] > norms[2]


def test_bundling_refuses_what_cannot_be_solved():
    with pytest.raises(ValueError, match=r"must share T, got \[3, 2\] and \[4, 2\]"):
        bundle(torch.ones(3, 2), torch.ones(4, 2), 0.1)
    with pytest.raises(ValueError, match="ridge must be at least 0, got -1"):
        bundle(torch.ones(3, 2), torch.ones(3, 2), -1)
