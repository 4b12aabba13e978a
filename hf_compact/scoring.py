"""Perplexity by one stated protocol, alone or beside a base model on the same windows.

The text is one string, tokenised without special tokens and cut into windows of `window_length` tokens that begin
`stride` tokens apart; by default they do not overlap. Where they do, a token is scored in the first window that predicts
it, so later ones have at least `window_length - stride` tokens before them. With BOS that token stands before every window,
within its length, and the first token of the text has a prediction too; without it, the first token of a window has none,
unless an earlier window has predicted it. A rest of the text that is shorter than a window is left out.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .errors import CalibrationError, ConfigError, UnsupportedModel
from .functional.divergence import kl_divergence
from .functional.paired import mean_and_error, paired_difference
from .products import fast_products

_ROWS = 256  # positions whose logits are in float32 at a time


@dataclass(frozen=True)
class Span:
    """One window over the text: `ids[begin:end]` are its tokens, `ids[first:end]` those that it scores."""

    begin: int
    first: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Windows:
    """How a text is cut.

    >>> [(span.begin, span.first, span.end) for span in Windows(window_length=4, stride=2).spans(9)]
    [(0, 1, 4), (2, 4, 6), (4, 6, 8)]
    """

    window_length: int = 1024
    """Tokens per window, BOS among them."""
    num_windows: int | None = 40
    """Windows from the start of the text; None for all."""
    stride: int | None = None
    """Tokens between the beginnings of windows; None puts them side by side."""
    bos: bool = False
    """Whether the tokenizer's BOS token stands before every window."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.window_length < 2:
            raise ConfigError(f"window_length must be at least 2, got {self.window_length}")
        if self.num_windows is not None and self.num_windows < 1:
            raise ConfigError(f"num_windows must be at least 1 or None for all, got {self.num_windows}")
        if self.stride is not None and not 1 <= self.stride <= self.num_text_tokens:
            raise ConfigError(f"stride must be in [1, {self.num_text_tokens}], got {self.stride}")

    @property
    def num_text_tokens(self) -> int:
        """Tokens of the text in a window."""
        return self.window_length - self.bos

    def spans(self, num_ids: int) -> list[Span]:
        """Windows over a text of so many tokens.

        Raises:
            CalibrationError: the text is shorter than one window.
        """
        length = self.num_text_tokens
        begins = range(0, num_ids - length + 1, self.stride or length)
        if not begins:
            raise CalibrationError(f"text has {num_ids} tokens, fewer than one window of {length}")
        spans: list[Span] = []
        for begin in begins if self.num_windows is None else begins[: self.num_windows]:
            done = spans[-1].end if spans else 0
            spans.append(Span(begin, max(done, begin + (not self.bos)), begin + length))
        return spans


def is_causal_lm(model: PreTrainedModel) -> bool:
    """Whether perplexity means something for the model."""
    return model.get_output_embeddings() is not None and not model.config.is_encoder_decoder and model.can_generate()


def max_positions(model: PreTrainedModel) -> int | None:
    """Tokens that the model has positions for, None if its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def perplexity(
    model: PreTrainedModel, ids: Tensor, window_length: int = 1024, num_windows: int | None = 40,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:  # fmt: skip
    """Score a causal language model on token ids, in windows side by side without BOS.

    Args:
        model: in evaluation mode.
        ids: `[T]` token ids.
        window_length: tokens per window, at least 2.
        num_windows: windows from the start of the text, None for all.
        progress: called with the number of finished windows.

    Returns:
        As `score`.

    Raises:
        ConfigError: `window_length` or `num_windows` leaves nothing to predict.
        CalibrationError: the text is shorter than one window.
    """
    return score(model, ids, Windows(window_length=window_length, num_windows=num_windows), progress=progress)


@torch.no_grad()
def score(
    model: PreTrainedModel, ids: Tensor, windows: Windows, bos_token_id: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:  # fmt: skip
    """Score a causal language model on token ids.

    Args:
        model: in evaluation mode.
        ids: `[T]` token ids.
        windows: how the text is cut.
        bos_token_id: what stands before every window if `windows.bos`.
        progress: called with the number of finished windows.

    Returns:
        `perplexity`, `mean_nll` (nats per token), `stderr` of it over the windows (None for one), `num_tokens` predicted,
        `num_windows`, `window_length`, `stride`, `bos`, `window_nll` (mean of every window).

    Raises:
        ConfigError: the windows are longer than the positions of the model, or the BOS token is missing.
        CalibrationError: the text is shorter than one window.
    """
    chunks = _chunks(model, ids, windows, bos_token_id)
    sums = []
    for done, (inputs, targets) in enumerate(chunks, start=1):
        logits = _logits(model, inputs, targets)
        sums.append(sum(nll.sum().item() for nll in map(_nll, logits.split(_ROWS), targets.to(logits.device).split(_ROWS))))
        progress(done)
    return _summary(sums, [len(targets) for _, targets in chunks], windows)


@torch.no_grad()
def score_beside(
    model: PreTrainedModel, base: PreTrainedModel, ids: Tensor, windows: Windows, bos_token_id: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Score two models with one vocabulary on the same windows, and compare what they say of every token.

    Args:
        model: in evaluation mode.
        base: in evaluation mode; what the divergence is taken from.
        ids: `[T]` token ids.
        windows: how the text is cut.
        bos_token_id: what stands before every window if `windows.bos`.
        progress: called with the number of finished windows.

    Returns:
        The score of the model, and its comparison: `kl` (`KL(base || model)`, nats per token) and `kl_stderr`,
        `top1_agreement` (share of positions with the same likeliest token), and as `compare_windows`.

    Raises:
        UnsupportedModel: the vocabularies differ in size.
        ConfigError: as `score`.
        CalibrationError: as `score`.
    """
    chunks = _chunks(model, ids, windows, bos_token_id)
    _chunks(base, ids, windows, bos_token_id)
    sums, base_sums, divergences, agreed = [], [], [], 0
    for done, (inputs, targets) in enumerate(chunks, start=1):
        logits, base_logits = _logits(model, inputs, targets), _logits(base, inputs, targets)
        if logits.shape != base_logits.shape:
            sizes = logits.shape[-1], base_logits.shape[-1]
            raise UnsupportedModel(
                f"models must have one vocabulary to be compared token by token, got {sizes[0]} and {sizes[1]}"
            )
        totals = torch.zeros(3, dtype=torch.float64)
        for rows, others, row in zip(*(x.split(_ROWS) for x in (logits, base_logits, targets.to(logits.device))), strict=True):
            others = others.to(rows.device)
            log_q, log_p = rows.float().log_softmax(-1), others.float().log_softmax(-1)
            taken = row[:, None]
            totals -= torch.stack(
                [log_q.gather(1, taken).sum(), log_p.gather(1, taken).sum(), -kl_divergence(log_p, log_q).sum()]
            ).cpu()
            agreed += int((rows.argmax(-1) == others.argmax(-1)).sum())
        sums.append(totals[0].item())
        base_sums.append(totals[1].item())
        divergences.append(totals[2].item() / len(targets))
        progress(done)
    counts = [len(targets) for _, targets in chunks]
    found, reference = _summary(sums, counts, windows), _summary(base_sums, counts, windows)
    kl, kl_stderr = mean_and_error(torch.tensor(divergences, dtype=torch.float64))
    return found, {
        **compare_windows(found, reference),
        "kl": kl,
        "kl_stderr": kl_stderr,
        "top1_agreement": agreed / sum(counts),
    }


