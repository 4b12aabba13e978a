"""Short distillation of a compressed model from the dense one.

What falls is the divergence of the distributions over tokens or classes, or, for a model without a head, the share of
the last hidden states' energy that is lost.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .arch import prediction_of
from .capture import without_cache
from .config import DistillationConfig
from .fitting import fit_, relative_error
from .functional.divergence import kl_divergence


def distill_(
    model: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]], config: DistillationConfig,
    progress: Callable[[int, int], None] = lambda done, total: None, linears: Collection[nn.Linear | Conv1D] = (),
) -> list[float]:  # fmt: skip
    """Fit scales, codebooks, norms and biases of a compressed model to the dense one, in place.

    Args:
        model: compressed, in memory.
        teacher: dense, of the same class.
        batches: model inputs, each used once per epoch, in order.
        config: epochs and learning rate.
        progress: called with finished and all steps.
        linears: dense ones of the model whose rows and columns are scaled too.

    Returns:
        The loss of every step: nats per position, or a share.

    Raises:
        NumericalError: the loss is not finite.
    """
    total = config.epochs * len(batches)

    def loss_of(call: Callable[..., Any], step: int) -> Tensor:
        progress(step, total)
        batch = {name: value.to(model.device) for name, value in batches[step % len(batches)].items()}
        with torch.no_grad():
            output = teacher.eval()(**batch)
        loss, target = divergence if "logits" in output else relative_error, prediction_of(output)
        mask = batch.get("decoder_attention_mask" if "decoder_input_ids" in batch else "attention_mask")
        # Classes, words or features are on the last axis: what a mask can speak of are the others, of which a classifier of
        # whole sequences has one.
        kept = mask.bool() if mask is not None and mask.shape == target.shape[:-1] else slice(None)
        return loss(prediction_of(call(**batch))[kept], target[kept])

    with without_cache(model), without_cache(teacher):
        return list(fit_(model, loss_of, total, config.learning_rate, "distillation", linears))


def divergence(output: Tensor, target: Tensor) -> Tensor:
    """Mean over positions of `KL(target || output)` of logits `[..., vocabulary]`, in nats.

    >>> divergence(torch.zeros(1, 2), torch.zeros(1, 2)).item()
    0.0
    """
    return kl_divergence(target.float().log_softmax(-1), output.float().log_softmax(-1)).mean()
