"""Settings of masks on single weights."""

import math
import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from ...config import MethodConfig, check_types
from ...errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SparsityConfig(MethodConfig):
    """Sets weights of block Linears to zero; in one shot as a stage of a recipe, step by step with `MaskCallback`.

    What is left is stored beside a bitmap. The product stays a dense one: files get smaller, not the time.

    >>> SparsityConfig(pattern="4:2")
    Traceback (most recent call last):
    hf_compact.errors.ConfigError: sparsity.pattern must be N:M with 0 < N < M <= 32 or null, got 4:2
    """

    method: ClassVar[str] = "sparsity"

    sparsity: float = 0.5
    """Zeros / all weights of a Linear, where there is no pattern."""
    pattern: str | None = None
    """`N:M`: of M weights that follow each other along the inputs N stay. Null: any may go."""
    score: Literal["magnitude", "wanda"] = "wanda"
    """What goes, as a stage: the smallest weights, or those with the smallest product with the norm of their input, row by row.
    The callback takes the smallest weights."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 0 < self.sparsity < 1:
            raise ConfigError(f"sparsity.sparsity must be in (0, 1), got {self.sparsity}")
        found = self.pattern is None or re.fullmatch(r"(\d+):(\d+)", self.pattern)
        if not found or (self.n_m is not None and not 0 < self.n_m[0] < self.n_m[1] <= 32):
            raise ConfigError(f"sparsity.pattern must be N:M with 0 < N < M <= 32 or null, got {self.pattern}")
        if self.score not in ("magnitude", "wanda"):
            raise ConfigError(f"sparsity.score must be one of magnitude, wanda, got {self.score}")

    @property
    def n_m(self) -> tuple[int, int] | None:
        """The pattern as two numbers."""
        if self.pattern is None:
            return None
        kept, whole = self.pattern.split(":")
        return int(kept), int(whole)

    @property
    def needs_calibration(self) -> bool:
        """Whether inputs have norms."""
        return self.score == "wanda"


@dataclass(frozen=True, kw_only=True)
class MaskTraining:
    """How `MaskCallback` trains.

    >>> MaskTraining(start_share=0.7)
    Traceback (most recent call last):
    hf_compact.errors.ConfigError: training.start_share and end_share must be 0 <= start <= end <= 1, got 0.7 and 0.6
    """

    start_share: float = 0.1
    """Share of the steps after which the first weights go; with a pattern, after which it holds."""
    end_share: float = 0.6
    """Share of the steps after which the sparsity is reached; without a pattern."""
    interval: int | None = None
    """Steps between two masks, each of higher sparsity; without a pattern. Null: 50, or a tenth of the way where that is less."""
    backward: Literal["same", "own"] = "same"
    """With a pattern: the gradient of the inputs is that of the forward product, or comes through weights that have the
    pattern along the outputs (BDWP), so that this product is sparse too."""
    decay: float = 0.0
    """With a pattern: what is added to the gradient of weights that are masked, times the weight (SR-STE: 2e-4)."""
    storage: Literal["bitmap", "dense"] = "bitmap"
    """What is left at the end: a bitmap and the weights that stay, or ordinary Linears that hold zeros."""
    num_steps: int | None = None
    """Optimizer steps of the training, for a loop of your own; the Trainer knows its own number."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        check_types(self, "training")
        if not 0 <= self.start_share <= self.end_share <= 1:
            raise ConfigError(
                f"training.start_share and end_share must be 0 <= start <= end <= 1, got {self.start_share} and {self.end_share}"
            )
        if (self.interval is not None and self.interval < 1) or not 0 <= self.decay < math.inf:
            raise ConfigError("training.interval must be at least 1 and decay at least 0")
        if self.num_steps is not None and self.num_steps < 1:
            raise ConfigError(f"training.num_steps must be at least 1, got {self.num_steps}")
