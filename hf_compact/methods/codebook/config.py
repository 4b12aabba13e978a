"""Settings of codebook quantization."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from ...config import MethodConfig
from ...errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CodebookConfig(MethodConfig):
    """Quantize block Linears to `bits` per weight, and the token embedding and the output head beside them.

    >>> CodebookConfig(bits=5)
    Traceback (most recent call last):
    hf_compact.errors.ConfigError: codebook.bits must be one of 2, 3, 4, 8, got 5
    """

    method: ClassVar[str] = "codebook"

    bits: Literal[2, 3, 4, 8] = 4
    """Bits of a code; on the split grid, which takes two more, those of each of its parts."""
    grid: Literal["uniform", "nf4", "learned", "power", "pot", "split"] = "uniform"
    """Where the levels come from: equal steps; NormalFloat-4; Lloyd's algorithm on the weights; steps that grow by a
    power, whose exponent is searched for each Linear together with the clipping and then learned; signed powers of two
    without a zero; equal steps in each of three parts of the range."""
    group_size: int | None = 32
    """Inputs that share a scale; null is one scale per row. The last group of a row may be shorter."""
    scale_bits: int | None = 5
    """Bits of a group's scale, in [2, 8], as a multiple of one step per row; null keeps float16."""
    symmetric: bool = False
    """Uniform and learned grids only: levels around zero, without a stored offset."""
    rows_per_codebook: int = 32
    """Learned grid only: rows that share a table of levels."""
    row_order: Literal["given", "similar"] = "given"
    """Learned grid only: `similar` lets rows of like distribution share a table. Channels of an MLP, value dimensions
    inside a head and key-value heads are reordered in the model, which costs nothing; other rows store their table, as all do beside
    a stage that measures the dense model."""
    learning: Literal["none", "proximal", "soft"] = "none"
    """GPTQ only: move codes to neighbouring levels by gradient on the layer's output error, after the refits."""
    learning_steps: int = 60
    """Gradient steps of it."""
    rounding: Literal["gptq", "nearest"] = "gptq"
    """Error feedback through the gram matrix of the inputs, or plain nearest, which needs no calibration."""
    damp: float = 0.05
    """GPTQ only: ridge as a fraction of the mean diagonal of the gram matrix."""
    act_order: bool = True
    """GPTQ only: round the inputs with the largest second moment first, with static groups."""
    shrink_steps: int = 16
    """Clipping candidates per group in the scale search; 1 keeps the full range."""
    refit_rounds: int = 2
    """GPTQ only: rounds of closed-form refit of scales and codebooks, each followed by a sweep over the codes."""
    embedding_bits: Literal[4, 8] | None = 8
    """Bits of the token embedding and of the output head, tied or not, without calibration; null leaves both as they are."""
    embedding_group_size: int | None = None
    """Embedding columns that share a scale; null is one per row."""

    def __post_init__(self) -> None:
        """Check ranges, then combinations."""
        self._check_ranges()
        if self.grid == "nf4" and self.bits != 4:
            raise ConfigError(f"codebook.grid nf4 has 16 levels, so codebook.bits must be 4, got {self.bits}")
        if self.grid == "learned" and self.bits == 8:
            raise ConfigError("codebook.grid learned is for 2, 3 and 4 bits, got 8: 256 levels gain nothing over equal steps")
        if self.grid == "split" and self.bits == 8:
            raise ConfigError("codebook.grid split is for 2, 3 and 4 bits, got 8: three times 256 levels do not fit into a byte")
        if self.grid == "pot" and self.bits not in (2, 3):
            raise ConfigError(f"codebook.grid pot is for 2 and 3 bits, got {self.bits}: more levels crowd around zero")
        if self.symmetric and self.grid not in ("uniform", "learned"):
            raise ConfigError(f"codebook.symmetric belongs to the uniform and the learned grid, got grid {self.grid}")
        if self.row_order == "similar" and self.grid != "learned":
            raise ConfigError(f"codebook.row_order similar belongs to the learned grid, got grid {self.grid}")
        if self.learning != "none" and self.rounding == "nearest":
            raise ConfigError(f"codebook.learning {self.learning} starts from error feedback, got rounding nearest")

    def _check_ranges(self) -> None:
        choices = {"bits": (2, 3, 4, 8), "grid": ("uniform", "nf4", "learned", "power", "pot", "split"),
                   "rounding": ("gptq", "nearest"), "row_order": ("given", "similar"),
                   "learning": ("none", "proximal", "soft"), "embedding_bits": (4, 8, None)}  # fmt: skip
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                rule = ", ".join("null" if value is None else str(value) for value in allowed)
                raise ConfigError(f"codebook.{name} must be one of {rule}, got {getattr(self, name)}")
        for name, lowest in {
            "shrink_steps": 1,
            "refit_rounds": 0,
            "rows_per_codebook": 1,
            "learning_steps": 1,
        }.items():
            if getattr(self, name) < lowest:
                raise ConfigError(f"codebook.{name} must be at least {lowest}, got {getattr(self, name)}")
        if not 0 <= self.damp <= 1:
            raise ConfigError(f"codebook.damp must be in [0, 1], got {self.damp}")
        for name in ("group_size", "embedding_group_size"):
            size = getattr(self, name)
            if size is not None and size < 8:
                raise ConfigError(f"codebook.{name} must be null or at least 8, got {size}")
        if self.scale_bits is not None and not 2 <= self.scale_bits <= 8:
            raise ConfigError(f"codebook.scale_bits must be null or in [2, 8], got {self.scale_bits}")

    @property
    def needs_calibration(self) -> bool:
        """Whether the solver reads gram matrices of the inputs."""
        return self.rounding == "gptq"
