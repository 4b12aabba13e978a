"""What was measured of models, in one schema: `results.json`, written by `hf-compact evaluate --output`.

Rows of the tasks and windows of the texts are kept, so that any two models of the same protocol can be compared pair by pair
later; `docs/evaluation.md` explains every field.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from .checkpoint import write_text
from .errors import ConfigError, FormatError
from .functional.divergence import kl_divergence
from .functional.paired import mean_and_error, paired_difference
from .scoring import compare_windows

RESULTS_VERSION = 1


@dataclass(kw_only=True)
class ModelResult:
    """One model. What was not asked for is empty or None."""

    name: str
    """Folder or file name, or Hub id."""
    fingerprint: str
    """SHA-256 of its weight files and config, of those below an adapter too."""
    dtype: str
    """In which it was run."""
    file_bytes: int
    """Of all its weight files."""
    num_parameters: int
    """Of the dense model that it stands for, tied ones once."""
    body_bits_per_weight: float | None = None
    """Mean bits of the compressed weights inside blocks; None for a model that is not compressed by us."""
    compression: dict[str, Any] | None = None
    """`methods`, `seconds`, `peak_memory_bytes`, `is_verified`, from the folder's own report."""
    perplexity: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Text -> what `scoring.score` and `scoring.per_word` return, and `seconds`."""
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Task -> what `harness.run_tasks` returns."""
    speed: dict[str, Any] | None = None
    """What `speed.summary` returns."""
    memory: dict[str, Any] | None = None
    """Of a fresh process: `load_seconds`, `runtime_bytes` before loading, `loaded_bytes`, `peak_bytes`, on its `device`."""
    comparison: dict[str, Any] | None = None
    """What `compare` returns, against the base; None for the base and without one."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """What the caller wants beside the numbers: revision of the code, seed."""

    @property
    def bits_per_parameter(self) -> float:
        """Bits on disk per parameter of the dense model."""
        return 8 * self.file_bytes / self.num_parameters


@dataclass(kw_only=True)
class Results:
    """A run: what was measured how, on what machine, of which models."""

    protocol: dict[str, Any]
    """Everything that has to be equal for two numbers to be comparable: texts with their SHA-256, windows, tasks, dtype …"""
    machine: dict[str, Any]
    """Processor, cores, memory, accelerator."""
    versions: dict[str, str]
    """Of the libraries that decide the results."""
    base: str | None = None
    """Name of the model that the others are compared with."""
    models: list[ModelResult] = field(default_factory=list)
    """In the order of the command; the base first."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Name -> why it could not be run."""

    def named(self, name: str) -> ModelResult | None:
        """The model of that name, None if it is not here."""
        return next((model for model in self.models if model.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; numbers that are not finite are None, which JSON can say."""
        return _finite({"results_version": RESULTS_VERSION, **asdict(self)})

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Inverse of `to_dict`.

        Raises:
            FormatError: another version, or fields that do not belong to it.
        """
        if not isinstance(values, dict):
            raise FormatError(f"results must be a mapping, got {type(values).__name__}")
        values = dict(values)
        version = values.pop("results_version", None)
        if version != RESULTS_VERSION:
            raise FormatError(f"results_version must be {RESULTS_VERSION}, got {version!r}")
        try:
            values["models"] = [ModelResult(**model) for model in values["models"]]
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise FormatError(f"results do not fit their schema: {error}") from error

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a results file.

        Raises:
            FormatError: the file is missing or does not hold results.
        """
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise FormatError(f"results {path} cannot be read: {error}") from error

    def write(self, path: Path) -> None:
        """Write the file, complete or not at all; columns of numbers on one line each."""
        write_text(path, _lines(self.to_dict()) + "\n")


def compare(model: ModelResult, base: ModelResult) -> dict[str, Any]:
    """A model against the base, example by example.

    Returns:
        `base` (its name), `perplexity`: text -> as `scoring.compare_windows`, `tasks`: task -> as `compare_items`.

    Raises:
        ConfigError: the rows or windows are not the same.
    """
    perplexity = {}
    for text, found in model.perplexity.items():
        if text in base.perplexity:
            other = base.perplexity[text]
            if len(found["window_nll"]) == len(other["window_nll"]):
                perplexity[text] = compare_windows(found, other)
    tasks = {}
    for task, result in model.tasks.items():
        if task in base.tasks:
            if result["items"]["hash"] != base.tasks[task]["items"]["hash"]:
                raise ConfigError(f"{model.name} and {base.name} were not given the same rows of {task}")
            tasks[task] = compare_items(result["items"], base.tasks[task]["items"])
    return {"base": base.name, "perplexity": perplexity, "tasks": tasks}


def compare_items(items: Mapping[str, Sequence[Any]], base: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """The same rows answered by two models.

    Args:
        items: columns of a task, as `harness.run_tasks` gives them.
        base: the same rows in the same order.

    Returns:
        `metrics`: metric -> `difference` of the means and its `stderr`, row by row, and where rows are right or wrong by it,
        `num_lost` and `num_gained`, rows that only the base, or only the model, has right, and `agreement`, the share of all
        others; `agreement` of the task: share of the rows with the same likeliest choice, or where nothing is chosen, both right
        or both wrong (without `acc`, the same first metric), None where rows have no number of their own; with choices also `kl` (`KL(base || model)` of the distribution over them, nats per row) and its
        `kl_stderr`.

    >>> found = compare_items({"acc": [1.0, 0.0, 0.0]}, {"acc": [1.0, 1.0, 0.0]})
    >>> round(found["agreement"], 3), found["metrics"]["acc"]["num_lost"], found["metrics"]["acc"]["num_gained"]
    (0.667, 1, 0)
    """
    metrics = {}
    for name, values in items.items():
        if name in base and name not in ("hash", "choice", "choices"):
            difference, stderr = paired_difference(_numbers(values), _numbers(base[name]))
            metrics[name] = {"difference": difference, "stderr": stderr, **_changed(values, base[name])}
    found: dict[str, Any] = {"metrics": metrics, "agreement": None}
    judged = next((name for name in ("choice", "acc", *metrics) if name in items and name in base), None)
    if judged is not None:
        pairs = list(zip(items[judged], base[judged], strict=True))
        found["agreement"] = sum(a == b for a, b in pairs) / len(pairs)
    if "choices" in items and "choices" in base:
        divergences = [
            kl_divergence(_numbers(p).log_softmax(-1), _numbers(q).log_softmax(-1))
            for q, p in zip(items["choices"], base["choices"], strict=True)
        ]
        found["kl"], found["kl_stderr"] = mean_and_error(torch.stack(divergences))
    return found


def _changed(values: Sequence[Any], base: Sequence[Any]) -> dict[str, Any]:
    """Rows that only one of two models has right; nothing where they are not right or wrong."""
    if not set(values) | set(base) <= {0, 1}:
        return {}
    lost, gained = (sum(a < b for a, b in zip(*pair, strict=True)) for pair in ((values, base), (base, values)))
    return {"num_lost": lost, "num_gained": gained, "agreement": 1 - (lost + gained) / max(len(values), 1)}


def _numbers(values: Sequence[float | None]) -> torch.Tensor:
    """NaN in the place of what a file had no number for."""
    return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)


def with_error(difference: float | None, stderr: float | None, sign: str = "") -> str:
    """A value or a difference in words; `not finite` where JSON had no number for it.

    >>> with_error(0.5, 0.1, sign="+")
    '+0.5000 ± 0.1000'
    """
    if difference is None:
        return "not finite"
    return f"{difference:{sign}.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(value: Any, indent: str = "") -> str:
    """JSON, indented, with lists of plain values on one line."""
    deeper = indent + "  "
    if isinstance(value, dict) and value:
        inner = ",\n".join(f"{deeper}{json.dumps(key)}: {_lines(entry, deeper)}" for key, entry in value.items())
        return f"{{\n{inner}\n{indent}}}"
    if isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        inner = ",\n".join(f"{deeper}{_lines(entry, deeper)}" for entry in value)
        return f"[\n{inner}\n{indent}]"
    return json.dumps(value)
