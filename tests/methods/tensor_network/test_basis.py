"""Bases that adjacent blocks share: where they are worth it, one tensor in the file, one parameter in training."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

import hf_compact
from hf_compact import TensorNetworkCallback
from hf_compact.api import inspect_folder
from hf_compact.arch import describe
from hf_compact.calibration import from_batches
from hf_compact.checkpoint import TensorSource
from hf_compact.errors import ConfigError, FormatError, NothingMatched, UnsupportedModel
from hf_compact.methods.tensor_network import TensorNetworkConfig, TensorTrainLinear
from hf_compact.methods.tensor_network.allocation import Share, find_groups, prepare
from hf_compact.methods.tensor_network.apply import compress_linear
from tests.conftest import tiny_inputs, tiny_model
from tests.interrupted import ends_with_the_same_bytes

SHARED = {"method": "tensor_network", "keep_ratio": 0.35, "basis_group": 2, "rank_multiple": 4, "is_pivoted": False}
CODEBOOK = {"method": "codebook", "bits": 8, "group_size": None, "refit_rounds": 0, "shrink_steps": 2}


def alike(family: str = "llama"):
    """A tiny model whose blocks are nearly the same matrices of rank 8, so that a basis serves two of them."""
    model = tiny_model(family)
    first, *rest = [model.get_submodule(name) for name in describe(model).blocks]
    for name, parameter in first.named_parameters():
        if parameter.dim() == 2:
            u, values, vt = torch.linalg.svd(parameter.data, full_matrices=False)
            parameter.data = (u[:, :8] * values[:8]) @ vt[:8]
            for block in rest:
                other = block.get_parameter(name)
                other.data = parameter.data + 0.02 * other.data
    return model


def batches(family: str = "llama") -> list[dict[str, torch.Tensor]]:
    return [tiny_inputs(family, seed=seed) for seed in (1, 2)]


def compressed(*stages: dict, family: str = "llama"):
    model = alike(family)
    report = hf_compact.compress(model, {"stages": list(stages)}, calibration=from_batches(batches(family)))
    return model, report


def borrowers(model: nn.Module) -> dict[str, TensorTrainLinear]:
    return {name: module for name, module in model.named_modules() if getattr(module, "ties", None)}


@pytest.mark.parametrize("side", [0, 1], ids=["owner", "borrower"])
def test_a_protected_linear_keeps_its_share_of_a_shared_basis(side):
    """The basis counts whole for each that has it, and an unprotected neighbour's factor for none."""
    names = [f"model.layers.{side}.mlp.{name}_proj" for name in ("gate", "up")]
    stage = SHARED | {"protected": names, "protected_ratio": 0.7, "keep_ratio": 0.45}
    model, _ = compressed(stage)
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, TensorTrainLinear):
            assert module.ranks[0] * (module.in_features + module.out_features) >= 0.7 * module.in_features * module.out_features
    model, _ = compressed(stage | {"protected": []})
    found = [model.get_submodule(name) for name in names]
    assert any(
        isinstance(m, TensorTrainLinear) and m.ranks[0] * (m.in_features + m.out_features) < 0.7 * m.in_features * m.out_features
        for m in found
    )


@pytest.mark.parametrize("targets", ["all-linear", ["core0"]])
def test_adapters_go_on_factors_that_are_not_shared(targets):
    model, _ = compressed(SHARED)
    assert borrowers(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=targets, r=2, init_lora_weights=False)).eval()
    inputs = tiny_inputs("llama")
    with torch.no_grad():
        if targets == "all-linear":
            with pytest.raises(
                UnsupportedModel, match=r"core1 is that of .*core1, and an adapter on it would be merged into every"
            ):
                adapted(**inputs)
            return
        expected = adapted(**inputs).logits
        torch.testing.assert_close(adapted.merge_and_unload()(**inputs).logits, expected, rtol=0, atol=1e-4)


