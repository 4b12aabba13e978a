"""Entropy coding of integer matrices: asymmetric numeral systems with a table for every expected spread of the values.

Rows and columns of a quantized weight differ in spread, and that is nearly all there is to know about an entry. Each
row and column gets a level (a third of an octave), an entry's table is chosen by the sum of its two levels, and tables
that few entries use are merged. The coder is `constriction`; the stream around it is ours:

    magic, rows, columns, number of tables and of chunks, CRC-32 of all that and of what follows;
    levels (4 bits each), table of every level sum, the tables; then the chunks

A chunk is a run of rows, sorted by level, that is decoded without the others; it has its length and a CRC-32 in front. Tables are
probabilities on a logarithmic scale of an eighth of an octave, one byte each, expanded with integers only, so that a
stream means the same on every machine.
"""

import itertools
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import constriction
import numpy as np
import torch
from torch import Tensor

_MAGIC = b"hfc2"
_HEAD = struct.Struct("<4sIIHHI")
_CHUNK = struct.Struct("<II")
_LEVELS_PER_OCTAVE = 3
_MAX_LEVEL = 15
_TABLE_COUNT = 4096  # entries that a table of its own has to serve
_CHUNK_ENTRIES = 1 << 18
#: `2**(24 - i/8)`, rounded.
_EIGHTHS = (16777216, 15384774, 14107901, 12937003, 11863283, 10878678, 9975792, 9147842)


class _Plan(NamedTuple):
    """What both sides know before the entries."""

    row_levels: np.ndarray
    column_levels: np.ndarray
    table_of: np.ndarray
    """`[31]` level sum -> table."""
    tables: list[tuple[int, np.ndarray]]
    """`(smallest value, codes of the probabilities)`."""


def encode(codes: Tensor) -> Tensor:
    """Code a matrix of small integers.

    Args:
        codes: `[rows, columns]` int8.

    Returns:
        `[n]` uint8, the whole stream.

    Raises:
        ValueError: `codes` is not an int8 matrix.

    >>> torch.equal(decode(encode(torch.tensor([[1, 0], [0, -2]], dtype=torch.int8))), torch.tensor([[1, 0], [0, -2]]))
    True
    """
    if codes.dtype != torch.int8 or codes.dim() != 2 or not codes.numel():
        raise ValueError(f"codes must be an int8 matrix, got {codes.dtype} {list(codes.shape)}")
    values = codes.cpu().numpy()
    plan = _plan(values)
    models = [_model(table) for _, table in plan.tables]
    side = _side(plan)
    by_level = values[np.ix_(*_order(plan))]
    chunks = []
    for run in _chunks(*values.shape):
        coder = constriction.stream.stack.AnsCoder()
        for rows, columns, table in reversed(list(_blocks(plan, run))):
            symbols = by_level[rows, columns].astype(np.int32).ravel() - plan.tables[table][0]
            coder.encode_reverse(symbols, models[table])
        data = coder.get_compressed().astype("<u4").tobytes()
        chunks.append(_CHUNK.pack(len(data), zlib.crc32(data)) + data)
    head = _HEAD.pack(_MAGIC, *values.shape, len(plan.tables), len(chunks), 0)
    head = _HEAD.pack(_MAGIC, *values.shape, len(plan.tables), len(chunks), zlib.crc32(head + side))
    return torch.frombuffer(bytearray(b"".join([head, side, *chunks])), dtype=torch.uint8)


