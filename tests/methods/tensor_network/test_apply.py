"""Budgets, formats, compositions and round trips of decomposed models."""

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
from hf_compact.api import inspect_folder, plan
from hf_compact.arch import describe
from hf_compact.calibration import from_batches
from hf_compact.errors import ConfigError, FormatError, NothingMatched, NumericalError, UnsupportedModel
from hf_compact.functional.gram import output_energy
from hf_compact.methods.tensor_network import TensorNetworkConfig, TensorTrainLinear, allocation
from hf_compact.methods.tensor_network.allocation import Share, prepare
from hf_compact.methods.tensor_network.apply import compress_linear
from tests.conftest import tiny_inputs, tiny_model
from tests.interrupted import ends_with_the_same_bytes

UNIFORM = {"method": "tensor_network", "allocation": "uniform", "keep_ratio": 0.6, "rank_multiple": 1}
CODEBOOK = {"method": "codebook", "bits": 4, "group_size": 16, "refit_rounds": 0, "shrink_steps": 2}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(size: int) -> torch.Tensor:
    x = normal(512, size, seed=1) @ normal(size, size, seed=2)
    return (x.T @ x).double()


def linear_of(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    return linear


def batches(family: str = "llama") -> list[dict[str, torch.Tensor]]:
    return [tiny_inputs(family, seed=seed) for seed in (1, 2)]


def compressed(family: str, *stages: dict):
    model = tiny_model(family)
    report = hf_compact.compress(model, {"stages": list(stages)}, calibration=from_batches(batches(family)))
    return model, report


def lost(module, weight, gram) -> float:
    return output_energy(weight - module.to_dense(), gram)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"keep_ratio": 0.0}, r"keep_ratio must be in \(0, 1\], got 0.0"),
        ({"protected_ratio": 2.0}, "protected_ratio must be in"),
        ({"damp": 2.0}, r"damp must be in \[0, 1\]"),
        ({"num_cores": 1}, r"num_cores must be in \[2, 6\], got 1"),
        ({"rank_multiple": 0}, "rank_multiple must be at least 1"),
        ({"format": "cp"}, "format must be one of low_rank, tensor_train, auto, got cp"),
        ({"allocation": "profile"}, "profile belongs to allocation profile"),
        ({"profile": "x.json"}, "profile belongs to allocation profile"),
    ],
    ids=str,
)
def test_bad_settings_name_themselves(settings, match):
    with pytest.raises(ConfigError, match=match):
        TensorNetworkConfig(**settings)


@pytest.mark.parametrize("is_pivoted", [False, True], ids=["plain", "pivoted"])
@pytest.mark.parametrize("keep_ratio", [0.3, 0.6, 0.9])
def test_a_linear_stays_within_its_share(keep_ratio, is_pivoted):
    weight = normal(48, 32)
    config = TensorNetworkConfig(keep_ratio=keep_ratio, is_pivoted=is_pivoted, rank_multiple=1)
    module = compress_linear(linear_of(weight), correlated(32), config)
    step = 48 + 32 - (2 * module.ranks[0] if is_pivoted else 0)
    assert keep_ratio * weight.numel() - step <= module.num_values <= keep_ratio * weight.numel()


def test_inputs_are_unchanged_and_a_full_share_stays_dense():
    linear, gram = linear_of(normal(48, 32)), correlated(32)
    weight, moments = linear.weight.clone(), gram.clone()
    compress_linear(linear, gram, TensorNetworkConfig(keep_ratio=0.5, format="auto"))
    assert torch.equal(linear.weight, weight)
    assert torch.equal(gram, moments)
    assert compress_linear(linear, gram, TensorNetworkConfig(keep_ratio=0.5), guide=Share(48 * 32, None)) is linear


