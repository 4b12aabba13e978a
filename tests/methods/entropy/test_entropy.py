"""The entropy-coded slice: laws of its solver, its budget, round trips, damage."""

import copy
import itertools
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

import hf_compact
from hf_compact.api import inspect_folder
from hf_compact.arch import describe
from hf_compact.calibration import from_batches
from hf_compact.config import DistillationConfig
from hf_compact.distillation import distill_
from hf_compact.errors import ConfigError, FormatError, UnsupportedModel
from hf_compact.functional.gram import output_energy
from hf_compact.methods.entropy.apply import Guide, _find_step, compress_embedding, compress_linear, quantize
from hf_compact.methods.entropy.config import EntropyConfig
from hf_compact.methods.entropy.functional import Rounder, dequantize, refit_rows
from hf_compact.sensitivity import measure
from tests.conftest import tiny_inputs, tiny_model

NONE = {"method": "entropy", "sensitivity": "none"}
GRIDS = ("trellis", "uniform")


def correlated(size: int, samples: int = 2048, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, size, generator=generator) @ torch.randn(size, size, generator=generator)
    return (x.T @ x).double()


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def error(weight, integers, gram) -> float:
    return output_energy(weight - dequantize(integers), gram) / output_energy(weight, gram)


@pytest.mark.parametrize(
    ("bits", "power"), [*((bits, 1) for bits in (1.0, 1.9, 2.3, 3.0, 4.0, 6.0)), *((bits, 3) for bits in (1.0, 1.9, 2.3, 3.0))]
)
@pytest.mark.parametrize("grid", GRIDS)
def test_a_linear_lands_on_its_bits(bits, grid, power):
    linear = nn.Linear(256, 384, bias=False)
    linear.weight.data = normal(384, 256) ** power
    module = compress_linear(linear, correlated(256), EntropyConfig(bits=bits, grid=grid))
    stored = sum(buffer.nbytes for name, buffer in module.named_buffers() if name != "codes")
    assert 8 * stored / linear.weight.numel() == pytest.approx(bits, abs=0.004 + 0.003 * bits)


def test_every_bit_quarters_the_error():
    """The law of high rates: six decibels per bit."""
    weight, gram = normal(256, 192), correlated(192)
    errors = [error(weight, quantize(weight, gram, EntropyConfig(bits=bits)), gram) for bits in (3.0, 4.0, 5.0)]
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(4.0, rel=0.1)


@pytest.mark.parametrize("gram", [None, correlated(192)], ids=["independent", "correlated"])
@pytest.mark.parametrize(("bits", "decibels"), [(4.0, 0.7), (3.0, 0.6), (2.0, 0.3)])
def test_a_trellis_loses_less_than_one_grid_at_the_same_bits(bits, decibels, gram):
    """Of the 1.53 dB between one grid and the bound, four states win back 0.99 in the limit of high rates."""
    weight = normal(256, 192)
    trellis, uniform = (error(weight, quantize(weight, gram, EntropyConfig(bits=bits, grid=grid)), gram) for grid in GRIDS)
    assert 10 * math.log10(uniform / trellis) > decibels


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
    _, values, _, _, columns = rounder.integers(step, gram)
    before = torch.full((64,), step * rounder.scale)
    after = refit_rows(weight, values, columns, gram, before)

    def rows(scale):
        difference = weight - values.float() * columns * scale[:, None]
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
    guide = Guide(3.0, 0.0, {"a": 3.0, "b": 3.0}, {"a": 1000, "b": 2000}, {"b": torch.ones(1)})
    assert guide.share("b", [], 4.0).step == 2.0
    assert guide.share("b", [layer], 1.0).step == pytest.approx(2**0.5)  # a thousand bits too many, on two thousand weights


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


@pytest.mark.parametrize("bits", [3.0, 4.0])
@pytest.mark.parametrize("family", ["llama", "vit"])
def test_the_model_lands_on_its_bits(family, bits):
    """Whatever the spread of its sensitivities is; matrices of this size spend most of two bits on scales."""
    model = (
        tiny_model(family, hidden_size=64, intermediate_size=256) if family != "t5" else tiny_model(family, d_model=64, d_ff=256)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1e-2 if ".1." in name and parameter.dim() == 2 else 1)
    report = hf_compact.compress(
        model, {"stages": [{**NONE, "sensitivity": "fisher", "bits": bits}]}, calibration=from_batches([tiny_inputs(family)])
    )
    assert report.body_bits_per_weight == pytest.approx(bits, abs=0.25)


