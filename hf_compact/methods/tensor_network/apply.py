"""From a dense Linear, the gram matrix of its inputs and its share of the budget to a tensor train."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...arch import Architecture, as_linear, dense_shape
from ...budget import Choice, allocate
from ...errors import ConfigError, NumericalError
from ...functional.factor import energies, spectrum, whitening_factor
from ...report import LayerReport
from ...select import select_names
from ...sensitivity import measure
from .config import TensorNetworkConfig
from .functional import candidate_factors, decompose, low_rank_for, low_rank_values, ranks_for, regression_target
from .layer import TensorTrainLinear

_FISHER_TOKENS = 16384
_SPLITS = 3  # pairs of factorisations that are tried


@dataclass(frozen=True)
class Share:
    """What one Linear gets."""

    num_values: int
    """Parameters of all its cores; at those of the dense matrix it stays dense."""
    outputs: Tensor | None
    """`[out, out]` second moment of the gradients at its output, None where it is not known."""


class Guide:
    """The shares of all Linears of one stage."""

    def __init__(self, num_values: Mapping[str, int], outputs: Mapping[str, Tensor]) -> None:
        """Keep the plan."""
        self.num_values, self.outputs = num_values, outputs

    def share(self, name: str, finished: Sequence[LayerReport], num_inputs: float) -> Share | None:
        """The share of a Linear; None for one that was not planned for, like a core."""
        return Share(self.num_values[name], self.outputs.get(name)) if name in self.num_values else None


def prepare(
    model: PreTrainedModel, arch: Architecture, names: Sequence[str], batches: Sequence[Mapping[str, Tensor]],
    config: TensorNetworkConfig, progress: Callable[[int, int], None] = lambda done, total: None,
) -> Guide:  # fmt: skip
    """Deal the budget out.

    Every Linear has a curve of error against parameters; the best table prices a parameter the same everywhere. The
    errors are in the units of the loss: squared singular values weighted on both sides, or what a profile has measured.

    Raises:
        ConfigError: a glob of `protected` matches nothing, or the profile does not fit the model.
        NumericalError: gradients are not finite.
    """
    shapes = {name: dense_shape(model.get_submodule(name)) for name in names}
    least = dict.fromkeys(names, 0.0)
    if config.protected:
        least |= dict.fromkeys(select_names(names, config.protected), config.protected_ratio)
    total = sum(shape.numel() for shape in shapes.values())
    if config.allocation == "uniform":
        return Guide({name: int(max(config.keep_ratio, least[name]) * shapes[name].numel()) for name in names}, {})
    outputs: dict[str, Tensor] = {}
    if config.allocation == "profile":
        curves = _profiled_curves(shapes, config)
    else:
        found = measure(model, arch, names, batches, _FISHER_TOKENS, _FISHER_TOKENS, progress, is_full=True)
        outputs = found.outputs
        curves = {}
        for name in names:
            weight = as_linear(model.get_submodule(name)).weight.detach().cpu()
            energy = energies(weight, *_metrics(found.grams.pop(name), outputs[name], config))
            lost = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)]).tolist()
            curves[name] = [Choice(values, lost[rank]) for rank, values in _ranks(shapes[name], config)]
    layers = []
    for name in names:
        size = shapes[name].numel()
        kept = [choice for choice in curves[name] if choice.num_bytes >= least[name] * size]
        layers.append([*kept, Choice(size, 0.0)])
    chosen = allocate(layers, int(config.keep_ratio * total))
    return Guide({name: layers[i][chosen[i]].num_bytes for i, name in enumerate(names)}, outputs)


def compress_linear(
    linear: nn.Linear, gram: Tensor | None, config: TensorNetworkConfig, solve: bool = True, guide: Share | None = None,
    cross: Tensor | None = None,
) -> nn.Linear | TensorTrainLinear:  # fmt: skip
    """Factor one Linear; the Linear itself where its share is all of it.

    Args:
        linear: `[out, in]`.
        gram: `[in, in]` sum of x x^T, or None for independent inputs.
        config: settings.
        solve: with False the module is empty.
        guide: its share of the budget; None gives it `config.keep_ratio`.
        cross: `[in, in]` sum of x_dense x^T, for the regression.

    Raises:
        NumericalError: a gram matrix is not finite.
    """
    shape = linear.weight.shape
    num_values = int(config.keep_ratio * shape.numel()) if guide is None else guide.num_values
    rank = low_rank_for(shape[0], shape[1], num_values, config.is_pivoted)
    rank = rank // config.rank_multiple * config.rank_multiple or rank
    if num_values >= shape.numel() or min(shape) <= 1:
        return linear
    if not solve:
        if config.format == "low_rank":
            return _low_rank(linear, rank, config)
        return next(_trains(linear, num_values, config), None) or _low_rank(linear, rank, config)
    weight = linear.weight.detach().double().cpu()
    if gram is not None and cross is not None:
        weight = regression_target(weight, gram, cross, config.damp, config.blend)
    outputs = None if guide is None else guide.outputs
    right, left = _metrics(gram, outputs, config)
    made = []
    if config.format != "tensor_train":
        made.append(_low_rank(linear, rank, config).load_factors_(*spectrum(weight, right, left).truncate(rank)))
    if config.format != "low_rank":
        made += [_solve_train(train, weight, gram) for train in _trains(linear, num_values, config)]
    if not made:  # a side is a prime number
        made.append(_low_rank(linear, rank, config).load_factors_(*spectrum(weight, right, left).truncate(rank)))
    if len(made) == 1:
        return made[0]
    return min(made, key=lambda module: _weighted_error(weight - module.to_dense(torch.float64), right, left))


def compress_embedding(module: nn.Embedding | nn.Linear, config: TensorNetworkConfig, solve: bool = True) -> None:
    """Embeddings and heads stay: a token reads one row, and their rows have no low rank."""
    return


def _low_rank(linear: nn.Linear, rank: int, config: TensorNetworkConfig) -> TensorTrainLinear:
    out_features, in_features = linear.weight.shape
    return TensorTrainLinear.empty_like(
        linear, out_factors=[out_features, 1], in_factors=[1, in_features], ranks=[rank], is_pivoted=config.is_pivoted
    )


def _trains(linear: nn.Linear, num_values: int, config: TensorNetworkConfig) -> Iterator[TensorTrainLinear]:
    """Empty trains within the budget: even factorisations, as they are and sorted."""
    for out_factors, in_factors in candidate_factors(linear.out_features, linear.in_features, config.num_cores, _SPLITS):
        ranks = ranks_for(out_factors, in_factors, num_values)
        for is_sorted in (False, True):
            yield TensorTrainLinear.empty_like(
                linear, out_factors=out_factors, in_factors=in_factors, ranks=ranks, is_sorted=is_sorted
            )


def _solve_train(train: TensorTrainLinear, weight: Tensor, gram: Tensor | None) -> TensorTrainLinear:
    """Fill a train; sorting puts rows and columns of like energy beside each other."""
    if train.is_sorted:
        energy = weight.square() if gram is None else weight.square() * gram.diagonal()
        train.load_orders_(energy.sum(1).argsort(), energy.sum(0).argsort())
        weight = weight[energy.sum(1).argsort()][:, energy.sum(0).argsort()]
    return train.load_cores_(decompose(weight, train.out_factors, train.in_factors, train.ranks))


def _metrics(gram: Tensor | None, outputs: Tensor | None, config: TensorNetworkConfig) -> tuple[Tensor | None, Tensor | None]:
    """Factors of what weighs the error at the inputs and at the outputs."""
    if config.solver == "svd":
        return None, None
    try:
        right = None if gram is None else whitening_factor(gram, config.damp)
        left = None if outputs is None else whitening_factor(outputs, config.damp)
    except ValueError as error:
        raise NumericalError(str(error)) from error
    return right, left


def _weighted_error(error: Tensor, right: Tensor | None, left: Tensor | None) -> float:
    error = error if right is None else error @ right
    error = error if left is None else left.T @ error
    return error.square().sum().item()


def _ranks(shape: Sequence[int], config: TensorNetworkConfig) -> list[tuple[int, int]]:
    """`(rank, values)` of every low-rank choice that is smaller than the dense matrix."""
    multiples = range(config.rank_multiple, min(shape), config.rank_multiple)
    sized = [(rank, low_rank_values(shape[0], shape[1], rank, config.is_pivoted)) for rank in [*multiples] or [1]]
    return [(rank, values) for rank, values in sized if values < shape[0] * shape[1]]


def _profiled_curves(shapes: Mapping[str, torch.Size], config: TensorNetworkConfig) -> dict[str, list[Choice]]:
    """Piecewise linear between the ratios of a profile, and nothing lost at 1."""
    try:
        layers = json.loads(Path(config.profile).read_text(encoding="utf-8"))["layers"]
        measured = {
            name: {float(ratio): float(point["divergence"]) for ratio, point in layers[name]["curve"].items()} for name in shapes
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"tensor_network.profile {config.profile!r} does not fit the model: {error!r}") from error
    curves = {}
    for name, shape in shapes.items():
        points = sorted({**measured[name], 1.0: 0.0}.items())
        choices = [Choice(values, _interpolate(points, values / shape.numel())) for _, values in _ranks(shape, config)]
        curves[name] = [choice for choice in choices if choice.num_bytes >= points[0][0] * shape.numel()] or choices[-1:]
    return curves


def _interpolate(points: Sequence[tuple[float, float]], at: float) -> float:
    """Between the neighbours; below the first point the line through the first two goes on."""
    right = next((i for i, (ratio, _) in enumerate(points) if i and ratio >= at), len(points) - 1)
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    return max(0.0, y0 + (y1 - y0) * (at - x0) / (x1 - x0))
