"""The entropy coder: every matrix comes back, at the size that was forecast, and damage has a name."""

import math
import zlib

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from hf_compact.functional import coding
from hf_compact.functional.coding import coded_bits, decode, encode

GOLDEN = "6866633202000000030000000100010027da6279fffa0a00000000000000000000000000000000000000000000000000000000000000fe050808000816080800000007bdacb8eec8aea207000000"


def matrix(rows: int, columns: int, spread: float, seed: int = 0, row_spread: float = 0.0, column_spread: float = 0.0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator) * spread
    values *= torch.exp(row_spread * torch.randn(rows, 1, generator=generator))
    values *= torch.exp(column_spread * torch.randn(1, columns, generator=generator))
    return values.round().clamp(-128, 127).to(torch.int8)


@settings(max_examples=60)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 60), st.integers(0, 9), st.floats(0, 2), st.floats(0, 2))
def test_what_is_coded_comes_back(rows, columns, spread, seed, row_spread, column_spread):
    codes = matrix(rows, columns, spread, seed, row_spread, column_spread)
    assert torch.equal(decode(encode(codes)), codes)


@pytest.mark.parametrize("value", [-128, -1, 0, 127])
def test_a_constant_costs_next_to_nothing(value):
    codes = torch.full((256, 256), value, dtype=torch.int8)
    stream = encode(codes)
    assert torch.equal(decode(stream), codes)
    assert 8 * len(stream) / codes.numel() < 0.06


@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])
def test_the_rate_is_the_entropy(spread):
    """Of a rounded normal value, where rows and columns are alike."""
    codes = matrix(1024, 512, spread)
    counts = torch.bincount(codes.flatten().int() + 128, minlength=256).double() / codes.numel()
    entropy = -(counts[counts > 0] * counts[counts > 0].log2()).sum().item()
    assert 8 * len(encode(codes)) / codes.numel() == pytest.approx(entropy, abs=0.02)


def test_spread_of_rows_and_columns_is_used():
    """A coder that knew the true spreads would need the mean of the entropies; one table for all needs much more."""
    codes = matrix(1024, 512, 1.0, row_spread=0.7, column_spread=0.7)
    counts = torch.bincount(codes.flatten().int() + 128, minlength=256).double() / codes.numel()
    one_table = -(counts[counts > 0] * counts[counts > 0].log2()).sum().item()
    assert 8 * len(encode(codes)) / codes.numel() < one_table - 0.2


@pytest.mark.parametrize("shape", [(3, 5), (64, 64), (1500, 400)])
def test_the_forecast_is_the_size(shape):
    codes = matrix(*shape, 2.0, row_spread=0.3, column_spread=0.5)
    stream = encode(codes)
    forecast = sum(coded_bits(codes))
    assert 8 * len(stream) == pytest.approx(forecast, rel=0.002, abs=200)


def test_a_stream_is_the_same_every_time():
    codes = matrix(300, 200, 1.5)
    assert torch.equal(encode(codes), encode(codes.clone()))


def chunks_of(stream: torch.Tensor) -> list[tuple[int, int]]:
    """`(start, end)` of every chunk's content, from its length in front of it."""
    data, found = bytes(stream.tolist()), []
    end = len(data)
    for start in range(len(data) - 8):  # the tables before the chunks have no length of their own
        position, found = start, []
        while position + 8 <= end and (size := int.from_bytes(data[position : position + 4], "little")) <= end - position - 8:
            found.append((position + 8, position + 8 + size))
            position += 8 + size
        if position == end and all(zlib.crc32(data[a:b]) == int.from_bytes(data[a - 4 : a], "little") for a, b in found):
            return found
    raise AssertionError("no chunks")


@pytest.mark.parametrize("row_spread", [0.0, 1.0], ids=["alike", "apart"])
def test_a_large_matrix_is_cut_into_chunks_that_are_read_alone(row_spread, monkeypatch):
    monkeypatch.setattr(coding, "_CHUNK_ENTRIES", 1 << 12)
    codes = matrix(128, 128, 1.5, row_spread=row_spread)
    stream = encode(codes)
    found = chunks_of(stream)
    assert len(found) == 4
    # Another content of the first chunk, under a checksum of its own, changes its rows and leaves the others.
    start, end = found[0]
    other = stream.clone()
    other[start : start + 4] ^= 1
    other[start - 4 : start] = torch.tensor(list(zlib.crc32(bytes(other[start:end].tolist())).to_bytes(4, "little")))
    changed = (decode(other) != codes).any(1).sum()
    assert 0 < changed <= 32
    for number, (start, _) in enumerate(found):
        broken = stream.clone()
        broken[start] ^= 1
        with pytest.raises(ValueError, match=rf"^chunk {number} of an entropy-coded weight is damaged"):
            decode(broken)


def test_an_old_stream_is_still_read():
    """Written once; a coder that reads it otherwise would turn every folder on disk into noise."""
    stream = torch.tensor(list(bytes.fromhex(GOLDEN)), dtype=torch.uint8)
    assert decode(stream).tolist() == [[1, -2, 0], [0, 3, -1]]
    assert torch.equal(encode(torch.tensor([[1, -2, 0], [0, 3, -1]], dtype=torch.int8)), stream)


@given(st.integers(0, 10**6), st.integers(0, 255), st.integers(0, 400))
def test_no_damage_goes_unseen(position, value, cut):
    codes = matrix(24, 24, 2.0)
    stream = encode(codes)
    broken = stream.clone()
    broken[position % len(stream)] = value
    broken = broken[: len(stream) - cut % len(stream)] if cut % 3 == 0 else broken
    if torch.equal(broken, stream):
        assert torch.equal(decode(broken), codes)
    else:
        with pytest.raises(ValueError, match="entropy-coded weight"):
            decode(broken)


@pytest.mark.parametrize("position", range(0, 400, 25))
def test_one_flipped_bit_is_found(position):
    stream = encode(matrix(64, 64, 2.0))
    assert position < len(stream)
    stream[position] ^= 4
    with pytest.raises(ValueError, match="entropy-coded weight"):
        decode(stream)


@pytest.mark.parametrize("kept", [0, 3, 10, 40, 200, -1])
def test_a_cut_stream_is_found(kept):
    stream = encode(matrix(64, 64, 2.0))
    with pytest.raises(ValueError, match=r"does not begin|ends inside|ends before"):
        decode(stream[:kept])


def test_a_longer_stream_is_found():
    stream = encode(matrix(64, 64, 2.0))
    with pytest.raises(ValueError, match="4 bytes behind its last chunk"):
        decode(torch.cat([stream, stream[:4]]))


@pytest.mark.parametrize(
    "codes", [torch.zeros(4, dtype=torch.int8), torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(0, 3, dtype=torch.int8)]
)
def test_only_int8_matrices_are_taken(codes):
    with pytest.raises(ValueError, match="codes must be an int8 matrix"):
        encode(codes)


def test_no_bits_are_lost_at_the_ends_of_the_range():
    codes = torch.arange(-128, 128).to(torch.int8).repeat(16, 1)
    assert torch.equal(decode(encode(codes)), codes)
    assert 8 * len(encode(codes)) / codes.numel() < math.log2(256) + 1.5
