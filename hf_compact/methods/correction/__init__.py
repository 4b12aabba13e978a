"""Low-rank correction: a small product beside a Linear that the next stage compresses."""

from ...capture import Method
from .apply import compress_embedding, compress_linear, finish
from .config import CorrectionConfig
from .layer import CorrectedLinear

METHOD = Method(
    config=CorrectionConfig,
    layers={"corrected_linear": CorrectedLinear},
    compress_linear=compress_linear,
    compress_embedding=compress_embedding,
    tied_layer="corrected_linear",
    finish=finish,
    is_dealt=False,
)
