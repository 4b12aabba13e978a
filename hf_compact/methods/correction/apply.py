"""A place for the correction first; its values once the next stage has compressed the base.

Source: the family of LQER (arXiv 2402.02446), QERA (2410.06040) and EoRA (2410.21271): the best rank-`r` approximation
of the quantization error for the outputs, in closed form.
"""

import torch
from torch import Tensor, nn

from ...errors import NumericalError
from ...functional.factor import spectrum, whitening_factor
from .config import CorrectionConfig
from .layer import CorrectedLinear


def compress_linear(linear: nn.Linear, gram: Tensor | None, config: CorrectionConfig, solve: bool = True) -> nn.Module:
    """A module that computes what the Linear does, with room for a correction; the Linear itself if it is too small for one."""
    rank = min(config.rank, min(linear.weight.shape) // 2)
    return CorrectedLinear.empty_like(linear, rank=rank) if rank else linear


def compress_embedding(module: nn.Embedding | nn.Linear, config: CorrectionConfig, solve: bool = True) -> None:
    """Embeddings and heads are left to the next stage."""
    return


@torch.no_grad()
def finish(module: CorrectedLinear, linear: nn.Linear, gram: Tensor | None, config: CorrectionConfig) -> None:
    """Fit the product to what the compressed base has lost, in place.

    Args:
        module: its base is compressed.
        linear: the dense one.
        gram: `[in, in]` sum of x x^T, or None for independent inputs.
        config: settings.

    Raises:
        NumericalError: the gram matrix is not finite.
    """
    error = linear.weight.detach().double().cpu() - module.base_dense(torch.float64).cpu()
    try:
        right = None if gram is None else whitening_factor(gram, config.damp)
    except ValueError as failure:
        raise NumericalError(str(failure)) from failure
    up, down = spectrum(error, right).truncate(module.rank)
    module.up.weight.copy_(up)
    module.down.weight.copy_(down)
