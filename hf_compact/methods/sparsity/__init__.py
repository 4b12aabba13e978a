"""Weights that are zero one by one: masks while a model is trained, or in one shot, stored as a bitmap and what is left."""

from .apply import METHOD
from .callback import MaskCallback
from .config import MaskTraining, SparsityConfig
from .layer import SparseLinear

__all__ = ["METHOD", "MaskCallback", "MaskTraining", "SparseLinear", "SparsityConfig"]
