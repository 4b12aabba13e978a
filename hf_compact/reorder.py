"""Hidden units of a block: where each is stored, to permute them exactly or to take them out.

Three axes of a transformer block are hidden between Linears and carry no position of their own: the channels of an
MLP, the value dimensions inside a head, and whole groups of a key-value head with its query heads. Rows that make such
an axis and columns that read it go together: permuted together they change nothing, and a unit whose rows and columns
are all zero can be cut out. Everything on the residual stream, and the rotary pairs inside query and key heads, stays
where it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .arch import FAMILIES, Architecture, dense_shape

Dense = nn.Linear | Conv1D
_PARTS = ({"gate", "up", "down"}, {"q", "k", "v", "qkv", "o"}, {"cross_q", "cross_k", "cross_v", "cross_o"})


def head_width(model: PreTrainedModel) -> int:
    """Dimensions of an attention head, which stays the same whatever is cut."""
    config = model.config.get_text_config(decoder=True)
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def attention_shape(model: PreTrainedModel, linears: Mapping[str, Dense]) -> tuple[int, int, int]:
    """`(query heads, key-value heads, head width)` of a block's attention; a block that was cut has fewer than the config says."""
    width = head_width(model)
    made = dense_shape(linears["v"])[0] if "v" in linears else dense_shape(linears["qkv"])[0] // 3
    return dense_shape(linears["o"])[1] // width, made // width, width


def block_linears(model: PreTrainedModel, arch: Architecture, block: str) -> list[dict[str, Dense]]:
    """Role -> dense Linear of a block's own attention and MLP, and of its cross attention by the same roles.

    Empty for a family that is known by structure only: what lies between its Linears is not known. An attention or MLP of
    which something is compressed already is left out, as its units cannot be moved or cut together.
    """
    if not arch.is_known:
        return []
    packed = compressed_roles(model, arch, block)
    closed = {role for part in _PARTS if packed & part for role in part}
    modules = {arch.roles[name]: model.get_submodule(name) for name in arch.targets(block)}
    roles = {role: module for role, module in modules.items() if isinstance(module, Dense) and role not in closed}
    cross = {role.removeprefix("cross_"): module for role, module in roles.items() if role.startswith("cross_")}
    return [{role: module for role, module in roles.items() if not role.startswith("cross_")}, *([cross] if cross else [])]


def compressed_roles(model: PreTrainedModel, arch: Architecture, block: str) -> set[str]:
    """Roles that something else than a dense Linear plays in a block of a known family."""
    names = dict(model.get_submodule(block).named_modules())
    return {role for name, role in FAMILIES[arch.family][1].items() if name in names and not isinstance(names[name], Dense)}


@dataclass(frozen=True, eq=False)
class Slice:
    """Where the units of one axis are in one parameter."""

    module: Dense
    leaf: str
    """`weight` or `bias`."""
    dim: int
    """Dimension of the stored tensor, in which a Conv1D has its outputs last."""
    index: Tensor
    """`[units, width]` positions along `dim`, int64 on the CPU."""

    @property
    def parameter(self) -> nn.Parameter:
        """The stored tensor."""
        return getattr(self.module, self.leaf)

    def positions(self, units: Tensor) -> Tensor:
        """Positions of some units along `dim`, ascending, on the parameter's device."""
        return self.index[units].flatten().sort().values.to(self.parameter.device)

    def take_(self, positions: Tensor) -> None:
        """Keep these positions, in this order. A new tensor: the old one may be a mapped file."""
        parameter = self.parameter
        parameter.data = parameter.data.index_select(self.dim, positions.to(parameter.device))


def row_slices(module: Dense, index: Tensor) -> list[Slice]:
    """Outputs of a Linear, weight and bias; `index [units, width]`."""
    weight = Slice(module, "weight", 1 if isinstance(module, Conv1D) else 0, index)
    return [weight] if module.bias is None else [weight, Slice(module, "bias", 0, index)]


