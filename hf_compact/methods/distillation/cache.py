"""Teacher outputs on disk: a teacher runs once, for every student and every epoch.

A cache is a folder of safetensors shards and `cache.json`. A shard holds whole sequences: `ids [N, K]` (uint16, or uint32
for large vocabularies), `log_probs [N, K]` float16, `tail [N]` float32, and of each of its sequences a 16-byte digest of the
token ids and where it starts. Sequences are found by their tokens, so neither order nor padding matters. An interrupted
run goes on after its last shard.
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...capture import without_cache
from ...checkpoint import check_same_run, disk_errors, write_shard, write_text
from ...errors import ConfigError, FormatError, NumericalError
from .functional import top_log_probs, with_tail

INDEX = "cache.json"
FORMAT_VERSION = 1


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the vocabulary, by id."""
    return _digest(json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])).encode())


def hash_model(model: PreTrainedModel) -> str:
    """SHA-256 of the class and of every tensor of the state, by name."""
    found = hashlib.sha256(type(model).__name__.encode())
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def hash_rows(rows: Iterable[Sequence[int] | Tensor]) -> str:
    """SHA-256 of all sequences in their order: how the text was tokenized and packed."""
    return _digest(b"".join(_digest_row(torch.as_tensor(row)) for row in rows))


def has_two_inputs(model: PreTrainedModel) -> bool:
    """Whether encoder and decoder have inputs of their own."""
    return "decoder_input_ids" in inspect.signature(type(model).forward).parameters


def check_rows_say_all(model: PreTrainedModel) -> None:
    """Raise ConfigError for an encoder-decoder: its outputs depend on more than the token ids that a cache is searched by."""
    if has_two_inputs(model):
        raise ConfigError(
            f"a cache finds sequences by their input_ids, {type(model).__name__} is an encoder-decoder: use the teacher itself"
        )


def logits_of(model: PreTrainedModel, output: Any) -> Tensor:
    """The logits of a model's output.

    Raises:
        ConfigError: it has none.
    """
    logits = getattr(output, "logits", None)
    if logits is None:
        raise ConfigError(f"distillation compares logits, the outputs of {type(model).__name__} have none")
    return logits


