"""From a dense module and the gram matrix of its inputs to a codebook module."""

import math

import torch
from torch import Tensor, nn

from ...errors import NumericalError
from ...functional.feedback import descend_codes, refit_scale, round_with_feedback, spread_groups
from ...functional.gram import damped_gram, inverse_factor
from ...stored import check_lookup
from .config import CodebookConfig
from .functional import (
    Quantized,
    Rounder,
    dequantize,
    fixed_levels,
    group_scale,
    lloyd_levels,
    power_levels,
    refit_levels,
    refit_power,
    search_power,
    search_scale,
    sort_levels,
    split_levels,
)
from .layer import CodebookEmbedding, CodebookLinear

_EMBEDDING_ROWS = 1024  # rows quantized at a time: the float32 copy of a whole embedding would not be small


def compress_linear(linear: nn.Linear, gram: Tensor | None, config: CodebookConfig, solve: bool = True) -> CodebookLinear:
    """Quantize one Linear; without a gram matrix, or by the recipe's wish, to the nearest level.

    Raises:
        NumericalError: the gram matrix cannot be factorised.
    """
    module = CodebookLinear.empty_like(
        linear,
        bits=config.bits,
        grid=config.grid,
        group_size=config.group_size,
        symmetric=config.symmetric,
        scale_bits=config.scale_bits,
        num_codebooks=math.ceil(linear.out_features / config.rows_per_codebook) if config.grid == "learned" else 1,
    )
    return module.load_quantized_(quantize(linear.weight.detach().float().cpu(), gram, config)) if solve else module


def compress_embedding(
    module: nn.Embedding | nn.Linear, config: CodebookConfig, solve: bool = True
) -> CodebookEmbedding | CodebookLinear | None:
    """Quantize a token embedding or an output head row by row, without calibration.

    Eight bits use symmetric steps, four bits steps with an offset.

    Raises:
        UnsupportedModel: the embedding's class computes something of its own.
    """
    if config.embedding_bits is None:
        return None
    is_embedding = isinstance(module, nn.Embedding)
    check_lookup(module, "codebook.embedding_bits")
    symmetric = config.embedding_bits == 8
    settings = {
        "bits": config.embedding_bits,
        "grid": "uniform",
        "group_size": config.embedding_group_size,
        "symmetric": symmetric,
    }
    new = (CodebookEmbedding if is_embedding else CodebookLinear).empty_like(module, **settings)
    if not solve:
        return new
    levels = fixed_levels("uniform", config.embedding_bits, symmetric)
    ones = torch.ones(module.weight.shape[1])
    for start in range(0, len(module.weight), _EMBEDDING_ROWS):
        rows = slice(start, start + _EMBEDDING_ROWS)
        dense = module.weight.detach()[rows].float().cpu()
        scale, zero = search_scale(dense, levels, config.embedding_group_size, symmetric, ones, config.shrink_steps)
        new.load_quantized_(_nearest(dense, scale, zero, levels, config.embedding_group_size), rows)
    return new


def quantize(weight: Tensor, gram: Tensor | None, config: CodebookConfig) -> Quantized:
    """Choose levels, scales and codes for a float32 weight `[out, in]`.

    The order: scales by clipped search, a learned or split grid by Lloyd's algorithm, codes with error feedback, then rounds
    of refit (levels or exponent, scales) and one sweep over the codes. All errors are weighted by the gram matrix.

    Raises:
        NumericalError: the gram matrix cannot be factorised.
    """
    size = config.group_size
    importance = torch.ones(weight.shape[1]) if gram is None else gram.diagonal().float().clamp_min(0)
    if config.grid == "learned":
        scale, zero = group_scale(weight, size, config.scale_bits), None
        spread = spread_groups(scale, size, weight.shape[1])
        levels = lloyd_levels(
            weight / spread, importance * spread.square(), 2**config.bits, math.ceil(len(weight) / config.rows_per_codebook)
        )
    elif config.grid == "split":
        scale, zero = group_scale(weight, size, config.scale_bits), None
        spread = spread_groups(scale, size, weight.shape[1])
        levels = split_levels(weight / spread, config.bits, importance * spread.square())
    else:
        if config.grid == "power":
            exponent = search_power(weight, config.bits, size, importance, config.shrink_steps, config.scale_bits)
            levels = power_levels(config.bits, exponent)
        else:
            levels = fixed_levels(config.grid, config.bits, config.symmetric)
        symmetric = config.symmetric or config.grid != "uniform"
        scale, zero = search_scale(weight, levels, size, symmetric, importance, config.shrink_steps, config.scale_bits)
    if gram is None or config.rounding == "nearest":
        return _nearest(weight, scale, zero, levels, size)
    order = gram.diagonal().argsort(descending=True) if config.act_order else torch.arange(len(gram))
    try:
        factor = inverse_factor(gram, config.damp, order)
    except ValueError as error:
        raise NumericalError(str(error)) from error
    rounder = Rounder(levels, len(weight))
    codes, dense = round_with_feedback(weight, rounder, scale, zero, size, factor, order)
    del factor  # as large as the gram matrix, and the sweeps need room for a sorted one
    damped = damped_gram(gram, config.damp)
    for _ in range(config.refit_rounds):
        if config.grid == "learned":
            codes, levels = sort_levels(codes, refit_levels(weight, codes, scale, levels, size, damped))
            rounder = Rounder(levels, len(weight))
        elif config.grid == "power":
            exponent = refit_power(weight, codes, scale, exponent, config.bits, size, damped)
            levels = power_levels(config.bits, exponent)
            rounder = Rounder(levels, len(weight))
        unit = dequantize(Quantized(codes, torch.ones_like(scale), zero, levels), size)
        scale = refit_scale(weight, unit, scale, size, damped, config.scale_bits)
        dense = dequantize(Quantized(codes, scale, zero, levels), size)
        codes, dense = descend_codes(weight, dense, rounder, scale, zero, size, damped, order)
    return Quantized(codes, scale, zero, levels)


def _nearest(weight: Tensor, scale: Tensor, zero: Tensor | None, levels: Tensor, group_size: int | None) -> Quantized:
    columns = weight.shape[1]
    spread_zero = None if zero is None else spread_groups(zero, group_size, columns)
    codes, _ = Rounder(levels, len(weight))(weight, spread_groups(scale, group_size, columns), spread_zero)
    return Quantized(codes, scale, zero, levels)
