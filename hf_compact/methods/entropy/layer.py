"""The modules that hold an entropy-coded matrix.

On disk a weight takes what its integers carry. In memory it takes that and, from the first use on, one byte per weight
more: the stream is decoded once and the integers stay. `weight` is the stream as int8, because T5 and others cast a
layer's input to the dtype of its weight unless that is int8.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import FormatError
from ...functional.coding import decode
from ...functional.lossless import DTYPES, decode_exact
from ...functional.trellis import values_of
from ...stored import CodedModule, ScaledModule, StoredEmbedding, StoredLinear
from .functional import Integers


class EntropyModule(CodedModule):
    """State that the Linear and the Embedding share.

    Buffers: `weight [num_bytes]` int8, the coded integers; `scale [1]` float32; `row_scale [out]` and
    `column_scale [in]` float16; `codes [out, in]` int8, the values that the integers stand for, not saved, empty until they
    are needed.
    Where `exact` names a dtype, the stream holds the values themselves: there are no scales, and `codes` has that dtype.
    """

    def __init__(
        self, out_features: int, in_features: int, num_bytes: int, exact: str | None = None, is_trellis: bool = False,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        """Allocate zeroed buffers for a matrix `[out_features, in_features]`."""
        super().__init__()
        self.out_features, self.in_features, self.num_bytes = out_features, in_features, num_bytes
        self.exact, self.is_trellis = exact, is_trellis
        self.register_buffer("weight", torch.zeros(num_bytes, dtype=torch.int8, device=device))
        if exact is not None:
            self.register_buffer("codes", torch.zeros(0, dtype=DTYPES[exact], device=device), persistent=False)
            return
        self.register_buffer("scale", torch.zeros(1, dtype=torch.float32, device=device))
        self.register_buffer("row_scale", torch.zeros(out_features, dtype=torch.float16, device=device))
        self.register_buffer("column_scale", torch.zeros(in_features, dtype=torch.float16, device=device))
        self.register_buffer("codes", torch.zeros(0, dtype=torch.int8, device=device), persistent=False)

    def spec(self) -> dict[str, Any]:
        """The settings that rebuild the empty module, as stored in the modules table."""
        return {"num_bytes": self.num_bytes, "exact": self.exact, "is_trellis": self.is_trellis}

    @torch.no_grad()
    def load_integers_(self, integers: Integers, stream: Tensor) -> Self:
        """Take over a solver's result and its coded form."""
        self.weight.copy_(stream.view(torch.int8))
        self.scale.fill_(integers.scale)
        self.row_scale.copy_(integers.row_scale)
        self.column_scale.copy_(integers.column_scale)
        self._buffers["codes"] = integers.values.to(self.weight.device)
        return self

    @torch.no_grad()
    def load_exact_(self, weight: Tensor, stream: Tensor) -> Self:
        """Take over values and their coded form."""
        self.weight.copy_(stream.view(torch.int8))
        self._buffers["codes"] = weight.to(self.weight.device)
        return self

    @property
    def decoded_bytes(self) -> int:
        """One byte per weight, two where values are exact."""
        return self.out_features * self.in_features * self.codes.itemsize

    def decode_(self) -> None:
        """Decode the stream into `codes`, unless that is done or the stream is not in memory.

        Raises:
            FormatError: the stream is damaged.
        """
        if not self.codes.numel() and not self.weight.is_meta:
            try:
                stream = self.weight.view(torch.uint8)
                codes = decode(stream) if self.exact is None else decode_exact(stream, self.exact)
                codes = values_of(codes) if self.is_trellis else codes
            except ValueError as error:
                raise FormatError(str(error)) from error
            if codes.shape != (self.out_features, self.in_features):
                raise FormatError(f"entropy-coded weight is {list(codes.shape)}, not {[self.out_features, self.in_features]}")
            self._buffers["codes"] = codes.to(self.weight.device)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Another stream makes the decoded integers stale."""
        self._buffers["codes"] = self.codes.new_zeros(0)
        super()._load_from_state_dict(*args, **kwargs)

    def to_dense(self, dtype: torch.dtype = torch.float32, rows: Tensor | None = None) -> Tensor:
        """The matrix `[out, in]`, or only the given `rows`; computed in `dtype`."""
        self.decode_()
        codes = self.codes if self.codes.numel() else self.weight.new_empty(self.out_features, self.in_features)  # on meta
        if self.exact is not None:
            return (codes if rows is None else codes[rows]).to(dtype)
        row_scale = self.scale * self.row_scale
        codes, row_scale = (codes, row_scale) if rows is None else (codes[rows], row_scale[rows])
        return (codes.to(dtype) * self.column_scale.to(dtype)).mul_(row_scale.to(dtype)[:, None])


class EntropyLinear(EntropyModule, ScaledModule, StoredLinear):
    """`y = x W^T + b` with `W` from entropy-coded integers.

    >>> EntropyLinear.empty_like(nn.Linear(8, 4), num_bytes=20).weight.shape
    torch.Size([20])
    """

    @classmethod
    def empty_like(cls, linear: nn.Linear, *, num_bytes: int, exact: str | None = None, is_trellis: bool = False) -> Self:
        """An empty module of the Linear's shape on its device (also meta); takes over the bias."""
        out_features, in_features = linear.weight.shape
        new = cls(out_features, in_features, num_bytes, exact, is_trellis, linear.weight.device)
        new.register_parameter("bias", linear.bias)
        new.trained_scales = ("row_scale", "column_scale") if exact is None else ()
        return new

    def scaled_forward(self, x: Tensor) -> Tensor:
        """As in the base."""
        if self.exact is not None:
            return super().forward(x)
        y = F.linear(x * self.column_scale.to(x.dtype), self.codes.to(x.dtype)) * (self.scale * self.row_scale).to(x.dtype)
        return y if self.bias is None else y + self.bias


class EntropyEmbedding(EntropyModule, StoredEmbedding):
    """Row lookup in an entropy-coded table."""

    @classmethod
    def empty_like(cls, embedding: nn.Embedding, *, num_bytes: int, exact: str | None = None, is_trellis: bool = False) -> Self:
        """An empty module of the Embedding's shape on its device (also meta)."""
        rows, columns = embedding.weight.shape
        new = cls(rows, columns, num_bytes, exact, is_trellis, embedding.weight.device)
        new.factor, new.dtype = getattr(embedding, "scalar_embed_scale", 1.0), embedding.weight.dtype
        return new