@pytest.mark.parametrize("sensitivity", ["none", "fisher"])
def test_linears_of_zeros_stay_zeros(sensitivity):
    model = tiny_model("llama")
    torch.nn.init.zeros_(model.model.layers[1].mlp.down_proj.weight)
    hf_compact.compress(
        model, {"stages": [{**NONE, "sensitivity": sensitivity}]}, calibration=from_batches([tiny_inputs("llama")])
    )
    assert not model.model.layers[1].mlp.down_proj.to_dense().any()
    assert model(**tiny_inputs("llama")).logits.isfinite().all()


def test_a_linear_that_the_loss_does_not_see_leaves_the_others_alone():
    """Behind a zero the gradient ends: those Linears get the budget of the recipe, and no say in the others' shares."""
    model = tiny_model("llama")
    torch.nn.init.zeros_(model.model.layers[1].self_attn.o_proj.weight)
    report = hf_compact.compress(
        model, {"stages": [{**NONE, "sensitivity": "fisher", "bits": 5.0}]}, calibration=from_batches([tiny_inputs("llama")])
    )
    errors = {layer.name: layer.relative_error for layer in report.body}
    assert max(value for name, value in errors.items() if "o_proj" not in name) < 0.3


@pytest.mark.parametrize("size", [1e-8, 1e-5, 1e-4, 1.0, 1e6])
def test_the_size_of_the_weights_does_not_matter(size):
    weight, gram = normal(64, 48), correlated(48)
    expected = quantize(weight, gram, EntropyConfig(bits=4.0))
    found = quantize(weight * size, gram, EntropyConfig(bits=4.0))
    assert error(weight * size, found, gram) == pytest.approx(error(weight, expected, gram), rel=0.05)


def test_rows_of_an_embedding_that_are_tiny_stay_tiny():
    table = nn.Embedding(512, 64)
    with torch.no_grad():
        table.weight.mul_(0.02)
        table.weight[:100] *= 1e-3
    dense = compress_embedding(table, EntropyConfig()).to_dense()
    assert (dense - table.weight)[:100].norm() < 0.1 * table.weight[:100].norm()


