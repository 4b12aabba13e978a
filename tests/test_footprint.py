"""What a model costs is counted as torch counts it, and what was removed is said per block."""

import json

import pytest
import torch
from typer.testing import CliRunner

import hf_compact
from hf_compact import SpeedConfig, api, cli
from hf_compact.calibration import from_batches
from hf_compact.errors import ConfigError, OutputError
from hf_compact.footprint import Comparison, count
from hf_compact.groups import cut_zeros_, find_groups
from tests.conftest import FAMILIES, tiny_inputs, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_those_of_torch(family):
    model = tiny_model(family)
    found = count(model)
    assert found.parameters == model.num_parameters()
    assert found.num_bytes == 4 * sum({p.data_ptr(): p.numel() for p in model.parameters()}.values()) + sum(
        b.nbytes for name, b in model.named_buffers() if name in model.state_dict()
    )
    products = []
    handles = [
        module.register_forward_hook(lambda m, args, out: products.append(m.weight.numel() * args[0].shape[:-1].numel()))
        for module in model.modules()
        if type(module).__name__ in ("Linear", "Conv1D")
    ]
    inputs = tiny_inputs(family, 1, 1) if family not in ("t5", "vit") else None
    if inputs is not None:
        with torch.no_grad():
            model(**inputs)
        assert found.multiply_adds == sum(products)
    for handle in handles:
        handle.remove()
    with torch.device("meta"):
        assert count(type(model)(model.config)) == found


def test_packed_layers_count_for_what_they_stand():
    model = tiny_model("llama")
    dense = count(model)
    stages = [{"method": "codebook", "bits": 4, "rounding": "nearest", "embedding_bits": 8}]
    hf_compact.compress(model, {"stages": stages}, calibration=from_batches([tiny_inputs("llama")]))
    found = count(model)
    assert (found.parameters, found.multiply_adds) == (dense.parameters, dense.multiply_adds)
    assert found.num_bytes < 0.4 * dense.num_bytes
    model = tiny_model("llama")
    hf_compact.compress(
        model, {"stages": [{"method": "tensor_network", "keep_ratio": 0.5}]}, calibration=from_batches([tiny_inputs("llama")])
    )
    assert count(model).multiply_adds < 0.8 * dense.multiply_adds
    assert count(model).parameters == model.num_parameters()


def test_what_each_block_has_lost():
    model = tiny_model("llama")
    before = count(model)
    for group_set, gone in zip(find_groups(model), (range(36), range(1), range(18), [], [], []), strict=True):
        group_set.scale_(torch.tensor(list(gone), dtype=torch.long), 0)
    cut_zeros_(model, is_uniform=False)
    found = Comparison(before=before, after=count(model))
    removed = [{kind: share for kind, share in of.items() if kind != "parameters"} for of in found.removed().values()]
    assert removed == [
        {"channels": 0.5, "query_heads": 0.5, "kv_heads": 0.5},
        {"channels": 0.25, "query_heads": 0.0, "kv_heads": 0.0},
        {"channels": 0.0, "query_heads": 0.0, "kv_heads": 0.0},
    ]
    assert Comparison.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert "| parameters, millions | 0.0" in found.to_markdown()


def test_the_folder_says_what_was_removed(dense_folder, tmp_path):
    recipe = {
        "stages": [{"method": "pruning", "channel_sparsity": 0.5, "head_sparsity": 0.5, "num_layers": 1, "channel_multiple": 4}],
        "calibration": {"num_sequences": 2, "sequence_length": 32},
    }
    report = hf_compact.compress(dense_folder, recipe, output=tmp_path / "out")
    assert hf_compact.Report.read(tmp_path / "out" / "compression_report.json").footprint == report.footprint
    (gone,) = report.footprint["dropped"]
    shares = report.footprint["removed"]
    assert shares[gone] == dict.fromkeys(shares[gone], 1)
    assert [shares[name]["channels"] for name in shares if name != gone] == [0.5, 0.5]
    assert (tmp_path / "out" / "removed.png").read_bytes().startswith(b"\x89PNG")
    assert "## What was removed" in (tmp_path / "out" / "README.md").read_text()
    arguments = ["compare", str(dense_folder), str(tmp_path / "out"), "--plot", str(tmp_path / "chart.png"), "--prompt-tokens", "32",
                 "--new-tokens", "2", "--repeats", "1", "--dtype", "float32", "--json", str(tmp_path / "numbers.json")]  # fmt: skip
    done = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(cli.app, arguments)
    assert done.exit_code == 0, done.stderr
    assert "prefill, ms" in done.stdout
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["after"]["parameters"] == report.footprint["after"]["parameters"]
    assert numbers["after"]["decode_seconds"] > 0


def test_what_cannot_be_compared(dense_folder, tmp_path):
    (tmp_path / "there.png").touch()
    with pytest.raises(OutputError, match="exists: choose another name"):
        hf_compact.compare(dense_folder, dense_folder, plot=tmp_path / "there.png")
    with pytest.raises(ConfigError, match=r"prompt_tokens \+ new_tokens must be at most \d+, the positions of .*, got 100032"):
        hf_compact.compare(dense_folder, dense_folder, speed=SpeedConfig(prompt_tokens=100_000))
    with pytest.raises(ConfigError, match="dtype must be one of auto, float32, bfloat16, float16, got 'int8'"):
        hf_compact.compare(dense_folder, dense_folder, dtype="int8")


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_both_models_are_timed_in_the_dtype(dtype, expected, dense_folder, monkeypatch):
    seen = []
    monkeypatch.setattr(api, "compare_by_turns", lambda before, after, config: seen.extend([before.dtype, after.dtype]))
    hf_compact.compare(dense_folder, dense_folder, dtype=dtype)
    assert seen == [expected, expected]
