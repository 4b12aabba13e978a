"""From a dense Linear to a sparse one without training."""

import torch
from torch import Tensor, nn

from ...capture import Method
from ...errors import UnsupportedModel
from .config import SparsityConfig
from .functional import lowest_mask, n_m_mask
from .layer import SparseLinear


def check_pattern(name: str, shape: tuple[int, ...], config: SparsityConfig, has_own: bool = False) -> None:
    """Raise UnsupportedModel unless the pattern fits a matrix `[out, in]`, with `has_own` in both directions."""
    if config.n_m is None:
        return
    for size, what in ((shape[1], "inputs"), *(((shape[0], "outputs"),) if has_own else ())):
        if size % config.n_m[1]:
            raise UnsupportedModel(
                f"{name} has {size} {what}, which sparsity.pattern {config.pattern} does not divide: exclude it"
            )


def compress_linear(linear: nn.Linear, gram: Tensor | None, config: SparsityConfig, solve: bool = True) -> SparseLinear:
    """Mask one Linear, in the unit of its outputs where the inputs are known.

    Raises:
        UnsupportedModel: the pattern does not fit its width.
    Source: Wanda, arXiv 2306.11695.
    """
    rows, columns = linear.weight.shape
    check_pattern("a Linear", (rows, columns), config)
    is_wanda = config.score == "wanda"
    if not solve:
        if config.n_m is not None:
            kept = rows * columns // config.n_m[1] * config.n_m[0]
        elif is_wanda:
            kept = rows * (columns - int(config.sparsity * columns + 1e-9))
        else:
            kept = rows * columns - int(config.sparsity * (rows * columns) + 1e-9)  # rounded as `lowest_mask` does
        return SparseLinear.empty_like(linear, num_values=kept)
    scores = linear.weight.detach().abs().float()
    if is_wanda:
        scores = scores * gram.diagonal().clamp_min(0).sqrt().to(scores)
    if config.n_m is not None:
        return SparseLinear.pack(linear, n_m_mask(scores, *config.n_m))
    mask = lowest_mask(scores if is_wanda else scores.flatten()[None], config.sparsity)
    return SparseLinear.pack(linear, mask.view(torch.Size((rows, columns))))


def compress_embedding(module: nn.Embedding | nn.Linear, config: SparsityConfig, solve: bool = True) -> None:
    """Embeddings and heads are left alone."""
    return


METHOD = Method(
    config=SparsityConfig,
    layers={"sparse_linear": SparseLinear},
    compress_linear=compress_linear,
    compress_embedding=compress_embedding,
    tied_layer="sparse_linear",
)
