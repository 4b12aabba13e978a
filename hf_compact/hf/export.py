"""Folders that need no plugin: dense, two plain Linears for each low-rank layer, `bitnet`, `compressed-tensors`, or ONNX."""

import copy
import importlib.util
import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from ..arch import describe
from ..capture import without_cache
from ..checkpoint import write_text
from ..errors import UnsupportedModel
from ..methods.ternary import TernaryLinear
from .grid import IntegerGrid, integer_grid
from .quantizer import names_in, outermost

#: The class has to be the stub's own, see `api`; the buffer makes a load without the stub fail on its shape.
_STUB = '''"""Two Linears in the place of one, where `config.low_rank` says so."""

import torch
import transformers


class {name}(transformers.{name}):
    def __init__(self, config):
        super().__init__(config)
        for name, rank in config.low_rank.items():
            old = self.get_submodule(name)
            rows, columns = old.weight.shape
            if isinstance(old, transformers.pytorch_utils.Conv1D):
                rows, columns = columns, rows
            bias = old.bias is not None
            pair = torch.nn.Sequential(torch.nn.Linear(columns, rank, bias=False), torch.nn.Linear(rank, rows, bias=bias))
            pair.register_buffer("weight", torch.ones(1, dtype=torch.int8))
            self.set_submodule(name, pair)
'''


def save_dense(model: PreTrainedModel, folder: Path) -> None:
    """Write an ordinary model with the same values; the model itself becomes dense."""
    model.dequantize().save_pretrained(folder)
    _add_older_rope(folder / "config.json")


