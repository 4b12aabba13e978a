"""Distillation of scales and norms: it lowers the divergence, leaves integers alone, and survives being killed."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification

import hf_compact
from hf_compact.calibration import from_batches
from hf_compact.checkpoint import Journal
from hf_compact.config import DistillationConfig, Recipe
from hf_compact.distillation import distill_, divergence
from hf_compact.errors import ConfigError, NumericalError
from hf_compact.fitting import fit_
from hf_compact.methods.codebook import CodebookConfig
from hf_compact.methods.codebook.apply import compress_linear
from tests.conftest import FAMILIES, tiny_inputs, tiny_model

STAGE = {"method": "entropy", "bits": 2.0, "sensitivity": "none"}


@pytest.fixture(scope="module")
def pair():
    teacher = tiny_model("llama")
    with torch.no_grad():  # logits that say something
        for parameter in teacher.parameters():
            parameter.mul_(3 if parameter.dim() == 2 else 1)
    model = copy.deepcopy(teacher)
    hf_compact.compress(model, {"stages": [STAGE]}, calibration=from_batches([tiny_inputs("llama")]))
    return model, teacher


def test_the_divergence_falls_and_only_scales_and_norms_move(pair):
    model, teacher = copy.deepcopy(pair[0]), pair[1]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs = tiny_inputs("llama")
    with torch.no_grad():
        start = divergence(model(**inputs)[0], teacher(**inputs)[0]).item()
    losses = distill_(model, teacher, [inputs], DistillationConfig(epochs=40, learning_rate=0.01))
    with torch.no_grad():
        end = divergence(model(**inputs)[0], teacher(**inputs)[0]).item()
    assert losses[0] == pytest.approx(start, rel=0.02)
    assert end < 0.8 * start
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved
    assert all(name.endswith(("row_scale", "column_scale", "norm.weight")) for name in moved)
    assert not any(name.startswith(("lm_head", "model.embed_tokens")) for name in moved)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_that_is_its_teacher_stays_where_it_is(pair):
    model = copy.deepcopy(pair[0])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = distill_(model, copy.deepcopy(model), [tiny_inputs("llama")], DistillationConfig(learning_rate=1e-6))
    assert losses[0] < 1e-4
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor.float(), before[name].float(), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("settings", [{"bits": 8}, {"bits": 4}, {"bits": 8, "group_size": None, "scale_bits": None}], ids=str)
def test_the_scaled_forward_fits_into_float16(settings):
    """Sums of whole numbers would not, where the outputs are in the tens."""
    linear = torch.nn.Linear(512, 64, bias=False)
    torch.nn.init.normal_(linear.weight, std=0.02, generator=torch.Generator().manual_seed(0))
    module = compress_linear(linear.half(), None, CodebookConfig(rounding="nearest", **settings))
    x = (20 * torch.randn(8, 512, generator=torch.Generator().manual_seed(1))).half()
    torch.testing.assert_close(module.scaled_forward(x), module(x), rtol=1e-2, atol=0.1)


def test_the_scaled_forward_is_the_forward(pair):
    module = pair[0].model.layers[1].mlp.up_proj
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(module.scaled_forward(x), module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_and_columns_of_a_pruned_model_are_scaled(family):
    teacher, inputs = tiny_model(family), tiny_inputs(family)
    with torch.no_grad():  # logits that say something
        for parameter in teacher.parameters():
            parameter.mul_(2 if parameter.dim() == 2 else 1)
    recipe = {"stages": [{"method": "pruning", "channel_sparsity": 0.5, "score": "random", "compensation": "none"}]}
    plain, distilled = copy.deepcopy(teacher), copy.deepcopy(teacher)
    hf_compact.compress(plain, recipe, calibration=from_batches([inputs]))
    settings = {"epochs": 40, "learning_rate": 0.01}
    hf_compact.compress(distilled, recipe | {"distillation": settings}, calibration=from_batches([inputs]))
    with torch.no_grad():
        lost = [divergence(model(**inputs)[0], teacher(**inputs)[0]).item() for model in (plain, distilled)]
    assert lost[1] < 0.7 * lost[0]
    assert {name: tensor.shape for name, tensor in distilled.state_dict().items()} == {
        name: tensor.shape for name, tensor in plain.state_dict().items()
    }
    name = "model.layers.1.mlp.up_proj" if family == "llama" else "transformer.h.1.mlp.c_fc"
    ratio = distilled.get_submodule(name).weight / plain.get_submodule(name).weight
    # Nothing but factors: every second-order minor of the ratios vanishes.
    torch.testing.assert_close(ratio * ratio[0, 0], ratio[:, :1] * ratio[:1], rtol=1e-3, atol=1e-3)
    assert (ratio - 1).abs().max() > 1e-2
    assert type(distilled.get_submodule(name)) is type(teacher.get_submodule(name))


def test_factors_of_a_fit_that_fails_leave_nothing():
    """The loss is no number in the second step, when factors have moved."""
    model, inputs = tiny_model("llama"), tiny_inputs("llama")
    linears = [layer.mlp.up_proj for layer in model.model.layers]

    def loss_of(call, step):
        return call(**inputs)[0].square().mean() * (torch.nan if step else 1)

    with pytest.raises(NumericalError, match="distillation step 1 is not finite"):
        list(fit_(model, loss_of, 2, 0.05, "distillation", linears))
    assert not any("factor" in name for name, _ in model.named_buffers())
    assert all("forward" not in vars(linear) for linear in linears)
    torch.testing.assert_close(model.state_dict(), tiny_model("llama").state_dict(), rtol=0, atol=0)


def test_a_scaled_weight_beyond_its_dtype_is_an_error():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False)).half()
    largest = torch.finfo(torch.float16).max
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[largest, 0.0], [0.0, 1.0]]))
    before, x = module[0].weight.clone(), torch.tensor([[1e-3, 1.0]]).half()
    with pytest.raises(NumericalError, match=r"not finite in torch.float16: lower distillation.learning_rate"):
        list(fit_(module, lambda call, step: -1e-3 * call(x).float().sum(), 5, 0.05, "distillation", [module[0]]))
    assert torch.equal(module[0].weight, before)


def test_a_weight_of_two_linears_is_not_scaled():
    model = tiny_model("llama")
    up = [layer.mlp.up_proj for layer in model.model.layers]
    up[1].weight = up[0].weight
    before = up[0].weight.clone()
    list(fit_(model, lambda call, step: call(**tiny_inputs("llama"))[0].square().mean(), 3, 0.05, "distillation", [*up, up[2]]))
    assert torch.equal(up[0].weight, before)
    assert not torch.equal(up[2].weight, tiny_model("llama").model.layers[2].mlp.up_proj.weight)


@pytest.mark.parametrize(
    "settings", [{"grid": "uniform"}, {"grid": "learned"}, {"grid": "nf4", "scale_bits": None, "group_size": None}, {"scale_bits": None}],
    ids=["uniform", "learned", "row", "groups"],
)  # fmt: skip
def test_codebooks_are_distilled_with_their_codes_in_place(settings, tmp_path):
    teacher = tiny_model("llama")
    model = copy.deepcopy(teacher)
    stage = {"method": "codebook", "rounding": "nearest", **settings}
    hf_compact.compress(model, {"stages": [stage]}, calibration=from_batches([tiny_inputs("llama")]))
    module = model.model.layers[1].mlp.up_proj
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(module.scaled_forward(x), module(x), rtol=1e-4, atol=1e-5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs = tiny_inputs("llama")
    losses = distill_(model, teacher, [inputs], DistillationConfig(epochs=30, learning_rate=0.01))
    with torch.no_grad():
        assert divergence(model(**inputs)[0], teacher(**inputs)[0]) < 0.95 * losses[0]
    moved = {name.rpartition(".")[2] for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    scale = "scale" if settings.get("scale_bits", 5) is None else "row_scale"
    assert moved - {"weight"} == ({scale, "levels"} if settings.get("grid") == "learned" else {scale})
    assert torch.equal(module.weight, before["model.layers.1.mlp.up_proj.weight"])


@pytest.mark.parametrize(("bits", "trained"), [(8, "scale"), (4, "multiplier"), (3, "multiplier")])
def test_the_view_in_use_is_distilled(bits, trained):
    teacher = tiny_model("llama")
    model = copy.deepcopy(teacher)
    stage = {"method": "nested", "bits": bits, "rounding": "nearest", "shrink_steps": 2, "group_size": 16}
    hf_compact.compress(model, {"stages": [stage]}, calibration=from_batches([tiny_inputs("llama")]))
    module = model.model.layers[1].mlp.up_proj
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(module.scaled_forward(x), module(x), rtol=1e-4, atol=1e-5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def other_views() -> list[torch.Tensor]:
        found = []
        for view in (view for view in (8, 6, 4, 3) if view != bits):
            hf_compact.set_bits(model, view)
            found.append(module.to_dense())
        hf_compact.set_bits(model, bits)
        return found

    dense = other_views()
    inputs = tiny_inputs("llama")
    losses = distill_(model, teacher, [inputs], DistillationConfig(epochs=30, learning_rate=0.01))
    with torch.no_grad():
        assert divergence(model(**inputs)[0], teacher(**inputs)[0]) < 0.95 * losses[0]
    moved = {name.rpartition(".")[2] for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved - {"weight"} == {trained}
    assert torch.equal(module.weight, before["model.layers.1.mlp.up_proj.weight"])
    assert [torch.equal(new, old) for new, old in zip(other_views(), dense, strict=True)] == [bits != 8] * 3


def test_divergence_is_that_of_torch_distributions():
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(2, 3, 7, generator=generator) for _ in range(2))
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    ).mean()
    torch.testing.assert_close(divergence(q, p), expected)


def test_a_loss_that_is_not_finite_is_named(pair):
    model, teacher = copy.deepcopy(pair[0]), copy.deepcopy(pair[1])
    with torch.no_grad():
        teacher.model.norm.weight.fill_(float("inf"))
    with pytest.raises(NumericalError, match="loss of distillation step 0 is not finite"):
        distill_(model, teacher, [tiny_inputs("llama")], DistillationConfig())


@pytest.mark.parametrize(("field", "value"), [("num_sequences", 0), ("epochs", 0), ("batch_size", 0), ("learning_rate", 0.0)])
def test_bad_settings_are_named(field, value):
    with pytest.raises(ConfigError, match=rf"distillation\.{field} must be"):
        Recipe.from_dict({"stages": [STAGE], "distillation": {field: value}})


def test_a_folder_is_distilled_and_says_so(dense_folder, tmp_path):
    recipe = {
        "stages": [STAGE], "calibration": {"num_sequences": 4, "sequence_length": 32},
        "distillation": {"num_sequences": 8, "epochs": 2},
    }  # fmt: skip
    report = hf_compact.compress(dense_folder, recipe, output=tmp_path / "small")
    assert report.is_verified
    assert report.distillation["steps"] == 4
    assert json.loads((tmp_path / "small" / "compression_report.json").read_text())["distillation"] == report.distillation
    assert not (tmp_path / "small" / "journal.jsonl").exists()
    plain = hf_compact.compress(dense_folder, {**recipe, "distillation": None}, output=tmp_path / "plain")
    assert plain.distillation is None
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("small", "plain"))
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(one.get_submodule(name).codes, other.get_submodule(name).codes)
    assert not torch.equal(one.get_submodule(name).row_scale, other.get_submodule(name).row_scale)


def test_units_written_twice_count_only_together(tmp_path):
    tensors = [{"a": torch.zeros(2)}, {"b": torch.ones(2)}]
    record = {"modules": {}, "layers": [], "notes": []}
    journal = Journal(tmp_path / "out", {"recipe": 1}, num_units=2)
    for number, part in enumerate(tensors):
        journal.append(f"unit {number}", part, record)
    assert not journal.is_replaced
    journal.replace(0, {"a": torch.ones(2)}, {"distillation": None})
    assert not journal.is_replaced
    del journal
    assert Journal(tmp_path / "out", {"recipe": 1}, num_units=2).entries == []


def test_units_written_twice_are_kept(tmp_path):
    record = {"modules": {}, "layers": [], "notes": []}
    journal = Journal(tmp_path / "out", {"recipe": 1}, num_units=1)
    journal.append("unit", {"a": torch.zeros(2)}, record)
    journal.replace(0, {"a": torch.ones(2)}, {"distillation": None})
    entries = journal.entries
    del journal
    again = Journal(tmp_path / "out", {"recipe": 1}, num_units=1)
    assert again.is_replaced
    assert again.entries == entries


@pytest.mark.parametrize("family", ["bert", "vit", "t5", "gpt2"])
def test_models_with_other_outputs_are_distilled(family):
    inputs = tiny_inputs(family)
    if family == "bert":
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][:, -5:] = 0
    teacher = tiny_model(family)
    model = copy.deepcopy(teacher)
    hf_compact.compress(model, {"stages": [STAGE]}, calibration=from_batches([inputs]))
    losses = distill_(model, teacher, [inputs], DistillationConfig(epochs=30, learning_rate=0.01))
    assert losses[-1] < 0.95 * losses[0]


def test_padding_is_not_distilled():
    losses = []
    for filler in (5, 9):
        inputs = tiny_inputs("bert")
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][:, -5:] = 0
        inputs["input_ids"][:, -5:] = filler
        teacher = tiny_model("bert")
        model = copy.deepcopy(teacher)
        hf_compact.compress(model, {"stages": [STAGE]}, calibration=from_batches([tiny_inputs("bert")]))
        losses += distill_(model, teacher, [inputs], DistillationConfig())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_as_many_classes_as_tokens_are_classes():
    inputs = tiny_inputs("bert")
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][:, -5:] = 0
    settings = FAMILIES["bert"][2] | {"num_labels": inputs["input_ids"].shape[1]}
    teacher = BertForSequenceClassification(BertConfig(**settings)).eval()
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        model.classifier.weight.mul_(-3)
        expected = divergence(model(**inputs).logits, teacher(**inputs).logits).item()
    assert distill_(model, teacher, [inputs], DistillationConfig())[0] == pytest.approx(expected)


def test_a_journal_without_units_does_not_block_another_recipe(tmp_path):
    Journal(tmp_path / "out", {"recipe": 1}, num_units=2)
    assert Journal(tmp_path / "out", {"recipe": 2}, num_units=2).entries == []
    Journal(tmp_path / "out", {"recipe": 2}, num_units=2).append(
        "unit", {"a": torch.zeros(1)}, {"modules": {}, "layers": [], "notes": []}
    )
    with pytest.raises(hf_compact.errors.OutputError, match="belongs to a run with another recipe"):
        Journal(tmp_path / "out", {"recipe": 3}, num_units=2)
