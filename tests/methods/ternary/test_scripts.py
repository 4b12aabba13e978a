"""The two training scripts run, leave what they promise, and name a wrong input."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_compact.methods.ternary import TernaryLinear

SCRIPTS = Path(__file__).parents[3] / "scripts"


def run(name: str, *arguments: object, code: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), *map(str, arguments), "--cpu"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=SCRIPTS.parent)
    assert found.returncode == code, found.stderr
    return found


def load(name: str) -> ModuleType:
    """A script in this process."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.cli
def test_a_model_is_trained_from_scratch(text_file, tmp_path):
    small = ["--hidden-size", 32, "--layers", 1, "--vocabulary", 300, "--tokens", 2048, "--length", 64, "--batch-size", 4]
    run("train_ternary_from_scratch", "--text", text_file, "--output", tmp_path / "out", "--bits", 1.58, *small)
    result = json.loads((tmp_path / "out" / "training.json").read_text())
    assert result["body_parameters"] == 4 * 32 * 32 + 3 * 32 * 88
    assert result["tokens"] == 2048
    assert 1.6 <= result["body_bits_per_weight"] < result["file_bits_per_weight"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(model.model.layers[0].mlp.up_proj, TernaryLinear)
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()
    again = run("train_ternary_from_scratch", "--text", text_file, "--output", tmp_path / "out", *small, code=2)
    assert "is not an empty folder" in again.stderr


@pytest.mark.parametrize(
    ("options", "rule"),
    [(["--hidden-size", 100], "--hidden-size must be even, and from 64 on divide into 3 heads"),
     (["--hidden-size", 9], "--hidden-size must be even"),
     (["--batch-size", 0], "--batch-size must be at least 1, got 0"),
     (["--windows", 0], "--windows must be at least 1, got 0"),
     (["--scale", "lsq"], "--scale needs --bits, got lsq without it"),
     (["--dequantization", "shared"], "--dequantization needs --bits, got shared"),
     (["--ramp-share", 0.0], "--ramp-share needs --bits, got 0.0"),
     (["--ramp-share", 2.0, "--bits", 2], "training.ramp_share must be in [0, 1], got 2.0")],
    ids=["width", "odd", "batch", "windows", "scale", "dequantization", "ramp", "share"],
)  # fmt: skip
def test_wrong_options_name_themselves_at_the_start(options, rule, text_file, tmp_path, monkeypatch, capsys):
    command = ["train", "--text", text_file, "--output", tmp_path / "out", "--cpu", *options]
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    assert load("train_ternary_from_scratch").main() == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {rule}")
    assert errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.cli
def test_a_model_is_converted(dense_folder, text_file, tmp_path):
    short = ["--tokens", 512, "--length", 32, "--warm-start-tokens", 256, "--warm-start-epochs", 8, "--count", 8]
    run("convert_to_ternary", "--model", dense_folder, "--text", text_file, "--output", tmp_path / "out", *short)
    result = json.loads((tmp_path / "out" / "training.json").read_text())
    assert set(result["perplexity"]) == {"dense", "rounded", "after the warm start", "trained"}
    assert result["tokens_seen"] == 512
    assert len(result["blocks"]) == 3
    assert all(last < first for first, last in result["blocks"].values())
    assert (tmp_path / "out.teacher" / "cache.json").exists()
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers[0].mlp.up_proj, TernaryLinear)