def compare_windows(found: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Two scores of the same windows.

    Returns:
        `ratio` of the perplexities, `nll_difference` (nats per token) and its standard error over the windows, pair by pair.
    """
    values, others = (
        torch.tensor([math.nan if value is None else value for value in entry["window_nll"]], dtype=torch.float64)
        for entry in (found, base)
    )
    difference, stderr = paired_difference(values, others)
    gap = math.nan if None in (found["mean_nll"], base["mean_nll"]) else found["mean_nll"] - base["mean_nll"]
    ratio = math.exp(gap) if gap < 700 else math.inf
    return {"ratio": ratio, "nll_difference": difference, "nll_difference_stderr": stderr}


def per_word(found: dict[str, Any], tokenizer: PreTrainedTokenizerBase, ids: Tensor, windows: Windows) -> dict[str, float]:
    """The same score per word and per byte, which models with different tokenizers share.

    Words are what white space separates. Where the first tokens of windows have no prediction, words and bytes count by the
    share of the tokens that have one.

    Returns:
        `word_perplexity` and `bits_per_byte`.
    """
    spans = windows.spans(len(ids))
    covered = str(tokenizer.decode(ids[: spans[-1].end], clean_up_tokenization_spaces=False))
    share = found["num_tokens"] / spans[-1].end
    nll = found["mean_nll"] * found["num_tokens"] / share
    words, num_bytes = max(1, len(covered.split())), max(1, len(covered.encode()))
    return {
        "word_perplexity": math.exp(nll / words) if nll / words < 700 else math.inf,
        "bits_per_byte": nll / math.log(2) / num_bytes,
    }


def _chunks(model: PreTrainedModel, ids: Tensor, windows: Windows, bos_token_id: int | None) -> list[tuple[Tensor, Tensor]]:
    """`(inputs [1, window], targets [n])` of every window: the last n positions of the inputs but one predict them."""
    positions = max_positions(model)
    if positions is not None and windows.window_length > positions:
        raise ConfigError(f"window_length must be at most {positions}, the positions of the model, got {windows.window_length}")
    if windows.bos and bos_token_id is None:
        raise ConfigError("bos needs a tokenizer with a BOS token, and this one has none")
    prefix = torch.tensor([bos_token_id] if windows.bos else [], dtype=ids.dtype)
    spans = windows.spans(len(ids))
    return [(torch.cat([prefix, ids[span.begin : span.end]])[None], ids[span.first : span.end]) for span in spans]


@fast_products()
def _logits(model: PreTrainedModel, inputs: Tensor, targets: Tensor) -> Tensor:
    """Logits `[n, vocabulary]` of the positions that predict the targets, the last n of the window."""
    logits = model(input_ids=inputs.to(model.device), use_cache=False).logits[0]
    return logits[len(logits) - 1 - len(targets) : -1]


def _nll(rows: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(rows.float(), targets, reduction="none")


def _summary(sums: Sequence[float], counts: Sequence[int], windows: Windows) -> dict[str, Any]:
    mean = sum(sums) / sum(counts)
    by_window = [total / count for total, count in zip(sums, counts, strict=True)]
    return {
        "perplexity": math.exp(mean) if mean < 700 else math.inf,
        "mean_nll": mean,
        "stderr": mean_and_error(torch.tensor(by_window, dtype=torch.float64))[1],
        "num_tokens": sum(counts),
        "num_windows": len(counts),
        "window_length": windows.window_length,
        "stride": windows.stride or windows.num_text_tokens,
        "bos": windows.bos,
        "window_nll": by_window,
    }
