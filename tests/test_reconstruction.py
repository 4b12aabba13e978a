"""Reconstruction of blocks: each loses less of its output, codes stay, a killed run goes on to the same bytes."""

import copy

import pytest
import torch

import hf_compact
from hf_compact.arch import describe
from hf_compact.calibration import from_batches
from hf_compact.config import Recipe
from hf_compact.errors import ConfigError, NumericalError
from hf_compact.fitting import fit_
from tests.conftest import tiny_inputs, tiny_model

FAST = {"epochs": 12, "learning_rate": 0.01}
STAGES = {
    "entropy": {"method": "entropy", "bits": 1.5, "sensitivity": "none"},
    "codebook": {"method": "codebook", "bits": 2, "grid": "learned"},
}


def distance(model, dense, inputs) -> float:
    with torch.no_grad():
        return (model(**inputs)[0] - dense(**inputs)[0]).square().mean().item()


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_every_block_gains_and_codes_stay(family, stage):
    inputs = [tiny_inputs(family, seed=seed) for seed in range(2)]
    models = {}
    for name, settings in (("plain", None), ("fitted", FAST)):
        models[name] = tiny_model(family)
        recipe = {"stages": [{**stage, "include": ["*"]}], "reconstruction": settings}
        report = hf_compact.compress(models[name], recipe, calibration=from_batches(inputs))
    losses = list(report.reconstruction.values())
    assert len(losses) == len(describe(models["fitted"]).blocks)
    assert sum(last < first for first, last in losses) > 0.6 * len(losses)
    dense = tiny_model(family)
    if family != "t5":  # whose blocks gain, though the random model's output need not
        assert distance(models["fitted"], dense, inputs[0]) < distance(models["plain"], dense, inputs[0])
    first = next(name for name, module in models["plain"].named_modules() if hasattr(module, "trained_scales"))
    one, other = (models[name].get_submodule(first) for name in ("plain", "fitted"))
    assert torch.equal(one.weight, other.weight)


@pytest.mark.parametrize(
    "stage", [{"channel_sparsity": 0.5}, {"channel_sparsity": 0.0, "num_layers": 1}], ids=["channels", "layer"]
)
def test_linears_of_a_pruned_block_are_scaled(stage):
    inputs = [tiny_inputs("llama", seed=seed) for seed in range(2)]
    pruning = {"method": "pruning", "score": "magnitude", "compensation": "none", **stage}
    models = {}
    for name, settings in (("plain", None), ("fitted", FAST)):
        models[name] = tiny_model("llama")
        recipe = {"stages": [pruning, {"method": "codebook", "bits": 4, "include": ["*q_proj"]}], "reconstruction": settings}
        hf_compact.compress(models[name], recipe, calibration=from_batches(inputs))
    ups = [[layer.mlp.up_proj.weight for layer in model.model.layers] for model in models.values()]
    assert not any(torch.equal(one, other) for one, other in zip(*ups, strict=True))
    assert [one.shape for one in ups[0]] == [other.shape for other in ups[1]]


def test_a_run_without_it_reports_none():
    report = hf_compact.compress(
        tiny_model("llama"), {"stages": [STAGES["entropy"]]}, calibration=from_batches([tiny_inputs("llama")])
    )
    assert report.reconstruction == {}


def test_a_folder_is_reconstructed_and_resumed(dense_folder, tmp_path, monkeypatch):
    recipe = {
        "stages": [STAGES["codebook"]], "calibration": {"num_sequences": 4, "sequence_length": 32, "batch_size": 2},
        "reconstruction": {"epochs": 2},
    }  # fmt: skip
    whole = hf_compact.compress(dense_folder, recipe, output=tmp_path / "whole")
    assert whole.is_verified
    assert set(whole.reconstruction) == {f"model.layers.{i}" for i in range(3)}

    class Killed(Exception):
        pass

    def kill(unit, done, total):
        if unit == "model.layers.2":
            raise Killed

    with pytest.raises(Killed):
        hf_compact.compress(dense_folder, recipe, output=tmp_path / "resumed", progress=kill)
    resumed = hf_compact.compress(dense_folder, recipe, output=tmp_path / "resumed")
    assert resumed.reconstruction == whole.reconstruction
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "resumed" / path.name).read_bytes()


def test_padding_does_not_count():
    inputs = tiny_inputs("llama")
    padded = {"input_ids": inputs["input_ids"].clone(), "attention_mask": torch.ones_like(inputs["input_ids"])}
    padded["attention_mask"][:, -8:] = 0
    found = []
    for filler in (5, 9):
        batch = copy.deepcopy(padded)
        batch["input_ids"][:, -8:] = filler
        model = tiny_model("llama")
        recipe = {"stages": [STAGES["codebook"]], "reconstruction": {"epochs": 2}}
        found.append(hf_compact.compress(model, recipe, calibration=from_batches([batch])).reconstruction)
    for block, losses in found[0].items():
        assert losses == pytest.approx(found[1][block], rel=1e-3)


@pytest.mark.parametrize(("field", "value"), [("epochs", 0), ("learning_rate", 0.0), ("learning_rate", 1.0)])
def test_bad_settings_are_named(field, value):
    with pytest.raises(ConfigError, match=rf"reconstruction\.{field} must be"):
        Recipe.from_dict({"stages": [STAGES["codebook"]], "reconstruction": {field: value}})


def test_what_is_fitted_but_not_finite_leaves_the_module_as_it_was():
    """No loss comes after the last step to tell."""
    module = torch.nn.LayerNorm(8)
    before = copy.deepcopy(module.state_dict())
    steps = fit_(module, lambda call, step: (call(torch.ones(2, 8)).sum() * 0).sqrt(), 1, 0.01, "distillation")
    with pytest.raises(NumericalError, match=r"weight is not finite after distillation: lower distillation\.learning_rate"):
        list(steps)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_a_loss_that_is_not_finite_leaves_the_module_as_it_was():
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    steps = fit_(model, lambda call, step: call(**tiny_inputs("llama"))[0].sum() * float("nan"), 2, 0.01, "reconstruction")
    with pytest.raises(NumericalError, match=r"reconstruction step 0 is not finite: lower reconstruction\.learning_rate"):
        list(steps)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