def column_slices(module: Dense, index: Tensor) -> list[Slice]:
    """Inputs of a Linear; `index [units, width]`."""
    return [Slice(module, "weight", 0 if isinstance(module, Conv1D) else 1, index)]


def channel_slices(linears: Mapping[str, Dense]) -> list[Slice]:
    """The channels of an MLP: rows of up and gate, columns of down."""
    index = torch.arange(dense_shape(linears["down"])[1])[:, None]
    makers = [linears[role] for role in ("up", "gate") if role in linears]
    return [part for module in makers for part in row_slices(module, index)] + column_slices(linears["down"], index)


def value_slices(linears: Mapping[str, Dense], num_kv: int, num_heads: int) -> list[Slice]:
    """The value dimensions, key-value head by key-value head: rows of v, columns of o of every query head that reads them."""
    index = torch.arange(dense_shape(linears["v"])[0])[:, None]
    width = len(index) // num_kv
    readers = torch.arange(num_heads * width).view(num_kv, -1, width).transpose(1, 2).flatten(0, 1)
    return row_slices(linears["v"], index) + column_slices(linears["o"], readers)


def head_slices(linears: Mapping[str, Dense], num_kv: int, is_interleaved: bool = False) -> list[Slice]:
    """Key-value heads with their query heads: rows of q, k and v, columns of o.

    Args:
        linears: `q`, `k` and `v`, or `qkv`; `o`.
        num_kv: key-value heads.
        is_interleaved: whether a `qkv` holds q, k and v head by head and not one after the other.
    """
    slices = column_slices(linears["o"], torch.arange(dense_shape(linears["o"])[1]).view(num_kv, -1))
    if "qkv" not in linears:
        makers = [(linears[role], torch.arange(dense_shape(linears[role])[0]).view(num_kv, -1)) for role in "qkv"]
    else:
        rows = torch.arange(dense_shape(linears["qkv"])[0])
        index = rows.view(num_kv, -1) if is_interleaved else rows.view(3, num_kv, -1).transpose(0, 1).flatten(1)
        makers = [(linears["qkv"], index)]
    return [part for module, index in makers for part in row_slices(module, index)] + slices


def query_slices(linears: Mapping[str, Dense], num_heads: int) -> list[Slice]:
    """Query heads alone: rows of q, columns of o."""
    index = torch.arange(dense_shape(linears["q"])[0]).view(num_heads, -1)
    return row_slices(linears["q"], index) + column_slices(linears["o"], index)


def permute_(slices: Sequence[Slice], order: Tensor) -> None:
    """Put units in another order: where unit `i` was, unit `order[i]` comes."""
    for part in slices:
        source = torch.arange(part.parameter.shape[part.dim])
        source[part.index.flatten()] = part.index[order].flatten()
        part.take_(source)


def permute_channels_(linears: Mapping[str, Dense], order: Tensor) -> None:
    """Reorder the channels of an MLP.

    Args:
        linears: `up` and `down`, and `gate` where there is one.
        order: `[channels]`; new channel `i` is old channel `order[i]`.
    """
    permute_(channel_slices(linears), order)


def permute_values_(linears: Mapping[str, Dense], order: Tensor, num_heads: int) -> None:
    """Reorder the value dimensions inside each head.

    Args:
        linears: `v` and `o`.
        order: `[key-value heads, head width]`, a permutation of `0 … head width - 1` for each head.
        num_heads: query heads; each reads the values of head `i // (query heads / key-value heads)`.
    """
    num_kv, width = order.shape
    permute_(value_slices(linears, num_kv, num_heads), (torch.arange(num_kv)[:, None] * width + order).flatten())


def permute_heads_(linears: Mapping[str, Dense], order: Tensor) -> None:
    """Reorder whole key-value heads with their query heads.

    Args:
        linears: `q`, `k`, `v` and `o`.
        order: `[key-value heads]`.
    """
    permute_(head_slices(linears, len(order)), order)
