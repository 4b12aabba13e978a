"""From a dense module and the gram matrix of its inputs to an entropy-coded module."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...arch import Architecture, as_linear, dense_shape
from ...errors import NumericalError, UnsupportedModel
from ...functional.coding import encode
from ...functional.lossless import DTYPES, encode_exact
from ...report import LayerReport
from ...sensitivity import measure
from ...stored import check_lookup
from .config import EntropyConfig
from .functional import LARGEST, SEARCH_ROWS, Integers, Rounder, bits_per_weight, center_rows, fixed_bits, refit_rows
from .layer import EntropyEmbedding, EntropyLinear

_TOLERANCE = 0.004  # bits per weight
_TRIES = 8
_FISHER_TOKENS = 16384
_PLAN_TOKENS = 8192
_PROBES = (2.0, 1.0, 0.0, -1.0, -2.0)  # bits around the budget at which a Linear is tried
_NO_BITS = (0.0, -2.0)  # and towards the end of its curve, where all integers are zero
_MOST_BITS = 7.0  # of integers that a byte holds
_EXACT_BITS = 10.6  # of a bfloat16 weight, coded without loss
_LEAST_SHARE = 1e-12  # of the energy of the most sensitive Linear
_LEAST_RMS = 1e-6  # of the largest row of an embedding


@dataclass(frozen=True)
class Share:
    """What one Linear gets."""

    step: float
    """In units of `U_jj`, for the gram matrix as it is summed."""
    row_steps: Tensor
    """`[out]` steps of the rows."""
    bits: float | None = None
    """For the last Linear, whose miss no other can make up for: the rate that is left; the step is then searched for."""


class Guide:
    """The shares of all Linears of one stage; what earlier ones missed of their forecast, the later ones make up for."""

    def __init__(
        self, bits: float, log_step: float, predicted: Mapping[str, float], sizes: Mapping[str, int], row_steps: Mapping[str, Tensor]
    ) -> None:  # fmt: skip
        """Keep the plan: forecasts in bits per weight, sizes in weights."""
        self.bits, self.log_step, self.predicted, self.sizes, self.row_steps = bits, log_step, predicted, sizes, row_steps

    def share(self, name: str, finished: Sequence[LayerReport], num_inputs: float) -> Share | None:
        """The share of the next Linear, given what the finished ones took; None for one that the loss does not see."""
        if name not in self.predicted:
            return None
        done = {layer.name: 8.0 * layer.compressed_bytes for layer in finished if layer.name in self.sizes}
        rest = [other for other in self.predicted if other not in done]
        weights = sum(self.sizes[other] for other in rest)
        forecast = sum(done.values()) + sum(self.predicted[other] * self.sizes[other] for other in rest)
        budget = self.bits * sum(self.sizes[other] for other in {*done, *rest})
        change = max(-1.0, min(1.0, (forecast - budget) / weights))
        left = self.predicted[name] - change if rest == [name] else None
        return Share(2 ** (self.log_step + change) * math.sqrt(num_inputs), self.row_steps[name], left)


def prepare(
    model: PreTrainedModel, arch: Architecture, names: Sequence[str], batches: Sequence[Mapping[str, Tensor]],
    config: EntropyConfig, progress: Callable[[int, int], None] = lambda done, total: None,
) -> Guide | None:  # fmt: skip
    """Measure the sensitivities and find the step whose bits meet the budget; None where every Linear gets the same rate.

    With one weight per row in the loss, one step for the whole model, `step * U_jj / sqrt(b_r)`, is the
    best way to spend the bits.

    Raises:
        NumericalError: gradients are not finite.
    """
    if config.sensitivity == "none":
        return None
    found = measure(model, arch, names, batches, _FISHER_TOKENS, _PLAN_TOKENS, progress)
    least = _LEAST_SHARE * max(row.mean().item() for row in found.rows.values())
    sizes = {name: dense_shape(model.get_submodule(name)).numel() for name in names}
    row_steps, curves = {}, {}
    for name, row in found.rows.items():
        weight = as_linear(model.get_submodule(name)).weight.detach()
        gram = found.grams.pop(name)
        if row.mean() > least and weight.any():
            row_steps[name] = _row_steps(row, config.row_power)
            curves[name] = _curve(weight, gram, row_steps[name], config)
    if not curves:
        return None
    log_step = _find_log_step(curves, sizes, config.bits)
    predicted = {name: _interpolate(curve, log_step) for name, curve in curves.items()}
    return Guide(config.bits, log_step, predicted, sizes, row_steps)


def compress_linear(
    linear: nn.Linear, gram: Tensor | None, config: EntropyConfig, solve: bool = True, guide: Share | None = None
) -> EntropyLinear:
    """Quantize one Linear; without a gram matrix its inputs count as independent.

    Args:
        linear: `[out, in]`.
        gram: `[in, in]` sum of x x^T, or None.
        config: settings.
        solve: with False the module is empty and its size is what the settings ask for.
        guide: the share of this Linear; None gives it `config.bits`.

    Raises:
        NumericalError: the gram matrix cannot be factorised.
    """
    if not solve:
        num_bytes = _expected_bytes(linear.weight, config.bits)
        return EntropyLinear.empty_like(linear, num_bytes=num_bytes, is_trellis=config.grid == "trellis")
    weight = linear.weight.detach().float().cpu()
    integers = quantize(weight, gram, config, guide)
    stream = encode(integers.codes)
    module = EntropyLinear.empty_like(linear, num_bytes=len(stream), is_trellis=config.grid == "trellis")
    return module.load_integers_(integers, stream)


def compress_embedding(
    module: nn.Embedding | nn.Linear, config: EntropyConfig, solve: bool = True
) -> EntropyEmbedding | EntropyLinear | None:
    """Quantize a token embedding or an output head to the nearest integers, every row with the same relative error.

    Raises:
        UnsupportedModel: the embedding's class computes something of its own; or it is to keep 16 bits and has others.
    """
    if config.embedding_bits is None:
        return None
    is_embedding = isinstance(module, nn.Embedding)
    check_lookup(module, "entropy.embedding_bits")
    cls = EntropyEmbedding if is_embedding else EntropyLinear
    if config.embedding_bits == 16:
        return _exact(cls, module, solve)
    if not solve:
        return cls.empty_like(module, num_bytes=_expected_bytes(module.weight, config.embedding_bits))
    weight = module.weight.detach().cpu()
    rms = torch.cat([rows.float().square().mean(1).sqrt() for rows in weight.split(1024)])
    if not rms.any():
        return _empty_integers(cls, module)
    # Rows of zeros take any step; they and the next to nothing of others must not pull the middle away from the rest.
    unit, relative = center_rows(torch.where(rms > 0, rms, rms[rms > 0].mean()).clamp_min(_LEAST_RMS * rms.max()))

    def round_rows(step: float, rows: slice) -> Tensor:
        parts = zip(weight[rows].split(1024), relative[rows].split(1024), strict=True)
        units = [part.float() / (step * unit) / scale[:, None] for part, scale in parts]
        # A row with an entry that a byte cannot hold takes a coarser step: cut off, one such entry can undo a model.
        coarser = [(part.abs().amax(1, keepdim=True) / LARGEST).clamp_min_(1) for part in units]
        return torch.cat([part.div_(by).round_().to(torch.int8) for part, by in zip(units, coarser, strict=True)])

    some = slice(None, None, max(1, len(weight) // 2048))
    target = max(config.embedding_bits, fixed_bits(*weight.shape) + 0.5)
    peak = max(rows.abs().max().item() for rows in weight.split(1024)) / unit
    finest = peak / LARGEST / torch.finfo(torch.float16).max  # where float16 can still say the scale of every row
    step = _find_step(lambda step: bits_per_weight(round_rows(step, some), len(weight)), target, 2.0 ** (2 - target), finest)
    codes = round_rows(step, slice(None))
    scale = torch.tensor(step * unit).item()
    column_scale = torch.ones(weight.shape[1])
    parts = zip(weight.split(1024), codes.split(1024), relative.split(1024), strict=True)
    row_scale = torch.cat([refit_rows(part.float() / scale, code, column_scale, None, rows) for part, code, rows in parts])
    stream = encode(codes)
    module = cls.empty_like(module, num_bytes=len(stream))
    return module.load_integers_(Integers(codes, codes, scale, row_scale, column_scale), stream)


def quantize(weight: Tensor, gram: Tensor | None, config: EntropyConfig, guide: Share | None = None) -> Integers:
    """Integers for a float32 weight `[out, in]`: the step by search or from the guide, then error feedback, then row scales.

    Raises:
        NumericalError: the gram matrix cannot be factorised.
    """
    if not weight.any():
        zeros = torch.zeros_like(weight, dtype=torch.int8)
        return Integers(zeros, zeros, 1.0, torch.ones(len(weight)), torch.ones(weight.shape[1]))
    rounder = _rounder(weight, gram, config, None if guide is None else guide.row_steps)
    bits = config.bits if guide is None else guide.bits
    if bits is None:
        return rounder.integers(max(guide.step, rounder.finest), gram)
    # A matrix so small that its scales take the budget gets half a bit per weight on top of them.
    target = max(bits, fixed_bits(*weight.shape) + 0.5)
    guess = rounder.guess(target) if guide is None else guide.step
    step = _find_step(rounder.some().forecast, target, guess, rounder.finest)
    return rounder.integers(_find_step(rounder.bits, target, step, rounder.finest), gram)


def _rounder(
    weight: Tensor, gram: Tensor | None, config: EntropyConfig, row_steps: Tensor | None, num_rows: int | None = None
) -> Rounder:
    try:
        return Rounder(weight, gram, config.damp, row_steps, num_rows, is_trellis=config.grid == "trellis")
    except ValueError as error:
        raise NumericalError(str(error)) from error


def _find_step(bits_at: Callable[[float], float], target: float, step: float, finest: float) -> float:
    """The step with that many bits, of those that were tried the nearest to it; or the finest.

    Halving it costs about one bit, and after two tries it costs what it did between them. Once there is a step on either side, the
    next lies between. Where bits do not move, as bytes or zeros end them, no more are tried.
    """
    tried: list[tuple[float, float]] = []  # log2 of the step, excess of bits
    at, least = math.log2(max(step, finest)), math.log2(finest)
    for _ in range(_TRIES):
        excess = bits_at(2**at) - target
        tried.append((at, excess))
        signs = {miss > 0 for _, miss in tried}
        is_stuck = len(tried) > 1 and len(signs) == 1 and abs(excess - tried[-2][1]) < _TOLERANCE / 2
        if abs(excess) < _TOLERANCE or is_stuck or (at == least and excess < 0):
            break
        above = max((pair for pair in tried if pair[1] > 0), default=None)
        below = min((pair for pair in tried if pair[1] <= 0), default=None)
        if above is not None and below is not None:
            share = above[1] / (above[1] - below[1])
            at = above[0] + max(0.1, min(0.9, share)) * (below[0] - above[0])
        else:
            rate = (tried[-2][1] - excess) / (at - tried[-2][0]) if len(tried) > 1 else 1.0  # bits per octave
            at = max(least, at + max(-4.0, min(4.0, excess / max(rate, 0.1))))
    return 2 ** min(tried, key=lambda pair: abs(pair[1]))[0]


def _expected_bytes(weight: Tensor, bits: float) -> int:
    rows, columns = weight.shape
    return max(1, math.ceil((bits * weight.numel() - 16 * rows - 16 * columns - 32) / 8))


def _row_steps(energy: Tensor, power: float) -> Tensor:
    """Steps `1 / sqrt(b_r)`; the sensitivity of the Linear as a whole counts in full, that of its rows by the power."""
    mean = energy.mean().clamp_min(1e-30)
    relative = (energy / mean).clamp(1e-3, 1e3)
    return ((relative ** (-power / 2)) * mean**-0.5).float()


def _curve(weight: Tensor, gram: Tensor, row_steps: Tensor, config: EntropyConfig) -> list[tuple[float, float]]:
    """`(log2 of the step, bits per weight)` of one Linear at rates around the budget, measured on some of its rows."""
    rows = slice(None, None, max(1, len(weight) // SEARCH_ROWS))
    rounder = _rounder(weight[rows].float().cpu(), gram, config, row_steps[rows], len(weight))
    targets = [*(config.bits + probe for probe in _PROBES), *_NO_BITS]
    steps = [rounder.guess(target) for target in sorted({max(target, _NO_BITS[-1]) for target in targets}, reverse=True)]
    return [(math.log2(step), rounder.forecast(step)) for step in steps]


def _find_log_step(curves: Mapping[str, list[tuple[float, float]]], sizes: Mapping[str, int], bits: float) -> float:
    """The log2 of the step at which all Linears together meet the budget."""
    total = sum(sizes[name] for name in curves)
    low, high = min(curve[0][0] for curve in curves.values()) - 8, max(curve[-1][0] for curve in curves.values()) + 8
    for _ in range(50):
        middle = (low + high) / 2
        if sum(_interpolate(curve, middle) * sizes[name] for name, curve in curves.items()) > bits * total:
            low = middle
        else:
            high = middle
    return high


def _interpolate(curve: Sequence[tuple[float, float]], at: float) -> float:
    """Piecewise linear; finer than the first point every octave is a bit while bytes hold it, coarser than the last none."""
    if at <= curve[0][0]:
        return min(curve[0][1] + curve[0][0] - at, max(_MOST_BITS, curve[0][1]))
    for (left, high), (right, low) in itertools.pairwise(curve):
        if at <= right:
            return high + (low - high) * (at - left) / (right - left)
    return curve[-1][1]


def _exact(
    cls: type[EntropyLinear | EntropyEmbedding], module: nn.Module, solve: bool
) -> EntropyLinear | EntropyEmbedding:  # fmt: skip
    dtype = str(module.weight.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise UnsupportedModel(f"entropy.embedding_bits 16 needs 16-bit weights, got {dtype}: set the recipe's dtype to bfloat16")
    if not solve:
        return cls.empty_like(module, num_bytes=_expected_bytes(module.weight, _EXACT_BITS), exact=dtype)
    stream = encode_exact(module.weight)
    return cls.empty_like(module, num_bytes=len(stream), exact=dtype).load_exact_(module.weight.detach(), stream)


def _empty_integers(cls: type[EntropyLinear | EntropyEmbedding], module: nn.Module) -> EntropyLinear | EntropyEmbedding:
    integers = quantize(module.weight.detach().float().cpu(), None, EntropyConfig())
    stream = encode(integers.codes)
    return cls.empty_like(module, num_bytes=len(stream)).load_integers_(integers, stream)
