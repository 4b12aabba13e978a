"""From a dense module and the gram matrix of its inputs to a codebook module."""

import math
from collections.abc import Collection

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...arch import Architecture, as_linear
from ...errors import NumericalError
from ...functional.feedback import descend_codes, refit_scale, round_with_feedback, spread_groups
from ...functional.gram import damped_gram, inverse_factor
from ...reorder import attention_shape, block_linears, permute_channels_, permute_heads_, permute_values_
from ...stored import check_lookup
from .config import CodebookConfig
from .functional import (
    Quantized,
    Rounder,
    dequantize,
    fixed_levels,
    group_scale,
    has_offset,
    lloyd_levels,
    power_levels,
    refit_levels,
    refit_power,
    search_power,
    search_scale,
    sort_levels,
    split_levels,
)
from .joint import learn_codes, similarity
from .layer import CodebookEmbedding, CodebookLinear

_EMBEDDING_ROWS = 1024  # rows quantized at a time: the float32 copy of a whole embedding would not be small


def compress_linear(
    linear: nn.Linear, gram: Tensor | None, config: CodebookConfig, solve: bool = True, is_arranged: bool = False
) -> CodebookLinear:
    """Quantize one Linear; without a gram matrix, or by the recipe's wish, to the nearest level.

    `is_arranged` says that similar rows are neighbours already, see `arrange_`.

    Raises:
        NumericalError: the gram matrix cannot be factorised.
    """
    is_shared = config.grid == "learned"
    num_codebooks = math.ceil(linear.out_features / config.rows_per_codebook) if is_shared else 1
    is_labelled = config.row_order == "similar" and num_codebooks > 1 and not is_arranged
    module = CodebookLinear.empty_like(
        linear,
        bits=config.bits,
        grid=config.grid,
        group_size=config.group_size,
        symmetric=config.symmetric,
        scale_bits=config.scale_bits,
        num_codebooks=num_codebooks,
        is_labelled=is_labelled,
    )
    if not solve:
        return module
    weight = linear.weight.detach().float().cpu()
    order = similarity(weight).argsort(stable=True) if is_labelled else torch.arange(len(weight))
    found = quantize(weight[order], gram, config)
    back = order.argsort()
    zero = None if found.zero is None else found.zero[back]
    tables = back // math.ceil(len(weight) / num_codebooks)
    return module.load_quantized_(Quantized(found.codes[back], found.scale[back], zero, found.levels), tables=tables)


def arrange_(
    model: PreTrainedModel, arch: Architecture, block: str, names: Collection[str], config: CodebookConfig, solve: bool = True
) -> set[str]:  # fmt: skip
    """Put rows of like distribution next to each other wherever a permutation of hidden units does it for nothing.

    Args:
        model: the block is in memory; its Linears get permuted weights, its output stays what it is.
        arch: the roles of the Linears.
        block: whose Linears.
        names: those that the stage compresses.
        config: nothing happens unless `row_order` is `similar`.
        solve: with False nothing is moved and no weight is read, also on meta.

    Returns:
        Names of the Linears whose rows need no table of their own any more.
    """
    if config.row_order != "similar":
        return set()
    arranged: list[nn.Module] = []
    for linears in block_linears(model, arch, block):
        if {"up", "down"} <= linears.keys():
            makers = [linears[role] for role in ("up", "gate") if role in linears]
            if solve:
                permute_channels_(linears, similarity(torch.cat([_rows(module) for module in makers], 1)).argsort(stable=True))
            arranged += makers
        if {"q", "k", "v", "o"} <= linears.keys():
            if solve:
                num_heads, num_kv, width = attention_shape(model, linears)
                score = similarity(_rows(linears["v"])).view(num_kv, width)
                permute_values_(linears, score.argsort(dim=1, stable=True), num_heads)
                if arch.family != "t5":  # whose position bias belongs to a head
                    permute_heads_(linears, score.mean(1).argsort(stable=True))
            arranged.append(linears["v"])
    return {name for name in names if any(model.get_submodule(name) is module for module in arranged)}


