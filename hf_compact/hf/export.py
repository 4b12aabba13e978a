"""Folders that need no plugin: dense, two plain Linears for each low-rank layer, or transformers' own `bitnet` format."""

import copy
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.bitnet import VALUES_PER_ITEM, pack_weights
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from ..arch import describe
from ..checkpoint import write_text
from ..errors import UnsupportedModel
from ..methods.ternary import TernaryLinear
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


def save_low_rank(model: PreTrainedModel, folder: Path, auto_class: str) -> None:
    """Write a folder that loads under `trust_remote_code=True` without this library.

    A pivoted layer becomes an unpivoted one of the same values, which takes `r^2` values more.

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
    blocks = tuple(f"{block}." for block in describe(model).blocks)
    names = outermost(names_in(model, model.config.quantization_config.modules))
    layers = {name: model.get_submodule(name) for name in names if name.startswith(blocks)}
    for name, layer in layers.items():
        if not isinstance(layer, TernaryLinear) or layer.bits != 1.58 or layer.granularity != "tensor":
            raise UnsupportedModel(f"{name} is not ternary with one scale per matrix: export to dense, or keep our own format")
        if layer.is_sub_norm:
            raise UnsupportedModel(f"{name} has a norm of its own (is_sub_norm), which only our own format can say")
    if not layers:
        raise UnsupportedModel("the model has no ternary layers in its blocks: export to dense")
    return layers


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
