"""From candidates, sizes and measured errors to an ordinary recipe that meets a budget.

Every stage of a candidates recipe is an alternative for each Linear it matches. Linears that read one input and are
fused by fast kernels (q, k and v; gate and up) get one choice. A method that deals out an average rate itself is one
item over all its Linears, with the rate as its choice: its own optimum over rows and columns is finer than any table
of whole layers could be.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from torch import Tensor, nn
from transformers import PreTrainedModel

from .arch import Architecture, dense_shape, on_meta
from .budget import Choice, allocate, allocate_within, front, totals
from .capture import Method, arrange_, stored_tensors
from .checkpoint import SHARD_BYTES, header_bytes, write_plot
from .config import MethodConfig, Recipe
from .errors import ConfigError
from .measurement import Alternative, Item
from .report import format_bytes
from .select import glob_matches, select_names

_FUSED = ({"q", "k", "v"}, {"gate", "up"}, {"cross_k", "cross_v"})
_RATE_STEP = 0.002  # bits between two rates of a method that takes any
_FORECAST_MARGIN = 0.0015  # of the target, where sizes are forecasts: a search for a step ends within 0.004 bits
_SIZE = re.compile(r"([0-9]+\.?[0-9]*(?:[eE][+-]?[0-9]+)?)\s*([kMGT]?)(i?)(B?)")
_PERCENT = re.compile(r"([0-9]+\.?[0-9]*)\s*%")
_ADDITIVE_UNTIL = 0.3  # nats
_NEAR = 0.005  # of the target: a plan that stays further below says why
_LABELS = {
    "divergence": "divergence from the dense model, nats per token",
    "cosine": "one minus the cosine between outputs",
    "histogram": "divergence of weight histograms, a proposal",
}


@dataclass(frozen=True)
class Target:
    """What a plan has to meet; one of the three."""

    file_bytes: int | None = None
    """Of all safetensors files of the folder, headers and untouched tensors included."""
    body_bits: float | None = None
    """Bits per compressed weight inside the blocks, every scale and table counted."""
    increase: float | None = None
    """Of the perplexity, as a fraction of the dense model's."""

    def text(self, value: float) -> str:
        """A size in the unit of the target.

        >>> Target(file_bytes=40_000_000).text(39_871_234), Target(body_bits=3.0).text(2.9612)
        ('39.871 MB', '2.961 bits')
        """
        return f"{value:.3f} bits" if self.file_bytes is None else f"{value / 1e6:.3f} MB"

    @classmethod
    def parse(
        cls, target_size: str | float | None = None, target_bpw: float | None = None, max_ppl_increase: str | float | None = None
    ) -> "Target":
        """Read the one that is given.

        Raises:
            ConfigError: none or several are given, or it does not follow its rule.

        >>> Target.parse(target_size="37.7 MB").file_bytes, Target.parse(max_ppl_increase="10%").increase
        (37700000, 0.1)
        """
        if sum(value is not None for value in (target_size, target_bpw, max_ppl_increase)) != 1:
            raise ConfigError("exactly one of target_size, target_bpw and max_ppl_increase must be given")
        if target_size is not None:
            return cls(file_bytes=parse_size(target_size))
        if target_bpw is not None:
            if not (math.isfinite(target_bpw) and target_bpw > 0):
                raise ConfigError(f"target_bpw must be a number of bits above 0, like 2.5, got {target_bpw}")
            return cls(body_bits=float(target_bpw))
        return cls(increase=parse_increase(max_ppl_increase))


def parse_size(value: str | float) -> int:
    """Bytes from a number with or without a unit; kB, MB and GB are powers of 1000, KiB, MiB and GiB of 1024.

    Raises:
        ConfigError: it is not such a size.

    >>> parse_size("40MB"), parse_size("38e6"), parse_size("1.5 MiB"), parse_size("0.5GB")
    (40000000, 38000000, 1572864, 500000000)
    """
    text = str(value).strip()
    found = _SIZE.fullmatch(text[:1] + text[1:].replace("K", "k"))
    size = math.nan if found is None else float(found[1]) * (1024 if found[3] else 1000) ** " kMGT".index(found[2] or " ")
    if found is None or (found[3] and not found[2]) or not 1 <= size < math.inf:
        raise ConfigError(
            f"target_size must be a number of bytes with or without a unit, like 40MB, 38e6 or 36MiB, got {value!r}"
        )
    return int(size)


