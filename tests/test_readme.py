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
    assert len(blocks("python")) == 5
    assert len(blocks("yaml")) == 1
    assert len(blocks("bash")) == 2


@pytest.mark.cli
def test_python_snippets_run_in_order(workplace):
    program = workplace / "snippets.py"
    program.write_text("\n".join(blocks("python")), encoding="utf-8")
    done = subprocess.run([sys.executable, program.name], cwd=workplace, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "bits per weight" in done.stdout
    for name in ("my-model-4bit", "my-model-3bit"):
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
