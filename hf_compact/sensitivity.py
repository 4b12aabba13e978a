"""What an error in a model costs its loss, by Linear and by row of its output; from gradients of the dense model.

For small errors the loss grows by `1/2 sum_t (g_t . dy_t)^2` with `g_t` the gradient at a Linear's output for token t,
for labels drawn from the model itself (the Fisher matrix). With one weight per row, `b_r = mean_t g_tr^2`, it reads
`1/2 sum_r b_r dw_r H dw_r^T` with `H` the gram matrix of the inputs.

Source: the diagonal of K-FAC's output factor (arXiv 1503.05671). Tried and left out: weights of the tokens in `H` by the
size of their gradients (GuidedQuant, arXiv 2505.07004), which changed nothing at half strength and at full strength let
layers forget the few tokens that carry massive activations.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import distributed
from .arch import Architecture, dense_shape, prediction_of
from .errors import NumericalError
from .functional.gram import add_gram_, without_padding


@dataclass(frozen=True)
class Sensitivity:
    """Of the Linears that were asked for, by name; over the batches of all ranks."""

    rows: dict[str, Tensor]
    """`[out]` float64, the squared gradient at each output, summed over all tokens and divided by their number."""
    grams: dict[str, Tensor]
    """`[in, in]` mean of x x^T over the first tokens: for forecasts, not for solving."""
    outputs: dict[str, Tensor]
    """`[out, out]` mean of g g^T over the same tokens as `rows`, its diagonal; empty unless it was asked for."""


def measure(
    model: PreTrainedModel, arch: Architecture, names: Sequence[str], batches: Sequence[Mapping[str, Tensor]],
    num_tokens: int, num_gram_tokens: int, progress: Callable[[int, int], None] = lambda done, total: None,
    is_full: bool = False,
) -> Sensitivity:  # fmt: skip
    """One backward pass over the first sequences.

    Args:
        model: dense and whole.
        arch: its blocks; gradients start at the inputs of the first.
        names: the Linears to look at.
        batches: model inputs.
        num_tokens: about how many tokens gradients are taken of, over all ranks.
        num_gram_tokens: about how many the gram matrices are made from.
        progress: called with the tokens that are done and all of them.
        is_full: whether the second moments between outputs are taken too.

    Raises:
        NumericalError: gradients are not finite.
    """
    shapes = {name: dense_shape(model.get_submodule(name)) for name in names}
    device = model.device
    rows = {name: torch.zeros(shape[0], dtype=torch.float64, device=device) for name, shape in shapes.items()}
    grams = {name: torch.zeros(shape[1], shape[1], device=device) for name, shape in shapes.items()}
    outputs = {name: torch.zeros(shape[0], shape[0], device=device) for name, shape in shapes.items()} if is_full else {}
    counts = {name: torch.zeros(1, dtype=torch.float64, device=device) for name in names}
    seen, real = 0, torch.zeros(1, dtype=torch.float64, device=device)
    for number, batch in enumerate(batches):
        if seen * distributed.world_size() >= num_tokens:
            break
        progress(seen, num_tokens)
        is_counted = seen * distributed.world_size() < num_gram_tokens
        size, mask = next(iter(batch.values())).shape[:2], batch.get("attention_mask")
        seen += size.numel()
        real += size.numel() if mask is None or mask.shape != size else mask.count_nonzero()
        seed = number * distributed.world_size() + distributed.rank()
        _gradients(model, arch, batch, seed, rows, outputs, grams if is_counted else {}, counts)
    distributed.sum_([*rows.values(), *outputs.values(), *grams.values(), *counts.values(), real])
    num_real = max(1, int(real))
    for name in names:
        rows[name] = rows[name].cpu() / num_real
        if is_full:
            outputs[name] = (outputs[name] / num_real).cpu()
        grams[name] = (grams[name] / counts[name].clamp_min(1)).float().cpu()
        if not rows[name].isfinite().all():
            raise NumericalError(f"gradients at the output of {name} are not finite: set sensitivity to none")
    return Sensitivity(rows, grams, outputs)


def _gradients(
    model: PreTrainedModel, arch: Architecture, batch: Mapping[str, Tensor], seed: int, rows: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor], grams: Mapping[str, Tensor], counts: Mapping[str, Tensor],
) -> None:  # fmt: skip
    """Forward and backward over one batch, one sequence at a time; adds to the tables, padding left out."""
    generator = torch.Generator(model.device).manual_seed(seed)
    one: dict[str, Tensor] = {}
    masks = {name: arch.mask_of(block, name) for block in arch.blocks for name in arch.targets(block)}

    def watch(name: str, args: tuple[Tensor, ...], output: Tensor) -> None:
        if name in grams:
            x = without_padding(args[0].detach(), one.get(masks[name]))
            add_gram_(grams[name], x)
            counts[name].add_(x.shape[:-1].numel())

        def note(gradient: Tensor) -> None:
            gradient = without_padding(gradient, one.get(masks[name])).flatten(0, -2).float()
            rows[name].add_(gradient.square().sum(0))
            if name in outputs:
                add_gram_(outputs[name], gradient)

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
                output = without_padding(prediction_of(model(**one)), one.get(arch.mask_of(arch.blocks[-1])))
                _loss(output, model.get_output_embeddings() is not None, generator).backward()
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
    if not values.isfinite().all():
        raise NumericalError("the model's output on the calibration set is not finite: it overflows")
    if not is_logits:
        return (values * torch.randn(values.shape, generator=generator, device=values.device)).sum()
    with torch.no_grad():
        labels = torch.multinomial(values.softmax(1), 1, generator=generator)[:, 0]
    return nn.functional.cross_entropy(values, labels, reduction="sum")
