"""Every script of the gallery runs in its quick form and leaves what it promises."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_compact
from hf_compact.methods.ternary import TernaryLinear
from tests.fake_hub import environment, serve

EXAMPLES = Path(__file__).parents[1] / "scripts" / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "setting")
TERNARY = {"trainer_callback": 1.58, "trl_sft": 1.58, "accelerate_loop": 1.58, "quantization_aware_training": 4}


def run(name: str, output: Path, monkeypatch, *arguments: str) -> None:
    """In this process, which has the libraries already."""
    monkeypatch.setattr(sys, "argv", [name, "--quick", "--output", str(output), *arguments])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def test_every_script_is_tested():
    tested = {
        *TERNARY,
        "prune_while_training",
        "compacter_glue",
        "one_bit_adam",
        "compress_then_recover",
        "push",
        "evaluate_models",
    }
    assert set(SCRIPTS) == tested


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # trl's own default
@pytest.mark.parametrize("name", TERNARY)
def test_training_leaves_a_packed_model(name, tmp_path, monkeypatch):
    if name == "trl_sft":
        pytest.importorskip("trl", reason="trl is not installed")
    run(name, tmp_path / "out", monkeypatch)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    layers = [module for module in model.model.layers.modules() if isinstance(module, TernaryLinear)]
    assert {layer.bits for layer in layers} == {TERNARY[name]}
    assert len(layers) == 14
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()


def test_a_loop_of_ones_own_takes_all_its_steps(tmp_path, monkeypatch, capsys):
    """However little text there is: the rows come again."""
    (tmp_path / "short.txt").write_text("So short a text. " * 8)
    run("accelerate_loop", tmp_path / "out", monkeypatch, "--text", str(tmp_path / "short.txt"))
    assert "step 8: loss" in capsys.readouterr().out
    (tmp_path / "none.txt").write_text("too short")
    with pytest.raises(SystemExit, match=r"--text must hold at least --length tokens \(32\), got 9"):
        run("accelerate_loop", tmp_path / "other", monkeypatch, "--text", str(tmp_path / "none.txt"))


def test_without_trl_the_script_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(SystemExit, match="this example needs the package trl: pip install trl"):
        run("trl_sft", tmp_path / "out", monkeypatch)
    assert not (tmp_path / "out").exists()


def test_pruning_leaves_a_smaller_ordinary_model(tmp_path, monkeypatch, capsys):
    run("prune_while_training", tmp_path / "out", monkeypatch)
    before, after = map(int, capsys.readouterr().out.splitlines()[-1].removeprefix("parameters: ").split(" -> "))
    assert after < before
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() == after


def test_an_adapter_learns_a_task(tmp_path, monkeypatch, capsys):
    run("compacter_glue", tmp_path / "out", monkeypatch)
    assert "accuracy: " in capsys.readouterr().out
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.cli
def test_recovery_leaves_a_model_and_an_adapter(tmp_path, monkeypatch, capsys):
    run("compress_then_recover", tmp_path / "out", monkeypatch)
    assert "held-out perplexity: " in capsys.readouterr().out
    assert hf_compact.inspect_folder(tmp_path / "out")["is_verified"]
    assert (tmp_path / "out-adapter" / "recovery.json").exists()


@pytest.mark.cli
def test_evaluation_prints_both_models(tmp_path, monkeypatch, capsys):
    run("evaluate_models", tmp_path / "out", monkeypatch)
    lines = [line for line in capsys.readouterr().out.splitlines() if "perplexity" in line]
    assert [line.split(":")[0] for line in lines] == ["tiny", "out", "× dense"]
    results = hf_compact.Results.read(tmp_path / "out.results.json")
    assert f"{results.models[1].perplexity['test.txt']['perplexity']:.3f}" in lines[1]
    assert f"{results.models[1].comparison['speed']['decode']:.2f} times as fast" in lines[2]
    with pytest.raises(SystemExit):
        run("evaluate_models", tmp_path / "again", monkeypatch, "--steps", "3")
    assert "unrecognized arguments: --steps 3" in capsys.readouterr().err


@pytest.mark.cli
def test_what_is_pushed_is_loaded_back(tmp_path):
    """In a process of its own: the address of the Hub is read when it starts."""
    with serve() as hub:
        variables = os.environ | environment(hub, str(tmp_path / "home"))
        command = [sys.executable, str(EXAMPLES / "push.py"), "--quick", "--output", str(tmp_path / "out"), "--repo", "me/tiny"]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "loaded LlamaForCausalLM" in done.stdout
        assert hub.repositories["me/tiny"].private


@pytest.mark.distributed
def test_two_processes_send_fewer_bytes(tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(EXAMPLES / "one_bit_adam.py")]
    done = subprocess.run(
        [sys.executable, *launch, "--quick", "--output", str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Sent by each of 2 ranks" in done.stderr
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() > 0
