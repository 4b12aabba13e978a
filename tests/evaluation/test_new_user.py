"""The path of a new user: its commands are the README's, and its comparison sees a difference."""

import json
from pathlib import Path

import pytest

from evaluation import new_user

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")

FIRST_WORDS = {
    "install and demo": "scripts/demo.sh",
    "Trainer script with one callback": "from transformers import",
    "compress": "hf-compact compress my-model --recipe recipe.yaml --output my-model-4bit",
    "evaluate": "hf-compact evaluate my-model-4bit --compare my-model --text text.txt",
    "evaluate on tasks, with times": "hf-compact evaluate my-model-4bit my-model-pruned --compare my-model --tasks",
    "publish": "hf-compact push my-model-4bit me/my-model-4bit",
    "load back": "import hf_compact",
}


def test_every_step_is_in_the_readme():
    assert list(FIRST_WORDS) == list(new_user.STEPS)
    for name, place in new_user.STEPS.items():
        command = new_user.block(README, *place)
        assert command.startswith(FIRST_WORDS[name]), name
        compile(command if place[1] == "python" else "", name, "exec")
    assert "HessoCallback(" in new_user.block(README, *new_user.STEPS["Trainer script with one callback"])
    assert 'from_pretrained("me/my-model-4bit")' in new_user.block(README, *new_user.STEPS["load back"])


@pytest.mark.parametrize(("theirs", "expected"), [(0.5, (2, 0)), (0.45, (2, 1))])
def test_metrics_are_compared_one_by_one(theirs, expected, tmp_path):
    metrics = {"acc": {"value": 0.25, "stderr": 0.1}, "exact,flexible": {"value": 0.5, "stderr": None}}
    models = [{"name": "small", "tasks": {}}, {"name": "my-model", "tasks": {"piqa": {"metrics": metrics}}}]
    (tmp_path / "ours.json").write_text(json.dumps({"models": models}))
    direct = {"results": {"piqa": {"acc,none": 0.25, "exact,flexible": theirs}}}
    (tmp_path / "theirs.json").write_text(json.dumps(direct))
    assert new_user.differences(tmp_path / "ours.json", tmp_path / "theirs.json") == expected


def test_a_command_that_fails_ends_with_its_log(tmp_path):
    with pytest.raises(SystemExit, match="ended with 3:\nno such thing"):
        new_user.run("echo no such thing; exit 3", tmp_path, tmp_path / "log", {})
