"""Settings of tensor-network decomposition."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from ...config import MethodConfig
from ...errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TensorNetworkConfig(MethodConfig):
    """Factor block Linears into trains of small ones, with one budget for the whole model.

    >>> TensorNetworkConfig(keep_ratio=1.5)
    Traceback (most recent call last):
    hf_compact.errors.ConfigError: tensor_network.keep_ratio must be in (0, 1], got 1.5
    """

    method: ClassVar[str] = "tensor_network"

    keep_ratio: float = 0.8
    """Kept parameters / dense parameters of all selected Linears together."""
    format: Literal["low_rank", "tensor_train", "auto"] = "low_rank"
    """A product of two matrices, a train with even factors, or for each Linear what has the least error at its size."""
    num_cores: int = 2
    """Tensor trains only: how many cores."""
    is_pivoted: bool = True
    """Low rank only: some rows of the product are stored as they are, the others as their combinations, which takes
    `r (O + I - r)` values in place of `r (O + I)`. Without it the ranks are ordered and can be cut later."""
    solver: Literal["svd", "whitened", "regression"] = "whitened"
    """What is minimised: the error of the weights, of the outputs, or of the outputs against those of the dense model,
    whose inputs are not those of the compressed prefix (Linears without a bias; others as `whitened`)."""
    allocation: Literal["uniform", "fisher", "profile"] = "fisher"
    """How the budget is dealt out. `uniform`: every Linear keeps the same share. `fisher`: by what an error costs the
    loss, from gradients of the dense model; the model is loaded whole. `profile`: as `hf-compact profile` has measured."""
    profile: str | None = None
    """Allocation `profile` only: the JSON file."""
    rank_multiple: int = 8
    """Ranks are multiples of it, where the matrix is not kept dense."""
    dense_above: float = 1.0
    """A Linear that would keep a larger share of its parameters stays dense: two products take longer than one, which only a
    small share makes up for. Below 1 the allocation has to choose, so it is `fisher` or `profile`."""
    basis_group: int = 1
    """Linears of one kind that read the residual stream (q, k, v, gate, up) in so many adjacent blocks may share the right
    factor of a plain product, which is stored once; each has its own left factor. They do where the allocation finds it
    cheaper, so it has to be `fisher`. 1: none does."""
    protected: tuple[str, ...] = ()
    """Whole-name globs of Linears that keep at least `protected_ratio` of their parameters."""
    protected_blocks: tuple[int, ...] = ()
    """Blocks by number whose Linears are protected as well, negative from the end: 0 and -1 are the first and the last of every
    stack, whatever the depth."""
    protected_ratio: float = 0.8
    """See `protected`."""
    damp: float = 0.01
    """Ridge of the gram matrices as a fraction of their mean diagonal."""
    blend: float = 0.6
    """Regression only: weight of the dense model's inputs against the inputs of the compressed prefix."""

    def __post_init__(self) -> None:
        """Check ranges, then combinations."""
        self._check_ranges()
        if self.basis_group > 1 and self.allocation != "fisher":
            raise ConfigError(
                f"tensor_network.basis_group above 1 belongs to allocation fisher, which decides who shares, "
                f"got {self.basis_group} and allocation {self.allocation}"
            )
        if self.dense_above < 1 and self.allocation == "uniform":
            raise ConfigError(
                f"tensor_network.dense_above below 1 belongs to an allocation that chooses what stays dense, fisher or profile, "
                f"got {self.dense_above} and allocation uniform"
            )
        if (self.allocation == "profile") != (self.profile is not None):
            raise ConfigError(
                f"tensor_network.profile belongs to allocation profile, got allocation {self.allocation} and profile {self.profile}"
            )

    def _check_ranges(self) -> None:
        choices = {"format": ("low_rank", "tensor_train", "auto"), "solver": ("svd", "whitened", "regression"),
                   "allocation": ("uniform", "fisher", "profile")}  # fmt: skip
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"tensor_network.{name} must be one of {', '.join(allowed)}, got {getattr(self, name)}")
        for name in ("keep_ratio", "protected_ratio", "dense_above"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"tensor_network.{name} must be in (0, 1], got {getattr(self, name)}")
        for name in ("damp", "blend"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"tensor_network.{name} must be in [0, 1], got {getattr(self, name)}")
        if not 2 <= self.num_cores <= 6:
            raise ConfigError(f"tensor_network.num_cores must be in [2, 6], got {self.num_cores}")
        for name in ("rank_multiple", "basis_group"):
            if getattr(self, name) < 1:
                raise ConfigError(f"tensor_network.{name} must be at least 1, got {getattr(self, name)}")

    @property
    def needs_calibration(self) -> bool:
        """Moments of the inputs are taken: for a solver that reads them, for biases, and for the error in the report."""
        return True

    @property
    def needs_whole_model(self) -> bool:
        """Gradients pass through all blocks."""
        return self.allocation == "fisher" or self.needs_dense_inputs

    @property
    def needs_dense_inputs(self) -> bool:
        """The target of the regression is what the dense model gives."""
        return self.solver == "regression"

    @property
    def leaves_linears(self) -> bool:
        """Cores are Linears."""
        return True


