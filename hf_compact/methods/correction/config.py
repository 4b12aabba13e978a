"""Settings of the low-rank correction."""

from dataclasses import dataclass
from typing import ClassVar

from ...config import MethodConfig
from ...errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CorrectionConfig(MethodConfig):
    """A low-rank product beside whatever the next stage makes of a Linear: `W ~ Q(W) + up down`.

    >>> CorrectionConfig(rank=0)
    Traceback (most recent call last):
    hf_compact.errors.ConfigError: correction.rank must be at least 1, got 0
    """

    method: ClassVar[str] = "correction"

    rank: int = 32
    """Inner size of the product; at most half of the shorter side of a matrix."""
    damp: float = 0.01
    """Ridge of the gram matrix as a fraction of its mean diagonal."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.rank < 1:
            raise ConfigError(f"correction.rank must be at least 1, got {self.rank}")
        if not 0 <= self.damp <= 1:
            raise ConfigError(f"correction.damp must be in [0, 1], got {self.damp}")

    @property
    def needs_calibration(self) -> bool:
        """The stage that compresses the base decides."""
        return False

    @property
    def leaves_linears(self) -> bool:
        """The base is what the next stage compresses."""
        return True