def parse_increase(value: str | float | None) -> float:
    """A fraction from a percentage, or the fraction itself where a number is given.

    Raises:
        ConfigError: it is neither.

    >>> parse_increase("7.5%"), parse_increase(0.075)
    (0.075, 0.075)
    """
    found = _PERCENT.fullmatch(value.strip()) if isinstance(value, str) else None
    fraction = float(found[1]) / 100 if found else value
    if isinstance(fraction, str | None) or not (math.isfinite(fraction) and fraction > 0):
        raise ConfigError(f"max_ppl_increase must be a percentage above 0, like 10%, got {value!r}")
    return float(fraction)


@dataclass(frozen=True)
class Point:
    """One table of choices, or one compressed model, in numbers."""

    file_bytes: int
    """Of the whole folder's safetensors files."""
    body_bits: float
    """Bits per compressed weight inside the blocks."""
    error: float
    """Distance from the dense model in the plan's unit."""

    @property
    def ppl_factor(self) -> float:
        """What the perplexity is multiplied by, if errors are divergences of the output."""
        return math.exp(min(self.error, 700.0))


@dataclass(frozen=True)
class BudgetPlan:
    """What the planner found."""

    recipe: Recipe
    """Runs as it is."""
    point: Point
    """Its forecast; without the recipe's distillation, which makes the model better."""
    front: tuple[Point, ...]
    """Forecasts of the best recipes of all sizes."""
    measured: tuple[tuple[Point, Point], ...]
    """Forecast and measurement of the points that were validated, the recipe's own first."""
    unit: Literal["divergence", "cosine", "histogram"]
    """Of all errors: nats per token between distributions of the next token; one minus the cosine between outputs, for a
    model without such a distribution; or, of a proposal from the weights alone, nats between their histograms."""
    target: Target
    """What was asked for."""
    next_size: tuple[str, float] | None
    """The nearest size above in the target's unit, and the modules whose next better choice gives it; None if there is
    no better choice, or the target is no size."""

    @property
    def shortfall(self) -> float:
        """How far the size stays below that of the target, as a fraction; 0 if the target is no size."""
        if self.target.file_bytes is not None:
            return 1 - self.point.file_bytes / self.target.file_bytes
        return 0.0 if self.target.body_bits is None else 1 - self.point.body_bits / self.target.body_bits

    @property
    def is_proposal(self) -> bool:
        """Whether nothing was measured on text."""
        return self.unit == "histogram"

    @property
    def summary(self) -> str:
        """Forecast and measurement of the recipe in words."""
        if self.is_proposal:
            return "data-free proposal"
        points = {"forecast": self.point} | ({"measured": self.measured[0][1]} if self.measured else {})
        return "; ".join(f"{label}: {self._in_words(point)}" for label, point in points.items())

    def _in_words(self, point: Point) -> str:
        if self.unit == "divergence":
            return f"perplexity × {point.ppl_factor:.4f}"
        return f"one minus the cosine of the outputs {point.error:.4f}"

    @property
    def notes(self) -> list[str]:
        """What a reader has to know."""
        notes = []
        if self.is_proposal:
            notes.append("a data-free proposal: errors are divergences of weight histograms and predict no perplexity")
        if self.unit == "divergence" and self.point.error > _ADDITIVE_UNTIL:
            notes.append(
                f"the forecast adds up errors of single layers, which holds up to about {_ADDITIVE_UNTIL} nats per token, "
                f"and this one is {self.point.error:.2f}: measure it with --validate"
            )
        if self.shortfall > _NEAR:
            name, wanted, reached = (
                ("target_bpw", self.target.body_bits, self.point.body_bits)
                if self.target.file_bytes is None
                else ("target_size", self.target.file_bytes, self.point.file_bytes)
            )
            why = (
                "no larger choice loses less"
                if self.next_size is None
                else f"the nearest candidates above, those of {self.next_size[0]}, make it {self.target.text(self.next_size[1])}"
            )
            notes.append(
                f"{name} {self.target.text(wanted)}, reached {self.target.text(reached)}, {100 * self.shortfall:.1f} % below: {why}"
            )
        return notes

    def to_yaml(self, name: str) -> str:
        """The recipe as a file of this name, with the forecast and what was measured in its header."""
        size = f"{format_bytes(self.point.file_bytes)}, {self.point.body_bits:.3f} bits per block weight"
        return (
            f"# hf-compact compress MODEL --recipe {name} --output DIR --calibration TEXT\n"
            f"# {size}; {self.summary}.\n" + yaml.safe_dump(self.recipe.to_dict(), sort_keys=False, allow_unicode=True)
        )