def _rows(module: nn.Module) -> Tensor:
    return as_linear(module).weight.detach().float().cpu()


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
    exponent = 1.0
    feedback = gram is not None and config.rounding == "gptq"
    tables = math.ceil(len(weight) / config.rows_per_codebook)
    if config.grid == "learned" and config.symmetric:
        scale, zero = group_scale(weight, size, config.scale_bits), None
        spread = spread_groups(scale, size, weight.shape[1])
        levels = lloyd_levels(weight / spread, importance * spread.square(), 2**config.bits, tables)
    elif config.grid == "split":
        scale, zero = group_scale(weight, size, config.scale_bits), None
        spread = spread_groups(scale, size, weight.shape[1])
        levels = split_levels(weight / spread, config.bits, importance * spread.square())
    else:
        if config.grid == "power":
            exponent = search_power(weight, config.bits, size, importance, config.shrink_steps, config.scale_bits)
            levels = power_levels(config.bits, exponent)
        else:
            levels = fixed_levels("uniform" if config.grid == "learned" else config.grid, config.bits, config.symmetric)
        symmetric = not has_offset(config.grid, config.symmetric)
        scale, zero = search_scale(weight, levels, size, symmetric, importance, config.shrink_steps, config.scale_bits)
    if config.grid == "learned" and zero is not None:
        # Equal steps are where the refits start from: with an offset per group they end lower than Lloyd's levels.
        levels = levels.expand(tables, -1).contiguous()
        if not feedback:
            spread = spread_groups(scale, size, weight.shape[1])
            unit = weight / spread + spread_groups(zero, size, weight.shape[1])
            levels = lloyd_levels(unit, importance * spread.square(), 2**config.bits, tables)
    if not feedback:
        return _nearest(weight, scale, zero, levels, size)
    order = gram.diagonal().argsort(descending=True) if config.act_order else torch.arange(len(gram))
    try:
        factor = inverse_factor(gram, config.damp, order)
    except ValueError as error:
        raise NumericalError(str(error)) from error
    rounder = Rounder(levels, len(weight))
    codes, _ = round_with_feedback(weight, rounder, scale, zero, size, factor, order)
    del factor  # as large as the gram matrix, and the sweeps need room for a sorted one
    damped = damped_gram(gram, config.damp)
    found = Quantized(codes, scale, zero, levels)
    for _ in range(config.refit_rounds):
        found, exponent = _refit(weight, found, exponent, config, damped, order)
    if config.learning != "none":
        found = learn_codes(weight, found, size, damped, config.learning_steps, config.learning)
        found, _ = _refit(weight, found, exponent, config, damped, order)
    return found


def _refit(
    weight: Tensor, found: Quantized, exponent: float, config: CodebookConfig, gram: Tensor, order: Tensor
) -> tuple[Quantized, float]:
    """Levels (of a power grid, its exponent) and scales for codes that stay, then a sweep over the codes."""
    size = config.group_size
    codes, scale, zero, levels = found
    if config.grid == "learned":
        codes, levels = sort_levels(codes, refit_levels(weight, codes, scale, zero, levels, size, gram))
    elif config.grid == "power":
        exponent = refit_power(weight, codes, scale, exponent, config.bits, size, gram)
        levels = power_levels(config.bits, exponent)
    unit = dequantize(Quantized(codes, torch.ones_like(scale), zero, levels), size)
    scale = refit_scale(weight, unit, scale, size, gram, config.scale_bits)
    dense = dequantize(Quantized(codes, scale, zero, levels), size)
    codes, _ = descend_codes(weight, dense, Rounder(levels, len(weight)), scale, zero, size, gram, order)
    return Quantized(codes, scale, zero, levels), exponent


def _nearest(weight: Tensor, scale: Tensor, zero: Tensor | None, levels: Tensor, group_size: int | None) -> Quantized:
    columns = weight.shape[1]
    spread_zero = None if zero is None else spread_groups(zero, group_size, columns)
    codes, _ = Rounder(levels, len(weight))(weight, spread_groups(scale, group_size, columns), spread_zero)
    return Quantized(codes, scale, zero, levels)
