import argparse
import copy
import json
import subprocess

import pytest
import torch
import yaml

from evaluation import pareto, peers, rates, spine, tensor_network
from hf_compact import Recipe
from hf_compact.results import ModelResult, Results
from tests.conftest import tiny_inputs, tiny_model


def row(label: str, bits: float, wiki: float, second: float) -> dict:
    return {
        "label": label,
        "body_bits_per_weight": bits,
        "file_bytes": None,
        "seconds": 1.0,
        "commit": "c0ffee",
        "scores": {"wiki": wiki, "c4": second},
    }


ROWS = [
    row("dense bf16", 16.0, 20.0, 30.0),
    row("bitsandbytes nf4 g64", 4.5, 23.0, 35.0),
    row("HQQ 4 bit g64", 4.5, 23.0, 35.0),
    row("HQQ 3 bit g64", 3.7, 90.0, 95.0),
    row("optimum-quanto qint4", 4.32, 24.0, 36.0),
    row("somewhere/codebook-4bit", 4.31, 21.0, 32.0),
    row("somewhere/codebook-3bit", 3.28, 27.0, 46.0),
]


def test_every_claim_of_good_rows_holds():
    bars = spine.quality_bars(ROWS, ["wiki", "c4"])
    assert len(bars) == 2 * 3 + 4
    assert {bar["commit"] for bar in bars} == {"c0ffee"}
    assert all(bar["held"] for bar in bars), [bar for bar in bars if not bar["held"]]


@pytest.mark.parametrize(
    ("label", "change"),
    [
        ("somewhere/codebook-3bit", {"body_bits_per_weight": 3.4}),
        ("somewhere/codebook-4bit", {"scores": {"wiki": 21.9, "c4": 32.0}}),
        ("somewhere/codebook-3bit", {"scores": {"wiki": 27.0, "c4": 50.0}}),
        ("HQQ 3 bit g64", {"scores": {"wiki": 26.0, "c4": 95.0}}),
        ("HQQ 4 bit g64", {"skipped": "does not run here"}),
        ("HQQ 4 bit g64", {"body_bits_per_weight": 4.2}),
    ],
    ids=["bits", "first text", "second text", "a better peer", "a skipped peer", "a smaller peer"],
)
def test_a_missed_claim_is_not_held(label, change):
    rows = copy.deepcopy(ROWS)
    next(r for r in rows if r["label"] == label).update(change)
    assert sum(not bar["held"] for bar in spine.quality_bars(rows, ["wiki", "c4"])) == 1


def test_table_has_every_row_and_its_ratio():
    broken = row("broken", 2.0, None, 99.0)
    table = peers.markdown([*ROWS, broken, {"label": "absent", "skipped": "no module"}], ["a/wiki", "b/c4"])
    assert len(table.splitlines()) == 2 + len(ROWS) + 2
    assert "| broken | 2.000 |  | not finite | | 99.000 | 3.3000 |" in table
    assert "| 21.000 | 1.0500 | 32.000 | 1.0667 |" in table
    assert "| absent | skipped: no module |" in table


def row_options(dense_folder, text_file, output) -> argparse.Namespace:
    return argparse.Namespace(
        model=str(dense_folder), text=[str(text_file)], windows=2, window_length=64, task=[], task_data=None, limit=None, speed=False,
        prompt_tokens=8, repeats=1, output=output, calibration=[str(text_file)], commit="c0ffee",
    )  # fmt: skip


def test_control_row_counts_its_bytes(dense_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "CALIBRATION", {"num_sequences": 4, "sequence_length": 32, "batch_size": 2})
    options = row_options(dense_folder, text_file, tmp_path / "peers.json")
    peers.run_row(peers.DENSE, options)
    results = peers.run_row("nearest, 4 bit g64 (control)", options)
    dense, found = peers.rows(results)
    assert 4 < found["body_bits_per_weight"] < 6
    assert dense["body_bits_per_weight"] == 16
    assert found["scores"][text_file.name] != dense["scores"][text_file.name]
    assert {row["commit"] for row in (dense, found)} == {"c0ffee"}
    beside = results.models[1].comparison["perplexity"][text_file.name]
    assert beside["kl"] > 0
    assert beside["ratio"] == pytest.approx(found["scores"][text_file.name] / dense["scores"][text_file.name])
    assert Results.read(options.output).to_dict() == results.to_dict()


