"""From a dense module and the gram matrix of its inputs to a nested module."""

import torch
from torch import Tensor, nn

from ...errors import NumericalError
from ...functional.feedback import descend_codes, refit_scale, round_with_feedback, spread_groups
from ...functional.gram import damped_gram, inverse_factor
from ...stored import check_lookup
from .config import WIDTHS, NestedConfig
from .functional import Nested, Rounder, refit_multiplier, round_container, search_scale, view_levels
from .layer import NestedEmbedding, NestedLinear

_EMBEDDING_ROWS = 1024  # rows quantized at a time: the float32 copy of a whole embedding would not be small


def compress_linear(linear: nn.Linear, gram: Tensor | None, config: NestedConfig, solve: bool = True) -> NestedLinear:
    """Quantize one Linear; without a gram matrix, or by the recipe's wish, to the nearest container.

    Raises:
        NumericalError: the gram matrix cannot be factorised.
    """
    module = NestedLinear.empty_like(linear, bits=config.bits, widths=WIDTHS, group_size=config.group_size)
    return module.load_nested_(quantize(linear.weight.detach().float().cpu(), gram, config)) if solve else module


def compress_embedding(
    module: nn.Embedding | nn.Linear, config: NestedConfig, solve: bool = True
) -> NestedEmbedding | NestedLinear | None:
    """Quantize a token embedding or an output head to int8 rows, without calibration and without lower views.

    A lower view would save no byte, because the container stays, and cost the quality that calibration is not there to
    repair: `set_bits` leaves these modules at eight bits.

    Raises:
        UnsupportedModel: the embedding's class computes something of its own.
    """
    if config.embedding_bits is None:
        return None
    check_lookup(module, "nested.embedding_bits")
    cls = NestedEmbedding if isinstance(module, nn.Embedding) else NestedLinear
    new = cls.empty_like(module, bits=8, widths=(8,), group_size=None)
    if not solve:
        return new
    ones = torch.ones(module.weight.shape[1])
    for start in range(0, len(module.weight), _EMBEDDING_ROWS):
        rows = slice(start, start + _EMBEDDING_ROWS)
        dense = module.weight.detach()[rows].float().cpu()
        scale, zero = search_scale(dense, (8,), (1.0,), None, ones, config.shrink_steps)
        codes = round_container(dense, scale, zero).to(torch.int8)
        new.load_nested_(Nested(codes, scale, zero, torch.ones(1, len(dense))), rows)
    return new


def quantize(weight: Tensor, gram: Tensor | None, config: NestedConfig) -> Nested:
    """Choose scales, offsets, containers and multipliers for a float32 weight `[out, in]`.

    The order: scales by clipped search, containers with error feedback in all views at once, then rounds of closed-form
    refit and one sweep over the containers. All errors are weighted by the gram matrix.

    Raises:
        NumericalError: the gram matrix cannot be factorised.
    """
    size, shares = config.group_size, config.view_weights
    rows, columns = weight.shape
    importance = torch.ones(columns) if gram is None else gram.diagonal().float().clamp_min(0)
    scale, zero = search_scale(weight, WIDTHS, shares, size, importance, config.shrink_steps)
    levels, offset = view_levels(WIDTHS), spread_groups(zero, size, columns)
    multiplier = torch.ones(len(WIDTHS), rows)
    targets = weight.repeat(len(WIDTHS), 1)
    rounder = Rounder(WIDTHS, shares, multiplier)

    def at_unit_scale(codes: Tensor) -> Tensor:
        return levels[:, codes[:rows].int()] - offset

    if gram is None or config.rounding == "nearest":
        codes, _ = rounder(targets, spread_groups(scale, size, columns), offset)
        views = at_unit_scale(codes) * spread_groups(scale, size, columns)
        return _result(codes, scale, zero, refit_multiplier(weight, views, multiplier, importance.diag()))
    order = gram.diagonal().argsort(descending=True) if config.act_order else torch.arange(len(gram))
    try:
        factor = inverse_factor(gram, config.damp, order)
    except ValueError as error:
        raise NumericalError(str(error)) from error
    codes, _ = round_with_feedback(targets, rounder, scale, zero, size, factor, order)
    del factor  # as large as the gram matrix, and the sweeps need room for a sorted one
    damped = damped_gram(gram, config.damp)
    roots = torch.tensor(shares).sqrt()[:, None, None]
    for _ in range(config.refit_rounds):
        unit = at_unit_scale(codes)
        scale = refit_scale(weight * roots, unit * multiplier[..., None] * roots, scale, size, damped)
        views = unit.mul_(spread_groups(scale, size, columns))
        multiplier = refit_multiplier(weight, views, multiplier, damped)
        rounder = Rounder(WIDTHS, shares, multiplier)
        dense = views.mul_(multiplier[..., None]).flatten(0, 1)
        codes, _ = descend_codes(targets, dense, rounder, scale, zero, size, damped, order)
    return _result(codes, scale, zero, multiplier)


def _result(codes: Tensor, scale: Tensor, zero: Tensor, multiplier: Tensor) -> Nested:
    container = (codes[: len(scale)].to(torch.int16) - 128).to(torch.int8)
    return Nested(container, scale, zero, multiplier)
