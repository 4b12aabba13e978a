"""The profile of a model: what it measures, that it goes on, that the allocation reads it."""

import copy
import json
from pathlib import Path

import pytest
import torch
from click.testing import Result
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import hf_compact
from hf_compact import cli
from hf_compact.api import as_recipe, open_dense, prepare_calibration
from hf_compact.calibration import windows
from hf_compact.checkpoint import write_text
from hf_compact.distillation import divergence
from hf_compact.errors import CalibrationError, ConfigError, OutputError
from hf_compact.profiling import plot_profile
from tests.conftest import tiny_model

RECIPE = {
    "stages": [{"method": "tensor_network", "rank_multiple": 1, "include": ["*.mlp.*"]}],
    "calibration": {"num_sequences": 2, "sequence_length": 64},
}


@pytest.fixture(scope="module")
def profiled(tmp_path_factory, dense_folder, text_file):
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    found = hf_compact.profile(dense_folder, RECIPE, output=path, ratios=(0.2, 0.6), calibration=[text_file])
    return path, found


def test_every_linear_has_a_curve_that_falls(profiled):
    path, found = profiled
    assert json.loads(path.read_text()) == found
    assert path.with_suffix(".png").stat().st_size > 1000
    assert len(found["layers"]) == 9
    for layer in found["layers"].values():
        small, large = layer["curve"]["0.2"], layer["curve"]["0.6"]
        assert small["divergence"] > large["divergence"] > 0
        assert small["ranks"] < large["ranks"]
    assert {layer["role"] for layer in found["layers"].values()} == {"gate", "up", "down"}


def test_one_number_by_hand(profiled, dense_folder, text_file):
    """Replacing a Linear in the whole model gives the divergence that was measured from its block on."""
    from hf_compact.functional.gram import add_gram_
    from hf_compact.methods.tensor_network import TensorNetworkConfig
    from hf_compact.methods.tensor_network.apply import compress_linear

    name = "model.layers.1.mlp.up_proj"
    dense = open_dense(dense_folder, is_whole=True)
    prepared = prepare_calibration([text_file], dense.load_tokenizer(), as_recipe(RECIPE))
    linear = dense.model.get_submodule(name)
    gram = torch.zeros(32, 32)
    hook = linear.register_forward_pre_hook(lambda _, args: add_gram_(gram, args[0]))
    with torch.no_grad():
        for batch in prepared.batches:
            dense.model(**batch)
        hook.remove()
        probes = list(windows(prepared.held_out, 64, None))
        before = [dense.model(input_ids=ids).logits for ids in probes]
        dense.model.set_submodule(name, compress_linear(linear, gram, TensorNetworkConfig(keep_ratio=0.2, rank_multiple=1)))
        lost = [divergence(dense.model(input_ids=ids).logits, target) for ids, target in zip(probes, before, strict=True)]
    assert torch.stack(lost).mean().item() == pytest.approx(profiled[1]["layers"][name]["curve"]["0.2"]["divergence"], rel=1e-3)


def test_a_bias_answers_for_the_mean_of_the_inputs(tmp_path, tokenizer, text_file):
    """What is measured is what a run makes of the Linear."""
    tiny_model("opt").save_pretrained(tmp_path / "opt")
    tokenizer.save_pretrained(tmp_path / "opt")
    name = "model.decoder.layers.1.fc1"
    recipe = {
        **RECIPE,
        "stages": [
            {"method": "tensor_network", "rank_multiple": 1, "include": [name], "keep_ratio": 0.3, "allocation": "uniform"}
        ],
    }
    found = hf_compact.profile(tmp_path / "opt", recipe, output=tmp_path / "p.json", ratios=(0.3,), calibration=[text_file])
    dense = open_dense(tmp_path / "opt", is_whole=True).model
    bias, made = dense.get_submodule(name).bias.clone(), copy.deepcopy(dense)
    prepared = prepare_calibration([text_file], tokenizer, as_recipe(recipe))
    hf_compact.compress(made, recipe, calibration=prepared)
    with torch.no_grad():
        probes = list(windows(prepared.held_out, 64, None))
        lost = [divergence(made(input_ids=ids).logits, dense(input_ids=ids).logits) for ids in probes]
    assert torch.stack(lost).mean().item() == pytest.approx(found["layers"][name]["curve"]["0.3"]["divergence"], rel=1e-3)
    assert torch.equal(dense.get_submodule(name).bias, bias)
    assert not torch.equal(made.get_submodule(name).bias, bias)


