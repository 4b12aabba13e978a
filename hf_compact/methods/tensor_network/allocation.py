"""Which Linear gets how much of the budget, and which of adjacent blocks share a basis; from the dense model.

Linears of one kind in `basis_group` adjacent blocks may share the right factor of a low-rank product, which is that of
their rows stacked, each weighted by what an error at its output costs, in the mean metric of their inputs. Whether a group
shares, and at what rank, is one choice of the allocation beside those without sharing.

Source: Basis Sharing (arXiv 2410.03765). Differs: the left factors are solved later, block by block, in the metric of the
inputs that come through the compressed prefix; groups share only where that costs less.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ... import distributed
from ...arch import Architecture, as_linear, dense_shape
from ...budget import Choice, allocate, front, totals
from ...errors import ConfigError, NothingMatched, NumericalError
from ...functional.factor import energies, spectrum, whitening_factor
from ...report import LayerReport
from ...select import select_names
from ...sensitivity import measure
from .config import TensorNetworkConfig
from .functional import low_rank_values

#: Tokens whose gradients are taken: half of the calibration set's, as they cost more, and no fewer than so many if it has them.
_FISHER_SHARE, _FISHER_TOKENS = 0.5, 16384
#: Roles of the Linears that read the residual stream (or the encoder's output), whose space adjacent blocks have in common.
_BASIS_ROLES = ("q", "k", "v", "qkv", "gate", "up", "cross_q", "cross_k", "cross_v")
_CORE = "core1"  # holds the basis
_ROUNDING = 1e-6  # nats, of a divergence in float32


@dataclass(frozen=True)
class Share:
    """What one Linear gets."""

    num_values: int
    """Parameters of all its cores; at those of the dense matrix it stays dense."""
    outputs: Tensor | None
    """`[out, out]` second moment of the gradients at its output, None where it is not known."""
    basis: Tensor | None = None
    """`[rank, in]`: the right factor that its group shares; None for a Linear of its own."""
    ties: Mapping[str, str] | None = None
    """Where the model holds that factor already."""


@dataclass(frozen=True)
class _Shared:
    """The basis of a group."""

    owner: str
    """The first Linear of the group, which stores it."""
    rows: Tensor
    """`[rank, in]`."""


class Guide:
    """The shares of all Linears of one stage."""

    def __init__(
        self, model: PreTrainedModel, num_values: Mapping[str, int], outputs: Mapping[str, Tensor], bases: Mapping[str, _Shared]
    ) -> None:  # fmt: skip
        """Keep the plan."""
        self.model, self.num_values, self.outputs, self.bases = model, num_values, outputs, bases

    def share(self, name: str, finished: Sequence[LayerReport], num_inputs: float) -> Share | None:
        """The share of a Linear; None for one that was not planned for, like a core.

        A basis that is stored already is taken as it is by now: a later stage may have quantized it.
        """
        if name not in self.num_values:
            return None
        found = self.bases.get(name)
        plan = self.num_values[name], self.outputs.get(name)
        if found is None:
            return Share(*plan)
        if found.owner == name:
            return Share(*plan, found.rows)
        return Share(*plan, self.model.get_submodule(found.owner).basis(), {_CORE: f"{found.owner}.{_CORE}"})


@dataclass(frozen=True)
class _Option:
    """One way to keep a unit: a Linear, or a group of them."""

    choice: Choice
    num_values: tuple[int, ...]
    """Of every Linear."""
    rank: int = 0
    """Of the basis that they share; 0 without one."""

    @classmethod
    def alone(cls, layers: Sequence[Sequence[Choice]], table: Sequence[int]) -> Self:
        """Every Linear by itself."""
        return cls(totals(layers, table), tuple(choices[index].num_bytes for choices, index in zip(layers, table, strict=True)))


def prepare(
    model: PreTrainedModel, arch: Architecture, names: Sequence[str], batches: Sequence[Mapping[str, Tensor]],
    config: TensorNetworkConfig, progress: Callable[[int, int], None] = lambda done, total: None,
) -> Guide:  # fmt: skip
    """Deal the budget out.

    Every Linear has a curve of error against parameters; the best table prices a parameter the same everywhere. The
    errors are in the units of the loss: squared singular values weighted on both sides, or what a profile has measured.

    Raises:
        ConfigError: the profile does not fit the model, the budget is less than the least ranks take, or there is no block of a
            protected number.
        NothingMatched: a glob of `protected` matches nothing, or no Linear has neighbours to share a basis with.
        NumericalError: gradients are not finite.
    """
    shapes = {name: dense_shape(model.get_submodule(name)) for name in names}
    least = _least(arch, names, config)
    if config.allocation == "uniform":
        return Guide(model, _uniform(shapes, least, config), {}, {})
    groups = find_groups(arch, names, config.basis_group) if config.basis_group > 1 else []
    outputs: dict[str, Tensor] = {}
    stacks: dict[tuple[str, ...], _Stack] = {}
    if config.allocation == "profile":
        curves = _profiled_curves(shapes, config)
    else:
        num_tokens = distributed.world_size() * sum(next(iter(batch.values())).shape[:2].numel() for batch in batches)
        num_tokens = max(_FISHER_TOKENS, int(_FISHER_SHARE * num_tokens))
        found = measure(model, arch, names, batches, num_tokens, num_tokens, progress, is_full=True)
        outputs, curves = found.outputs, {}
        for group in groups:
            mean = torch.stack([found.grams[name] for name in group]).mean(0)
            stacks[group] = _Stack(model, group, metrics(mean, None, config)[0], outputs, config)
        for name in names:
            weight = as_linear(model.get_submodule(name)).weight.detach().cpu()
            lost = _lost(_sensitive_energies(weight, found.grams.pop(name), outputs[name], config))
            curves[name] = [Choice(values, lost[rank]) for rank, values in _ranks(shapes[name], config)]
    grouped = {name for group in groups for name in group}
    units = [*groups, *((name,) for name in names if name not in grouped)]
    options = []
    for unit in units:
        dense = [shapes[name].numel() for name in unit]
        floors = [least[name] * size for name, size in zip(unit, dense, strict=True)]
        layers = [
            [*(choice for choice in curves[name] if choice.num_bytes >= floor), Choice(size, 0.0)]
            for name, floor, size in zip(unit, floors, dense, strict=True)
        ]
        tables = front(layers) if len(unit) > 1 else ([index] for index in range(len(layers[0])))
        options.append([_Option.alone(layers, table) for table in tables])
        if unit in stacks:
            options[-1] += [
                shared
                for shared in stacks[unit].options()  # a member has the basis whole, whoever stores it
                if all(shared.rank * sum(shapes[name]) >= floor for name, floor in zip(unit, floors, strict=True))
            ]
    total = sum(shape.numel() for shape in shapes.values())
    _check_budget(options, total, config)
    table = allocate([[option.choice for option in each] for each in options], int(config.keep_ratio * total))
    num_values: dict[str, int] = {}
    bases: dict[str, _Shared] = {}
    for unit, each, index in zip(units, options, table, strict=True):
        num_values |= dict(zip(unit, each[index].num_values, strict=True))
        if each[index].rank:
            bases |= dict.fromkeys(unit, _Shared(unit[0], stacks[unit].basis(each[index].rank)))
    return Guide(model, num_values, outputs, bases)


def _least(arch: Architecture, names: Sequence[str], config: TensorNetworkConfig) -> dict[str, float]:
    """The share of its parameters that a Linear keeps at least."""
    found = set(select_names(names, config.protected, field="protected")) if config.protected else set()
    for number in config.protected_blocks:
        for stack in arch.stacks:
            if not -len(stack) <= number < len(stack):
                raise ConfigError(
                    f"tensor_network.protected_blocks must be in [{-len(stack)}, {len(stack) - 1}] for the blocks of "
                    f"{stack[0].rpartition('.')[0]}, got {number}"
                )
            mine = set(arch.targets(stack[number])) & set(names)
            if not mine:
                raise NothingMatched(
                    f"tensor_network.protected_blocks {number}: no Linear of {stack[number]} is among those that are selected"
                )
            found.update(mine)
    return {name: config.protected_ratio if name in found else 0.0 for name in names}


def _check_budget(options: Sequence[Sequence[_Option]], total: int, config: TensorNetworkConfig) -> None:
    smallest = sum(min(option.choice.num_bytes for option in each) for each in options)
    if smallest > int(config.keep_ratio * total):
        raise ConfigError(
            f"tensor_network.keep_ratio must be at least {smallest / total:.4f} with these ranks (rank_multiple "
            f"{config.rank_multiple}, dense_above {config.dense_above}), protected Linears and profile, got {config.keep_ratio}"
        )


def find_groups(arch: Architecture, names: Iterable[str], size: int) -> list[tuple[str, ...]]:
    """Linears of one kind that read the residual stream (or the encoder's output) in up to `size` adjacent blocks.

    Raises:
        NothingMatched: there are none.
    """
    found: dict[tuple[str, str], list[str]] = {}
    chosen = set(names)
    for stack in arch.stacks:
        for position, block in enumerate(stack):
            first = stack[position - position % size]
            for name in arch.targets(block):
                if name in chosen and arch.roles[name] in _BASIS_ROLES:
                    found.setdefault((first, name.removeprefix(block)), []).append(name)
    groups = [tuple(group) for group in found.values() if len(group) > 1]
    if not groups:
        raise NothingMatched(
            f"tensor_network.basis_group {size} finds no two selected Linears of one kind in adjacent blocks with a role of "
            f"{', '.join(_BASIS_ROLES)}"
        )
    return groups


def _uniform(shapes: Mapping[str, torch.Size], least: Mapping[str, float], config: TensorNetworkConfig) -> dict[str, int]:
    """Values by Linear: the protected keep their ratio where it is more, and the others share what is left alike."""
    sizes = {name: shape.numel() for name, shape in shapes.items()}
    above = {
        name: min((v for _, v in _ranks(shapes[name], config) if v >= least[name] * size), default=size)
        for name, size in sizes.items() if least[name] > config.keep_ratio
    }  # fmt: skip
    rest = sum(size for name, size in sizes.items() if name not in above)
    left = config.keep_ratio * sum(sizes.values()) - sum(above.values())
    smallest = sum(min((values for _, values in _ranks(shapes[name], config)), default=0) for name in sizes if name not in above)
    if left < smallest or not rest:
        protected = f"what {len(above)} protected Linears keep at protected_ratio {config.protected_ratio}, and " if above else ""
        raise ConfigError(
            f"tensor_network.keep_ratio {config.keep_ratio} is less than {protected}the least ranks of "
            f"the Linears that are left (rank_multiple {config.rank_multiple})"
        )
    return {name: above[name] if name in above else int(left / rest * size) for name, size in sizes.items()}


class _Stack:
    """The rows of a group's Linears, one below the other, each as it counts for the loss."""

    def __init__(
        self, model: PreTrainedModel, names: Sequence[str], right: Tensor | None, outputs: Mapping[str, Tensor],
        config: TensorNetworkConfig,
    ) -> None:  # fmt: skip
        self.linears = [as_linear(model.get_submodule(name)) for name in names]
        self.outputs, self.right, self.config = [outputs[name] for name in names], right, config

    def options(self) -> list["_Option"]:
        """Every rank that takes fewer values than the dense matrices."""
        rows, columns = [linear.out_features for linear in self.linears], self.linears[0].in_features
        lost = _lost(energies(self._rows(), self.right))
        ranks = range(self.config.rank_multiple, min(len(lost), min(rows) + 1), self.config.rank_multiple)  # each member has it
        sized = [(rank, tuple(rank * (out + (columns if k == 0 else 0)) for k, out in enumerate(rows))) for rank in ranks]
        most = _most(sum(rows) * columns, self.config)
        return [_Option(Choice(sum(v), lost[rank]), v, rank) for rank, v in sized if sum(v) <= most]

    def basis(self, rank: int) -> Tensor:
        """`[rank, in]` as it is stored."""
        return spectrum(self._rows(), self.right).truncate(rank)[1].to(self.linears[0].weight.dtype)

    def _rows(self) -> Tensor:
        parts = []
        for linear, outputs in zip(self.linears, self.outputs, strict=True):
            weight, left = linear.weight.detach().double().cpu(), metrics(None, outputs, self.config)[1]
            weight = weight if outputs.diagonal().any() else torch.zeros_like(weight)  # costs nothing
            parts.append(weight if left is None else left.T @ weight)
        return torch.cat(parts)


def _lost(energy: Tensor) -> list[float]:
    """What is lost with so many of the first triplets."""
    return torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)]).tolist()


