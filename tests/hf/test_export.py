"""Exports of quantized and pruned models, judged by the packages whose formats they are."""

import errno
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import hf_compact
from hf_compact import TernaryCallback
from hf_compact.calibration import builtin_text, from_batches
from hf_compact.errors import ConfigError, FormatError, OutputError, UnsupportedModel
from hf_compact.hf import gguf as gguf_module
from hf_compact.hf.grid import IntegerGrid, integer_grid
from hf_compact.scoring import perplexity
from hf_compact.training import CompactCallback
from tests.conftest import tiny_inputs, tiny_model, train_tokenizer

WIDE = {"intermediate_size": 96}
NEAREST = {"method": "codebook", "rounding": "nearest", "group_size": 32, "scale_bits": None}
Q4_0, Q4_1, Q8_0 = (NEAREST | change for change in ({"symmetric": True}, {}, {"symmetric": True, "bits": 8}))
SMALL_PRUNING = {"method": "pruning", "channel_sparsity": 0.25}


def compressed(folder: Path, stage: dict, family: str = "llama", **overrides) -> Path:
    model = tiny_model(family, **(WIDE | overrides))
    hf_compact.compress(model, {"stages": [stage]}, calibration=from_batches([tiny_inputs(family)]))
    model.save_pretrained(folder)
    train_tokenizer().save_pretrained(folder)
    return folder


def types(folder: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(folder / "model.gguf").tensors}


def logits(model, family: str = "llama") -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**tiny_inputs(family)).logits


@st.composite
def grids(draw) -> tuple[IntegerGrid, str]:
    kind = draw(st.sampled_from(["q8_0", "q4_0", "q4_1"]))
    bits = 8 if kind == "q8_0" else draw(st.sampled_from([2, 3, 4]))
    rows, groups, size = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([32, 64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    levels = torch.randint(low, high, (rows, groups * size), generator=generator, dtype=torch.int8)
    scale = torch.rand(rows, groups, generator=generator).half().float()
    zero = torch.randint(low, high, (rows, groups), generator=generator, dtype=torch.int8) if kind == "q4_1" else None
    return IntegerGrid(bits, size, levels, scale, zero), kind


@given(grids())
def test_blocks_hold_the_very_integers(case):
    grid, kind = case
    found = torch.from_numpy(dequantize(gguf_module.pack_blocks(grid, kind).numpy(), gguf.GGMLQuantizationType[kind.upper()]))
    spread = grid.scale.repeat_interleave(grid.group_size, 1)
    zero = 0 if grid.zero is None else grid.zero.repeat_interleave(grid.group_size, 1)
    expected = spread * (grid.levels.float() - zero)
    tolerance = spread * 16 * 2**-11 if kind == "q4_1" else torch.zeros(1)  # the lowest value is rounded to float16
    assert ((found - expected).abs() <= tolerance).all()


@pytest.mark.parametrize(
    "stage",
    [Q4_0, Q4_1, Q8_0, NEAREST | {"scale_bits": 5, "bits": 3}, NEAREST | {"group_size": None, "bits": 2},
     {"method": "ternary", "bits": 4, "embedding_bits": None}, {"method": "ternary", "granularity": "row", "embedding_bits": None}],
    ids=["symmetric", "offset", "eight", "packed_scales", "row", "trained_4_bit", "ternary_row"],
)  # fmt: skip
def test_an_integer_grid_is_the_layer(stage):
    model = tiny_model("llama", **WIDE)
    hf_compact.compress(model, {"stages": [stage]}, calibration=from_batches([tiny_inputs("llama")]))
    layer = model.model.layers[0].mlp.down_proj
    grid = integer_grid(layer)
    size = grid.group_size or layer.in_features
    zero = 0 if grid.zero is None else grid.zero.float().repeat_interleave(size, 1)
    dense = grid.scale.repeat_interleave(size, 1) * (grid.levels.float() - zero)
    torch.testing.assert_close(dense, layer.to_dense(torch.float32), rtol=1e-6, atol=1e-7)
    assert grid.levels.int().abs().max() <= 2 ** (grid.bits - 1)


def test_other_grids_have_no_integers():
    for stage in (NEAREST | {"grid": "nf4"}, {"method": "ternary", "bits": 2, "embedding_bits": None}):
        model = tiny_model("llama")
        hf_compact.compress(model, {"stages": [stage]}, calibration=from_batches([tiny_inputs("llama")]))
        assert integer_grid(model.model.layers[0].mlp.up_proj) is None


@pytest.mark.parametrize(
    ("kind", "stage", "expected", "tolerance"),
    [
        ("q4_0", Q4_0, "Q4_0", 0),
        ("q4_1", Q4_1, "Q4_1", 2e-3),
        ("q4_1", NEAREST | {"scale_bits": 5, "bits": 3}, "Q4_1", 2e-3),
        ("q8_0", Q8_0, "Q8_0", 0),
        ("q8_0", NEAREST | {"grid": "nf4"}, "Q8_0", 2e-2),
        ("f16", NEAREST | {"grid": "nf4"}, "F16", 1e-3),
        ("gguf", Q4_0, "Q4_0", 0),
        ("gguf", Q4_1, "Q4_1", 2e-3),
        ("gguf", Q8_0, "Q8_0", 0),
        ("gguf", NEAREST | {"grid": "nf4"}, "F16", 1e-3),
    ],
)
def test_gguf_holds_the_same_model(kind, stage, expected, tolerance, tmp_path):
    """The embedding is rounded to Q8_0 but in f16, so it is put back before logits are compared."""
    hf_compact.export(compressed(tmp_path / "ours", stage), tmp_path / "out", kind)
    assert types(tmp_path / "out")["blk.1.ffn_down.weight"] == expected
    hf_compact.export(tmp_path / "ours", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"):
        mine, theirs = (model.get_submodule(f"model.layers.0.{name}").weight.detach() for model in (dense, again))
        assert (theirs - mine).norm() <= tolerance * mine.norm()
    again.get_input_embeddings().weight.data.copy_(dense.get_input_embeddings().weight.data)
    assert (logits(again) - logits(dense)).norm() <= max(2 * tolerance, 1e-5) * logits(dense).norm()


@pytest.mark.parametrize("family", ["llama_untied", "mistral", "qwen2", "qwen3"])
def test_families_of_gguf(family, tmp_path):
    wide = {"head_dim": 128} if family == "qwen3" else {}  # what transformers' reader takes for granted
    hf_compact.export(compressed(tmp_path / "ours", Q4_0, family, **wide), tmp_path / "out", "f16")
    hf_compact.export(tmp_path / "ours", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32)
    assert (logits(again) - logits(dense)).norm() < 2e-3 * logits(dense).norm()


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 5e5},
        {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 16},
    ],
    ids=["default", "scaled"],
)  # fmt: skip
def test_dense_exports_say_their_rotary_positions_in_the_older_way_too(rope, tmp_path):
    folder = compressed(tmp_path / "ours", Q4_0, rope_parameters=rope)
    hf_compact.export(folder, tmp_path / "out", "dense")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == 5e5
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    assert config.get("rope_scaling") == (None if rope["rope_type"] == "default" else scaling)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.config.rope_parameters == rope
    expected = AutoModelForCausalLM.from_pretrained(folder).dequantize()
    assert torch.equal(logits(again), logits(expected))


