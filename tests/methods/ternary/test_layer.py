"""The two states of the layer agree; compressed models survive a round trip."""

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import hf_compact
from hf_compact import TernaryConfig
from hf_compact.calibration import from_batches
from hf_compact.errors import ConfigError, UnsupportedModel
from hf_compact.methods.ternary import LatentLinear, TernaryLinear
from hf_compact.methods.ternary.apply import compress_embedding, compress_linear
from hf_compact.methods.ternary.config import TernaryTraining
from tests.conftest import tiny_inputs, tiny_model


def linear(rows: int = 12, columns: int = 37, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(columns, rows, bias=bias)


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


SETTINGS = {
    "absmean": {}, "absmedian": {"scale": "absmedian", "dequantization": "shared"}, "lsq": {"scale": "lsq"},
    "rows": {"granularity": "row"}, "two-bit packing": {"packing": "bits"}, "16-bit inputs": {"activation_bits": None},
    **{f"{bits} bits": {"bits": bits} for bits in (2, 3, 4)}, "3 bits, lsq": {"bits": 3, "scale": "lsq", "granularity": "row"},
}  # fmt: skip


@pytest.mark.parametrize("is_sub_norm", [False, True])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_packed_layer_computes_what_the_latent_one_does(settings, is_sub_norm):
    module, x = linear(), inputs(2, 5, 37)
    latent = LatentLinear(module, TernaryConfig(**settings), is_sub_norm)
    assert latent.weight is module.weight
    assert latent.bias is module.bias
    assert torch.equal(latent(x), module(x)), "strength 0 is the dense layer"
    latent.strength.fill_(1.0)
    if is_sub_norm:
        nn.init.normal_(latent.sub_norm, 1.0, 0.1)
    packed = latent.pack()
    assert (latent(x) - packed(x)).abs().max() <= 1e-5
    torch.testing.assert_close(packed.scaled_forward(x), packed(x), rtol=1e-4, atol=1e-5)
    assert packed.weight.shape[:2] == (12, 1)
    again = TernaryLinear.empty_like(module, **packed.spec())
    again.load_state_dict(packed.state_dict())
    assert torch.equal(again(x), packed(x))
    assert torch.equal(packed.to_dense(rows=torch.tensor([3, 3, 0])), packed.to_dense()[[3, 3, 0]])


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_every_parameter_gets_a_gradient(settings):
    latent = LatentLinear(linear(), TernaryConfig(**settings), is_sub_norm=True)
    latent.strength.fill_(1.0)
    latent(inputs(4, 37)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in latent.parameters())


def test_under_autocast_the_step_is_still_that_of_float32():
    latent = LatentLinear(linear(), TernaryConfig())
    latent.strength.fill_(1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = latent(inputs(3, 37))
        assert found.dtype == torch.bfloat16
        assert latent.quantized().dtype == torch.float32
        packed = latent.pack()
        torch.testing.assert_close(packed(inputs(3, 37)), found, rtol=2e-2, atol=2e-2)


def test_a_layer_in_bfloat16_trains():
    latent = LatentLinear(linear().bfloat16(), TernaryConfig(), is_sub_norm=True).bfloat16()
    latent.strength.fill_(0.5)
    y = latent(inputs(3, 37).bfloat16())
    y.sum().backward()
    assert y.dtype == latent.weight.grad.dtype == torch.bfloat16


def test_a_transposed_module_keeps_its_parameter():
    module = Conv1D(12, 37)
    latent = LatentLinear(module, TernaryConfig())
    assert latent.weight is module.weight
    torch.testing.assert_close(latent(inputs(2, 37)), module(inputs(2, 37)))
    latent.strength.fill_(1.0)
    assert latent.pack().to_dense().shape == (12, 37)


def test_rounding_without_training_is_best_for_the_inputs():
    module, x = linear(bias=False), inputs(200, 37) @ inputs(37, 37)
    gram = x.T @ x
    errors = {
        how: (F.linear(x, compress_linear(module, gram, TernaryConfig(dequantization=how)).to_dense() - module.weight))
        .square()
        .sum()
        for how in ("shared", "weights", "inputs")
    }
    assert errors["inputs"] < min(errors["weights"], errors["shared"])


@pytest.mark.parametrize("bits", [8, 4])
def test_embeddings_keep_rows_of_eight_or_four_bits(bits):
    table = nn.Embedding(50, 24)
    new = compress_embedding(table, TernaryConfig(embedding_bits=bits))
    ids = torch.tensor([[3, 7], [0, 49]])
    lost = (new(ids) - table(ids)).norm() / table(ids).norm()
    assert lost < {8: 0.01, 4: 0.12}[bits]
    assert compress_embedding(table, TernaryConfig(embedding_bits=None)) is None
    assert compress_embedding(table, TernaryConfig(), solve=False).weight.shape == (50, 1, 24)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_a_stage_of_a_recipe_survives_a_round_trip(family, tmp_path):
    model = tiny_model(family)
    stage = {"method": "ternary", "bits": 1.58}
    hf_compact.compress(model, {"stages": [stage]}, calibration=from_batches([tiny_inputs(family)]))
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        assert torch.equal(model.eval()(**tiny_inputs(family)).logits, again(**tiny_inputs(family)).logits)
    found = hf_compact.inspect_folder(tmp_path)
    assert 1.6 <= found["body_bits_per_weight"] < 3  # rows of 32 weights take 7 bytes, a scale per matrix 4 more
    assert found["file_bits_per_weight"] > found["body_bits_per_weight"]


def test_quantization_while_loading(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    config = hf_compact.CompactConfig(stages=[{"method": "ternary", "dequantization": "weights", "bits": 4}])
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert isinstance(model.model.layers[0].mlp.up_proj, TernaryLinear)
    assert torch.isfinite(model(**tiny_inputs("llama")).logits).all()


def test_scales_are_distilled(tmp_path):
    teacher = tiny_model("llama")
    model = copy.deepcopy(teacher)
    hf_compact.compress(
        model, {"stages": [{"method": "ternary", "dequantization": "shared"}]}, calibration=from_batches([tiny_inputs("llama")])
    )
    from hf_compact.config import DistillationConfig
    from hf_compact.distillation import distill_

    losses = distill_(model, teacher, [tiny_inputs("llama")], DistillationConfig(epochs=20, learning_rate=0.02))
    assert losses[-1] < 0.9 * losses[0]


def test_without_the_plugin_the_files_are_refused(tmp_path):
    model = tiny_model("llama")
    hf_compact.compress(model, {"stages": [{"method": "ternary"}]}, calibration=from_batches([tiny_inputs("llama")]))
    model.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    del config.quantization_config
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path, config=config)


def test_a_norm_cannot_be_made_dense():
    packed = LatentLinear(linear(), TernaryConfig(), is_sub_norm=True).pack()
    with pytest.raises(UnsupportedModel, match="cannot be written as a plain Linear"):
        packed.dense_module(torch.float32)


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"bits": 1.5}, "bits must be one of 1.58, 2, 3, 4, got 1.5"), ({"scale": "max"}, "scale must be one of absmean"),
     ({"packing": "zip"}, "packing must be one of base3, bits, got zip"), ({"activation_bits": 4}, "one of 8, null, got 4"),
     ({"embedding_bits": 2}, "embedding_bits must be one of 8, 4, null, got 2")],
    ids=str,
)  # fmt: skip
def test_bad_settings_name_themselves(settings, match):
    with pytest.raises(ConfigError, match=match):
        TernaryConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"ramp": "fast"}, "ramp must be one of linear, cosine, step, got fast"), ({"ramp_share": 1.5}, r"ramp_share must be in \[0, 1\]"),
     ({"decay_share": -1.0}, r"decay_share must be in \[0, 1\]"), ({"num_steps": 0}, "num_steps must be at least 1")],
    ids=str,
)  # fmt: skip
def test_bad_training_settings_name_themselves(settings, match):
    with pytest.raises(ConfigError, match=match):
        TernaryTraining(**settings)


def test_a_module_of_unknown_settings_is_refused():
    with pytest.raises(ValueError, match="packing must be one of base3, bits, got 'zip'"):
        TernaryLinear(2, 2, bits=1.58, packing="zip", granularity="row", activation_bits=8)