@dataclass(frozen=True, kw_only=True)
class TensorNetworkTraining:
    """How `TensorNetworkCallback` trains.

    >>> TensorNetworkTraining(schedule="trp", energy=0.0)
    Traceback (most recent call last):
    hf_compact.errors.ConfigError: training.energy must be in (0, 1], got 0.0
    """

    schedule: Literal["heal", "trp", "maestro"] = "heal"
    """`heal`: train the factors of a decomposed model. `trp`: train a dense model whose matrices are
    truncated from time to time, and factor them at the end. `maestro`: train factors of full rank of which now and then
    only the first few are used, so that the result can be cut to any rank."""
    trains_rest: bool = False
    """heal: whether embeddings, norms and Linears that are dense are trained beside the factors."""
    include: tuple[str, ...] = ("*",)
    """trp and maestro: whole-name globs of block Linears."""
    exclude: tuple[str, ...] = ()
    """trp and maestro: whole-name globs of block Linears to leave alone."""
    interval: int = 20
    """trp: optimizer steps between two truncations."""
    energy: float = 0.98
    """trp: share of the energy that a truncation keeps; the number of singular values follows."""
    nuclear_weight: float = 3e-4
    """trp: weight of the nuclear norm. A truncation takes this times the learning rate of its step times `interval` off every
    singular value, apart from the optimizer: with AdamW's small learning rates it shows from about 1 on."""
    shares: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    """maestro: shares of the rank that a layer is cut to while it is drawn; every step draws one layer."""
    lasso_weight: float = 0.0
    """maestro: weight of the norms of all suffixes of the factors, which drives the last components to zero."""
    threshold: float = 1e-5
    """maestro: components whose suffixes have a smaller product of norms, relative to all, are dropped at the end."""
    seed: int = 0
    """maestro: of the draws."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.schedule not in ("heal", "trp", "maestro"):
            raise ConfigError(f"training.schedule must be one of heal, trp, maestro, got {self.schedule}")
        if self.interval < 1:
            raise ConfigError(f"training.interval must be at least 1, got {self.interval}")
        if not 0 < self.energy <= 1:
            raise ConfigError(f"training.energy must be in (0, 1], got {self.energy}")
        if not self.shares or not all(0 < share <= 1 for share in self.shares):
            raise ConfigError(f"training.shares must be in (0, 1], got {self.shares}")
        for name in ("nuclear_weight", "lasso_weight", "threshold"):
            if not getattr(self, name) >= 0:  # nor NaN
                raise ConfigError(f"training.{name} must be at least 0, got {getattr(self, name)}")