def test_positions_without_rotation_have_no_base(tmp_path):
    hf_compact.export(compressed(tmp_path / "ours", NEAREST, "gpt2", intermediate_size=None), tmp_path / "out", "dense")
    assert "rope_theta" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_the_chat_template_goes_along(tmp_path):
    folder = compressed(tmp_path / "ours", Q4_0)
    (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    hf_compact.export(folder, tmp_path / "out", "q4_0")
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == "{{ messages }}"
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False


def test_added_tokens_are_taken_whole(tmp_path):
    folder = compressed(tmp_path / "ours", Q4_0)
    tokenizer = train_tokenizer()
    known = tokenizer.convert_ids_to_tokens(100)
    tokenizer.add_tokens([AddedToken(known, special=False)])  # one that the model has room for
    tokenizer.save_pretrained(folder)
    hf_compact.export(folder, tmp_path / "out", "f16")
    types = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields["tokenizer.ggml.token_type"].contents()
    special = set(tokenizer.all_special_ids)
    assert types[100] == gguf.TokenType.USER_DEFINED
    assert special
    assert {types[i] for i in special} == {gguf.TokenType.CONTROL}
    assert {types[i] for i in range(len(tokenizer)) if i != 100 and i not in special} == {gguf.TokenType.NORMAL}


@pytest.mark.parametrize(("name", "pattern"), [("qwen2", ""), ("llama-bpe", "{1,3}")])
def test_tokenizers_that_llama_cpp_has_a_name_for(name, pattern, tmp_path):
    folder = compressed(tmp_path / "ours", Q4_0)
    tokenizer = train_tokenizer()
    parts = [
        pre_tokenizers.Split(Regex(gguf_module._LETTERS % pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.backend_tokenizer.model.ignore_merges = name == "llama-bpe"
    tokenizer.save_pretrained(folder)
    hf_compact.export(folder, tmp_path / "out", "f16")
    assert gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields["tokenizer.ggml.pre"].contents() == name
    tokenizer.backend_tokenizer.model.ignore_merges = name != "llama-bpe"
    tokenizer.save_pretrained(folder)
    with pytest.raises(UnsupportedModel, match=r"the tokenizer \(BPE behind \['Split', 'ByteLevel'\]\) is none that this export"):
        hf_compact.export(folder, tmp_path / "no", "f16")


def test_pruned_widths_in_gguf(tmp_path):
    """Equal ones are an ordinary Llama; a table of them is the architecture `deci`."""
    model = tiny_model("llama", **WIDE)
    model.model.layers[0].mlp.gate_proj.weight.data[:40] = 0
    stage = SMALL_PRUNING | {"include": ["*.layers.1.mlp.*"]}
    hf_compact.compress(model, {"stages": [stage]}, calibration=from_batches([tiny_inputs("llama")]))
    model.save_pretrained(tmp_path / "ours")
    hf_compact.export(tmp_path / "ours", tmp_path / "out", "gguf")
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    assert fields["general.architecture"].contents() == "deci"
    assert fields["deci.feed_forward_length"].contents() == [96, 72, 96]
    with pytest.raises(UnsupportedModel, match="no Linear in the blocks is compressed, so none has a grid of q4_0"):
        hf_compact.export(tmp_path / "ours", tmp_path / "no", "q4_0")

    hf_compact.compress(
        plain := tiny_model("llama", **WIDE), {"stages": [SMALL_PRUNING]}, calibration=from_batches([tiny_inputs("llama")])
    )
    plain.save_pretrained(tmp_path / "plain")
    hf_compact.export(tmp_path / "plain", tmp_path / "plain-out", "f16")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain-out", gguf_file="model.gguf", dtype=torch.float32)
    assert (logits(again) - logits(plain)).norm() < 2e-3 * logits(plain).norm()
    with pytest.raises(FormatError, match="is not compressed by hf_compact"):
        hf_compact.export(tmp_path / "plain", tmp_path / "no", "compressed-tensors")


@pytest.mark.parametrize(
    ("kind", "stage", "family", "overrides", "match"),
    [
        ("q4_0", Q4_1, "llama", {}, r"down_proj does not fit q4_0, it has an offset \(symmetric: true in the recipe leaves it out\)"),
        ("q4_1", NEAREST | {"grid": "nf4"}, "llama", {}, "down_proj does not fit q4_1, it has no equal steps: export to q8_0 or f16"),
        ("q4_0", Q8_0, "llama", {}, "down_proj does not fit q4_0, it has 8 bits"),
        ("q4_0", Q4_0, "llama", {"intermediate_size": 72}, "rows and groups must be multiples of 32, got 72 and 32"),
        ("q4_0", Q4_0 | {"group_size": 16}, "llama", {}, "rows and groups must be multiples of 32, got 96 and 16"),
        ("f16", Q4_0, "gpt2", {"intermediate_size": None}, "GGUF export knows llama, mistral, qwen2, qwen3, got gpt2"),
        ("f16", Q4_0, "llama", {"hidden_act": "gelu"}, "computes silu in this architecture, the model has gelu"),
        (
            "f16", Q4_0, "llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "knows unscaled rotary positions, got rope_type 'linear'",
        ),
        ("onnx", NEAREST, "t5", dict.fromkeys(WIDE), "onnx is written of models that read token ids alone, which a T5For"),
    ],
)  # fmt: skip
def test_what_a_format_cannot_say_is_refused(kind, stage, family, overrides, match, tmp_path):
    model = tiny_model(family, **{k: v for k, v in (WIDE | overrides).items() if v is not None})
    hf_compact.compress(model, {"stages": [stage]}, calibration=from_batches([tiny_inputs(family)]))
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(UnsupportedModel, match=match):
        hf_compact.export(tmp_path / "ours", tmp_path / "out", kind)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_onnxruntime_computes_what_we_do(family, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = tiny_model(family, num_hidden_layers=1)
    hf_compact.compress(model, {"stages": [NEAREST]}, calibration=from_batches([tiny_inputs(family)]))
    model.save_pretrained(tmp_path / "ours")
    hf_compact.export(tmp_path / "ours", tmp_path / "out", "onnx")
    session = runtime.InferenceSession(tmp_path / "out" / "model.onnx")
    (name,) = [output.name for output in session.get_outputs()]
    assert name == ("logits" if family == "llama" else "last_hidden_state")
    for batch, length in ((1, 5), (3, 40)):
        inputs = tiny_inputs(family, batch, length)
        mask = torch.ones_like(inputs["input_ids"])
        mask[-1, -3:] = 0
        inputs["attention_mask"] = mask
        with torch.no_grad():
            expected = model(**inputs)[0]
        found = torch.from_numpy(session.run(None, {key: value.numpy() for key, value in inputs.items()})[0])
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)


def test_values_beyond_float16_are_refused(tmp_path):
    model = tiny_model("llama", **WIDE)
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = 1e5
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(UnsupportedModel, match=r"layers.0.mlp.down_proj.weight has values beyond float16: export to q8_0"):
        hf_compact.export(tmp_path / "dense", tmp_path / "out", "f16")
    assert not (tmp_path / "out").exists()
    for scale, reason in ((1e4, "its scales are beyond float16"), (1e-7, "its scales are beyond float16"), (1e-3, None)):
        grid = IntegerGrid(4, None, torch.zeros(1, 32, dtype=torch.int8), torch.full((1, 1), scale), None)
        assert gguf_module._misfit(grid, "q4_0") == reason


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (Exception("No space left on device (os error 28)"), r"disk full while writing .*out \(\d+ MB free\): free some space and run "
         "the same command again: what was written is deleted"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk full while writing .*out "),
        (Exception("Permission denied (os error 13)"), r"out cannot be written \(\d+ MB free\): Permission denied"),
    ],
    ids=["full_for_the_tokenizer", "full", "no_permission"],
)  # fmt: skip
def test_an_export_is_whole_or_absent(error, match, tmp_path, monkeypatch):
    folder = compressed(tmp_path / "ours", Q4_0)

    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", fails)
    with pytest.raises(OutputError, match=match):
        hf_compact.export(folder, tmp_path / "out", "dense")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]
    error = Exception("a defect")
    with pytest.raises(Exception, match=r"^a defect$"):
        hf_compact.export(folder, tmp_path / "out", "dense")
    monkeypatch.undo()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "journal.jsonl").write_text("{}")
    with pytest.raises(OutputError, match=r"out.partial' exists and is not an empty folder"):  # another run's
        hf_compact.export(folder, tmp_path / "out", "dense")
    assert (tmp_path / "out.partial" / "journal.jsonl").exists()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    hf_compact.export(folder, ".", "dense")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in (tmp_path / "here").iterdir()}


