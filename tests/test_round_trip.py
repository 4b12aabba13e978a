"""Compress, save, load with stock `from_pretrained`: the same logits, twice, in every family and in every way of loading."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import hf_compact
from hf_compact.calibration import from_batches
from hf_compact.capture import BlockRunner
from hf_compact.errors import ConfigError, UnsupportedModel
from hf_compact.methods.codebook import CodebookLinear
from hf_compact.stored import dense_once
from tests.conftest import FAMILIES, VOCABULARY, tiny_inputs, tiny_model

TIED = {"llama", "qwen2", "gemma3", "gpt2", "opt", "bert_mlm"}
AUTO = {
    "bert": "AutoModel",
    "bert_mlm": "AutoModelForMaskedLM",
    "t5": "AutoModelForSeq2SeqLM",
    "vit": "AutoModelForImageClassification",
}
CAUSAL = [family for family in FAMILIES if family not in AUTO]


def recipe(**settings) -> dict:
    return {"stages": [{"method": "codebook", "bits": 4, "group_size": 16, "refit_rounds": 1, "shrink_steps": 4} | settings]}


def auto_class(family: str) -> type:
    return getattr(transformers, AUTO.get(family, "AutoModelForCausalLM"))


def compress(model: transformers.PreTrainedModel, family: str, **settings) -> transformers.PreTrainedModel:
    batches = [tiny_inputs(family, seed=seed) for seed in (1, 2)]
    hf_compact.compress(model, recipe(**settings), calibration=from_batches(batches))
    return model


@torch.no_grad()
def logits(model: transformers.PreTrainedModel, family: str, **kwargs) -> Tensor:
    return model.eval()(**tiny_inputs(family), **kwargs)[0]


def load(cls: type, folder: Path, **kwargs) -> transformers.PreTrainedModel:
    """Load and insist that transformers found every tensor where it expected it, and none beside them."""
    model, info = cls.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert {key: value for key, value in info.items() if value} == {}
    return model


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def assert_same_tensors(first: Path, second: Path) -> None:
    """The same names, and for each the same dtype, shape and bytes."""
    a, b = stored(first), stored(second)
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert torch.equal(a[name].contiguous().view(-1).view(torch.uint8), b[name].contiguous().view(-1).view(torch.uint8)), name


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """family, dtype, overrides -> folder of a compressed model and what it gave for `tiny_inputs` before it was saved."""
    done: dict[tuple, tuple[Path, Tensor]] = {}

    def make(family: str, dtype: torch.dtype = torch.float32, **overrides) -> tuple[Path, Tensor]:
        key = (family, dtype, *sorted(overrides.items()))
        if key not in done:
            folder = tmp_path_factory.mktemp("compressed") / family
            model = compress(tiny_model(family, dtype, **overrides), family)
            model.save_pretrained(folder)
            done[key] = folder, logits(model, family)
        return done[key]

    return make


# Every family.


@pytest.mark.parametrize("family", FAMILIES)
def test_reload_gives_the_logits_of_the_saved_model(family, saved, tmp_path):
    folder, expected = saved(family)
    first = load(auto_class(family), folder)
    assert torch.equal(logits(first, family), expected)
    first.save_pretrained(tmp_path / "again")
    assert_same_tensors(folder, tmp_path / "again")
    second = load(getattr(transformers, FAMILIES[family][1]), tmp_path / "again")
    assert torch.equal(logits(second, family), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_reload_equals_reload(family, saved, tmp_path):
    folder, before = saved(family, torch.bfloat16)
    first = load(auto_class(family), folder)
    assert first.dtype == torch.bfloat16
    expected = logits(first, family)
    assert expected.dtype == torch.bfloat16
    assert torch.equal(expected, before)  # made in bfloat16 and not cast, so even the rotary tables agree
    first.save_pretrained(tmp_path)
    assert_same_tensors(folder, tmp_path)
    assert torch.equal(logits(load(auto_class(family), tmp_path), family), expected)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"bert", "vit", "llama", "llama_untied", "t5"}))
def test_the_other_choice_of_tying(family, saved, tmp_path):
    tie = family not in TIED
    folder, expected = saved(family, tie_word_embeddings=tie)
    model = load(auto_class(family), folder)
    assert torch.equal(logits(model, family), expected)
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    assert any(name.startswith(head + ".weight") for name in stored(folder)) == (not tie)
    model.save_pretrained(tmp_path)
    assert_same_tensors(folder, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_really_packed(family, saved):
    folder, _ = saved(family)
    table = json.loads((folder / "config.json").read_text())["quantization_config"]["modules"]
    tensors = stored(folder)
    packed = [name for name, tensor in tensors.items() if tensor.dtype == torch.int8 and tensor.dim() == 3]
    assert len(packed) == sum("tied_to" not in spec for spec in table.values()) > 0
    dense = sum(p.numel() * 4 for p in tiny_model(family).parameters())
    assert sum(t.nbytes for t in tensors.values()) < 0.5 * dense


@pytest.mark.parametrize("family", FAMILIES)
def test_dequantize_gives_the_same_model_without_us(family, saved, tmp_path):
    folder, expected = saved(family)
    dense = load(auto_class(family), folder).dequantize()
    assert getattr(dense, "hf_quantizer", None) is None
    assert not any(isinstance(module, CodebookLinear) for module in dense.modules())
    found = logits(dense, family)
    if family == "gpt2":  # Conv1D adds the bias inside the product
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(found, expected)
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    plain = tiny_model(family)
    assert stored(tmp_path).keys() == _saved_names(plain, tmp_path / "plain")
    again = load(auto_class(family), tmp_path)
    assert [type(m) for m in again.modules()] == [type(m) for m in plain.modules()]
    assert torch.equal(logits(again, family), found)


def _saved_names(model: transformers.PreTrainedModel, folder: Path) -> set[str]:
    model.save_pretrained(folder)
    return set(stored(folder))


def test_dequantized_gpt2_has_its_conv1d_again(saved):
    dense = load(transformers.AutoModelForCausalLM, saved("gpt2")[0]).dequantize()
    assert isinstance(dense.transformer.h[0].attn.c_attn, Conv1D)
    assert dense.lm_head.weight is dense.transformer.wte.weight


def test_dequantize_in_memory_before_saving():
    model = compress(tiny_model("llama"), "llama")
    expected = logits(model, "llama")
    assert torch.equal(logits(model.dequantize(), "llama"), expected)
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)


@pytest.mark.parametrize("family", FAMILIES)
def test_block_by_block_output_is_the_forward_pass_of_the_result(family):
    """What the verification compares with: the runner's own last output is the whole model's."""
    seen = {}
    original = BlockRunner.run

    def run(self, *args):
        seen["logits"] = original(self, *args)
        seen["probe"] = self.batches[-1]
        return seen["logits"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockRunner, "run", run)
        model = compress(tiny_model(family), family, rounding="nearest")
    with torch.no_grad():
        whole = model(**seen["probe"])[0]
    torch.testing.assert_close(seen["logits"], whole, rtol=1e-5, atol=1e-5)


def test_an_input_that_was_cast_to_the_packed_dtype_is_refused():
    layer = compress(tiny_model("llama"), "llama", rounding="nearest").model.layers[0].mlp.up_proj
    with pytest.raises(UnsupportedModel, match=r"must be floating point, got torch.int8: exclude the layer"):
        layer(torch.ones(2, 32).to(layer.weight.dtype))


# Ways of loading.


@pytest.mark.parametrize("family", ["llama", "llama_untied", "gpt2", "t5"])
def test_sharded(family, saved, tmp_path):
    folder, expected = saved(family)
    load(auto_class(family), folder).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) >= 2
    assert_same_tensors(folder, tmp_path)
    assert torch.equal(logits(load(auto_class(family), tmp_path), family), expected)


@pytest.mark.parametrize("method", ["codebook", "nested", "entropy"])
def test_a_tied_head_is_stored_once_wherever_the_model_goes(method, tmp_path):
    model = tiny_model("llama")
    bits = {"bits": 4.0} if method == "entropy" else {}
    hf_compact.compress(model, {"stages": [{"method": method, **bits}]}, calibration=from_batches([tiny_inputs("llama")]))
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for made in (model, again):
        made._apply(lambda tensor: tensor.clone())  # as a move to another device
        embedding, head = made.get_input_embeddings(), made.get_output_embeddings()
        shared = [name for name in head._buffers if name in embedding._buffers]
        assert shared
        assert all(head._buffers[name].data_ptr() == embedding._buffers[name].data_ptr() for name in shared)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
@pytest.mark.parametrize("family", ["llama", "llama_untied", "gpt2", "gemma3"])
def test_device_map(family, device_map, saved):
    folder, expected = saved(family)
    assert torch.equal(logits(load(auto_class(family), folder, device_map=device_map), family), expected)


@pytest.mark.parametrize(
    ("family", "on_disk"),
    [
        ("llama", ["model.layers.1", "model.layers.2"]),
        ("llama_untied", ["model.layers.0", "model.layers.1", "model.layers.2", "lm_head"]),
        ("gpt2", ["transformer.h.0", "transformer.h.2"]),
        ("opt", ["model.decoder.layers.1"]),
    ],
)
def test_disk_offload(family, on_disk, saved, tmp_path):
    folder, expected = saved(family)
    skeleton = tiny_model(family)
    leaves = {name.rpartition(".")[0] for name in skeleton.state_dict()}
    blocks = {
        block.partition("layers.")[0] + "layers." if "layers." in block else "transformer.h." for block in on_disk[:1]
    }.pop()
    units = {blocks + leaf.removeprefix(blocks).split(".")[0] if leaf.startswith(blocks) else leaf for leaf in leaves}
    device_map = {unit: "disk" if unit in on_disk else "cpu" for unit in sorted(units)}
    model = load(auto_class(family), folder, device_map=device_map, offload_folder=tmp_path)
    assert torch.equal(logits(model, family), expected)


@pytest.mark.parametrize("family", [*CAUSAL, "t5"])
def test_generate(family, saved):
    folder, _ = saved(family)
    inputs = {"input_ids": tiny_inputs(family)["input_ids"]}
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(inputs["input_ids"])}
    once = load(auto_class(family), folder).generate(**inputs, **settings)
    twice = load(auto_class(family), folder).generate(**inputs, **settings, use_cache=False)
    assert torch.equal(once, twice)
    assert once.max() < VOCABULARY


@pytest.mark.parametrize("family", CAUSAL)
def test_base_class_on_a_causal_folder(family, saved):
    folder, expected = saved(family)
    base, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    causal = load(auto_class(family), folder)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    head = {name for name in stored(folder) if not name.startswith(causal.base_model_prefix + ".")}
    assert set(info["unexpected_keys"]) == head  # as for a dense folder: the base class has no head
    with torch.no_grad():
        hidden = base.eval()(**tiny_inputs(family))[0]
        found = causal.get_output_embeddings()(hidden)
    assert torch.equal(found, expected)


def test_base_class_can_be_saved_and_loaded(saved, tmp_path):
    base = transformers.AutoModel.from_pretrained(saved("llama")[0])
    expected = logits(base, "llama")
    base.save_pretrained(tmp_path)
    assert torch.equal(logits(load(transformers.AutoModel, tmp_path), "llama"), expected)


def test_another_head_is_new_and_all_else_is_there(saved):
    """As with a dense folder: transformers says which part the class adds, and only that part is random."""
    folder, _ = saved("bert_mlm")
    own = load(transformers.AutoModelForMaskedLM, folder)
    for cls, new in ((transformers.AutoModel, "pooler."), (transformers.AutoModelForSequenceClassification, "classifier.")):
        model, info = cls.from_pretrained(folder, output_loading_info=True)
        assert info["missing_keys"]
        assert all(new in key or "pooler." in key for key in info["missing_keys"])
        with torch.no_grad():
            hidden = [m.base_model.eval()(**tiny_inputs("bert"))[0] for m in (model, own)]
        assert torch.equal(*hidden)


def test_dtype_override_keeps_the_packed_state(saved):
    folder, _ = saved("llama")
    model = load(transformers.AutoModelForCausalLM, folder, dtype=torch.bfloat16)
    assert model.model.norm.weight.dtype == torch.bfloat16
    layer = model.model.layers[0].mlp.up_proj
    assert (layer.weight.dtype, layer.scale.dtype, layer.row_scale.dtype) == (torch.int8, torch.uint8, torch.float16)
    assert logits(model, "llama").dtype == torch.bfloat16


def test_whatever_the_default_dtype_is(saved):
    folder, expected = saved("llama")
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = load(transformers.AutoModelForCausalLM, folder)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(logits(model, "llama"), expected)


# Grids, bits and groups.

SETTINGS = {
    "uniform-2": {"bits": 2},
    "uniform-3": {"bits": 3},
    "uniform-4": {"bits": 4},
    "uniform-8": {"bits": 8},
    "uniform-2-symmetric": {"bits": 2, "symmetric": True},
    "uniform-8-symmetric": {"bits": 8, "symmetric": True},
    "nf4": {"grid": "nf4"},
    "power": {"grid": "power", "bits": 3},
    "powers-of-two": {"grid": "pot", "bits": 3},
    "split-2": {"grid": "split", "bits": 2},
    "split-4": {"grid": "split", "bits": 4},
    "learned-2": {"grid": "learned", "bits": 2},
    "learned-3": {"grid": "learned", "bits": 3, "rows_per_codebook": 7},
    "learned-4": {"grid": "learned", "bits": 4},
    "learned-4-one-table": {"grid": "learned", "bits": 4, "rows_per_codebook": 1000},
    "float16-scales": {"bits": 3, "scale_bits": None},
    "small-scales": {"bits": 3, "scale_bits": 5},
    "whole-rows": {"bits": 3, "group_size": None},
    "ragged-groups": {"bits": 3, "group_size": 25},
    "embedding-4-groups": {"embedding_bits": 4, "embedding_group_size": 8},
    "embedding-dense": {"embedding_bits": None},
    "some-layers": {"include": ("*.mlp.*",), "exclude": ("*.1.mlp.*",)},
}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_every_grid(settings, family, tmp_path):
    model = compress(tiny_model(family), family, **settings | {"rounding": "nearest"})
    expected = logits(model, family)
    model.save_pretrained(tmp_path / "first")
    again = load(auto_class(family), tmp_path / "first")
    assert torch.equal(logits(again, family), expected)
    again.save_pretrained(tmp_path / "second")
    assert_same_tensors(tmp_path / "first", tmp_path / "second")


@pytest.mark.parametrize(
    "settings",
    [{"bits": 2}, {"grid": "nf4"}, {"grid": "learned", "bits": 3}, {"bits": 3, "scale_bits": 5}, {"exclude": ("*.layers.1.*",)}],
    ids=str,
)
def test_grids_with_feedback(settings, tmp_path):
    model = compress(tiny_model("llama_untied"), "llama_untied", **settings)
    expected = logits(model, "llama_untied")
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(transformers.AutoModelForCausalLM, tmp_path), "llama_untied"), expected)


# Padding.


def padded_batch(seed: int, filler: int) -> dict[str, Tensor]:
    inputs = tiny_inputs("bert", batch=3, length=20, seed=seed)
    mask = torch.ones_like(inputs["input_ids"])
    for row, length in enumerate((20, 11, 4)):
        mask[row, length:] = 0
        inputs["input_ids"][row, length:] = filler
    return inputs | {"attention_mask": mask, "token_type_ids": torch.zeros_like(mask)}


def test_sentence_encoder_with_padding(tmp_path):
    """A MiniLM-like encoder: what stands in the padding changes neither the result nor its outputs."""
    models = []
    for filler in (2, 77):
        model = tiny_model("bert")
        hf_compact.compress(model, recipe(bits=3), calibration=from_batches([padded_batch(seed, filler) for seed in (1, 2)]))
        models.append(model)
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    models[0].save_pretrained(tmp_path)
    loaded = load(transformers.AutoModel, tmp_path).eval()
    inputs = padded_batch(5, 2)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs)[0], models[0].eval()(**inputs)[0])
        kept = inputs["attention_mask"].bool()
        other = loaded(**padded_batch(5, 99))[0][kept]
        torch.testing.assert_close(loaded(**inputs)[0][kept], other, rtol=1e-5, atol=1e-5)


# Quantize while loading.

NEAREST = {"method": "codebook", "bits": 4, "rounding": "nearest"}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *((family, {}) for family in CAUSAL),
        *((family, {"embedding_bits": None}) for family in ("llama", "llama_untied", "gpt2")),
        *((family, {"grid": "learned", "bits": 3}) for family in ("llama", "llama_untied", "gpt2")),
    ],
    ids=str,
)
def test_quantize_on_load_equals_offline(family, settings, tmp_path):
    dense = tiny_model(family)
    dense.save_pretrained(tmp_path / "dense")
    offline = tiny_model(family)
    hf_compact.compress(offline, {"stages": [NEAREST | settings]}, calibration=from_batches([tiny_inputs(family)]))
    config = hf_compact.CompactConfig(stages=[NEAREST | settings])
    online = load(transformers.AutoModelForCausalLM, tmp_path / "dense", quantization_config=config)
    expected, found = offline.state_dict(), online.state_dict()
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    assert torch.equal(logits(online, family), logits(offline, family))
    online.save_pretrained(tmp_path / "online")
    offline.save_pretrained(tmp_path / "offline")
    assert_same_tensors(tmp_path / "offline", tmp_path / "online")
    tables = [json.loads((tmp_path / kind / "config.json").read_text())["quantization_config"] for kind in ("offline", "online")]
    assert tables[0] == tables[1]
    again = load(transformers.AutoModelForCausalLM, tmp_path / "online")
    assert torch.equal(logits(again, family), logits(offline, family))


def test_quantize_on_load_of_a_sharded_checkpoint(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "one")
    tiny_model("llama").save_pretrained(tmp_path / "many", max_shard_size="30KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = (
        load(transformers.AutoModelForCausalLM, tmp_path / kind, quantization_config=hf_compact.CompactConfig(stages=[NEAREST]))
        for kind in ("one", "many")
    )
    assert torch.equal(logits(one, "llama"), logits(many, "llama"))


def test_quantize_on_load_needs_a_stage_without_calibration(dense_folder):
    config = hf_compact.CompactConfig(stages=[{"method": "codebook", "bits": 4, "rounding": "gptq"}])
    with pytest.raises(ConfigError, match="needs calibration, which loading has not: use a stage that needs none"):
        transformers.AutoModelForCausalLM.from_pretrained(dense_folder, quantization_config=config)


def test_a_compressed_model_is_not_compressed_again():
    model = compress(tiny_model("llama"), "llama", rounding="nearest")
    with pytest.raises(UnsupportedModel, match=r"quantized already \(hf_compact\): give the dense model"):
        compress(model, "llama")


# Without the import.

LOUD = """
import json, sys
import torch, transformers
errors = {}
for folder in json.loads(sys.argv[1]):
    try:
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    except Exception as error:
        errors[folder] = error
