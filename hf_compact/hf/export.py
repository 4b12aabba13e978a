"""Folders that need no plugin: dense, or with two plain Linears in the place of each low-rank layer."""

import copy
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checkpoint import write_text
from ..errors import UnsupportedModel
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
    _save(model, folder, state, {name: train.ranks[0] for name, train in trains.items()}, auto_class)


def _save(model: PreTrainedModel, folder: Path, state: dict[str, Tensor], ranks: dict[str, int], auto_class: str) -> None:
    name = type(model).__name__
    config = copy.deepcopy(model.config)
    del config.quantization_config
    config.low_rank, config.auto_map = ranks, {auto_class: f"modeling_low_rank.{name}"}
    ties = model.all_tied_weights_keys
    kept = {key: tensor.contiguous() for key, tensor in state.items() if key not in ties}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    write_text(folder / "modeling_low_rank.py", _STUB.format(name=name))
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
