"""Sort the units of a model once, run it smaller in place, or take a smaller one out.

Sorting permutes rows and the columns that read them, which changes no output. A sub-model of width `w` and depth `d` is the first
channels and heads of every block and the first blocks; in place the columns of what is left out see zeros.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ...arch import describe
from ...capture import mean_input_squares
from ...errors import ConfigError, UnsupportedModel
from ...groups import GroupSet, drop_layers_, find_groups, least_valid, says_heads, settle_
from ...reorder import Slice, permute_

#: In `config.json`, where stock transformers ignores it: what is sorted.
FIELD = "sorted_units"


@torch.no_grad()
def sort_units_(
    model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]] = (), kinds: Sequence[str] = ("channels", "kv_heads"),
    channel_multiple: int = 8,
) -> PreTrainedModel:  # fmt: skip
    """Put channels and heads in the order of their importance, in place; no output changes beyond rounding.

    Args:
        model: dense, of a known family. Heads stay in families whose config cannot say fewer of them.
        batches: model inputs. With them the importance is the energy of what a unit adds to the output, without them the
            energy of the weights that read it.
        kinds: of channels, kv_heads.
        channel_multiple: sub-models have multiples of so many channels.

    Raises:
        NothingMatched: the model has no such units.
        UnsupportedModel: its family is not known.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=2, vocab_size=8, num_attention_heads=2))
    >>> extract(sort_units_(tiny), width=0.5, depth=0.5).config.intermediate_size
    8
    """
    kept = [kind for kind in kinds if kind != "kv_heads" or says_heads(describe(model))]
    sets = find_groups(model, kept or kinds)
    energies = mean_input_squares(model, {_reader(group_set).module for group_set in sets}, batches)
    for group_set in sets:
        reader = _reader(group_set)
        energy = energies.get(reader.module)

        def importance(part: Slice, reader: Slice = reader, energy: Tensor | None = energy) -> Tensor:
            if part is not reader:
                return torch.zeros_like(part.parameter)
            squares = part.parameter.float().square()
            return squares if energy is None else squares * (energy[:, None] if part.dim == 0 else energy)

        permute_(group_set.slices, group_set.totals(importance).argsort(descending=True, stable=True))
    setattr(model.config, FIELD, {"kinds": kept, "channel_multiple": channel_multiple})
    return model


@dataclass(frozen=True)
class SubModel:
    """What stays of a sorted model."""

    numbers: dict[GroupSet, int]
    """Units of every set."""
    path: str
    """Where the blocks are."""
    num_blocks: int
    """How many of them."""


def sub_model(model: PreTrainedModel, width: float, depth: float) -> SubModel:
    """What stays of a sorted model at these shares.

    Raises:
        ConfigError: the model is not sorted, or a share is not in (0, 1].
        UnsupportedModel: it has more than one stack of blocks.
    """
    found: dict[str, Any] | None = getattr(model.config, FIELD, None)
    if found is None:
        raise ConfigError("the model is not sorted: call sort_units_(model) first, or train it with SortedNetCallback")
    for name, share in (("width", width), ("depth", depth)):
        if not 0 < share <= 1:
            raise ConfigError(f"{name} must be in (0, 1], got {share}")
    stacks = describe(model).stacks
    if len(stacks) > 1:
        raise UnsupportedModel(f"sub-models need one stack of blocks, a {type(model).__name__} has {len(stacks)}")
    multiples = {"channels": found["channel_multiple"]}
    sets = find_groups(model, found["kinds"])
    numbers = {s: least_valid(model, s, _share(s.num_groups, width, multiples.get(s.kind, 1))) for s in sets}
    return SubModel(numbers, stacks[0][0].rpartition(".")[0], _share(len(stacks[0]), depth, 1))


@contextmanager
def active(model: PreTrainedModel, width: float = 1.0, depth: float = 1.0) -> Iterator[PreTrainedModel]:
    """Run a sorted model as one of its sub-models, in place.

    Raises:
        CompactError: as `sub_model`.
    """
    with narrowed(model, sub_model(model, width, depth)):
        yield model


@contextmanager
def narrowed(model: PreTrainedModel, part: SubModel) -> Iterator[None]:
    """As `active`, for what `sub_model` has found."""
    whole = model.get_submodule(part.path)
    handles = [
        _reader(group_set).module.register_forward_pre_hook(_narrowing(_reader(group_set).index[:number].numel()))
        for group_set, number in part.numbers.items()
        if number < group_set.num_groups
    ]
    try:
        model.set_submodule(part.path, nn.ModuleList(list(whole.children())[: part.num_blocks]))
        yield
    finally:
        model.set_submodule(part.path, whole)
        for handle in handles:
            handle.remove()


def extract(model: PreTrainedModel, width: float = 1.0, depth: float = 1.0) -> PreTrainedModel:
    """A sub-model as an ordinary model of its own, which `save_pretrained` writes for stock transformers.

    Args:
        model: sorted; it is not changed.
        width: kept channels and heads / all; channels are rounded up to their multiple, heads to a number that the config can say.
        depth: kept blocks / all, rounded up.

    Raises:
        CompactError: as `sub_model`; or its blocks cannot be left out.
    """
    new = copy.deepcopy(model)
    part = sub_model(new, width, depth)
    for group_set, number in part.numbers.items():
        group_set.cut_(new, torch.arange(number))
    dropped = describe(new).blocks[part.num_blocks :]
    if dropped:
        drop_layers_(new, dropped)
    settle_(new, describe(new))
    return new


def _share(number: int, share: float, multiple: int) -> int:
    """A share of a number, rounded up to a multiple.

    >>> _share(72, 0.5, 8), _share(3, 0.5, 1)
    (40, 2)
    """
    return min(number, math.ceil(math.ceil(share * number - 1e-9) / multiple) * multiple)


def _reader(group_set: GroupSet) -> Slice:
    """Columns of `down` or `o`."""
    return group_set.slices[-1]


def _narrowing(width: int) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (F.pad(args[0][..., :width], (0, args[0].shape[-1] - width)), *args[1:])

    return hook