def test_groups_are_linears_of_one_kind_in_neighbours():
    arch = describe(tiny_model("llama"))
    groups = find_groups(arch, arch.roles, 2)
    assert ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj") in groups
    assert {arch.roles[name] for group in groups for name in group} == {"q", "k", "v", "gate", "up"}
    assert not any("layers.2" in name for group in groups for name in group), "the last of three blocks has no neighbour"
    assert {len(group) for group in find_groups(arch, arch.roles, 8)} == {3}
    with pytest.raises(NothingMatched, match="basis_group 2 finds no two selected Linears"):
        find_groups(arch, [name for name in arch.roles if "down" in name], 2)


def test_settings_that_do_not_go_together_name_themselves():
    with pytest.raises(ConfigError, match="basis_group must be at least 1, got 0"):
        TensorNetworkConfig(basis_group=0)
    with pytest.raises(ConfigError, match="basis_group above 1 belongs to allocation fisher"):
        TensorNetworkConfig(basis_group=2, allocation="uniform")


def test_unlike_blocks_share_nothing():
    """Their rows span different spaces, so a common basis costs more than one for each."""
    model = tiny_model("llama")
    arch = describe(model)
    config = TensorNetworkConfig(keep_ratio=0.6, basis_group=2, rank_multiple=4)
    names = [name for name in arch.roles if arch.roles[name] in ("gate", "up")]
    for name in names:
        weight, half = model.get_submodule(name).weight.data, 16 * ("layers.1" in name)
        weight[:, half : half + 16] *= 1e-3
    assert prepare(model, arch, names, batches(), config).bases == {}


def test_a_shared_rank_is_one_that_every_member_can_have():
    """Together, the values of four blocks have more directions than the rows of one."""
    model = tiny_model("llama", num_hidden_layers=4, num_key_value_heads=1)
    space = torch.randn(12, 32, generator=torch.Generator().manual_seed(3))
    for number, block in enumerate(model.model.layers):
        mixed = torch.randn(8, 12, generator=torch.Generator().manual_seed(number))
        block.self_attn.v_proj.weight.data = mixed @ space / 12
    for kept in (0.9, 0.7, 0.5):
        stage = {**SHARED, "basis_group": 4, "rank_multiple": 1, "keep_ratio": kept}
        made = copy.deepcopy(model)
        hf_compact.compress(made, {"stages": [stage]}, calibration=from_batches(batches()))
        assert all(module.ranks[0] <= module.out_features for module in made.modules() if isinstance(module, TensorTrainLinear))


def test_only_the_left_factor_is_solved_for():
    weight, gram = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)), torch.diag(torch.arange(1.0, 9)).double()
    linear = nn.Linear(8, 12, bias=False)
    linear.weight.data = weight
    share = Share(0, None, torch.eye(8)[:3], {"core1": "other.core1"})
    module = compress_linear(linear, gram, TensorNetworkConfig(), guide=share)
    torch.testing.assert_close(module.core0.weight.data, weight[:, :3], rtol=1e-5, atol=1e-6)
    assert torch.equal(module.core1.weight, share.basis)
    assert module.spec()["ties"] == {"core1": "other.core1"}
    with pytest.raises(ValueError, match="ties must name cores, core0, core1, got core7"):
        TensorTrainLinear([12, 1], [1, 8], [3], ties={"core7": "other.core1"})


@pytest.mark.parametrize(("family", "stages"), [("llama", [SHARED]), ("gpt2", [SHARED | {"keep_ratio": 0.325}]), ("llama", [SHARED, CODEBOOK])],
                         ids=["llama", "gpt2", "llama, quantized"])  # fmt: skip
