"""Terms of the distillation loss."""

from dataclasses import dataclass
from typing import Literal

from ...errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DistillationTerms:
    """What `DistillationCallback` adds up; all terms are means over the labelled positions.

    >>> DistillationTerms(temperature=0.0)
    Traceback (most recent call last):
    hf_compact.errors.ConfigError: terms.temperature must be above 0, got 0.0
    """

    logits_weight: float = 1.0
    """Weight of the divergence of the next-token distributions."""
    divergence: Literal["forward", "reverse", "balanced"] = "forward"
    """`forward`: KL(teacher || student), the student covers all that the teacher can say. `reverse`: KL(student || teacher),
    it keeps to what is likely. `balanced`: both, weighted at every position by which of the two is surer."""
    temperature: float = 1.0
    """Of both distributions; the divergence is multiplied by its square. A cache must have been written with it."""
    balance: Literal["hard", "sigmoid"] = "hard"
    """Balanced only: by the sign of the entropy gap, or by its sigmoid."""
    balance_weight: float = 2.0
    """Balanced, hard only: weight of the favoured direction, the other has 1."""
    balance_slope: float = 1.0
    """Balanced, sigmoid only: slope, per nat."""
    label_weight: float = 0.0
    """Weight of the model's own loss, the cross-entropy of the labels."""
    hidden_weight: float = 0.0
    """Weight of the share of energy that is lost of the hidden states, a mean over `hidden_layers`. Needs a teacher."""
    hidden_layers: tuple[int, ...] = (-1,)
    """Blocks whose outputs are compared; negative ones count from the end, of each model."""
    relation_weight: float = 0.0
    """Weight of the attention relations of MiniLM (query-query, key-key, value-value). Needs a teacher."""
    relation_layer: int = -1
    """The block they are taken from."""
    relation_heads: int = 1
    """Heads that queries, keys and values are cut into; it must divide the widths of both models."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name, allowed in {"divergence": ("forward", "reverse", "balanced"), "balance": ("hard", "sigmoid")}.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"terms.{name} must be one of {', '.join(allowed)}, got {getattr(self, name)}")
        weights = ("logits_weight", "label_weight", "hidden_weight", "relation_weight")
        for name in weights:
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"terms.{name} must be at least 0, got {getattr(self, name)}")
        if not any(getattr(self, name) for name in weights):
            raise ConfigError("terms must have one weight above 0")
        for name in ("temperature", "balance_weight", "balance_slope", "relation_heads"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"terms.{name} must be above 0, got {getattr(self, name)}")
        if not self.hidden_layers:
            raise ConfigError("terms.hidden_layers must name at least one block, got ()")

    @property
    def needs_teacher(self) -> bool:
        """Whether stored log-probabilities are not enough."""
        return self.hidden_weight > 0 or self.relation_weight > 0