def _sensitive_energies(weight: Tensor, gram: Tensor, outputs: Tensor, config: TensorNetworkConfig) -> Tensor:
    """What the loss feels of every singular triplet; plain SVD weighs no direction, so its Linears count by mean sensitivities.

    A Linear that is never reached, by inputs or by gradients, has no metric and costs nothing.
    """
    if not (gram.diagonal().any() and outputs.diagonal().any()):
        return torch.zeros(min(weight.shape), dtype=torch.float64)
    energy = energies(weight, *metrics(gram, outputs, config))
    return energy * gram.diagonal().mean() * outputs.diagonal().mean() if config.solver == "svd" else energy


def metrics(gram: Tensor | None, outputs: Tensor | None, config: TensorNetworkConfig) -> tuple[Tensor | None, Tensor | None]:
    """Factors of what weighs the error at the inputs and at the outputs."""
    if config.solver == "svd":
        return None, None
    try:
        right = None if gram is None else whitening_factor(gram, config.damp)
        left = None if outputs is None else whitening_factor(outputs, config.damp)
    except ValueError as error:
        raise NumericalError(str(error)) from error
    return right, left


def _ranks(shape: Sequence[int], config: TensorNetworkConfig) -> list[tuple[int, int]]:
    """`(rank, values)` of every low-rank choice that is worth its two products; too small a matrix has every rank."""
    multiples = range(config.rank_multiple, min(shape), config.rank_multiple)
    sized = [(rank, low_rank_values(shape[0], shape[1], rank, config.is_pivoted)) for rank in multiples or range(1, min(shape))]
    most = _most(shape[0] * shape[1], config)
    return [(rank, values) for rank, values in sized if values <= most]


