"""Few-bit codes of float values, and which rank serves which part of a buffer.

A code is a uniform mid-rise quantizer without a zero, in units of the root mean square of what is encoded; at one bit
that is `rms * sign`, which keeps the L2 norm. Source: 1-bit Adam (arXiv 2102.02888); differs by more widths and by one
scale for every segment, a part of one tensor that one rank serves, where 1-bit LAMB scales the momentum by tensor first.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...functional.packing import pack_bits, packed_row_bytes, unpack_bits

#: Step of the uniform quantizer with the least error for a normal variable of variance 1 (Max 1960); 2 keeps the norm.
STEPS = {1: 2.0, 2: 0.9957, 4: 0.3352, 8: 0.0308}
#: `[256, 8]`: the signs that the bits of a byte stand for, the lowest bit first.
_SIGNS = 2.0 * ((np.arange(256, dtype=np.uint8)[:, None] >> np.arange(8, dtype=np.uint8)) & 1).astype(np.float32) - 1.0


class Segment(NamedTuple):
    """Values of one tensor that one rank serves."""

    tensor: int
    """Index of the tensor."""
    start: int
    """First value, counted in the buffer of all tensors."""
    stop: int
    """One past the last value."""
    bits: int
    """Width of a code; 16 is bfloat16."""

    @property
    def num_values(self) -> int:
        """Length."""
        return self.stop - self.start


def split_into_chunks(sizes: Sequence[int], bits: Sequence[int], num_chunks: int) -> list[list[Segment]]:
    """Cut a buffer of tensors into consecutive chunks of about equal bytes; cuts inside a tensor are at multiples of 8.

    Args:
        sizes: values of each tensor, in the order in which they lie in the buffer.
        bits: width of each tensor's codes.
        num_chunks: number of ranks. Trailing chunks of a tiny buffer are empty.

    >>> [[tuple(segment) for segment in chunk] for chunk in split_into_chunks([20, 4], [1, 1], 2)]
    [[(0, 0, 16, 1)], [(0, 16, 20, 1), (1, 20, 24, 1)]]
    """
    total = sum(size * width for size, width in zip(sizes, bits, strict=True))
    chunks: list[list[Segment]] = [[]]
    used = offset = 0
    for tensor, (size, width) in enumerate(zip(sizes, bits, strict=True)):
        position, end = offset, offset + size
        while position < end:
            room = math.ceil((total * len(chunks) / num_chunks - used) / (8 * width)) * 8
            if room <= 0 and len(chunks) < num_chunks:
                chunks.append([])
                continue
            stop = end if len(chunks) == num_chunks else min(end, position + room)
            chunks[-1].append(Segment(tensor, position, stop, width))
            used += (stop - position) * width
            position = stop
        offset = end
    return chunks + [[] for _ in range(num_chunks - len(chunks))]


def message_bytes(chunk: Sequence[Segment]) -> int:
    """Bytes of an encoded chunk: a float32 scale for every segment, then the codes; a multiple of 4.

    >>> message_bytes([Segment(0, 0, 20, 1), Segment(1, 20, 24, 8)])
    16
    """
    payload = sum(
        packed_row_bytes(segment.num_values, min(segment.bits, 8)) * (2 if segment.bits == 16 else 1) for segment in chunk
    )
    return -(-(4 * len(chunk) + payload) // 4) * 4


def encode_(values: Tensor, chunk: Sequence[Segment], live: Sequence[int], message: Tensor) -> None:
    """Write the codes of a chunk into a message; `values` is left with what the codes miss.

    Args:
        values: `[n]` float32, the values of the chunk. Overwritten by `values - decoded`.
        chunk: its segments.
        live: for every segment, how many of its values can be other than 0: what the root mean square divides by.
        message: `[message_bytes(chunk) or more]` uint8. Overwritten.

    >>> chunk = [Segment(0, 0, 4, 1)]; values = torch.tensor([1.0, -1.0, 3.0, -3.0])
    >>> message = torch.empty(message_bytes(chunk), dtype=torch.uint8); encode_(values, chunk, [4], message)
    >>> decoded = torch.zeros(4); add_decoded_(decoded, chunk, message); decoded.mul(decoded).mean().round().item()
    5.0
    >>> (decoded + values).round().tolist()
    [1.0, -1.0, 3.0, -3.0]
    """
    if not chunk:
        return
    scales = message[: 4 * len(chunk)].view(torch.float32)
    first, position = chunk[0].start, 4 * len(chunk)
    for index, segment in enumerate(chunk):
        part = values[segment.start - first : segment.stop - first]
        scale = torch.linalg.vector_norm(part) / math.sqrt(max(live[index], 1))
        scales[index] = scale
        codes = quantize_(part, segment.bits, scale)
        message[position : position + len(codes)] = codes
        position += len(codes)


def quantize_(values: Tensor, bits: int, scale: Tensor) -> Tensor:
    """Packed codes of `values [n]`, which are left with what the codes miss.

    Returns:
        uint8, `ceil(n * bits / 8)` of them.
    """
    if bits == 16:
        rounded = values.to(torch.bfloat16)
        values.sub_(rounded)
        return rounded.view(torch.uint8)
    if bits == 1:
        packed = pack_signs(values)
        values.sub_(torch.copysign(scale, values))
        return packed
    step, top = STEPS[bits] * scale, 2**bits - 1
    # A segment of zeros has step 0: 0 / 0 is no number, and any code then stands for 0.
    codes = values.div(step).floor_().add_(2 ** (bits - 1)).nan_to_num_(0.0).clamp_(0, top)
    values.sub_((codes - top / 2) * step)
    return pack_bits(codes.to(torch.uint8), bits)


def pack_signs(values: Tensor) -> Tensor:
    """One bit per value, 1 where the sign bit is clear; the first value in the lowest bit, as `pack_bits` does.

    >>> pack_signs(torch.tensor([1.0, -2.0, 0.0, -0.0])).tolist()
    [5]
    """
    if values.device.type != "cpu":
        return pack_bits((~torch.signbit(values)).to(torch.uint8), 1)
    # numpy packs 40 times as fast as shifts in torch, which cost more than the exact all-reduce that they replace.
    return torch.from_numpy(np.packbits(values.numpy().view(np.int32) >= 0, bitorder="little"))


def add_decoded_(target: Tensor, chunk: Sequence[Segment], message: Tensor, weight: float = 1.0) -> None:
    """Add `weight` times the decoded chunk to `target`.

    Args:
        target: `[n]` float32, the values of the chunk.
        chunk: its segments.
        message: what `encode_` wrote.
        weight: factor.
    """
    if not chunk:
        return
    scales = message[: 4 * len(chunk)].view(torch.float32) * weight
    first, position = chunk[0].start, 4 * len(chunk)
    for scale, segment in zip(scales, chunk, strict=True):
        part = target[segment.start - first : segment.stop - first]
        length = packed_row_bytes(segment.num_values, min(segment.bits, 8)) * (2 if segment.bits == 16 else 1)
        codes = message[position : position + length]
        position += length
        if segment.bits == 16:
            part.add_(codes.clone().view(torch.bfloat16), alpha=weight)  # a copy, because codes may start at an odd byte
        elif segment.bits == 1:
            part.add_(unpack_signs(codes, segment.num_values, scale))
        else:
            values = unpack_bits(codes, segment.bits, segment.num_values).to(torch.float32)
            part.add_((values - (2**segment.bits - 1) / 2) * (STEPS[segment.bits] * scale))


def unpack_signs(packed: Tensor, num_values: int, scale: Tensor) -> Tensor:
    """`scale` with the signs that `pack_signs` packed, `[num_values]` float32.

    >>> unpack_signs(torch.tensor([5], dtype=torch.uint8), 3, torch.tensor(2.0)).tolist()
    [2.0, -2.0, 2.0]
    """
    if packed.device.type != "cpu":
        return (unpack_bits(packed, 1, num_values).to(torch.float32) * 2 - 1) * scale
    # Eight values are taken at once from a table of all bytes.
    values = (_SIGNS * np.float32(scale.item())).take(packed.numpy(), axis=0, mode="clip")
    return torch.from_numpy(values.reshape(-1))[:num_values]
