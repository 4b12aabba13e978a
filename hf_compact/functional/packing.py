"""Dense packing of small unsigned integers into bytes, row by row, for every width from 1 to 8 bits.

A row is one little-endian bit stream padded to a whole byte, so that any row can be read without the others
(an embedding lookup needs that). Eight values of `bits` bits fill `bits` bytes exactly; all work is uint8 arithmetic.
"""

import torch
from torch import Tensor


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
    if packed.shape[-1] != packed_row_bytes(num_values, bits):
        raise ValueError(
            f"packed rows must have {packed_row_bytes(num_values, bits)} bytes for {num_values} values "
            f"of {bits} bits, got {packed.shape[-1]}"
        )
    if bits == 8:
        return packed
    groups = -(-num_values // 8)
    streams = torch.nn.functional.pad(packed, (0, groups * bits - packed.shape[-1])).unflatten(-1, (groups, bits))
    values = torch.empty(*streams.shape[:-1], 8, dtype=torch.uint8, device=packed.device)
    for slot in range(8):
        byte, shift = divmod(slot * bits, 8)
        value = streams[..., byte] >> shift
        if shift + bits > 8:
            value = value | (streams[..., byte + 1] << (8 - shift))
        values[..., slot] = value & (2**bits - 1)
    return values.flatten(-2)[..., :num_values]


def _check(tensor: Tensor, bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be in [1, 8], got {bits}")
    if tensor.dtype != torch.uint8:
        raise ValueError(f"packing works on torch.uint8, got {tensor.dtype}")
