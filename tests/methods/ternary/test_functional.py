"""Laws of levels, steps, factors, straight-through gradients and packing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_compact.methods.ternary.functional import (
    GRIDS,
    fake_quantize,
    learned_quantize,
    least_squares_factor,
    pack_levels,
    packed_bytes,
    quantize,
    quantize_activations,
    round_levels,
    search_step,
    statistic_step,
    straight_through,
    unpack_levels,
)

ONE = torch.tensor(1.0)
widths = pytest.mark.parametrize("bits", GRIDS, ids=str)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def grid(bits: float) -> torch.Tensor:
    low, high, _ = GRIDS[bits]
    return torch.arange(int(high - low) + 1) + low


@given(
    st.sampled_from([1.58, 2, 3, 4, 8]), st.integers(1, 5), st.integers(0, 33), st.integers(0, 10_000),
    st.sampled_from(["base3", "bits"]),
)  # fmt: skip
def test_packing_is_exact_for_odd_shapes(bits, rows, columns, seed, packing):
    levels = grid(bits)[torch.randint(len(grid(bits)), (rows, columns), generator=torch.Generator().manual_seed(seed))]
    before = levels.clone()
    packed = pack_levels(levels, bits, packing)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, packed_bytes(columns, bits, packing))
    assert torch.equal(unpack_levels(packed, bits, packing, columns), levels)
    assert torch.equal(levels, before)


@pytest.mark.parametrize(("packing", "size"), [("base3", 116), ("bits", 144)])
def test_bytes_of_a_row(packing, size):
    assert packed_bytes(576, 1.58, packing) == size


def test_every_byte_of_five_trits_is_itself():
    every = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * 5)
    assert len(set(pack_levels(every, 1.58, "base3").flatten().tolist())) == 243
    with pytest.raises(ValueError, match="packed rows must have 2 bytes, got 1"):
        unpack_levels(torch.zeros(1, 1, dtype=torch.uint8), 1.58, "base3", 6)


@widths
def test_levels_are_the_nearest_of_the_grid(bits):
    weight = normal(40, 7) * grid(bits)[-1]
    found = round_levels(weight, torch.tensor(0.7), bits)
    best = (weight[..., None] / 0.7 - grid(bits)).abs().argmin(-1)
    assert torch.equal(found, grid(bits)[best])


def test_steps_of_the_papers_on_known_weights():
    weight = torch.tensor([[0.1, -0.3, 0.5, -0.9], [2.0, 0.0, 0.0, -2.0]])
    torch.testing.assert_close(statistic_step(weight, "absmean", 1.58), torch.tensor([[5.8 / 8]]))
    torch.testing.assert_close(statistic_step(weight, "absmedian", 1.58), torch.tensor([[0.3]]))
    torch.testing.assert_close(statistic_step(weight, "absmean", 1.58, "row"), torch.tensor([[0.45], [1.0]]))
    levels, factor = quantize(weight, scale="absmean", bits=1.58, granularity="tensor", dequantization="shared")
    assert levels.tolist() == [[0, 0, 1, -1], [1, 0, 0, -1]]
    assert factor.item() == pytest.approx(0.725)


@pytest.mark.parametrize(
    ("scale", "dequantization", "zeros", "error"),
    [("absmean", "shared", 0.310, 0.263), ("absmean", "weights", 0.310, 0.213), ("absmedian", "shared", 0.264, 0.318),
     ("absmedian", "weights", 0.264, 0.228), ("lsq", "weights", 0.459, 0.190)],
)  # fmt: skip
def test_ternary_errors_of_normal_weights(scale, dequantization, zeros, error):
    """Closed forms by the normal distribution: share of zeros `erf`, error from partial moments."""
    weight = normal(1000, 1000)
    levels, factor = quantize(weight, scale=scale, bits=1.58, granularity="tensor", dequantization=dequantization)
    assert (levels == 0).float().mean().item() == pytest.approx(zeros, abs=0.035 if scale == "lsq" else 0.003)
    assert (levels * factor - weight).square().mean().item() == pytest.approx(error, abs=0.003)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_steps_of_other_widths_are_the_best_for_normal_weights(bits):
    weight = normal(300, 300)
    step = statistic_step(weight, "absmean", bits)

    def error(step: torch.Tensor) -> float:
        return (round_levels(weight, step, bits) * step - weight).square().mean().item()

    assert error(step) <= 1.02 * min(error(step * factor) for factor in (0.8, 0.9, 0.95, 1.05, 1.1, 1.2))


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("with_gram", [False, True])
def test_no_other_factor_has_less_error(granularity, with_gram):
    weight, inputs = normal(6, 10), normal(50, 10, seed=1) @ normal(10, 10, seed=2)
    gram = inputs.T @ inputs if with_gram else None
    levels = round_levels(weight, statistic_step(weight, "absmean", 1.58), 1.58)
    factor = least_squares_factor(weight, levels, granularity, gram)
    assert factor.shape == ((1, 1) if granularity == "tensor" else (6, 1))

    def error(factor: torch.Tensor) -> float:
        lost = weight - factor * levels
        return (lost @ inputs.T if with_gram else lost).square().sum().item()

    assert all(error(factor) < error(factor * other) for other in (0.97, 1.03))


@widths
def test_a_searched_step_is_near_the_best(bits):
    weight = normal(4, 400)
    weight[0, 0] = 12.0  # an outlier takes part in one row only
    step = search_step(weight, bits, "row")
    assert step.shape == (4, 1)
    for factor in (0.85, 1.15):
        wrong = (round_levels(weight, step * factor, bits) * step * factor - weight).square().sum(1)
        assert ((round_levels(weight, step, bits) * step - weight).square().sum(1) <= 1.03 * wrong).all()


def test_inputs_are_rounded_per_token():
    x = normal(3, 5, 16) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    rounded = quantize_activations(x)
    steps = x.abs().amax(-1, keepdim=True) / 127
    assert ((rounded - x).abs() <= 0.5001 * steps).all()
    assert (rounded.abs().amax(-1) - x.abs().amax(-1)).abs().max() < 1e-3
    assert quantize_activations(torch.zeros(2, 4)).tolist() == torch.zeros(2, 4).tolist()
    assert quantize_activations(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0])
def test_the_gradient_goes_straight_through(strength):
    x = normal(4, 4).requires_grad_()
    y = straight_through(x, x.detach().round(), torch.tensor(strength))
    weights = normal(4, 4, seed=1)
    (y * weights).sum().backward()
    assert torch.equal(x.grad, weights)
    if strength != 0.25:
        assert torch.equal(y, x.round() if strength else x)


@pytest.mark.parametrize("scale", ["absmean", "absmedian"])
@pytest.mark.parametrize("dequantization", ["shared", "weights"])
def test_fake_quantization_ends_at_both_ends(scale, dequantization):
    settings = {"scale": scale, "bits": 1.58, "granularity": "row", "dequantization": dequantization}
    weight = normal(5, 9)
    levels, factor = quantize(weight, **settings)
    assert torch.equal(fake_quantize(weight, ONE, **settings), levels * factor)
    assert torch.equal(fake_quantize(weight, 0 * ONE, **settings), weight)


@pytest.mark.parametrize("bits", [1.58, 2, 3, 4])
def test_the_learned_step_has_the_gradient_of_lsq(bits):
    """Against finite differences of the same rounding, of which the levels are held: the paper's equation 3."""
    low, high, _ = GRIDS[bits]
    weight, step = normal(6, 8).mul_(high).requires_grad_(), torch.full((1, 1), 0.9, requires_grad=True)
    out = learned_quantize(weight, step, ONE, bits)
    direction = normal(6, 8, seed=1)
    (out * direction).sum().backward()
    unit = (weight / step).detach()
    margin = 0.5 if bits < 3 else 0.0
    inside = (unit >= low - margin) & (unit <= high + margin)
    levels = round_levels(unit.clamp(low - margin, high + margin), ONE, bits)
    torch.testing.assert_close(out.detach(), levels * 0.9)
    torch.testing.assert_close(weight.grad, direction * inside)
    slope = torch.where(inside, levels - unit, levels)
    expected = (direction * slope).sum() * (48 * high) ** -0.5
    torch.testing.assert_close(step.grad.squeeze(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(learned_quantize(weight, step, 0 * ONE, bits), weight)
