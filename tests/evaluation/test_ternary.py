import argparse
import copy
import json
import math
from pathlib import Path

import pytest

from evaluation import ternary

FOUND = {
    "scratch": {
        "rows": [
            {"size": size, "kind": kind, "held_out_perplexity": 10.0 + seed + (0.1 if "doubled" in kind else 0.0)}
            for size in ternary.SIZES for kind in ternary.KINDS for seed in ternary.SEEDS
        ],
        "sweep": [{"kind": "full precision", "learning_rate": 2e-3, "weight_decay": 0.1, "held_out_perplexity": 10.0}],
        "seconds": 1.0, "cpu_seconds": 7200.0, "commit": "c0ffee",
    },
    "steps": {"steps": {"float32": {"ratio": 1.2}, "bfloat16": {"ratio": 1.3}}, "seconds": 1.0, "commit": "c0ffee"},
    "distillation": {
        "rows": [
            {"kind": kind, "seed": seed, "learning_rate": rate, "perplexity": value + seed}
            for kind, rate, value in (
                ("damaged", 0.0, 50.0), ("cross-entropy", 1e-3, 20.0), ("cross-entropy", 3e-3, 30.0), ("cached top-64", 1e-3, 18.0),
            )
            for seed in ternary.SEEDS
        ],
        "dense": 9.0, "seconds": 1.0, "commit": "c0ffee",
    },
}  # fmt: skip


def test_good_numbers_hold():
    bars = ternary.check(FOUND)
    assert len(bars) == 2 + 1 + 2 + 1
    assert all(bar["held"] for bar in bars)
    assert ternary.mean_perplexities(FOUND["scratch"]["rows"])["1M", "full precision"] == (11.0, pytest.approx(0.816, abs=1e-3))


def test_bad_numbers_do_not():
    found = copy.deepcopy(FOUND)
    for row in found["scratch"]["rows"]:
        row["held_out_perplexity"] += 0.5 * ("doubled" in row["kind"])
    found["steps"]["steps"]["bfloat16"]["ratio"] = 1.36
    next(row for row in found["distillation"]["rows"] if row["kind"] == "cached top-64" and row["seed"] == 2)["perplexity"] = 23.0
    found["scratch"]["cpu_seconds"] = 10_900.0
    assert [bar["held"] for bar in ternary.check(found)] == [False, False, False, True, False, False]


def test_tables_are_written(tmp_path):
    text = ternary.write(FOUND, {"seeds": [0, 1, 2]}, tmp_path)
    assert (tmp_path / "04-ternary.md").read_text() == text
    assert "| 1M | full precision | 11.000 | 0.816 |" in text
    assert "| full precision | 0.002 | 0.1 | 10.000 |" in text
    assert "| not damaged | | | 9.000 |" in text
    assert (tmp_path / "04-ternary.json").exists()
    assert "**no**" not in text


def test_a_run_that_diverged_does_not_end_the_report():
    rows = [{"size": "1M", "kind": "a", "held_out_perplexity": value} for value in (9.0, math.inf)]
    assert ternary.mean_perplexities(rows) == {("1M", "a"): (math.inf, math.inf)}


def pretend(command: list[str], **settings) -> None:
    """The training script: a run is best at the rate 2e-3 without decay."""
    output, rate, decay, seed = (
        command[command.index(name) + 1] for name in ("--output", "--learning-rate", "--weight-decay", "--seed")
    )
    assert settings["pass_fds"]
    Path(output).mkdir()  # fails where something is left
    found = {"learning_rate": float(rate), "weight_decay": float(decay), "seed": int(seed), "seconds": 2.0, "cpu_seconds": 3.0}
    found["held_out_perplexity"] = 10 + abs(float(rate) - 2e-3) + float(decay)
    (Path(output) / "training.json").write_text(json.dumps(found))


@pytest.fixture
def options(tmp_path, monkeypatch) -> argparse.Namespace:
    monkeypatch.setattr(ternary.subprocess, "run", pretend)
    return argparse.Namespace(work=tmp_path, quick=False, train=["a.txt"])


def test_all_kinds_are_trained_at_the_best_rates_of_the_sweep(options):
    left = options.work / ternary.scratch_name("1M", "full precision", 6e-4, 0.0, 0)
    left.mkdir()
    (left / "config.json").write_text("{}")  # of a run that was killed while it saved
    found = ternary.scratch(options)
    assert len(found["sweep"]) == 2 * 9
    assert len(found["rows"]) == 2 * 5 * 3
    assert {(row["learning_rate"], row["weight_decay"]) for row in found["rows"]} == {(2e-3, 0.0)}
    assert found["cpu_seconds"] == 3.0 * (2 * 9 + 2 * 5 * 3 - 2), "runs of the sweep are rows of the table as well"


def test_a_run_that_another_process_has_taken_is_left_to_it(options):
    runs = [("1M", kind, 2e-3, 0.0, 0) for kind in ternary.SWEPT]
    name = options.work / ternary.scratch_name(*runs[0])
    with ternary.taken(name):
        assert ternary.script("train_ternary_from_scratch", name, {}, ["a.txt"], is_patient=False) is None
    assert not name.exists()
    assert [row["kind"] for row in ternary.from_scratch(options, runs)] == list(ternary.SWEPT)
