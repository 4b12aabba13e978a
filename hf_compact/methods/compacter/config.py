"""Settings of a Compacter adapter, as PEFT keeps them in `adapter_config.json`."""

import typing
from dataclasses import dataclass
from typing import Any, Literal

from peft import PeftConfig
from peft.utils import PeftType
from transformers.activations import ACT2FN

from ...config import typed
from ...errors import ConfigError

#: What the file holds as `peft_type`. Without this library PEFT knows no such type and shows it in its KeyError.
STORED_TYPE = "COMPACTER (import hf_compact first)"
VARIANTS = {"compacter": ("o", "down"), "compacter++": ("down",)}


@dataclass(kw_only=True)
class CompacterConfig(PeftConfig):
    """Bottleneck adapters behind the sub-layers of a frozen model, made of very few parameters.

    >>> CompacterConfig(variant="compacter+")
    Traceback (most recent call last):
    hf_compact.errors.ConfigError: compacter.variant must be one of compacter, compacter++, got 'compacter+'
    """

    variant: Literal["compacter", "compacter++"] = "compacter"
    """Adapters behind self-attention and feed-forward sub-layers, or (`++`) behind feed-forward ones only."""
    kind: Literal["phm", "low_rank", "snnk"] = "phm"
    """Both maps sums of Kronecker products; both maps of low rank; or fixed random kernel features and a trained map up."""
    reduction_factor: float = 32
    """Hidden width / bottleneck; the bottleneck is rounded to a multiple of `hypercomplex_division`."""
    hypercomplex_division: int = 4
    """PHM only: number of Kronecker products, and edge of the slow matrices; has to divide the hidden width."""
    rank: int | None = 1
    """Rank of the fast factors; null, PHM only, keeps them whole."""
    shared_slow: bool = True
    """PHM only: one set of slow matrices for the whole model, or one for each map."""
    slow_std: float = 1e-4
    """PHM only: spread of the slow matrices at the start; small, so that the adapter is nearly the identity there. Not 0:
    both maps would be 0, and so would be every gradient that could change it."""
    activation: str = "gelu_new"
    """Between the maps, a name that transformers knows; SNNK has its features instead."""
    feature: Literal["relu", "sincos"] = "relu"
    """SNNK only: features of the arc-cosine or of the Gaussian kernel."""
    seed: int = 0
    """SNNK only: of the random directions, which are drawn again on loading and not stored."""
    train_layer_norm: bool = True
    """Train a copy of every layer norm too."""
    target_modules: list[str] | str | None = None
    """Modules to put an adapter behind, as in every PEFT config; null follows `variant` in families that are known."""
    exclude_modules: list[str] | str | None = None
    """Modules to leave out."""
    modules_to_save: list[str] | None = None
    """More modules to train and store whole, such as a new head; norms are added here."""

    def __post_init__(self) -> None:
        """Check types, ranges, then combinations."""
        super().__post_init__()
        self.peft_type = PeftType.COMPACTER
        for name, hint in typing.get_type_hints(CompacterConfig).items():
            if name in CompacterConfig.__annotations__ and "modules" not in name:  # lists of modules are PEFT's to judge
                setattr(self, name, typed(getattr(self, name), hint, f"compacter.{name}"))
        if isinstance(self.modules_to_save, str):
            raise ConfigError(f"compacter.modules_to_save must be a list of names, got {self.modules_to_save!r}")
        for name, lowest in {"reduction_factor": 1, "hypercomplex_division": 1, "seed": 0}.items():
            if not getattr(self, name) >= lowest:
                raise ConfigError(f"compacter.{name} must be at least {lowest}, got {getattr(self, name)}")
        if not 0 < self.slow_std < float("inf"):
            raise ConfigError(f"compacter.slow_std must be above 0 and finite, got {self.slow_std}")
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"compacter.rank must be at least 1 or null, got {self.rank}")
        if self.rank is None and self.kind == "low_rank":
            raise ConfigError("compacter.rank must be given for kind low_rank, got null")
        _check_activation(self.activation)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the type says what to import."""
        return {**super().to_dict(), "peft_type": STORED_TYPE}


def _check_activation(name: str) -> None:
    if name not in ACT2FN:
        raise ConfigError(f"compacter.activation must be a name in transformers' ACT2FN, got {name!r}")
    if any(True for _ in ACT2FN[name].parameters()):  # PEFT finds an adapter's own parameters only, which lie flat in it
        raise ConfigError(f"compacter.activation must have no parameters of its own, got {name!r}")
