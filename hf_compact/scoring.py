"""Perplexity, by one stated protocol.

The text is one string, tokenised without special tokens, cut into consecutive windows without overlap; the perplexity
is `exp` of the mean negative log-likelihood of all predictions inside the windows (the first token of a window has none).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .calibration import windows
from .errors import CalibrationError, ConfigError

_ROWS = 256  # positions whose logits are in float32 at a time


def max_positions(model: PreTrainedModel) -> int | None:
    """Tokens that the model has positions for, None if its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, ids: Tensor, window_length: int = 1024, num_windows: int | None = 40,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:  # fmt: skip
    """Score a causal language model on token ids.

    Args:
        model: in evaluation mode.
        ids: `[T]` token ids.
        window_length: tokens per window, at least 2.
        num_windows: windows from the start of the text, None for all.
        progress: called with the number of finished windows.

    Returns:
        `perplexity`, `mean_nll` (nats per token), `num_tokens` predicted, `num_windows`, `window_length`.

    Raises:
        ConfigError: `window_length` or `num_windows` leaves nothing to predict.
        CalibrationError: the text is shorter than one window.
    """
    if window_length < 2:
        raise ConfigError(f"window_length must be at least 2, got {window_length}")
    positions = max_positions(model)
    if positions is not None and window_length > positions:
        raise ConfigError(f"window_length must be at most {positions}, the positions of the model, got {window_length}")
    if num_windows is not None and num_windows < 1:
        raise ConfigError(f"num_windows must be at least 1 or None for all, got {num_windows}")
    chunks = list(windows(ids, window_length, num_windows))
    if not chunks:
        raise CalibrationError(f"text has {len(ids)} tokens, fewer than one window of {window_length}")
    total, count = 0.0, 0
    for done, window in enumerate(chunks, start=1):
        window = window.to(model.device)
        logits = model(input_ids=window, use_cache=False).logits[0, :-1]
        for rows, targets in zip(logits.split(_ROWS), window[0, 1:].split(_ROWS), strict=True):
            total += nn.functional.cross_entropy(rows.float(), targets, reduction="sum").item()
        count += window.shape[1] - 1
        progress(done)
    mean = total / count
    return {
        "perplexity": math.exp(mean) if mean < 700 else math.inf,
        "mean_nll": mean,
        "num_tokens": count,
        "num_windows": len(chunks),
        "window_length": window_length,
    }