class TeacherCache:
    """Reads a cache; what is expected of it is checked first.

    Args:
        folder: as `write_cache` has left it.
        tokenizer: the student's; None leaves the check out.
        teacher: likewise.
        rows: the sequences; None leaves the check of their packing out.

    Raises:
        FormatError: the folder is no complete cache, or belongs to another tokenizer, teacher or packing.
    """

    def __init__(
        self, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None, teacher: PreTrainedModel | None = None,
        rows: Sequence[Any] | None = None,
    ) -> None:  # fmt: skip
        """Read the index and the digests, not the outputs."""
        self.folder = Path(folder)
        try:
            self.index = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FormatError(f"{folder} is not a complete cache of teacher outputs: {error}") from error
        if self.index.get("format_version") != FORMAT_VERSION:
            raise FormatError(f"{folder}: format_version must be {FORMAT_VERSION}, got {self.index.get('format_version')!r}")
        given = {
            "tokenizer": tokenizer and hash_tokenizer(tokenizer), "model": teacher and hash_model(teacher),
            "packing": hash_rows(rows) if rows is not None else None,
        }  # fmt: skip
        for name, value in given.items():
            if value is not None and value != self.index[name]:
                raise FormatError(f"{folder} was made with another {name}: write a cache of its own for this one")
        self.places: dict[bytes, tuple[int, int, int]] = {}
        self.shards = []
        for number in range(self.index["num_shards"]):
            try:
                shard = safe_open(_shard(self.folder, number), framework="pt")
            except (OSError, SafetensorError) as error:
                raise FormatError(f"{folder} lacks shard {number}: {error}") from error
            self.shards.append(shard)
            starts = shard.get_tensor("starts").tolist()
            for digest, start, end in zip(shard.get_tensor("digests").numpy(), starts[:-1], starts[1:], strict=True):
                self.places[digest.tobytes()] = (number, start, end)

    @property
    def temperature(self) -> float:
        """Of the stored distributions."""
        return self.index["temperature"]

    def read(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """The stored outputs of one sequence.

        Args:
            row: `[T]` token ids, without padding.

        Returns:
            `(ids [T, K] int64, log_probs [T, K + 1] float32)`; the last column is all other outcomes.

        Raises:
            FormatError: the cache does not hold the sequence.
        """
        place = self.places.get(_digest_row(row))
        if place is None:
            raise FormatError(
                f"{self.folder} has no outputs for a sequence of {len(row)} tokens that starts with {row[:8].tolist()}: "
                "the text was tokenized or packed in another way"
            )
        number, start, end = place
        ids, log_probs, tail = (self.shards[number].get_slice(name)[start:end] for name in ("ids", "log_probs", "tail"))
        return ids.to(torch.int64), with_tail(log_probs.float(), tail)


@torch.no_grad()
def write_cache(
    teacher: PreTrainedModel, rows: Sequence[Sequence[int] | Tensor], folder: str | Path, tokenizer: PreTrainedTokenizerBase, *,
    count: int = 64, temperature: float = 1.0, tokens_per_shard: int = 1_000_000,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TeacherCache:  # fmt: skip
    """Run the teacher over all sequences and keep what it puts out; a folder that is complete is only checked.

    Args:
        teacher: a causal language model.
        rows: token ids, sequence by sequence, as the student will see them.
        folder: to create, or to go on with.
        tokenizer: of both models.
        count: log-probabilities per position.
        temperature: of the stored distributions.
        tokens_per_shard: a shard is closed once it has so many.
        progress: called with finished and all sequences.

    Raises:
        ConfigError: a setting is out of range, there are no rows, or the teacher is no model of one input with logits.
        NumericalError: the teacher puts out something that is not finite.
        OutputError: the folder was made with other settings, or cannot be written.
    """
    folder = Path(folder)
    check_rows_say_all(teacher)
    vocabulary = teacher.config.get_text_config().vocab_size
    if not len(rows):
        raise ConfigError("rows must hold at least one sequence, got none")
    if not 1 <= count <= vocabulary:
        raise ConfigError(f"count must be in [1, {vocabulary}], got {count}")
    if not temperature > 0 or tokens_per_shard < 1:
        raise ConfigError(f"temperature and tokens_per_shard must be above 0, got {temperature} and {tokens_per_shard}")
    fingerprint = {
        "format_version": FORMAT_VERSION, "tokenizer": hash_tokenizer(tokenizer), "model": hash_model(teacher),
        "packing": hash_rows(rows), "count": count, "temperature": temperature, "tokens_per_shard": tokens_per_shard,
        "num_sequences": len(rows),
    }  # fmt: skip
    started = folder / "started.json"
    with disk_errors(folder):
        for path in (folder / INDEX, started):
            if path.exists():
                earlier = json.loads(path.read_text(encoding="utf-8"))
                check_same_run(folder, {k: earlier.get(k) for k in fingerprint}, fingerprint, "give another folder")
        if (folder / INDEX).exists():
            return TeacherCache(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(started, json.dumps(fingerprint))
        kind = torch.uint16 if vocabulary <= 2**16 else torch.uint32
        number = 0
        with without_cache(teacher):
            for shard in _shards(rows, tokens_per_shard):
                if not _shard(folder, number).exists():
                    write_shard(_shard(folder, number), _outputs(teacher.eval(), [rows[i] for i in shard], fingerprint, kind))
                number += 1
                progress(shard[-1] + 1, len(rows))
        write_text(folder / INDEX, json.dumps(fingerprint | {"num_shards": number}, indent=2) + "\n")
        started.unlink()
    return TeacherCache(folder)


def _outputs(teacher: PreTrainedModel, rows: Sequence[Any], settings: Mapping[str, Any], kind: torch.dtype) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {"ids": [], "log_probs": [], "tail": []}
    for row in rows:
        logits = logits_of(teacher, teacher(input_ids=torch.as_tensor(row, device=teacher.device)[None]))[0]
        ids, log_probs, tail = top_log_probs(logits, settings["count"], settings["temperature"])
        if log_probs.isnan().any():
            raise NumericalError(f"the teacher's outputs of a sequence of {len(row)} tokens are not finite: try another dtype")
        for name, tensor in (("ids", ids), ("log_probs", log_probs.half()), ("tail", tail)):
            found[name].append(tensor.cpu())
    lengths = torch.tensor([0, *(len(row) for row in rows)])
    digests = [torch.frombuffer(bytearray(_digest_row(torch.as_tensor(row))), dtype=torch.uint8) for row in rows]
    tensors = {name: torch.cat(parts) for name, parts in found.items()}
    return tensors | {
        "ids": tensors["ids"].to(kind), "starts": lengths.cumsum(0), "digests": torch.stack(digests)
    }  # fmt: skip


def _shards(rows: Sequence[Any], tokens_per_shard: int) -> Iterable[list[int]]:
    """Positions of the rows of each shard."""
    shard: list[int] = []
    size = 0
    for position, row in enumerate(rows):
        shard.append(position)
        size += len(row)
        if size >= tokens_per_shard or position == len(rows) - 1:
            yield shard
            shard, size = [], 0


def _shard(folder: Path, number: int) -> Path:
    return folder / f"teacher-{number:05d}.safetensors"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _digest_row(row: Tensor) -> bytes:
    return hashlib.blake2b(row.detach().cpu().to(torch.int64).contiguous().numpy().tobytes(), digest_size=16).digest()
