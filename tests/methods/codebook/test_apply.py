"""A whole matrix: every step of the solver helps, hard inputs stay finite, and what cannot be done says so."""

import itertools
import math

import pytest
import torch
from torch import nn

from hf_compact import CodebookConfig
from hf_compact.errors import NumericalError, UnsupportedModel
from hf_compact.functional.feedback import stored_scale
from hf_compact.functional.gram import output_energy
from hf_compact.methods.codebook.apply import compress_embedding, compress_linear, quantize
from hf_compact.methods.codebook.functional import dequantize, grid_size
from hf_compact.methods.codebook.layer import CodebookEmbedding, CodebookLinear

#: id -> config
SETTINGS = {
    "uniform2": CodebookConfig(bits=2, group_size=16),
    "uniform3": CodebookConfig(bits=3, group_size=32),
    "uniform4": CodebookConfig(bits=4, group_size=32),
    "uniform8": CodebookConfig(bits=8, group_size=None),
    "symmetric4": CodebookConfig(bits=4, symmetric=True, group_size=32),
    "coded_scale3": CodebookConfig(bits=3, group_size=16, scale_bits=6),
    "coded_scale4": CodebookConfig(bits=4, group_size=8, scale_bits=2),
    "nf4": CodebookConfig(grid="nf4", group_size=32),
    "nf4_coded_scale": CodebookConfig(grid="nf4", group_size=16, scale_bits=4),
    "power3": CodebookConfig(bits=3, grid="power", group_size=None),
    "power4": CodebookConfig(bits=4, grid="power", group_size=16),
    "pot2": CodebookConfig(bits=2, grid="pot", group_size=16),
    "pot3": CodebookConfig(bits=3, grid="pot", group_size=None),
    "split2": CodebookConfig(bits=2, grid="split", group_size=None),
    "split4": CodebookConfig(bits=4, grid="split", group_size=16),
    "learned2": CodebookConfig(bits=2, grid="learned", rows_per_codebook=5, group_size=None),
    "learned4": CodebookConfig(bits=4, grid="learned", rows_per_codebook=8, group_size=32),
    "learned_symmetric": CodebookConfig(bits=3, grid="learned", rows_per_codebook=4, group_size=32, symmetric=True),
    "joint_soft": CodebookConfig(bits=3, grid="learned", rows_per_codebook=5, group_size=16, learning="soft", learning_steps=20),
    "joint_proximal": CodebookConfig(
        bits=2, grid="learned", rows_per_codebook=5, group_size=16, learning="proximal", learning_steps=20
    ),
    "learned_coded_scale": CodebookConfig(bits=3, grid="learned", rows_per_codebook=8, group_size=16, scale_bits=8),
}
settings = pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated_gram(columns: int, seed: int = 1) -> torch.Tensor:
    inputs = normal(200, columns // 4, seed=seed) @ normal(columns // 4, columns, seed=seed + 1) + 0.2 * normal(
        200, columns, seed=seed + 2
    )
    return inputs.double().T @ inputs.double()


def changed(config: CodebookConfig, **values) -> CodebookConfig:
    return CodebookConfig(**{name: v for name, v in config.to_dict().items() if name != "method"} | values)


def lost(weight: torch.Tensor, gram: torch.Tensor, config: CodebookConfig) -> float:
    """Share of the output energy that is lost, with the ridge that the solver works on."""
    gram = gram + config.damp * gram.diagonal().mean() * torch.eye(len(gram))
    dense = dequantize(quantize(weight, gram, config), config.group_size)
    return output_energy(weight - dense, gram) / output_energy(weight, gram)


@settings
@pytest.mark.parametrize("columns", [70, 140], ids=["ragged", "two_blocks"])
def test_every_refit_round_helps(config, columns):
    weight, gram = normal(13, columns), correlated_gram(columns)
    plain = {"damp": 0.0, "learning": "none"}
    losses = [lost(weight, gram, changed(config, refit_rounds=rounds, **plain)) for rounds in range(4)]
    assert all(after <= before * (1 + 1e-4) for before, after in itertools.pairwise(losses)), losses
    assert losses[-1] < lost(weight, gram, changed(config, rounding="nearest", **plain))


