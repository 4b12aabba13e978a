"""A Linear with a mask in its two states: `MaskedLinear` in training with a pattern, `SparseLinear` packed."""

from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...functional.packing import pack_bits, packed_row_bytes
from ...stored import StoredLinear
from .functional import TwoMasks, n_m_mask, spread_values


class SparseLinear(StoredLinear):
    """`y = x W^T + b`, of `W` the weights that are not masked.

    Buffers: `weight [num_values]` in the dtype of the dense weight, row by row; `bitmap [out, ceil(in / 8)]` uint8.

    >>> layer = SparseLinear.pack(nn.Linear(8, 4), torch.eye(4, 8, dtype=torch.bool))
    >>> layer.weight.shape, layer.to_dense().count_nonzero().item()
    (torch.Size([4]), 4)
    """

    def __init__(self, out_features: int, in_features: int, num_values: int, dtype: str, device: Any = None) -> None:
        """Allocate zeroed buffers for a matrix `[out_features, in_features]`.

        Raises:
            ValueError: `dtype` is no floating dtype of torch.
        """
        super().__init__()
        kind = getattr(torch, dtype, None)
        if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
            raise ValueError(f"dtype must be a floating dtype of torch, got {dtype!r}")
        self.out_features, self.in_features, self.num_values = out_features, in_features, num_values
        self.register_buffer("weight", torch.zeros(num_values, dtype=kind, device=device))
        shape = (out_features, packed_row_bytes(in_features, 1))
        self.register_buffer("bitmap", torch.zeros(shape, dtype=torch.uint8, device=device))

    @classmethod
    def empty_like(cls, linear: nn.Linear, *, num_values: int, dtype: str | None = None) -> Self:
        """An empty module of the Linear's shape on its device (also meta); takes over the bias."""
        own = str(linear.weight.dtype).removeprefix("torch.")
        rows, columns = linear.weight.shape
        new = cls(rows, columns, num_values, dtype or own, linear.weight.device)
        new.register_parameter("bias", linear.bias)
        return new

    @classmethod
    @torch.no_grad()
    def pack(cls, linear: nn.Linear, mask: Tensor) -> Self:
        """What is left of a Linear under a mask `[out, in]` bool."""
        new = cls.empty_like(linear, num_values=int(mask.sum()))
        new.weight.copy_(linear.weight[mask])
        new.bitmap.copy_(pack_bits(mask.to(torch.uint8), 1))
        return new

    def spec(self) -> dict[str, Any]:
        """The settings that rebuild the empty module, as stored in the modules table."""
        return {"num_values": self.num_values, "dtype": str(self.weight.dtype).removeprefix("torch.")}

    @torch.no_grad()
    def to_dense(self, dtype: torch.dtype = torch.float32, rows: Tensor | None = None) -> Tensor:
        """The matrix `[out, in]`, or only the given `rows`; no gradients reach the weights."""
        dense = spread_values(self.weight.to(dtype), self.bitmap, self.in_features)
        return dense if rows is None else dense[rows]


class MaskedLinear(nn.Module):
    """A dense module that computes with the `n` largest of every `m` weights, and learns all of them.

    It holds the dense module's own `Parameter` objects under their names, so that checkpoints are ordinary ones. The masks
    follow from the weights; until they are made, the product is dense.

    Args:
        module: a Linear or Conv1D.
        n: how many stay.
        m: of how many that follow each other along the inputs.
        has_own: whether gradients of the inputs come through a mask along the outputs.
    """

    def __init__(self, module: nn.Linear | Conv1D, n: int, m: int, has_own: bool) -> None:
        """Take over the parameters."""
        super().__init__()
        self.n, self.m, self.has_own, self.is_transposed = n, m, has_own, isinstance(module, Conv1D)
        self.weight = module.weight
        self.register_parameter("bias", module.bias)
        self.masks: tuple[Tensor, Tensor] | None = None

    @property
    def matrix(self) -> Tensor:
        """All weights `[out, in]`."""
        return self.weight.T if self.is_transposed else self.weight

    @torch.no_grad()
    def remask_(self) -> None:
        """Make the masks anew."""
        scores = self.matrix.abs()
        forward = n_m_mask(scores, self.n, self.m)
        self.masks = forward, n_m_mask(scores, self.n, self.m, dim=0) if self.has_own else forward

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` to `[..., out]` in the dtype of `x`, or autocast's."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        x, weight = x.to(dtype), self.matrix.to(dtype)
        y = x @ weight.T if self.masks is None else TwoMasks.apply(x, weight, *self.masks)
        return y if self.bias is None else y + self.bias.to(dtype)
