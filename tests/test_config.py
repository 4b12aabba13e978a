"""Recipes: one vocabulary for Python, dicts and YAML, and an error that names the key for everything else."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml

from hf_compact import CalibrationConfig, CodebookConfig, Recipe, compress
from hf_compact.config import check_device
from hf_compact.errors import ConfigError
from tests.conftest import tiny_model

#: id -> (recipe, message)
REFUSED = {
    "not_a_mapping": (["codebook"], "recipe must be a mapping with the key 'stages', got list"),
    "empty": (None, "recipe must be a mapping with the key 'stages', got NoneType"),
    "unknown_key": ({"stages": [], "bits": 4}, "recipe has the unknown key 'bits'; known keys: stages, calibration, reconstruction, distillation, seed, dtype, auto_map"),
    "key_that_is_no_text": ({4: "stages"}, "recipe has the unknown key 4"),
    "no_stages": ({"seed": 1}, "recipe.stages must be a list of mappings, got None"),
    "stages_as_mapping": ({"stages": {"method": "codebook"}}, "recipe.stages must be a list of mappings, got {'method': 'codebook'}"),
    "stages_empty": ({"stages": []}, r"recipe.stages must name at least one stage, got \[\]"),
    "stage_is_text": ({"stages": ["codebook"]}, r"recipe.stages\[0\] must be a mapping with the key 'method', got 'codebook'"),
    "stage_without_method": ({"stages": [{"bits": 4}]}, r"recipe.stages\[0\] must be a mapping with the key 'method', got {'bits': 4}"),
    "unknown_method": ({"stages": [{"method": "cookbook"}]}, r"recipe.stages\[0\].method must be one of \[.*'codebook'.*\], got 'cookbook'"),
    "method_as_list": ({"stages": [{"method": ["codebook"]}]}, r"recipe.stages\[0\].method must be one of .*, got \['codebook'\]"),
    "stage_key": ({"stages": [{"method": "codebook", "wbits": 4}]}, "codebook has the unknown key 'wbits'; known keys: include, exclude, bits"),
    "stage_value": ({"stages": [{"method": "codebook", "bits": 5}]}, "codebook.bits must be one of 2, 3, 4, 8, got 5"),
    "bits_as_text": ({"stages": [{"method": "codebook", "bits": "4"}]}, "codebook.bits must be one of 2, 3, 4, 8, got '4'"),
    "bits_as_float": ({"stages": [{"method": "codebook", "bits": 4.0}]}, "codebook.bits must be one of 2, 3, 4, 8, got 4.0"),
    "include_as_text": ({"stages": [{"method": "codebook", "include": "*.q"}]}, r"codebook.include must be a list of a string, got '\*.q'"),
    "include_of_numbers": ({"stages": [{"method": "codebook", "include": [1]}]}, "codebook.include must be a string, got 1"),
    "number": ({"stages": [{"method": "codebook", "damp": "x"}]}, "codebook.damp must be a number, got 'x'"),
    "number_is_no_flag": ({"stages": [{"method": "codebook", "damp": True}]}, "codebook.damp must be a number, got True"),
    "whole_number": ({"stages": [{"method": "codebook", "group_size": 64.0}]}, "codebook.group_size must be a whole number or null, got 64.0"),
    "whole_is_no_flag": ({"stages": [{"method": "codebook", "shrink_steps": True}]}, "codebook.shrink_steps must be a whole number, got True"),
    "flag": ({"stages": [{"method": "codebook", "symmetric": 1}]}, "codebook.symmetric must be true or false, got 1"),
    "calibration_as_text": ({"stages": [{"method": "codebook"}], "calibration": "wiki.txt"}, "calibration must be a mapping, got 'wiki.txt'"),
    "calibration_key": ({"stages": [{"method": "codebook"}], "calibration": {"tokens": 1}}, "calibration has the unknown key 'tokens'"),
    "calibration_type": (
        {"stages": [{"method": "codebook"}], "calibration": {"batch_size": "4"}}, "calibration.batch_size must be a whole number, got '4'",
    ),
    "calibration_range": ({"stages": [{"method": "codebook"}], "calibration": {"batch_size": 0}}, "calibration.batch_size must be at least 1, got 0"),
    "seed": ({"stages": [{"method": "codebook"}], "seed": "one"}, "recipe.seed must be a whole number, got 'one'"),
    "dtype": (
        {"stages": [{"method": "codebook"}], "dtype": "int8"}, "recipe.dtype must be one of auto, float32, bfloat16, float16, got 'int8'",
    ),
    "auto_map": ({"stages": [{"method": "codebook"}], "auto_map": "yes"}, "recipe.auto_map must be true or false, got 'yes'"),
}  # fmt: skip

FULL = Recipe(
    stages=(CodebookConfig(bits=3, grid="learned", group_size=None, exclude=("*.0.*",)), CodebookConfig(rounding="nearest")),
    calibration=CalibrationConfig(num_sequences=3, sequence_length=5, batch_size=2),
    seed=7,
    dtype="bfloat16",
    auto_map=True,
)

RECIPES = sorted((Path(__file__).parents[1] / "configs" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize(("values", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        Recipe.from_dict(values)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(CalibrationConfig)])
def test_calibration_sizes_are_positive(name):
    with pytest.raises(ConfigError, match=f"calibration.{name} must be at least 1, got 0"):
        CalibrationConfig(**{name: 0})


def test_recipe_in_python_is_checked_too():
    with pytest.raises(ConfigError, match=r"recipe.stages must name at least one stage, got \[\]"):
        Recipe(stages=())
    with pytest.raises(ConfigError, match=r"recipe.dtype must be one of auto, float32, bfloat16, float16, got 'int4'"):
        Recipe(stages=(CodebookConfig(),), dtype="int4")


@pytest.mark.parametrize("recipe", [FULL, Recipe(stages=(CodebookConfig(),))], ids=["full", "defaults"])
def test_round_trip(recipe, tmp_path):
    values = recipe.to_dict()
    assert Recipe.from_dict(values) == recipe
    assert Recipe.from_dict(json.loads(json.dumps(values))) == recipe
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert Recipe.from_yaml(path) == recipe
    assert Recipe.from_yaml(str(path)) == recipe


def test_dict_holds_every_field():
    values = FULL.to_dict()
    assert list(values) == [f.name for f in dataclasses.fields(Recipe)]
    assert list(values["calibration"]) == [f.name for f in dataclasses.fields(CalibrationConfig)]
    for stage in values["stages"]:
        assert list(stage) == ["method", *(f.name for f in dataclasses.fields(CodebookConfig))]


def test_what_is_not_given_takes_its_default():
    assert Recipe.from_dict({"stages": [{"method": "codebook"}]}) == Recipe(stages=(CodebookConfig(),))


def test_whole_numbers_serve_as_numbers():
    (stage,) = Recipe.from_dict({"stages": [{"method": "codebook", "damp": 1}]}).stages
    assert stage.damp == 1.0
    assert isinstance(stage.damp, float)


def test_lists_become_tuples():
    (stage,) = Recipe.from_dict({"stages": [{"method": "codebook", "include": ["a", "b"]}]}).stages
    assert stage.include == ("a", "b")


def test_from_dict_leaves_its_input():
    values = FULL.to_dict()
    before = json.dumps(values)
    Recipe.from_dict(values)
    assert json.dumps(values) == before


def test_file_is_missing(tmp_path):
    with pytest.raises(ConfigError, match=r"recipe must be a YAML file, got '.*none.yaml', which does not exist$"):
        Recipe.from_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_that_comes_along_has_a_name(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Recipe.from_yaml(path.stem) == Recipe.from_yaml(path)


def test_a_file_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("prune-20").write_text("stages: [{method: codebook, bits: 8}]")
    assert Recipe.from_yaml("prune-20").stages[0].bits == 8


@pytest.mark.parametrize("name", ["prune-20.yaml", "recipes/prune-20"])
def test_a_missing_file_is_named_as_what_comes_along(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"got '{name}', which does not exist: did you mean prune-20\?"):
        Recipe.from_yaml(name)
    with pytest.raises(ConfigError, match=r"got 'entropy', which does not exist: did you mean .*candidates/entropy\.yaml\?"):
        Recipe.from_yaml("entropy")


def test_file_is_a_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"recipe '.*' cannot be read: .*Is a directory"):
        Recipe.from_yaml(tmp_path)


def test_file_is_not_text(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"recipe '.*recipe.yaml' cannot be read: .*decode"):
        Recipe.from_yaml(path)


def test_file_is_not_yaml(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("stages: [", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"recipe '.*recipe.yaml' is not valid YAML"):
        Recipe.from_yaml(path)


def test_file_is_empty(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.touch()
    with pytest.raises(ConfigError, match="recipe must be a mapping with the key 'stages', got NoneType"):
        Recipe.from_yaml(path)


@pytest.mark.parametrize("device", ["cpuu", "meta", "cuda:99", None, "mps"])
def test_a_device_that_cannot_be_used_is_named(device):
    with pytest.raises(ConfigError, match=f"device {device!r} is not to be had: "):
        check_device(device, needs_double=True)
    assert check_device("cpu", needs_double=True) == check_device(torch.device("cpu")) == "cpu"


def test_a_model_in_memory_stays_on_its_device():
    with pytest.raises(
        ConfigError, match=r"device is for a model given by name, one in memory stays on its own \(cpu\), got 'cuda'"
    ):
        compress(tiny_model("llama"), {"stages": [{"method": "codebook"}]}, device="cuda")
