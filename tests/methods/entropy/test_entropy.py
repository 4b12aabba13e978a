"""The entropy-coded slice: laws of its solver, its budget, round trips, damage."""

import copy
import itertools

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

import hf_compact
from hf_compact.api import inspect_folder
from hf_compact.calibration import from_batches
from hf_compact.errors import ConfigError, FormatError
from hf_compact.functional.gram import output_energy
from hf_compact.methods.entropy.apply import Guide, compress_embedding, compress_linear, quantize
from hf_compact.methods.entropy.config import EntropyConfig
from hf_compact.methods.entropy.functional import Rounder, dequantize, refit_rows
from tests.conftest import tiny_inputs, tiny_model

NONE = {"method": "entropy", "sensitivity": "none"}


def correlated(size: int, samples: int = 2048, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, size, generator=generator) @ torch.randn(size, size, generator=generator)
    return (x.T @ x).double()


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def error(weight, integers, gram) -> float:
    return output_energy(weight - dequantize(integers), gram) / output_energy(weight, gram)


@pytest.mark.parametrize("bits", [1.0, 1.9, 2.3, 3.0, 4.0, 6.0])
def test_a_linear_lands_on_its_bits(bits):
    linear = nn.Linear(256, 384, bias=False)
    linear.weight.data = normal(384, 256)
    module = compress_linear(linear, correlated(256), EntropyConfig(bits=bits))
    stored = sum(buffer.nbytes for name, buffer in module.named_buffers() if name != "codes")
    assert 8 * stored / linear.weight.numel() == pytest.approx(bits, abs=0.03)


def test_every_bit_quarters_the_error():
    """The law of high rates: six decibels per bit."""
    weight, gram = normal(256, 192), correlated(192)
    errors = [error(weight, quantize(weight, gram, EntropyConfig(bits=bits)), gram) for bits in (3.0, 4.0, 5.0)]
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(4.0, rel=0.1)


@pytest.mark.parametrize("bits", [3.0, 4.0])
def test_error_feedback_beats_rounding_to_nearest(bits):
    weight, gram = normal(256, 192), correlated(192)
    config = EntropyConfig(bits=bits)
    assert error(weight, quantize(weight, gram, config), gram) < 0.5 * error(weight, quantize(weight, None, config), gram)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_beats_the_packed_grid_at_the_same_bytes(bits):
    from hf_compact.methods.codebook.apply import compress_linear as compress_codebook
    from hf_compact.methods.codebook.config import CodebookConfig

    weight, gram = normal(256, 192), correlated(192)
    linear = nn.Linear(192, 256, bias=False)
    linear.weight.data = weight
    packed = compress_codebook(linear, gram, CodebookConfig(bits=bits))
    taken = sum(buffer.nbytes for buffer in packed.buffers()) * 8 / weight.numel()
    ours = error(weight, quantize(weight, gram, EntropyConfig(bits=taken)), gram)
    assert ours < 0.8 * output_energy(weight - packed.to_dense(), gram) / output_energy(weight, gram)


def test_refit_never_loses_to_the_scale_in_place():
    weight, gram = normal(64, 48), correlated(48)
    rounder = Rounder(weight, gram, 0.01)
    step = rounder.guess(2.0)
    codes, columns = rounder.codes(step, slice(None))
    before = torch.full((64,), step * rounder.middle)
    after = refit_rows(weight, codes, columns, gram, before)

    def rows(scale):
        difference = weight - codes.float() * columns * scale[:, None]
        return ((difference @ gram.float()) * difference).sum(1)

    assert (rows(after) <= rows(before) * (1 + 1e-4)).all()


def test_dead_rows_and_inputs_are_kept_finite():
    weight, gram = normal(32, 24), correlated(24)
    weight[3] = 0
    gram[5] = gram[:, 5] = 0
    integers = quantize(weight, gram, EntropyConfig(bits=3.0))
    dense = dequantize(integers)
    assert dense.isfinite().all()
    assert not dense[3].any()


@pytest.mark.parametrize("cls", [nn.Embedding, nn.Linear])
def test_an_embedding_lands_on_its_bits_and_looks_up_rows(cls):
    table = cls(512, 64) if cls is nn.Embedding else cls(64, 512, bias=False)
    module = compress_embedding(table, EntropyConfig(embedding_bits=5.0))
    stored = sum(buffer.nbytes for name, buffer in module.named_buffers() if name != "codes")
    assert 8 * stored / table.weight.numel() == pytest.approx(5.0, abs=0.05)
    assert (module.to_dense() - table.weight).norm() < 0.06 * table.weight.norm()
    ids = torch.tensor([[3, 500], [0, 3]])
    assert torch.equal(module.to_dense(rows=ids.flatten()), module.to_dense()[ids.flatten()])
    if cls is nn.Embedding:
        assert torch.equal(module(ids), module.to_dense(torch.float32)[ids])


