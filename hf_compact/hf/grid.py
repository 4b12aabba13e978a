"""Layers as integers with a scale per group, the one thing that other engines' formats can say of a quantized matrix."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..functional.feedback import num_groups
from ..functional.packing import unpack_bits
from ..methods.codebook.layer import CodebookModule
from ..methods.ternary.layer import TernaryModule


@dataclass(frozen=True)
class IntegerGrid:
    """A weight is `scale[row, group] * (levels[row, column] - zero[row, group])`."""

    bits: int
    """Levels and offsets are integers in `[-2^(bits-1), 2^(bits-1))`."""
    group_size: int | None
    """Columns that share a scale, None for the row; the last group may be shorter."""
    levels: Tensor
    """`[out, in]` int8."""
    scale: Tensor
    """`[out, G]` float32."""
    zero: Tensor | None
    """`[out, G]` int8, or None where there is no offset."""
    activation_bits: int | None = None
    """To which the layer rounds its inputs, if it does."""


def integer_grid(module: nn.Module) -> IntegerGrid | None:
    """The integers behind a compressed matrix, or None where it is no equal-step grid of at most 8 bits.

    >>> from ..methods.codebook.layer import CodebookLinear
    >>> layer = CodebookLinear.empty_like(nn.Linear(8, 4), bits=4, grid="uniform", group_size=4, symmetric=True)
    >>> integer_grid(layer).scale.shape
    torch.Size([4, 2])
    """
    if isinstance(module, TernaryModule):
        bits = 2 if module.bits == 1.58 else int(module.bits)
        levels = module.levels()
        if module.is_sub_norm or levels.frac().any():  # two bits have levels at halves
            return None
        scale = module.scale.float().expand(module.out_features)[:, None]
        return IntegerGrid(bits, None, levels.to(torch.int8), scale, None, module.activation_bits)
    if not isinstance(module, CodebookModule) or module.grid != "uniform":
        return None
    half, groups = 2 ** (module.bits - 1), num_groups(module.in_features, module.group_size)
    codes = unpack_bits(module.weight[:, 0].view(torch.uint8), module.code_bits, module.in_features)
    scale = module.scale.float() if module.scale_bits is None else unpack_bits(module.scale[:, 0], module.scale_bits, groups)
    scale = scale if module.scale_bits is None else scale.float() * module.row_scale.float()
    zero = None if module.symmetric else unpack_bits(module.zero[:, 0], module.bits, groups)
    return IntegerGrid(
        module.bits, module.group_size, (codes.short() - half).to(torch.int8), scale,
        None if zero is None else (zero.short() - half).to(torch.int8),
    )  # fmt: skip
