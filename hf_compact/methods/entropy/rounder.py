"""One matrix at any step of the grid: the factorisation is made once, every step tried costs one pass over the columns."""

import torch
from torch import Tensor

from ...errors import NumericalError
from ...functional.gram import inverse_factor
from .functional import Integers, bits_per_weight, refit_rows, round_with_feedback

_SEARCH_ROWS = 128


class Rounder:
    """One matrix at any step; the factorisation is shared by all tries."""

    def __init__(self, weight: Tensor, gram: Tensor | None, damp: float, row_steps: Tensor | None = None) -> None:
        """Factorise.

        Args:
            weight: `[out, in]` float32.
            gram: `[in, in]` or None.
            damp: see `inverse_factor`.
            row_steps: `[out]` steps of the rows relative to each other; None makes them equal.

        Raises:
            NumericalError: the gram matrix cannot be factorised.
        """
        self.weight = weight
        size = weight.shape[1]
        self.order = torch.arange(size) if gram is None else gram.diagonal().argsort(descending=True)
        try:
            self.factor = torch.eye(size) if gram is None else inverse_factor(gram, damp, self.order)
        except ValueError as error:
            raise NumericalError(str(error)) from error
        diagonal = self.factor.diagonal()
        self.middle = diagonal.log().mean().exp().item()
        self.steps = (diagonal / self.middle)[self.order.argsort()]
        self.row_steps = torch.ones(len(weight)) if row_steps is None else row_steps
        self.some_rows = slice(None, None, max(1, len(weight) // _SEARCH_ROWS))

    def guess(self, bits: float) -> float:
        """A step with about that many bits: a normal value of `2**(bits - 2)` steps carries so much."""
        return (self.weight / self.row_steps[:, None]).square().mean().sqrt().item() / self.middle * 2 ** (2 - bits)

    def codes(self, step: float, rows: slice) -> tuple[Tensor, Tensor]:
        """`(codes, column_scale)` of some rows at a step in units of `U_jj`."""
        unit = self.weight[rows] / (step * self.middle * self.row_steps[rows, None])
        return round_with_feedback(unit, self.steps, self.factor, self.order)

    def bits(self, step: float, rows: slice) -> float:
        """Bits per weight of some rows, as they would be stored."""
        codes, _ = self.codes(step, rows)
        return bits_per_weight(codes, len(self.weight))

    def integers(self, step: float, gram: Tensor | None) -> Integers:
        """The whole matrix, with the best row scales."""
        codes, column_scale = self.codes(step, slice(None))
        fallback = step * self.middle * self.row_steps
        return Integers(codes, refit_rows(self.weight, codes, column_scale, gram, fallback), column_scale)