assert "hf_compact" not in sys.modules
ids = torch.tensor(json.loads(sys.argv[3]))
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True).eval()
with torch.no_grad():
    logits = model(ids)[0]
model.save_pretrained("again")
again = transformers.AutoModelForCausalLM.from_pretrained("again", trust_remote_code=True).eval()
with torch.no_grad():
    assert torch.equal(again(ids)[0], logits)
print(json.dumps({"errors": {folder: str(error) for folder, error in errors.items()}, "logits": logits.tolist(), "imported": "hf_compact" in sys.modules}))
raise next(iter(errors.values()))
"""


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """One process that never imports this library tries every folder; then one folder with the stub."""
    root = tmp_path_factory.mktemp("stock")
    folders = []
    for family, bits in [("llama", 2), ("llama", 3), ("llama", 4), ("llama", 8), ("llama_untied", 8), ("gpt2", 8), ("gpt2", 4)]:
        for embedding_bits in (8, None):
            model = compress(tiny_model(family), family, bits=bits, embedding_bits=embedding_bits, rounding="nearest")
            folders.append(root / f"{family}-{bits}-{embedding_bits}")
            model.save_pretrained(folders[-1])
    model = tiny_model("llama")
    stub = root / "stub"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_compact.verify.verify", lambda *args: {"verified": True, "perplexity": None, "seconds": 0.0})
        calibration = from_batches([tiny_inputs("llama", seed=1)])
        hf_compact.compress(model, recipe(bits=3) | {"auto_map": True}, calibration=calibration, output=stub)
    ids = tiny_inputs("llama")["input_ids"]
    arguments = [json.dumps([str(folder) for folder in folders]), str(stub), json.dumps(ids.tolist())]
    done = subprocess.run(
        [sys.executable, "-c", LOUD, *arguments], capture_output=True, text=True, check=False,
        env=os.environ | {"HF_HOME": str(root / "home")}, cwd=root,
    )  # fmt: skip
    assert done.stdout.startswith("{"), done.stderr
    return done, json.loads(done.stdout), folders, logits(model, "llama")


def test_without_us_loading_fails_loudly(stock):
    done, found, folders, _ = stock
    assert len(folders) == 14
    for folder in folders:
        assert "ignore_mismatched_sizes" in found["errors"][str(folder)], folder
    assert done.returncode != 0
    assert "size mismatch" in done.stderr


def test_the_stub_imports_us(stock):
    _, found, folders, expected = stock
    assert found["imported"]
    assert "import hf_compact" in (folders[0].parent / "again" / "modeling_hf_compact.py").read_text()
    assert torch.equal(torch.tensor(found["logits"]), expected)


def test_what_is_made_dense_does_not_grow_with_the_batches(monkeypatch):
    made, to_dense = [], CodebookLinear.to_dense
    monkeypatch.setattr(CodebookLinear, "to_dense", lambda *args, **kwargs: made.append(0) or to_dense(*args, **kwargs))
    counts = []
    for number in (2, 6):
        made.clear()
        batches = [tiny_inputs("llama", seed=seed) for seed in range(number)]
        model = tiny_model("llama")
        hf_compact.compress(model, recipe(), calibration=from_batches(batches))
        counts.append(len(made))
    assert counts[0] == counts[1] > 0
    linear = next(module for module in model.modules() if isinstance(module, CodebookLinear))
    x = torch.randn(3, linear.in_features)
    with dense_once(model):
        assert torch.equal(linear(x), linear(x))
        made.clear()
        assert torch.equal(linear(x), linear(x))
        assert made == []
    with dense_once(model):
        with pytest.raises(RuntimeError), dense_once(linear):
            linear(x[:, 1:])
        linear(x)
    made.clear()
    linear(x)
    linear(x)
    assert made == [0, 0]
