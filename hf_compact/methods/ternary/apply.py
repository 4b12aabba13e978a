"""From a dense module to a packed one without training."""

import torch
from torch import Tensor, nn

from ...capture import Method
from ...stored import check_lookup
from .config import TernaryConfig
from .functional import quantize, round_levels, search_step
from .layer import TernaryEmbedding, TernaryLinear

_EMBEDDING_ROWS = 1024  # rows quantized at a time: the float32 copy of a whole embedding would not be small


def compress_linear(linear: nn.Linear, gram: Tensor | None, config: TernaryConfig, solve: bool = True) -> TernaryLinear:
    """Round one Linear; with a gram matrix the factor has the least error of the outputs."""
    module = TernaryLinear.empty_like(
        linear, bits=config.bits, packing=config.packing, granularity=config.granularity,
        activation_bits=config.activation_bits,
    )  # fmt: skip
    if not solve:
        return module
    levels, factor = quantize(
        linear.weight.detach(), scale=config.scale, bits=config.bits, granularity=config.granularity,
        dequantization=config.dequantization, gram=gram if config.needs_calibration else None,
    )  # fmt: skip
    return module.load_levels_(levels, factor)


def compress_embedding(
    module: nn.Embedding | nn.Linear, config: TernaryConfig, solve: bool = True
) -> TernaryEmbedding | TernaryLinear | None:
    """Round the rows of a token embedding or an output head to 8 or 4 bits, each with the best step of its own.

    Raises:
        UnsupportedModel: the embedding's class computes something of its own.
    """
    if config.embedding_bits is None:
        return None
    check_lookup(module, "ternary.embedding_bits")
    cls = TernaryEmbedding if isinstance(module, nn.Embedding) else TernaryLinear
    new = cls.empty_like(module, bits=config.embedding_bits, packing="bits", granularity="row", activation_bits=None)
    for start in range(0, len(module.weight), _EMBEDDING_ROWS) if solve else ():
        rows = slice(start, start + _EMBEDDING_ROWS)
        dense = module.weight.detach()[rows].to(torch.float32)
        step = search_step(dense, config.embedding_bits, "row")
        new.load_levels_(round_levels(dense, step, config.embedding_bits), step, rows)
    return new


METHOD = Method(
    config=TernaryConfig,
    layers={"ternary_linear": TernaryLinear, "ternary_embedding": TernaryEmbedding},
    compress_linear=compress_linear,
    compress_embedding=compress_embedding,
    tied_layer="ternary_linear",
)
