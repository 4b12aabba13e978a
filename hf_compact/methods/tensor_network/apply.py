"""From a dense Linear, the gram matrix of its inputs and its share of the budget to a tensor train."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ...errors import NumericalError
from ...functional.factor import coefficients, spectrum
from .allocation import Share, metrics
from .config import TensorNetworkConfig
from .functional import candidate_factors, fit_train, low_rank_for, ranks_for, regression_target
from .layer import TensorTrainLinear

_SPLITS = 3  # pairs of factorisations that are tried
_SWEEPS = 3  # through the cores of the best of them


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
        NumericalError: a gram matrix is not finite, or cannot be inverted.
    """
    shape = linear.weight.shape
    num_values = int(config.keep_ratio * shape.numel()) if guide is None else guide.num_values
    rank = low_rank_for(shape[0], shape[1], num_values, config.is_pivoted)
    rank = rank // config.rank_multiple * config.rank_multiple or rank
    is_shared = guide is not None and guide.basis is not None
    if not is_shared and (num_values >= shape.numel() or min(shape) <= 1):
        return linear
    if not solve:
        if config.format == "low_rank":
            return _low_rank(linear, rank, config)
        return next(_trains(linear, num_values, config), None) or _low_rank(linear, rank, config)
    weight = linear.weight.detach().double().cpu()
    if gram is not None and cross is not None:
        try:
            weight = regression_target(weight, gram, cross, config.damp, config.blend)
        except ValueError as error:
            raise NumericalError(str(error)) from error
    right, left = metrics(gram, None if guide is None or is_shared else guide.outputs, config)
    if is_shared:
        return _share(linear, weight, right, guide)
    trains = [] if config.format == "low_rank" else [*_trains(linear, num_values, config)]
    low_rank = (
        [] if trains and config.format == "tensor_train" else [_low_rank(linear, rank, config)]
    )  # a prime side has no train
    made = [module.load_factors_(*spectrum(weight, right, left).truncate(rank)) for module in low_rank]
    if trains:
        started = [_solve_train(train, weight, right, left) for train in trains]
        best = min(started, key=lambda train: _weighted_error(weight - train.to_dense(torch.float64).cpu(), right, left))
        made.append(_solve_train(best, weight, right, left, num_sweeps=_SWEEPS))
    return min(made, key=lambda module: _weighted_error(weight - module.to_dense(torch.float64).cpu(), right, left))


def compress_embedding(module: nn.Embedding | nn.Linear, config: TensorNetworkConfig, solve: bool = True) -> None:
    """Embeddings and heads stay: a token reads one row, and their rows have no low rank."""
    return


def _low_rank(linear: nn.Linear, rank: int, config: TensorNetworkConfig) -> TensorTrainLinear:
    out_features, in_features = linear.weight.shape
    return TensorTrainLinear.empty_like(
        linear, out_factors=[out_features, 1], in_factors=[1, in_features], ranks=[rank], is_pivoted=config.is_pivoted
    )


def _share(linear: nn.Linear, weight: Tensor, right: Tensor | None, share: Share) -> TensorTrainLinear:
    """A product whose right factor is that of a group: only the left one is solved for."""
    rank = len(share.basis)
    train = TensorTrainLinear.empty_like(
        linear, out_factors=[linear.out_features, 1], in_factors=[1, linear.in_features], ranks=[rank], ties=share.ties
    )
    return train.load_factors_(coefficients(weight, share.basis, right), share.basis)


def _trains(linear: nn.Linear, num_values: int, config: TensorNetworkConfig) -> Iterator[TensorTrainLinear]:
    """Empty trains within the budget: even factorisations, as they are and sorted."""
    for out_factors, in_factors in candidate_factors(linear.out_features, linear.in_features, config.num_cores, _SPLITS):
        ranks = ranks_for(out_factors, in_factors, num_values, config.rank_multiple)
        for is_sorted in (False, True):
            yield TensorTrainLinear.empty_like(
                linear, out_factors=out_factors, in_factors=in_factors, ranks=ranks, is_sorted=is_sorted
            )


def _solve_train(
    train: TensorTrainLinear, weight: Tensor, right: Tensor | None, left: Tensor | None, num_sweeps: int = 0
) -> TensorTrainLinear:  # fmt: skip
    """Fill a train; sorting puts rows and columns of like energy beside each other."""
    if train.is_sorted:
        energy = weight.square() if right is None else weight.square() * right.square().sum(1)
        rows, columns = energy.sum(1).argsort(), energy.sum(0).argsort()
        train.load_orders_(rows, columns)
        weight = weight[rows][:, columns]
        right, left = None if right is None else right[columns], None if left is None else left[rows]
    return train.load_cores_(fit_train(weight, train.out_factors, train.in_factors, train.ranks, right, left, num_sweeps))


def _weighted_error(error: Tensor, right: Tensor | None, left: Tensor | None) -> float:
    error = error if right is None else error @ right
    error = error if left is None else left.T @ error
    return error.square().sum().item()
