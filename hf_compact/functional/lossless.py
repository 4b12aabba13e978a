"""Lossless coding of 16-bit floats: their exponents are nearly all there is to save.

A value is turned by one bit, so that its first byte is the whole exponent (of float16: with three bits of the mantissa)
and its second byte the rest with the sign. The first bytes go through the entropy coder, centred, with the tables for rows
and columns that it has for integers; the second bytes are as good as random and stay as they are.
Source: the split of ZipNN (arXiv 2411.05239); differs by the coder.
"""

import struct
import zlib

import numpy as np
import torch
from torch import Tensor

from .coding import decode, encode

_HEAD = struct.Struct("<IIB")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def encode_exact(weight: Tensor) -> Tensor:
    """Code a matrix so that every bit comes back.

    Args:
        weight: `[rows, columns]` bfloat16 or float16.

    Returns:
        `[n]` uint8.

    Raises:
        ValueError: another dtype or shape.

    >>> weight = torch.tensor([[0.5, -2.0], [3.0, 0.0]], dtype=torch.bfloat16)
    >>> torch.equal(decode_exact(encode_exact(weight), "bfloat16"), weight)
    True
    """
    if weight.dtype not in DTYPES.values() or weight.dim() != 2 or not weight.numel():
        raise ValueError(f"weight must be a matrix of 16-bit floats, got {weight.dtype} {list(weight.shape)}")
    bits = weight.detach().cpu().contiguous().view(torch.int16).numpy().view(np.uint16)
    first, second = (bits >> 7).astype(np.uint8), ((bits << 1) | (bits >> 15)).astype(np.uint8).tobytes()
    middle = int(np.median(first))
    coded = encode(torch.from_numpy((first - np.uint8(middle)).view(np.int8))).numpy().tobytes()
    head = _HEAD.pack(len(coded), _crc(second, middle), middle)
    return torch.frombuffer(bytearray(head + coded + second), dtype=torch.uint8)


def decode_exact(stream: Tensor, dtype: str) -> Tensor:
    """Inverse of `encode_exact`.

    Args:
        stream: `[n]` uint8.
        dtype: `bfloat16` or `float16`.

    Returns:
        `[rows, columns]` of that dtype.

    Raises:
        ValueError: the stream is cut short or damaged.
    """
    data = stream.cpu().numpy().tobytes()
    if len(data) < _HEAD.size:
        raise ValueError(f"losslessly coded weight of {len(data)} bytes does not begin as one")
    size, crc, middle = _HEAD.unpack_from(data)
    start = _HEAD.size + size
    first = decode(torch.frombuffer(bytearray(data[_HEAD.size : start]), dtype=torch.uint8)).numpy().view(np.uint8)
    second = data[start:]
    if len(second) != first.size or _crc(second, middle) != crc:
        raise ValueError("losslessly coded weight is damaged in its head or second bytes: their number or their CRC-32 differs")
    turned = (first + np.uint8(middle)).astype(np.uint16) << 8 | np.frombuffer(second, np.uint8).reshape(first.shape)
    return torch.from_numpy((turned >> 1 | turned << 15).view(np.int16)).view(DTYPES[dtype])


def _crc(second: bytes, middle: int) -> int:
    """Of what the coder of the first bytes does not watch over."""
    return zlib.crc32(bytes([middle]), zlib.crc32(second))
