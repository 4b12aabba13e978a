"""Entropy-coded quantization: integers on a uniform grid without bounds, coded to what they really carry."""

from ...capture import Method
from .apply import compress_embedding, compress_linear, prepare
from .config import EntropyConfig
from .layer import EntropyEmbedding, EntropyLinear

METHOD = Method(
    config=EntropyConfig,
    layers={"entropy_linear": EntropyLinear, "entropy_embedding": EntropyEmbedding},
    compress_linear=compress_linear,
    compress_embedding=compress_embedding,
    tied_layer="entropy_linear",
    prepare=prepare,
    is_dealt=False,
)
