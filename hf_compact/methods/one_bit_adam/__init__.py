"""1-bit Adam: an optimizer and a callback for data-parallel training; no stage of a recipe."""

from .callback import OneBitAdamCallback
from .config import OneBitAdamConfig
from .optimizer import OneBitAdam

__all__ = ["OneBitAdam", "OneBitAdamCallback", "OneBitAdamConfig"]
