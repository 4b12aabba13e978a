"""Laws of the codebook solvers: nearest is nearest, feedback and refits only help, and nothing depends on neat shapes."""

import itertools
import math

import pytest
import torch
from safetensors.torch import load_file

from hf_compact.functional.feedback import (
    descend_codes,
    num_groups,
    refit_scale,
    round_with_feedback,
    scale_codes,
    scale_groups_,
    spread_groups,
    stored_scale,
)
from hf_compact.functional.gram import inverse_factor, output_energy
from hf_compact.methods.codebook.functional import (
    NF4,
    Quantized,
    Rounder,
    dequantize,
    fixed_levels,
    grid_size,
    group_scale,
    lloyd_levels,
    power_levels,
    refit_levels,
    refit_power,
    search_power,
    search_scale,
    sort_levels,
    split_borders,
    split_levels,
)
from tests.golden import make_codebook

#: id -> (rows, columns, group size)
SHAPES = {
    "even": (16, 64, 32),
    "ragged_last_group": (12, 70, 32),
    "one_group_per_row": (9, 33, None),
    "group_wider_than_row": (5, 24, 64),
    "single_row": (1, 40, 16),
    "single_input": (6, 1, 8),
}
#: id -> (grid, bits, symmetric)
GRIDS = {
    "uniform2": ("uniform", 2, False),
    "uniform4": ("uniform", 4, False),
    "symmetric3": ("uniform", 3, True),
    "symmetric8": ("uniform", 8, True),
    "nf4": ("nf4", 4, False),
    "learned2": ("learned", 2, False),
    "learned4": ("learned", 4, False),
}

shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
grids = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated_gram(columns: int, seed: int = 1) -> torch.Tensor:
    """Second moments of inputs that live near a few directions; damped, so that it is the objective of all solvers."""
    inputs = normal(4 * columns + 8, max(1, columns // 4), seed=seed) @ normal(max(1, columns // 4), columns, seed=seed + 1)
    inputs += 0.3 * normal(*inputs.shape, seed=seed + 2)
    gram = inputs.double().T @ inputs.double()
    return gram + 0.01 * gram.diagonal().mean() * torch.eye(columns, dtype=torch.float64)


def tables_of(rows: int) -> int:
    return math.ceil(rows / 5)


def start(weight: torch.Tensor, gram: torch.Tensor, group_size: int | None, grid: tuple[str, int, bool]):
    """Levels, scales and offsets as the solver begins with them."""
    name, bits, symmetric = grid
    if name == "learned":
        scale = group_scale(weight, group_size)
        spread = spread_groups(scale, group_size, weight.shape[1])
        levels = lloyd_levels(weight / spread, gram.diagonal().float() * spread.square(), 2**bits, tables_of(len(weight)))
        return levels, scale, None
    levels = fixed_levels(name, bits, symmetric)
    return levels, *search_scale(weight, levels, group_size, symmetric or name == "nf4", gram.diagonal().float(), 8)


def nearest(weight, levels, scale, zero, group_size) -> Quantized:
    spread = [None if t is None else spread_groups(t, group_size, weight.shape[1]) for t in (scale, zero)]
    return Quantized(Rounder(levels, len(weight))(weight, *spread)[0], scale, zero, levels)


def slow_dequantize(quantized: Quantized, group_size: int | None) -> torch.Tensor:
    """Element by element, from the definition."""
    codes, scale, zero, levels = quantized
    rows, columns = codes.shape
    dense = torch.empty(rows, columns)
    for r in range(rows):
        table = levels[r // math.ceil(rows / len(levels))]
        for c in range(columns):
            g = 0 if group_size is None else c // group_size
            offset = 0 if zero is None else zero[r, g].item()
            dense[r, c] = scale[r, g].item() * (table[codes[r, c].item()].item() - offset)
    return dense


def error(weight: torch.Tensor, dense: torch.Tensor, gram: torch.Tensor) -> float:
    delta = (weight - dense).double()
    return (delta @ gram.double() * delta).sum().item()


def slow_feedback(weight, levels, scale, zero, group_size, gram, order) -> torch.Tensor:
    """Optimal brain quantization in a fixed order, with the inverse taken anew for the columns that are still free."""
    free, dense = weight.double().clone(), torch.empty_like(weight, dtype=torch.float64)
    for position, column in enumerate(order.tolist()):
        rest = order[position:]
        inverse = gram[rest][:, rest].inverse()
        group = 0 if group_size is None else column // group_size
        offset = None if zero is None else zero[:, group, None]
        value = Rounder(levels, len(weight))(free[:, column, None].float(), scale[:, group, None], offset)[1][:, 0]
        dense[:, column] = value
        free[:, rest] -= torch.outer((free[:, column] - value) / inverse[0, 0], inverse[0])
    return dense


# Grids and rounding.


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_uniform_levels_are_consecutive(bits):
    assert fixed_levels("uniform", bits, False).tolist() == [list(range(2**bits))]
    assert fixed_levels("uniform", bits, True).tolist() == [list(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))]


def test_power_one_is_the_uniform_grid():
    for bits in (2, 3, 4, 8):
        assert torch.equal(power_levels(bits, 1.0), fixed_levels("uniform", bits, symmetric=True))


@pytest.mark.parametrize("exponent", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_power_levels_are_odd_and_grow(bits, exponent):
    levels = power_levels(bits, exponent)[0]
    assert (levels.diff() > 0).all()
    assert torch.equal(levels[1:], -levels[1:].flip(0))  # the lowest code has no partner
    steps = levels[2 ** (bits - 1) :].diff()
    assert (steps.diff() > 0).all()
    assert levels[0] == -(2 ** (bits - 1))


@pytest.mark.parametrize("bits", [3, 4])
def test_the_searched_power_is_below_one_for_normal_weights(bits):
    """Without clipping, the optimum for normal values lies near 0.6 at both widths; with it, near 0.8."""
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(512)
    found = search_power(weight, bits, None, ones, shrink_steps=1, scale_bits=None)
    assert 0.5 <= found <= 0.75

    def loss(levels: torch.Tensor) -> float:
        scale, _ = search_scale(weight, levels, None, True, ones, 16)
        return (Rounder(levels, 256)(weight, scale, None)[1] - weight).square().mean().item()

    clipped = search_power(weight, bits, None, ones, shrink_steps=16, scale_bits=None)
    assert loss(power_levels(bits, clipped)) < loss(fixed_levels("uniform", bits, symmetric=True))


def power_start(bits: int, exponent: float):
    """Weights whose best exponent is known: values on the grid of that exponent."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(2**bits, (24, 40), generator=generator, dtype=torch.uint8)
    scale = stored_scale(torch.rand(24, 2, generator=generator) + 0.1, None)
    return dequantize(Quantized(codes, scale, None, power_levels(bits, exponent)), 20), codes, scale


@pytest.mark.parametrize("truth", [0.45, 0.7, 1.0, 1.25])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_learned_power_is_the_one_behind_the_weights(bits, truth):
    weight, codes, scale = power_start(bits, truth)
    found = refit_power(weight, codes, scale, 0.8, bits, 20, correlated_gram(40).float())
    assert found == pytest.approx(truth, rel=2e-3)


def test_the_learned_power_stays_where_nothing_is_better():
    """Of uniform values on their own grid the exponent stays 1 exactly, and so do the levels."""
    weight, codes, scale = power_start(3, 1.0)
    assert refit_power(weight, codes, scale, 1.0, 3, 20, correlated_gram(40).float()) == 1.0
    assert torch.equal(power_levels(3, 1.0), fixed_levels("uniform", 3, symmetric=True))


def test_the_learned_power_needs_more_than_the_ends():
    codes = torch.zeros(4, 8, dtype=torch.uint8)  # the lowest level and no other: every exponent gives the same
    assert refit_power(normal(4, 8), codes, torch.ones(4, 1), 0.7, 2, None, torch.eye(8)) == 0.7


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_learned_power_never_raises_the_error(bits):
    weight, gram = normal(24, 64).pow(3), correlated_gram(64).float()
    for exponent in (0.5, 0.8, 1.0):
        levels = power_levels(bits, exponent)
        scale, _ = search_scale(weight, levels, 32, True, gram.diagonal(), 16)
        codes, before = Rounder(levels, 24)(weight, spread_groups(scale, 32, 64), None)
        found = refit_power(weight, codes, scale, exponent, bits, 32, gram)
        after = dequantize(Quantized(codes, scale, None, power_levels(bits, found)), 32)
        assert output_energy(weight - after, gram) <= output_energy(weight - before, gram) * (1 + 1e-6)
        assert 0.2 <= found <= 1.4


# SplitQuant.


def split_parts(unit: torch.Tensor) -> list[torch.Tensor]:
    """Three layers of the same shape that hold the weights of their own part and zeros elsewhere."""
    part = torch.bucketize(unit, split_borders(unit, torch.ones(unit.shape[1])))
    return [torch.where(part == number, unit, 0.0) for number in range(3)]


def test_the_split_itself_is_exact():
    unit, x = normal(48, 64), normal(10, 64, seed=1)
    parts = split_parts(unit)
    assert all((part != 0).float().mean() > 0.1 for part in parts)
    torch.testing.assert_close(sum(x @ part.T for part in parts), x @ unit.T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_merged_index_is_the_sum_of_three_quantized_parts(bits):
    unit = normal(48, 64)
    levels = split_levels(unit, bits, torch.ones(64))
    merged = Rounder(levels, 48)(unit, torch.ones(48, 1), None)[1]
    total = torch.zeros_like(unit)
    for number, part in enumerate(split_parts(unit)):
        own = levels[:, number * 2**bits : (number + 1) * 2**bits]
        total += torch.where(part != 0, Rounder(own, 48)(part, torch.ones(48, 1), None)[1], 0.0)
    # A weight beside a border may be nearer to the other part's first level.
    moved = merged != total
    assert moved.float().mean() < 0.02
    assert ((merged - unit).abs() <= (total - unit).abs()).all()
    codes = Rounder(levels, 48)(unit, torch.ones(48, 1), None)[0]
    part, step = codes // 2**bits, codes % 2**bits
    assert torch.equal(merged, levels[0].view(3, -1)[part.int(), step.int()])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_split_levels_are_equal_steps_in_three_parts(bits):
    unit = normal(64, 128)
    levels = split_levels(unit, bits, torch.ones(128))
    assert levels.shape == (1, grid_size("split", bits))
    assert torch.equal(levels, levels.sort(1).values)
    borders = split_borders(unit, torch.ones(128))
    for number, own in enumerate(levels.view(3, -1)):
        torch.testing.assert_close(own.diff(), own.diff().mean().expand(len(own) - 1), rtol=0.05, atol=2e-3)
        assert (torch.bucketize(own, borders) == number).all()
    assert (levels.view(3, -1)[0] < 0).all()  # no zero in the outer ranges
    assert (levels.view(3, -1)[2] > 0).all()


@pytest.mark.parametrize(("bits", "expected"), [(2, 0.083), (4, 0.0035)])
def test_split_beats_the_error_of_the_sheet(bits, expected):
    """Unit normal values: 0.083 and 0.0035 for ranges from the smallest to the largest weight."""
    unit = normal(400, 500)
    value = Rounder(split_levels(unit, bits, torch.ones(500)), 400)(unit, torch.ones(400, 1), None)[1]
    assert (value - unit).square().mean() < expected


@pytest.mark.parametrize("unit", [torch.zeros(3, 4), torch.full((3, 4), -0.1), torch.tensor([[1.0, -1.0, 1.0]])], ids=str)
def test_split_levels_of_few_values(unit):
    levels = split_levels(unit, 2, torch.ones(unit.shape[1]))
    assert torch.equal(levels, levels.sort(1).values)
    value = Rounder(levels, len(unit))(unit, torch.ones(len(unit), 1), None)[1]
    torch.testing.assert_close(value, unit, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("bits", "expected"), [(2, [1, 2]), (3, [1, 2, 4, 8])])
def test_powers_of_two_have_no_zero(bits, expected):
    assert fixed_levels("pot", bits, False)[0].tolist() == [*(-value for value in reversed(expected)), *expected]


def test_powers_of_two_reach_the_error_of_the_sheet():
    """Mean squared error of unit normal values with the best scale: 0.159 at two bits, 0.0443 at three."""
    values = torch.randn(1, 200_000, generator=torch.Generator().manual_seed(0))
    for bits, expected in ((2, 0.159), (3, 0.0443)):
        levels = fixed_levels("pot", bits, False)
        scales = torch.linspace(0.1, 1.0, 200)
        errors = [(Rounder(levels, 1)(values, scale.view(1, 1), None)[1] - values).square().mean().item() for scale in scales]
        assert min(errors) == pytest.approx(expected, rel=0.03)


def test_nf4_levels_are_those_of_the_paper():
    """Appendix E of arXiv 2305.14314: a zero, both ends, and quantiles of the normal distribution between them."""
    assert len(NF4) == 16
    assert NF4[0] == -1
    assert NF4[7] == 0
    assert NF4[15] == 1
    quantile = torch.distributions.Normal(0, 1).icdf
    offset = 0.9677083
    positive = quantile(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -quantile(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    expected = torch.cat([negative, torch.zeros(1, dtype=torch.float64), positive]).sort().values
    torch.testing.assert_close(fixed_levels("nf4", 4, False)[0].double(), expected / expected.max(), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("columns", "group_size", "groups"), [(64, 32, 2), (70, 32, 3), (70, None, 1), (5, 8, 1)])
def test_number_of_groups(columns, group_size, groups):
    assert num_groups(columns, group_size) == groups


@grids
@shapes
def test_rounding_is_nearest(shape, grid):
    rows, columns, group_size = shape
    weight, gram = normal(rows, columns), correlated_gram(columns)
    levels, scale, zero = start(weight, gram, group_size, grid)
    quantized = nearest(weight, levels, scale, zero, group_size)
    dense = slow_dequantize(quantized, group_size)
    every_level = [
        dequantize(quantized._replace(codes=torch.full_like(quantized.codes, k)), group_size) for k in range(levels.shape[1])
    ]
    best = (torch.stack(every_level) - weight).abs().amin(0)
    torch.testing.assert_close((dense - weight).abs(), best, rtol=0, atol=1e-5)


@grids
@shapes
def test_dequantize_equals_the_slow_reference(shape, grid):
    rows, columns, group_size = shape
    weight, gram = normal(rows, columns), correlated_gram(columns)
    levels, scale, zero = start(weight, gram, group_size, grid)
    codes = torch.randint(levels.shape[1], (rows, columns), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    quantized = Quantized(codes, scale, zero, levels)
    torch.testing.assert_close(dequantize(quantized, group_size), slow_dequantize(quantized, group_size))
    assert torch.equal(dequantize(quantized, group_size, grid[0] == "uniform"), dequantize(quantized, group_size))


@grids
def test_rounder_gives_the_value_of_its_code(grid):
    weight, gram = normal(12, 70), correlated_gram(70)
    levels, scale, zero = start(weight, gram, 32, grid)
    spread = [None if t is None else spread_groups(t, 32, 70) for t in (scale, zero)]
    codes, values = Rounder(levels, 12)(weight, *spread)
    assert torch.equal(values, dequantize(Quantized(codes, scale, zero, levels), 32))


@pytest.mark.parametrize(
    "grid", [g for g in GRIDS.values() if g[0] != "learned"], ids=[n for n, g in GRIDS.items() if g[0] != "learned"]
)
def test_values_on_the_grid_are_found_again(grid):
    name, bits, symmetric = grid
    levels = fixed_levels(name, bits, symmetric)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(2**bits, (7, 64), generator=generator, dtype=torch.uint8)
    codes[:, ::32], codes[:, 1::32] = 0, 2**bits - 1  # a group that reaches both ends has one scale only
    scale = (torch.rand(7, 2, generator=generator) + 0.1).half().float()
    has_zero = name == "uniform" and not symmetric
    zero = torch.randint(2**bits, (7, 2), generator=generator).float() if has_zero else None
    quantized = Quantized(codes, scale, zero, levels)
    weight = dequantize(quantized, 32)
    found = nearest(weight, levels, *search_scale(weight, levels, 32, not has_zero, torch.ones(64), 16), 32)
    assert torch.equal(dequantize(found, 32), weight)
    assert torch.equal(found.scale, scale)


def test_learned_values_on_the_grid_stay():
    levels = normal(3, 8).half().float().sort(1).values
    scale = (normal(13, 3).abs() + 0.1).half().float()
    codes = torch.randint(8, (13, 70), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    quantized = Quantized(codes, scale, None, levels)
    assert torch.equal(nearest(dequantize(quantized, 32), levels, scale, None, 32).codes, codes)


# Scales.


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@shapes
def test_more_clipping_candidates_never_hurt(shape, symmetric):
    rows, columns, group_size = shape
    weight, importance = normal(rows, columns).pow(3), normal(columns, seed=1).square()
    levels = fixed_levels("uniform", 3, symmetric)
    losses = []
    for shrink_steps in (1, 16):
        scale, zero = search_scale(weight, levels, group_size, symmetric, importance, shrink_steps)
        dense = dequantize(nearest(weight, levels, scale, zero, group_size), group_size)
        losses.append(((dense - weight).square() * importance).sum().item())
    assert losses[1] <= losses[0] * (1 + 1e-6)


def test_clipping_helps_heavy_tails():
    weight, levels = normal(16, 128).pow(3), fixed_levels("uniform", 3, False)
    full, clipped = (
        dequantize(nearest(weight, levels, *search_scale(weight, levels, None, False, torch.ones(128), steps), None), None)
        for steps in (1, 16)
    )
    assert output_energy(weight - clipped) < 0.95 * output_energy(weight - full)


def test_full_range_is_covered_with_one_candidate():
    weight, levels = normal(8, 64), fixed_levels("uniform", 4, False)
    scale, zero = search_scale(weight, levels, 32, False, torch.ones(64), 1)
    dense = dequantize(nearest(weight, levels, scale, zero, 32), 32)
    assert ((weight - dense).abs() <= spread_groups(scale, 32, 64) * 1.01).all()


@grids
def test_zeros_stay_zeros(grid):
    weight, gram = torch.zeros(4, 20), correlated_gram(20)
    levels, scale, zero = start(weight, gram, 8, grid)
    assert scale.isfinite().all()
    assert not dequantize(nearest(weight, levels, scale, zero, 8), 8).any()


@pytest.mark.parametrize("factor", [1e-12, 1e-6, 1e6], ids=str)
@grids
def test_any_magnitude_is_finite(grid, factor):
    weight, gram = normal(4, 20) * factor, correlated_gram(20)
    levels, scale, zero = start(weight, gram, 8, grid)
    dense = dequantize(nearest(weight, levels, scale, zero, 8), 8)
    assert dense.isfinite().all()
    assert (scale > 0).all()
    assert output_energy(weight - dense) <= output_energy(weight)


def test_group_scale_is_the_root_mean_square():
    weight = normal(5, 70)
    scale = group_scale(weight, 32)
    expected = torch.stack([part.square().mean(1).sqrt() for part in weight.split(32, 1)], 1)
    torch.testing.assert_close(scale, expected, rtol=1e-3, atol=0)
    assert torch.equal(scale, scale.half().float())
    assert group_scale(weight, None).shape == (5, 1)


@pytest.mark.parametrize("scale_bits", range(2, 9))
@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0], ids=["equal", "usual", "wide"])
def test_coded_scales(scale_bits, spread):
    scale = (spread * normal(20, 9)).exp() * 0.01
    codes, step = scale_codes(scale, scale_bits)
    assert codes.shape == scale.shape
    assert step.shape == (20, 1)
    assert torch.equal(step, step.half().float())
    assert torch.equal(codes, codes.round().clamp(1, 2**scale_bits - 1))
    stored = stored_scale(scale, scale_bits)
    assert torch.equal(stored, codes * step)
    assert ((stored - scale).abs() <= torch.maximum(step / 2, step - scale) * 1.01 + 1e-3 * scale).all()


@pytest.mark.parametrize("scale_bits", [None, *range(2, 9)], ids=str)
def test_stored_scales_are_stored_again_without_loss(scale_bits):
    for seed in range(20):
        stored = stored_scale((2 * normal(20, 5, seed=seed)).exp() * 10.0 ** (seed % 9 - 6), scale_bits)
        assert torch.equal(stored_scale(stored, scale_bits), stored)
        assert (stored > 0).all()


@pytest.mark.parametrize("scale_bits", range(2, 9))
def test_no_step_is_coarser_than_a_fixed_point_needs(scale_bits):
    """From where the distance between float16 numbers is half a code, the largest code is in use; below, nothing moves either."""
    largest = 2**scale_bits - 1
    edge = largest**2 * 2.0**-24
    scale = (torch.linspace(0.2, 4, 5000) * edge)[:, None]
    codes, step = scale_codes(scale, scale_bits)
    assert torch.equal(stored_scale(codes * step, scale_bits), codes * step)
    assert (codes[scale >= edge] == largest).all()


def test_eight_bits_of_scales_are_nearly_as_good_as_float16():
    weight, levels = 0.03 * normal(64, 512), fixed_levels("uniform", 8, symmetric=False)
    lost = {}
    for scale_bits in (None, 8):
        scale, zero = search_scale(weight, levels, 32, False, torch.ones(512), 8, scale_bits)
        lost[scale_bits] = output_energy(weight - dequantize(nearest(weight, levels, scale, zero, 32), 32))
    assert lost[8] < 1.7 * lost[None]


def test_spread_groups_repeats_the_scale_of_each_input():
    per_group = torch.arange(6.0).reshape(2, 3)
    assert spread_groups(per_group, 4, 10).tolist() == [[0, 0, 0, 0, 1, 1, 1, 1, 2, 2], [3, 3, 3, 3, 4, 4, 4, 4, 5, 5]]
    assert spread_groups(per_group[:, :1], None, 10).shape == (2, 1)


# Levels.


def test_lloyd_finds_planted_clusters():
    centres = torch.tensor([[-3.0, -1.0, 0.5, 4.0], [-8.0, -2.0, 2.0, 8.0]])
    picks = torch.randint(4, (6, 200), generator=torch.Generator().manual_seed(0))
    unit = centres.repeat_interleave(3, 0).gather(1, picks) + 0.01 * normal(6, 200)
    torch.testing.assert_close(lloyd_levels(unit, torch.ones(200), 4, 2), centres, rtol=0, atol=0.01)


def test_lloyd_follows_the_importance():
    unit = torch.tensor([[0.0, 1.0, 10.0, 11.0]])
    levels = lloyd_levels(unit, torch.tensor([1.0, 3.0, 1.0, 0.0]), 2, 1)
    assert levels.tolist() == [[0.75, 10.0]]


def test_lloyd_error_falls_with_bits():
    unit, ones = normal(6, 100), torch.ones(6, 1)
    losses = []
    for bits in range(1, 7):
        levels = lloyd_levels(unit, torch.ones(100), 2**bits, 1)
        losses.append(output_energy(unit - dequantize(nearest(unit, levels, ones, None, None), None)))
    assert all(after < 0.6 * before for before, after in itertools.pairwise(losses))


@pytest.mark.parametrize(("bits", "distortion"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_lloyd_is_near_the_known_optimum(bits, distortion):
    """Max 1960, table I: the least distortion of a normal variable."""
    unit = normal(1, 50_000)
    levels = lloyd_levels(unit, torch.ones(50_000), 2**bits, 1)
    dense = dequantize(nearest(unit, levels, torch.ones(1, 1), None, None), None)
    assert output_energy(unit - dense) / output_energy(unit) == pytest.approx(distortion, rel=0.03)


@pytest.mark.parametrize(("rows", "tables"), [(10, 4), (7, 7), (7, 1), (6, 5)], ids=str)
def test_lloyd_tables_are_independent(rows, tables):
    unit = normal(rows, 40)
    levels = lloyd_levels(unit, torch.ones(40), 4, tables)
    per_table = math.ceil(rows / tables)
    assert levels.shape == (tables, 4)
    assert torch.equal(levels, levels.sort(1).values)
    assert torch.equal(levels, levels.half().float())
    for table, own in zip(levels, unit.split(per_table), strict=False):
        torch.testing.assert_close(table[None], lloyd_levels(own, torch.ones(40), 4, 1))


def test_lloyd_with_more_levels_than_values():
    levels = lloyd_levels(torch.tensor([[1.0, 2.0, 3.0]]), torch.ones(3), 16, 1)
    assert set(levels.flatten().tolist()) == {1.0, 2.0, 3.0}


def test_lloyd_without_importance():
    levels = lloyd_levels(normal(2, 30), torch.zeros(30), 4, 1)
    assert levels.isfinite().all()


# Error feedback and descent.


@grids
@shapes
def test_feedback_never_loses_to_nearest(shape, grid):
    rows, columns, group_size = shape
    weight, gram = normal(rows, columns), correlated_gram(columns)
    levels, scale, zero = start(weight, gram, group_size, grid)
    order = gram.diagonal().argsort(descending=True)
    factor = inverse_factor(gram[order][:, order], 0.0)
    codes, dense = round_with_feedback(weight, Rounder(levels, rows), scale, zero, group_size, factor, order)
    quantized = Quantized(codes, scale, zero, levels)
    assert torch.equal(dequantize(quantized, group_size), dense)
    rounded = dequantize(nearest(weight, levels, scale, zero, group_size), group_size)
    assert error(weight, dense, gram) <= error(weight, rounded, gram)


@grids
def test_feedback_pays_on_correlated_inputs(grid):
    weight, gram = normal(32, 96), correlated_gram(96)
    levels, scale, zero = start(weight, gram, 32, grid)
    order = gram.diagonal().argsort(descending=True)
    _, dense = round_with_feedback(
        weight, Rounder(levels, 32), scale, zero, 32, inverse_factor(gram[order][:, order], 0.0), order
    )
    rounded = dequantize(nearest(weight, levels, scale, zero, 32), 32)
    assert error(weight, dense, gram) < 0.7 * error(weight, rounded, gram)


@grids
@shapes
def test_feedback_is_nearest_for_independent_inputs(shape, grid):
    rows, columns, group_size = shape
    weight, gram = normal(rows, columns), torch.diag(torch.rand(columns, generator=torch.Generator().manual_seed(0)) + 0.1)
    levels, scale, zero = start(weight, gram, group_size, grid)
    order = gram.diagonal().argsort(descending=True)
    codes, _ = round_with_feedback(
        weight, Rounder(levels, rows), scale, zero, group_size, inverse_factor(gram[order][:, order], 0.0), order
    )
    assert torch.equal(codes, nearest(weight, levels, scale, zero, group_size).codes)


@pytest.mark.parametrize("grid", [GRIDS["uniform4"], GRIDS["nf4"], GRIDS["learned2"]], ids=["uniform4", "nf4", "learned2"])
@pytest.mark.parametrize("columns", [24, 150], ids=["one_block", "two_blocks"])
def test_feedback_equals_the_slow_reference(columns, grid):
    weight, gram = normal(6, columns), correlated_gram(columns)
    levels, scale, zero = start(weight, gram, 32, grid)
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(0))
    _, dense = round_with_feedback(weight, Rounder(levels, 6), scale, zero, 32, inverse_factor(gram[order][:, order], 0.0), order)
    torch.testing.assert_close(dense.double(), slow_feedback(weight, levels, scale, zero, 32, gram, order), rtol=0, atol=1e-6)


@grids
@shapes
def test_descent_never_raises_the_error(shape, grid):
    rows, columns, group_size = shape
    weight, gram = normal(rows, columns), correlated_gram(columns)
    levels, scale, zero = start(weight, gram, group_size, grid)
    order = gram.diagonal().argsort(descending=True)
    quantized = nearest(weight, levels, scale, zero, group_size)
    losses = [error(weight, dequantize(quantized, group_size), gram)]
    for _ in range(3):
        codes, dense = descend_codes(
            weight, dequantize(quantized, group_size), Rounder(levels, rows), scale, zero, group_size, gram.float(), order
        )
        quantized = quantized._replace(codes=codes)
        assert torch.equal(dequantize(quantized, group_size), dense)
        losses.append(error(weight, dense, gram))
    assert all(after <= before * (1 + 1e-5) + 1e-9 for before, after in itertools.pairwise(losses))
    if columns > 1:
        assert losses[-1] < losses[0]


def test_descent_ends_where_no_single_code_can_be_better():
    weight, gram = normal(3, 12), correlated_gram(12)
    levels, scale, zero = start(weight, gram, None, GRIDS["uniform2"])
    quantized = nearest(weight, levels, scale, zero, None)
    for _ in range(30):
        dense = dequantize(quantized, None)
        codes, _ = descend_codes(weight, dense, Rounder(levels, 3), scale, zero, None, gram.float(), torch.arange(12))
        quantized = quantized._replace(codes=codes)
    best = error(weight, dequantize(quantized, None), gram)
    for row in range(3):
        for column in range(12):
            for code in range(4):
                other = quantized.codes.clone()
                other[row, column] = code
                assert error(weight, dequantize(quantized._replace(codes=other), None), gram) >= best * (1 - 1e-5)


def test_descent_over_a_block_border_equals_one_long_block(monkeypatch):
    weight, gram = normal(4, 150), correlated_gram(150)
    levels, scale, zero = start(weight, gram, 32, GRIDS["uniform4"])
    dense = dequantize(nearest(weight, levels, scale, zero, 32), 32)
    arguments = (weight, dense, Rounder(levels, 4), scale, zero, 32, gram.float(), torch.arange(150))
    blocked = descend_codes(*arguments)[0]
    monkeypatch.setattr("hf_compact.functional.feedback._BLOCK", 1000)
    assert torch.equal(descend_codes(*arguments)[0], blocked)


# Refits.


@grids
@shapes
def test_refit_scale_never_raises_the_error(shape, grid):
    rows, columns, group_size = shape
    weight, gram = normal(rows, columns), correlated_gram(columns)
    levels, scale, zero = start(weight, gram, group_size, grid)
    quantized = nearest(weight, levels, scale, zero, group_size)
    unit = dequantize(quantized._replace(scale=torch.ones_like(scale)), group_size)
    refitted = refit_scale(weight, unit, scale, group_size, gram.float())
    assert refitted.shape == scale.shape
    assert (refitted > 0).all()
    assert torch.equal(refitted, refitted.half().float())
    before = error(weight, dequantize(quantized, group_size), gram)
    after = error(weight, dequantize(quantized._replace(scale=refitted), group_size), gram)
    assert after <= before * (1 + 1e-4) + 1e-9


def test_refit_scale_finds_a_planted_scale():
    levels = fixed_levels("uniform", 4, True)
    codes = torch.randint(16, (6, 70), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    scale = (torch.rand(6, 3, generator=torch.Generator().manual_seed(1)) + 0.1).half().float()
    weight = dequantize(Quantized(codes, scale, None, levels), 32)
    unit = dequantize(Quantized(codes, torch.ones_like(scale), None, levels), 32)
    found = refit_scale(weight, unit, 1.3 * scale, 32, correlated_gram(70).float())
    torch.testing.assert_close(found, scale, rtol=2e-3, atol=0)


def test_refit_scale_where_the_best_scale_is_negative():
    """One group asks for a negative scale, which is not stored; the others may not pay for it."""
    weight, gram = normal(40, 24), correlated_gram(24)
    levels = fixed_levels("uniform", 2, True)
    codes = torch.randint(4, weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    scale = torch.full((40, 3), 0.25)
    quantized = Quantized(codes, scale, None, levels)
    unit = dequantize(quantized._replace(scale=torch.ones_like(scale)), 8)
    refitted = quantized._replace(scale=refit_scale(weight, unit, scale, 8, gram.float()))
    assert (refitted.scale > 0).all()
    for row in range(40):
        before, after = (error(weight[row], dequantize(q, 8)[row], gram) for q in (quantized, refitted))
        assert after <= before * (1 + 1e-4)


def test_refit_scale_of_zeros_keeps_the_scale():
    scale = torch.full((3, 2), 0.5)
    assert torch.equal(refit_scale(torch.zeros(3, 16), torch.zeros(3, 16), scale, 8, torch.eye(16)), scale)


@pytest.mark.parametrize("bits", [2, 3, 4])
@shapes
def test_refit_levels_never_raises_the_error(shape, bits):
    rows, columns, group_size = shape
    weight, gram = normal(rows, columns), correlated_gram(columns)
    levels, scale, _ = start(weight, gram, group_size, ("learned", bits, False))
    quantized = nearest(weight, levels, scale, None, group_size)
    refitted = refit_levels(weight, quantized.codes, scale, None, levels, group_size, gram.float())
    assert refitted.shape == levels.shape
    assert torch.equal(refitted, refitted.half().float())
    before = error(weight, dequantize(quantized, group_size), gram)
    after = error(weight, dequantize(quantized._replace(levels=refitted), group_size), gram)
    assert after <= before * (1 + 1e-4) + 1e-9


def test_refit_levels_finds_planted_levels():
    planted = normal(3, 4).half().float().sort(1).values
    scale = (torch.rand(13, 3, generator=torch.Generator().manual_seed(1)) + 0.5).half().float()
    codes = torch.randint(4, (13, 70), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    weight = dequantize(Quantized(codes, scale, None, planted), 32)
    found = refit_levels(weight, codes, scale, None, planted + 0.1, 32, correlated_gram(70).float())
    torch.testing.assert_close(found, planted, rtol=0, atol=2e-3)


def test_refit_levels_leaves_unused_levels():
    weight, codes = normal(4, 20), torch.zeros(4, 20, dtype=torch.uint8)
    levels = torch.tensor([[0.0, 0.5, 1.0, 2.0]])
    found = refit_levels(weight, codes, torch.ones(4, 1), None, levels, None, correlated_gram(20).float())
    assert found[0, 1:].tolist() == pytest.approx([0.5, 1.0, 2.0])


@pytest.mark.parametrize("tables", [1, 3])
def test_sorted_levels_stand_for_the_same_values(tables):
    levels = normal(tables, 8)
    codes = torch.randint(8, (7, 20), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    new_codes, new_levels = sort_levels(codes, levels)
    assert torch.equal(new_levels, levels.sort(1).values)
    before, after = (
        dequantize(Quantized(c, torch.ones(7, 1), None, v), None) for c, v in ((codes, levels), (new_codes, new_levels))
    )
    assert torch.equal(before, after)


# All solvers.


@grids
def test_inputs_are_unchanged(grid):
    weight, gram = normal(12, 70), correlated_gram(70)
    inputs = {"weight": weight, "gram": gram}
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    levels, scale, zero = start(weight, gram, 32, grid)
    order = gram.diagonal().argsort(descending=True)
    inputs |= {"levels": levels, "scale": scale, "zero": zero, "order": order, "float_gram": gram.float()}
    inputs["factor"] = inverse_factor(gram[order][:, order], 0.0)
    rounder = Rounder(levels, 12)
    before |= {name: None if tensor is None else tensor.clone() for name, tensor in inputs.items()}
    codes, dense = round_with_feedback(weight, rounder, scale, zero, 32, inputs["factor"], order)
    inputs |= {"codes": codes, "dense": dense}
    before |= {"codes": codes.clone(), "dense": dense.clone()}
    quantized = Quantized(codes, scale, zero, levels)
    descend_codes(weight, dense, rounder, scale, zero, 32, inputs["float_gram"], order)
    refit_scale(weight, dense, scale, 32, inputs["float_gram"])
    if grid[0] == "learned":
        refit_levels(weight, codes, scale, None, levels, 32, inputs["float_gram"])
    dequantize(quantized, 32)
    nearest(weight, levels, scale, zero, 32)
    for name, tensor in inputs.items():
        assert tensor is before[name] is None or torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("name", make_codebook.SETTINGS)
def test_golden(name):
    golden = load_file(make_codebook.FILE)
    dense = make_codebook.solve(golden["weight"], golden["gram"], make_codebook.SETTINGS[name])
    torch.testing.assert_close(dense, golden[name], rtol=0, atol=1e-5)


def test_golden_problem_is_the_scripts():
    golden = load_file(make_codebook.FILE)
    weight, gram = make_codebook.problem()
    assert golden.keys() == {"weight", "gram", *make_codebook.SETTINGS}
    torch.testing.assert_close(golden["weight"], weight)
    torch.testing.assert_close(golden["gram"], gram, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("group_size", [None, 4, 5, 12])
@pytest.mark.parametrize("has_zero", [False, True])
def test_groups_are_scaled_as_if_they_were_spread(group_size, has_zero):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 12, generator=generator)
    scale, zero = torch.rand(2, 3, num_groups(12, group_size), generator=generator).unbind()
    scale.requires_grad_()
    found = scale_groups_(values.clone(), scale, zero if has_zero else None, group_size)
    offset = spread_groups(zero, group_size, 12) if has_zero else 0
    wanted = (values - offset) * spread_groups(scale, group_size, 12)
    assert torch.equal(found, wanted)
    assert torch.equal(*(torch.autograd.grad(result.square().sum(), scale)[0] for result in (found, wanted)))
