"""From a dense module and the gram matrix of its inputs to an entropy-coded module."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...errors import UnsupportedModel
from ...functional.coding import encode
from .config import EntropyConfig
from .functional import Integers, bits_per_weight, refit_rows
from .layer import EntropyEmbedding, EntropyLinear
from .rounder import Rounder
from .sensitivity import Share

_TOLERANCE = 0.004  # bits per weight


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
    column_scale = torch.full((weight.shape[1],), 128, dtype=torch.uint8)
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
    rounder = Rounder(weight, gram, config.damp, None if guide is None else guide.row_steps)
    if guide is not None:
        step = guide.step
    else:
        step = _find_step(lambda step: rounder.bits(step, rounder.some_rows), config.bits, rounder.guess(config.bits))
        step *= 2 ** (rounder.bits(step, slice(None)) - config.bits)
    return rounder.integers(step, gram)


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
    return max(1, math.ceil((bits * weight.numel() - 16 * rows - 8 * columns) / 8))
