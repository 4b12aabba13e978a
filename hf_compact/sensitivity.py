"""What an error in a model costs its loss, by Linear and by row of its output; from gradients of the dense model.

For small errors the loss grows by `1/2 sum_t (g_t . dy_t)^2` with `g_t` the gradient at a Linear's output for token t,
for labels drawn from the model itself (the Fisher matrix). With one weight per row, `b_r = mean_t g_tr^2`, it reads
`1/2 sum_r b_r dw_r H dw_r^T` with `H` the gram matrix of the inputs.

Source: the diagonal of K-FAC's output factor (arXiv 1503.05671). Tried and left out: weights of the tokens in `H` by the
size of their gradients (GuidedQuant, arXiv 2505.07004), which changed nothing at half strength and at full strength let
layers forget the few tokens that carry massive activations.
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


@dataclass(frozen=True)
class Sensitivity:
    """Of the Linears that were asked for, by name; over the batches of all ranks."""

    rows: dict[str, Tensor]
    """`[out]` float64, mean of the squared gradient at each output."""
    grams: dict[str, Tensor]
    """`[in, in]` mean of x x^T over the first tokens: for forecasts, not for solving."""
    num_tokens: int
    """In all batches."""


def measure(
    model: PreTrainedModel, arch: Architecture, names: Sequence[str], batches: Sequence[Mapping[str, Tensor]],
    num_gram_tokens: int,
) -> Sensitivity:  # fmt: skip
    """One backward pass over every sequence.

    Args:
        model: dense and whole.
        arch: its blocks; gradients start at the inputs of the first.
        names: the Linears to look at.
        batches: model inputs.
        num_gram_tokens: about how many tokens the gram matrices are made from.

    Raises:
        NumericalError: gradients are not finite.
    """
    shapes = {name: dense_shape(model.get_submodule(name)) for name in names}
    rows = {name: torch.zeros(shape[0], dtype=torch.float64) for name, shape in shapes.items()}
    grams = {name: torch.zeros(shape[1], shape[1]) for name, shape in shapes.items()}
    seen = num_inputs = 0
    for number, batch in enumerate(batches):
        is_counted = seen * distributed.world_size() < num_gram_tokens
        seen += next(iter(batch.values())).shape[:2].numel()
        num_inputs = seen if is_counted else num_inputs
        _gradients(model, arch, batch, number, rows, grams if is_counted else None)
    count = torch.tensor([seen, num_inputs], dtype=torch.float64)
    distributed.sum_([count, *rows.values(), *grams.values()])
    num_tokens, num_inputs = (int(value) for value in count.tolist())
    for name in names:
        rows[name] /= num_tokens
        if not rows[name].isfinite().all():
            raise NumericalError(f"gradients at the output of {name} are not finite: set sensitivity to none")
        grams[name] /= num_inputs
    return Sensitivity(rows, grams, num_tokens)


def _gradients(
    model: PreTrainedModel, arch: Architecture, batch: Mapping[str, Tensor], seed: int, rows: Mapping[str, Tensor],
    grams: Mapping[str, Tensor] | None,
) -> None:  # fmt: skip
    """Forward and backward over one batch, one sequence at a time; adds to both tables."""
    generator = torch.Generator(model.device).manual_seed(seed)

    def watch(name: str, args: tuple[Tensor, ...], output: Tensor) -> None:
        if grams is not None:
            add_gram_(grams[name], args[0].detach().cpu())

        def note(gradient: Tensor) -> None:
            rows[name].add_(gradient.flatten(0, -2).float().square().sum(0).cpu())

        output.register_hook(note)

    hooks = [
        model.get_submodule(name).register_forward_hook(lambda m, args, output, name=name: watch(name, args, output))
        for name in rows
    ]
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
        return (values * torch.randn(values.shape, generator=generator, device=values.device)).sum()
    with torch.no_grad():
        labels = torch.multinomial(values.softmax(1), 1, generator=generator)[:, 0]
    return nn.functional.cross_entropy(values, labels, reduction="sum")