def test_knowing_the_inputs_and_the_outputs_pays():
    weight, gram, outputs = normal(48, 32), correlated(32), correlated(48).float()
    config = {"keep_ratio": 0.5, "is_pivoted": False}
    plain = compress_linear(linear_of(weight), gram, TensorNetworkConfig(solver="svd", **config))
    whitened = compress_linear(linear_of(weight), gram, TensorNetworkConfig(damp=0.0, **config))
    assert lost(whitened, weight, gram) < 0.7 * lost(plain, weight, gram)
    both = compress_linear(linear_of(weight), gram, TensorNetworkConfig(damp=0.0, **config), guide=Share(768, outputs))
    left = torch.linalg.cholesky(outputs.double()).float().T
    assert lost_in(both, weight, gram, left) < 0.9 * lost_in(whitened, weight, gram, left)


def lost_in(module, weight, gram, left) -> float:
    return output_energy(left @ (weight - module.to_dense()), gram)


@pytest.mark.parametrize("num_cores", [2, 3])
def test_auto_is_never_worse_than_low_rank(num_cores):
    gram = correlated(32)
    kronecker = torch.kron(normal(8, 4), normal(6, 8, seed=3)) + 0.01 * normal(48, 32, seed=4)
    for weight in (normal(48, 32), kronecker):
        config = {"keep_ratio": 0.3, "num_cores": num_cores, "rank_multiple": 1}
        best = compress_linear(linear_of(weight), gram, TensorNetworkConfig(format="auto", **config))
        low = compress_linear(linear_of(weight), gram, TensorNetworkConfig(**config))
        assert lost(best, weight, gram) <= lost(low, weight, gram) * (1 + 1e-5)
    if num_cores == 2:
        assert not best.is_low_rank, "a sum of Kronecker products is found"


def test_a_prime_side_falls_back_to_low_rank():
    config = TensorNetworkConfig(format="tensor_train", keep_ratio=0.5)
    assert compress_linear(linear_of(normal(47, 32)), None, config).is_low_rank
    assert compress_linear(linear_of(normal(47, 32)), None, config, solve=False).is_low_rank


def test_a_gram_matrix_with_a_hole_is_refused():
    with pytest.raises(NumericalError, match="not finite"):
        compress_linear(linear_of(normal(8, 4)), torch.full((4, 4), float("nan")), TensorNetworkConfig(keep_ratio=0.5))


# The budget of the model.


@pytest.mark.parametrize("allocation", ["uniform", "fisher"])
def test_the_model_lands_on_its_budget(allocation):
    settings = {"hidden_size": 64, "intermediate_size": 160}
    model = tiny_model("llama", **settings)
    stage = UNIFORM | {"allocation": allocation}
    hf_compact.compress(model, {"stages": [stage]}, calibration=from_batches(batches()))
    dense = tiny_model("llama", **settings)
    names = [name for name, module in dense.named_modules() if isinstance(module, nn.Linear) and "layers" in name]
    kept = sum(m.num_values if isinstance(m, TensorTrainLinear) else m.weight.numel() for m in map(model.get_submodule, names))
    total = sum(dense.get_submodule(name).weight.numel() for name in names)
    assert kept / total == pytest.approx(0.6, abs=0.02)
    assert kept / total <= 0.6


def test_protected_linears_keep_their_share_and_globs_must_match():
    glob = "model.layers.0.*"
    model, _ = compressed("llama", UNIFORM | {"allocation": "fisher", "keep_ratio": 0.5, "protected": [glob]})
    for name, module in model.named_modules():
        if isinstance(module, TensorTrainLinear) and name.startswith("model.layers.0."):
            assert module.num_values >= 0.8 * module.in_features * module.out_features
    with pytest.raises(NothingMatched, match=r"protected glob 'h\.\*' matches none"):
        compressed("llama", UNIFORM | {"protected": ["h.*"]})


