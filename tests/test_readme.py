import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
import yaml
from typer.testing import CliRunner

from hf_compact import cli
from hf_compact.calibration import builtin_text
from tests.tasks import write_tasks

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, dense_folder) -> Path:
    """A folder in which the names of the README exist; the recipe is the README's with less calibration."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "my-model").symlink_to(dense_folder)
    (folder / "text.txt").write_text(builtin_text("evaluation")[:60_000], encoding="utf-8")
    recipe = yaml.safe_load(blocks("yaml")[0])
    recipe["calibration"] = {"num_sequences": 4, "sequence_length": 64}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return folder


def test_the_readme_has_the_snippets_that_are_tested():
    assert len(blocks("python")) == 7
    assert len(blocks("yaml")) == 1
    assert len(blocks("bash")) == 3


@pytest.mark.cli
def test_python_snippets_run_in_order(workplace):
    program = workplace / "snippets.py"
    program.write_text("\n".join(blocks("python")[:-1]), encoding="utf-8")  # the last one loads from the Hub
    done = subprocess.run([sys.executable, program.name], cwd=workplace, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "bits per weight" in done.stdout
    for name in ("my-model-4bit", "my-model-3bit", "my-model-pruned"):
        assert list((workplace / name).glob("*.safetensors"))


@pytest.mark.cli
def test_commands_run_in_order(workplace, tmp_path, monkeypatch):
    for name in ("my-model", "text.txt", "recipe.yaml"):
        (tmp_path / name).symlink_to(workplace / name)
    commands = blocks("bash")[1].splitlines()
    assert len(commands) == 5
    monkeypatch.chdir(tmp_path)
    for command in commands:
        program, *arguments = command.split()
        assert program == "hf-compact"
        done = CliRunner().invoke(cli.app, arguments)
        assert done.exit_code == 0, f"{command}\n{done.stderr}"
        assert done.stdout.strip()


@pytest.mark.cli
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # how huggingface_hub hands files to its HTTP library
def test_what_was_made_is_measured_published_and_loaded_back(workplace, tmp_path, monkeypatch, hub):
    """The models are those of the snippets; rows of the tasks lie here, the Hub is on loopback and nobody logs in."""
    pytest.importorskip("lm_eval")
    for name in ("my-model", "text.txt", "my-model-4bit", "my-model-pruned"):
        (tmp_path / name).symlink_to(workplace / name)
    commands = blocks("bash")[2].splitlines()
    assert [command.split()[:2] for command in commands] == [
        ["hf-compact", "evaluate"], ["hf-compact", "evaluate"], ["hf", "auth"], ["hf-compact", "push"],
    ]  # fmt: skip
    commands[1] += f" --task-data {write_tasks(tmp_path)} --prompt-tokens 8 --new-tokens 2 --repeats 1"
    monkeypatch.chdir(tmp_path)
    for command in (*commands[:2], commands[3]):
        done = CliRunner().invoke(cli.app, command.split()[1:])
        assert done.exit_code == 0, f"{command}\n{done.stderr}"
        assert done.stdout.strip()
    assert "me/my-model-4bit" in hub.repositories
    found: dict = {}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    exec(blocks("python")[-1], found)
    assert type(found["model"].model.layers[0].mlp.up_proj).__name__ == "CodebookLinear"


def test_scripts_that_the_readme_names_exist_and_can_run():
    scripts = blocks("bash")[0].split()
    assert scripts == ["scripts/demo.sh", "scripts/test.sh"]
    for script in [*scripts, "scripts/style.sh", ".ci/run"]:
        assert os.access(ROOT / script, os.X_OK), script


def test_links_point_to_files():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_families_named_in_the_readme_are_in_the_table():
    from hf_compact.arch import FAMILIES

    named = README.split("## Which models")[1].split("##")[0]
    for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "GPT-2", "GPT-NeoX", "OPT", "BERT", "T5", "ViT"):
        assert family in named
        assert family.lower().replace("-2", "2").replace("-neox", "_neox") in FAMILIES
    assert transformers.__version__.startswith("5.")
