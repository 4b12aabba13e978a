"""A Linear of another shape than the config says."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


class PrunedLinear(nn.Linear):
    """A Linear with fewer rows or columns than the config says; only folders with other widths per layer hold it."""

    @classmethod
    def empty_like(
        cls, linear: nn.Linear, *, shape: Sequence[int], is_transposed: bool = False, owner: Mapping[str, int] | None = None
    ) -> nn.Module:  # fmt: skip
        """The empty module of a table entry; with `is_transposed` a Conv1D, which is what its family stores.

        Args:
            linear: the one in the skeleton.
            shape: `[out, in]`.
            is_transposed: whether the weight is stored `[in, out]`.
            owner: attributes of the attention module around it, see `owner_attributes`.
        """
        rows, columns = shape
        with torch.device(linear.weight.device):
            new = Conv1D(rows, columns) if is_transposed else cls(columns, rows, bias=linear.bias is not None)
        new = new.to(linear.weight.dtype)
        new.owner_attributes = dict(owner or {})
        return new
