"""What docs/pruning.md says about a pruned model runs as it stands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import hf_compact
from hf_compact import api, cli

TEXT = (Path(__file__).parents[3] / "docs" / "pruning.md").read_text(encoding="utf-8")


@pytest.fixture
def workplace(dense_folder, text_file, tmp_path, monkeypatch) -> Path:
    """The names of the page."""
    monkeypatch.chdir(tmp_path)
    Path("my-model").symlink_to(dense_folder)
    Path("text.txt").symlink_to(text_file)
    with monkeypatch.context() as patch:
        patch.setattr(api.verify, "verify", lambda *args: {"verified": True, "seconds": 0.0})
        recipe = {
            "stages": [{"method": "pruning", "channel_sparsity": 0.5}],
            "calibration": {"num_sequences": 4, "sequence_length": 64},
        }
        hf_compact.compress("my-model", recipe, output="smaller", calibration=["text.txt"])
    return tmp_path


def logits(folder: str) -> torch.Tensor:
    ids = AutoTokenizer.from_pretrained("my-model")(Path("text.txt").read_text(encoding="utf-8")).input_ids[:2048]
    with torch.no_grad():
        return (
            AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=torch.tensor(ids).view(-1, 64)).logits.log_softmax(-1)
        )


def test_recovery_leaves_an_ordinary_model_that_is_nearer_to_the_dense_one(workplace):
    (program,) = (code for code in re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL) if "LoraConfig" in code)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = AutoModelForCausalLM.from_pretrained("recovered")
    assert found.config.intermediate_size == 40
    assert not hasattr(found.config, "quantization_config")
    dense = logits("my-model")
    away = {name: float((dense.exp() * (dense - logits(name))).sum(-1).mean()) for name in ("smaller", "recovered")}
    assert away["recovered"] < away["smaller"]


@pytest.mark.cli
def test_commands_run(workplace):
    commands = [line for code in re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL) for line in code.splitlines()]
    assert [command.split()[1] for command in commands] == ["compress", "compare", "recover"]
    for command in commands[1:]:
        done = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(cli.app, command.split()[1:])
        assert done.exit_code == 0, done.stderr
    assert Path("removed.png").is_file()
    assert Path("smaller-adapter").is_dir()