def test_a_basis_is_stored_counted_and_loaded_once(family, stages, tmp_path):
    model, report = compressed(*stages, family=family)
    found = borrowers(model)
    assert found
    model.save_pretrained(tmp_path)
    stored = TensorSource.in_folder(tmp_path)
    for name, module in found.items():
        assert not any(key.startswith(f"{name}.core1.") for key in stored.file_of), "the basis is the neighbour's"
        assert any(key.startswith(f"{module.ties['core1']}.") for key in stored.file_of)
    sizes = stored.headers()
    for layer in report.body:
        assert layer.compressed_bytes == sum(
            size for key, (*_, size) in sizes.items() if key.startswith(f"{layer.name}.") and not key.endswith(".bias")
        )
    again = type(model).from_pretrained(tmp_path)
    for name, module in borrowers(again).items():
        mine, theirs = again.get_submodule(name).core1, again.get_submodule(module.ties["core1"])
        assert mine.weight is theirs.weight
    bits = {layer["name"]: layer["bits_per_weight"] for layer in inspect_folder(tmp_path)["layers"]}
    for layer in report.body:
        if layer.name in bits:
            assert bits[layer.name] == pytest.approx(layer.bits_per_weight)
    with torch.no_grad():
        logits = model(**tiny_inputs(family)).logits
        assert torch.equal(again(**tiny_inputs(family)).logits, logits)
        base = AutoModel.from_pretrained(tmp_path)
        torch.testing.assert_close(base(**tiny_inputs(family))[0], again.base_model(**tiny_inputs(family))[0])
        torch.testing.assert_close(again.dequantize()(**tiny_inputs(family)).logits, logits, rtol=1e-3, atol=1e-4)


def test_a_fresh_process_reads_a_killed_and_resumed_run(tokenizer, text_file, tmp_path, monkeypatch):
    alike().save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    recipe = {"stages": [SHARED, CODEBOOK], "calibration": {"num_sequences": 2, "sequence_length": 32}}
    report = ends_with_the_same_bytes(tmp_path / "dense", recipe, text_file, tmp_path, monkeypatch)
    assert report.is_verified, "in a process of its own"
    table = json.loads((tmp_path / "whole" / "config.json").read_text())["quantization_config"]["modules"]
    assert any("ties" in spec for spec in table.values())


def test_healing_trains_one_parameter_for_both_blocks(tmp_path):
    model, _ = compressed(SHARED)
    callback = TensorNetworkCallback(schedule="heal")
    callback.prepare(model)
    name, borrower = next(iter(borrowers(model).items()))
    before = borrower.core1.weight.detach().clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = tiny_inputs("llama")["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    callback.finalize(model)
    owner = model.get_submodule(borrower.ties["core1"])
    assert owner.weight is borrower.core1.weight
    assert not torch.equal(owner.weight, before)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    with pytest.raises(ConfigError, match=f"maestro cuts every train alone, {name} shares its basis"):
        TensorNetworkCallback(schedule="maestro").prepare(model)


def test_a_cut_of_the_rank_keeps_the_tie(tmp_path):
    model, _ = compressed(SHARED)
    model.set_rank(0.5)
    for module in borrowers(model).values():
        assert module.core1.weight is model.get_submodule(module.ties["core1"]).weight
        assert len(module.core1.weight) == module.ranks[0]
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path)(**tiny_inputs("llama")).logits
        assert torch.equal(again, model(**tiny_inputs("llama")).logits)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"core1": "model.layers.0.nothing.core1"}, "does not fit the model"),
        ({"core1": "model.layers.0.mlp.down_proj.core0"}, "does not fit the model: core1 is"),
        ({"core7": "model.layers.0.mlp.up_proj.core1"}, "ties must name cores"),
        ("core1", "does not fit the model"),
        (None, "is missing from the files"),
    ],
    ids=["no module", "another shape", "no core", "no mapping", "left out"],
)
def test_a_damaged_tie_is_refused(change, match, tmp_path):
    model, _ = compressed(SHARED)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    table = config["quantization_config"]["modules"]
    spec = table[next(name for name, spec in table.items() if "ties" in spec)]
    if change is None:
        del spec["ties"]
    else:
        spec["ties"] = change
    path.write_text(json.dumps(config))
    with pytest.raises(FormatError, match=match):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_low_rank_export_writes_the_basis_for_every_layer(tmp_path):
    model, _ = compressed(SHARED)
    model.save_pretrained(tmp_path / "small")
    hf_compact.export(tmp_path / "small", tmp_path / "plain", "low_rank")
    program = (
        "import torch, transformers\n"
        "m = transformers.AutoModelForCausalLM.from_pretrained('plain', trust_remote_code=True).eval()\n"
        "print(m(input_ids=torch.arange(3, 27)[None]).logits.double().sum().item())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = model(input_ids=torch.arange(3, 27)[None]).logits.double().sum().item()
    assert float(done.stdout) == pytest.approx(expected, rel=1e-3)
