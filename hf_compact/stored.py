"""The base of modules that hold a compressed matrix in buffers and compute with its dense form."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from .errors import UnsupportedModel


def check_lookup(module: nn.Module, field: str) -> None:
    """Raise UnsupportedModel for an embedding whose class computes something of its own; `field` would leave it alone."""
    is_plain = type(module) is nn.Embedding or hasattr(module, "scalar_embed_scale")
    if isinstance(module, nn.Embedding) and not is_plain:
        raise UnsupportedModel(f"embedding class {type(module).__name__} is not a plain lookup: set {field} to null")


class StoredModule(nn.Module, ABC):
    """A matrix `[out, in]` in buffers of their own dtypes, which no cast of the model changes."""

    out_features: int
    in_features: int

    @abstractmethod
    def to_dense(self, dtype: torch.dtype = torch.float32, rows: Tensor | None = None) -> Tensor:
        """The matrix `[out, in]`, or only the given `rows`; computed in `dtype`."""

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """The settings that rebuild the empty module, as stored in the modules table."""

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move to a device but keep every stored dtype: a cast sees bytes, which no float cast touches.

        What a tied head shares with the embedding it still shares afterwards.
        """
        buffers, self._buffers = self._buffers, {}
        super()._apply(fn, recurse)
        moved = getattr(fn, "__dict__", {}).setdefault("_moved", WeakIdKeyDictionary())  # there while the whole model is moved
        for name, buffer in buffers.items():
            if buffer is not None:
                if buffer not in moved:
                    moved[buffer] = fn(buffer.view(torch.uint8)).view(buffer.dtype)
                self._buffers[name] = moved[buffer]
        return self

    def extra_repr(self) -> str:
        """Shape and settings, for `print(model)`."""
        return f"{self.in_features}, {self.out_features}, " + ", ".join(f"{k}={v}" for k, v in self.spec().items())


def open_linears(module: nn.Module) -> list[str]:
    """Names, below a compressed module, of the Linears it is built of that may be compressed in turn; tied ones are another's."""
    names = [name for name in getattr(module, "linears", ()) if name not in tied_parts(module)]
    return [name for name in names if isinstance(module.get_submodule(name), nn.Linear)]


def tied_parts(module: nn.Module) -> dict[str, str]:
    """Names, below a compressed module, of the Linears that are another module's -> their full names there."""
    return getattr(module, "ties", {})


class CodedModule(StoredModule):
    """A matrix that is decoded once before it is used."""

    @property
    @abstractmethod
    def decoded_bytes(self) -> int:
        """What it takes in memory once it is decoded, beside the tensors of the file."""

    @abstractmethod
    def decode_(self) -> None:
        """Decode what is in memory, unless that is done.

        Raises:
            FormatError: it is damaged.
        """


class ScaledModule(StoredModule):
    """A matrix whose scales may be trained while the integers behind it stay."""

    trained_scales: tuple[str, ...] = ()
    """Names of the buffers."""

    @property
    def is_tied(self) -> bool:
        """Whether the buffers are another module's."""
        return bool(self._non_persistent_buffers_set & set(self.trained_scales))

    @abstractmethod
    def scaled_forward(self, x: Tensor) -> Tensor:
        """As `forward`, but the scales act on inputs and outputs: their gradients then need no product of full size."""


class SwitchableModule(StoredModule):
    """A matrix that can be read at several widths, each from the same buffers."""

    bits: int
    """Width at which it is read now."""
    widths: tuple[int, ...]
    """Widths at which it can be read; a module with one takes no part in switching."""


class StoredLinear(StoredModule):
    """`y = x W^T + b` with `W` made dense on the fly."""

    bias: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` to `[..., out]` in the dtype of `x`, or autocast's.

        Raises:
            UnsupportedModel: the model has cast `x` to the dtype of the packed bytes.
        """
        if not x.is_floating_point():
            raise UnsupportedModel(f"the input of a compressed layer must be floating point, got {x.dtype}: exclude the layer")
        device = x.device.type
        is_autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # meta has none
        dtype = torch.get_autocast_dtype(device) if is_autocast else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x.to(dtype), self.to_dense(dtype), bias)

    def dense_module(self, dtype: torch.dtype) -> nn.Linear:
        """An ordinary Linear with the same values."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.to_dense(dtype), requires_grad=False)
        linear.register_parameter("bias", self.bias)
        return linear


@contextmanager
def dense_once(module: nn.Module) -> Iterator[None]:
    """Linears below a module are made dense once for as long as this lasts, and must not change meanwhile. Takes memory for all."""
    linears = [part for part in module.modules() if isinstance(part, StoredLinear)]
    for linear in linears:
        vars(linear)["to_dense"] = functools.cache(linear.to_dense)
    try:
        yield
    finally:
        for linear in linears:
            vars(linear).pop("to_dense", None)  # nested, the inner one may have ended what the outer one keeps


class StoredEmbedding(StoredModule):
    """Row lookup in a compressed table; only the rows that are asked for are made dense."""

    factor: float
    """Returned rows are multiplied by it."""
    dtype: torch.dtype
    """Of the returned rows."""

    def forward(self, ids: Tensor) -> Tensor:
        """Rows `[..., in]` of the ids `[...]`."""
        rows = self.to_dense(self.dtype, rows=ids.flatten()).reshape(*ids.shape, self.in_features)
        return rows if self.factor == 1 else rows * torch.tensor(self.factor, dtype=self.dtype)

    def dense_module(self, dtype: torch.dtype) -> nn.Embedding:
        """An ordinary Embedding with the same values; only for a table without a factor."""
        return nn.Embedding.from_pretrained(self.to_dense(dtype), freeze=True)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """As in the base; a cast changes the dtype of the returned rows."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=next(self.buffers()).device)).dtype
        return super()._apply(fn, recurse)
