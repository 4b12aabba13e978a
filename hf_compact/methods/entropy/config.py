"""Settings of entropy-coded quantization."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from ...config import MethodConfig
from ...errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EntropyConfig(MethodConfig):
    """Any rate, not only whole bits: the step of the grid follows from the bits that are asked for.

    >>> EntropyConfig(bits=2.3).sensitivity
    'fisher'
    """

    method: ClassVar[str] = "entropy"

    bits: float = 3.0
    """Bits per weight inside the blocks, on average over the model and with every scale and table counted."""
    grid: Literal["trellis", "uniform"] = "trellis"
    """`trellis`: two grids that take turns as the codes say, which wins back most of what one grid loses to the bound;
    solving takes some minutes more per hundred million weights, loading hardly any. `uniform`: one grid."""
    sensitivity: Literal["fisher", "none"] = "fisher"
    """How the bits are dealt out. `fisher`: one step for the whole model in the units of its loss, from gradients of
    the dense model on the calibration set; the model is loaded whole. `none`: every Linear gets the same rate."""
    row_power: float = 1.0
    """How far the step of a row follows the sensitivity of its output: 1 is the optimum of a quadratic loss, 0 not at all."""
    damp: float = 0.01
    """Ridge of the gram matrix as a fraction of its mean diagonal."""
    embedding_bits: float | None = 6.0
    """Bits per weight of the token embedding and of the output head, tied or not. 16 keeps every bit of a 16-bit model's and
    codes them without loss, to about two thirds; null leaves both as they are."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.sensitivity not in ("fisher", "none"):
            raise ConfigError(f"entropy.sensitivity must be one of fisher, none, got {self.sensitivity}")
        for name in ("bits", "embedding_bits"):
            value = getattr(self, name)
            is_exact = name == "embedding_bits" and value == 16
            if value is not None and not 0.5 <= value <= 7 and not is_exact:
                rule = "in [0.5, 7] or 16" if name == "embedding_bits" else "in [0.5, 7]"
                raise ConfigError(f"entropy.{name} must be {rule}, got {value}")
        if self.grid not in ("trellis", "uniform"):
            raise ConfigError(f"entropy.grid must be one of trellis, uniform, got {self.grid}")
        if self.grid == "trellis" and self.bits > 6:
            raise ConfigError(f"entropy.bits must be at most 6 on a trellis, whose values a byte has to hold, got {self.bits}")
        if not 0 <= self.row_power <= 2:
            raise ConfigError(f"entropy.row_power must be in [0, 2], got {self.row_power}")
        if not 0 <= self.damp <= 1:
            raise ConfigError(f"entropy.damp must be in [0, 1], got {self.damp}")

    @property
    def needs_whole_model(self) -> bool:
        """Gradients pass through all blocks."""
        return self.sensitivity == "fisher"

    @property
    def deals_out_bits(self) -> bool:
        """One step for all Linears of the stage."""
        return self.sensitivity == "fisher"
