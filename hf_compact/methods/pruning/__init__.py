"""Structured pruning: hidden units and layers are cut out, in one shot or while the model is trained."""

from ...capture import Method
from .apply import compress_embedding, compress_linear, cut_block, prepare, shorten
from .callback import HessoCallback
from .config import HessoConfig, PruningConfig
from .experts import drop_experts_
from .layer import PrunedLinear

METHOD = Method(
    config=PruningConfig,
    layers={"pruned_linear": PrunedLinear},
    compress_linear=compress_linear,
    compress_embedding=compress_embedding,
    tied_layer="pruned_linear",
    prepare=prepare,
    cut_block=cut_block,
    shorten=shorten,
)

__all__ = ["METHOD", "HessoCallback", "HessoConfig", "PruningConfig", "drop_experts_"]
