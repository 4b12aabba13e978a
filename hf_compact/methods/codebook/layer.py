"""The modules that hold a quantized matrix: a Linear, an Embedding, and the head that shares the embedding's tensors.

Storage: `weight` holds the packed codes as `[out, 1, row bytes]` int8. The unit axis makes its shape differ from a
dense weight at every width, so that loading without this library fails instead of reading codes as numbers. The bytes
are called int8 because T5 and others cast a layer's input to the dtype of its weight unless that is int8.
`scale` is float16 whatever the model's dtype is; casting the model leaves it alone.
"""

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...functional.feedback import num_groups, scale_codes, scale_groups_
from ...functional.packing import look_up_bits, pack_bits, packed_row_bytes, unpack_bits, unpack_numbers
from ...stored import ScaledModule, StoredEmbedding, StoredLinear, StoredModule
from .functional import Quantized, fixed_levels, grid_size, has_offset, lowest_level

#: Grids whose levels are a part of the checkpoint.
STORED_LEVELS = ("learned", "power", "split")


class CodebookModule(StoredModule):
    """State and accounting that the Linear and the Embedding share.

    Buffers: `weight [out, 1, row bytes]` int8, the packed codes; `scale [out, G]` float16, or packed codes
    `[out, 1, row bytes]` with `row_scale [out, 1]` float16 where `scale_bits` is given; `zero [out, 1, row bytes]`
    uint8, the packed offsets of an asymmetric grid; `levels [tables, grid_size]` float16, the tables of a learned, power
    or split grid; `row_table [out]` uint8 (int16 for more than 256 tables), the table of each row where the rows of a
    table are not neighbours.
    """

    def __init__(  # noqa: PLR0913 - the settings of a spec, by keyword
        self, out_features: int, in_features: int, *, bits: int, grid: str, group_size: int | None, symmetric: bool,
        scale_bits: int | None = None, num_codebooks: int = 1, is_labelled: bool = False,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        """Allocate zeroed buffers for a matrix `[out_features, in_features]`."""
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        self.bits, self.grid, self.group_size, self.symmetric = bits, grid, group_size, symmetric
        self.scale_bits, self.num_codebooks, self.is_labelled = scale_bits, num_codebooks, is_labelled
        self.code_bits = (grid_size(grid, bits) - 1).bit_length()
        groups = num_groups(in_features, group_size)

        def buffer(name: str, *shape: int, dtype: torch.dtype) -> None:
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device))

        buffer("weight", out_features, 1, packed_row_bytes(in_features, self.code_bits), dtype=torch.int8)
        if scale_bits is None:
            buffer("scale", out_features, groups, dtype=torch.float16)
        else:
            buffer("scale", out_features, 1, packed_row_bytes(groups, scale_bits), dtype=torch.uint8)
            buffer("row_scale", out_features, 1, dtype=torch.float16)
        if has_offset(grid, symmetric):
            buffer("zero", out_features, 1, packed_row_bytes(groups, bits), dtype=torch.uint8)
        if grid in STORED_LEVELS:
            buffer("levels", num_codebooks, grid_size(grid, bits), dtype=torch.float16)
        if is_labelled:
            buffer("row_table", out_features, dtype=torch.uint8 if num_codebooks <= 256 else torch.int16)

    def spec(self) -> dict[str, Any]:
        """The settings that rebuild the empty module, as stored in the modules table."""
        return {
            "bits": self.bits,
            "grid": self.grid,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "scale_bits": self.scale_bits,
            "num_codebooks": self.num_codebooks,
            "is_labelled": self.is_labelled,
        }

    @torch.no_grad()
    def load_quantized_(self, quantized: Quantized, rows: slice = slice(None), tables: Tensor | None = None) -> Self:
        """Pack a solver's result into the buffers, or that of the given `rows` into their part of them.

        `tables [out]` is the table of each row where a run of rows does not share one.
        """
        self.weight[rows].copy_(pack_bits(quantized.codes, self.code_bits)[:, None].view(torch.int8))
        if self.scale_bits is None:
            self.scale[rows].copy_(quantized.scale)
        else:
            codes, step = scale_codes(quantized.scale, self.scale_bits)
            self.scale[rows].copy_(pack_bits(codes.to(torch.uint8), self.scale_bits)[:, None])
            self.row_scale[rows].copy_(step)
        if quantized.zero is not None:
            self.zero[rows].copy_(pack_bits(quantized.zero.to(torch.uint8), self.bits)[:, None])
        if self.grid in STORED_LEVELS:
            self.levels.copy_(quantized.levels)
        if self.is_labelled:
            self.row_table.copy_(tables)
        return self

    def to_dense(self, dtype: torch.dtype = torch.float32, rows: Tensor | None = None) -> Tensor:
        """The dequantized matrix `[out, in]`, or only the given `rows`; computed in `dtype`."""
        return self._dense(dtype, rows, has_row_scale=True)

    def _dense(self, dtype: torch.dtype, rows: Tensor | None, has_row_scale: bool) -> Tensor:
        """The matrix, or what is left of it without the one factor that a row has."""

        def take(buffer: Tensor) -> Tensor:
            return buffer if rows is None else buffer[rows]

        groups = num_groups(self.in_features, self.group_size)
        scale = take(self.scale)
        if self.scale_bits is not None:
            scale = unpack_bits(scale[:, 0], self.scale_bits, groups).to(dtype)
            scale = scale * take(self.row_scale).to(dtype) if has_row_scale else scale
        elif not has_row_scale:
            scale = torch.ones_like(scale)
        scale = scale if has_row_scale else scale * 0.5**self._shift
        packed = take(self.weight)[:, 0].view(torch.uint8)
        if self.grid == "uniform":
            lowest = lowest_level(self.bits, self.symmetric)
            values = unpack_numbers(packed, self.code_bits, self.in_features, lowest, dtype)
        else:
            values = look_up_bits(packed, self.code_bits, self.in_features, *self._levels(dtype, take))
        zero = unpack_bits(take(self.zero)[:, 0], self.bits, groups).to(dtype) if "zero" in self._buffers else None
        return scale_groups_(values, scale.to(dtype), zero, self.group_size)

    @property
    def _shift(self) -> int:
        """Powers of two that the row's factor takes over: without it the values are whole numbers, whose sums float16 cannot hold."""
        return (self.bits if self.grid == "uniform" else 0) + (self.scale_bits or 0)

    def _levels(self, dtype: torch.dtype, take: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor | None]:
        """All tables, and which of them each of the rows has that are taken; None where they have the only one."""
        if self.grid not in STORED_LEVELS:
            return fixed_levels(self.grid, self.bits, self.symmetric).to(self.weight.device, dtype), None
        tables = None
        if self.is_labelled:
            tables = take(self.row_table)
        elif len(self.levels) > 1:
            run = math.ceil(self.out_features / len(self.levels))
            tables = take(torch.arange(self.out_features, device=self.weight.device)) // run
        return self.levels.to(dtype), tables


