"""Models as a GGUF file that llama.cpp reads: float16, 8 bits, or the very integers that a layer is made of.

`q4_0` and `q4_1` hold 4 bits in groups of 32 without and with an offset, `tq1_0` and `tq2_0` ternary values with one scale
per matrix. Only layers whose own grid is such a one are written in them: nothing is rounded anew but the scales, to float16.
Pruned models are written too; widths that differ between layers as the architecture `deci`, a Llama with a table of them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import gguf
import numpy as np
import torch
from gguf.quants import quantize
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UnsupportedModel
from ..functional.feedback import spread_groups
from ..reorder import head_width
from .export import block_layers, compressed_modules, ternary_layers
from .grid import IntegerGrid, integer_grid

GgufKind = Literal["f16", "q8_0", "q4_0", "q4_1", "tq1_0", "tq2_0"]
#: In the order in which `gguf` tries them: the first that holds a model as it is.
_EXACT_KINDS: tuple[GgufKind, ...] = ("tq2_0", "q4_0", "q4_1")
_TERNARY_BLOCK = 256  # weights that share a scale in the file; all of them carry the matrix's own
_BLOCK = 32
_HALF_MAX = 65504.0
#: model_type -> llama.cpp's architecture, and whether its rotary pairs are neighbours there.
_FAMILIES = {
    "llama": (gguf.MODEL_ARCH.LLAMA, True),
    "mistral": (gguf.MODEL_ARCH.LLAMA, True),
    "qwen2": (gguf.MODEL_ARCH.QWEN2, False),
    "qwen3": (gguf.MODEL_ARCH.QWEN3, False),
}
_TYPES = {kind: gguf.GGMLQuantizationType[kind.upper()] for kind in get_args(GgufKind)}
_FILE_TYPES = {kind: gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"] for kind in get_args(GgufKind)}
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
#: How a text is cut before its pieces are merged -> llama.cpp's name for it.
_PRE_TOKENIZERS = {
    (("ByteLevel", None),): "gpt-2",
    (("Digits", None), ("ByteLevel", None)): "smollm",
    (("Split", _LETTERS % ""), ("ByteLevel", None)): "qwen2",
    (("Split", _LETTERS % "{1,3}"), ("ByteLevel", None)): "llama-bpe",
}


def save_gguf(
    model: PreTrainedModel, folder: Path, kind: GgufKind | Literal["gguf"], tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Write `model.gguf`; the model itself becomes dense.

    But in `f16`, embedding, head and Linears that are not compressed are written as Q8_0; norms as float32. llama.cpp rounds
    the inputs of quantized layers in its own way.

    Args:
        model: Llama, Mistral, Qwen2 or Qwen3; compressed, pruned or ordinary.
        folder: to create.
        kind: of the block Linears; `gguf` is the smallest that holds them as they are, `f16` if none does.
        tokenizer: a byte-level BPE tokenizer of a kind that llama.cpp knows; None leaves it out.

    Raises:
        UnsupportedModel: the format cannot say the model or its tokenizer; nothing is written.
    """
    _check_family(model)
    kind = _choose(model) if kind == "gguf" else kind
    reason = _refusal(model, kind)
    if reason:
        raise UnsupportedModel(reason)
    vocabulary = None if tokenizer is None else _vocabulary(tokenizer, model.config.vocab_size)
    packed = _packed(model, kind)
    if compressed_modules(model):
        model.dequantize()
    if kind == "f16":
        _check_half(model)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "model.gguf.tmp"
    arch = gguf.MODEL_ARCH.DECI if _differs(model) else _FAMILIES[model.config.model_type][0]
    writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[arch])
    try:
        _write_settings(writer, model, kind)
        if vocabulary is not None:
            _write_vocabulary(writer, vocabulary, tokenizer)
        _write_tensors(writer, model, packed, kind, arch)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        temporary.replace(folder / "model.gguf")
    finally:
        temporary.unlink(missing_ok=True)


def _check_family(model: PreTrainedModel) -> None:
    config = model.config
    if config.model_type not in _FAMILIES:
        raise UnsupportedModel(
            f"GGUF export knows {', '.join(_FAMILIES)}, got {config.model_type}: export to dense and convert that"
        )
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise UnsupportedModel(f"GGUF export knows unscaled rotary positions, got rope_type {rope['rope_type']!r}")
    if config.hidden_act != "silu":
        raise UnsupportedModel(f"llama.cpp computes silu in this architecture, the model has {config.hidden_act}")
    if _differs(model) and config.model_type not in ("llama", "mistral"):
        raise UnsupportedModel(f"GGUF has widths that differ between layers for Llama only, got {config.model_type}")