@pytest.mark.parametrize("allocation", ["uniform", "fisher"])
def test_the_first_and_the_last_block_are_protected_by_number(allocation):
    model, _ = compressed("llama", UNIFORM | {"allocation": allocation, "keep_ratio": 0.6, "protected_blocks": [0, -1]})
    values = [0] * 3
    for name, module in model.named_modules():
        if isinstance(module, TensorTrainLinear) and name.startswith(("model.layers.0.", "model.layers.2.")):
            assert module.num_values >= 0.75 * module.in_features * module.out_features  # of 0.8, ranks rounded down
        if isinstance(module, TensorTrainLinear):
            values[int(name.split(".")[2])] += module.num_values
    assert values[1] < min(values[0], values[2])
    with pytest.raises(ConfigError, match=r"protected_blocks must be in \[-3, 2\] for the blocks of model\.layers, got 3"):
        compressed("llama", UNIFORM | {"allocation": allocation, "protected_blocks": [3]})
    with pytest.raises(
        NothingMatched, match=r"protected_blocks -1: no Linear of model\.layers\.2 is among those that are selected"
    ):
        compressed("llama", UNIFORM | {"allocation": allocation, "protected_blocks": [-1], "exclude": ["*.layers.2.*"]})


def test_sensitive_linears_get_more():
    """A Linear whose outputs hardly count gives its parameters away."""
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data *= 1e-3
    hf_compact.compress(
        model, {"stages": [UNIFORM | {"allocation": "fisher", "include": ["*.mlp.*"]}]}, calibration=from_batches(batches())
    )
    ranks = {name: m.ranks[0] for name, m in model.named_modules() if isinstance(m, TensorTrainLinear)}
    assert ranks["model.layers.1.mlp.down_proj"] == min(ranks.values())


def test_a_profile_deals_the_budget_out(tmp_path):
    model = tiny_model("llama")
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in name]
    curve = {"0.25": {"divergence": 0.1}, "0.5": {"divergence": 0.01}}
    steep = {"0.25": {"divergence": 10.0}, "0.5": {"divergence": 5.0}}
    layers = {
        name: {"shape": [*model.get_submodule(name).weight.shape], "curve": steep if ".1." in name else curve} for name in names
    }
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"layers": layers}))
    config = TensorNetworkConfig(keep_ratio=0.6, allocation="profile", profile=str(path), rank_multiple=1)
    guide = prepare(model, None, names, [], config)
    shares = {name: guide.share(name, [], 1.0).num_values / model.get_submodule(name).weight.numel() for name in names}
    assert min(share for name, share in shares.items() if ".1." in name) == 1
    assert max(share for name, share in shares.items() if ".1." not in name) < 1
    first = names[0]
    for changes, match in (
        (None, "KeyError"),
        ({"shape": [1, 2]}, rf"{first} has the shape \[1, 2\] there"),
        ({"curve": {}}, f"{first} needs ratios"),
        ({"curve": {"2.0": {"divergence": 1.0}}}, f"{first} needs ratios in"),
        ({"curve": {"0.5": {"divergence": float("nan")}}}, "with finite divergences"),
    ):
        path.write_text(json.dumps({"layers": {} if changes is None else layers | {first: layers[first] | changes}}))
        with pytest.raises(ConfigError, match=f"does not fit the model: .*{match}"):
            prepare(model, None, names, [], config)