@pytest.mark.parametrize(
    ("label", "bits", "module"),
    [
        ("bitsandbytes nf4 g64", (4.4, 5), "bitsandbytes"), ("bitsandbytes fp4 g64", (4.4, 5), "bitsandbytes"),
        ("bitsandbytes int8", (8, 9), "bitsandbytes"), ("HQQ 2 bit g16", (3, 5), "hqq"), ("optimum-quanto qint2", (2, 4), "optimum.quanto"),
        ("torchao int8", (8, 9), "torchao"), ("torchao int3 g32", (3, 4), "torchao"), ("GPTQ 3 bit g128 (llm-compressor)", (3, 4), "llmcompressor"),
        ("Torch-Pruning, 50 % of channels", (8, 14), "torch_pruning"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")  # other libraries' own
def test_peers_run_and_count_their_bytes(label, bits, module, tmp_path, tokenizer, text_file, monkeypatch):
    pytest.importorskip(module)
    monkeypatch.setattr(peers, "CALIBRATION", {"num_sequences": 4, "sequence_length": 32, "batch_size": 2})
    model = tiny_model("llama", torch.bfloat16, hidden_size=128, intermediate_size=256, num_hidden_layers=2)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = peers.changed(label, str(tmp_path), [str(text_file)])
    assert bits[0] <= found.body_bits_per_weight <= bits[1]
    assert found.file_bytes == pytest.approx(
        found.num_parameters * 2 - (16 - found.body_bits_per_weight) / 8 * body_weights(model)
    )
    ids = tiny_inputs("llama")["input_ids"]
    with torch.no_grad():
        difference = found.model(input_ids=ids).logits.float() - model(input_ids=ids).logits.float()
    assert 0 < difference.norm() / model(input_ids=ids).logits.float().norm() < 1.5


def body_weights(model) -> int:
    return sum(module.weight.numel() for name, module in model.named_modules() if name.endswith("_proj"))


def test_a_match_takes_the_bytes_of_the_peer(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(peers.subprocess, "run", lambda command, check: made.append(command))
    options = argparse.Namespace(output=tmp_path / "peers.json", model="model", calibration=["a.txt"])
    model = ModelResult(name="", fingerprint="", dtype="", file_bytes=1, num_parameters=1, body_bits_per_weight=4.5)
    folder = peers.matching("HQQ 4 bit g64", model, options)
    assert folder == tmp_path / "peers" / "ours-entropy-4.478"
    recipe = yaml.safe_load(folder.with_suffix(".yaml").read_text())
    assert Recipe.from_dict(recipe).stages[0].bits == 4.478
    assert made[0][-6:] == ["--recipe", str(folder.with_suffix(".yaml")), "--output", str(folder), "--calibration", "a.txt"]
    folder.mkdir()  # stopped on the way: the same command goes on
    peers.matching("HQQ 4 bit g64", model, options)
    assert made[1] == made[0]
    (folder / "compression_report.json").write_text("{}")
    peers.matching("HQQ 4 bit g64", model, options)
    assert len(made) == 2
    folder = peers.matching("Torch-Pruning, 20 % of channels", model, options)
    assert yaml.safe_load(folder.with_suffix(".yaml").read_text())["stages"] == [{"method": "pruning", "channel_sparsity": 0.2}]
    assert peers.matching("nearest, 4 bit g64 (control)", model, options) is None
    model.body_bits_per_weight = 8.2
    assert peers.matching("torchao int8", model, options) is None


@pytest.mark.cli
def test_an_interrupted_run_of_peers_goes_on(tmp_path, monkeypatch, capsys):
    """Rows are other processes: what is there is not run again, what failed is tried again and named."""
    done = []

    def row_process(command, **_):
        label = command[-1]
        results = Results.read(tmp_path / "p.json") if done else Results(protocol={}, machine={}, versions={})
        done.append(label)
        if label.startswith("HQQ"):
            return subprocess.CompletedProcess(command, 1, "", "Traceback\nImportError: no hqq\n")
        model = ModelResult(
            name=label, fingerprint="", dtype="", file_bytes=10**6, num_parameters=10**6, body_bits_per_weight=16.0
        )
        model.perplexity["a.txt"] = {"perplexity": 20.0, "seconds": 1.0}
        results.models.append(model)
        results.write(tmp_path / "p.json")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(peers.subprocess, "run", row_process)
    chosen = ["HQQ 4 bit g64", "optimum-quanto qint4"]
    arguments = [
        "model",
        "--text",
        "a.txt",
        "--output",
        str(tmp_path / "p.json"),
        *(word for label in chosen for word in ("--peer", label)),
    ]
    monkeypatch.setattr("sys.argv", ["peers.py", *arguments])
    assert peers.main() == 0
    assert done == [peers.DENSE, *chosen]
    assert "| HQQ 4 bit g64 | skipped: ImportError: no hqq |" in (tmp_path / "p.md").read_text()
    assert peers.main() == 0
    assert done[3:] == ["HQQ 4 bit g64"]
    assert "optimum-quanto qint4: done" in capsys.readouterr().out


def test_rates_are_held_against_their_bars(tmp_path, monkeypatch):
    monkeypatch.setattr(rates, "RESULTS", tmp_path)
    kept = {
        "seconds": {"compress": 540.0, "distill": 60.0},
        "file_bytes": 60_000_000,
        "command_seconds": 700.0,
        "commit": "c0ffee",
    }
    totals = {"body_bits_per_weight": 2.999, "share_of_fp32": 0.11}
    found = {
        "codebook-3.0bpw": {**kept, "perplexity": {"wiki": 21.8, "c4": 36.0}, "totals": totals},
        "codebook-2.3bpw, not distilled": {
            **kept,
            "seconds": {"compress": 540.0},
            "perplexity": {"wiki": 23.0, "c4": 38.0},
            "totals": totals,
        },
        "codebook-7percent": {**kept, "perplexity": {"wiki": 57.0, "c4": 99.0}, "totals": totals | {"share_of_fp32": 0.069}},
    }
    speeds = {"codebook-3.0bpw": {"megabytes_per_second": 90.4, "command_seconds": 1.0, "commit": "c0ffee"}}
    rates.write(
        found, {"wiki": 20.0, "c4": 30.0}, speeds, {"seed": 0, "machine": "this", "command": "python -m evaluation.rates"}
    )
    bars = json.loads((tmp_path / "02-codebook.json").read_text())["bars"]
    expected = {
        "codebook-3.0bpw: decoding, MB of bfloat16 weights per second on one core": (90, False),
        "codebook-3.0bpw: minutes to compress": (10.0, True),
        "codebook-3.0bpw: minutes to compress, distillation apart": (9.0, True),
        "codebook-3.0bpw: bits per block weight": (2.999, True),
        "codebook-3.0bpw: perplexity on wiki, times dense": (1.09, True),
        "codebook-3.0bpw: perplexity on c4, times dense": (1.2, False),
        "codebook-7percent: minutes to compress": (10.0, True),
        "codebook-7percent: minutes to compress, distillation apart": (9.0, True),
        "codebook-7percent: file, share of fp32": (0.069, True),
        "codebook-7percent: perplexity on wiki, times dense": (2.85, False),
        "codebook-2.3bpw, not distilled: minutes to compress": (9.0, True),
    }
    assert {bar["claim"]: (bar["measured"], bar["held"]) for bar in bars} == expected
    table = (tmp_path / "02-codebook.md").read_text()
    assert "| codebook-2.3bpw, not distilled | 2.999 | 60.0 | 11.0 % | 1.150 | 1.267 | 9.0 |" in table


def test_a_speed_outlives_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(rates, "RESULTS", tmp_path)
    monkeypatch.setattr(rates, "decode_speed", lambda folder: {"megabytes_per_second": 90.0, "command_seconds": 1.0})
    rows = {
        name: {"folder": name, "commit": "c0ffee"}
        for name in ("codebook-3.0bpw", "codebook-2.3bpw", "codebook-1.9bpw", "jlcm-3bit")
    }
    (tmp_path / "codebook-3.0bpw").mkdir()
    (tmp_path / "jlcm-3bit").mkdir()
    first = rates.decode_speeds(tmp_path, rows)
    assert list(first) == ["codebook-3.0bpw"]
    (tmp_path / "codebook-3.0bpw").rmdir()
    claims = {"codebook-3.0bpw": 50, "codebook-2.3bpw": 103, "codebook-7percent": 70}
    bars = [
        {"claim": f"{name}{rates.DECODING}", "measured": speed, "seconds": 2.0, "commit": "94a437e"}
        for name, speed in claims.items()
    ]
    bars.append({"claim": "codebook-1.9bpw: minutes to compress", "measured": 9, "seconds": 2.0, "commit": "94a437e"})
    (tmp_path / "02-codebook.json").write_text(json.dumps({"bars": bars}))
    second = rates.decode_speeds(tmp_path, rows)
    assert second == first | {"codebook-2.3bpw": {"megabytes_per_second": 103, "command_seconds": 2.0, "commit": "94a437e"}}


def test_every_row_names_a_recipe_and_its_fields():
    for name, row in rates.ROWS.items():
        recipe = yaml.safe_load((rates.HERE.parent / "configs" / "recipes" / f"{row.recipe}.yaml").read_text()) | row.changes
        recipe["stages"] = [recipe["stages"][0] | row.stage]
        assert len(Recipe.from_dict(recipe).stages) == 1
        assert (name in rates.BARS) == (not row.changes and not row.stage)


def test_the_front_and_its_picture(tmp_path):
    rows = [{**row, "file_bytes": size, "is_ours": size < 3} for size, row in enumerate(ROWS, start=1)]
    pareto.plot([*rows, {"label": "absent", "skipped": "no module"}], tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    assert pareto.front([(3, 7), (1, 9), (2, 5), (4, 5)]) == [(1, 9), (2, 5)]


def test_rows_of_the_rates_take_the_form_of_peers():
    kept = {"totals": {"body_bits_per_weight": 3.0}, "file_bytes": 5, "perplexity": {"wiki": 21.0}, "command_seconds": 1.0}
    (row,) = pareto.our_rows({"dense": {}, "codebook-3.0bpw": {**kept, "commit": "c0ffee"}})
    assert set(ROWS[0]) <= set(row)
    assert row["is_ours"]


def test_tensor_networks_are_held_against_their_bars(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_network, "RESULTS", tmp_path)
    totals = {"body_bits_per_weight": 12.8, "share_of_fp32": 0.4, "share_of_bf16": 0.8}
    common = {"command_seconds": 60.0, "commit": "c0ffee"}

    def scores(wiki: float, c4: float) -> dict:
        return {**common, "perplexity": {"wiki": wiki, "c4": c4}}

    twenty = {**scores(30.0, 120.0), "totals": totals, "file_bytes": 10**8, "solver_seconds": 120.0, "kept_share": 0.803}
    times = {"prefill dense": 0.12, "prefill 40": 0.1, "decode dense": 0.01, "decode 40": 0.011}
    fast = {"prefill dense": 0.12, "prefill 40-fast": 0.11, "decode dense": 0.01, "decode 40-fast": 0.008, "dtype": "float32"}
    found = {
        "dense": scores(20.0, 30.0),
        "tensor-network-20": twenty,
        "speed-40": {**times, **common},
        "speed-40-fast": {**fast, **common},
        "healed-dense-0.0001": {**scores(10.0, 30.0), "held_out": 9.0, "tokens": 500_000},
        "healed-20-0.001": {**scores(11.0, 36.0), "held_out": 9.5},
        "healed-20-0.0003": {**scores(10.5, 37.0), "held_out": 9.6},
    }
    tensor_network.write(found, "python -m evaluation.tensor_network")
    bars = json.loads((tmp_path / "03-tensor-network.json").read_text())["bars"]
    assert [bar["held"] for bar in bars] == [True, False, True, True, True, False, False, True, True, False]
    assert [bar["measured"] for bar in bars] == [1.5, 4.0, 2.0, 0.803, 1.1, 1.2, 0.9091, 1.2, 1.25, 1.0909]
    table = (tmp_path / "03-tensor-network.md").read_text()
    assert "| tensor-network-20 | 12.80 | 100.0 | 40.0 % | 80.0 % | 1.500 | 4.000 |  | 1.0 |" in table
    assert "| healed-20-0.001 |  |  |  |  | 0.550 | 1.200 | 9.50 | 1.0 |" in table