def _add_older_rope(path: Path) -> None:
    """Rotary positions as transformers 4 names them: it does not read `rope_parameters`, and assumes a base of 10000."""
    config = json.loads(path.read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or {}
    if "rope_theta" not in rope:  # none, or one for each kind of layer
        return
    config["rope_theta"] = rope["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    write_text(path, json.dumps(config, indent=2) + "\n")


class _Graph(nn.Module):
    """What an ONNX file computes."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask)[0]


def save_onnx(model: PreTrainedModel, folder: Path) -> None:
    """Write `model.onnx` with float32 weights; the model itself becomes dense.

    Inputs are `input_ids` and `attention_mask`, int64 `[batch, T]` with both axes free; the output is what the model gives
    first, `logits` or `last_hidden_state`. There are no inputs for keys and values: it is for scoring, classes and embeddings.

    Args:
        model: reads token ids, and is no encoder-decoder.
        folder: to create.

    Raises:
        UnsupportedModel: another kind of model, or the packages are missing; nothing is written.
    """
    if importlib.util.find_spec("onnxscript") is None:
        raise UnsupportedModel("this export needs the packages onnx and onnxscript: pip install 'hf_compact[onnx]'")
    if model.config.is_encoder_decoder or model.main_input_name != "input_ids":
        raise UnsupportedModel(f"onnx is written of models that read token ids alone, which a {type(model).__name__} does not")
    if getattr(model.config, "quantization_config", None) is not None:
        model = model.dequantize()
    graph = _Graph(model.float().eval()).eval()
    ids = torch.ones(2, 16, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with without_cache(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch about torch
        name = next(iter(model(input_ids=ids, attention_mask=mask)))
        program = torch.onnx.export(
            graph, (ids, mask), dynamo=True, verbose=False, input_names=["input_ids", "attention_mask"], output_names=[name],
            dynamic_shapes={"input_ids": axes, "attention_mask": axes},
        )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    program.save(folder / "model.onnx")
    model.config.save_pretrained(folder)


def save_low_rank(model: PreTrainedModel, folder: Path, auto_class: str) -> None:
    """Write a folder that loads under `trust_remote_code=True` without this library.

    A pivoted layer becomes an unpivoted one of the same values, which takes `r^2` values more; a shared basis is written for
    every layer that has it.

    Args:
        model: every compressed module is plain low rank, its cores not quantized.
        folder: to create.
        auto_class: the Auto class that is to find the stub.

    Raises:
        UnsupportedModel: another kind of layer is in the model.
    """
    table = names_in(model, model.config.quantization_config.modules)
    trains = {name: model.get_submodule(name) for name in outermost(table)}
    for name, train in trains.items():
        if not getattr(train, "is_low_rank", False) or any(type(core) is not nn.Linear for core in train.cores):
            raise UnsupportedModel(f"{name} is not two plain Linears: export to dense, or decompose with format low_rank only")
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(tuple(f"{n}." for n in trains))}
    for name, train in trains.items():
        up, down = train.factors()
        down = down.clone() if train.ties else down
        state |= {f"{name}.0.weight": down, f"{name}.1.weight": up, f"{name}.weight": train.weight}
        if train.bias is not None:
            state[f"{name}.1.bias"] = train.bias
    name = type(model).__name__
    ranks = {name: train.ranks[0] for name, train in trains.items()}
    _save(model, folder, state, low_rank=ranks, auto_map={auto_class: f"modeling_low_rank.{name}"})
    write_text(folder / "modeling_low_rank.py", _STUB.format(name=name))


def save_bitnet(model: PreTrainedModel, folder: Path) -> None:
    """Write a folder that stock transformers loads as `quant_method: bitnet`; the model itself becomes dense.

    Embedding and head are written in the model's dtype: that format has no rows of 8 bits.

    Args:
        model: its block Linears are ternary, one scale per matrix, inputs of 8 bits.
        folder: to create.

    Raises:
        UnsupportedModel: a layer is something that the format cannot say; nothing is written.
    """
    from transformers.integrations.bitnet import VALUES_PER_ITEM, pack_weights  # here, because it imports torch's compiler

    layers = ternary_layers(model)
    for name, layer in layers.items():
        if layer.activation_bits != 8:
            raise UnsupportedModel(f"{name} does not round its inputs, bitnet always does: train with activation_bits 8")
        if layer.out_features % VALUES_PER_ITEM:
            raise UnsupportedModel(f"{name} must have a multiple of {VALUES_PER_ITEM} rows for bitnet, got {layer.out_features}")
    state = {}
    for name, layer in layers.items():
        state[f"{name}.weight"] = pack_weights(layer.levels().to(torch.int8))  # adds 1 to its argument, a tensor of ours
        state[f"{name}.weight_scale"] = 1 / layer.scale  # BitLinear divides by it
    model.dequantize()
    kept = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in layers]
    for name in layers:
        if isinstance(model.get_submodule(name), Conv1D):
            raise UnsupportedModel(f"{name} is a Conv1D, which transformers does not convert to bitnet")
        if not should_convert_module(name, kept):
            raise UnsupportedModel(f"{name} cannot be told from the Linears that are not ternary by transformers' patterns")
    settings = {
        "quant_method": "bitnet",
        "linear_class": "bitlinear",
        "quantization_mode": "offline",
        "modules_to_not_convert": kept,
    }
    _save(model, folder, model.state_dict() | state, quantization_config=settings)


def ternary_layers(model: PreTrainedModel) -> dict[str, TernaryLinear]:
    """The compressed block Linears by name, all of them ternary with one scale per matrix.

    Raises:
        UnsupportedModel: one of them is something else, or there is none.
    """
    layers = block_layers(model, compressed_modules(model))
    for name, layer in layers.items():
        if not isinstance(layer, TernaryLinear) or layer.bits != 1.58 or layer.granularity != "tensor":
            raise UnsupportedModel(f"{name} is not ternary with one scale per matrix: export to dense, or keep our own format")
        if layer.is_sub_norm:
            raise UnsupportedModel(f"{name} has a norm of its own (is_sub_norm), which only our own format can say")
    if not layers:
        raise UnsupportedModel("the model has no ternary layers in its blocks: export to dense")
    return layers


def compressed_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """What stands in the place of dense modules, by name; nothing in an ordinary model, pruned ones among them."""
    config = getattr(model.config, "quantization_config", None)
    names = [] if config is None else outermost(names_in(model, config.modules))
    found = {name: model.get_submodule(name) for name in names}
    return {name: module for name, module in found.items() if not isinstance(module, nn.Linear)}


def block_layers(model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Those that are inside the blocks."""
    blocks = tuple(f"{block}." for block in describe(model).blocks)
    return {name: module for name, module in modules.items() if name.startswith(blocks)}


def save_compressed_tensors(model: PreTrainedModel, folder: Path) -> None:
    """Write a folder that stock transformers loads with the package `compressed-tensors`, as packed int4 and int8.

    The integers are those of the model; scales are rounded to the model's dtype. Embedding and head are written in that
    dtype: the format has Linears only. The model itself becomes dense.

    Args:
        model: its block Linears have equal steps around zero, at most 8 bits, in groups that divide the rows.
        folder: to create.

    Raises:
        UnsupportedModel: a layer is something that the format cannot say, or the package is missing; nothing is written.
    """
    if importlib.util.find_spec("compressed_tensors") is None:
        raise UnsupportedModel("this export needs the package compressed-tensors: pip install 'hf_compact[compressed-tensors]'")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    state: dict[str, Tensor] = {}
    groups: dict[tuple[int, int | None], list[str]] = {}
    for name, layer in block_layers(model, compressed_modules(model)).items():
        grid = integer_grid(layer)
        _check_packable(name, grid, layer.in_features)
        bits = 4 if grid.bits <= 4 else 8
        groups.setdefault((bits, grid.group_size), []).append(name)
        state[f"{name}.weight_packed"] = pack_to_int32(grid.levels, bits)
        state[f"{name}.weight_scale"] = grid.scale.to(model.dtype)
        state[f"{name}.weight_shape"] = torch.tensor(grid.levels.shape)
    if not groups:
        raise UnsupportedModel("no Linear in the blocks is compressed: export to dense")
    packed = {name for names in groups.values() for name in names}
    model.dequantize()
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    for name in packed:
        if isinstance(linears[name], Conv1D):
            raise UnsupportedModel(f"{name} is a Conv1D, which compressed-tensors does not know")
    state |= {key: tensor for key, tensor in model.state_dict().items() if key.removesuffix(".weight") not in packed}
    schemes = {
        f"group_{number}": {
            "targets": ["Linear"] if len(groups) == 1 else names,
            "weights": {"num_bits": bits, "type": "int", "symmetric": True, "group_size": group_size,
                        "strategy": "channel" if group_size is None else "group"},
        }
        for number, ((bits, group_size), names) in enumerate(groups.items())
    }  # fmt: skip
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": schemes,
        "ignore": [name for name in linears if name not in packed],
    }
    _save(model, folder, state, quantization_config=settings)


def _check_packable(name: str, grid: IntegerGrid | None, width: int) -> None:
    if grid is None:
        raise UnsupportedModel(f"{name} has no equal steps of at most 8 bits, which compressed-tensors needs: export to dense")
    if grid.zero is not None:  # its loader makes room for unpacked offsets and finds packed ones in the file
        raise UnsupportedModel(f"{name} has an offset, which compressed-tensors does not load: set symmetric: true in the recipe")
    if grid.activation_bits is not None:
        raise UnsupportedModel(f"{name} rounds its inputs, which packed weights alone do not say: export to bitnet or dense")
    if width % (grid.group_size or 1):
        raise UnsupportedModel(f"{name} has rows of {width}, which groups of {grid.group_size} do not divide: export to dense")


def _save(model: PreTrainedModel, folder: Path, state: dict[str, Tensor], **fields: object) -> None:
    """Tensors and a config in which `fields` stand in the place of our own quantization config."""
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    for name, value in fields.items():
        setattr(config, name, value)
    config.architectures = [type(model).__name__]
    ties = model.all_tied_weights_keys
    kept = {key: tensor.contiguous() for key, tensor in state.items() if key not in ties}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