def decode(stream: Tensor) -> Tensor:
    """Inverse of `encode`.

    Args:
        stream: `[n]` uint8.

    Returns:
        `[rows, columns]` int8.

    Raises:
        ValueError: the stream is cut short or damaged; the message names the chunk.
    """
    data = stream.cpu().numpy().tobytes()
    if len(data) < _HEAD.size or data[:4] != _MAGIC:
        raise ValueError(f"entropy-coded weight of {len(data)} bytes does not begin as one")
    magic, num_rows, num_columns, num_tables, num_chunks, crc = _HEAD.unpack_from(data)
    if not num_rows or not num_columns:
        raise ValueError(f"entropy-coded weight has the shape {[num_rows, num_columns]} in its header")
    plan, start = _read_side(data, num_rows, num_columns, num_tables)
    head = _HEAD.pack(magic, num_rows, num_columns, num_tables, num_chunks, 0)
    if zlib.crc32(head + data[_HEAD.size : start]) != crc:
        raise ValueError("entropy-coded weight has a damaged header or damaged tables: their CRC-32 differs")
    models = [_model(table) for _, table in plan.tables]
    by_level = np.empty((num_rows, num_columns), np.int8)
    parts = _chunks(num_rows, num_columns)
    if len(parts) != num_chunks:
        raise ValueError(f"entropy-coded weight must have {len(parts)} chunks, its header says {num_chunks}")
    for number, run in enumerate(parts):
        words, start = _read_chunk(data, start, number)
        coder = constriction.stream.stack.AnsCoder(words)
        for rows, columns, table in _blocks(plan, run):
            block = by_level[rows, columns]
            block[:] = (coder.decode(models[table], block.size) + plan.tables[table][0]).reshape(block.shape)
    if start != len(data):
        raise ValueError(f"entropy-coded weight has {len(data) - start} bytes behind its last chunk")
    back_rows, back_columns = (order.argsort() for order in _order(plan))
    return torch.from_numpy(by_level.take(back_columns, axis=1)[back_rows])  # a fifth of torch's time for bytes


def coded_bits(codes: Tensor) -> tuple[float, float]:
    """Bits that `encode` needs, without coding: of the entries, and of levels, tables and headers."""
    values = codes.cpu().numpy()
    plan = _plan(values)
    side = 8.0 * (_HEAD.size + len(_side(plan)) + (_CHUNK.size + 8) * len(_chunks(*values.shape)))
    total = 0.0
    for table, counts in _counts(values, plan.row_levels, plan.column_levels, plan.table_of).items():
        low, codes_of = plan.tables[table]
        weights = _weights(codes_of).astype(np.float64)
        present = counts[low + 128 : low + 128 + len(weights)]
        total -= float((present * np.log2(weights / weights.sum())).sum())
    return total, side


def _plan(values: np.ndarray) -> _Plan:
    """Levels from the root mean squares, tables from the counts."""
    parts = [values[rows] for rows in _pieces(values)]
    column_rms = np.sqrt(sum(np.square(part.astype(np.float32)).sum(0) for part in parts) / len(values) + 1e-6)
    row_rms = np.concatenate([np.sqrt(np.square(part / column_rms).mean(1) + 1e-6) for part in parts])
    row_levels, column_levels = _levels(row_rms), _levels(column_rms)
    sums = np.bincount(row_levels, minlength=16)[:, None] * np.bincount(column_levels, minlength=16)[None]
    entries = np.array([np.trace(sums[::-1], offset=k - 15) for k in range(31)])
    table_of, table, served = np.zeros(31, np.uint8), 0, 0
    for k in range(31):
        if served >= _TABLE_COUNT and entries[k:].sum() >= _TABLE_COUNT:
            table, served = table + 1, 0
        table_of[k] = table
        served += int(entries[k])
    tables = []
    counts = _counts(values, row_levels, column_levels, table_of)
    for number in range(table + 1):
        count = counts[number]
        used = np.flatnonzero(count)
        low, high = int(used[0]), int(used[-1])
        share = np.maximum(count[low : high + 1], 0.3)
        codes = np.clip(np.rint(-8 * np.log2(share / share.max())), 0, 255).astype(np.uint8)
        tables.append((low - 128, codes))
    return _Plan(row_levels, column_levels, table_of, tables)


def _levels(rms: np.ndarray) -> np.ndarray:
    octaves = np.rint(_LEVELS_PER_OCTAVE * np.log2(rms)).astype(np.int64)
    # The largest matter most: what lies more than five octaves below them shares the lowest level.
    return np.clip(octaves - octaves.max() + _MAX_LEVEL, 0, _MAX_LEVEL).astype(np.uint8)


def _counts(values: np.ndarray, row_levels: np.ndarray, column_levels: np.ndarray, table_of: np.ndarray) -> dict[int, np.ndarray]:
    """Table -> `[256]` how often each value occurs, -128 first."""
    counts = np.zeros(256 * (int(table_of[-1]) + 1), np.int64)
    for rows in _pieces(values):
        tables = table_of[row_levels[rows, None].astype(np.int64) + column_levels]
        flat = tables.astype(np.int64) * 256 + values[rows] + 128
        counts += np.bincount(flat.ravel(), minlength=len(counts))
    return dict(enumerate(counts.reshape(-1, 256)))


