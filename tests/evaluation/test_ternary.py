import copy

import pytest

from evaluation import ternary

FOUND = {
    "scratch": {
        "rows": [
            {"size": size, "kind": kind, "held_out_perplexity": 10.0 + seed + (0.1 if "doubled" in kind else 0.0)}
            for size in ternary.SIZES for kind in ternary.KINDS for seed in ternary.SEEDS
        ],
        "seconds": 1.0, "commit": "c0ffee",
    },
    "steps": {"steps": {"float32": {"ratio": 1.2}, "bfloat16": {"ratio": 1.3}}, "seconds": 1.0, "commit": "c0ffee"},
    "distillation": {
        "rows": [
            {"kind": kind, "seed": seed, "perplexity": value + seed}
            for kind, value in (("damaged", 50.0), ("cross-entropy", 20.0), ("cached top-64", 18.0)) for seed in ternary.SEEDS
        ],
        "seconds": 1.0, "commit": "c0ffee",
    },
}  # fmt: skip


def test_good_numbers_hold():
    bars = ternary.check(FOUND)
    assert len(bars) == 2 + 2 + 1
    assert all(bar["held"] for bar in bars)
    assert ternary.mean_perplexities(FOUND["scratch"]["rows"])["1M", "full precision"] == (11.0, pytest.approx(0.816, abs=1e-3))


def test_bad_numbers_do_not():
    found = copy.deepcopy(FOUND)
    for row in found["scratch"]["rows"]:
        row["held_out_perplexity"] += 0.5 * ("doubled" in row["kind"])
    found["steps"]["steps"]["bfloat16"]["ratio"] = 1.36
    next(row for row in found["distillation"]["rows"] if row["kind"] == "cached top-64" and row["seed"] == 2)["perplexity"] = 23.0
    assert [bar["held"] for bar in ternary.check(found)] == [False, False, True, False, False]


def test_tables_are_written(tmp_path):
    text = ternary.write(FOUND, {"seeds": [0, 1, 2]}, tmp_path)
    assert (tmp_path / "04-ternary.md").read_text() == text
    assert "| 1M | full precision | 11.000 | 0.816 |" in text
    assert (tmp_path / "04-ternary.json").exists()
    assert "**no**" not in text