def test_gradients_are_taken_of_half_of_a_large_calibration_set(monkeypatch):
    model, totals = tiny_model("llama"), []
    batches = [tiny_inputs("llama", seed=seed) for seed in range(4)]
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in name]
    arguments = model, describe(model), names, batches, TensorNetworkConfig(keep_ratio=0.6, rank_multiple=1)
    for least in (1, 10_000):
        monkeypatch.setattr(allocation, "_FISHER_TOKENS", least)
        prepare(*arguments, lambda done, total: totals.append((done, total)))
    half = sum(batch["input_ids"].numel() for batch in batches) // 2
    assert totals == [(0, half), (half // 2, half), *((part * half // 2, 10_000) for part in range(4))]


def test_a_matrix_smaller_than_the_multiple_has_ranks_of_its_own():
    """As with the allocation `uniform`; before, it was of rank 1 or dense."""
    model, _ = compressed("llama", UNIFORM | {"allocation": "fisher", "rank_multiple": 64})
    ranks = [module.ranks[0] for module in model.modules() if isinstance(module, TensorTrainLinear)]
    assert max(ranks) > 1


def test_what_would_keep_too_much_stays_dense():
    """The same budget from fewer Linears, each of which keeps at most the share that two products are worth."""
    free = compressed("llama", UNIFORM | {"allocation": "fisher", "keep_ratio": 0.7, "rank_multiple": 1})[0]
    bound = compressed("llama", UNIFORM | {"allocation": "fisher", "keep_ratio": 0.7, "rank_multiple": 1, "dense_above": 0.5})[0]
    trains = {
        key: [module for module in model.modules() if isinstance(module, TensorTrainLinear)]
        for key, model in (("free", free), ("bound", bound))
    }
    shares = {key: [m.num_values / (m.in_features * m.out_features) for m in of] for key, of in trains.items()}
    assert max(shares["free"]) > 0.5 >= max(shares["bound"])
    assert 0 < len(shares["bound"]) < len(shares["free"])
    with pytest.raises(ConfigError, match=r"dense_above must be in \(0, 1\], got 0"):
        TensorNetworkConfig(dense_above=0)
    with pytest.raises(
        ConfigError, match=r"dense_above below 1 belongs to an allocation that chooses .*, got 0.5 and allocation uniform"
    ):
        TensorNetworkConfig(dense_above=0.5, allocation="uniform")


def test_a_budget_below_the_smallest_ranks_names_its_field():
    with pytest.raises(
        ConfigError, match=r"keep_ratio must be at least 0.\d+ with these ranks \(rank_multiple 16, dense_above 1.0\).*, got 0.3"
    ):
        compressed("llama", UNIFORM | {"allocation": "fisher", "rank_multiple": 16, "keep_ratio": 0.3})


# Round trips.


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert", "t5"])
def test_a_decomposed_model_is_saved_and_reloaded(family, tmp_path):
    model, report = compressed(family, UNIFORM)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        before, after = model(**tiny_inputs(family))[0], again(**tiny_inputs(family))[0]
        dense = again.dequantize()(**tiny_inputs(family))[0]
    assert torch.equal(before, after)
    torch.testing.assert_close(dense, after, rtol=1e-3, atol=1e-4)
    assert {layer.method for layer in report.body} <= {"tensor_network", "dense"}
    assert report.body_bits_per_weight < 32 * 0.7


COMPOSED = {
    "codebook": ([UNIFORM, CODEBOOK], "tensor_network+codebook"),
    "entropy": ([UNIFORM, {"method": "entropy", "bits": 4.0, "sensitivity": "none"}], "tensor_network+entropy"),
    "three cores": ([UNIFORM | {"format": "tensor_train", "num_cores": 3}, CODEBOOK], "tensor_network+codebook"),
}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("stages", "method"), COMPOSED.values(), ids=COMPOSED)
def test_cores_are_quantized_by_the_next_stage(family, stages, method, tmp_path):
    model, report = compressed(family, *stages)
    assert method in {layer.method for layer in report.body}
    assert report.body_bits_per_weight < 9
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(**tiny_inputs(family)).logits, again(**tiny_inputs(family)).logits)
        hidden = base(**tiny_inputs(family)).last_hidden_state
        torch.testing.assert_close(hidden, again.base_model(**tiny_inputs(family)).last_hidden_state)
        logits = again(**tiny_inputs(family)).logits
        torch.testing.assert_close(again.dequantize()(**tiny_inputs(family)).logits, logits, rtol=1e-3, atol=1e-4)
    found = inspect_folder(tmp_path)
    bits = {layer["name"]: layer["bits_per_weight"] for layer in found["layers"]}
    for layer in report.body:
        if layer.name in bits:
            assert bits[layer.name] == pytest.approx(layer.bits_per_weight)
    assert any("+" in layer["layer"] for layer in found["layers"])


def test_the_error_of_both_stages_is_reported_against_the_dense_weight():
    dense = tiny_model("llama")
    model, report = compressed("llama", UNIFORM | {"include": ["*.mlp.up_proj"]}, CODEBOOK | {"include": ["*.mlp.up_proj"]})
    for layer in report.body:
        weight, module = dense.get_submodule(layer.name).weight, model.get_submodule(layer.name)
        assert type(module.core0).__name__ == "CodebookLinear"
        assert 0 < output_energy(weight - module.to_dense()) / output_energy(weight) < 1
        assert 0 < layer.relative_error < 1
        assert layer.compressed_bytes == sum(t.nbytes for t in module.state_dict().values())


