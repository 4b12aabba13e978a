"""Settings of structured pruning in one shot."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from ...config import MethodConfig, check_types
from ...errors import ConfigError

SCORES = ("magnitude", "wanda_sp", "flap", "taylor", "obs", "random")


@dataclass(frozen=True, kw_only=True)
class PruningConfig(MethodConfig):
    """Removes MLP channels, key-value heads and layers, and refits what stays, in closed form.

    Every block loses the same number, so that the result is an ordinary smaller model where the config can say it.

    >>> PruningConfig(channel_sparsity=1.0)
    Traceback (most recent call last):
    hf_compact.errors.ConfigError: pruning.channel_sparsity must be in [0, 0.95], got 1.0
    """

    method: ClassVar[str] = "pruning"

    channel_sparsity: float = 0.2
    """Removed MLP channels / all, in every block whose `down` is included."""
    head_sparsity: float = 0.0
    """Removed key-value heads, with their query heads / all, rounded down; one stays. In blocks whose `o` is included. The
    model is no ordinary one where its config cannot say how many are left: the hidden size of a Llama or Gemma 3 is a multiple of its heads."""
    num_layers: int = 0
    """Whole blocks to remove first: those that change the direction of the hidden state least."""
    score: Literal["magnitude", "wanda_sp", "flap", "taylor", "obs", "random"] = "obs"
    """What goes: least norm (magnitude), least output energy (wanda_sp), least spread of the output (flap), least growth of
    the loss to second order (taylor), least residual after a refit (obs), anything (random)."""
    compensation: Literal["none", "bias", "refit"] = "refit"
    """What is done for the loss: nothing, the mean of what is removed goes into a bias, or the columns that stay are fitted
    to the output of all."""
    channel_multiple: int = 8
    """Numbers of channels that stay are multiples of it; rounded up. Formats with groups along the inputs want their size here: 32
    for `q4_0` and for packed integers."""
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


@dataclass(frozen=True, kw_only=True)
class HessoConfig:
    """How `HessoCallback` prunes while a model is trained; steps are those of the optimizer.

    >>> HessoConfig(pruning_steps=5, periods=10)
    Traceback (most recent call last):
    hf_compact.errors.ConfigError: hesso.pruning_steps must be at least periods (10), got 5
    """

    target: float = 0.2
    """Removed share of all that the blocks hold, in `unit`."""
    unit: Literal["parameters", "bytes", "macs", "groups"] = "parameters"
    """What the target counts: parameters of the blocks, their bytes, multiply-adds per token of their Linears, or the groups of
    each kind. Beside channels, heads lose the target's share of their number, rounded down, and channels make up the rest."""
    kinds: tuple[str, ...] = ("channels", "kv_heads")
    """Groups that may go: channels, kv_heads, query_heads; or hidden alone, dimensions of the residual stream, of which then the
    target's share goes."""
    warm_up_steps: int = 0
    """Plain training before the first groups are chosen."""
    pruning_steps: int = 100
    """In which all chosen groups are brought to zero; training goes on afterwards. Weights that are bfloat16 themselves (not those
    of `bf16=True`) round the first of more than 250 steps of a period away, and shrink in those that are left."""
    periods: int = 10
    """Parts of them; at the start of each the next share of the groups is chosen. With `cric` there is one."""
    output: float = 1.0
    """Weight of the root of the energy that a group adds to the output of what reads it, in the batches of training so far; what
    came before the last choice counts half. The five weights below are 0.2 each, and this one is 0, in HESSO's paper; on pretrained
    language models norms of weights say little about what a channel does."""
    magnitude: float = 0.0
    """Weight of the norm of a group."""
    avg_magnitude: float = 0.0
    """Weight of its norm over its size."""
    cosine: float = 0.0
    """Weight of 1 + the cosine between a group and what the step takes off it."""
    taylor_first: float = 0.0
    """Weight of the absolute product of both."""
    taylor_second: float = 0.0
    """Weight of half of its square."""
    one_shot: Literal["magnitude", "wanda_sp", "flap", "taylor", "random"] | None = None
    """A score of one-shot pruning that all groups are chosen by, taken once, of the weights before training, on `batches` (`magnitude`
    and `random` need none). The scores above are not read then."""
    cric: bool = False
    """Whether groups are tried first: after the warm-up, cycles bring those with the lowest scores to zero and back, until all
    that would be chosen have been tried. What the loss grew by on the way joins the scores. A Trainer must not clip gradients."""
    cric_cycles: int = 5
    """Most cycles; if fewer do, the steps of the others train as usual."""
    cric_steps: int = 20
    """Steps of a cycle."""
    loss: float = 1.0
    """Weight of the growth of the loss, with `cric` only."""
    compensation: Literal["none", "refit"] = "none"
    """`refit`: what is chosen is, as in one shot, what costs least once all that stay make up for it, and it is zero at once: the
    columns that read the others take over its output by least squares on `batches`, and the rest of the period trains them.
    The scores above are not read then."""
    damp: float = 0.01
    """`refit` only: ridge of the gram matrices, as a fraction of their mean diagonal."""
    is_uniform: bool = True
    """Every block loses the same number, so that the result is an ordinary model: heads stay in families whose config cannot say
    fewer of the same width, and a Llama or Gemma 3 loses as many as leave a number that divides its hidden size. Otherwise groups of a kind
    compete."""
    channel_multiple: int = 8
    """Numbers of channels, or of hidden dimensions, that stay are multiples of it; rounded up. A Llama's hidden dimensions are
    multiples of its heads as well."""
    min_kept: float = 0.2
    """Share of the groups of a block that stays whatever their scores; one at least."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        check_types(self, "hesso")
        if not 0 < self.target <= 0.95:
            raise ConfigError(f"hesso.target must be in (0, 0.95], got {self.target}")
        if self.kinds != ("hidden",) and (not self.kinds or not set(self.kinds) <= {"channels", "kv_heads", "query_heads"}):
            raise ConfigError(f"hesso.kinds must be of channels, kv_heads, query_heads, or hidden alone, got {list(self.kinds)}")
        if {"kv_heads", "query_heads"} <= set(self.kinds):
            raise ConfigError("hesso.kinds must hold kv_heads or query_heads, not both: they share query heads")
        if self.warm_up_steps < 0 or self.periods < 1 or self.channel_multiple < 1:
            raise ConfigError("hesso.warm_up_steps must be at least 0, periods and channel_multiple at least 1")
        if self.pruning_steps < self.num_periods:
            raise ConfigError(f"hesso.pruning_steps must be at least periods ({self.num_periods}), got {self.pruning_steps}")
        if self.cric_cycles < 1 or self.cric_steps < 1 or not 0 <= self.loss < math.inf:
            raise ConfigError("hesso.cric_cycles and cric_steps must be at least 1, loss at least 0")
        is_scored = any(self.weights) or self.compensation == "refit"
        if not all(0 <= weight < math.inf for weight in self.weights) or not is_scored:
            raise ConfigError(f"hesso: weights of scores must be at least 0 and not all 0, got {list(self.weights)}")
        self._check_compensation()
        if self.one_shot and (self.cric or self.compensation == "refit" or self.kinds == ("hidden",)):
            raise ConfigError(
                "hesso.one_shot must be null with cric, with compensation refit, and for the kind hidden, which nothing alone reads, "
                f"got {self.one_shot}"
            )
        if not 0 <= self.min_kept < 1:
            raise ConfigError(f"hesso.min_kept must be in [0, 1), got {self.min_kept}")

    def _check_compensation(self) -> None:
        if self.compensation == "refit" and (self.cric or self.kinds == ("hidden",)):
            raise ConfigError(
                "hesso.compensation must be none with cric, and for the kind hidden, which nothing alone reads, got refit"
            )
        if not 0 <= self.damp <= 1:
            raise ConfigError(f"hesso.damp must be in [0, 1], got {self.damp}")

    @property
    def weights(self) -> tuple[float, ...]:
        """Of the six scores, in the order of their fields."""
        return (self.output, self.magnitude, self.avg_magnitude, self.cosine, self.taylor_first, self.taylor_second)

    @property
    def num_periods(self) -> int:
        """Times that groups are chosen."""
        return 1 if self.cric else self.periods

    @property
    def period_steps(self) -> int:
        """Steps of one period."""
        return self.pruning_steps // self.num_periods

    @property
    def first_step(self) -> int:
        """The first step, from 1, that brings chosen groups nearer to zero."""
        return self.warm_up_steps + (self.cric_cycles * self.cric_steps if self.cric else 0) + 1

    @property
    def last_step(self) -> int:
        """The step after which all chosen groups are zero."""
        return self.first_step - 1 + self.num_periods * self.period_steps
