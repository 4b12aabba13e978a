"""A Linear beside which a low-rank product runs."""

from typing import Any, Self

import torch
from torch import Tensor, nn

from ...stored import open_linears


class CorrectedLinear(nn.Module):
    """`y = base(x) + up(down(x)) + b` with `base` any Linear, compressed or not.

    Buffer: `weight [1]` int8, the layout's version: transformers alone then refuses the files by its shape.

    >>> layer = CorrectedLinear.empty_like(nn.Linear(8, 6), rank=2)
    >>> layer(torch.ones(3, 8)).shape
    torch.Size([3, 6])
    """

    linears = ("base",)

    def __init__(self, base: nn.Module, rank: int, device: torch.device | str, dtype: torch.dtype) -> None:
        """Allocate a product of zeros beside the base."""
        super().__init__()
        self.out_features, self.in_features, self.rank = base.out_features, base.in_features, rank
        self.base = base
        self.down = nn.Linear(self.in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, self.out_features, bias=False, device=device, dtype=dtype)
        nn.init.zeros_(self.up.weight)
        self.register_buffer("weight", torch.ones(1, dtype=torch.int8, device=device))
        self.register_parameter("bias", None)

    @classmethod
    def empty_like(cls, linear: nn.Linear, *, rank: int) -> Self:
        """A module without a correction yet, the Linear's own weight as its base (also meta); takes over the bias."""
        base = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        base.weight = linear.weight
        new = cls(base, rank, linear.weight.device, linear.weight.dtype)
        new.register_parameter("bias", linear.bias)
        return new

    def spec(self) -> dict[str, Any]:
        """The settings that rebuild the empty module, as stored in the modules table."""
        return {"rank": self.rank}

    @property
    def num_multiply_adds(self) -> int:
        """Per token: those of the base, dense unless it says its own, and of the product."""
        base = getattr(self.base, "num_multiply_adds", self.out_features * self.in_features)
        return base + self.rank * (self.out_features + self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` to `[..., out]`."""
        y = self.base(x) + self.up(self.down(x))
        return y if self.bias is None else y + self.bias

    def base_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix `[out, in]` of the base alone."""
        return self.base.weight.to(dtype) if open_linears(self) else self.base.to_dense(dtype)

    def to_dense(self, dtype: torch.dtype = torch.float32, rows: Tensor | None = None) -> Tensor:
        """The matrix `[out, in]`, or only the given `rows`; computed in `dtype`."""
        matrix = self.base_dense(dtype) + self.up.weight.to(dtype) @ self.down.weight.to(dtype)
        return matrix if rows is None else matrix[rows]

    def dense_module(self, dtype: torch.dtype) -> nn.Linear:
        """An ordinary Linear with the same values."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.to_dense(dtype).detach(), requires_grad=False)
        linear.register_parameter("bias", self.bias)
        return linear

    def extra_repr(self) -> str:
        """Shape and settings, for `print(model)`."""
        return f"{self.in_features}, {self.out_features}, rank={self.rank}"