def _pieces(values: np.ndarray) -> list[slice]:
    """Rows by about a million entries: what is computed of them takes ten times their bytes."""
    step = max(1, _CHUNK_ENTRIES * 4 // values.shape[1])
    return [slice(start, start + step) for start in range(0, len(values), step)]


def _weights(codes: np.ndarray) -> np.ndarray:
    """Probabilities as integers: exact on every machine."""
    mantissas = np.array(_EIGHTHS, np.int64)[codes % 8]
    return np.maximum(mantissas >> (codes // 8).astype(np.int64), 1)


def _model(codes: np.ndarray) -> "constriction.stream.model.Categorical":
    # A single value would be a certainty, which the coder refuses; a second one that never occurs costs nothing.
    weights = _weights(codes) if len(codes) > 1 else np.array([1 << 24, 1])
    return constriction.stream.model.Categorical(weights.astype(np.float32), perfect=False)


def _chunks(num_rows: int, num_columns: int) -> list[slice]:
    """Runs of sorted rows with as many entries as a chunk has, at most."""
    step = max(1, _CHUNK_ENTRIES // num_columns)
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def _order(plan: _Plan) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns sorted by level: entries that share a table then lie in rectangles."""
    return np.argsort(plan.row_levels, kind="stable"), np.argsort(plan.column_levels, kind="stable")


def _blocks(plan: _Plan, run: slice) -> Iterator[tuple[slice, slice, int]]:
    """`(rows, columns, table)` of every such rectangle in a run of sorted rows, in the order of the stream."""
    row_starts, column_starts = _starts(plan.row_levels), _starts(plan.column_levels)
    for row_level, (first, last) in enumerate(itertools.pairwise(row_starts)):
        rows = slice(max(first, run.start), min(last, run.stop))
        for column_level, (left, right) in enumerate(itertools.pairwise(column_starts)):
            if rows.start < rows.stop and left < right:
                yield rows, slice(left, right), int(plan.table_of[row_level + column_level])


def _starts(levels: np.ndarray) -> list[int]:
    return [0, *np.cumsum(np.bincount(levels, minlength=_MAX_LEVEL + 1)).tolist()]


def _nibbles(levels: np.ndarray) -> bytes:
    padded = np.append(levels, np.zeros(len(levels) % 2, np.uint8))
    return (padded[::2] | padded[1::2] << 4).tobytes()


def _side(plan: _Plan) -> bytes:
    parts = [_nibbles(plan.row_levels), _nibbles(plan.column_levels), plan.table_of.tobytes()]
    for low, codes in plan.tables:
        parts += [struct.pack("<bB", low, len(codes) - 1), codes.tobytes()]
    return b"".join(parts)


def _read_side(data: bytes, num_rows: int, num_columns: int, num_tables: int) -> tuple[_Plan, int]:
    position = _HEAD.size

    def take(size: int) -> np.ndarray:
        nonlocal position
        position += size
        if position > len(data):
            raise ValueError(f"entropy-coded weight ends inside its tables, after {len(data)} bytes")
        return np.frombuffer(data, np.uint8, size, position - size)

    levels = []
    for count in (num_rows, num_columns):
        packed = take((count + 1) // 2)
        levels.append(np.stack([packed & 15, packed >> 4], 1).ravel()[:count])
    table_of = take(31)
    tables = []
    for _ in range(num_tables):
        low, last = struct.unpack("<bB", take(2).tobytes())
        tables.append((low, take(last + 1)))
    return _Plan(levels[0], levels[1], table_of, tables), position


def _read_chunk(data: bytes, start: int, number: int) -> tuple[np.ndarray, int]:
    if start + _CHUNK.size > len(data):
        raise ValueError(f"entropy-coded weight ends before chunk {number}")
    size, crc = _CHUNK.unpack_from(data, start)
    start += _CHUNK.size
    content = data[start : start + size]
    if len(content) != size or size % 4:
        raise ValueError(f"entropy-coded weight ends inside chunk {number}")
    if zlib.crc32(content) != crc:
        raise ValueError(f"chunk {number} of an entropy-coded weight is damaged: its CRC-32 differs")
    return np.frombuffer(content, "<u4").astype(np.uint32), start + size
