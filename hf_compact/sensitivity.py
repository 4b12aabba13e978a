"""What an error in a model costs its loss: by Linear, by row of its output, by token; from gradients of the dense model.

For small errors the loss grows by `1/2 sum_t (g_t . dy_t)^2` with `g_t` the gradient at a Linear's output for token t,
for labels drawn from the model itself (the Fisher matrix). Taken apart into one weight per row, `b_r = mean_t g_tr^2`,
and one per token, `a_t ~ sum_r g_tr^2`, it reads `sum_r b_r dw_r H dw_r^T` with `H` the gram matrix of the inputs
weighted by `a_t`.

Source: K-FAC's factors (arXiv 1503.05671) for the loss of GPTQ; the token weights as in GuidedQuant (arXiv 2505.07004).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import distributed
from .arch import Architecture, dense_shape
from .errors import NumericalError
from .functional.gram import add_gram_

_LARGEST_TOKEN = 16.0


@dataclass(frozen=True)
class Sensitivity:
    """Of the Linears that were asked for, by name; sums are over all ranks, tokens those of this one."""

    rows: dict[str, Tensor]
    """`[out]` float64, mean of the squared gradient at each output."""
    tokens: dict[str, list[Tensor]]
    """Per batch `[batch, length]`: how much a token counts, about 1 on average."""
    grams: dict[str, Tensor]
    """`[in, in]` mean of x x^T over the first tokens, weighted by those weights: for forecasts, not for solving."""
    num_tokens: int
    """In all batches."""


def measure(
    model: PreTrainedModel, arch: Architecture, names: Sequence[str], batches: Sequence[Mapping[str, Tensor]],
    token_power: float, num_gram_tokens: int,
) -> Sensitivity:  # fmt: skip
    """One backward pass over every sequence.

    Args:
        model: dense and whole.
        arch: its blocks; gradients start at the inputs of the first.
        names: the Linears to look at.
        batches: model inputs.
        token_power: how far a token counts by the size of its gradient; 0 counts all alike.
        num_gram_tokens: about how many tokens the gram matrices are made from.

    Raises:
        NumericalError: gradients are not finite.
    """
    shapes = {name: dense_shape(model.get_submodule(name)) for name in names}
    rows = {name: torch.zeros(shape[0], dtype=torch.float64) for name, shape in shapes.items()}
    tokens: dict[str, list[Tensor]] = {name: [] for name in names}
    grams = {name: torch.zeros(shape[1], shape[1]) for name, shape in shapes.items()}
    seen = num_inputs = 0
    for number, batch in enumerate(batches):
        is_counted = seen * distributed.world_size() < num_gram_tokens
        seen += next(iter(batch.values())).shape[:2].numel()
        num_inputs = seen if is_counted else num_inputs
        _gradients(model, arch, batch, number, rows, tokens, grams if is_counted else None, token_power)
    count = torch.tensor([seen, num_inputs], dtype=torch.float64)
    distributed.sum_([count, *rows.values(), *grams.values()])
    num_tokens, num_inputs = (int(value) for value in count.tolist())
    for name in names:
        rows[name] /= num_tokens
        grams[name] /= num_inputs
    return Sensitivity(rows, tokens, grams, num_tokens)


def _gradients(
    model: PreTrainedModel, arch: Architecture, batch: Mapping[str, Tensor], number: int, rows: Mapping[str, Tensor],
    tokens: Mapping[str, list[Tensor]], grams: Mapping[str, Tensor] | None, token_power: float,
) -> None:  # fmt: skip
    """Forward and backward over one batch, one sequence at a time; fills the three tables."""
    generator = torch.Generator().manual_seed(number)
    found: dict[str, list[Tensor]] = {name: [] for name in rows}

    def watch(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        inputs = args[0].detach()

        def note(gradient: Tensor) -> None:
            gradient = gradient.flatten(0, -2).float()
            rows[name].add_(gradient.square().sum(0))
            weights = gradient.square().sum(1)
            found[name].append(weights)
            if grams is not None:
                relative = _token_weights(weights, token_power)
                add_gram_(grams[name], inputs.flatten(0, -2).float() * relative.sqrt()[:, None])

        output.register_hook(note)

    hooks = [model.get_submodule(name).register_forward_hook(lambda m, a, o, name=name: watch(name, m, a, o)) for name in rows]
    for stack in arch.stacks:
        first = model.get_submodule(stack[0])
        hooks.append(first.register_forward_pre_hook(_require_grad, with_kwargs=True))
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for index in range(next(iter(batch.values())).shape[0]):
            one = {name: value[index : index + 1] for name, value in batch.items()}
            with torch.enable_grad():
                _loss(model(**one)[0], model.get_output_embeddings() is not None, generator).backward()
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        for hook in hooks:
            hook.remove()
    shape = next(iter(batch.values())).shape[:2]
    for name, parts in found.items():
        tokens[name].append(_batch_weights(name, parts, shape, token_power))


def _batch_weights(name: str, parts: list[Tensor], shape: torch.Size, power: float) -> Tensor:
    if sum(len(part) for part in parts) != shape.numel():  # an expert that sees some tokens only
        return torch.ones(shape)
    weights = torch.cat(parts)
    if not weights.isfinite().all():
        raise NumericalError(f"gradients at the output of {name} are not finite: set sensitivity to none")
    return _token_weights(weights, power).reshape(shape)


def _require_grad(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Gradients start here, where the hidden state does not bring them along: no parameter takes any."""
    hidden = args[0] if args else kwargs["hidden_states"]
    if hidden.requires_grad:
        return args, kwargs
    if args:
        return (args[0].detach().requires_grad_(True), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach().requires_grad_(True)}


def _loss(output: Tensor, is_logits: bool, generator: torch.Generator) -> Tensor:
    """Whose gradients have the Fisher matrix as their second moment: of drawn labels, or of normal noise on hidden states."""
    values = output.float().flatten(0, -2)
    if not is_logits:
        return (values * torch.randn(values.shape, generator=generator)).sum()
    with torch.no_grad():
        labels = torch.multinomial(values.softmax(1), 1, generator=generator)[:, 0]
    return nn.functional.cross_entropy(values, labels, reduction="sum")


def _token_weights(weights: Tensor, power: float) -> Tensor:
    """Mean 1 before the largest are cut: one token must not be all that a layer is fitted to."""
    relative = (weights / weights.mean().clamp_min(1e-30)) ** power
    return (relative / relative.mean()).clamp_max(_LARGEST_TOKEN)
