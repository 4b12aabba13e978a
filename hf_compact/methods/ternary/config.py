"""Settings of ternary and other low-bit quantization-aware training."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from ...config import MethodConfig
from ...errors import ConfigError

BITS = (1.58, 2, 3, 4)


@dataclass(frozen=True, kw_only=True)
class TernaryConfig(MethodConfig):
    """Round block Linears to three, four, eight or sixteen levels; `TernaryCallback` trains with it.

    As a stage of a recipe it rounds once, without training: at 1.58 bits that is the control row of a trained model, not
    something to use.

    >>> TernaryConfig(bits=5)
    Traceback (most recent call last):
    hf_compact.errors.ConfigError: ternary.bits must be one of 1.58, 2, 3, 4, got 5
    """

    method: ClassVar[str] = "ternary"

    bits: float = 1.58
    """1.58 (-1, 0, 1), 2 (four levels without a zero), 3 or 4 (whole numbers)."""
    scale: Literal["absmean", "absmedian", "lsq"] = "absmean"
    """The step between two levels: from the mean or the median of the absolute weights, or learned."""
    dequantization: Literal["shared", "weights", "inputs"] = "inputs"
    """What levels are multiplied by. `shared`: the step, as BitNet does. `weights`, `inputs`: the factor with the least
    squared error of the weights, or of the outputs for the calibration's inputs (in training: of the weights). A learned
    step is its own factor."""
    granularity: Literal["tensor", "row"] = "tensor"
    """One step per matrix, which other formats can say at 1.58 bits, or one per row."""
    activation_bits: Literal[8] | None = 8
    """Inputs are rounded to int8, one scale per token; null leaves them."""
    packing: Literal["base3", "bits"] = "base3"
    """At 1.58 bits: five weights per byte, or four, which unpack faster."""
    embedding_bits: Literal[8, 4] | None = 8
    """Bits of the token embedding and of the output head, tied or not, with one scale per row; null leaves both."""

    def __post_init__(self) -> None:
        """Check ranges."""
        choices = {
            "bits": BITS, "scale": ("absmean", "absmedian", "lsq"), "dequantization": ("shared", "weights", "inputs"),
            "granularity": ("tensor", "row"), "activation_bits": (8, None), "packing": ("base3", "bits"),
            "embedding_bits": (8, 4, None),
        }  # fmt: skip
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                rule = ", ".join("null" if value is None else str(value) for value in allowed)
                raise ConfigError(f"ternary.{name} must be one of {rule}, got {getattr(self, name)}")

    @property
    def needs_calibration(self) -> bool:
        """Whether the factor is fitted to inputs."""
        return self.dequantization == "inputs" and self.scale != "lsq"


@dataclass(frozen=True, kw_only=True)
class TernaryTraining:
    """How `TernaryCallback` trains.

    >>> TernaryTraining(ramp_share=2.0)
    Traceback (most recent call last):
    hf_compact.errors.ConfigError: training.ramp_share must be in [0, 1], got 2.0
    """

    ramp: Literal["linear", "cosine", "step"] = "linear"
    """How the strength of the quantization rises from 0 to 1; `step` takes four equal jumps."""
    ramp_share: float = 0.03
    """Share of the training that the ramp takes; 0 quantizes from the first step."""
    decay_share: float = 0.5
    """Share of the training after which weight decay is switched off: latent weights near zero would flip easily."""
    is_sub_norm: bool = False
    """Put an RMS norm before the Linears that end attention and feed-forward. The model's other formats cannot say it."""
    num_steps: int | None = None
    """Optimizer steps of the training, for a loop of your own; the Trainer knows its own number."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.ramp not in ("linear", "cosine", "step"):
            raise ConfigError(f"training.ramp must be one of linear, cosine, step, got {self.ramp}")
        for name in ("ramp_share", "decay_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"training.{name} must be in [0, 1], got {getattr(self, name)}")
        if self.num_steps is not None and self.num_steps < 1:
            raise ConfigError(f"training.num_steps must be at least 1, got {self.num_steps}")
