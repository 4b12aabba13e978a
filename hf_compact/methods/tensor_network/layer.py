"""The module that holds a tensor train: a chain of small `nn.Linear`s.

Every contraction of a core is a reshape and a matrix product, so the cores are child Linears `core0`, `core1`, …, and
whatever works on Linears (quantizers, adapters) works on them. A product from the last core to the first can take more
operations than the matrix that it stands for; then the matrix is rebuilt for the call, and dropped.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import UnsupportedModel
from .functional import (
    check_factors,
    contract,
    multiply_adds,
    num_parameters,
    peak_values,
    pivot,
    rebuild_multiply_adds,
)

LAYOUT_VERSION = 1
"""Value of the `weight` buffer."""


class TensorTrainLinear(nn.Module):
    """`y = x W^T + b` with `W` from `d` cores; two cores with factors (O, 1) and (1, I) are plain low rank.

    Core `k` is a Linear from `(i_k, r_k)` to `(r_{k-1}, o_k)`. With `is_pivoted`, which is for plain low rank, the
    inner values are outputs themselves: `y = [h, core0(h)]` with `h = core1(x)`, in the order `out_order`, which takes
    `r (O + I - r)` values. With `is_sorted` rows and columns are permuted before they are cut into factors.

    Buffers: `weight [1]` int8, the layout's version: transformers alone then refuses the files by its shape.
    `out_order [out]` int32, `in_order [in]` int32 where they are needed.

    Args:
        out_factors: `d` factors of the outputs.
        in_factors: `d` factors of the inputs.
        ranks: `d - 1` bond dimensions.
        is_pivoted: see above.
        is_sorted: see above.
        ties: cores that are another module's -> its full name in the model, which the modules' owner ties.
        device: of everything.
        dtype: of the cores.

    Raises:
        ValueError: the factors and ranks do not belong together.

    >>> layer = TensorTrainLinear([8, 1], [1, 6], [3])
    >>> layer(torch.ones(2, 6)).shape, layer.num_values
    (torch.Size([2, 8]), 42)
    """

    mode: Literal["auto", "factored", "dense"] = "auto"
    """Factored, rebuilt for every call, or whichever takes fewer operations. A core that is hooked is always used. Not stored."""

    active_rank: int | None = None
    """Plain low rank in training: only so many of the first inner values are used, and the matrix is not rebuilt."""

    def __init__(
        self, out_factors: Sequence[int], in_factors: Sequence[int], ranks: Sequence[int], *, is_pivoted: bool = False,
        is_sorted: bool = False, ties: Mapping[str, str] | None = None, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        """Allocate cores, on meta if asked to."""
        super().__init__()
        self.out_factors, self.in_factors, self.ranks = list(out_factors), list(in_factors), list(ranks)
        self.out_features, self.in_features = math.prod(out_factors), math.prod(in_factors)
        self.is_pivoted, self.is_sorted, self.ties = is_pivoted, is_sorted, dict(ties or {})
        check_factors((self.out_features, self.in_features), self.out_factors, self.in_factors, self.ranks)
        #: Whether this is a plain product of two matrices.
        self.is_low_rank = len(self.ranks) == 1 and self.out_factors[1] == 1 and self.in_factors[0] == 1
        if is_pivoted and (not self.is_low_rank or is_sorted):
            raise ValueError(
                f"is_pivoted is for two cores with the factors (O, 1) and (1, I), got {out_factors} and {in_factors}"
            )
        if not self.ties.keys() <= {*self.linears}:
            raise ValueError(f"ties must name cores, {', '.join(self.linears)}, got {', '.join(self.ties)}")
        bonds = [1, *self.ranks, 1]
        for k, (o, i) in enumerate(zip(self.out_factors, self.in_factors, strict=True)):
            rows = o - bonds[1] if is_pivoted and k == 0 else bonds[k] * o
            self.add_module(f"core{k}", nn.Linear(i * bonds[k + 1], rows, bias=False, device=device, dtype=dtype))
        self.register_buffer("weight", torch.full((1,), LAYOUT_VERSION, dtype=torch.int8, device=device))
        if is_pivoted or is_sorted:
            self.register_buffer("out_order", torch.arange(self.out_features, dtype=torch.int32, device=device))
        if is_sorted:
            self.register_buffer("in_order", torch.arange(self.in_features, dtype=torch.int32, device=device))
        self.register_parameter("bias", None)
        self._most_factored = self._break_even()

    @classmethod
    def empty_like(
        cls, linear: nn.Linear, *, out_factors: Sequence[int], in_factors: Sequence[int], ranks: Sequence[int],
        is_pivoted: bool = False, is_sorted: bool = False, ties: Mapping[str, str] | None = None,
    ) -> Self:  # fmt: skip
        """An empty module of the Linear's shape on its device (also meta), in its dtype; takes over the bias."""
        check_factors(linear.weight.shape, out_factors, in_factors, ranks)
        kept = {"is_pivoted": is_pivoted, "is_sorted": is_sorted, "ties": ties}
        new = cls(out_factors, in_factors, ranks, **kept, device=linear.weight.device, dtype=linear.weight.dtype)
        new.register_parameter("bias", linear.bias)
        return new

    def spec(self) -> dict[str, Any]:
        """The settings that rebuild the empty module, as stored in the modules table."""
        flags = {name: True for name in ("is_pivoted", "is_sorted") if getattr(self, name)}
        ties = {"ties": self.ties} if self.ties else {}
        return {"out_factors": self.out_factors, "in_factors": self.in_factors, "ranks": self.ranks, **flags, **ties}

    @property
    def _tied_weights_keys(self) -> dict[str, str]:
        """Where `save_pretrained` looks for what is not to be stored twice."""
        return {f"{core}.weight": f"{source}.weight" for core, source in self.ties.items()}

    @property
    def cores(self) -> list[nn.Module]:
        """The core modules, first to last; quantized or adapted ones included."""
        return [self.get_submodule(name) for name in self.linears]

    @property
    def linears(self) -> list[str]:
        """Names of the cores, which other methods may compress."""
        return [f"core{k}" for k in range(len(self.ranks) + 1)]

    @property
    def is_ordered(self) -> bool:
        """Whether the first components can stand alone."""
        return self.is_low_rank and not self.is_pivoted and all(type(core) is nn.Linear for core in self.cores)

    @property
    def num_values(self) -> int:
        """Values in all cores."""
        gauge = self.ranks[0] ** 2 if self.is_pivoted else 0
        return num_parameters(self.out_factors, self.in_factors, self.ranks) - gauge

    @property
    def num_multiply_adds(self) -> int:
        """Per token, factored; a dense layer takes `out * in`."""
        gauge = self.ranks[0] ** 2 if self.is_pivoted else 0
        return multiply_adds(self.out_factors, self.in_factors, self.ranks) - gauge

    @torch.no_grad()
    def load_cores_(self, cores: Sequence[Tensor]) -> Self:
        """Take over the cores `[r_{k-1}, o_k, i_k, r_k]` of a solver.

        Raises:
            ValueError: one has another shape.
        """
        for k, (mine, core) in enumerate(zip(self.cores, cores, strict=True)):
            value = core.reshape(core.shape[0] * core.shape[1], -1)
            if mine.weight.shape != value.shape:
                raise ValueError(f"core{k} must be {list(mine.weight.shape)} as a matrix, got {list(value.shape)}")
            mine.weight.copy_(value)
        return self

    def load_factors_(self, up: Tensor, down: Tensor) -> Self:
        """Take over the product `up [out, r] @ down [r, in]`; plain low rank only."""
        if not self.is_pivoted:
            return self.load_cores_([up[None, :, None, :], down[:, None, :, None]])
        found = pivot(up, down)
        self.core0.weight.data.copy_(found.combinations)
        self.core1.weight.data.copy_(found.rows)
        self.out_order.copy_(found.order)
        return self

    @torch.no_grad()
    def set_rank(self, rank: int) -> None:
        """Cut a plain product to its first components; what is cut is gone.

        Raises:
            ValueError: the components have no order, or the rank is not in `[1, ranks[0]]`.
        """
        if not self.is_ordered:
            raise ValueError("the components of a pivoted, quantized or longer train have no order")
        if not 1 <= rank <= self.ranks[0]:
            raise ValueError(f"rank must be in [1, {self.ranks[0]}], got {rank}")
        self.core0.weight = nn.Parameter(self.core0.weight[:, :rank].clone(), requires_grad=self.core0.weight.requires_grad)
        self.core1.weight = nn.Parameter(self.core1.weight[:rank].clone(), requires_grad=self.core1.weight.requires_grad)
        self.core0.in_features = self.core1.out_features = rank
        self.ranks = [rank]
        self._most_factored = self._break_even()

    def load_orders_(self, rows: Tensor, columns: Tensor) -> None:
        """What row and column of the matrix stand at each place of the train."""
        self.out_order.copy_(rows.argsort())
        self.in_order.copy_(columns)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` to `[..., out]`.

        Raises:
            UnsupportedModel: an adapter is on a core that other modules share, into which it could not be merged.
        """
        for name, source in self.ties.items():
            if hasattr(self.get_submodule(name), "base_layer"):
                raise UnsupportedModel(
                    f"{name} is that of {source}, and an adapter on it would be merged into every Linear that shares it: "
                    'leave shared cores out (target_modules="all-linear" with exclude_modules=["core1"])'
                )
        tokens, bare = x.shape[:-1].numel(), self._bare_weights()
        if bare is not None and tokens <= self._most_factored:
            up, inner = bare[0], F.linear(x, bare[1])
            if not self.is_pivoted:
                return F.linear(inner, up, self.bias)
            if tokens > self.ranks[0] and up.dtype == x.dtype:
                # Rows of the left factor are put in order instead of outputs: less to move, and moving those took longer than the
                # r^2 multiply-adds per token that pivots save. It is not kept: a core may change without a trace, through `data`.
                up = torch.cat([torch.eye(self.ranks[0], dtype=x.dtype, device=x.device), up])
                return F.linear(inner, up[self.out_order], self.bias)
            y = _reordered(torch.cat([inner, F.linear(inner, up)], dim=-1), self.out_order)
            return y if self.bias is None else y + self.bias
        if self.is_sorted:
            x = _reordered(x, self.in_order)
        y = F.linear(x, self._matrix(x.dtype)) if self._is_rebuilt(x) else self._factored(x)
        if self.is_pivoted or self.is_sorted:
            y = _reordered(y, self.out_order)
        return y if self.bias is None else y + self.bias

    def to_dense(self, dtype: torch.dtype = torch.float32, rows: Tensor | None = None) -> Tensor:
        """The matrix `[out, in]`, or only the given `rows`; computed in `dtype`."""
        matrix = self._matrix(dtype)
        if self.is_pivoted or self.is_sorted:
            matrix = matrix[self.out_order]
        if self.is_sorted:
            matrix = torch.empty_like(matrix).index_copy_(1, self.in_order.long(), matrix)
        return matrix if rows is None else matrix[rows]

    def factors(self) -> tuple[Tensor, Tensor]:
        """Plain low rank: `(up [out, r], down [r, in])` with `W = up @ down`.

        Raises:
            ValueError: the train is another one.
        """
        if not self.is_low_rank:
            raise ValueError(f"only two cores with the factors (O, 1) and (1, I) are two factors, got {self.extra_repr()}")
        up, down = _weight(self.core0, torch.float32).detach(), self.basis(torch.float32)
        if self.is_pivoted:
            up = torch.cat([torch.eye(len(down), device=up.device), up])[self.out_order]
        dtype = next(self.parameters()).dtype
        return up.to(dtype), down.to(dtype)

    def basis(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Plain low rank: the rows `[r, in]` that every output is a combination of."""
        return _weight(self.core1, dtype).detach()

    def dense_module(self, dtype: torch.dtype) -> nn.Linear:
        """An ordinary Linear with the same values."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.to_dense(dtype).detach(), requires_grad=False)
        linear.register_parameter("bias", self.bias)
        return linear

    def extra_repr(self) -> str:
        """Shape and settings, for `print(model)`."""
        return f"{self.in_features}, {self.out_features}, " + ", ".join(f"{k}={v}" for k, v in self.spec().items())

    def _break_even(self) -> float:
        """Tokens of a call above which rebuilding the matrix takes fewer operations; kept, as decoding asks at every token."""
        excess = self.num_multiply_adds - self.out_features * self.in_features
        return rebuild_multiply_adds(self.out_factors, self.in_factors, self.ranks) / excess if excess > 0 else math.inf

    def _is_rebuilt(self, x: Tensor) -> bool:
        if self.active_rank is not None:
            return False
        if self.mode != "auto":
            return self.mode == "dense"
        return x.shape[:-1].numel() > self._most_factored and not self._is_watched

    def _bare_weights(self) -> tuple[Tensor, Tensor] | None:
        """Two factors that can be multiplied without calling their modules, as nobody would notice; None where somebody would.

        Decoding asks at every token and layer, so they are not searched for as attributes, which takes as long as a small product.
        """
        if torch.is_grad_enabled() or not self.is_low_rank or self.active_rank is not None or self.mode != "auto":
            return None
        first, second = self._modules["core0"], self._modules["core1"]
        for core in (first, second):
            if type(core) is not nn.Linear or core._forward_hooks or core._forward_pre_hooks or "forward" in core.__dict__:
                return None
        return first._parameters["weight"], second._parameters["weight"]

    @property
    def _is_watched(self) -> bool:
        """Whether somebody wants to see what a core is given, all of it at once."""
        return any(core._forward_pre_hooks or core._forward_hooks for core in self.cores)

    def _factored(self, x: Tensor) -> Tensor:
        """The product core by core, for as many tokens at a time as keep every tensor as small as an activation."""
        if self.is_low_rank:
            inner = self.core1(x)
            if self.active_rank is not None:  # a mask, so that every parameter has a gradient
                inner = inner * (torch.arange(self.ranks[0], device=x.device) < self.active_rank).to(inner.dtype)
            return torch.cat([inner, self.core0(inner)], dim=-1) if self.is_pivoted else self.core0(inner)
        rows = x.reshape(-1, self.in_features)
        peak = peak_values(self.out_factors, self.in_factors, self.ranks)
        step = len(rows) if self._is_watched else len(rows) * max(self.in_features, self.out_features) // peak
        parts = [self._product(part) for part in rows.split(max(1, step))]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(*x.shape[:-1], self.out_features)

    def _product(self, x: Tensor) -> Tensor:
        """`[T, in]` to `[T, out]`; between two cores the state is `[T, i_1 … i_k, r_k, o_{k+1} … o_d]`."""
        bonds = [1, *self.ranks, 1]
        tokens, before, after = len(x), self.in_features, 1
        for k in range(len(self.ranks), -1, -1):
            before //= self.in_factors[k]
            state = x.reshape(tokens, before, self.in_factors[k] * bonds[k + 1], after).transpose(2, 3)
            state = self.get_submodule(f"core{k}")(state)  # [T, before, after, r_{k-1} o_k]
            after *= self.out_factors[k]
            x = state.reshape(tokens, before, after // self.out_factors[k], bonds[k], self.out_factors[k]).movedim(2, 4)
        return x.reshape(tokens, self.out_features)

    def _matrix(self, dtype: torch.dtype) -> Tensor:
        """The matrix of the cores, rows and columns in the order of the factors."""
        weights = [_weight(core, dtype) for core in self.cores]
        if self.is_pivoted:
            return torch.cat([weights[1], weights[0] @ weights[1]])
        bonds = [1, *self.ranks, 1]
        shapes = [(bonds[k], o, i, bonds[k + 1]) for k, (o, i) in enumerate(zip(self.out_factors, self.in_factors, strict=True))]
        return contract([weight.reshape(shape) for weight, shape in zip(weights, shapes, strict=True)])


def _reordered(x: Tensor, order: Tensor) -> Tensor:
    """The last axis in another order; on the CPU a gather of many tokens takes a third of what `index_select` does there."""
    if x.numel() == x.shape[-1]:
        return x.index_select(-1, order)
    return x.gather(-1, order.long().expand(*x.shape[:-1], -1))


def _weight(core: Any, dtype: torch.dtype) -> Tensor:
    """The matrix of a core: its own, or what it answers to the identity if it is more than a Linear."""
    if type(core) is nn.Linear:
        return core.weight.to(dtype)
    if hasattr(core, "to_dense"):
        return core.to_dense(dtype)
    own = next(core.parameters())
    return core(torch.eye(core.in_features, dtype=own.dtype, device=own.device)).T.to(dtype)