def test_an_unknown_kind(tmp_path):
    with pytest.raises(ConfigError, match=r"kind must be one of dense, low_rank, .*, got 'exe'"):
        hf_compact.export(tmp_path, tmp_path / "out", "exe")


ALONE = """
import sys
sys.modules["hf_compact"] = None
import torch, transformers
from safetensors.torch import load_file, save_file
model, info = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(info.values()), info
with torch.no_grad():
    save_file({"logits": model.eval()(**load_file(sys.argv[2])).logits}, sys.argv[3])
"""


@pytest.mark.cli
@pytest.mark.parametrize(
    "stage",
    [Q4_0, Q8_0, Q4_0 | {"bits": 3, "group_size": None, "exclude": ["*.layers.1.self_attn.k_proj"]}],
    ids=["int4", "int8", "rows_of_3_bits"],
)
def test_stock_transformers_loads_compressed_tensors_without_us(stage, tmp_path):
    pytest.importorskip("compressed_tensors")
    compressed(tmp_path / "ours", stage)
    hf_compact.export(tmp_path / "ours", tmp_path / "out", "compressed-tensors")
    packed = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.up_proj.weight_packed"]
    assert packed.shape == (96, 32 * (8 if stage == Q8_0 else 4) // 32)
    save_file(tiny_inputs("llama"), tmp_path / "in.safetensors")
    arguments = [str(tmp_path / name) for name in ("out", "in.safetensors", "out.safetensors")]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", ALONE, *arguments], check=True, cwd=tmp_path, env=environment)
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "ours"))
    torch.testing.assert_close(load_file(tmp_path / "out.safetensors")["logits"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("stage", "family", "match"),
    [
        (NEAREST | {"grid": "nf4"}, "llama", "down_proj has no equal steps of at most 8 bits, which compressed-tensors needs"),
        (
            {"method": "ternary", "embedding_bits": None},
            "llama",
            "down_proj rounds its inputs, which packed weights alone do not say",
        ),
        (NEAREST, "llama", "has an offset, which compressed-tensors does not load: set symmetric: true in the recipe"),
        (Q4_0 | {"group_size": 40}, "llama", "has rows of 72, which groups of 40 do not divide: export to dense"),
        (Q4_0, "gpt2", "is a Conv1D, which compressed-tensors does not know"),
        (NEAREST | {"include": []}, "llama", "no Linear in the blocks is compressed: export to dense"),
    ],
)
def test_what_compressed_tensors_cannot_say_is_refused(stage, family, match, tmp_path):
    pytest.importorskip("compressed_tensors")
    model = tiny_model(family)
    hf_compact.compress(model, {"stages": [stage]}, calibration=from_batches([tiny_inputs(family)]))
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(UnsupportedModel, match=match):
        hf_compact.export(tmp_path / "ours", tmp_path / "out", "compressed-tensors")
    assert not (tmp_path / "out").exists()


def test_without_the_package_compressed_tensors_is_refused(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "compressed_tensors" else find(name))
    with pytest.raises(UnsupportedModel, match="needs the package compressed-tensors: pip install"):
        hf_compact.export(compressed(tmp_path / "ours", Q4_0), tmp_path / "out", "compressed-tensors")


@pytest.fixture(scope="module")
def poem(tokenizer) -> torch.Tensor:
    """The tokens that the models below know by heart, so that what they say next does not hang on the last digit."""
    return tokenizer(builtin_text("calibration")[2000:4000], return_tensors="pt").input_ids[0][:96]


def trained(folder: Path, stage: dict, ids: torch.Tensor, num_steps: int = 40) -> Path:
    """A compressed model, wide enough for all kinds, that was trained on one text; ternary ones are trained as such."""
    model = tiny_model("llama", hidden_size=256, intermediate_size=512, num_hidden_layers=2)
    for parameter in model.parameters():
        parameter.data.mul_(0.15 if parameter.dim() > 1 else 1)  # a usual start for training
    callback = TernaryCallback(num_steps=num_steps, ramp_share=0.5) if stage["method"] == "ternary" else CompactCallback()
    callback.prepare(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    for step in range(num_steps):
        callback.begin_step(model, step)
        model(input_ids=ids[None], labels=ids[None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    callback.finalize(model.eval())
    if stage["method"] != "ternary":
        hf_compact.compress(model, {"stages": [stage]}, calibration=from_batches([{"input_ids": ids[None]}]))
    model.save_pretrained(folder)
    train_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "stage"),
    [("f16", Q4_0), ("q8_0", Q8_0), ("q4_0", Q4_0), ("q4_1", Q4_1), ("tq2_0", {"method": "ternary"}),
     ("gguf", SMALL_PRUNING | {"include": ["*.layers.1.*"]})],
    ids=["f16", "q8_0", "q4_0", "q4_1", "tq2_0", "widths_by_layer"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files that the package opens at its import
def test_llama_cpp_says_the_same(kind, stage, poem, tokenizer, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    folder = trained(tmp_path / "ours", stage, poem)
    hf_compact.export(folder, tmp_path / "out", kind)
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs = llama_cpp.Llama(str(tmp_path / "out" / "model.gguf"), n_ctx=128, n_threads=1, logits_all=True, verbose=False)
    assert theirs.tokenize(tokenizer.decode(poem).encode(), add_bos=False) == poem.tolist()

    theirs.eval(poem.tolist())
    scores = torch.tensor(np.array(theirs.scores[: len(poem)]))
    loss = torch.nn.functional.cross_entropy(scores[:-1], poem[1:]).item()
    expected = perplexity(ours, poem, len(poem), None)["perplexity"]
    assert expected < 50, "trained"
    assert math.exp(loss) == pytest.approx(expected, rel=0.01)

    said = ours.generate(poem[None, :24], max_new_tokens=48, do_sample=False)[0][24:]
    theirs.reset()
    stream = theirs.generate(poem[:24].tolist(), temp=0.0, repeat_penalty=1.0)
    assert [next(stream) for _ in said] == said.tolist()
    theirs.close()
