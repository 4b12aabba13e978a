"""Ternary models in formats that others read, judged by stock transformers and by the `gguf` package."""

import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_compact
from hf_compact.calibration import from_batches
from hf_compact.errors import UnsupportedModel
from tests.conftest import tiny_inputs, tiny_model, train_tokenizer

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
ALONE = """
import sys
sys.modules["hf_compact"] = None
import torch, transformers
from safetensors.torch import load_file, save_file
model, info = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(info.values()), info
kinds = {type(m).__name__ for m in model.modules()}
assert "BitLinear" in kinds, kinds
with torch.no_grad():
    save_file({"logits": model(**load_file(sys.argv[2])).logits}, sys.argv[3])
"""


def ternary(folder: Path, family: str = "llama", stage: dict | None = None, **overrides) -> torch.Tensor:
    """A compressed folder, and its logits."""
    model = tiny_model(family, **overrides)
    stage = {"method": "ternary", "embedding_bits": None} | (stage or {})
    hf_compact.compress(model, {"stages": [stage]}, calibration=from_batches([tiny_inputs(family)]))
    model.save_pretrained(folder)
    with torch.no_grad():
        return model.eval()(**tiny_inputs(family)).logits


@pytest.mark.cli
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_stock_transformers_loads_bitnet_without_us(family, tmp_path):
    expected = ternary(tmp_path / "ours", family, {"exclude": ["*.layers.1.self_attn.k_proj"]})
    hf_compact.export(tmp_path / "ours", tmp_path / "bitnet", "bitnet")
    from safetensors.torch import save_file

    save_file(tiny_inputs(family), tmp_path / "in.safetensors")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"TORCHDYNAMO_DISABLE": "1"}
    arguments = [str(tmp_path / "bitnet"), str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors")]
    subprocess.run([sys.executable, "-c", ALONE, *arguments], check=True, cwd=tmp_path, env=environment, timeout=280)
    found = load_file(tmp_path / "out.safetensors")["logits"]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["tq1_0", "tq2_0"])
def test_gguf_files_hold_the_same_model(kind, tmp_path):
    ternary(tmp_path / "ours", **WIDE)
    train_tokenizer().save_pretrained(tmp_path / "ours")
    hf_compact.export(tmp_path / "ours", tmp_path / "out", kind)
    path = tmp_path / "out" / "model.gguf"
    assert [p.name for p in path.parent.iterdir()] == ["model.gguf"]
    types = {t.name: t.tensor_type for t in gguf.GGUFReader(path).tensors}
    assert types["blk.0.ffn_up.weight"] == gguf.GGMLQuantizationType[kind.upper()]
    hf_compact.export(tmp_path / "ours", tmp_path / "dense", "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"):
        mine, theirs = (model.get_submodule(f"model.layers.0.{name}").weight for model in (dense, again))
        torch.testing.assert_close(theirs.detach(), mine.detach(), rtol=1e-3, atol=1e-6)  # a scale in float16
    mine, theirs = (model.get_input_embeddings().weight.data for model in (dense, again))
    assert (theirs - mine).norm() < 0.01 * mine.norm()  # Q8_0
    theirs.copy_(mine)
    with torch.no_grad():
        a, b = (model.eval()(**tiny_inputs("llama")).logits for model in (dense, again))
    assert (a - b).norm() < 1e-3 * a.norm()


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
def test_one_level_in_a_block_is_enough_for_its_scale(kind):
    """What is relied on: blocks of `a * {-1, 0, 1}` come back as they were, whatever is in them."""
    values = np.zeros((3, 256), dtype=np.float32)
    values[1, 7], values[2] = -0.5, 0.5
    form = gguf.GGMLQuantizationType[kind]
    assert np.array_equal(gguf.quants.dequantize(gguf.quants.quantize(values, form), form), values)


@pytest.mark.parametrize(
    ("kind", "family", "stage", "overrides", "match"),
    [
        ("bitnet", "llama", {"granularity": "row"}, {}, "is not ternary with one scale per matrix"),
        ("bitnet", "llama", {"bits": 2}, {}, "is not ternary with one scale per matrix"),
        ("bitnet", "llama", {"activation_bits": None}, {}, "does not round its inputs"),
        ("bitnet", "llama", {}, {"intermediate_size": 70}, "must have a multiple of 4 rows for bitnet, got 70"),
        ("bitnet", "gpt2", {}, {}, "is a Conv1D"),
        ("tq1_0", "llama", {}, {}, "must have rows of a multiple of 256 weights for tq1_0, got 72"),
        ("tq2_0", "opt", {}, {}, "GGUF export knows llama, mistral, qwen2, qwen3, got opt"),
    ],
)
def test_what_a_format_cannot_say_is_refused(kind, family, stage, overrides, match, tmp_path):
    ternary(tmp_path / "ours", family, stage, **overrides)
    with pytest.raises(UnsupportedModel, match=match):
        hf_compact.export(tmp_path / "ours", tmp_path / "out", kind)
    assert not (tmp_path / "out").exists()


def test_models_without_ternary_layers_are_refused(tmp_path):
    model = tiny_model("llama")
    stage = {"method": "codebook", "include": [], "rounding": "nearest"}
    hf_compact.compress(model, {"stages": [stage]}, calibration=from_batches([tiny_inputs("llama")]))
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(UnsupportedModel, match="has no ternary layers in its blocks"):
        hf_compact.export(tmp_path / "ours", tmp_path / "out", "bitnet")


def test_an_unknown_tokenizer_is_refused(tmp_path):
    from tokenizers import pre_tokenizers

    ternary(tmp_path / "ours", **WIDE)
    tokenizer = train_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save_pretrained(tmp_path / "ours")
    with pytest.raises(UnsupportedModel, match=r"the tokenizer .* is none that this export can name"):
        hf_compact.export(tmp_path / "ours", tmp_path / "out", "tq1_0")
    assert not (tmp_path / "out").exists()