def find_items(model: PreTrainedModel, arch: Architecture, stages: Sequence[tuple[Method, MethodConfig]]) -> list[Item]:
    """What is to be chosen for, with the sizes of all alternatives.

    Raises:
        NothingMatched: a glob of a stage matches nothing.
        ConfigError: no stage includes a Linear, or stages that deal out bits themselves stand beside others, or differ in
            more than their rates.
    """
    targets = [set(select_names(arch.roles, config.include, config.exclude)) if config.include else set() for _, config in stages]
    if not any(targets):
        raise ConfigError("candidates: one stage at least must include Linears of the blocks, got include [] in all of them")
    items = []
    outside = tuple(name for name in (arch.embedding, arch.head) if name is not None)
    found: dict[str, Alternative] = {}
    for method, config in stages:
        made = {name: method.compress_embedding(model.get_submodule(name), config, solve=False) for name in outside}
        if made and None not in made.values():
            kind = str([method.table_entry(new) for new in made.values()])
            found.setdefault(kind, _alternative(method, config, made))
    if found:
        items.append(Item("embeddings", outside, None, _by_size(found.values())))
    inside = [config for _, config in stages if config.include]
    if any(config.deals_out_bits for config in inside):
        _check_rates(inside)
        taken = next(filter(None, targets))
        groups: dict[tuple[str, str | None], list[str]] = {("blocks", None): [name for name in arch.roles if name in taken]}
    else:
        groups = _groups(arch, targets)
    arranged = [
        arrange_(model, arch, arch.blocks, [stage], [here], solve=False)[0] for stage, here in zip(stages, targets, strict=True)
    ]
    for (name, block), names in groups.items():
        olds = {name: on_meta(model.get_submodule(name)) for name in names}
        alternatives = [
            _alternative(
                method,
                config,
                {name: method.empty(name, old, config, in_order) for name, old in olds.items()},
            )
            for (method, config), chosen, in_order in zip(stages, targets, arranged, strict=True)
            if names[0] in chosen
        ]
        items.append(Item(name, tuple(names), block, _by_size(alternatives)))
    return items


def _check_rates(configs: Sequence[MethodConfig]) -> None:
    alike = [{k: v for k, v in config.to_dict().items() if k not in ("bits", "embedding_bits")} for config in configs]
    if any(other != alike[0] for other in alike):
        raise ConfigError(
            f"candidates: {configs[0].method} with these settings deals out its bits itself, so all stages must be of its "
            "method and differ in bits and embedding_bits only: put others into a file of their own, or set sensitivity to none"
        )