def test_a_folder_is_written_planned_and_verified(dense_folder, text_file, tmp_path):
    recipe = {
        "stages": [UNIFORM | {"is_pivoted": False}, CODEBOOK],
        "calibration": {"num_sequences": 2, "sequence_length": 32},
    }
    expected = plan(dense_folder, recipe)
    report = hf_compact.compress(dense_folder, recipe, output=tmp_path / "out", calibration=[text_file])
    assert report.is_verified
    assert {layer["method"] for layer in expected["layers"]} == {"tensor_network+codebook", "codebook"}
    assert expected["body_bits_per_weight"] == pytest.approx(report.body_bits_per_weight, rel=0.02)


def test_a_killed_run_ends_with_the_same_bytes(dense_folder, text_file, tmp_path, monkeypatch):
    recipe = {
        "stages": [UNIFORM | {"solver": "regression"}, CODEBOOK],
        "calibration": {"num_sequences": 2, "sequence_length": 32},
    }
    ends_with_the_same_bytes(dense_folder, recipe, text_file, tmp_path, monkeypatch)


def test_a_cut_block_has_no_dense_inputs():
    pruning = {"method": "pruning", "channel_sparsity": 0.25, "score": "magnitude", "compensation": "none"}
    with pytest.raises(
        ConfigError, match=r"recipe.stages\[1\] compares model.layers.0.mlp.down_proj with the dense model, from which"
    ):
        compressed("llama", pruning, UNIFORM | {"solver": "regression"})


def test_regression_needs_the_dense_inputs_and_uses_them():
    plain, _ = compressed("llama", UNIFORM | {"keep_ratio": 0.3})
    fitted, _ = compressed("llama", UNIFORM | {"keep_ratio": 0.3, "solver": "regression", "blend": 1.0})
    dense = tiny_model("llama")
    with torch.no_grad():
        target = torch.cat([dense(**batch).logits for batch in batches()])
        losses = [
            (torch.cat([m(**batch).logits for batch in batches()]) - target).square().mean().item() for m in (plain, fitted)
        ]
    assert losses[1] < losses[0]


def test_a_stage_after_a_quantizer_is_refused():
    with pytest.raises(ConfigError, match="which an earlier stage compresses"):
        compressed("llama", CODEBOOK, UNIFORM)


def test_decomposing_while_loading_is_refused(dense_folder):
    config = hf_compact.CompactConfig(stages=[UNIFORM])
    with pytest.raises(ConfigError, match="tensor_network with these settings needs calibration"):
        AutoModelForCausalLM.from_pretrained(dense_folder, quantization_config=config)


# Leaving the format.


def test_rank_is_cut_at_load_and_saved(tmp_path):
    model, _ = compressed("llama", UNIFORM | {"is_pivoted": False})
    model.save_pretrained(tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    before = {name: m.ranks[0] for name, m in loaded.named_modules() if isinstance(m, TensorTrainLinear)}
    loaded.set_rank(0.5)
    after = {name: m.ranks[0] for name, m in loaded.named_modules() if isinstance(m, TensorTrainLinear)}
    assert all(after[name] == max(1, round(0.5 * rank)) for name, rank in before.items())
    loaded.save_pretrained(tmp_path / "b")
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "b")(**tiny_inputs("llama")).logits
        assert torch.equal(again, loaded(**tiny_inputs("llama")).logits)
    with pytest.raises(ConfigError, match=r"share must be in \(0, 1\], got 1.5"):
        loaded.set_rank(1.5)
    pivoted, _ = compressed("llama", UNIFORM)
    with pytest.raises(UnsupportedModel, match="has no order of ranks"):
        pivoted.set_rank(0.5)


