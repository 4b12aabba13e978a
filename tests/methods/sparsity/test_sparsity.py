"""Masks: laws of the math, packed layers against dense ones, and folders through a recipe."""

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn
from transformers import AutoModelForCausalLM

import hf_compact
from hf_compact import SparsityConfig, api
from hf_compact.arch import describe
from hf_compact.calibration import from_batches
from hf_compact.errors import ConfigError, UnsupportedModel
from hf_compact.methods.sparsity import MaskTraining, SparseLinear
from hf_compact.methods.sparsity.apply import compress_linear
from hf_compact.methods.sparsity.functional import TwoMasks, lowest_mask, n_m_mask, scheduled_sparsity
from hf_compact.methods.sparsity.layer import MaskedLinear
from tests.conftest import tiny_inputs, tiny_model


def batches(family: str = "llama"):
    return from_batches([tiny_inputs(family, seed=seed) for seed in (1, 2)])


@given(st.integers(1, 6), st.integers(1, 40), st.floats(0, 0.99), st.integers(0, 3))
def test_so_many_of_the_lowest_go(rows, columns, sparsity, levels):
    generator = torch.Generator().manual_seed(columns)
    scores = torch.rand(rows, columns, generator=generator)
    scores = (scores * levels).round() if levels else scores  # ties
    before = scores.clone()
    mask = lowest_mask(scores, sparsity)
    assert (~mask).sum(1).tolist() == [int(sparsity * columns + 1e-9)] * rows
    for row, kept in zip(scores, mask, strict=True):
        assert kept.all() or not kept.any() or row[~kept].max() <= row[kept].min()
    assert torch.equal(scores, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [3, 24, 29])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_packed_weights_lie_where_they_lay(columns, share, dtype):
    generator = torch.Generator().manual_seed(columns)
    linear = nn.Linear(columns, 7)
    linear.weight.data[0, -1] = torch.inf  # which an added zero times infinity would spread
    mask = torch.rand(7, columns, generator=generator) < share
    layer, wanted = SparseLinear.pack(linear, mask), torch.where(mask, linear.weight, 0.0).to(dtype)
    assert torch.equal(layer.to_dense(dtype), wanted)
    assert torch.equal(layer.to_dense(dtype, torch.tensor([5, 2])), wanted[[5, 2]])


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (2, 8), (3, 4)])
def test_n_of_m_stay_and_they_are_the_highest(n, m, dim):
    scores = torch.rand(16, 24, generator=torch.Generator().manual_seed(0)).mul(5).round()  # with ties
    mask = n_m_mask(scores, n, m, dim)
    for runs, kept in zip(*(t.movedim(dim, 1).unflatten(1, (-1, m)).flatten(0, 1) for t in (scores, mask)), strict=True):
        assert kept.sum() == n
        assert runs[kept].sum() == max(sum(chosen) for chosen in itertools.combinations(runs.tolist(), n))


def test_an_axis_that_the_pattern_does_not_divide():
    with pytest.raises(ValueError, match="4 must divide the size of dimension 1, got 6"):
        n_m_mask(torch.ones(8, 6), 2, 4)


def test_the_schedule_is_the_cubic():
    found = [scheduled_sparsity(step, 10, 55, 10, 0.8) for step in range(1, 70)]
    assert found[:9] == [0.0] * 9
    for number in range(5):
        assert found[9 + 10 * number] == pytest.approx(0.8 * (1 - (1 - number / 4) ** 3))
    assert found == sorted(found)
    assert found[49:] == [0.8] * 20
    assert scheduled_sparsity(3, 3, 4, 10, 0.5) == 0.5


def test_two_masks_have_the_gradients_that_they_say():
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 5, 8), (12, 8), (3, 5, 12)))
    forward, backward = n_m_mask(weight.abs(), 2, 4), n_m_mask(weight.abs(), 2, 4, dim=0)
    x.requires_grad_()
    weight.requires_grad_()
    y = TwoMasks.apply(x, weight, forward, backward)
    y.backward(grad)
    torch.testing.assert_close(y, x @ (weight * forward).T)
    torch.testing.assert_close(x.grad, grad @ (weight * backward))
    torch.testing.assert_close(weight.grad, torch.einsum("bto,bti->oi", grad, x))
    assert torch.autograd.gradcheck(
        lambda x: TwoMasks.apply(x, weight.detach(), forward, forward), (x.detach().requires_grad_(),)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_layer_is_the_masked_one(dtype):
    torch.manual_seed(0)
    linear = nn.Linear(21, 6).to(dtype)
    mask = lowest_mask(linear.weight.detach().abs(), 0.4)
    layer = SparseLinear.pack(linear, mask)
    dense = linear.weight.detach() * mask
    assert torch.equal(layer.to_dense(dtype), dense)
    assert torch.equal(layer.to_dense(dtype, torch.tensor([4, 1])), dense[[4, 1]])
    assert layer.weight.numel() == int(mask.sum())
    x = torch.randn(3, 21, dtype=dtype)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, dense, linear.bias))
    assert layer.to(torch.float64).weight.dtype == dtype
    empty = SparseLinear.empty_like(nn.Linear(21, 6, device="meta"), **layer.spec())
    assert {k: (b.shape, b.dtype) for k, b in empty.named_buffers()} == {k: (b.shape, b.dtype) for k, b in layer.named_buffers()}
    with pytest.raises(ValueError, match="dtype must be a floating dtype of torch, got 'int8'"):
        SparseLinear(6, 21, 3, "int8")