@pytest.mark.parametrize("sensitivity", ["none", "fisher"])
@pytest.mark.parametrize("family", ["llama", "llama_untied", "gemma3", "gpt2", "gpt_neox", "opt", "bert", "t5", "vit"])
def test_every_family_round_trips(family, sensitivity, tmp_path):
    model = tiny_model(family)
    inputs = tiny_inputs(family)
    report = hf_compact.compress(
        model, {"stages": [{**NONE, "sensitivity": sensitivity, "bits": 5.0}]}, calibration=from_batches([inputs, inputs])
    )
    assert report.layers
    model.save_pretrained(tmp_path / "a")
    cls = AutoModelForCausalLM if report.auto_class == "AutoModelForCausalLM" else type(model)
    again = cls.from_pretrained(tmp_path / "a")
    with torch.no_grad():
        expected = model(**inputs)[0]
        assert torch.equal(again(**inputs)[0], expected)
        again.save_pretrained(tmp_path / "b")
        assert torch.equal(cls.from_pretrained(tmp_path / "b")(**inputs)[0], expected)
    for path in (tmp_path / "a").glob("*.safetensors"):
        assert not any(key.endswith(".codes") for key in load_file(path))


def test_a_tied_head_shares_the_decoded_integers(tmp_path):
    model = tiny_model("llama")
    hf_compact.compress(model, {"stages": [NONE]}, calibration=from_batches([tiny_inputs("llama")]))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.codes.data_ptr() == again.model.embed_tokens.codes.data_ptr()


def test_bits_follow_the_sensitivity():
    """A block whose output is scaled down to nothing costs the loss nothing, and gets fewer bits."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.mul_(1e-2)
        model.model.layers[1].mlp.down_proj.weight.mul_(1e-2)
    batches = [tiny_inputs("llama"), tiny_inputs("llama")]
    report = hf_compact.compress(
        model, {"stages": [{**NONE, "sensitivity": "fisher", "bits": 4.0}]}, calibration=from_batches(batches)
    )
    bits = {layer.name: layer.bits_per_weight for layer in report.body}
    assert bits["model.layers.1.mlp.up_proj"] < bits["model.layers.0.mlp.up_proj"] - 2


def test_the_guide_makes_up_for_what_the_first_layers_took():
    layer = hf_compact.report.LayerReport(
        name="a", role="up", method="entropy", num_weights=1000, compressed_bytes=500, relative_error=0.0, seconds=0.0
    )
    guide = Guide(0.0, {"a": 3.0, "b": 3.0}, {"a": 1000, "b": 2000}, {"b": torch.ones(1)}, 1.0)
    assert guide.share("b", []).step == 1.0
    assert guide.share("b", [layer]).step == pytest.approx(2**0.5)  # a thousand bits too many, on two thousand weights


def test_the_measured_model_is_left_as_it_was():
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    requires = [p.requires_grad for p in model.parameters()]
    hf_compact.compress(
        model, {"stages": [{**NONE, "sensitivity": "fisher", "exclude": ["*.1.*"], "embedding_bits": None}]},
        calibration=from_batches([tiny_inputs("llama")]),
    )  # fmt: skip
    assert torch.equal(model.state_dict()["model.layers.1.mlp.up_proj.weight"], before["model.layers.1.mlp.up_proj.weight"])
    assert requires[0] == next(model.parameters()).requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_the_same_seed_gives_the_same_bytes():
    found = []
    for _ in range(2):
        model = tiny_model("llama")
        hf_compact.compress(
            model, {"stages": [{**NONE, "sensitivity": "fisher"}]}, calibration=from_batches([tiny_inputs("llama")])
        )
        found.append(model.state_dict())
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


@pytest.fixture
def folder(tmp_path):
    model = tiny_model("llama")
    hf_compact.compress(model, {"stages": [NONE]}, calibration=from_batches([tiny_inputs("llama")]))
    model.save_pretrained(tmp_path / "folder")
    return tmp_path / "folder"


def test_a_damaged_stream_is_refused_by_name(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][-3] ^= 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"model\.layers\.1\.mlp\.up_proj: chunk 0 of an entropy-coded weight is damaged"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_inspect_reads_the_bits_from_the_headers(folder):
    found = inspect_folder(folder)
    layer = next(layer for layer in found["layers"] if layer["name"] == "model.layers.0.mlp.up_proj")
    assert layer["layer"] == "entropy_linear"
    assert layer["bytes"] == layer["num_bytes"] + 2 * 72 + 2 * 32


def test_a_cast_leaves_the_stored_tensors_alone(folder):
    model = AutoModel.from_pretrained(folder, dtype=torch.float16)
    module = model.layers[0].mlp.up_proj
    assert (module.weight.dtype, module.row_scale.dtype, module.column_scale.dtype) == (torch.int8, torch.float16, torch.float16)
    assert model.embed_tokens(torch.tensor([1])).dtype == torch.float16


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [("bits", 0.2, "in \\[0.5, 7\\]"), ("bits", 8.0, "in \\[0.5, 7\\]"), ("embedding_bits", 9.0, "in \\[0.5, 7\\]"),
     ("sensitivity", "hessian", "one of fisher, none"), ("damp", -1.0, "at least 0"), ("row_power", 3.0, "in \\[0, 2\\]"),
     ],
)  # fmt: skip
def test_bad_settings_are_named(field, value, rule):
    with pytest.raises(ConfigError, match=rf"entropy\.{field} must be {rule}"):
        EntropyConfig(**{field: value})
