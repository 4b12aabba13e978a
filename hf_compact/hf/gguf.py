"""Ternary models as a GGUF file that llama.cpp reads: TQ1_0 (1.69 bits per weight) and TQ2_0 (2.06)."""

import json
from pathlib import Path
from typing import Any, Literal

import gguf
from gguf.quants import quantize
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UnsupportedModel
from .export import ternary_layers

_BLOCK = 256  # weights that share a scale in the file; all of them carry the matrix's own
_FAMILIES = ("llama", "mistral")
_TYPES = {"tq1_0": gguf.GGMLQuantizationType.TQ1_0, "tq2_0": gguf.GGMLQuantizationType.TQ2_0}
_FILE_TYPES = {"tq1_0": gguf.LlamaFileType.MOSTLY_TQ1_0, "tq2_0": gguf.LlamaFileType.MOSTLY_TQ2_0}


def save_gguf(
    model: PreTrainedModel, folder: Path, kind: Literal["tq1_0", "tq2_0"], tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Write `model.gguf`; the model itself becomes dense.

    Embedding and head are written as Q8_0, norms as float32. llama.cpp rounds the inputs of ternary layers in its own way.

    Args:
        model: Llama or Mistral, its block Linears ternary with one scale per matrix.
        folder: to create.
        kind: the format of the block Linears.
        tokenizer: a byte-level BPE tokenizer of a kind that llama.cpp knows; None leaves it out.

    Raises:
        UnsupportedModel: the format cannot say the model or its tokenizer; nothing is written.
    """
    family = model.config.model_type
    if family not in _FAMILIES:
        raise UnsupportedModel(f"GGUF export knows {', '.join(_FAMILIES)}, got {family}: export to dense and convert that")
    layers = ternary_layers(model)
    for name, layer in layers.items():
        if layer.in_features % _BLOCK:
            raise UnsupportedModel(
                f"{name} must have rows of a multiple of {_BLOCK} weights for {kind}, got {layer.in_features}: "
                "keep our own format, or export to bitnet"
            )
    vocabulary = None if tokenizer is None else _vocabulary(tokenizer, model.config.vocab_size)
    ternary = {f"{name}.weight" for name in layers}
    model.dequantize()
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "model.gguf.tmp"
    writer = gguf.GGUFWriter(temporary, "llama")
    try:
        _write_settings(writer, model, kind)
        if vocabulary is not None:
            _write_vocabulary(writer, vocabulary, tokenizer)
        _write_tensors(writer, model, ternary, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        temporary.replace(folder / "model.gguf")
    finally:
        temporary.unlink(missing_ok=True)


def _write_settings(writer: gguf.GGUFWriter, model: PreTrainedModel, kind: str) -> None:
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _write_tensors(writer: gguf.GGUFWriter, model: PreTrainedModel, ternary: set[str], kind: str) -> None:
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name in model.all_tied_weights_keys:
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        values = (tensor if heads is None else _interleave(tensor, heads)).float().cpu().numpy()
        is_table = values.ndim == 2 and name not in ternary
        raw = _TYPES[kind] if name in ternary else gguf.GGMLQuantizationType.Q8_0 if is_table else gguf.GGMLQuantizationType.F32
        if is_table and values.shape[1] % 32:
            raw = gguf.GGMLQuantizationType.F16
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), quantize(values, raw), raw_dtype=raw)


def _interleave(tensor: Tensor, heads: int) -> Tensor:
    """Rows of queries and keys in llama.cpp's order of rotary pairs: neighbours, not halves."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> dict[str, Any]:
    """What `tokenizer.json` says, if llama.cpp has a pre-tokenizer that does the same.

    Raises:
        UnsupportedModel: it has not.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    found = json.loads(backend.to_str()) if backend is not None else {}
    splitter = found.get("pre_tokenizer") or {}
    parts = [part["type"] for part in splitter.get("pretokenizers", [splitter]) if part]
    known = {("ByteLevel",): "gpt-2", ("Digits", "ByteLevel"): "smollm"}
    if found.get("model", {}).get("type") != "BPE" or tuple(parts) not in known or found.get("normalizer"):
        raise UnsupportedModel(
            f"the tokenizer ({found.get('model', {}).get('type')} behind {parts}) is none that this export can name to llama.cpp: "
            "export to bitnet"
        )
    special = {entry["id"] for entry in found["added_tokens"] if entry["special"]}
    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    kinds = [
        gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL if i in tokens else gguf.TokenType.UNUSED
        for i in range(size)
    ]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in found["model"]["merges"]]
    return {
        "pre": known[tuple(parts)],
        "tokens": [tokens.get(i, f"[PAD{i}]") for i in range(size)],
        "types": kinds,
        "merges": merges,
    }


def _write_vocabulary(writer: gguf.GGUFWriter, found: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(found["pre"])
    writer.add_token_list(found["tokens"])
    writer.add_token_types(found["types"])
    writer.add_token_merges(found["merges"])
    ids = ((tokenizer.bos_token_id, writer.add_bos_token_id), (tokenizer.eos_token_id, writer.add_eos_token_id),
           (tokenizer.pad_token_id, writer.add_pad_token_id))  # fmt: skip
    for number, add in ids:
        if number is not None:
            add(number)
