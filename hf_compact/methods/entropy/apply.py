"""From a dense module and the gram matrix of its inputs to an entropy-coded module."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...arch import Architecture, as_linear, dense_shape
from ...errors import NumericalError, UnsupportedModel
from ...functional.coding import encode
from ...report import LayerReport
from ...sensitivity import measure
from .config import EntropyConfig
from .functional import Integers, Rounder, bits_per_weight, refit_rows
from .layer import EntropyEmbedding, EntropyLinear

_TOLERANCE = 0.004  # bits per weight
_PLAN_TOKENS = 8192
_PROBES = (-1.0, 0.0, 1.0)  # octaves around the first guess of the step


@dataclass(frozen=True)
class Share:
    """What one Linear gets."""

    step: float
    """In units of `U_jj`, for the gram matrix as it is summed."""
    row_steps: Tensor
    """`[out]` relative steps of the rows."""


class Guide:
    """The shares of all Linears of one stage; what earlier ones missed of their forecast, the later ones make up for."""

    def __init__(
        self, log_step: float, predicted: Mapping[str, float], sizes: Mapping[str, int], row_steps: Mapping[str, Tensor],
        num_tokens: float,
    ) -> None:  # fmt: skip
        """Keep the plan."""
        self.log_step, self.predicted, self.sizes = log_step, predicted, sizes
        self.row_steps, self.num_tokens = row_steps, num_tokens

    def share(self, name: str, finished: Sequence[LayerReport]) -> Share:
        """The share of the next Linear, given what the finished ones really took."""
        done = [layer for layer in finished if layer.name in self.predicted]
        excess = sum(8 * layer.compressed_bytes - self.predicted[layer.name] * layer.num_weights for layer in done)
        rest = sum(self.sizes.values()) - sum(layer.num_weights for layer in done)
        log_step = self.log_step + max(-0.5, min(0.5, excess / rest))
        return Share(2**log_step * math.sqrt(self.num_tokens), self.row_steps[name])


def prepare(
    model: PreTrainedModel, arch: Architecture, names: Sequence[str], batches: Sequence[Mapping[str, Tensor]], config: EntropyConfig
) -> Guide | None:  # fmt: skip
    """Measure the sensitivities and find the step whose bits meet the budget; None where every Linear gets the same rate.

    With one weight per row in the loss, one step for the whole model, `step * U_jj / sqrt(b_r)`, is the
    best way to spend the bits.

    Raises:
        NumericalError: gradients are not finite.
    """
    if config.sensitivity == "none":
        return None
    found = measure(model, arch, names, batches, _PLAN_TOKENS)
    row_steps = {name: _row_steps(row, config.row_power) for name, row in found.rows.items()}
    predicted, log_step = _find_log_step(model, found.grams, row_steps, config)
    sizes = {name: dense_shape(model.get_submodule(name)).numel() for name in names}
    return Guide(log_step, predicted, sizes, row_steps, found.num_tokens)


def compress_linear(
    linear: nn.Linear, gram: Tensor | None, config: EntropyConfig, solve: bool = True, guide: Share | None = None
) -> EntropyLinear:
    """Quantize one Linear; without a gram matrix its inputs count as independent.

    Args:
        linear: `[out, in]`.
        gram: `[in, in]` sum of x x^T, or None.
        config: settings.
        solve: with False the module is empty and its size is what the settings ask for.
        guide: `sensitivity.Share` of this Linear; None gives it `config.bits`.

    Raises:
        NumericalError: the gram matrix cannot be factorised.
    """
    if not solve:
        return EntropyLinear.empty_like(linear, num_bytes=_expected_bytes(linear.weight, config.bits))
    weight = linear.weight.detach().float().cpu()
    integers = quantize(weight, gram, config, guide)
    stream = encode(integers.codes)
    return EntropyLinear.empty_like(linear, num_bytes=len(stream)).load_integers_(integers, stream)


def compress_embedding(
    module: nn.Embedding | nn.Linear, config: EntropyConfig, solve: bool = True
) -> EntropyEmbedding | EntropyLinear | None:
    """Quantize a token embedding or an output head to the nearest integers, every row with the same relative error.

    Raises:
        UnsupportedModel: the embedding's class computes something of its own.
    """
    if config.embedding_bits is None:
        return None
    is_embedding = isinstance(module, nn.Embedding)
    if is_embedding and type(module) is not nn.Embedding and not hasattr(module, "scalar_embed_scale"):
        raise UnsupportedModel(
            f"embedding class {type(module).__name__} is not a plain lookup: set entropy.embedding_bits to null"
        )
    cls = EntropyEmbedding if is_embedding else EntropyLinear
    if not solve:
        return cls.empty_like(module, num_bytes=_expected_bytes(module.weight, config.embedding_bits))
    weight = module.weight.detach().cpu()
    rms = torch.cat([rows.float().square().mean(1).sqrt() for rows in weight.split(1024)]).clamp_min(1e-12)

    def round_rows(step: float, rows: slice) -> Tensor:
        parts = [
            (part.float() / (step * scale[:, None])).round_().clamp_(-127, 127).to(torch.int8)
            for part, scale in zip(weight[rows].split(1024), rms[rows].split(1024), strict=True)
        ]
        return torch.cat(parts)

    some = slice(None, None, max(1, len(weight) // 2048))

    def bits_at(step: float) -> float:
        codes = round_rows(step, some)
        return bits_per_weight(codes, len(weight))

    step = _find_step(bits_at, config.embedding_bits, 2.0 ** (2 - config.embedding_bits))
    codes = round_rows(step, slice(None))
    column_scale = torch.ones(weight.shape[1])
    row_scale = torch.cat(
        [
            refit_rows(part.float(), part_codes, column_scale, None, step * scale)
            for part, part_codes, scale in zip(weight.split(1024), codes.split(1024), rms.split(1024), strict=True)
        ]
    )
    stream = encode(codes)
    return cls.empty_like(module, num_bytes=len(stream)).load_integers_(Integers(codes, row_scale, column_scale), stream)


def quantize(weight: Tensor, gram: Tensor | None, config: EntropyConfig, guide: Share | None = None) -> Integers:
    """Integers for a float32 weight `[out, in]`: the step by search or from the guide, then error feedback, then row scales.

    Raises:
        NumericalError: the gram matrix cannot be factorised.
    """
    rounder = _rounder(weight, gram, config, None if guide is None else guide.row_steps)
    if guide is not None:
        step = guide.step
    else:
        step = _find_step(lambda step: rounder.bits(step, rounder.some_rows), config.bits, rounder.guess(config.bits))
        step *= 2 ** (rounder.bits(step, slice(None)) - config.bits)
    return rounder.integers(step, gram)


def _rounder(weight: Tensor, gram: Tensor | None, config: EntropyConfig, row_steps: Tensor | None) -> Rounder:
    try:
        return Rounder(weight, gram, config.damp, row_steps)
    except ValueError as error:
        raise NumericalError(str(error)) from error


def _find_step(bits_at: Callable[[float], float], target: float, step: float) -> float:
    """The step with that many bits: halving the step costs about one bit, which makes every try a Newton step."""
    for _ in range(8):
        excess = bits_at(step) - target
        if abs(excess) < _TOLERANCE:
            break
        step *= 2 ** max(-4.0, min(4.0, excess))
    return step


def _expected_bytes(weight: Tensor, bits: float) -> int:
    rows, columns = weight.shape
    return max(1, math.ceil((bits * weight.numel() - 16 * rows - 16 * columns) / 8))


def _row_steps(energy: Tensor, power: float) -> Tensor:
    """Steps `1 / sqrt(b_r)`; the sensitivity of the Linear as a whole counts in full, that of its rows by the power."""
    mean = energy.mean().clamp_min(1e-30)
    relative = (energy / mean).clamp(1e-3, 1e3)
    return ((relative ** (-power / 2)) * mean**-0.5).float()


def _find_log_step(
    model: PreTrainedModel, grams: dict[str, Tensor], row_steps: Mapping[str, Tensor], config: EntropyConfig
) -> tuple[dict[str, float], float]:
    """`(bits per weight of each Linear, log2 of the step)` where their sum meets the budget, on some rows of each.

    Empties `grams`: the factors take as much memory.
    """
    rounders = {}
    sizes, guesses = {}, {}
    for name in row_steps:
        gram = grams.pop(name)
        weight = as_linear(model.get_submodule(name)).weight.detach().float().cpu()
        rounders[name] = _rounder(weight, gram, config, row_steps[name])
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
