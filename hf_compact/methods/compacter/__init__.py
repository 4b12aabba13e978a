"""Compacter adapters as a PEFT method, registered on import: small trained parts on top of a frozen model of any form."""

from .config import CompacterConfig
from .model import CompacterModel

__all__ = ["CompacterConfig", "CompacterModel"]