@pytest.mark.parametrize(("bits", "rows", "seed"), [(3, 4, 1), (3, 4, 12), (3, 4, 24), (4, 6, 4), (4, 6, 7)])
def test_refit_rounds_help_where_levels_change_places(bits, rows, seed):
    """Heavy tails and few weights per table: a refitted level can overtake its neighbour."""
    weight = normal(rows, 40, seed=seed + 7).pow(3)
    inputs = normal(60, 5, seed=seed) @ normal(5, 40, seed=seed + 1) + 0.1 * normal(60, 40, seed=seed + 2)
    gram = inputs.double().T @ inputs.double()
    config = CodebookConfig(bits=bits, grid="learned", rows_per_codebook=2, group_size=None, damp=0.0)
    losses = [lost(weight, gram, changed(config, refit_rounds=rounds)) for rounds in range(3)]
    assert all(after <= before * (1 + 1e-4) for before, after in itertools.pairwise(losses)), losses


@pytest.mark.parametrize(("grid", "widths"), [("uniform", (2, 3, 4, 8)), ("learned", (2, 3, 4))], ids=["uniform", "learned"])
def test_error_falls_with_bits(grid, widths):
    weight, gram = normal(16, 64), correlated_gram(64)
    losses = [lost(weight, gram, CodebookConfig(bits=bits, grid=grid, group_size=32, rows_per_codebook=8)) for bits in widths]
    assert all(after < 0.6 * before for before, after in itertools.pairwise(losses)), losses


@pytest.mark.parametrize("scale_bits", [5, None], ids=str)
@pytest.mark.parametrize("size", [0.03, 0.01])
def test_eight_bits_are_eight_bits_of_small_weights_too(size, scale_bits):
    """Their scales lie below the normal numbers of float16."""
    weight, gram = normal(24, 64), correlated_gram(64)
    config = CodebookConfig(bits=8, scale_bits=scale_bits)
    assert lost(size * weight, gram, config) < 2 * lost(weight, gram, config)


@settings
def test_every_grid_works_without_data(config):
    """Nearest, with no gram matrix: better than no weight at all by what its bits promise."""
    linear = nn.Linear(70, 13)
    module = compress_linear(linear, None, config)
    error = (module.to_dense() - linear.weight).square().sum() / linear.weight.square().sum()
    assert error < 0.25 / 4 ** (config.bits - 2) * (3 if config.scale_bits == 2 else 1)
    again = compress_linear(linear, normal(70, 70) @ normal(70, 70), changed(config, rounding="nearest", learning="none"))
    assert (again.to_dense() - linear.weight).norm() < 0.7 * linear.weight.norm()


@settings
def test_levels_ascend_and_codes_fit(config):
    result = quantize(normal(13, 70), correlated_gram(70), config)
    assert torch.equal(result.levels, result.levels.sort(1).values)
    assert int(result.codes.max()) < grid_size(config.grid, config.bits) == result.levels.shape[1]
    assert torch.equal(result.scale, stored_scale(result.scale, config.scale_bits))
    if config.grid == "learned":
        assert torch.equal(result.levels, result.levels.half().float())


