"""Text to seeded batches of token ids, with a hash that goes into every report."""

import hashlib
import importlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .config import CalibrationConfig, DistillationConfig
from .errors import CalibrationError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Calibration:
    """Model inputs, batch by batch, and where they came from."""

    batches: tuple[dict[str, Tensor], ...]
    """Keyword arguments of the model's forward pass; every tensor is `[batch, ...]`."""
    sources: tuple[str, ...]
    """Names of the texts."""
    distillation: tuple[dict[str, Tensor], ...] = ()
    """Other windows of the same texts, for the training after it."""
    held_out: Tensor | None = None
    """Token ids `[T]` of the text's end, in no batch: what the finished model is scored on."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names, shapes and values of all inputs."""
        digest = hashlib.sha256()
        for batch in (*self.batches, *self.distillation):
            for name in sorted(batch):
                tensor = batch[name].cpu().contiguous()
                digest.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
                digest.update(tensor.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> "Calibration":
        """The same set with its batches on a device; what is held out stays where it is."""

        def moved(batches: tuple[dict[str, Tensor], ...]) -> tuple[dict[str, Tensor], ...]:
            return tuple({name: value.to(device) for name, value in batch.items()} for batch in batches)

        return replace(self, batches=moved(self.batches), distillation=moved(self.distillation))

    @property
    def num_tokens(self) -> int:
        """Positions in all batches."""
        return sum(next(iter(batch.values())).shape[:2].numel() for batch in self.batches)


def read_texts(paths: Sequence[str | Path]) -> str:
    """The files as one string, in order.

    Raises:
        CalibrationError: a file is missing, is not UTF-8, or holds no text.
    """
    texts = []
    for path in paths:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CalibrationError(f"text {str(path)!r} cannot be read: {error}") from error
        if not text.strip():
            raise CalibrationError(f"text {str(path)!r} is empty: calibration and evaluation need UTF-8 text")
        texts.append(text)
    return "\n".join(texts)


def builtin_text(part: str) -> str:
    """The documentation of Python's own language topics, split into two disjoint parts.

    The topics are dealt out alternately by name, so both parts are the same kind of text. Topics repeat each other:
    every paragraph stays where it stands first, so that no part, and no end of a part, holds text of the rest.

    Args:
        part: `"calibration"` or `"evaluation"`.
    """
    topics = importlib.import_module("pydoc_data.topics").topics
    offset = {"calibration": 0, "evaluation": 1}[part]
    seen: set[str] = set()
    kept: list[str] = []
    for position, name in enumerate(sorted(topics)):
        for paragraph in topics[name].split("\n\n"):
            key = " ".join(paragraph.split())
            if key not in seen and position % 2 == offset:
                kept.append(paragraph)
            seen.add(key)
    return "\n\n".join(kept)


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Token ids `[T]` of a text as one string, without special tokens."""
    # The length warning of tokenizers is about inputs to a model; here windows are cut first.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def sample(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    config: CalibrationConfig,
    seed: int,
    sources: Sequence[str],
    distillation: DistillationConfig | None = None,
) -> Calibration:
    """Draw `num_sequences` windows at random positions of the text; its last tenth (at most 2048 tokens) is held out.

    Raises:
        CalibrationError: the text has fewer tokens than one sequence and the held-out part.
    """
    ids = torch.cat([tokenize(tokenizer, piece) for piece in _pieces(text)])
    length = config.sequence_length
    held_out = min(2048, len(ids) // 10)
    if len(ids) - held_out <= length or held_out < 2:
        raise CalibrationError(
            f"calibration text has {len(ids)} tokens, too few for calibration.sequence_length {length} "
            "and a tenth held out: give more text or a shorter sequence_length"
        )
    ids, rest = ids[:-held_out], ids[-held_out:]
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int, batch_size: int) -> tuple[dict[str, Tensor], ...]:
        starts = torch.randint(len(ids) - length, (count,), generator=generator)
        windows = torch.stack([ids[start : start + length] for start in starts])
        return tuple({"input_ids": rows} for rows in windows.split(batch_size))

    batches = draw(config.num_sequences, config.batch_size)
    more = () if distillation is None else draw(distillation.num_sequences, distillation.batch_size)
    return Calibration(batches, tuple(sources), more, rest)


def _pieces(text: str, size: int = 1 << 16) -> Iterator[str]:
    """The text cut at line ends: tokenizers take a hundred times the bytes of what they are given at once."""
    start = 0
    while start < len(text):
        stop = text.find("\n", start + size) + 1 or len(text)
        yield text[start:stop]
        start = stop


def windows(ids: Tensor, length: int, count: int | None) -> Iterator[Tensor]:
    """Consecutive windows `[1, length]` without overlap; a rest shorter than `length` is left out."""
    whole = ids[: len(ids) // length * length].view(-1, length)
    for row in whole if count is None else whole[:count]:
        yield row[None]


def from_batches(batches: Sequence[dict[str, Any]], source: str = "batches") -> Calibration:
    """A calibration set of ready model inputs, for models that do not read text.

    Raises:
        CalibrationError: there is no batch.
    """
    if not batches:
        raise CalibrationError("calibration batches must hold at least one batch, got none")
    return Calibration(tuple(dict(batch) for batch in batches), (source,))
