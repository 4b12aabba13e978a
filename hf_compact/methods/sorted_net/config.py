"""Settings of training nested sub-models."""

from dataclasses import dataclass
from typing import Literal

from ...config import check_types
from ...errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SortedNetConfig:
    """Which sub-models `SortedNetCallback` trains beside the whole one.

    >>> SortedNetConfig(widths=(0.5, 2.0))
    Traceback (most recent call last):
    hf_compact.errors.ConfigError: sorted_net.widths must be in (0, 1], got 2.0
    """

    widths: tuple[float, ...] = (0.5, 0.75, 1.0)
    """Kept channels and heads / all."""
    depths: tuple[float, ...] = (0.5, 0.75, 1.0)
    """Kept blocks / all; the first ones stay, in front of the final norm and the head."""
    num_sampled: int = 1
    """Sub-models that are drawn for each forward pass; the whole model is always trained."""
    loss: Literal["labels", "whole"] = "labels"
    """What sub-models learn: the labels, or the whole model's next-token distribution, which takes no gradient from it."""
    delay: float = 0.0
    """Share of the steps in which the whole model is trained alone."""
    kinds: tuple[str, ...] = ("channels", "kv_heads")
    """What is narrowed: channels, kv_heads."""
    channel_multiple: int = 8
    """Numbers of channels that stay are multiples of it; rounded up."""
    seed: int = 0
    """Of the draws, which follow from it and the step."""
    num_steps: int | None = None
    """Optimizer steps of the training, for a delay in a loop of your own; the Trainer knows its own number."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        check_types(self, "sorted_net")
        for name in ("widths", "depths"):
            for value in getattr(self, name):
                if not 0 < value <= 1:
                    raise ConfigError(f"sorted_net.{name} must be in (0, 1], got {value}")
        if not self.widths or not self.depths or not self.sub_models:
            raise ConfigError("sorted_net.widths and depths must name at least one sub-model that is not the whole")
        if self.num_sampled < 1 or self.channel_multiple < 1:
            raise ConfigError("sorted_net.num_sampled and channel_multiple must be at least 1")
        if not 0 <= self.delay < 1:
            raise ConfigError(f"sorted_net.delay must be in [0, 1), got {self.delay}")
        if not self.kinds or not set(self.kinds) <= {"channels", "kv_heads"}:
            raise ConfigError(f"sorted_net.kinds must be of channels, kv_heads, got {list(self.kinds)}")

    @property
    def sub_models(self) -> list[tuple[float, float]]:
        """All pairs of a width and a depth but the whole model."""
        return [(width, depth) for width in self.widths for depth in self.depths if (width, depth) != (1.0, 1.0)]