def _choose(model: PreTrainedModel) -> GgufKind:
    for kind in _EXACT_KINDS:
        if _refusal(model, kind) is None:
            return kind
    grids = [integer_grid(layer) for layer in _layers(model).values()]
    is_exact = bool(grids) and all(grid is not None and _misfit(grid, "q8_0") is None for grid in grids)
    return "q8_0" if is_exact else "f16"


def _refusal(model: PreTrainedModel, kind: GgufKind) -> str | None:
    """Why a format cannot say the block Linears, or None if it can."""
    if kind in ("f16", "q8_0"):
        return None
    if kind in ("tq1_0", "tq2_0"):
        try:
            layers = ternary_layers(model)
        except UnsupportedModel as error:
            return str(error)
        wrong = [name for name, layer in layers.items() if layer.in_features % _TERNARY_BLOCK]
        if not wrong:
            return None
        return (
            f"{wrong[0]} must have rows of a multiple of {_TERNARY_BLOCK} weights for {kind}, "
            f"got {layers[wrong[0]].in_features}: keep our own format, or export to bitnet"
        )
    if not _layers(model):
        return f"no Linear in the blocks is compressed, so none has a grid of {kind}: export to f16 or q8_0"
    for name, layer in _layers(model).items():
        grid = integer_grid(layer)
        reason = "it has no equal steps" if grid is None else _misfit(grid, kind)
        if reason:
            return f"{name} does not fit {kind}, {reason}: export to q8_0 or f16"
    return None


def _misfit(grid: IntegerGrid, kind: str) -> str | None:
    """Why a grid is not one of the blocks of 32 of a kind."""
    width = grid.levels.shape[1]
    bits = 8 if kind == "q8_0" else 4
    if grid.bits > bits:
        return f"it has {grid.bits} bits"
    if grid.zero is not None and kind != "q4_1":
        return "it has an offset (symmetric: true in the recipe leaves it out)"
    if width % _BLOCK or (grid.group_size or _BLOCK) % _BLOCK:
        return f"rows and groups must be multiples of {_BLOCK}, got {width} and {grid.group_size}"
    rounding = (grid.scale.half().float() - grid.scale).norm()
    if grid.scale.max() > _HALF_MAX / 2**bits or rounding > 2**-10 * grid.scale.norm():
        return "its scales are beyond float16"
    return None


