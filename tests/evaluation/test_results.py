import copy
import json

import pytest
import yaml

from evaluation import pareto, peers, rates, spine, tensor_network
from hf_compact import Recipe


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
    table = peers.markdown([*ROWS, {"label": "absent", "skipped": "no module"}], ["a/wiki", "b/c4"])
    assert len(table.splitlines()) == 2 + len(ROWS) + 1
    assert "| 21.000 | 1.0500 | 32.000 | 1.0667 |" in table
    assert "| absent | skipped: no module |" in table


def test_control_row_counts_its_bytes(dense_folder, text_file):
    found = peers.run_row("nearest, 4 bit g64 (control)", str(dense_folder), [str(text_file)], windows=2, length=64)
    dense = peers.run_row("dense bf16", str(dense_folder), [str(text_file)], windows=2, length=64)
    assert 4 < found["body_bits_per_weight"] < 6
    assert dense["body_bits_per_weight"] == 16
    assert found["scores"][text_file.name] != dense["scores"][text_file.name]


def test_rates_are_held_against_their_bars(tmp_path, monkeypatch):
    monkeypatch.setattr(rates, "RESULTS", tmp_path)
    kept = {
        "seconds": {"compress": 540.0, "distill": 60.0},
        "file_bytes": 60_000_000,
        "command_seconds": 700.0,
        "commit": "c0ffee",
    }
    totals = {"body_bits_per_weight": 3.004, "share_of_fp32": 0.11}
    found = {
        "codebook-3.0bpw": {**kept, "perplexity": {"wiki": 21.8, "c4": 36.0}, "totals": totals},
        "codebook-3.0bpw, not distilled": {
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
        "codebook-3.0bpw: bits per block weight": (3.004, True),
        "codebook-3.0bpw: perplexity on wiki, times dense": (1.09, True),
        "codebook-3.0bpw: perplexity on c4, times dense": (1.2, False),
        "codebook-7percent: minutes to compress": (10.0, True),
        "codebook-7percent: minutes to compress, distillation apart": (9.0, True),
        "codebook-7percent: file, share of fp32": (0.069, True),
        "codebook-7percent: perplexity on wiki, times dense": (2.85, False),
        "codebook-3.0bpw, not distilled: minutes to compress": (9.0, True),
    }
    assert {bar["claim"]: (bar["measured"], bar["held"]) for bar in bars} == expected
    table = (tmp_path / "02-codebook.md").read_text()
    assert "| codebook-3.0bpw, not distilled | 3.004 | 60.0 | 11.0 % | 1.150 | 1.267 | 9.0 |" in table


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
    found = {
        "dense": scores(20.0, 30.0),
        "tensor-network-20": twenty,
        "speed": {**times, **common},
        "healed-dense": scores(10.0, 30.0),
        "healed-20": scores(11.0, 36.0),
    }
    tensor_network.write(found, "python -m evaluation.tensor_network")
    bars = json.loads((tmp_path / "03-tensor-network.json").read_text())["bars"]
    assert [bar["held"] for bar in bars] == [True, False, True, True, True, False, False, True]
    assert [bar["measured"] for bar in bars] == [1.5, 4.0, 2.0, 0.803, 1.1, 1.2, 0.9091, 1.2]
    table = (tmp_path / "03-tensor-network.md").read_text()
    assert "| tensor-network-20 | 12.80 | 100.0 | 40.0 % | 80.0 % | 1.500 | 4.000 | 1.0 |" in table
    assert "| healed-20 |  |  |  |  | 0.550 | 1.200 | 1.0 |" in table
