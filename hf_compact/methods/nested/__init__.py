"""Nested quantization: one int8 container that is also read at 6, 4 and 3 bits."""

from ...capture import Method
from .apply import compress_embedding, compress_linear
from .config import NestedConfig
from .layer import NestedEmbedding, NestedLinear

METHOD = Method(
    config=NestedConfig,
    layers={"nested_linear": NestedLinear, "nested_embedding": NestedEmbedding},
    compress_linear=compress_linear,
    compress_embedding=compress_embedding,
    tied_layer="nested_linear",
)
