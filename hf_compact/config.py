"""Configs and recipes, one vocabulary for Python, YAML, JSON and the command line.

A method config is a frozen dataclass; a recipe is a list of them with the calibration that they share.
Unknown keys and wrong types are errors that name the key, the value and the rule.
"""

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import yaml

from .errors import ConfigError

#: Of a model's weights; what auto is, the setting says.
DType = Literal["auto", "float32", "bfloat16", "float16"]
#: YAML 1.1 reads a number without a point, like 2e-3, as text.
_YAML_FLOAT = re.compile(r"[+-]?\d+[eE][+-]?\d+")
#: Recipes that come with the library and have a name.
_RECIPES = Path(__file__).parent / "recipes"
#: Where a recipe whose file is missing may lie too: those of the planner.
_CANDIDATES = Path(__file__).parent / "candidates"


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Base of every method's config. A subclass names its method and is found by that name."""

    method: ClassVar[str]
    registry: ClassVar[dict[str, type["MethodConfig"]]] = {}

    include: tuple[str, ...] = ("*",)
    """Whole-name globs of the block Linears to compress; `*` also matches dots. Empty: embedding and head only."""
    exclude: tuple[str, ...] = ()
    """Whole-name globs of modules to leave alone; a glob that matches nothing is an error."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Register the subclass under its method name."""
        super().__init_subclass__(**kwargs)
        MethodConfig.registry[cls.method] = cls

    @property
    def needs_calibration(self) -> bool:
        """Whether the method reads gram matrices of the inputs."""
        return True

    @property
    def needs_whole_model(self) -> bool:
        """Whether the dense model has to be in memory as a whole before the first block is compressed."""
        return False

    @property
    def deals_out_bits(self) -> bool:
        """Whether the settings name an average rate `bits`, any number, that the method deals out over its Linears itself."""
        return False

    @property
    def needs_dense_inputs(self) -> bool:
        """Whether the method compares with what the dense model has at the same place; it needs the whole model too."""
        return False

    @property
    def leaves_linears(self) -> bool:
        """Whether what it makes is built of Linears, which later stages compress when they select the same name."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """Plain values, every default included, the method's name first."""
        return {"method": self.method, **_plain(self)}


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """How many tokens of the calibration text are run through the model."""

    num_sequences: int = 64
    """Sequences drawn at random positions of the text."""
    sequence_length: int = 512
    """Tokens per sequence."""
    batch_size: int = 4
    """Sequences per forward pass; memory grows with it, the result does not depend on it beyond rounding."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("num_sequences", "sequence_length", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"calibration.{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """How long what is continuous in the compressed model is fitted to the dense one.

    That is norms, biases, the scales and codebooks of compressed Linears, and of a pruned model factors for the rows and columns
    of its Linears, which their weights take over. Calibration batches given ready are used as
    they are.
    """

    num_sequences: int = 256
    """Sequences of the calibration text, at positions of their own."""
    epochs: int = 1
    """How often each is used."""
    batch_size: int = 4
    """Sequences per step."""
    learning_rate: float = 2e-3
    """Largest relative change of a scale in one step of Adam."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("num_sequences", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"distillation.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.learning_rate <= 0.1:
            raise ConfigError(f"distillation.learning_rate must be in (0, 0.1], got {self.learning_rate}")


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """How long each block is fitted to its dense form, on the inputs that the compressed blocks before it give.

    The same tensors are trained as by distillation; the target is the block's output, the inputs are the calibration's.
    """

    epochs: int = 3
    """How often each calibration batch is used."""
    learning_rate: float = 1e-3
    """Largest relative change of a scale in one step of Adam."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.epochs < 1:
            raise ConfigError(f"reconstruction.epochs must be at least 1, got {self.epochs}")
        if not 0 < self.learning_rate <= 0.1:
            raise ConfigError(f"reconstruction.learning_rate must be in (0, 0.1], got {self.learning_rate}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to do to a model: stages in order, one calibration, one seed.

    >>> Recipe.from_dict({"stages": []})
    Traceback (most recent call last):
    hf_compact.errors.ConfigError: recipe.stages must name at least one stage, got []
    """

    stages: tuple[MethodConfig, ...]
    """Methods, applied in this order."""
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    """Size of the calibration set."""
    reconstruction: ReconstructionConfig | None = None
    """A short training of what is continuous in each block, right after its Linears; null leaves it out."""
    distillation: DistillationConfig | None = None
    """A short training of what is continuous, after all stages; null leaves it out. The model is loaded whole."""
    seed: int = 0
    """Seed of the calibration positions and of every random choice."""
    dtype: DType = "auto"
    """Dtype to compute in and to store the rest in; auto is the checkpoint's own, bfloat16 for a GGUF file."""
    auto_map: bool = False
    """Add a stub to the folder that imports this library under `trust_remote_code=True`."""

    def __post_init__(self) -> None:
        """Check that there is work to do."""
        if not self.stages:
            raise ConfigError("recipe.stages must name at least one stage, got []")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"recipe.seed must be in [0, 2**63), got {self.seed}")
        check_dtype(self.dtype, "recipe.dtype")

    @property
    def needs_whole_model(self) -> bool:
        """Whether the dense model has to be in memory as a whole."""
        return self.distillation is not None or any(stage.needs_whole_model for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, every default included."""
        return {
            "stages": [stage.to_dict() for stage in self.stages],
            "calibration": _plain(self.calibration),
            "reconstruction": None if self.reconstruction is None else _plain(self.reconstruction),
            "distillation": None if self.distillation is None else _plain(self.distillation),
            "seed": self.seed,
            "dtype": self.dtype,
            "auto_map": self.auto_map,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recipe":
        """Inverse of `to_dict`; whatever is not given takes its default.

        Raises:
            ConfigError: an unknown key or method, a wrong type, or a value out of range.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"recipe must be a mapping with the key 'stages', got {type(values).__name__}")
        _check_keys(cls, values, "recipe")
        stages = values.get("stages")
        if not isinstance(stages, list):
            raise ConfigError(f"recipe.stages must be a list of mappings, got {stages!r}")
        known: dict[str, Any] = {"stages": tuple(_stage(stage, position) for position, stage in enumerate(stages))}
        if "calibration" in values:
            known["calibration"] = _build(CalibrationConfig, values["calibration"], "calibration")
        for name, cls_of in (("reconstruction", ReconstructionConfig), ("distillation", DistillationConfig)):
            if values.get(name) is not None:
                known[name] = _build(cls_of, values[name], name)
        hints = typing.get_type_hints(cls)
        for name in ("seed", "dtype", "auto_map"):
            if name in values:
                known[name] = typed(values[name], hints[name], f"recipe.{name}")
        return cls(**known)

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Recipe":
        """Read a recipe file, or one that comes with the library, by its name.

        Raises:
            ConfigError: the file is missing, is not YAML, or breaks a rule of `from_dict`.

        >>> Recipe.from_yaml("prune-20").stages[0].method
        'pruning'
        """
        named = _RECIPES / f"{Path(path).name.removesuffix('.yaml')}.yaml"
        is_name = not Path(path).exists() and str(path) == named.stem and named.is_file()
        try:
            text = (named if is_name else Path(path)).read_text(encoding="utf-8")
        except FileNotFoundError as error:
            other = _CANDIDATES / named.name
            hint = f": did you mean {named.stem if named.is_file() else other}?" if named.is_file() or other.is_file() else ""
            raise ConfigError(f"recipe must be a YAML file, got {str(path)!r}, which does not exist{hint}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"recipe {str(path)!r} cannot be read: {error}") from error
        try:
            return cls.from_dict(yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise ConfigError(f"recipe {str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from error


def _stage(values: Any, position: int) -> MethodConfig:
    where = f"recipe.stages[{position}]"
    if not isinstance(values, dict) or "method" not in values:
        raise ConfigError(f"{where} must be a mapping with the key 'method', got {values!r}")
    method = values["method"]
    if not isinstance(method, str) or method not in MethodConfig.registry:
        raise ConfigError(f"{where}.method must be one of {sorted(MethodConfig.registry)}, got {method!r}")
    return _build(MethodConfig.registry[method], {k: v for k, v in values.items() if k != "method"}, method)


def _build(cls: type, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be a mapping, got {values!r}")
    _check_keys(cls, values, where)
    hints = typing.get_type_hints(cls)
    return cls(**{name: typed(value, hints[name], f"{where}.{name}") for name, value in values.items()})


def _check_keys(cls: type, values: dict[str, Any], where: str) -> None:
    names = [f.name for f in dataclasses.fields(cls)]
    unknown = [key for key in values if key not in names]
    if unknown:
        raise ConfigError(f"{where} has the unknown key {unknown[0]!r}; known keys: {', '.join(names)}")


def typed(value: Any, hint: Any, where: str) -> Any:
    """`value` as `hint`, where YAML's types allow it without guessing.

    Raises:
        ConfigError: they do not.

    >>> typed("1e-4", float | None, "a.b")
    0.0001
    """
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    for option in options:
        if option is type(None) and value is None:
            return None
        if typing.get_origin(option) is tuple and isinstance(value, list | tuple):
            item = typing.get_args(option)[0]
            return tuple(typed(v, item, where) for v in value)
        if typing.get_origin(option) is typing.Literal and (type(value), value) in [
            (type(a), a) for a in typing.get_args(option)
        ]:
            return value
        if option is float and isinstance(value, str) and _YAML_FLOAT.fullmatch(value):
            return float(value)
        if option is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(option, type) and isinstance(value, option) and (option is bool or not isinstance(value, bool)):
            return value
    rule = " or ".join(_describe(option) for option in options)
    raise ConfigError(f"{where} must be {rule}, got {value!r}")


def _describe(option: Any) -> str:
    if typing.get_origin(option) is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(option)))}"
    if typing.get_origin(option) is tuple:
        return f"a list of {_describe(typing.get_args(option)[0])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", type(None): "null"}
    return names.get(option, str(option))


