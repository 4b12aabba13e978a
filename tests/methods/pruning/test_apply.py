"""One-shot pruning: laws of the solver, ordinary folders, other widths through the plugin."""

import json
import subprocess
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_compact
from hf_compact import PruningConfig, api
from hf_compact.arch import describe
from hf_compact.calibration import from_batches
from hf_compact.errors import ConfigError, NothingMatched, UnsupportedModel
from hf_compact.functional.gram import output_energy
from hf_compact.methods.pruning import functional
from hf_compact.methods.pruning.apply import shorten
from hf_compact.methods.pruning.config import SCORES
from hf_compact.methods.pruning.functional import lowest, refit_columns, select_by_residual, unit_energy
from tests.conftest import FAMILIES, tiny_inputs, tiny_model

STOCK = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_compact":
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(model(input_ids=torch.arange(3, 15)[None]).logits.double().sum().item())
"""


def batches(family: str = "llama"):
    return from_batches([tiny_inputs(family, seed=seed) for seed in (1, 2, 3)])


def prune(model, family: str = "llama", **settings):
    stage = {"method": "pruning", "channel_sparsity": 0.4} | settings
    return hf_compact.compress(model, {"stages": [stage]}, calibration=batches(family))


def problem(out: int = 6, size: int = 12, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    x = torch.randn(200, size, generator=generator, dtype=torch.float64) @ mix
    return torch.randn(out, size, generator=generator, dtype=torch.float64), x.T @ x


def test_the_refit_loses_the_schur_complement():
    weight, gram = problem()
    kept, gone = torch.tensor([0, 2, 3, 5, 6, 8, 11]), torch.tensor([1, 4, 7, 9, 10])
    new = refit_columns(weight, gram, kept, damp=0.0)
    lost = weight.clone()
    lost[:, kept] -= new
    inner = gram[kept][:, kept]
    schur = gram[gone][:, gone] - gram[gone][:, kept] @ torch.linalg.solve(inner, gram[kept][:, gone])
    expected = torch.einsum("op,pq,oq->", weight[:, gone], schur, weight[:, gone])
    torch.testing.assert_close(torch.einsum("oi,ij,oj->", lost, gram, lost), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("stacked", [1, 4, 64])
def test_units_are_removed_by_their_residual(width, stacked, monkeypatch):
    monkeypatch.setattr(functional, "_STACKED", stacked)
    weight, gram = problem()
    index = torch.arange(12).view(-1, width)

    def residual(units) -> float:
        kept = torch.tensor([i for i in range(12) if not torch.isin(index[torch.tensor(units)], i).any()])
        lost = weight.clone()
        lost[:, kept] -= refit_columns(weight, gram, kept, damp=0.0)
        return output_energy(lost, gram)

    gone: list[int] = []
    order, found = select_by_residual(weight, gram, index, len(index) - 1, len(index), damp=0.0)
    assert [given.equal(problem()[number]) for number, given in enumerate((weight, gram))] == [True, True]
    for unit in order.tolist():
        costs = {other: residual([*gone, other]) for other in range(len(index)) if other not in gone}
        assert unit == min(costs, key=costs.get)
        gone.append(unit)
    assert found.sum().item() == pytest.approx(residual(gone), rel=1e-5)  # of a ridge of 1e-9


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("kind", ["few", "twice"])
def test_units_are_removed_where_inputs_depend_on_each_other(kind, width, monkeypatch):
    """Fewer tokens than inputs, or every input twice: what can be made up for costs nothing."""
    monkeypatch.setattr(functional, "_STACKED", 4)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5 if kind == "few" else 40, 12 if kind == "few" else 6, generator=generator, dtype=torch.float64)
    inputs = rows if kind == "few" else rows.repeat(1, 2)
    weight, gram = torch.randn(7, 12, generator=generator), inputs.T @ inputs
    index = torch.arange(12).view(-1, width)
    order, costs = select_by_residual(weight, gram, index, 10 // width, len(index), damp=0.0)
    assert len(set(order.tolist())) == 10 // width
    free = (7 if kind == "few" else 6) // width
    assert costs[:free].max() < 1e-6 * output_energy(weight.double(), gram)
    kept = torch.tensor([unit for unit in range(len(index)) if unit not in order.tolist()])
    lost = weight.clone()
    lost[:, index[kept].flatten()] -= refit_columns(weight, gram, index[kept].flatten(), damp=0.0)
    assert costs.sum().item() == pytest.approx(output_energy(lost, gram), rel=1e-4)


@pytest.mark.parametrize("gram", [torch.full((4, 4), torch.nan), torch.diag(torch.tensor([9.0, -1.0, -1.0, 1.0]))])
def test_what_is_no_gram_matrix_is_refused(gram):
    with pytest.raises(ValueError, match="not positive definite: raise damp, or calibrate on more tokens"):
        select_by_residual(torch.ones(2, 4), gram, torch.arange(4)[:, None], 3, 4, damp=0.0)


def test_without_damping_the_size_of_the_inputs_does_not_matter():
    weight, gram = problem()
    index = torch.arange(12)[:, None]
    found = [select_by_residual(weight, gram * scale, index, 5, 12, damp=0.0)[0].tolist() for scale in (1.0, 1e-8)]
    assert found[0] == found[1]
    assert len(set(select_by_residual(weight, torch.ones(12, 12), index, 5, 12, damp=0.0)[0].tolist())) == 5


def test_pools_lose_equally_many():
    weight, gram = problem()
    removed, _ = select_by_residual(weight, gram, torch.arange(12)[:, None], 6, 4, damp=0.01)
    assert torch.bincount(removed // 4).tolist() == [2, 2, 2]
    assert torch.bincount(lowest(torch.arange(12.0), 6, 4) // 4).tolist() == [2, 2, 2]


def test_unit_energy_is_that_of_the_unit_alone():
    weight, gram = problem()
    index = torch.arange(12).view(-1, 3)
    for unit, energy in zip(index, unit_energy(weight, gram, index), strict=True):
        alone = torch.zeros_like(weight)
        alone[:, unit] = weight[:, unit]
        assert output_energy(alone, gram) == pytest.approx(float(energy), rel=1e-5)


@pytest.mark.parametrize("score", SCORES)
def test_every_score_makes_an_ordinary_model(score):
    model = tiny_model("llama")
    report = prune(model, score=score, head_sparsity=0.5, channel_multiple=8)
    assert (model.config.intermediate_size, model.config.num_key_value_heads, model.config.num_attention_heads) == (48, 1, 2)
    assert not hasattr(model.config, "quantization_config")
    assert report.is_plain
    assert {layer.role for layer in report.layers} == {"q", "k", "v", "o", "gate", "up", "down"}
    assert all(0 <= layer.relative_error < 1 for layer in report.layers)


def test_a_third_of_the_heads_goes():
    """Nine heads on three, as SmolLM2 has: what is left does not divide by what there was."""
    model = tiny_model("llama", hidden_size=36, num_attention_heads=9, num_key_value_heads=3)
    prune(model, head_sparsity=0.34)
    assert (model.config.num_key_value_heads, model.config.num_attention_heads) == (2, 6)
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (24, 36)
    assert model(**tiny_inputs("llama")).logits.isfinite().all()


def test_seven_heads_of_a_llama_need_this_library(tmp_path):
    """Its config wants heads that divide the hidden size, and refuses others when it is written."""
    model = tiny_model("llama", num_attention_heads=8, num_key_value_heads=8)
    report = prune(model, head_sparsity=0.2)
    assert not report.is_plain
    assert any(
        "12 Linears" in note and "the config of llama cannot say: the folder loads with hf_compact only" in note
        for note in report.notes
    )
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.model.layers[0].self_attn.q_proj.weight.shape == (28, 32)
    with torch.no_grad():
        assert torch.equal(loaded(**tiny_inputs("llama")).logits, model(**tiny_inputs("llama")).logits)


def test_the_refit_loses_least():
    errors = {}
    for score, compensation in (("random", "none"), ("wanda_sp", "none"), ("wanda_sp", "refit"), ("obs", "refit")):
        report = prune(tiny_model("llama"), score=score, compensation=compensation, include=["model.layers.0.*"])
        errors[score, compensation] = max(layer.relative_error for layer in report.layers)
    assert list(errors.values()) == sorted(errors.values(), reverse=True)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("bert_mlm", "llama_untied")])
def test_every_family_is_pruned_and_saved(family, tmp_path):
    model = tiny_model(family)
    report = prune(model, family)
    assert report.is_plain
    with torch.no_grad():
        before = model(**tiny_inputs(family))[0]
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**tiny_inputs(family))[0], before)


def test_the_folder_loads_where_the_library_is_not(dense_folder, tmp_path):
    output = tmp_path / "pruned"
    report = hf_compact.compress(
        dense_folder, {"stages": [{"method": "pruning", "head_sparsity": 0.5}], "calibration": {"num_sequences": 4, "sequence_length": 64}},
        output=output,
    )  # fmt: skip
    assert report.is_verified
    assert "no other library is needed" in (output / "README.md").read_text()
    done = subprocess.run([sys.executable, "-c", STOCK, str(output)], capture_output=True, text=True, check=True)
    model = AutoModelForCausalLM.from_pretrained(output)
    expected = model(input_ids=torch.arange(3, 15)[None]).logits.double().sum().item()
    assert float(done.stdout.splitlines()[-1]) == pytest.approx(expected, rel=1e-6)


def test_other_widths_need_the_plugin(tmp_path):
    for family, settings in (("llama", {}), ("gpt2", {"head_sparsity": 0.5})):
        model = tiny_model(family)
        block = describe(model).blocks[1]
        prune(model, family, include=[f"{block}.*"], **settings)
        with torch.no_grad():
            before = model(**tiny_inputs(family))[0]
        folder = tmp_path / family
        model.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            assert torch.equal(again(**tiny_inputs(family))[0], before)
        ids = tiny_inputs(family, 1, 8)["input_ids"]
        plain = again.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False, eos_token_id=None)
        for cache in ({}, {"cache_implementation": "static"}):
            assert torch.equal(again.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, **cache), plain)
        with pytest.raises(UnsupportedModel, match="has no dense form"):
            again.dequantize()
        config = json.loads((folder / "config.json").read_text())
        del config["quantization_config"]
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
            AutoModelForCausalLM.from_pretrained(folder)


def test_a_later_stage_compresses_what_is_left(tmp_path):
    model = tiny_model("llama")
    stages = [
        {"method": "pruning", "channel_sparsity": 0.4},
        {"method": "codebook", "bits": 4, "group_size": 16, "refit_rounds": 1},
    ]
    hf_compact.compress(model, {"stages": stages}, calibration=batches())
    assert model.config.intermediate_size == 48
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**tiny_inputs("llama"))[0], model(**tiny_inputs("llama"))[0])


def test_flap_gives_llama_a_bias_and_others_an_error(tmp_path):
    model = tiny_model("llama")
    prune(model, score="flap", compensation="bias", head_sparsity=0.5)
    assert model.config.mlp_bias
    assert model.config.attention_bias
    assert model.model.layers[0].mlp.down_proj.bias.abs().max() > 0
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**tiny_inputs("llama"))[0], model(**tiny_inputs("llama"))[0])
    with pytest.raises(UnsupportedModel, match=r"can have none: set pruning\.compensation to refit"):
        prune(tiny_model("qwen2"), compensation="bias")
    message = r"pruning\.include must hold all blocks with compensation bias, .* got none of model\.layers\.0\.mlp\.down_proj"
    with pytest.raises(ConfigError, match=message):
        prune(tiny_model("llama"), compensation="bias", include=["model.layers.1.*"])


def test_the_layers_that_do_least_go_first():
    model = tiny_model("llama")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        model.get_submodule(f"model.layers.1.{name}").weight.data *= 1e-4
    report = prune(model, channel_sparsity=0.0, num_layers=1)
    assert model.config.num_hidden_layers == len(model.model.layers) == 2
    assert "pruning has removed 1 of 3 blocks: model.layers.1" in report.notes
    assert report.is_plain
    with pytest.raises(UnsupportedModel, match="num_layers must be at most 2 for this llama model, got 3"):
        prune(tiny_model("llama"), num_layers=3)


def test_padding_says_nothing_of_layers():
    ids = tiny_inputs("llama", 4, 4, 6)["input_ids"]
    dropped = []
    for number in (0, 44):
        pad = partial(torch.nn.functional.pad, pad=(0, number))
        model = tiny_model("llama_untied", num_hidden_layers=5)
        inputs = {"input_ids": pad(ids, value=2), "attention_mask": pad(torch.ones_like(ids))}
        dropped.append(shorten(model, describe(model), [inputs], PruningConfig(num_layers=1, channel_sparsity=0.0)))
    assert dropped[0] == dropped[1]


@pytest.mark.parametrize("compensation", ["none", "bias", "refit"])
def test_energies_are_not_spreads(compensation):
    """What wanda_sp and flap choose does not depend on who takes the mean over."""
    chosen = {}
    for score in ("wanda_sp", "flap"):
        for way in ("none", compensation):
            model = tiny_model("gpt2")
            for block in model.transformer.h:
                torch.nn.init.normal_(block.mlp.c_fc.bias, std=3)
            before = model.transformer.h[0].mlp.c_fc.weight.clone()
            prune(model, "gpt2", score=score, compensation=way, channel_sparsity=0.25, channel_multiple=1)
            columns = model.transformer.h[0].mlp.c_fc.weight.T
            chosen[score, way] = [(column == before.T).all(1).nonzero().item() for column in columns]
        assert chosen[score, "none"] == chosen[score, compensation]
    assert chosen["wanda_sp", "none"] != chosen["flap", "none"]


def test_inspection_counts_the_dense_parameters_as_the_report_does(dense_folder, tmp_path, text_file):
    stages = [
        {"method": "pruning", "channel_sparsity": 0.4, "score": "magnitude", "compensation": "none"},
        {"method": "codebook"},
    ]
    recipe = {"stages": stages, "calibration": {"num_sequences": 2, "sequence_length": 32}}
    report = hf_compact.compress(dense_folder, recipe, output=tmp_path / "out", calibration=[text_file])
    found = api.inspect_folder(tmp_path / "out")
    assert found["num_parameters"] == report.num_parameters == AutoModelForCausalLM.from_pretrained(dense_folder).num_parameters()
    assert found["file_bits_per_weight"] == report.file_bits_per_weight


def test_a_plan_knows_the_sizes(dense_folder):
    found = api.plan(dense_folder, {"stages": [{"method": "pruning", "channel_sparsity": 0.4}]})
    sizes = {layer["role"]: layer["compressed_bytes"] / layer["dense_bytes"] for layer in found["layers"]}
    assert sizes["down"] == sizes["up"] == pytest.approx(48 / 72)
    assert sizes["q"] == 1


def test_a_plan_counts_the_blocks_that_go(dense_folder, text_file, tmp_path):
    recipe = {"stages": [{"method": "pruning", "channel_sparsity": 0.0, "num_layers": 2}], "calibration": {"num_sequences": 2}}
    found = api.plan(dense_folder, recipe)
    assert found["skipped"][-1] == {"name": "2 blocks", "reason": "taken out, the calibration says which"}
    hf_compact.compress(dense_folder, recipe, output=tmp_path / "out", calibration=[text_file])
    tensors = [load_file(path) for path in (tmp_path / "out").glob("*.safetensors")]
    assert found["bytes_after"] == sum(tensor.nbytes for part in tensors for tensor in part.values())
    with pytest.raises(UnsupportedModel, match="num_layers must be at most 2 for this llama model, got 3"):
        api.plan(dense_folder, {"stages": [{"method": "pruning", "num_layers": 3}]})


@pytest.mark.parametrize("chosen", [{"include": ["*.layers.1.*"]}, {"exclude": ["model.layers.0.mlp.*"]}])
def test_blocks_have_no_numbers_where_some_go(chosen, dense_folder, text_file, tmp_path):
    stages = [{"method": "pruning", "channel_sparsity": 0.0, "num_layers": 1}, {"method": "codebook", "bits": 4} | chosen]
    for call in (api.plan, partial(hf_compact.compress, output=tmp_path / "out", calibration=[text_file])):
        with pytest.raises(
            ConfigError, match=r"recipe.stages\[1\] selects model.layers.1.* and not the same Linear of every block"
        ):
            call(dense_folder, {"stages": stages})
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_work_is_named():
    with pytest.raises(NothingMatched, match=r"recipe\.stages\[0\] removes nothing"):
        prune(tiny_model("llama"), channel_multiple=72)
    stages = [{"method": "pruning", "head_sparsity": 0.5}, {"method": "codebook"}]
    with pytest.raises(UnsupportedModel, match="would have a width that the config of opt cannot say"):
        hf_compact.compress(tiny_model("opt"), {"stages": stages}, calibration=batches("opt"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head_sparsity": -0.1}, r"head_sparsity must be in \[0, 0.95\], got -0.1"),
        ({"num_layers": -1}, "num_layers must be at least 0, got -1"),
        ({"channel_sparsity": 0.0}, "pruning must remove something"),
        ({"score": "luck"}, "score must be one of magnitude, .*, got luck"),
        ({"compensation": "hope"}, "compensation must be one of none, bias, refit, got hope"),
        ({"channel_multiple": 0}, "channel_multiple must be at least 1, got 0"),
        ({"damp": 2.0}, r"damp must be in \[0, 1\], got 2.0"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ConfigError, match=message):
        PruningConfig(**settings)


def test_pruning_is_no_candidate_of_a_plan(dense_folder):
    with pytest.raises(ConfigError, match="which pruning does not: prune first, then plan"):
        api.plan_budget(dense_folder, target_bpw=3.0, candidates={"stages": [{"method": "pruning"}]})


def test_a_killed_run_goes_on_with_the_cut_blocks(dense_folder, tmp_path):
    """Stopped before its third block, the run ends with the same files."""
    recipe = {
        "stages": [{"method": "pruning", "head_sparsity": 0.5}, {"method": "codebook", "bits": 4, "exclude": ["*.q_proj"]}],
        "calibration": {"num_sequences": 4, "sequence_length": 64},
    }

    def stop(unit: str, done: int, total: int) -> None:
        if unit == "model.layers.2":
            raise KeyboardInterrupt

    hf_compact.compress(dense_folder, recipe, output=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        hf_compact.compress(dense_folder, recipe, output=tmp_path / "again", progress=stop)
    hf_compact.compress(dense_folder, recipe, output=tmp_path / "again")
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / n).glob("*.safetensors")} for n in ("whole", "again"))
    assert first == second
