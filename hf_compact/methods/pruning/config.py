"""Settings of structured pruning in one shot."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from ...config import MethodConfig
from ...errors import ConfigError

SCORES = ("magnitude", "wanda_sp", "flap", "taylor", "obs", "random")


@dataclass(frozen=True, kw_only=True)
class PruningConfig(MethodConfig):
    """Removes MLP channels, key-value heads and layers, and refits what stays, in closed form.

    Every block loses the same number, so that the result is an ordinary smaller model.

    >>> PruningConfig(channel_sparsity=1.0)
    Traceback (most recent call last):
    hf_compact.errors.ConfigError: pruning.channel_sparsity must be in [0, 0.95], got 1.0
    """

    method: ClassVar[str] = "pruning"

    channel_sparsity: float = 0.2
    """Removed MLP channels / all, in every block whose `down` is included."""
    head_sparsity: float = 0.0
    """Removed key-value heads, with their query heads / all, rounded down; one stays. In blocks whose `o` is included."""
    num_layers: int = 0
    """Whole blocks to remove first: those that change the direction of the hidden state least."""
    score: Literal["magnitude", "wanda_sp", "flap", "taylor", "obs", "random"] = "obs"
    """What goes: least norm (magnitude), least output energy (wanda_sp), least spread of the output (flap), least growth of
    the loss to second order (taylor), least residual after a refit (obs), anything (random)."""
    compensation: Literal["none", "bias", "refit"] = "refit"
    """What is done for the loss: nothing, the mean of what is removed goes into a bias, or the columns that stay are fitted
    to the output of all."""
    channel_multiple: int = 8
    """Numbers of channels that stay are multiples of it; rounded up."""
    damp: float = 0.01
    """Ridge of the gram matrix as a fraction of its mean diagonal."""
    seed: int = 0
    """score random only."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("channel_sparsity", "head_sparsity"):
            if not 0 <= getattr(self, name) <= 0.95:
                raise ConfigError(f"pruning.{name} must be in [0, 0.95], got {getattr(self, name)}")
        if self.num_layers < 0:
            raise ConfigError(f"pruning.num_layers must be at least 0, got {self.num_layers}")
        if not self.channel_sparsity and not self.head_sparsity and not self.num_layers:
            raise ConfigError("pruning must remove something: channel_sparsity, head_sparsity and num_layers are all 0")
        if self.score not in SCORES:
            raise ConfigError(f"pruning.score must be one of {', '.join(SCORES)}, got {self.score}")
        if self.compensation not in ("none", "bias", "refit"):
            raise ConfigError(f"pruning.compensation must be one of none, bias, refit, got {self.compensation}")
        if self.channel_multiple < 1:
            raise ConfigError(f"pruning.channel_multiple must be at least 1, got {self.channel_multiple}")
        if not 0 <= self.damp <= 1:
            raise ConfigError(f"pruning.damp must be in [0, 1], got {self.damp}")

    @property
    def needs_whole_model(self) -> bool:
        """Gradients and hidden states of the dense model."""
        return self.score == "taylor" or self.num_layers > 0

    @property
    def leaves_linears(self) -> bool:
        """What stays is dense."""
        return True