def _groups(arch: Architecture, targets: Sequence[set[str]]) -> dict[tuple[str, str | None], list[str]]:
    """(Name, block) -> Linears that get one choice: fused ones, if the same stages match all of them."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for block in arch.blocks:
        for name in arch.targets(block):
            matched = tuple(index for index, chosen in enumerate(targets) if name in chosen)
            kind = next((index for index, roles in enumerate(_FUSED) if arch.roles[name] in roles), name)
            if matched:
                groups.setdefault((block, kind, matched), []).append(name)
    return {(" + ".join(names), block): names for (block, _, _), names in groups.items()}


def _alternative(method: Method, config: MethodConfig, modules: Mapping[str, nn.Module]) -> Alternative:
    tensors = {
        f"{name}.{leaf}": tensor.to("meta") for name, new in modules.items() for leaf, tensor in stored_tensors(new).items()
    }
    return Alternative(method, config, tensors)


def _by_size(alternatives: Iterable[Alternative]) -> tuple[Alternative, ...]:
    return tuple(sorted(alternatives, key=lambda alternative: alternative.stored_bytes))


def kept_tensors(model: PreTrainedModel, arch: Architecture, items: Sequence[Item]) -> dict[str, Tensor]:
    """The tensors that no alternative replaces."""
    replaced = {f"{name}.weight" for item in items for name in item.modules}
    if any(arch.embedding in item.modules for item in items):
        replaced |= {f"{name}.weight" for name in arch.tied}
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in replaced and name not in tied}


def files_bytes(tensors: Mapping[str, Tensor], arch: Architecture) -> int:
    """Bytes of tensors in files as a run writes them: one for each block, and one for the rest; a few bytes too many."""
    sizes = _unit_bytes(tensors, arch)
    return sum(sizes.values()) + _entries_bytes(tensors, arch, sizes) + len(sizes) * SHARD_BYTES


def _entries_bytes(tensors: Mapping[str, Tensor], arch: Architecture, sizes: Mapping[str, int]) -> int:
    """The most that tensors take in the headers of files of these sizes."""
    return sum(header_bytes(name, tensor, sizes[_unit(name, arch)]) for name, tensor in tensors.items())


def _unit_bytes(tensors: Mapping[str, Tensor], arch: Architecture) -> dict[str, int]:
    """Bytes by block; what is outside of them has the empty name."""
    sizes = dict.fromkeys(["", *arch.blocks], 0)
    for name, tensor in tensors.items():
        sizes[_unit(name, arch)] += tensor.nbytes
    return sizes


def _unit(name: str, arch: Architecture) -> str:
    return next((block for block in arch.blocks if name.startswith(block + ".")), "")


@dataclass(frozen=True)
class _Option:
    config: MethodConfig
    stored_bytes: float
    header_bytes: int
    error: float


class Programme:
    """The choices of all items in numbers, and what is best under a target.

    Args:
        model: for the weights of the items.
        arch: its blocks.
        items: from `find_items`.
        errors: one for each alternative, by item; None while only sizes are known.
    """

    def __init__(
        self, model: PreTrainedModel, arch: Architecture, items: Sequence[Item], errors: Mapping[str, Sequence[float]] | None = None
    ) -> None:  # fmt: skip
        """Expand the rates of methods that take any."""
        self.arch, self.items = arch, list(items)
        kept = kept_tensors(model, arch, items)
        sizes = _unit_bytes(kept, arch)
        for item in items:
            each = [_unit_bytes(alternative.tensors, arch) for alternative in item.alternatives]
            sizes = {unit: size + max(found[unit] for found in each) for unit, size in sizes.items()}
        own = sum(tensor.nbytes for tensor in kept.values()) + len(sizes) * SHARD_BYTES
        self.fixed_bytes = own + _entries_bytes(kept, arch, sizes)
        self.is_body = [item.modules[0] in arch.roles for item in items]
        self.num_weights = sum(
            dense_shape(model.get_submodule(name)).numel()
            for item, is_body in zip(items, self.is_body, strict=True) if is_body
            for name in item.modules
        )  # fmt: skip
        self.options = [
            [
                _Option(alternative.config, alternative.stored_bytes, _entries_bytes(alternative.tensors, arch, sizes), error)
                for alternative, error in zip(
                    item.alternatives, [0.0] * len(item.alternatives) if errors is None else errors[item.name], strict=True
                )
            ]
            for item in self.items
        ]
        self.options = [
            _rates(options) if is_body and options[0].config.deals_out_bits else options
            for options, is_body in zip(self.options, self.is_body, strict=True)
        ]
        self.is_forecast = any(not alternative.method.is_dealt for item in items for alternative in item.alternatives)
        self.by_file = [
            [Choice(math.ceil(option.stored_bytes) + option.header_bytes, option.error) for option in options]
            for options in self.options
        ]
        self.by_body = [
            [Choice(math.ceil(option.stored_bytes) if is_body else 0, option.error) for option in options]
            for options, is_body in zip(self.options, self.is_body, strict=True)
        ]

    def check(self, target: Target) -> None:
        """Raise ConfigError, naming the least and the most, for a size that no choices have; errors need not be known."""
        if target.file_bytes is not None:
            least, most = (self.fixed_bytes + edge for edge in _range(self.by_file))
            if not least <= self._aim(target.file_bytes) or target.file_bytes * 0.995 > most:
                raise ConfigError(
                    f"target_size must be between {least / 1e6:.3f} MB and {most / 1e6:.3f} MB for these candidates, "
                    f"got {target.file_bytes / 1e6:.3f} MB"
                )
        if target.body_bits is not None:
            low, high = (8 * edge / self.num_weights for edge in _range(self.by_body))
            if not low <= self._aim(target.body_bits) or target.body_bits * 0.995 > high:
                raise ConfigError(
                    f"target_bpw must be between {low:.3f} and {high:.3f} bits for these candidates, got {target.body_bits:g}"
                )

    def solve(self, target: Target) -> list[int]:
        """The option of every item.

        Raises:
            ConfigError: the target cannot be met; the message names the least and the most.
        """
        self.check(target)
        if target.file_bytes is not None:
            return allocate(self.by_file, math.floor(self._aim(target.file_bytes)) - self.fixed_bytes)
        if target.body_bits is not None:
            return allocate(self.by_body, math.floor(self._aim(target.body_bits) * self.num_weights / 8))
        assert target.increase is not None
        ceiling = math.log1p(target.increase)
        least = sum(min(choice.error for choice in choices) for choices in self.by_file)
        if least > ceiling:
            raise ConfigError(
                f"max_ppl_increase must be at least {100 * math.expm1(least):.3g} % for these candidates, "
                f"got {100 * target.increase:g} %"
            )
        return allocate_within(self.by_file, ceiling)

    def _aim(self, value: float) -> float:
        return value * (1 - _FORECAST_MARGIN) if self.is_forecast else value

    def point(self, table: Sequence[int]) -> Point:
        """The forecast of a table."""
        body = totals(self.by_body, table).num_bytes
        whole = totals(self.by_file, table)
        return Point(self.fixed_bytes + whole.num_bytes, 8 * body / self.num_weights, whole.error)

    def next_size(self, table: Sequence[int], target: Target) -> tuple[str, float] | None:
        """The item and the size, in the target's unit, of the smallest step up from a table that loses less."""
        if target.increase is not None:
            return None
        choices, least = (self.by_file, 1.0) if target.file_bytes is not None else (self.by_body, 8 / self.num_weights)
        steps = [
            (other.num_bytes - options[index].num_bytes, item.name)
            for item, options, index in zip(self.items, choices, table, strict=True)
            for other in options
            if other.error < options[index].error and other.num_bytes > options[index].num_bytes
        ]
        if not steps:
            return None
        step, name = min(steps)
        here = self.point(table)
        return name, least * step + (here.body_bits if target.file_bytes is None else here.file_bytes)

    def tables(self) -> list[list[int]]:
        """The convex front."""
        return list(front(self.by_file))

    def stages(self, table: Sequence[int]) -> tuple[MethodConfig, ...]:
        """The stages of a table: what the embedding gets, then every chosen setting with the Linears that take it."""
        stages: list[MethodConfig] = []
        members: dict[MethodConfig, list[str]] = {}
        for item, options, index, is_body in zip(self.items, self.options, table, self.is_body, strict=True):
            config = options[index].config
            if is_body:
                members.setdefault(dataclasses.replace(config, include=("*",), exclude=()), []).extend(item.modules)
            else:
                stages.append(dataclasses.replace(config, include=(), exclude=()))
        names = list(self.arch.roles)
        return (
            *stages,
            *(dataclasses.replace(config, include=tuple(compact_globs(chosen, names))) for config, chosen in members.items()),
        )