def _layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Compressed block Linears."""
    return block_layers(model, compressed_modules(model))


def _packed(model: PreTrainedModel, kind: str) -> dict[str, tuple[Tensor, gguf.GGMLQuantizationType]]:
    """Parameter -> its rows as bytes `[out, bytes]` and what they are, for what is not rounded anew."""
    if kind == "f16":
        return {}
    packed = {}
    for name, layer in _layers(model).items():
        if kind in ("tq1_0", "tq2_0"):
            rows = torch.from_numpy(quantize(layer.to_dense().cpu().numpy(), _TYPES[kind]))
            packed[f"{name}.weight"] = (rows, _TYPES[kind])
            continue
        grid = integer_grid(layer)
        if grid is not None and _misfit(grid, kind) is None:
            packed[f"{name}.weight"] = (pack_blocks(grid, kind), _TYPES[kind])
    return packed


def pack_blocks(grid: IntegerGrid, kind: str) -> Tensor:
    """Rows of blocks of 32 weights: the scale (and, in q4_1, the lowest value) as float16, then the integers.

    In a block of 4 bits the byte `i` holds the weights `i` and `i + 16`.

    Args:
        grid: groups of a multiple of 32 columns.
        kind: `q8_0`, `q4_0` or `q4_1`.

    Returns:
        `[out, in / 32 * bytes of a block]` uint8.

    >>> grid = IntegerGrid(4, None, torch.full((1, 32), -8, dtype=torch.int8), torch.ones(1, 1), None)
    >>> pack_blocks(grid, "q4_0").shape, pack_blocks(grid, "q8_0").shape
    (torch.Size([1, 18]), torch.Size([1, 34]))
    """
    rows, width = grid.levels.shape

    def of_blocks(per_group: Tensor) -> Tensor:
        return spread_groups(per_group.cpu(), grid.group_size, width).expand(-1, width)[:, ::_BLOCK]

    scale = of_blocks(grid.scale)
    levels = grid.levels.cpu().short().unflatten(1, (-1, _BLOCK))
    parts = [scale.half()[..., None].view(torch.uint8)]
    if kind == "q4_1":
        lowest = -scale * (8 if grid.zero is None else 8 + of_blocks(grid.zero.float()))
        parts.append(lowest.half()[..., None].view(torch.uint8))
    if kind == "q8_0":
        parts.append(levels.to(torch.int8).view(torch.uint8))
    else:
        codes = (levels + 8).to(torch.uint8)
        parts.append(codes[..., : _BLOCK // 2] | codes[..., _BLOCK // 2 :] << 4)
    return torch.cat(parts, -1).reshape(rows, -1)


def _check_half(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and parameter.abs().max() > _HALF_MAX:
            raise UnsupportedModel(f"{name} has values beyond float16: export to q8_0")


def _widths(model: PreTrainedModel) -> list[tuple[int, int, int]]:
    """Query heads, key heads and channels of the MLP, layer by layer."""
    head_dim = head_width(model)
    rows = (
        (layer.self_attn.q_proj.out_features, layer.self_attn.k_proj.out_features, layer.mlp.up_proj.out_features)
        for layer in model.model.layers
    )
    return [(queries // head_dim, keys // head_dim, channels) for queries, keys, channels in rows]


def _differs(model: PreTrainedModel) -> bool:
    return len(set(_widths(model))) > 1


def _write_settings(writer: gguf.GGUFWriter, model: PreTrainedModel, kind: str) -> None:
    config, head_dim = model.config, head_width(model)
    heads, key_heads, channels = (list(column) for column in zip(*_widths(model), strict=True))
    is_table = _differs(model)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(min(config.max_position_embeddings, getattr(config, "sliding_window", None) or 2**31))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(channels if is_table else channels[0])
    writer.add_head_count(heads if is_table else heads[0])
    writer.add_head_count_kv(key_heads if is_table else key_heads[0])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _write_tensors(
    writer: gguf.GGUFWriter, model: PreTrainedModel, packed: Mapping[str, tuple[Tensor, gguf.GGMLQuantizationType]], kind: str,
    arch: gguf.MODEL_ARCH,
) -> None:  # fmt: skip
    has_pairs, head_dim = _FAMILIES[model.config.model_type][1], head_width(model)
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name in model.all_tied_weights_keys:
            continue
        values, raw = packed.get(name, (tensor.float().cpu(), None))
        if has_pairs and name.split(".")[-2] in ("q_proj", "k_proj"):
            values = _interleave(values, len(values) // head_dim)
        data = values.contiguous().numpy()
        if raw is None:
            raw = _type_of(data, kind)
            data = quantize(data, raw)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), data, raw_dtype=raw)


def _type_of(values: np.ndarray, kind: str) -> gguf.GGMLQuantizationType:
    if values.ndim < 2:
        return gguf.GGMLQuantizationType.F32
    is_half = kind == "f16" or values.shape[1] % _BLOCK
    return gguf.GGMLQuantizationType.F16 if is_half else gguf.GGMLQuantizationType.Q8_0


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
    model = found.get("model") or {}
    splitter = found.get("pre_tokenizer") or {}
    parts = tuple(
        (part["type"], (part.get("pattern") or {}).get("Regex")) for part in splitter.get("pretokenizers", [splitter]) if part
    )
    name = _PRE_TOKENIZERS.get(parts)
    normalizer = (found.get("normalizer") or {}).get("type")
    is_known = name is not None and (normalizer is None or (name, normalizer) == ("qwen2", "NFC"))
    if model.get("type") != "BPE" or not is_known or bool(model.get("ignore_merges")) != (name == "llama-bpe"):
        raise UnsupportedModel(
            f"the tokenizer ({model.get('type')} behind {[kind for kind, _ in parts]}) is none that this export can name to "
            "llama.cpp: export to dense, and convert that with llama.cpp's own script"
        )
    # llama.cpp takes a token whole, before it splits the text, only if it is one of these two kinds.
    added = {
        entry["id"]: gguf.TokenType.CONTROL if entry["special"] else gguf.TokenType.USER_DEFINED
        for entry in found["added_tokens"]
    }
    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    kinds = [added.get(i, gguf.TokenType.NORMAL if i in tokens else gguf.TokenType.UNUSED) for i in range(size)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in found["model"]["merges"]]
    return {
        "pre": name,
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
    first = tokenizer("a").input_ids[:1]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id])
    template = tokenizer.chat_template
    if template:
        writer.add_chat_template(
            template if isinstance(template, str) else [{"name": n, "template": t} for n, t in template.items()]
        )