@pytest.mark.parametrize("rest", [0.0, 1e-30], ids=["zeros", "next_to_nothing"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_rows_that_no_token_uses_cost_the_others_nothing(share, rest):
    """A vocabulary padded to a round number, or taken over from a larger model."""
    table = nn.Embedding(1000, 64)
    with torch.no_grad():
        table.weight[: int(share * 1000)] *= rest
    module = compress_embedding(table, EntropyConfig(embedding_bits=5.0))
    stored = sum(buffer.nbytes for name, buffer in module.named_buffers() if name != "codes")
    assert 8 * stored / table.weight.numel() < 5.1
    assert (module.to_dense() - table.weight).norm() < 0.06 * table.weight.norm()
    assert rest or not module.to_dense()[: int(share * 1000)].any()


@pytest.mark.parametrize("has_gram", [True, False], ids=["gram", "no_gram"])
@pytest.mark.parametrize("share", [0.8, 0.9, 0.97])
def test_more_bits_than_there_are_leave_the_weights_whole(share, has_gram):
    """A matrix with few rows that are not zero: their bytes are full long before the average meets the budget."""
    weight = normal(96, 64)
    weight[torch.randperm(96, generator=torch.Generator().manual_seed(0))[: int(share * 96)]] = 0
    gram = correlated(64) if has_gram else torch.eye(64)
    integers = quantize(weight, gram if has_gram else None, EntropyConfig(bits=5.0))
    assert error(weight, integers, gram) < 1e-3


def test_a_matrix_whose_scales_take_the_budget_is_still_a_matrix():
    weight = normal(8, 256)
    integers = quantize(weight, None, EntropyConfig(bits=2.0, sensitivity="none"))
    assert error(weight, integers, None) < 0.9


@pytest.mark.parametrize("device_map", [{"": "cpu"}, {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu",
    "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}])  # fmt: skip
def test_a_tied_model_loads_with_a_device_map(folder, device_map, tmp_path):
    inputs = tiny_inputs("llama")
    expected = AutoModelForCausalLM.from_pretrained(folder)(**inputs).logits
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "offload")
    assert torch.equal(model(**inputs).logits, expected)


def test_another_state_dict_replaces_the_decoded_integers():
    module = compress_linear(nn.Linear(64, 32, bias=False), None, EntropyConfig(bits=3.0))
    expected = module.to_dense()
    module.codes.neg_()
    assert torch.equal(module.to_dense(), -expected)
    module.load_state_dict(module.state_dict())
    assert torch.equal(module.to_dense(), expected)


def test_a_decoder_has_a_mask_of_its_own():
    """Where encoder and decoder are of one length, too."""
    model = tiny_model("t5")
    arch = describe(model)
    names = [name for name in arch.roles if ".decoder.block.0." in f".{name}"]
    ids = torch.arange(3, 9)[None]
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    padded = {**inputs, "decoder_input_ids": ids, "decoder_attention_mask": mask}
    short = {**inputs, "decoder_input_ids": ids[:, :4], "decoder_attention_mask": mask[:, :4]}
    first, second = (measure(model, arch, names, [batch], 10**6, 10**6) for batch in (padded, short))
    assert {arch.roles[name] for name in names} >= {"q", "cross_q", "cross_k"}
    for name in names:
        torch.testing.assert_close(first.grams[name], second.grams[name], rtol=1e-3, atol=1e-4)


def test_padding_changes_nothing():
    """The same sentences with and without padding behind them give the same sensitivities."""
    model = tiny_model("bert")
    names = list(describe(model).roles)
    ids = tiny_inputs("bert")["input_ids"]
    padded = torch.nn.functional.pad(ids, (0, 16), value=2)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 16))
    plain = measure(model, describe(model), names, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], 10**6, 10**6)
    with_padding = measure(model, describe(model), names, [{"input_ids": padded, "attention_mask": mask}], 10**6, 10**6)
    for name in names:
        torch.testing.assert_close(with_padding.grams[name], plain.grams[name], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(with_padding.rows[name], plain.rows[name], rtol=1e-2, atol=1e-6)


def test_row_energies_are_those_of_the_gradients():
    """Of one Linear in front of a head, in closed form: the gradient of drawn labels is `(p - y) W_head`."""
    model = tiny_model("llama")
    name = "model.layers.2.mlp.down_proj"
    inputs = {"input_ids": tiny_inputs("llama")["input_ids"][:1]}
    found = measure(model, describe(model), [name], [inputs], 10**6, 10**6)
    captured = {}
    module = model.get_submodule(name)
    handle = module.register_forward_hook(lambda m, a, output: captured.setdefault("y", output.detach().requires_grad_(True)))
    logits = model(**inputs).logits[0].float()
    handle.remove()
    labels = torch.multinomial(logits.detach().softmax(1), 1, generator=torch.Generator().manual_seed(0))[:, 0]
    gradient = torch.autograd.grad(nn.functional.cross_entropy(logits, labels, reduction="sum"), captured["y"])[0][0]
    expected = gradient.double().square().sum(0) / inputs["input_ids"].numel()
    torch.testing.assert_close(found.rows[name], expected, rtol=1e-4, atol=1e-12)


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


@pytest.mark.parametrize("embedding_bits", [None, 6.0, 16.0])
@pytest.mark.parametrize("family", ["llama", "llama_untied"])
def test_inspect_tells_the_memory_of_what_is_decoded(family, embedding_bits, tmp_path):
    model = tiny_model(family).bfloat16()
    stage = {**NONE, "embedding_bits": embedding_bits}
    hf_compact.compress(model, {"stages": [stage]}, calibration=from_batches([tiny_inputs(family)]))
    model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    model(**tiny_inputs(family))
    kept = [*model.state_dict().values(), *(module.codes for module in model.modules() if hasattr(module, "codes"))]
    assert inspect_folder(tmp_path)["memory_bytes"] == sum(t.nbytes for t in {t.data_ptr(): t for t in kept}.values())


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        ([3.0, 2.1, 2.0], 2.0),  # the nearest, whichever was last
        ([3.0, 3.0001], 3.0),  # no more tries where nothing moves
        ([2.6, 1.9, 2.3, 2.05, 1.98, 2.03, 1.97, 2.02], 1.98),
    ],
)
def test_the_nearest_step_that_was_tried_is_taken(bits, expected):
    tried = []

    def bits_at(step):
        tried.append(step)
        return bits[len(tried) - 1]

    found = _find_step(bits_at, 2.0, 1.0, 1e-9)
    assert bits[tried.index(found)] == expected
    assert len(tried) == len(bits)


@pytest.mark.parametrize("power", [1, 3, 5])
def test_few_tries_land_on_a_smooth_curve(power):
    tried = []

    def bits_at(step):
        tried.append(step)
        return 8 / (1 + (step / 0.1) ** (1 / power))

    found = _find_step(bits_at, 2.3, 4.0, 1e-9)
    assert abs(bits_at(found) - 2.3) < 0.004
    assert len(tried) <= 8


def test_inspect_reads_the_bits_from_the_headers(folder):
    found = inspect_folder(folder)
    layer = next(layer for layer in found["layers"] if layer["name"] == "model.layers.0.mlp.up_proj")
    assert layer["layer"] == "entropy_linear"
    assert layer["bytes"] == layer["num_bytes"] + 2 * 72 + 2 * 32 + 4


