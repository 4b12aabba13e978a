"""Smaller models inside a model: units in the order of their importance, trained so that the first ones are a model too."""

from .apply import active, extract, sort_units_
from .callback import SortedNetCallback
from .config import SortedNetConfig

__all__ = ["SortedNetCallback", "SortedNetConfig", "active", "extract", "sort_units_"]