def test_rank_is_cut_beside_a_quantized_tied_embedding(tmp_path):
    rest = CODEBOOK | {"exclude": ["*.mlp.*"], "embedding_bits": 8}
    model, _ = compressed("llama", UNIFORM | {"is_pivoted": False, "include": ["*.mlp.*"]}, rest)
    before = model.model.layers[0].mlp.up_proj.ranks[0]
    model.set_rank(0.5)
    assert model.model.layers[0].mlp.up_proj.ranks[0] == round(before / 2)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path)(**tiny_inputs("llama")).logits
        assert torch.equal(again, model(**tiny_inputs("llama")).logits)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_exports_load_without_the_plugin(family, tmp_path):
    model, _ = compressed(family, UNIFORM)
    model.save_pretrained(tmp_path / "small")
    hf_compact.export(tmp_path / "small", tmp_path / "dense")
    hf_compact.export(tmp_path / "small", tmp_path / "plain", "low_rank")
    program = (
        "import sys, torch, transformers\n"
        "x = torch.arange(3, 27)[None]\n"
        "for folder, trust in (('dense', False), ('plain', True)):\n"
        "    m = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust).eval()\n"
        "    print(m(input_ids=x).logits.double().sum().item())\n"
        "assert 'hf_compact' not in sys.modules\n"
        "try:\n"
        "    type(m).__mro__[1].from_pretrained('plain')\n"
        "except RuntimeError as error:\n"
        "    print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *sums, refused = done.stdout.split()
    with torch.no_grad():
        expected = model(input_ids=torch.arange(3, 27)[None]).logits.double().sum().item()
    assert [float(value) for value in sums] == pytest.approx([expected] * 2, rel=1e-3)
    assert refused == "refused"


def test_exports_that_cannot_be_say_so(tmp_path):
    model, _ = compressed("llama", UNIFORM, CODEBOOK)
    model.save_pretrained(tmp_path / "small")
    with pytest.raises(UnsupportedModel, match="is not two plain Linears"):
        hf_compact.export(tmp_path / "small", tmp_path / "plain", "low_rank")
    with pytest.raises(ConfigError, match="kind must be one of"):
        hf_compact.export(tmp_path / "small", tmp_path / "plain", "coreml")
    with pytest.raises(FormatError):
        hf_compact.export(tmp_path, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_a_singular_gram_is_an_error_of_the_regression():
    gram = torch.diag(torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64))
    config = TensorNetworkConfig(solver="regression", damp=0.0, rank_multiple=1, is_pivoted=False)
    with pytest.raises(NumericalError, match=r"cannot be inverted with damp 0.0: give it a larger one"):
        compress_linear(linear_of(normal(3, 3)), gram, config, cross=gram)


@pytest.mark.parametrize("kept", [0.5, 0.7])
def test_protected_linears_take_their_share_from_the_others(kept):
    stage = {**UNIFORM, "keep_ratio": kept, "protected": ["model.layers.0.*"], "protected_ratio": 0.9}
    model, _ = compressed("llama", stage)
    values, dense = {}, {}
    for name, module in tiny_model("llama").named_modules():
        if name.startswith("model.layers") and isinstance(module, nn.Linear):
            made = model.get_submodule(name)
            dense[name] = module.weight.numel()
            values[name] = made.num_values if isinstance(made, TensorTrainLinear) else dense[name]
    assert kept - 0.05 < sum(values.values()) / sum(dense.values()) <= kept
    assert all(values[name] >= 0.9 * dense[name] for name in values if "layers.0." in name)


@pytest.mark.parametrize(("protected", "number"), [("*", 21), ("model.layers.[01].*", 0), ("*.mlp.*", 9)])
def test_a_budget_below_the_protected_is_an_error(protected, number):
    globs = ["model.layers.0.*", "model.layers.1.*"] if "[" in protected else [protected]
    number, kept = (14, 0.601) if "[" in protected else (number, 0.3)
    stage = {**UNIFORM, "keep_ratio": kept, "protected": globs, "protected_ratio": 0.9}
    message = rf"keep_ratio {kept} is less than what {number} protected Linears keep at protected_ratio 0.9, and the least ranks"
    with pytest.raises(ConfigError, match=message):
        compressed("llama", stage)


@pytest.mark.parametrize("solver", ["whitened", "svd"])
def test_what_does_nothing_gets_nothing(solver):
    """Gradients do not pass a zero matrix, so what stands before it has no metric."""
    model = tiny_model("llama")
    nn.init.zeros_(model.model.layers[1].mlp.down_proj.weight)
    stage = {"method": "tensor_network", "keep_ratio": 0.6, "rank_multiple": 1, "solver": solver}
    hf_compact.compress(model, {"stages": [stage]}, calibration=from_batches(batches()))
    ranks = [model.model.layers[1].get_submodule(f"mlp.{name}_proj").ranks[0] for name in ("gate", "up")]
    assert ranks == [1, 1]


def test_plain_svd_deals_out_ranks_by_sensitivity():
    """Linears whose outputs hardly reach the loss give theirs to the others."""
    model = tiny_model("llama")
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.model.layers[1].get_submodule(name).weight.mul_(1e-3)
    stage = {"method": "tensor_network", "solver": "svd", "rank_multiple": 1, "keep_ratio": 0.6}
    hf_compact.compress(model, {"stages": [stage]}, calibration=from_batches(batches()))
    kept = [module for layer in model.model.layers for module in (layer.mlp.gate_proj, layer.mlp.up_proj)]
    values = [module.num_values if isinstance(module, TensorTrainLinear) else module.weight.numel() for module in kept]
    assert max(values[2:4]) < 0.5 * min(values[:2] + values[4:])


@pytest.mark.parametrize("multiple", [4, 8])
def test_ranks_of_trains_are_multiples(multiple):
    config = TensorNetworkConfig(format="tensor_train", keep_ratio=0.6, rank_multiple=multiple)
    train = compress_linear(linear_of(normal(64, 64)), correlated(64), config)
    assert train.ranks[0] % multiple == 0
    assert train.num_values <= 0.6 * 64 * 64


@pytest.mark.parametrize("stage", [UNIFORM, {"method": "correction", "rank": 2}], ids=["tensor_network", "correction"])
def test_what_is_taken_apart_is_not_cut(stage):
    with pytest.raises(ConfigError, match=r"recipe.stages\[1\] cuts model.layers.0.* has compressed: cut first"):
        compressed("llama", stage, {"method": "pruning", "channel_sparsity": 0.25}, CODEBOOK)


def test_factors_with_adapters_are_healed():
    model, _ = compressed("llama", UNIFORM)
    adapted = get_peft_model(model, LoraConfig(target_modules=r".*q_proj\.core0", r=2, init_lora_weights=False)).eval()
    with torch.no_grad():
        expected = adapted(**tiny_inputs("llama")).logits
    callback = TensorNetworkCallback(schedule="heal")
    callback.prepare(adapted)
    callback.finalize(adapted)
    with torch.no_grad():
        torch.testing.assert_close(adapted.eval()(**tiny_inputs("llama")).logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("schedule", ["trp", "maestro"])
def test_matrices_with_adapters_are_not_factored(schedule):
    adapted = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(UnsupportedModel, match=r"q_proj has an adapter of PEFT"):
        TensorNetworkCallback(schedule=schedule).prepare(adapted)


@pytest.mark.parametrize("schedule", ["trp", "maestro"])
def test_frozen_matrices_stay_as_they_are(schedule):
    model = tiny_model("llama")
    model.model.layers[0].requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    callback = (
        TensorNetworkCallback(schedule=schedule, interval=1, energy=0.5)
        if schedule == "trp"
        else TensorNetworkCallback(schedule=schedule)
    )
    callback.prepare(model)
    callback.step(model, 1, 1e-3)
    callback.finalize(model)
    kinds = {name.split(".")[2] for name, module in model.named_modules() if isinstance(module, TensorTrainLinear)}
    assert kinds == {"1", "2"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if ".layers.0." in name)
    frozen = tiny_model("llama").requires_grad_(False)
    with pytest.raises(ConfigError, match=rf"training\.schedule {schedule} needs Linears that are trained, all 21 are frozen"):
        TensorNetworkCallback(schedule=schedule).prepare(frozen)