def test_a_cast_leaves_the_stored_tensors_alone(folder):
    model = AutoModel.from_pretrained(folder, dtype=torch.float16)
    module = model.layers[0].mlp.up_proj
    assert (module.weight.dtype, module.row_scale.dtype, module.column_scale.dtype) == (torch.int8, torch.float16, torch.float16)
    assert model.embed_tokens(torch.tensor([1])).dtype == torch.float16


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [("bits", 0.2, "in \\[0.5, 7\\]"), ("bits", 8.0, "in \\[0.5, 7\\]"), ("embedding_bits", 9.0, "in \\[0.5, 7\\] or 16"),
     ("sensitivity", "hessian", "one of fisher, none"), ("damp", -1.0, "in \\[0, 1\\]"), ("damp", float("nan"), "in \\[0, 1\\]"), ("row_power", 3.0, "in \\[0, 2\\]"),
     ],
)  # fmt: skip
def test_bad_settings_are_named(field, value, rule):
    with pytest.raises(ConfigError, match=rf"entropy\.{field} must be {rule}"):
        EntropyConfig(**{field: value})


def test_dequantize_works_after_saving(folder, tmp_path):
    """Saving leaves the name of the dtype in the config."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = model(**tiny_inputs("llama")).logits
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(model.dequantize()(**tiny_inputs("llama")).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "llama_untied", "t5"])
def test_an_embedding_is_kept_to_the_bit(family, tmp_path):
    model = tiny_model(family, torch.bfloat16)
    before = model.get_input_embeddings().weight.clone()
    stage = {**NONE, "embedding_bits": 16}
    hf_compact.compress(model, {"stages": [stage]}, calibration=from_batches([tiny_inputs(family)]))
    table = model.get_input_embeddings()
    assert 8 * table.weight.numel() / before.numel() < 14
    assert torch.equal(table.to_dense(torch.bfloat16), before)
    model.save_pretrained(tmp_path / "small")
    again = type(model).from_pretrained(tmp_path / "small")
    assert torch.equal(again.get_input_embeddings().to_dense(torch.bfloat16), before)
    with torch.no_grad():
        assert torch.equal(again(**tiny_inputs(family))[0], model(**tiny_inputs(family))[0])
    assert again.dequantize().get_input_embeddings().weight.equal(before)


def test_a_lossless_head_stands_in_a_distillation():
    model, teacher = tiny_model("llama_untied", torch.bfloat16), tiny_model("llama_untied", torch.bfloat16)
    hf_compact.compress(
        model, {"stages": [{**NONE, "bits": 2.0, "embedding_bits": 16}]}, calibration=from_batches([tiny_inputs("llama")])
    )
    head = model.lm_head.weight.clone()
    losses = distill_(model, teacher, [tiny_inputs("llama")], DistillationConfig(epochs=3))
    assert len(losses) == 3
    assert torch.equal(model.lm_head.weight, head)


def test_a_table_of_other_width_cannot_be_kept():
    with pytest.raises(UnsupportedModel, match="embedding_bits 16 needs 16-bit weights, got float32"):
        compress_embedding(nn.Embedding(5, 8), EntropyConfig(embedding_bits=16))


def test_a_table_of_other_width_is_found_before_anything_is_done(dense_folder, tmp_path):
    recipe = {"stages": [{**NONE, "embedding_bits": 16}], "calibration": {"num_sequences": 2, "sequence_length": 32}}
    with pytest.raises(UnsupportedModel, match="embedding_bits 16 needs 16-bit weights, got float32"):
        hf_compact.compress(dense_folder, recipe, output=tmp_path / "small")
    assert not list(tmp_path.iterdir())
    model = tiny_model("llama")
    with pytest.raises(UnsupportedModel, match="embedding_bits 16 needs 16-bit weights, got float32"):
        hf_compact.compress(model, recipe, calibration=from_batches([tiny_inputs("llama")]))
    assert type(model.get_input_embeddings()) is nn.Embedding


def test_an_empty_lossless_table_has_no_scales():
    table = nn.Embedding(50, 8, dtype=torch.bfloat16)
    solved, empty = (compress_embedding(table, EntropyConfig(embedding_bits=16), solve=solve) for solve in (True, False))
    assert solved.exact == empty.exact == "bfloat16"
    assert {name for name, _ in solved.named_buffers()} == {"weight", "codes"}


def test_entries_beyond_a_byte_make_their_row_coarser():
    weight = normal(64, 32)
    weight[3, 5] = 400.0
    table = nn.Embedding.from_pretrained(weight)
    dense = compress_embedding(table, EntropyConfig(embedding_bits=7.0)).to_dense()
    assert abs(dense[3, 5] / 400 - 1) < 0.01
    others = torch.arange(64) != 3
    assert (dense - weight)[others].norm() < 0.05 * weight[others].norm()
