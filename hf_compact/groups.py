"""Groups: what structured pruning removes as a whole, found from roles; zero first, then cut out.

A group that is zero in every slice adds nothing to its block, so cutting it out changes no output beyond rounding. One
helper, `Slice`, serves scoring, shrinking and cutting.

Dimensions of the residual stream have to be asked for. An RMSNorm divides by the mean square over all of them, so cutting `d` to
`d'` multiplies its gain by `sqrt(d / d')` and its epsilon by `d / d'`, which is exact; a LayerNorm also takes off a mean, and
models with one are refused. Dimensions inside a rotary head are not offered; whole experts have a function of their own, as
zeros do not say that they are gone (`methods/pruning/experts.py`).
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from .arch import Architecture, dense_shape, describe, norms
from .errors import ConfigError, NothingMatched, UnsupportedModel
from .reorder import (
    Slice,
    attention_shape,
    block_linears,
    channel_slices,
    column_slices,
    compressed_roles,
    head_slices,
    head_width,
    query_slices,
    row_slices,
)

KINDS = ("channels", "kv_heads", "query_heads", "layers")
#: Only where it is asked for: it changes every tensor of a model.
HIDDEN = "hidden"
#: Where a family keeps the width of its MLPs, if not in `intermediate_size`.
_WIDTH_FIELDS = {"gpt2": "n_inner", "opt": "ffn_dim", "t5": "d_ff"}
#: Families whose classes read `config.head_dim`: with fewer heads they are still ordinary models.
_HEAD_DIM = {"llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma3_text", "gemma3", "vit"}
#: Families whose norms are plain RMSNorms of the residual stream alone, all with the epsilon of the config.
_PLAIN_NORMS = {"llama", "mistral", "qwen2", "smollm3"}
#: Attributes of attention modules that follow from their shapes.
_HEADS = ("num_heads", "num_attention_heads", "n_heads")
_WIDTHS = ("split_size", "all_head_size", "inner_dim", "embed_dim")
_PER_LAYER = ("layer_types", "no_rope_layers")


@dataclass(frozen=True, eq=False)
class GroupSet:
    """All groups of one kind in one block."""

    block: str
    kind: str
    """One of `KINDS`, or `HIDDEN`, whose set is the whole model's and has no block."""
    slices: tuple[Slice, ...] = field(repr=False)
    num_groups: int
    num_pools: int = 1
    """The groups, in order, fall into so many pools of equal size, of which the same number has to stay."""
    num_rows: int = 0
    """Rows of one group in q, for attributes of the attention module; 0 for other kinds."""
    num_queries: int = 1
    """Query heads of one group."""

    def totals(self, values: Callable[[Slice], Tensor]) -> Tensor:
        """Sums over each group: `[num_groups]` float64 on the CPU.

        Args:
            values: what to sum for a slice, in the shape of its parameter.
        """
        sums = torch.zeros(self.num_groups, dtype=torch.float64)
        for part in self.slices:
            value = values(part).detach()
            others = [dim for dim in range(value.dim()) if dim != part.dim]
            vector = value.float().sum(others) if others else value.float()
            sums += vector.double().cpu()[part.index].sum(1)
        return sums

    def sizes(self) -> Tensor:
        """Parameters of each group, `[num_groups]`."""
        return self.totals(lambda part: torch.ones_like(part.parameter))

    @torch.no_grad()
    def scale_(self, groups: Tensor, factor: float) -> None:
        """Multiply groups, given by number, by a factor; 0 makes them exactly zero."""
        if not len(groups):
            return
        for part in self.slices:
            positions = part.positions(groups)
            if factor == 0:
                part.parameter.data.index_fill_(part.dim, positions, 0)
            else:
                shrunk = part.parameter.data.index_select(part.dim, positions) * factor
                part.parameter.data.index_copy_(part.dim, positions, shrunk)

    def zero_groups(self) -> Tensor:
        """Numbers of the groups that are exactly zero."""
        return (self.totals(lambda part: part.parameter != 0) == 0).nonzero()[:, 0]

    def cut_(self, model: PreTrainedModel, kept: Tensor) -> None:
        """Keep only these groups, ascending: smaller tensors, and the attributes that follow from them.

        Raises:
            ConfigError: nothing is kept, or the pools get unequal.
        """
        kept = kept.sort().values
        counts = torch.bincount(kept * self.num_pools // self.num_groups, minlength=self.num_pools)
        if not len(kept) or len(set(counts.tolist())) > 1:
            raise ConfigError(
                f"{self.block} must keep at least one of its {self.kind} in each of {self.num_pools} pools, equally many, "
                f"got {counts.tolist()}"
            )
        if len(kept) == self.num_groups:
            return
        for part in self.slices:
            part.take_(part.positions(kept))
            part.parameter.grad = None
        for module in {id(part.module): part.module for part in self.slices}.values():
            _refresh_(module)
        if self.kind == HIDDEN:
            _set_hidden_(model, [part.module for part in self.slices], len(kept))
        if self.num_rows:
            names = {module: name for name, module in model.named_modules()}
            owner = model.get_submodule(names[self.slices[0].module].rpartition(".")[0])
            _set_heads_(owner, len(kept) * self.num_rows, *self._heads(len(kept)))

    def fields(self, num_kept: int) -> dict[str, int]:
        """What the config says if every block keeps so many groups, where its class may have a rule for it."""
        if self.kind == HIDDEN:
            return {"hidden_size": num_kept}
        return {"num_attention_heads": self._heads(num_kept)[0]} if self.num_rows else {}

    def _heads(self, num_kept: int) -> tuple[int, int]:
        """Query heads and key-value heads of an attention that keeps so many groups."""
        return (num_kept, self.num_pools) if self.kind == "query_heads" else (num_kept * self.num_queries, num_kept)


def find_groups(model: PreTrainedModel, kinds: Sequence[str] = ("channels", "kv_heads")) -> list[GroupSet]:
    """The groups of a model, block by block.

    Args:
        model: of a known family.
        kinds: of `KINDS`, and `HIDDEN`. `kv_heads` takes the query heads along; `query_heads` leaves the key-value heads.

    Raises:
        ConfigError: an unknown kind.
        UnsupportedModel: the family is not in the table of families, or its norms forbid `HIDDEN`.
        NothingMatched: the model has no such groups.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=12, num_hidden_layers=1, vocab_size=8, num_attention_heads=2))
    >>> [(found.kind, found.num_groups) for found in find_groups(tiny)]
    [('channels', 12), ('kv_heads', 2)]
    """
    unknown = [kind for kind in kinds if kind not in (*KINDS, HIDDEN)]
    if unknown or not kinds:
        raise ConfigError(f"kinds must be of {', '.join((*KINDS, HIDDEN))}, got {unknown or list(kinds)}")
    arch = describe(model)
    if not arch.is_known:
        raise UnsupportedModel(f"model_type {arch.family!r} is not in the table of families: its hidden units are not known")
    found = [group_set for block in arch.blocks for group_set in block_groups(model, arch, block) if group_set.kind in kinds]
    if HIDDEN in kinds:
        found.append(hidden_groups(model, arch))
    if not found:
        raise NothingMatched(f"a {type(model).__name__} has no groups of the kinds {', '.join(kinds)} that can be cut exactly")
    return found


def block_groups(model: PreTrainedModel, arch: Architecture, block: str) -> Iterator[GroupSet]:
    """The group sets of one block, whatever their kind."""
    branches = block_linears(model, arch, block)
    for linears in branches[:1]:
        if {"up", "down"} <= linears.keys() and ("gate" in linears or _starts_at_zero(model)):
            yield GroupSet(block, "channels", tuple(channel_slices(linears)), dense_shape(linears["down"])[1])
        is_whole = "o" in linears and ({"q", "k", "v"} <= linears.keys() or "qkv" in linears)
        if is_whole and arch.family != "t5":  # whose position bias belongs to a head
            num_heads, num_kv, width = attention_shape(model, linears)
            slices = head_slices(linears, num_kv, is_interleaved=arch.family == "gpt_neox")
            yield GroupSet(block, "kv_heads", tuple(slices), num_kv, 1, num_heads // num_kv * width, num_heads // num_kv)
            if num_heads > num_kv:
                yield GroupSet(block, "query_heads", tuple(query_slices(linears, num_heads)), num_heads, num_kv, width)
    if _is_skippable(model, arch, block) and not compressed_roles(model, arch, block):
        ends = [branch[role] for branch in branches for role in ("o", "down") if role in branch]
        slices = [part for end in ends for part in row_slices(end, torch.arange(dense_shape(end)[0])[None])]
        yield GroupSet(block, "layers", tuple(slices), 1)


def hidden_groups(model: PreTrainedModel, arch: Architecture) -> GroupSet:
    """The dimensions of the residual stream: what writes them, what reads them (any head), and the gains of the norms between.

    Raises:
        UnsupportedModel: the family has other norms than RMSNorms of the residual stream.
    """
    if arch.family not in _PLAIN_NORMS:
        raise UnsupportedModel(
            f"dimensions of the residual stream are cut in {', '.join(sorted(_PLAIN_NORMS))} only, got {arch.family}"
        )
    index = torch.arange(_config(model).hidden_size)[:, None]
    parts: list[Slice] = []
    for name, role in arch.roles.items():
        make = row_slices if role in ("o", "down") else column_slices
        parts += make(model.get_submodule(name), index)
    parts += [Slice(model.get_submodule(name), "weight", 0, index) for name in norms(model)]
    for name, module in model.named_modules():  # heads: of the vocabulary, unless they are the embedding, of classes, of answers
        is_head = isinstance(module, nn.Linear) and name not in arch.roles and module.in_features == len(index)
        if is_head and module.weight is not model.get_input_embeddings().weight:
            parts += column_slices(module, index)
    return GroupSet("", HIDDEN, (*parts, Slice(model.get_input_embeddings(), "weight", 1, index)), len(index))


def drop_layers_(model: PreTrainedModel, dropped: Sequence[str]) -> None:
    """Take whole blocks out; indices of caches and lists of the config follow.

    Raises:
        ConfigError: a stack would be left empty.
        UnsupportedModel: a block is not a residual branch that can be left out.
    """
    arch = describe(model)
    for block in dropped:
        if not _is_skippable(model, arch, block):
            raise UnsupportedModel(
                f"{block} cannot be left out: what it gives is not its input plus something, or others read it"
            )
    for number, stack in enumerate(arch.stacks):
        kept = [position for position, block in enumerate(stack) if block not in dropped]
        if not kept:
            raise ConfigError(f"at least one of the {len(stack)} blocks of {stack[0].rpartition('.')[0]} must stay")
        if len(kept) < len(stack):
            _shorten_(model, stack, kept, is_decoder=arch.family == "t5" and number == len(arch.stacks) - 1)


def _shorten_(model: PreTrainedModel, stack: Sequence[str], kept: Sequence[int], is_decoder: bool) -> None:
    config, path = _config(model), stack[0].rpartition(".")[0]
    blocks = [model.get_submodule(stack[position]) for position in kept]
    for position, block in enumerate(blocks):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = position
    model.set_submodule(path, nn.ModuleList(blocks))
    for name in _PER_LAYER:
        values = getattr(config, name, None)
        if isinstance(values, list) and len(values) == len(stack):
            setattr(config, name, [values[position] for position in kept])
    for owner in (config, model.get_submodule(path.rpartition(".")[0]).config):
        setattr(owner, "num_decoder_layers" if is_decoder else "num_hidden_layers", len(kept))


def cut_zeros_(
    model: PreTrainedModel, kinds: Sequence[str] = KINDS, is_uniform: bool = True, multiple: int = 1
) -> dict[str, Any]:
    """Cut out the groups that are exactly zero.

    Args:
        model: changed in place; it stays of its class.
        kinds: which groups to look at.
        is_uniform: whether all blocks keep as many groups as the one that needs most, or as `least_valid` adds, so that the config can
            say it.
        multiple: the numbers of channels (and of hidden dimensions) that stay are multiples of it.

    Returns:
        The modules table, as `settle_`.

    Raises:
        CompactError: as `find_groups`, `GroupSet.cut_`.
    """
    found = [s.kind for s in find_groups(model, kinds)]
    dropped = [s.block for s in find_groups(model, ("layers",)) if len(s.zero_groups())] if "layers" in found else []
    for kind in (kind for kind in (*KINDS, HIDDEN) if kind in found and kind != "layers"):
        if kind == HIDDEN:
            settle_(model, describe(model))  # it has to go with the heads that are left
        step = multiple if kind in ("channels", HIDDEN) else 1
        # found anew: what was cut before has moved what comes behind
        mine = {s: _kept(s, step) for s in find_groups(model, (kind,)) if s.block not in dropped}
        if mine and (is_uniform or kind == HIDDEN):
            most = least_valid(model, next(iter(mine)), max(map(len, mine.values())), multiple if kind == HIDDEN else 1)
            mine = {s: _topped_up(s, keep, most) for s, keep in mine.items()}
        for group_set, keep in mine.items():
            group_set.cut_(model, keep)
    if dropped:
        drop_layers_(model, dropped)
    return settle_(model, describe(model))


def least_valid(model: PreTrainedModel, group_set: GroupSet, number: int, step: int = 1) -> int:
    """The least number of groups from `number` on, in steps, that the config can say of all blocks.

    Some classes want a hidden size that the number of heads divides: a Llama of 4096 dimensions may have 16 heads, not 26.

    Args:
        model: whose config, as it is now, it is about.
        group_set: the groups of one block.
        number: that is to be kept at least.
        step: of what is tried; of groups in each pool.
    """
    if group_set.num_rows and model.config.model_type not in _HEAD_DIM:
        return number  # of heads it says nothing anyway
    while number < group_set.num_groups and not _is_valid(_config(model), **group_set.fields(number)):
        number += step * group_set.num_pools
    return min(number, group_set.num_groups)


def _is_valid(config: Any, **values: int) -> bool:
    """Whether the class of a config takes these values beside its others."""
    check = getattr(config, "validate_architecture", None)
    if check is None or not values:
        return True
    other = copy.copy(config)
    for name, value in values.items():
        setattr(other, name, value)
    try:
        other.validate_architecture()
    except ValueError:
        return False
    return True


def settle_(model: PreTrainedModel, arch: Architecture) -> dict[str, Any]:
    """Bring the config in line with the shapes, as far as it can say them.

    Args:
        model: cut, and possibly compressed since.
        arch: its blocks and the roles of their Linears.

    Returns:
        The modules table of dense Linears whose shape it cannot say: empty if the model is now an ordinary one.

    Raises:
        UnsupportedModel: as `stock_of`.
    """
    config = _config(model)
    shapes: dict[str, dict[str, tuple[int, int]]] = {block: {} for block in arch.blocks}
    for block, found in shapes.items():
        for name in arch.targets(block):
            found[arch.roles[name]] = shape_of(model.get_submodule(name))
    widths = {found["down"][1] if "down" in found else None for found in shapes.values()}
    if len(widths) == 1 and None not in widths:
        setattr(config, _WIDTH_FIELDS.get(arch.family, "intermediate_size"), widths.pop())
    if arch.family in _HEAD_DIM and all({"q", "v"} <= found.keys() for found in shapes.values()):
        width = head_width(model)
        heads = {(found["q"][0] // width, found["v"][0] // width) for found in shapes.values()}
        num_heads, num_kv = next(iter(heads))
        if len(heads) == 1 and _is_valid(config, num_attention_heads=num_heads):
            config.head_dim, config.num_attention_heads = width, num_heads
            if hasattr(config, "num_key_value_heads"):
                config.num_key_value_heads = num_kv
    stock = stock_of(model, arch)
    return {
        name: linear_spec(model, name, stock)
        for name in arch.roles
        if isinstance(model.get_submodule(name), nn.Linear | Conv1D)
        and shape_of(model.get_submodule(name)) != shape_of(stock.get_submodule(name))
    }


def stock_of(model: PreTrainedModel, arch: Architecture) -> PreTrainedModel:
    """What the class makes of the config alone, on meta.

    Raises:
        UnsupportedModel: it needs more than that, or makes other modules than the model has.
    """
    try:
        with torch.device("meta"):
            stock = type(model)(model.config)
    except TypeError as error:
        raise UnsupportedModel(f"a {type(model).__name__} is not made from its config alone: {error}") from error
    missing = arch.roles.keys() - dict(stock.named_modules()).keys()
    if missing:
        raise UnsupportedModel(f"{min(missing)} is no module of a {type(model).__name__} as its config makes it")
    return stock


def says_heads(arch: Architecture) -> bool:
    """Whether the config of the family can say fewer heads of the same width."""
    return arch.family in _HEAD_DIM


def shape_of(module: nn.Module) -> tuple[int, int]:
    """`(out, in)` of a Linear, dense or compressed."""
    if isinstance(module, nn.Linear | Conv1D):
        rows, columns = dense_shape(module)
        return rows, columns
    return module.out_features, module.in_features


def linear_spec(model: PreTrainedModel, name: str, stock: PreTrainedModel | None = None) -> dict[str, Any]:
    """The modules-table entry of a cut Linear, with what its attention module has to know that `stock` does not."""
    module = model.get_submodule(name)
    spec: dict[str, Any] = {"layer": "pruned_linear", "shape": list(shape_of(module))}
    if isinstance(module, Conv1D):
        spec["is_transposed"] = True
    path = name.rpartition(".")[0]
    owner, other = model.get_submodule(path), None if stock is None else stock.get_submodule(path)
    names = (*_HEADS, *_WIDTHS, "num_key_value_heads", "num_key_value_groups")
    own = {key: getattr(owner, key) for key in names if hasattr(owner, key)}
    own = {key: value for key, value in own.items() if getattr(other, key, None) != value}
    return spec | ({"owner": own} if own else {})


def _refresh_(module: nn.Module) -> None:
    if isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
    if not isinstance(module, nn.Linear | Conv1D):
        return
    rows, columns = dense_shape(module)
    if isinstance(module, Conv1D):
        module.nf, module.nx = rows, columns
    else:
        module.out_features, module.in_features = rows, columns


def _set_hidden_(model: PreTrainedModel, modules: Sequence[nn.Module], width: int) -> None:
    """The config and the norms of a model whose residual stream is so wide now."""
    config = _config(model)
    factor = config.hidden_size / width
    config.head_dim = head_width(model)
    config.hidden_size, config.rms_norm_eps = width, config.rms_norm_eps * factor
    for module in modules:
        if hasattr(module, "variance_epsilon"):
            module.weight.data = module.weight.data * math.sqrt(factor)
            module.variance_epsilon = config.rms_norm_eps
    head = model.get_output_embeddings()
    if head is not None:
        _refresh_(head)


def _set_heads_(owner: nn.Module, rows: int, num_heads: int, num_kv: int) -> None:
    """Attributes of an attention module whose q has so many rows."""
    values = dict.fromkeys(_HEADS, num_heads) | dict.fromkeys(_WIDTHS, rows)
    values |= {"num_key_value_heads": num_kv, "num_key_value_groups": num_heads // num_kv}
    for name, value in values.items():
        if hasattr(owner, name):
            setattr(owner, name, value)


def _config(model: PreTrainedModel) -> Any:
    """What holds the widths; for a decoder beside an encoder, transformers would hand out a copy."""
    return model.config if model.config.is_encoder_decoder else model.config.get_text_config(decoder=True)


def _starts_at_zero(model: PreTrainedModel) -> bool:
    """Whether the activation of a plain MLP maps 0 to 0, so that a channel of zeros gives nothing."""
    config = _config(model)
    names = ("hidden_act", "activation_function", "dense_act_fn", "hidden_activation")
    name = next(value for key in names if isinstance(value := getattr(config, key, None), str))
    return bool(ACT2FN[name](torch.zeros(1)) == 0)


def _is_skippable(model: PreTrainedModel, arch: Architecture, block: str) -> bool:
    """Whether the block's input goes past it unchanged: no norm on the sum, no values that later blocks read."""
    if arch.family == "bert" or not arch.is_known:
        return False
    if getattr(model.config, "scale_attn_by_inverse_layer_idx", False):  # of GPT-2: the blocks behind would change
        return False
    if arch.family == "opt":
        return bool(model.config.do_layer_norm_before)
    return not (arch.family == "t5" and any(block == stack[0] for stack in arch.stacks))


def _kept(group_set: GroupSet, multiple: int) -> Tensor:
    """Groups that are not all zero; zeros join them until pools are equal and the number is a multiple."""
    zeros = group_set.zero_groups()
    alive = torch.ones(group_set.num_groups, dtype=torch.bool)
    alive[zeros] = False
    kept = alive.nonzero()[:, 0]
    most = max(int(alive.view(group_set.num_pools, -1).sum(1).max()) * group_set.num_pools, group_set.num_pools)
    most = min(-(-most // multiple) * multiple, group_set.num_groups)
    return _topped_up(group_set, kept, most)


def _topped_up(group_set: GroupSet, kept: Tensor, number: int) -> Tensor:
    """So many groups, the given ones among them, equally many of each pool."""
    chosen = torch.zeros(group_set.num_groups, dtype=torch.bool)
    chosen[kept] = True
    pools = chosen.view(group_set.num_pools, -1)
    each = number // group_set.num_pools
    for pool in pools:
        missing = each - int(pool.sum())
        pool[(~pool).nonzero()[:missing, 0]] = True
    return chosen.nonzero()[:, 0]
