"""Permutations of hidden units that leave what a block computes as it is.

Three axes of a transformer block are hidden between Linears and carry no position of their own: the channels of an
MLP, the value dimensions inside a head, and whole groups of a key-value head with its query heads. Rows that make such
an axis and columns that read it are permuted together, exactly. Everything on the residual stream, and the rotary
pairs inside query and key heads, stays where it is.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .arch import Architecture, dense_shape

Dense = nn.Linear | Conv1D


def attention_shape(model: PreTrainedModel, linears: Mapping[str, Dense]) -> tuple[int, int, int]:
    """`(query heads, key-value heads, head width)` of a block's attention, from its config and its Linears."""
    config = model.config.get_text_config(decoder=True)
    num_heads = config.num_attention_heads
    width = dense_shape(linears["o"])[1] // num_heads
    return num_heads, dense_shape(linears["v"])[0] // width, width


def block_linears(model: PreTrainedModel, arch: Architecture, block: str) -> list[dict[str, Dense]]:
    """Role -> dense Linear of a block's own attention and MLP, and of its cross attention by the same roles.

    Empty for a family that is known by structure only: what lies between its Linears is not known.
    """
    if not arch.is_known:
        return []
    modules = {arch.roles[name]: model.get_submodule(name) for name in arch.targets(block)}
    roles = {role: module for role, module in modules.items() if isinstance(module, Dense)}
    cross = {role.removeprefix("cross_"): module for role, module in roles.items() if role.startswith("cross_")}
    return [{role: module for role, module in roles.items() if not role.startswith("cross_")}, *([cross] if cross else [])]


def permute_channels_(linears: Mapping[str, Dense], order: Tensor) -> None:
    """Reorder the channels of an MLP: rows of up and gate, columns of down.

    Args:
        linears: `up` and `down`, and `gate` where there is one.
        order: `[channels]`; new channel `i` is old channel `order[i]`.
    """
    for role in ("up", "gate"):
        if role in linears:
            _take_rows_(linears[role], order)
    _take_columns_(linears["down"], order)


def permute_values_(linears: Mapping[str, Dense], order: Tensor, num_heads: int) -> None:
    """Reorder the value dimensions inside each head: rows of v, columns of o.

    Args:
        linears: `v` and `o`.
        order: `[key-value heads, head width]`, a permutation of `0 … head width - 1` for each head.
        num_heads: query heads; each reads the values of head `i // (query heads / key-value heads)`.
    """
    num_kv, width = order.shape
    starts = torch.arange(num_kv)[:, None] * width
    _take_rows_(linears["v"], (starts + order).flatten())
    per_head = order.repeat_interleave(num_heads // num_kv, 0)
    _take_columns_(linears["o"], (torch.arange(num_heads)[:, None] * width + per_head).flatten())


def permute_heads_(linears: Mapping[str, Dense], order: Tensor, num_heads: int) -> None:
    """Reorder whole key-value heads with their query heads: rows of q, k and v, columns of o.

    Args:
        linears: `q`, `k`, `v` and `o`.
        order: `[key-value heads]`.
        num_heads: query heads.
    """
    for role, take in (("q", _take_rows_), ("k", _take_rows_), ("v", _take_rows_), ("o", _take_columns_)):
        size = dense_shape(linears[role])[1 if role == "o" else 0]
        take(linears[role], torch.arange(size).view(len(order), -1)[order].flatten())


def _take_rows_(module: Dense, order: Tensor) -> None:
    """Outputs in another order. New tensors: the old ones may be a mapped file."""
    order = order.to(module.weight.device)
    module.weight.data = module.weight.data.index_select(1 if isinstance(module, Conv1D) else 0, order)
    if module.bias is not None:
        module.bias.data = module.bias.data[order]


def _take_columns_(module: Dense, order: Tensor) -> None:
    """Inputs in another order."""
    order = order.to(module.weight.device)
    module.weight.data = module.weight.data.index_select(0 if isinstance(module, Conv1D) else 1, order)
