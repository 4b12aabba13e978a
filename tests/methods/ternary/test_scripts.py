"""The two training scripts run, leave what they promise, and name a wrong input."""

import json
import subprocess
import sys
from pathlib import Path

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
