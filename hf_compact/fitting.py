"""Training of what is continuous in a compressed module: scales, codebooks, norms, biases; integers stay as they are.

Of pruned Linears, which have no scales, rows and columns are scaled.

Every trained tensor is its value times `1 + theta` with `theta` float32 from 0, so that one learning rate, in relative
steps, fits tensors of any size. Distillation fits the whole model in this way, reconstruction one block at a time.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from .errors import NumericalError
from .functional.divergence import lost_energy
from .stored import CodedModule, ScaledModule


def fit_(
    module: nn.Module, loss_of: Callable[[Callable[..., Any], int], Tensor], num_steps: int, learning_rate: float, label: str,
    linears: Collection[nn.Linear | Conv1D] = (),
) -> Iterator[float]:  # fmt: skip
    """Adam on everything continuous in a module; stored when the last step is done.

    Args:
        module: with compressed Linears somewhere in it.
        loss_of: `(call, step) -> loss`, where `call` runs the module with the values as they are in that step.
        num_steps: how many.
        learning_rate: largest relative change in one step; warmed up, then half a cosine down to a tenth.
        label: names the loss in an error.
        linears: dense ones in it (`nn.Linear`, `Conv1D`) of which every row and every column gets a factor, which the weights
            take over.

    Yields:
        The loss of every step.

    Raises:
        NumericalError: a loss or what was fitted is not finite; the module is left as it was.
    """
    with _factors(linears, label):
        yield from _fit(module, loss_of, num_steps, learning_rate, label)


def _fit(
    module: nn.Module, loss_of: Callable[[Callable[..., Any], int], Tensor], num_steps: int, learning_rate: float, label: str
) -> Iterator[float]:  # fmt: skip
    bases = _trained(module)
    thetas = {name: nn.Parameter(torch.zeros_like(base)) for name, base in bases.items()}
    optimizer = torch.optim.Adam(thetas.values(), lr=learning_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, num_steps))
    scaled: dict[nn.Module, Callable[..., Any]] = {
        part: part.scaled_forward for part in module.modules() if isinstance(part, ScaledModule)
    }
    with _frozen(module), patched_forwards(scaled):
        for step in range(num_steps):
            with torch.enable_grad():
                values = _values(module, bases, thetas)
                loss = loss_of(lambda *args, **kwargs: functional_call(module, values, args, kwargs), step)  # noqa: B023
                loss.backward()
            if not loss.isfinite():
                raise NumericalError(f"the loss of {label} step {step} is not finite: lower {label}.learning_rate")
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            yield loss.item()
    with torch.no_grad():
        tensors = dict(module.named_parameters()) | dict(module.named_buffers())
        fitted = {name: value.to(tensors[name].dtype) for name, value in _values(module, bases, thetas).items()}
        for name, value in fitted.items():
            if not value.isfinite().all():
                raise NumericalError(f"{name} is not finite after {label}: lower {label}.learning_rate")
        for name, value in fitted.items():
            tensors[name].copy_(value)


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over positions of the share of the target's energy that is lost; both `[..., features]`.

    Per position, because a few massive activations would otherwise be all there is to fit.

    >>> relative_error(torch.tensor([[0.0, 1.0], [30.0, 0.0]]), torch.tensor([[0.0, 2.0], [30.0, 0.0]])).item()
    0.125
    """
    return lost_energy(output, target).mean()


@contextmanager
def patched_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Let modules run other functions; the modules themselves stay, because models read their attributes."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, old in before.items():
            if old is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = old


@contextmanager
def _factors(linears: Collection[nn.Linear | Conv1D], label: str) -> Iterator[None]:
    """Factors of rows and columns, as buffers of ones; if nothing goes wrong the weights take over what they have become."""
    shared = Counter(id(linear.weight) for linear in dict.fromkeys(linears))
    alone = [linear for linear in dict.fromkeys(linears) if shared[id(linear.weight)] == 1]  # two would scale one weight
    forwards: dict[nn.Module, Callable[..., Any]] = {}
    for linear in alone:
        rows, columns = _matrix(linear).shape
        for name, size in (("row_factor", rows), ("column_factor", columns)):
            linear.register_buffer(name, torch.ones(size, device=linear.weight.device), persistent=False)
        forwards[linear] = partial(_factored_forward, linear)
    try:
        with patched_forwards(forwards):
            yield
        for linear in alone:
            if not _product(linear).isfinite().all():
                raise NumericalError(f"a scaled weight is not finite in {linear.weight.dtype}: lower {label}.learning_rate")
        with torch.no_grad():
            for linear in alone:
                _matrix(linear).copy_(_product(linear))
    finally:
        for linear in alone:
            del linear.row_factor, linear.column_factor


@torch.no_grad()
def _product(linear: nn.Linear | Conv1D) -> Tensor:
    """The weight times its factors, in its dtype."""
    weight = _matrix(linear)
    return (weight * linear.get_buffer("row_factor")[:, None] * linear.get_buffer("column_factor")).to(weight.dtype)


def _matrix(linear: nn.Linear | Conv1D) -> Tensor:
    """`[out, in]`, a view of the weight."""
    return linear.weight if isinstance(linear, nn.Linear) else linear.weight.T


def _factored_forward(linear: nn.Linear | Conv1D, x: Tensor) -> Tensor:
    y = nn.functional.linear(x * linear.get_buffer("column_factor").to(x.dtype), _matrix(linear))
    y = y * linear.get_buffer("row_factor").to(x.dtype)
    return y if linear.bias is None else y + linear.bias


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """No gradients for the parameters themselves, no dropout."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    was_training = module.training
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        module.eval()
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        module.train(was_training)


def _trained(module: nn.Module) -> dict[str, Tensor]:
    """What is trained: one-dimensional parameters, the scales of compressed Linears, factors of dense ones; float32 copies."""
    found = {name: parameter.detach().float() for name, parameter in module.named_parameters() if parameter.dim() == 1}
    for name, part in module.named_modules():
        if isinstance(part, ScaledModule) and not part.is_tied:
            if isinstance(part, CodedModule):
                part.decode_()
            found |= {f"{name}.{scale}": part.get_buffer(scale).float() for scale in part.trained_scales}
        found |= {f"{name}.{key}": part.get_buffer(key) for key in ("row_factor", "column_factor") if hasattr(part, key)}
    return found


def _values(module: nn.Module, bases: Mapping[str, Tensor], thetas: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Parameters in their own dtype; scales stay in float32 until they are stored."""
    parameters = dict(module.named_parameters())
    values = {name: base * (1 + thetas[name]) for name, base in bases.items()}
    return {name: value.to(parameters[name].dtype) if name in parameters else value for name, value in values.items()}


def _cosine(step: int, total: int) -> float:
    """Five per cent of warm-up, then half a cosine down to a tenth."""
    warm_up = max(1, total // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm_up) / max(1, total - warm_up)))
