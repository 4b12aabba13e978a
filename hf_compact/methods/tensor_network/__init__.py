"""Tensor-network decomposition: block Linears as trains of small ones, plain low rank among them."""

from ...capture import Method
from .allocation import prepare
from .apply import compress_embedding, compress_linear
from .callback import TensorNetworkCallback
from .config import TensorNetworkConfig, TensorNetworkTraining
from .layer import TensorTrainLinear

__all__ = ["METHOD", "TensorNetworkCallback", "TensorNetworkConfig", "TensorNetworkTraining", "TensorTrainLinear"]

METHOD = Method(
    config=TensorNetworkConfig,
    layers={"tensor_train_linear": TensorTrainLinear},
    compress_linear=compress_linear,
    compress_embedding=compress_embedding,
    tied_layer="tensor_train_linear",
    prepare=prepare,
    is_dealt=False,
)