def _plain(config: Any) -> dict[str, Any]:
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def without_places(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as a mapping, with the names alone of the files that its stages read.

    >>> without_places({"stages": [{"method": "tensor_network", "profile": "/home/me/profile.json"}]})
    {'stages': [{'method': 'tensor_network', 'profile': 'profile.json'}]}
    """
    stages = [{**stage, "profile": Path(stage["profile"]).name} if stage.get("profile") else stage for stage in recipe["stages"]]
    return {**recipe, "stages": stages}


def check_types(config: Any, where: str) -> None:
    """Bring the fields of a config that code makes to the types of their hints, as a file's are.

    Raises:
        ConfigError: a field is of another type.
    """
    hints = typing.get_type_hints(type(config))
    for one in dataclasses.fields(config):
        object.__setattr__(config, one.name, typed(getattr(config, one.name), hints[one.name], f"{where}.{one.name}"))


def check_dtype(dtype: str, field_name: str = "dtype") -> str:
    """The name of a dtype, if it may be asked for.

    Raises:
        ConfigError: it may not.

    >>> check_dtype("half")
    Traceback (most recent call last):
    hf_compact.errors.ConfigError: dtype must be one of auto, float32, bfloat16, float16, got 'half'
    """
    if dtype not in typing.get_args(DType):
        raise ConfigError(f"{field_name} must be one of {', '.join(typing.get_args(DType))}, got {dtype!r}")
    return dtype


def check_device(device: str, needs_double: bool = False) -> str:
    """The full name of a device, if there is one of it.

    Args:
        device: as torch names it.
        needs_double: whether it has to compute in float64.

    Raises:
        ConfigError: torch knows none of that name, or this machine has none.

    >>> check_device("cpu")
    'cpu'
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ConfigError(f"device {device!r} is not to be had: {str(error).splitlines()[0]}") from error
    if found.type == "meta" or (needs_double and found.type == "mps"):
        reason = "nothing is computed there" if found.type == "meta" else "it has no float64, in which moments are summed"
        raise ConfigError(f"device {device!r} is not to be had: {reason}")
    return str(found)