def test_linears_without_roles_have_rows_of_their_own(tmp_path, monkeypatch):
    curve = {"0.5": {"divergence": 0.1, "ranks": [2]}}
    names = [f"model.layers.{block}.{part}" for block in (0, 1) for part in ("mlp.fc1", "mlp.fc2", "self_attn.dense")]
    drawn = []
    monkeypatch.setattr("hf_compact.profiling.write_plot", lambda path, figure: drawn.append(figure))
    plot_profile({"layers": {name: {"role": "linear", "curve": curve} for name in names}}, tmp_path / "p.png")
    axes = drawn[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["mlp.fc1", "mlp.fc2", "self_attn.dense"]
    assert not axes.images[0].get_array().mask.any()


def test_a_stopped_profile_goes_on(profiled, dense_folder, text_file, tmp_path, monkeypatch):
    path = tmp_path / "profile.json"
    written = []

    def stop_after_three(target: Path, text: str) -> None:
        write_text(target, text)
        written.append(target)
        if len(written) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("hf_compact.profiling.write_text", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        hf_compact.profile(dense_folder, RECIPE, output=path, ratios=(0.2, 0.6), calibration=[text_file])
    monkeypatch.undo()
    assert len(json.loads(path.read_text())["layers"]) == 3
    units = []
    found = hf_compact.profile(
        dense_folder, RECIPE, output=path, ratios=(0.2, 0.6), calibration=[text_file], progress=lambda unit, done, total: units.append(done)
    )  # fmt: skip
    assert found == profiled[1]
    assert units == [3, 4, 5, 6, 7, 8, 9]
    assert hf_compact.profile(dense_folder, RECIPE, output=path, ratios=(0.2, 0.6), calibration=[text_file]) == found


def test_the_allocation_reads_it(profiled, dense_folder, text_file, tmp_path):
    stage = RECIPE["stages"][0] | {"keep_ratio": 0.5, "allocation": "profile", "profile": str(profiled[0])}
    report = hf_compact.compress(dense_folder, RECIPE | {"stages": [stage]}, output=tmp_path / "out", calibration=[text_file])
    assert report.is_verified
    kept = [layer.compressed_bytes / (4 * layer.num_weights) for layer in report.body]
    assert sum(kept) / len(kept) == pytest.approx(0.5, abs=0.1)
    assert len(set(kept)) > 3


@pytest.mark.parametrize("lost", [-1e-8, -1.0, float("nan")])
def test_only_rounding_makes_a_divergence_negative(lost, profiled, dense_folder, text_file, tmp_path):
    table = json.loads(profiled[0].read_text())
    name = next(iter(table["layers"]))
    table["layers"][name]["curve"]["0.6"]["divergence"] = lost
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(table))
    stage = RECIPE["stages"][0] | {"keep_ratio": 0.5, "allocation": "profile", "profile": str(path)}
    if lost != -1e-8:
        with pytest.raises(ConfigError, match=r"does not fit the model: .* needs ratios in \(0, 1\) with finite divergences"):
            hf_compact.compress(dense_folder, RECIPE | {"stages": [stage]}, output=tmp_path / "out", calibration=[text_file])
        return
    model, tokenizer = AutoModelForCausalLM.from_pretrained(dense_folder), AutoTokenizer.from_pretrained(dense_folder)
    report = hf_compact.compress(model, RECIPE | {"stages": [stage]}, calibration=[text_file], tokenizer=tokenizer)
    assert any(layer.name == name for layer in report.body)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"ratios": (1.0,)}, ConfigError, r"ratios must be in \(0, 1\), got \[1.0\]"),
        ({"ratios": (0.3,)}, OutputError, "is not the profile of the same model, settings and text"),
        ({"output": "absent/profile.json"}, OutputError, "must name a .json file in a folder that exists"),
        (
            {"recipe": {"stages": [{"method": "tensor_network", "basis_group": 2}]}},
            ConfigError,
            r"stages\[0\].basis_group must be 1 for a profile, .* got 2",
        ),
        ({"recipe": {"stages": [{"method": "codebook"}]}}, ConfigError, "must be a method with a keep_ratio"),
        ({"calibration": "batches"}, CalibrationError, "give calibration as text files"),
    ],
    ids=["ratio", "another profile", "no folder", "shared bases", "no ratio", "no text"],
)
def test_bad_input_names_itself(changes, error, match, profiled, dense_folder, text_file):
    from hf_compact.calibration import from_batches

    settings = {"recipe": RECIPE, "output": profiled[0], "ratios": (0.2, 0.6), "calibration": [text_file]} | changes
    if settings["calibration"] == "batches":
        settings["calibration"] = from_batches([{"input_ids": torch.arange(8)[None]}])
    before = profiled[0].read_bytes()
    with pytest.raises(error, match=match):
        hf_compact.profile(dense_folder, **settings)
    assert profiled[0].read_bytes() == before


@pytest.mark.cli
def test_the_commands_profile_and_export(dense_folder, text_file, tmp_path, monkeypatch):
    (tmp_path / "recipe.yaml").write_text(json.dumps(RECIPE))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Result:
        return CliRunner(env={"COLUMNS": "300", "TERM": "dumb"}).invoke(cli.app, arguments)

    done = run(
        "profile",
        str(dense_folder),
        "--recipe",
        "recipe.yaml",
        "--output",
        "p.json",
        "--ratio",
        "0.3",
        "--calibration",
        str(text_file),
    )
    assert done.exit_code == 0, done.stderr
    assert "down" in done.stdout
    assert (tmp_path / "p.png").exists()
    done = run("compress", str(dense_folder), "--recipe", "recipe.yaml", "--output", "small", "--calibration", str(text_file))
    assert done.exit_code == 0, done.stderr
    assert "rank" in run("inspect", "small").stdout
    done = run("export", "small", "--output", "plain", "--to", "low_rank")
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "plain" / "modeling_low_rank.py").exists()
    refused = run("export", "plain", "--output", "again")
    assert refused.exit_code == 2
    assert "is not compressed by hf_compact" in refused.stderr