def compact_globs(chosen: Iterable[str], names: Sequence[str]) -> list[str]:
    """Few globs that match exactly the chosen ones of all names.

    >>> compact_globs(["a.0.q", "a.1.q", "a.1.k"], ["a.0.q", "a.0.k", "a.1.q", "a.1.k"])
    ['*.q', 'a.1.*']
    """
    wanted = set(chosen)
    globs = {"*": 0} | dict.fromkeys(wanted, 0)
    for name in wanted:
        parts = name.split(".")
        for cut in range(1, len(parts)):
            globs[".".join(parts[:cut]) + ".*"] = 0
            if not any(part.isdecimal() for part in parts[cut:]):
                globs["*." + ".".join(parts[cut:])] = 0
                globs[f"*.{parts[cut]}.*"] = 0
    matched = {glob: {name for name in names if glob_matches(name, glob)} for glob in globs}
    exact = [glob for glob in globs if matched[glob] and matched[glob] <= wanted]
    kept, covered = [], set[str]()
    for glob in sorted(exact, key=lambda glob: (-len(matched[glob]), len(glob), glob)):
        if not matched[glob] <= covered:
            kept.append(glob)
            covered |= matched[glob]
    return kept


def _rates(options: Sequence[_Option]) -> list[_Option]:
    """What was tried of a method that deals out its bits, and the rates between."""
    between = (option for low, high in itertools.pairwise(options) for option in _between(low, high))
    return [*between, options[-1]]


