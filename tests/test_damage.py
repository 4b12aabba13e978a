"""A folder that is damaged, or from another version, is refused by name; nothing is ever filled with random numbers."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

import hf_compact
from hf_compact.api import inspect_folder
from hf_compact.calibration import from_batches
from hf_compact.errors import FormatError
from tests.conftest import tiny_inputs, tiny_model

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> Path:
    """Two shards of an untied Llama, the embedding and head compressed too."""
    folder = tmp_path_factory.mktemp("damage") / "intact"
    model = tiny_model("llama_untied")
    stages = [{"method": "codebook", "bits": 3, "rounding": "nearest", "group_size": 16, "embedding_bits": 4}]
    hf_compact.compress(model, {"stages": stages}, calibration=from_batches([tiny_inputs("llama")]))
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) >= 2
    return folder


@pytest.fixture
def folder(intact, tmp_path) -> Path:
    return Path(shutil.copytree(intact, tmp_path / "damaged"))


def edit_config(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def edit_tensors(folder: Path, name: str, change: Callable[[dict[str, Tensor], str], object]) -> Path:
    """Change the shard that holds a tensor, and the index with it."""
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    shard = folder / index["weight_map"][name]
    tensors = load_file(shard)
    change(tensors, name)
    save_file(tensors, shard, metadata={"format": "pt"})
    index["weight_map"] = {key: file for key, file in index["weight_map"].items() if file != shard.name}
    index["weight_map"] |= dict.fromkeys(tensors, shard.name)
    index_path.write_text(json.dumps(index))
    return shard


def replace(function: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor], str], None]:
    def change(tensors: dict[str, Tensor], name: str) -> None:
        tensors[name] = function(tensors[name]).contiguous()

    return change


def refused(folder: Path, message: str, cls: type = AutoModelForCausalLM) -> None:
    with pytest.raises(FormatError, match=message):
        cls.from_pretrained(folder)


def test_the_intact_folder_loads(folder):
    assert AutoModelForCausalLM.from_pretrained(folder).config.quantization_config.modules


# config.json


@pytest.mark.parametrize("version", [0, 2, "1", None], ids=repr)
def test_unknown_format_version(folder, version):
    edit_config(folder, lambda q: q.update(format_version=version))
    refused(
        folder,
        rf"quantization_config.format_version must be 1, got {re.escape(repr(version))}: the folder was written by another",
    )


def test_unknown_key(folder):
    edit_config(folder, lambda q: q.update(codec="zip"))
    refused(folder, "quantization_config has the unknown key 'codec'")


def test_no_table(folder):
    edit_config(folder, lambda q: q.update(modules={}))
    refused(folder, "quantization_config.modules must name the compressed modules, got none")


@pytest.mark.parametrize("modules", [None, [], "x", {UP: None}, {UP: "codebook"}], ids=repr)
def test_a_table_that_is_none(folder, modules):
    edit_config(folder, lambda q: q.update(modules=modules))
    refused(folder, "quantization_config.modules")


def test_unknown_layer(folder):
    edit_config(folder, lambda q: q["modules"][UP].update(layer="zip_linear"))
    refused(folder, rf"modules\['{UP}'\].layer must be one of .*codebook_linear.*, got 'zip_linear'")


def test_a_spec_without_a_layer(folder):
    edit_config(folder, lambda q: q["modules"][UP].pop("layer"))
    refused(folder, rf"modules\['{UP}'\].layer must be one of .*, got None")


def test_unknown_setting(folder):
    edit_config(folder, lambda q: q["modules"][UP].update(codec="zip"))
    refused(folder, rf"modules\['{UP}'\] .* does not fit the model: .*'codec'")


@pytest.mark.parametrize(
    "setting",
    [{"bits": 4}, {"bits": 0}, {"bits": "three"}, {"bits": None}, {"grid": "learned"}, {"grid": "magic"}, {"group_size": 0}, {"group_size": -3}, {"group_size": 8}],
    ids=str,
)  # fmt: skip
def test_a_setting_that_is_wrong(folder, setting):
    edit_config(folder, lambda q: q["modules"][UP].update(setting))
    refused(folder, UP)


def test_a_module_that_the_model_does_not_have(folder):
    edit_config(folder, lambda q: q["modules"].update({"model.layers.7.mlp.up_proj": q["modules"][UP]}))
    refused(folder, r"modules\['model.layers.7.mlp.up_proj'\] does not exist in LlamaForCausalLM")


def test_a_module_that_the_table_forgets(folder):
    edit_config(folder, lambda q: q["modules"].pop(UP))
    refused(folder, rf"{UP}\..* is in the files, but LlamaForCausalLM has no such tensor")


def test_a_tie_to_a_module_that_does_not_exist(folder):
    edit_config(folder, lambda q: q["modules"]["lm_head"].update(tied_to="model.nowhere"))
    refused(folder, r"modules\['lm_head'\].tied_to names 'model.nowhere', which LlamaForCausalLM does not have")


# Tensors.


@pytest.mark.parametrize(
    "name", [f"{UP}.weight", f"{UP}.scale", f"{UP}.zero", "model.embed_tokens.weight", "lm_head.weight", "lm_head.scale"]
)
def test_missing_packed_tensor(folder, name):
    edit_tensors(folder, name, lambda tensors, key: tensors.pop(key))
    refused(folder, f"{name} is missing from the files of the model")


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.2.input_layernorm.weight"])
def test_missing_dense_tensor(folder, name):
    edit_tensors(folder, name, lambda tensors, key: tensors.pop(key))
    refused(folder, f"{name} is missing from the files of the model")
    refused(folder, f"{name.removeprefix('model.')} is missing from the files of the model", AutoModel)


def test_missing_dense_head(tmp_path):
    model = tiny_model("llama_untied")
    stages = [{"method": "codebook", "rounding": "nearest", "embedding_bits": None}]
    hf_compact.compress(model, {"stages": stages}, calibration=from_batches([tiny_inputs("llama")]))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    refused(tmp_path, "lm_head.weight is missing from the files of the model")
    AutoModel.from_pretrained(tmp_path)  # which has no head


def test_extra_tensor(folder):
    edit_tensors(folder, f"{UP}.weight", lambda tensors, _: tensors.update({f"{UP}.levels": torch.zeros(1, 8)}))
    refused(folder, rf"{UP}.levels is in the files, but a codebook_linear with these settings has no such tensor")


def test_extra_tensor_outside_the_table(folder):
    edit_tensors(
        folder, f"{UP}.weight", lambda tensors, _: tensors.update({"model.layers.9.mlp.up_proj.weight": torch.zeros(1, 8)})
    )
    refused(folder, r"model.layers.9.mlp.up_proj.weight is in the files, but LlamaForCausalLM has no such tensor")


@pytest.mark.parametrize(
    ("name", "dtype", "rule"),
    [
        (f"{UP}.weight", torch.uint8, "torch.int8, the file has U8"),
        (f"{UP}.scale", torch.float32, "torch.uint8, the file has F32"),
        (f"{UP}.zero", torch.int32, "torch.uint8, the file has I32"),
        ("model.embed_tokens.scale", torch.bfloat16, "torch.float16, the file has BF16"),
    ],
)
def test_wrong_dtype(folder, name, dtype, rule):
    edit_tensors(folder, name, replace(lambda tensor: tensor.to(dtype)))
    refused(folder, f"{name} must be {rule}")


@pytest.mark.parametrize("name", [f"{UP}.weight", f"{UP}.scale", f"{UP}.zero", "lm_head.weight", "model.norm.weight"])
@pytest.mark.parametrize("change", [lambda t: t[:-1], lambda t: t.flatten()[None, None, None]], ids=["shorter", "flat"])
def test_wrong_shape(folder, name, change):
    edit_tensors(folder, name, replace(change))
    refused(folder, rf"{name} must have the shape \[.*\], the file has \[.*\]")


# Files.


@pytest.mark.parametrize("keep", [0, 4, 200, 0.5, -1], ids=str)
def test_truncated_shard(folder, keep):
    shard = sorted(folder.glob("*.safetensors"))[0]
    data = shard.read_bytes()
    shard.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    refused(folder, rf"{shard.name} is not a complete safetensors file")
    with pytest.raises(FormatError, match=rf"{shard.name} is not a complete safetensors file"):
        inspect_folder(folder)


def test_shard_that_is_something_else(folder):
    shard = sorted(folder.glob("*.safetensors"))[-1]
    shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(folder, rf"{shard.name} is not a complete safetensors file")


def test_deleted_shard(folder):
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(OSError, match=re.escape(shard.name)):  # transformers looks for the files itself
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(FormatError, match=rf"lacks the shard {shard.name}, which its index names"):
        inspect_folder(folder)


def test_deleted_index(folder):
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(folder)


# A dense checkpoint that is quantized while it loads.


def test_quantize_on_load_of_a_checkpoint_that_lacks_a_weight(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[f"{UP}.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = hf_compact.CompactConfig(stages=[{"method": "codebook", "rounding": "nearest"}])
    with pytest.raises(FormatError, match=rf"{UP}.weight is missing from the files of the model"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)


# No code in a checkpoint.


def test_nothing_unpickles():
    sources = sorted(Path(hf_compact.__file__).parent.rglob("*.py"))
    assert len(sources) > 20
    forbidden = re.compile(
        r"torch\.load\b|\bpickle\b|\bjoblib\b|\bdill\b|np\.load\b|numpy\.load\b|\beval\(|\bexec\(|weights_only"
    )
    for path in sources:
        hits = [line for line in path.read_text(encoding="utf-8").splitlines() if forbidden.search(line.replace(".eval()", ""))]
        assert not hits, (path, hits)
