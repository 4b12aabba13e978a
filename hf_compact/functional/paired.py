"""Means with their standard errors, alone and pair by pair: what is left of a difference when both saw the same examples."""

import math

import torch
from torch import Tensor


def mean_and_error(values: Tensor) -> tuple[float, float | None]:
    """The mean and its standard error.

    Args:
        values: `[n]`, any dtype; n at least 1.

    Returns:
        `(mean, standard error)`, in the unit of the values; the error of a single value is None.

    >>> mean_and_error(torch.tensor([1.0, 3.0]))
    (2.0, 1.0)
    """
    values = values.to(torch.float64)
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None
    return values.mean().item(), error


def paired_difference(values: Tensor, base: Tensor) -> tuple[float, float | None]:
    """The mean difference of values to those of the base for the same examples, and its standard error.

    Args:
        values: `[n]`.
        base: `[n]`, example by example.

    Returns:
        `(mean difference, standard error)`, in the unit of the values.

    Raises:
        ValueError: the numbers of examples differ.

    >>> paired_difference(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 1.0]))[0]
    -0.3333333333333333
    """
    if values.shape != base.shape:
        raise ValueError(f"values and base must be of the same examples, got {list(values.shape)} and {list(base.shape)}")
    return mean_and_error(values.to(torch.float64) - base.to(torch.float64))
