"""Settings of 1-bit Adam."""

from dataclasses import dataclass
from typing import Literal

from ...errors import ConfigError

#: Widths that the exchange knows; 16 is bfloat16.
BITS = (1, 2, 4, 8, 16)


@dataclass(frozen=True, kw_only=True)
class OneBitAdamConfig:
    """What is exchanged between ranks, from which step on.

    >>> OneBitAdamConfig(freeze=1.5)
    Traceback (most recent call last):
    hf_compact.errors.ConfigError: one_bit_adam.freeze must be "auto", a fraction in (0, 1) or a whole step, got 1.5
    """

    exchange: Literal["one_bit", "power_sgd", "none"] = "one_bit"
    """What ranks send after the warm-up: the momentum in one bit; gradients by torch's PowerSGD hook, below plain Adam; or
    what they sent before, so that the whole run is plain Adam."""
    gradients: Literal["fp32", "fp16", "bf16"] = "fp32"
    """How the warm-up sends gradients: as they are, or by torch's hooks that halve them."""
    freeze: float | Literal["auto"] = "auto"
    """End of the warm-up, in which Adam's variance is learned from exact gradients: a fraction of all steps, a step, or
    `auto`, when the variance has settled."""
    variance_ratio: float = 0.96
    """Auto only: the L1 norms of the variance, 1 / (1 - beta2) steps apart or half the shortest warm-up if that is less,
    must agree to this ratio, in (0, 1)."""
    freeze_floor: float = 0.1
    """Auto only: fraction of all steps before which nothing is frozen; the learning rate's warm-up counts too."""
    freeze_ceiling: float = 0.3
    """Auto only: fraction of all steps after which the variance is frozen in any case."""
    dense: tuple[str, ...] = ()
    """Whole-name globs of parameters that keep exact gradients and a living variance, such as an embedding with rows
    that are first seen late."""
    min_numel: int = 4096
    """Smaller tensors are exchanged exactly, all in one message."""
    sparse_share: float = 0.5
    """A tensor whose variance is 0 at more than this share of its entries is exchanged exactly too."""
    adaptive_bits: Literal[2, 4, 8] | None = None
    """L-GreCo: every tensor gets one of 1, 2, 4, 8 and 16 bits, the fewest bytes whose error is at most that of this
    width for all; null gives every tensor one bit."""
    replan_every: int = 500
    """Steps between two choices of widths."""
    local_steps: int = 1
    """0/1 Adam: most steps between two exchanges, on which every rank moves by its own momentum; 1 exchanges always."""
    local_steps_double_every: int = 1000
    """Steps after which the number of local steps doubles, from 1 up to `local_steps`."""
    power_sgd_rank: int = 1
    """PowerSGD only: rank of the factors. Its errors are not saved with a checkpoint."""
    check_every: int = 500
    """Steps between two comparisons of all ranks' parameters."""

    def __post_init__(self) -> None:
        """Check ranges, then combinations."""
        choices: dict[str, tuple[object, ...]] = {
            "exchange": ("one_bit", "power_sgd", "none"),
            "gradients": ("fp32", "fp16", "bf16"),
            "adaptive_bits": (None, 2, 4, 8),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                shown = ", ".join("null" if value is None else str(value) for value in allowed)
                raise ConfigError(f"one_bit_adam.{name} must be one of {shown}, got {getattr(self, name)!r}")
        if self.freeze != "auto" and (
            not isinstance(self.freeze, int | float)
            or isinstance(self.freeze, bool)
            or not 0 < self.freeze < float("inf")
            or (self.freeze >= 1 and self.freeze != int(self.freeze))
        ):
            raise ConfigError(f'one_bit_adam.freeze must be "auto", a fraction in (0, 1) or a whole step, got {self.freeze!r}')
        self._check_types()
        if not 0 < self.variance_ratio < 1:
            raise ConfigError(f"one_bit_adam.variance_ratio must be in (0, 1), got {self.variance_ratio}")
        if not 0 <= self.freeze_floor <= self.freeze_ceiling <= 1:
            raise ConfigError(
                "one_bit_adam.freeze_floor and freeze_ceiling must be in order in [0, 1], "
                f"got {self.freeze_floor} and {self.freeze_ceiling}"
            )
        if not 0 <= self.sparse_share <= 1:
            raise ConfigError(f"one_bit_adam.sparse_share must be in [0, 1], got {self.sparse_share}")

    def _check_types(self) -> None:
        for name in ("variance_ratio", "freeze_floor", "freeze_ceiling", "sparse_share"):
            if type(getattr(self, name)) not in (int, float):
                raise ConfigError(f"one_bit_adam.{name} must be a number, got {getattr(self, name)!r}")
        if not isinstance(self.dense, tuple | list) or not all(isinstance(glob, str) for glob in self.dense):
            raise ConfigError(f"one_bit_adam.dense must be a tuple of globs, got {self.dense!r}")
        for name in ("min_numel", "replan_every", "local_steps", "local_steps_double_every", "power_sgd_rank", "check_every"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ConfigError(f"one_bit_adam.{name} must be a whole number of at least 1, got {getattr(self, name)!r}")
