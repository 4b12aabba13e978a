"""Gram matrices are sums of outer products, and the factor of their inverse exists for whatever calibration gives."""

import pytest
import torch

from hf_compact.functional.gram import add_gram_, damped_gram, inverse_factor, output_energy


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gram_of(inputs: torch.Tensor) -> torch.Tensor:
    x = inputs.double().reshape(-1, inputs.shape[-1])
    return x.T @ x


def damped(gram: torch.Tensor, damp: float) -> torch.Tensor:
    """What `inverse_factor` says it inverts."""
    mean = gram.diagonal().double().mean()
    dead = torch.zeros(len(gram)) if damp else gram.diagonal() == 0
    return gram.double() + (damp + dead.double()).diag() * mean


@pytest.mark.parametrize("split", [[60], [1, 59], [20, 20, 20], [7, 0, 53]], ids=str)
def test_sum_does_not_depend_on_the_batches(split):
    inputs = normal(60, 24)
    gram = torch.zeros(24, 24, dtype=torch.float64)
    for batch in inputs.split(split):
        add_gram_(gram, batch)
    torch.testing.assert_close(gram, gram_of(inputs), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("size", [1, 511, 512, 513, 1100])
def test_column_blocks_join(size):
    inputs = normal(6, size)
    gram = torch.zeros(size, size, dtype=torch.float64)
    add_gram_(gram, inputs)
    torch.testing.assert_close(gram, gram_of(inputs), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gram, gram.T, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_axes_and_dtypes(dtype):
    inputs = normal(2, 3, 5, 8).to(dtype)
    before = inputs.clone()
    gram = torch.ones(8, 8, dtype=torch.float64)
    add_gram_(gram, inputs)
    torch.testing.assert_close(gram, 1 + gram_of(inputs), rtol=1e-5, atol=1e-4)
    assert torch.equal(inputs, before)


def test_inputs_of_another_width():
    with pytest.raises(ValueError, match="inputs must have 4 features like the gram matrix, got 5"):
        add_gram_(torch.zeros(4, 4, dtype=torch.float64), torch.zeros(2, 5))


@pytest.mark.parametrize("damp", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("size", [1, 7, 40])
def test_factor_squares_to_the_inverse(size, damp):
    gram = gram_of(normal(3 * size, size))
    before = gram.clone()
    upper = inverse_factor(gram, damp).double()
    assert torch.equal(upper, upper.triu())
    assert (upper.diagonal() > 0).all()
    torch.testing.assert_close(upper.T @ upper @ damped(gram, damp), torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-4)
    assert torch.equal(gram, before)


@pytest.mark.parametrize("damp", [0.0, 0.01])
def test_inputs_that_never_fired_are_independent(damp):
    inputs = normal(30, 6)
    inputs[:, 2] = 0
    gram = gram_of(inputs)
    upper = inverse_factor(gram, damp).double()
    torch.testing.assert_close(upper.T @ upper, damped(gram, damp).inverse(), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(damped_gram(gram, damp).double(), damped(gram, damp), rtol=1e-6, atol=1e-6)
    others = torch.tensor([0, 1, 3, 4, 5])
    assert not upper[2, others].any()
    assert not upper[others, 2].any()


@pytest.mark.parametrize("size", [1e-4, 1e4])
@pytest.mark.parametrize("damp", [0.0, 0.01])
def test_the_unit_of_the_inputs_does_not_matter(damp, size):
    """A mean over tokens in the place of a sum, say, and inputs among them that never fired."""
    inputs = normal(30, 6)
    inputs[:, 2] = 0
    gram = gram_of(inputs)
    torch.testing.assert_close(inverse_factor(size * gram, damp) * size**0.5, inverse_factor(gram, damp))
    torch.testing.assert_close(damped_gram(size * gram, damp) / size, damped_gram(gram, damp))


def test_nothing_fired():
    torch.testing.assert_close(inverse_factor(torch.zeros(5, 5, dtype=torch.float64), 0.0), torch.eye(5))


def test_fewer_tokens_than_inputs():
    gram = gram_of(normal(4, 16))
    upper = inverse_factor(gram, 0.0)
    assert upper.isfinite().all()
    assert torch.equal(upper, upper.triu())


@pytest.mark.parametrize("damp", [0.0, 1e-9])
def test_slightly_indefinite_is_repaired(damp):
    gram = gram_of(normal(64, 16))
    mean = gram.diagonal().mean()
    vectors = torch.linalg.qr(normal(16, 16, seed=1, dtype=torch.float64)).Q
    values = torch.linspace(0, 2, 16, dtype=torch.float64) * mean
    values[0] = -1e-6 * mean
    gram = vectors @ torch.diag(values) @ vectors.T
    before = gram.clone()
    upper = inverse_factor(gram, damp).double()
    assert torch.equal(gram, before)
    repaired = (upper.T @ upper).inverse()
    ridge = (repaired - gram).diagonal().mean() / mean
    assert 1e-6 < ridge < 1e-4, "the smallest ridge of the tenfold steps that helps"
    torch.testing.assert_close(
        repaired - ridge * mean * torch.eye(16, dtype=torch.float64), gram, rtol=0, atol=0.05 * mean.item()
    )


def test_not_repairable():
    with pytest.raises(ValueError, match=r"the gram matrix stays indefinite with a ridge of .* of its mean diagonal"):
        inverse_factor(torch.tensor([[1.0, 5e6], [5e6, 1.0]]), 0.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(value):
    gram = torch.eye(3)
    gram[0, 1] = value
    with pytest.raises(ValueError, match="holds values that are not finite"):
        inverse_factor(gram, 0.01)


def test_energy_is_of_the_outputs():
    inputs, weight = normal(50, 12), normal(5, 12, seed=1)
    assert output_energy(weight, gram_of(inputs)) == pytest.approx((inputs @ weight.T).square().sum().item(), rel=1e-5)


def test_energy_without_a_gram_is_of_the_weight():
    weight = normal(5, 12)
    assert output_energy(weight) == pytest.approx(weight.square().sum().item())
    assert output_energy(weight) == pytest.approx(output_energy(weight, torch.eye(12)))


def test_energy_grows_with_the_square_and_adds_over_rows():
    gram, weight = gram_of(normal(50, 12)), normal(5, 12, seed=1)
    whole = output_energy(weight, gram)
    assert output_energy(3 * weight, gram) == pytest.approx(9 * whole, rel=1e-5)
    assert output_energy(weight[:2], gram) + output_energy(weight[2:], gram) == pytest.approx(whole, rel=1e-5)
    assert output_energy(torch.zeros(5, 12), gram) == 0


def test_energy_leaves_its_inputs():
    gram, weight = gram_of(normal(50, 12)), normal(5, 12, seed=1, dtype=torch.bfloat16)
    before = gram.clone(), weight.clone()
    output_energy(weight, gram)
    assert torch.equal(gram, before[0])
    assert torch.equal(weight, before[1])