def test_autocast_reaches_a_masked_layer():
    linear = nn.Linear(8, 4)
    layer = MaskedLinear(linear, 2, 4, has_own=True)
    x = torch.randn(2, 8, requires_grad=True)
    torch.testing.assert_close(layer(x), linear(x))
    layer.remask_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, linear.weight.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"sparsity": 0.7, "score": "magnitude"}, {"pattern": "2:4"}, {"pattern": "2:8", "score": "magnitude"}],
    ids=str,
)
def test_a_recipe_makes_a_folder_of_the_planned_size(family, settings, tmp_path):
    model = tiny_model(family)
    names = list(describe(model).roles)
    dense = {name: hf_compact.arch.as_linear(model.get_submodule(name)).weight.detach().clone() for name in names}
    stage = SparsityConfig(**settings)
    hf_compact.compress(model, {"stages": [stage.to_dict()]}, calibration=batches(family))
    for name in names:
        layer = model.get_submodule(name)
        mask = layer.to_dense() != 0
        assert torch.equal(layer.to_dense(), dense[name] * mask)
        if stage.n_m:
            assert (mask.unflatten(1, (-1, stage.n_m[1])).sum(2) == stage.n_m[0]).all()
        else:
            assert 1 - mask.sum() / mask.numel() == pytest.approx(stage.sparsity, abs=1 / dense[name].shape[1])
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**tiny_inputs(family))[0], model(**tiny_inputs(family))[0])


@pytest.mark.parametrize(("rows", "columns", "sparsity"), [(2560, 10240, 0.94), (64, 48, 0.3)])
def test_a_plan_rounds_as_the_solver_does(rows, columns, sparsity):
    config = SparsityConfig(sparsity=sparsity, score="magnitude")
    made = compress_linear(nn.Linear(columns, rows, bias=False, device="meta"), None, config, solve=False)
    mask = lowest_mask(torch.arange(rows * columns, dtype=torch.float32)[None], sparsity)
    assert made.num_values == int(mask.sum())


def test_wanda_keeps_more_of_the_outputs_than_magnitude():
    """Inputs of very different sizes: the error of the outputs is what tells them apart."""
    errors = {}
    for score in ("wanda", "magnitude"):
        model = tiny_model("llama")
        with torch.no_grad():
            model.model.layers[0].post_attention_layernorm.weight.copy_(torch.logspace(-1, 1, 32))
        stage = {"method": "sparsity", "score": score, "include": ["model.layers.0.mlp.*_proj"], "exclude": ["*.down_proj"]}
        errors[score] = [
            layer.relative_error for layer in hf_compact.compress(model, {"stages": [stage]}, calibration=batches()).layers
        ]
    assert all(a < 0.7 * b for a, b in zip(errors["wanda"], errors["magnitude"], strict=True))


def test_the_file_has_the_bytes_that_the_report_says(dense_folder, tmp_path):
    recipe = {
        "stages": [{"method": "sparsity", "pattern": "2:4"}],
        "calibration": {"num_sequences": 4, "sequence_length": 64},
        "dtype": "bfloat16",
    }
    planned = api.plan(dense_folder, recipe)
    report = hf_compact.compress(dense_folder, recipe, output=tmp_path / "out")
    assert report.is_verified
    assert report.body_bits_per_weight == planned["body_bits_per_weight"] == 9  # half of 16 bits, and one for the mask
    found = api.inspect_folder(tmp_path / "out")
    assert found["file_bytes"] == report.file_bytes == sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    assert {layer["bits_per_weight"] for layer in found["layers"]} == {9}
    api.export(tmp_path / "out", tmp_path / "dense")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not hasattr(plain.config, "quantization_config")
    assert (plain.model.layers[0].mlp.up_proj.weight == 0).float().mean() == 0.5


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (SparsityConfig, {"sparsity": 1.0}, r"sparsity must be in \(0, 1\), got 1.0"),
        (SparsityConfig, {"pattern": "two"}, "pattern must be N:M with 0 < N < M <= 32 or null, got two"),
        (SparsityConfig, {"score": "luck"}, "score must be one of magnitude, wanda, got luck"),
        (MaskTraining, {"end_share": 1.5}, "must be 0 <= start <= end <= 1, got 0.1 and 1.5"),
        (MaskTraining, {"interval": 0}, "interval must be at least 1"),
        (MaskTraining, {"decay": float("nan")}, "decay at least 0"),
        (MaskTraining, {"backward": "none"}, "backward must be one of same, own, got 'none'"),
        (MaskTraining, {"storage": "zip"}, "storage must be one of bitmap, dense, got 'zip'"),
        (MaskTraining, {"num_steps": 0}, "num_steps must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range(make, settings, message):
    with pytest.raises(ConfigError, match=message):
        make(**settings)


def test_a_width_that_the_pattern_does_not_divide():
    with pytest.raises(UnsupportedModel, match=r"has 32 inputs, which sparsity.pattern 3:5 does not divide: exclude it"):
        hf_compact.compress(tiny_model("llama"), {"stages": [{"method": "sparsity", "pattern": "3:5"}]}, calibration=batches())
