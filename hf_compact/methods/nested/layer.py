"""The modules that hold a container: `weight` is `[out, 1, in]` int8, a shape that no dense weight has.

Nothing but the container is stored or kept in memory: a view is computed from it in every forward pass. The offset is
int8, scales are float16 whatever the model's dtype is.
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...functional.feedback import num_groups
from ...stored import ScaledModule, StoredEmbedding, StoredLinear, SwitchableModule
from .functional import Nested, dequantize


class NestedModule(SwitchableModule):
    """State that the Linear and the Embedding share.

    Buffers: `weight [out, 1, in]` int8, the container; `scale [out, G]` float16; `zero [out, G]` int8;
    `multiplier [views - 1, out]` float16 of the views below the container.
    """

    def __init__(
        self, out_features: int, in_features: int, *, bits: int, widths: Sequence[int], group_size: int | None,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        """Allocate zeroed buffers for a matrix `[out_features, in_features]`.

        Raises:
            ValueError: `widths` do not fall from 8, or `bits` is none of them.
        """
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        self.bits, self.widths, self.group_size = bits, tuple(widths), group_size
        if list(widths) != sorted({8, *widths}, reverse=True) or not 1 <= self.widths[-1] <= self.widths[0] == 8:
            raise ValueError(f"widths must fall from 8, got {widths}")
        if bits not in self.widths:
            raise ValueError(f"bits must be one of the widths {widths}, got {bits}")
        groups = num_groups(in_features, group_size)

        def buffer(name: str, *shape: int, dtype: torch.dtype) -> None:
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device))

        buffer("weight", out_features, 1, in_features, dtype=torch.int8)
        buffer("scale", out_features, groups, dtype=torch.float16)
        buffer("zero", out_features, groups, dtype=torch.int8)
        if len(self.widths) > 1:
            buffer("multiplier", len(self.widths) - 1, out_features, dtype=torch.float16)

    def spec(self) -> dict[str, Any]:
        """The settings that rebuild the empty module, as stored in the modules table."""
        return {"bits": self.bits, "widths": list(self.widths), "group_size": self.group_size}

    @torch.no_grad()
    def load_nested_(self, nested: Nested, rows: slice = slice(None)) -> Self:
        """Take over a solver's result, or that of the given `rows` into their part of the buffers."""
        self.weight[rows].copy_(nested.codes[:, None])
        self.scale[rows].copy_(nested.scale)
        self.zero[rows].copy_(nested.zero)
        if len(self.widths) > 1:
            self.multiplier[:, rows].copy_(nested.multiplier[1:])
        return self

    def to_dense(self, dtype: torch.dtype = torch.float32, rows: Tensor | None = None) -> Tensor:
        """The current view `[out, in]`, or only the given `rows` of it; computed in `dtype`."""
        view = self.widths.index(self.bits)
        take = slice(None) if rows is None else rows
        multiplier = self.multiplier[view - 1][take] if view else None
        scale, zero = self.scale[take].to(dtype), self.zero[take]
        return dequantize(self.weight[take][:, 0], self.bits, scale, zero, self.group_size, multiplier)


class NestedLinear(NestedModule, ScaledModule, StoredLinear):
    """`y = x W^T + b` with `W` the current view of the container.

    >>> layer = NestedLinear.empty_like(nn.Linear(8, 4), bits=4, widths=(8, 4), group_size=None)
    >>> layer.to_dense().shape
    torch.Size([4, 8])
    """

    @classmethod
    def empty_like(cls, linear: nn.Linear, **settings: Any) -> Self:
        """An empty module of the Linear's shape on its device (also meta); takes over the bias."""
        new = cls(*linear.weight.shape, device=linear.weight.device, **settings)
        new.register_parameter("bias", linear.bias)
        return new

    @property
    def trained_scales(self) -> tuple[str, ...]:
        """The current view's factors of its rows, which no other view reads; at eight bits the scales, which all of them do."""
        return ("scale",) if self.bits == 8 else ("multiplier",)

    def scaled_forward(self, x: Tensor) -> Tensor:
        """As in the base; a scale per group is no factor of an output."""
        if self.bits == 8:
            return F.linear(x, self.to_dense(x.dtype), self.bias)
        matrix = dequantize(self.weight[:, 0], self.bits, self.scale.to(x.dtype), self.zero, self.group_size)
        y = F.linear(x, matrix) * self.multiplier[self.widths.index(self.bits) - 1].to(x.dtype)
        return y if self.bias is None else y + self.bias


class NestedEmbedding(NestedModule, StoredEmbedding):
    """Row lookup in a container; only the rows that are asked for are dequantized."""

    @classmethod
    def empty_like(cls, embedding: nn.Embedding, **settings: Any) -> Self:
        """An empty module of the Embedding's shape on its device (also meta)."""
        new = cls(*embedding.weight.shape, device=embedding.weight.device, **settings)
        new.factor, new.dtype = getattr(embedding, "scalar_embed_scale", 1.0), embedding.weight.dtype
        return new
