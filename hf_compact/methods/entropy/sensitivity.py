"""How the bits of a model are dealt out: every Linear, row and token by what an error there costs the loss.

For small errors the loss grows by `1/2 sum_t (g_t . dy_t)^2` with `g_t` the gradient at a Linear's output for token t,
for labels drawn from the model itself (the Fisher matrix). Taken apart into one weight per row, `b_r = mean_t g_tr^2`,
and one per token, `a_t ~ sum_r g_tr^2`, it reads `sum_r b_r dw_r H dw_r^T` with `H` the gram matrix of the inputs
weighted by `a_t`. Then one step for the whole model, `step * U_jj / sqrt(b_r)`, is the best way to spend the bits.

Source: K-FAC's factors (arXiv 1503.05671) for the loss of GPTQ; the token weights as in GuidedQuant (arXiv 2505.07004).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ... import distributed
from ...arch import Architecture, dense_shape
from ...errors import NumericalError
from ...functional.gram import add_gram_
from ...report import LayerReport
from .config import EntropyConfig
from .rounder import Rounder

_PLAN_TOKENS = 8192
_LARGEST_TOKEN = 16.0
_PROBES = (-1.0, 0.0, 1.0)


@dataclass(frozen=True)
class Share:
    """What one Linear gets."""

    step: float
    """In units of `U_jj` for the gram matrix as it is summed."""
    row_steps: Tensor
    """`[out]` relative steps of the rows."""


class Guide:
    """The shares of all Linears of one stage; what earlier ones missed of their forecast, the later ones make up for."""

    def __init__(
        self, log_step: float, predicted: Mapping[str, float], sizes: Mapping[str, int], row_steps: Mapping[str, Tensor],
        token_weights: Mapping[str, list[Tensor]], num_tokens: float,
    ) -> None:  # fmt: skip
        """Keep the plan."""
        self.log_step, self.predicted, self.sizes = log_step, predicted, sizes
        self.row_steps, self.token_weights, self.num_tokens = row_steps, token_weights, num_tokens

    def tokens(self, names: Sequence[str], number: int) -> Tensor:
        """Weights of the tokens of one batch for Linears that share their inputs, `[batch, length]`, about 1 on average."""
        return torch.stack([self.token_weights[name][number] for name in names]).mean(0)

    def share(self, name: str, finished: Sequence[LayerReport]) -> Share:
        """The share of the next Linear, given what the finished ones really took."""
        done = [layer for layer in finished if layer.name in self.predicted]
        excess = sum(8 * layer.compressed_bytes - self.predicted[layer.name] * layer.num_weights for layer in done)
        rest = sum(self.sizes.values()) - sum(layer.num_weights for layer in done)
        log_step = self.log_step + max(-0.5, min(0.5, excess / rest))
        return Share(2**log_step * math.sqrt(self.num_tokens), self.row_steps[name])


def prepare(
    model: PreTrainedModel, arch: Architecture, names: Sequence[str], batches: Sequence[Mapping[str, Tensor]],
    config: EntropyConfig, progress: Callable[[int, int], None] = lambda done, total: None,
) -> Guide | None:  # fmt: skip
    """One pass of gradients over the calibration set, then the step whose bits meet the budget.

    Args:
        model: dense and whole.
        arch: its blocks; gradients start at the inputs of the first.
        names: the Linears to plan for.
        batches: model inputs.
        config: settings.
        progress: called with finished and all batches.

    Raises:
        NumericalError: gradients are not finite.
    """
    if config.sensitivity == "none":
        return None
    rows = {name: torch.zeros(dense_shape(model.get_submodule(name))[0], dtype=torch.float64) for name in names}
    tokens: dict[str, list[Tensor]] = {name: [] for name in names}
    grams = {name: torch.zeros(2 * [dense_shape(model.get_submodule(name))[1]]) for name in names}
    seen = num_planned = 0
    for number, batch in enumerate(batches):
        progress(number, len(batches))
        is_planned = seen < _PLAN_TOKENS
        seen += next(iter(batch.values())).shape[:2].numel()
        num_planned = seen if is_planned else num_planned
        _gradients(model, arch, batch, number, rows, tokens, grams if is_planned else None, config.token_power)
    count = torch.tensor([seen, num_planned], dtype=torch.float64)
    distributed.sum_([count, *rows.values(), *grams.values()])
    num_tokens, num_inputs = count.tolist()
    row_steps = {name: _row_steps(row / num_tokens, config.row_power) for name, row in rows.items()}
    predicted, log_step = _find_log_step(model, grams, row_steps, num_inputs, config)
    sizes = {name: dense_shape(model.get_submodule(name)).numel() for name in names}
    return Guide(log_step, predicted, sizes, row_steps, tokens, num_tokens)


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
    first = model.get_submodule(arch.blocks[0])
    hooks.append(first.register_forward_pre_hook(_require_grad, with_kwargs=True))
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for index in range(next(iter(batch.values())).shape[0]):
            one = {name: value[index : index + 1] for name, value in batch.items()}
            with torch.enable_grad():
                _loss(model(**one)[0], generator).backward()
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
        raise NumericalError(f"gradients at the output of {name} are not finite: set entropy.sensitivity to none")
    return _token_weights(weights, power).reshape(shape)


def _require_grad(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Gradients start here: no parameter takes any."""
    if args:
        return (args[0].detach().requires_grad_(True), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach().requires_grad_(True)}


