"""Codebook quantization: weights as packed indices into small tables of levels."""

from ...capture import Method
from .apply import arrange_, compress_embedding, compress_linear
from .config import CodebookConfig
from .layer import CodebookEmbedding, CodebookLinear

METHOD = Method(
    config=CodebookConfig,
    layers={"codebook_linear": CodebookLinear, "codebook_embedding": CodebookEmbedding},
    compress_linear=compress_linear,
    compress_embedding=compress_embedding,
    tied_layer="codebook_linear",
    arrange=arrange_,
)