class CodebookLinear(CodebookModule, ScaledModule, StoredLinear):
    """`y = x W^T + b` with `W` dequantized on the fly.

    >>> layer = CodebookLinear.empty_like(nn.Linear(8, 4), bits=4, grid="nf4", group_size=None, symmetric=False)
    >>> layer(torch.ones(2, 8)).shape
    torch.Size([2, 4])
    """

    def __init__(self, out_features: int, in_features: int, *, bias: nn.Parameter | None, **settings: Any) -> None:
        """Allocate the buffers; the bias is taken over as it is."""
        super().__init__(out_features, in_features, **settings)
        self.register_parameter("bias", bias)
        self.trained_scales = ("scale" if self.scale_bits is None else "row_scale",)
        if self.grid in STORED_LEVELS:
            self.trained_scales += ("levels",)

    @classmethod
    def empty_like(cls, linear: nn.Linear, *, num_codebooks: int = 1, **settings: Any) -> Self:
        """An empty module of the Linear's shape on its device (also meta); takes over the bias."""
        out_features, in_features = linear.weight.shape
        return cls(
            out_features, in_features, bias=linear.bias, num_codebooks=num_codebooks, device=linear.weight.device, **settings
        )

    def scaled_forward(self, x: Tensor) -> Tensor:
        """As in the base."""
        factor = self.get_buffer(self.trained_scales[0])
        if factor.shape[1] > 1:  # a float per group is no factor of an output
            return F.linear(x, self.to_dense(x.dtype), self.bias)
        y = F.linear(x, self._dense(x.dtype, None, has_row_scale=False)) * (factor[:, 0] * 2.0**self._shift).to(x.dtype)
        return y if self.bias is None else y + self.bias


class CodebookEmbedding(CodebookModule, StoredEmbedding):
    """Row lookup in a quantized table; only the rows that are asked for are dequantized."""

    def __init__(self, out_features: int, in_features: int, *, factor: float, dtype: torch.dtype, **settings: Any) -> None:
        """Allocate the buffers; returned rows are multiplied by `factor` and have the `dtype`."""
        super().__init__(out_features, in_features, **settings)
        self.factor, self.dtype = factor, dtype

    @classmethod
    def empty_like(cls, embedding: nn.Embedding, *, num_codebooks: int = 1, **settings: Any) -> Self:
        """An empty module of the Embedding's shape on its device (also meta)."""
        rows, columns = embedding.weight.shape
        return cls(
            rows, columns, factor=getattr(embedding, "scalar_embed_scale", 1.0), dtype=embedding.weight.dtype,
            num_codebooks=num_codebooks, device=embedding.weight.device, **settings,
        )  # fmt: skip