def _loss(output: Tensor, generator: torch.Generator) -> Tensor:
    """Whose gradients have the Fisher matrix as their second moment: of drawn labels, or of normal noise on hidden states."""
    values = output.float().flatten(0, -2)
    if values.shape[1] < 4096:  # hidden states of an encoder
        return (values * torch.randn(values.shape, generator=generator)).sum()
    with torch.no_grad():
        labels = torch.multinomial(values.softmax(1), 1, generator=generator)[:, 0]
    return nn.functional.cross_entropy(values, labels, reduction="sum")


def _token_weights(weights: Tensor, power: float) -> Tensor:
    """Mean 1 before the largest are cut: one token must not be all that a layer is fitted to."""
    relative = (weights / weights.mean().clamp_min(1e-30)) ** power
    return (relative / relative.mean()).clamp_max(_LARGEST_TOKEN)


def _row_steps(energy: Tensor, power: float) -> Tensor:
    """Steps `1 / sqrt(b_r)`; the sensitivity of the Linear as a whole counts in full, that of its rows by the power."""
    mean = energy.mean().clamp_min(1e-30)
    relative = (energy / mean).clamp(1e-3, 1e3)
    return ((relative ** (-power / 2)) * mean**-0.5).float()


def _find_log_step(
    model: PreTrainedModel, grams: dict[str, Tensor], row_steps: Mapping[str, Tensor], num_inputs: float, config: EntropyConfig
) -> tuple[dict[str, float], float]:
    """`(bits per weight of each Linear, log2 of the step)` where their sum meets the budget, on some rows of each.

    Empties `grams`: the factors take as much memory.
    """
    rounders = {}
    sizes, guesses = {}, {}
    for name in row_steps:
        gram = grams.pop(name)
        module = model.get_submodule(name)
        weight = module.weight.detach().float().cpu()
        weight = weight if tuple(weight.shape) == tuple(dense_shape(module)) else weight.T
        rounders[name] = Rounder(weight, gram / num_inputs, config.damp, row_steps[name])
        sizes[name] = weight.numel()
        guesses[name] = math.log2(rounders[name].guess(0.0))  # of the step that leaves no bits
    total = sum(sizes.values())
    center = sum(sizes[name] * guess for name, guess in guesses.items()) / total - config.bits
    curves = {
        name: torch.tensor([rounder.bits(2 ** (center + probe), rounder.some_rows) for probe in _PROBES])
        for name, rounder in rounders.items()
    }
    low, high = _PROBES[0], _PROBES[-1]
    for _ in range(40):
        middle = (low + high) / 2
        bits = {name: _interpolate(curve, middle) for name, curve in curves.items()}
        if sum(bits[name] * sizes[name] for name in sizes) / total > config.bits:
            low = middle
        else:
            high = middle
    return bits, center + middle


def _interpolate(values: Tensor, at: float) -> float:
    """The parabola through three equidistant points at -1, 0 and 1."""
    left, middle, right = values.tolist()
    return middle + at * (right - left) / 2 + at * at * (left + right - 2 * middle) / 2
