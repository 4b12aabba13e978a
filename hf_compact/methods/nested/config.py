"""Settings of nested quantization."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from ...config import MethodConfig
from ...errors import ConfigError

WIDTHS = (8, 6, 4, 3)
"""Bits of the views, the container first."""


@dataclass(frozen=True, kw_only=True)
class NestedConfig(MethodConfig):
    """Quantize block Linears to one int8 container that is also read at 6, 4 and 3 bits, switched by `set_bits`.

    >>> NestedConfig(bits=5)
    Traceback (most recent call last):
    hf_compact.errors.ConfigError: nested.bits must be one of 8, 6, 4, 3, got 5
    """

    method: ClassVar[str] = "nested"

    bits: Literal[8, 6, 4, 3] = 8
    """The view that the model computes with: during calibration, and after loading until `set_bits` changes it."""
    group_size: int | None = 64
    """Inputs that share a scale and an offset; null is one per row. The last group of a row may be shorter."""
    view_weights: tuple[float, ...] = (0.5, 0.5, 1.0, 0.03)
    """What the errors of the 8-, 6-, 4- and 3-bit view count in the choice of scales and codes. They are compared as
    they are, and an error grows fourfold with every bit that is taken away."""
    rounding: Literal["gptq", "nearest"] = "gptq"
    """Error feedback through the gram matrix of the inputs, or plain nearest, which needs no calibration."""
    damp: float = 0.05
    """GPTQ only: ridge as a fraction of the mean diagonal of the gram matrix."""
    act_order: bool = True
    """GPTQ only: round the inputs with the largest second moment first, with static groups."""
    shrink_steps: int = 16
    """Clipping candidates per group in the scale search; 1 keeps the full range."""
    refit_rounds: int = 2
    """GPTQ only: rounds of closed-form refit of scales and multipliers, each followed by a sweep over the codes."""
    embedding_bits: Literal[8] | None = 8
    """Bits of the token embedding and of the output head, tied or not, which have no lower views; null leaves both."""

    def __post_init__(self) -> None:
        """Check ranges."""
        choices = {"bits": WIDTHS, "rounding": ("gptq", "nearest"), "embedding_bits": (8, None)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                rule = ", ".join("null" if value is None else str(value) for value in allowed)
                raise ConfigError(f"nested.{name} must be one of {rule}, got {getattr(self, name)}")
        weights = self.view_weights
        if len(weights) != len(WIDTHS) or not all(0 <= weight < float("inf") for weight in weights) or not any(weights):
            raise ConfigError(
                f"nested.view_weights must be {len(WIDTHS)} numbers that are not negative and not all zero, got {list(weights)}"
            )
        for name, lowest in {"shrink_steps": 1, "refit_rounds": 0}.items():
            if getattr(self, name) < lowest:
                raise ConfigError(f"nested.{name} must be at least {lowest}, got {getattr(self, name)}")
        if not 0 <= self.damp <= 1:
            raise ConfigError(f"nested.damp must be in [0, 1], got {self.damp}")
        if self.group_size is not None and self.group_size < 8:
            raise ConfigError(f"nested.group_size must be null or at least 8, got {self.group_size}")

    @property
    def needs_calibration(self) -> bool:
        """Whether the solver reads gram matrices of the inputs."""
        return self.rounding == "gptq"
