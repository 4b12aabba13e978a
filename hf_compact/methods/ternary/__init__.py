"""1.58-bit and other low-bit quantization-aware training, and rounding without it."""

from .apply import METHOD
from .callback import TernaryCallback
from .config import TernaryConfig, TernaryTraining
from .layer import LatentLinear, TernaryLinear

__all__ = ["METHOD", "LatentLinear", "TernaryCallback", "TernaryConfig", "TernaryLinear", "TernaryTraining"]
