"""Products of bfloat16 matrices in float32, on CPUs without instructions for them.

Such a CPU multiplies them in software. The factors are exact in float32 and both ways
add up in float32, so what differs is the order of the sums: results are rounded to bfloat16 as they would be.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_WIDENED = {
    F.scaled_dot_product_attention, torch.baddbmm, torch.bmm, torch.matmul, torch.mm,
    Tensor.bmm, Tensor.matmul, Tensor.mm,
}  # fmt: skip
#: With fewer rows, reading the weight takes longer than multiplying it, and a wider copy is what costs.
_FEW_ROWS = 8
#: Outputs whose weights are widened at a time, so that an embedding takes no second place in memory.
_PIECE = 8192


def has_fast_bfloat16() -> bool:
    """Whether matrix products in bfloat16 run on instructions of the CPU; oneDNN says so, and where it is missing nobody does."""
    return not torch.backends.mkldnn.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()


@contextmanager
def fast_products() -> Iterator[None]:
    """Within it, bfloat16 products on a CPU that would compute them in software are computed in float32.

    Also a decorator. Weights stay in bfloat16 and one at a time is widened, also for a backward pass.

    >>> with fast_products():
    ...     (torch.ones(8, 4, dtype=torch.bfloat16) @ torch.ones(4, 1, dtype=torch.bfloat16)).flatten()[0]
    tensor(4., dtype=torch.bfloat16)
    """
    if has_fast_bfloat16():
        yield
    else:
        with _Widening():
            yield


@contextmanager
def plain_products() -> Iterator[None]:
    """Within it, everything is computed as it is outside of `fast_products`.

    For solvers: they compute in float32 and float64, and each of their many small operations would be looked at.

    >>> with fast_products(), plain_products():
    ...     torch.ones(1, 2) @ torch.ones(2, 1)
    tensor([[2.]])
    """
    with torch._C.DisableTorchFunction():
        yield


class _Widening(TorchFunctionMode):
    """Calls of products as they are made, with wider factors."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:  # fmt: skip
        kwargs = kwargs or {}
        given = [*args, *kwargs.values()]
        if func is F.linear and _are_narrow(given):
            return _linear(*args, **kwargs)
        if func is torch.addmm and not kwargs and args[0].dim() == 1 and _are_narrow(args):  # Conv1D of GPT-2
            bias, x, weight = args
            return _linear(x, weight.T, bias)
        if func in _WIDENED and "out" not in kwargs and _are_narrow(given[:2]):
            return func(*map(_widened, args), **{name: _widened(value) for name, value in kwargs.items()}).bfloat16()
        return func(*args, **kwargs)


def _are_narrow(values: Sequence[Any]) -> bool:
    tensors = [value for value in values if isinstance(value, Tensor)]
    return bool(tensors) and all(value.dtype == torch.bfloat16 and value.device.type == "cpu" for value in tensors)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    is_usual = input.dim() > 1 and weight.dim() == 2 and (bias is None or len(bias) == len(weight))
    if not is_usual or input.shape[:-1].numel() < _FEW_ROWS:
        return F.linear(input, weight, bias)
    return _Linear.apply(input, weight, bias)


class _Linear(torch.autograd.Function):
    """Keeps for the backward pass what is narrow, and widens it again there."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep input and weight."""
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`[..., in]`, `[out, in]`, `[out]` -> `[..., out]`."""
        wide = x.float()
        biases = repeat(None) if bias is None else bias.float().split(_PIECE)
        parts = zip(weight.split(_PIECE), biases, strict=False)
        return torch.cat([F.linear(wide, part.float(), of_part).bfloat16() for part, of_part in parts], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Of the input, the weight and the bias, each only where it is needed."""
        x, weight = ctx.saved_tensors
        grad = grads[0].float()
        rows, (needs_x, needs_weight, needs_bias) = grad.flatten(0, -2), ctx.needs_input_grad
        parts = zip(grad.split(_PIECE, -1), weight.split(_PIECE), strict=True)
        of_x = torch.stack([part @ of_weight.float() for part, of_weight in parts]).sum(0).bfloat16() if needs_x else None
        of_weight = (rows.T @ x.float().flatten(0, -2)).bfloat16() if needs_weight else None
        return of_x, of_weight, rows.sum(0).bfloat16() if needs_bias else None