def _most(num_dense: int, config: TensorNetworkConfig) -> int:
    """Values that factors have at most: fewer than the dense matrix."""
    return min(num_dense - 1, int(config.dense_above * num_dense))


def _profiled_curves(shapes: Mapping[str, torch.Size], config: TensorNetworkConfig) -> dict[str, list[Choice]]:
    """Piecewise linear between the ratios of a profile, and nothing lost at 1."""
    try:
        layers = json.loads(Path(config.profile).read_text(encoding="utf-8"))["layers"]
        for name, shape in shapes.items():
            if layers[name]["shape"] != [*shape]:
                raise ValueError(f"{name} has the shape {layers[name]['shape']} there, {[*shape]} in the model")
        measured = {
            name: {float(ratio): _measured(point["divergence"]) for ratio, point in layers[name]["curve"].items()}
            for name in shapes
        }
        for name, curve in measured.items():
            if not curve or not all(0 < ratio < 1 and 0 <= lost < math.inf for ratio, lost in curve.items()):
                raise ValueError(f"{name} needs ratios in (0, 1) with finite divergences, got {curve}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"tensor_network.profile {config.profile!r} does not fit the model: {error!r}") from error
    curves = {}
    for name, shape in shapes.items():
        points = sorted({**measured[name], 1.0: 0.0}.items())
        choices = [Choice(values, _interpolate(points, values / shape.numel())) for _, values in _ranks(shape, config)]
        curves[name] = [choice for choice in choices if choice.num_bytes >= points[0][0] * shape.numel()] or choices[-1:]
    return curves


def _measured(divergence: Any) -> float:
    """One that rounding has brought below zero is zero."""
    value = float(divergence)
    return 0.0 if -_ROUNDING < value < 0 else value


def _interpolate(points: Sequence[tuple[float, float]], at: float) -> float:
    """Between the neighbours; below the first point the line through the first two goes on."""
    right = next((i for i, (ratio, _) in enumerate(points) if i and ratio >= at), len(points) - 1)
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    return max(0.0, y0 + (y1 - y0) * (at - x0) / (x1 - x0))