def _between(low: _Option, high: _Option) -> Iterable[_Option]:
    """Rates from one that was tried up to the next, bytes linear and errors exponential in the bits."""
    start, stop = (option.config.to_dict()["bits"] for option in (low, high))
    count = max(1, round((stop - start) / _RATE_STEP))
    logs = [math.log(max(option.error, 1e-12)) for option in (low, high)]
    for step in range(count):
        share = step / count
        yield _Option(
            dataclasses.replace(low.config, bits=round(start + share * (stop - start), 4)),  # type: ignore[call-arg]
            low.stored_bytes + share * (high.stored_bytes - low.stored_bytes),
            max(low.header_bytes, high.header_bytes),
            math.exp(logs[0] + share * (logs[1] - logs[0])),
        )


def _range(layers: Sequence[Sequence[Choice]]) -> tuple[int, int]:
    sizes = [[choice.num_bytes for choice in choices] for choices in layers]
    return sum(map(min, sizes)), sum(map(max, sizes))


def plot_front(plan: BudgetPlan, name: str, path: Path) -> None:
    """A PNG: size of the file against the forecast, the chosen point, and what was measured beside its forecast."""
    from matplotlib.figure import Figure  # here, because no other step needs the memory it takes

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([p.file_bytes / 1e6 for p in plan.front], [max(p.error, 1e-12) for p in plan.front], "-", label="front, forecast")
    axes.plot(plan.point.file_bytes / 1e6, max(plan.point.error, 1e-12), "o", label="this recipe, forecast")
    if plan.measured:
        for forecast, measured in plan.measured:
            sizes = [forecast.file_bytes / 1e6, measured.file_bytes / 1e6]
            axes.plot(sizes, [max(forecast.error, 1e-12), max(measured.error, 1e-12)], ":", color="grey")
        axes.plot(
            [measured.file_bytes / 1e6 for _, measured in plan.measured],
            [max(measured.error, 1e-12) for _, measured in plan.measured], "x", label="measured",
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlabel("whole file, MB")
    axes.set_ylabel(_LABELS[plan.unit])
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title(f"{Path(name).name}: {format_bytes(plan.point.file_bytes)}, {plan.point.body_bits:.2f} bits per block weight")
    write_plot(path, figure)
