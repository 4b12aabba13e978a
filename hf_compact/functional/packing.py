"""Dense packing of small unsigned integers into bytes, row by row, for every width from 1 to 8 bits.

A row is one little-endian bit stream padded to a whole byte, so that any row can be read without the others
(an embedding lookup needs that). Eight values of `bits` bits fill `bits` bytes exactly.

Reading goes through tables in the place of shifts and masks of every value: on CPUs the passes over a matrix are what a
packed layer's time goes to.
"""

import math

import torch
from torch import Tensor

#: Bytes that one look-up yields: the largest integer.
_MAX_ENTRY_BYTES = 8
#: Bits of the index of a table, and of all tables together: larger ones leave the cache.
_MAX_INDEX_BITS, _MAX_TABLE_BITS = 14, 16
#: Indices that are held at once; each takes eight bytes.
PART = 2**20
#: Size in bytes -> the integers of that size, as which several values are looked up at once.
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def packed_row_bytes(num_values: int, bits: int) -> int:
    """Bytes of one packed row of `num_values` values of `bits` bits.

    >>> packed_row_bytes(7, 3)
    3
    """
    return (num_values * bits + 7) // 8


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack the last axis of `codes` densely.

    Args:
        codes: `[..., n]` uint8, every value below `2**bits`. Not written to.
        bits: width of a value, `1 <= bits <= 8`.

    Returns:
        `[..., ceil(n * bits / 8)]` uint8.

    Raises:
        ValueError: `bits` out of range, `codes` not uint8, or a value that does not fit.

    >>> pack_bits(torch.tensor([1, 2, 3], dtype=torch.uint8), bits=4).tolist()
    [33, 3]
    """
    _check(codes, bits)
    if codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"codes must be below 2**bits = {2**bits}, got {int(codes.max())}")
    num_values = codes.shape[-1]
    eights = torch.nn.functional.pad(codes, (0, -num_values % 8)).unflatten(-1, (-1, 8))
    packed = torch.zeros(*eights.shape[:-1], bits, dtype=torch.uint8, device=codes.device)
    for slot in range(8):
        byte, shift = divmod(slot * bits, 8)
        packed[..., byte] |= eights[..., slot] << shift
        if shift + bits > 8:
            packed[..., byte + 1] |= eights[..., slot] >> (8 - shift)
    return packed.flatten(-2)[..., : packed_row_bytes(num_values, bits)].contiguous()


def unpack_bits(packed: Tensor, bits: int, num_values: int) -> Tensor:
    """Inverse of `pack_bits`.

    Args:
        packed: `[..., ceil(num_values * bits / 8)]` uint8. Not written to.
        bits: width of a value, `1 <= bits <= 8`.
        num_values: length of the unpacked last axis.

    Returns:
        `[..., num_values]` uint8.

    Raises:
        ValueError: `bits` out of range, `packed` not uint8, or a last axis that does not hold `num_values` values.

    >>> unpack_bits(torch.tensor([33, 3], dtype=torch.uint8), bits=4, num_values=3).tolist()
    [1, 2, 3]
    """
    _check(packed, bits)
    if bits == 8:
        _check_row_bytes(packed, bits, num_values)
        return packed
    return look_up_bits(packed, bits, num_values, torch.arange(2**bits, dtype=torch.uint8, device=packed.device)[None])


def look_up_bits(packed: Tensor, bits: int, num_values: int, levels: Tensor, tables: Tensor | None = None) -> Tensor:
    """Levels that packed codes stand for, without the codes in between.

    Several neighbouring codes are one index into a table of all their combinations: a look-up costs the same whatever it yields.

    Args:
        packed: `[..., ceil(num_values * bits / 8)]` uint8. Not written to.
        bits: width of a code, `1 <= bits <= 8`.
        num_values: length of the unpacked last axis.
        levels: `[T, K]`, `K <= 2**bits`, uint8 or of 2, 4 or 8 bytes. Gradients reach them, one code at a time and with an index
            of eight bytes for each. A code of `K` or more stands for nothing defined.
        tables: `[...]` integers, the row of `levels` for each row of `packed`; the first one if None.

    Returns:
        `[..., num_values]` in the dtype of `levels`.

    Raises:
        ValueError: `bits` out of range, `packed` not uint8, a last axis that does not hold `num_values` values, or too many levels.

    >>> look_up_bits(torch.tensor([33, 3], dtype=torch.uint8), 4, 3, torch.tensor([[0.0, 0.5, 1.0, 1.5]])).tolist()
    [0.5, 1.0, 1.5]
    """
    _check(packed, bits)
    _check_row_bytes(packed, bits, num_values)
    if levels.shape[1] > 2**bits:
        raise ValueError(f"levels must have at most 2**bits = {2**bits} columns, got {levels.shape[1]}")
    levels = levels if tables is not None else levels[:1]
    is_learned = levels.requires_grad and torch.is_grad_enabled()
    num_codes = packed.numel() * 8 // bits
    at_once = 1 if is_learned else _codes_at_once(bits, levels.element_size(), len(levels), num_codes)
    rows = packed.flatten(0, -2) if packed.dim() > 1 else packed[None]
    table = _combinations(levels, bits, at_once)
    first = None if tables is None or len(levels) == 1 else tables.reshape(-1, 1).long() << (bits * at_once)
    if is_learned:
        values = look_up(table, _indices(rows, bits, first))
    else:
        columns = -(-num_values // at_once)
        values = table.new_empty(len(rows), columns)
        step = max(1, PART // max(1, columns))
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            index = _indices(rows[part], bits * at_once, None if first is None else first[part])[:, :columns]
            torch.gather(table.expand(len(index), -1), 1, index, out=values[part])
        values = values.view(levels.dtype)
    return values[:, :num_values].unflatten(0, packed.shape[:-1]) if packed.dim() > 1 else values[0, :num_values]


def unpack_numbers(packed: Tensor, bits: int, num_values: int, lowest: float, dtype: torch.dtype) -> Tensor:
    """Codes that stand for consecutive numbers, from the lowest on.

    Args:
        packed: as for `unpack_bits`. Not written to.
        bits: width of a code.
        num_values: length of the unpacked last axis.
        lowest: what code 0 stands for.
        dtype: one that holds all of the numbers.

    Returns:
        `unpack_bits(packed, bits, num_values) + lowest`, `[..., num_values]` in `dtype`.

    Raises:
        ValueError: see `unpack_bits`.

    >>> unpack_numbers(torch.tensor([33, 3], dtype=torch.uint8), 4, 3, -2, torch.float32).tolist()
    [-1.0, 0.0, 1.0]
    """
    if bits == 8:
        return unpack_bits(packed, bits, num_values).to(dtype, copy=True).add_(lowest)
    numbers = torch.arange(2**bits, device=packed.device) + lowest
    return look_up_bits(packed, bits, num_values, numbers.to(dtype)[None])


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """`table[index]`, by a gather, which is faster on CPUs.

    Args:
        table: `[n]`.
        index: `[rows, columns]` int64, below `n`.

    >>> look_up(torch.tensor([0.5, 1.5]), torch.tensor([[1, 0, 1]])).tolist()
    [[1.5, 0.5, 1.5]]
    """
    if table.requires_grad and torch.is_grad_enabled():  # that of a gather has a table for each row
        return table[index]
    return table.expand(len(index), -1).gather(1, index)


def _codes_at_once(bits: int, element_size: int, num_tables: int, num_codes: int) -> int:
    """Codes per look-up: a power of two, whose tables stay in the cache and have a quarter of the matrix's values at most."""
    number = 1
    while (
        2 * number * element_size <= _MAX_ENTRY_BYTES
        and 2 * number * bits <= _MAX_INDEX_BITS
        and num_tables << (2 * number * bits) <= min(2**_MAX_TABLE_BITS, num_codes // (8 * number))
    ):
        number *= 2
    return number


def _combinations(levels: Tensor, bits: int, number: int) -> Tensor:
    """`[T * 2**(bits * number)]`: for every index the levels of the codes in it, lowest bits first, viewed as one integer."""
    levels = torch.nn.functional.pad(levels, (0, 2**bits - levels.shape[1]))
    if number == 1:
        return levels.flatten()
    combined = levels.new_empty(len(levels), *[2**bits] * number, number)
    for place in range(number):
        combined[..., place] = levels.reshape(-1, *[1] * (number - 1 - place), 2**bits, *[1] * place)
    return combined.flatten().view(INTEGERS[number * levels.element_size()])


def _indices(packed: Tensor, width: int, first: Tensor | None) -> Tensor:
    """Integers of `width` bits in rows of bytes, added to `first` of the row; `[rows, at least as many as there are]` int64."""
    if width == 8:
        index = packed.long()
    else:
        period = math.lcm(width, 8) // 8
        container = torch.int32 if period <= 4 else torch.int64
        streams = torch.nn.functional.pad(packed, (0, -packed.shape[1] % period)).unflatten(1, (-1, period))
        streams = torch.nn.functional.pad(streams, (0, container.itemsize - period)).view(container)  # the low byte first
        shifts = torch.arange(0, 8 * period, width, dtype=container, device=packed.device)
        index = (streams >> shifts).bitwise_and_(2**width - 1).long().flatten(1)
    return index if first is None else index.add_(first)


def _check_row_bytes(packed: Tensor, bits: int, num_values: int) -> None:
    if packed.shape[-1] != packed_row_bytes(num_values, bits):
        raise ValueError(
            f"packed rows must have {packed_row_bytes(num_values, bits)} bytes for {num_values} values "
            f"of {bits} bits, got {packed.shape[-1]}"
        )


def _check(tensor: Tensor, bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be in [1, 8], got {bits}")
    if tensor.dtype != torch.uint8:
        raise ValueError(f"packing works on torch.uint8, got {tensor.dtype}")