@settings
@pytest.mark.parametrize("act_order", [True, False], ids=["act_order", "in_order"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_inputs_are_unchanged(config, act_order, dtype):
    weight, gram = normal(13, 70), correlated_gram(70).to(dtype)
    before = weight.clone(), gram.clone()
    quantize(weight, gram, changed(config, act_order=act_order))
    assert torch.equal(weight, before[0])
    assert torch.equal(gram, before[1])


@settings
def test_same_input_same_result(config):
    weight, gram = normal(13, 70), correlated_gram(70)
    for first, second in zip(quantize(weight, gram, config), quantize(weight, gram, config), strict=True):
        assert first is second is None or torch.equal(first, second)


@settings
@pytest.mark.parametrize("act_order", [True, False], ids=["act_order", "in_order"])
@pytest.mark.parametrize("damp", [0.0, 0.01])
def test_dead_input_harms_nothing(config, damp, act_order):
    weight, gram = normal(13, 40), correlated_gram(40)
    gram[:, 7] = gram[7] = 0
    dense = dequantize(quantize(weight, gram, changed(config, damp=damp, act_order=act_order)), config.group_size)
    assert dense.isfinite().all()
    rounded = dequantize(quantize(weight, gram, changed(config, rounding="nearest", learning="none")), config.group_size)
    assert output_energy(weight - dense, gram) <= output_energy(weight - rounded, gram)


@settings
def test_fewer_tokens_than_inputs(config):
    inputs = normal(5, 40).double()
    dense = dequantize(quantize(normal(13, 40), inputs.T @ inputs, changed(config, damp=0.0)), config.group_size)
    assert dense.isfinite().all()


@settings
def test_without_a_gram_it_rounds_to_nearest(config):
    weight = normal(13, 40)
    found = quantize(weight, None, config)
    expected = quantize(weight, torch.eye(40), changed(config, rounding="nearest", learning="none"))
    assert torch.equal(found.codes, expected.codes)


def test_gram_that_is_not_finite():
    gram = correlated_gram(40)
    gram[3, 4] = math.nan
    with pytest.raises(NumericalError, match="gram matrix of the layer inputs holds values that are not finite"):
        quantize(normal(4, 40), gram, CodebookConfig())


@settings
@pytest.mark.parametrize("has_gram", [True, False], ids=["gram", "no_gram"])
def test_linear_holds_the_solution(config, has_gram):
    linear = nn.Linear(40, 13)
    gram = correlated_gram(40) if has_gram else None
    module = compress_linear(linear, gram, config)
    assert isinstance(module, CodebookLinear)
    expected = dequantize(quantize(linear.weight.detach(), gram, config), config.group_size)
    torch.testing.assert_close(module.to_dense(), expected, rtol=0, atol=1e-6)
    assert module.bias is linear.bias


@settings
def test_unsolved_linear_has_the_same_spec(config):
    linear = nn.Linear(40, 13, bias=False)
    solved, empty = (compress_linear(linear, None, config, solve=solve) for solve in (True, False))
    assert solved.spec() == empty.spec()
    assert {n: (b.shape, b.dtype) for n, b in solved.named_buffers()} == {n: (b.shape, b.dtype) for n, b in empty.named_buffers()}
    assert not empty.weight.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("bits", "limit"), [(8, 1e-4), (4, 2e-2)])
def test_embedding_rows(bits, limit, dtype):
    embedding = nn.Embedding(50, 24, dtype=dtype)
    module = compress_embedding(embedding, CodebookConfig(embedding_bits=bits, embedding_group_size=None))
    assert isinstance(module, CodebookEmbedding)
    assert module.bits == bits
    weight = embedding.weight.detach().float()
    assert output_energy(module.to_dense() - weight) < limit * output_energy(weight)


def test_embedding_does_not_depend_on_how_rows_are_split(monkeypatch):
    embedding, config = nn.Embedding(50, 24), CodebookConfig(embedding_bits=4, embedding_group_size=8)
    whole = compress_embedding(embedding, config).to_dense()
    monkeypatch.setattr("hf_compact.methods.codebook.apply._EMBEDDING_ROWS", 7)
    assert torch.equal(compress_embedding(embedding, config).to_dense(), whole)


def test_head_becomes_a_linear():
    assert isinstance(compress_embedding(nn.Linear(24, 50), CodebookConfig()), CodebookLinear)


def test_embedding_is_left_by_choice():
    assert compress_embedding(nn.Embedding(5, 8), CodebookConfig(embedding_bits=None)) is None


def test_embedding_with_its_own_mathematics():
    class Rotated(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids).roll(1, -1)

    with pytest.raises(
        UnsupportedModel, match=r"embedding class Rotated is not a plain lookup: set codebook.embedding_bits to null"
    ):
        compress_embedding(Rotated(5, 8), CodebookConfig())
