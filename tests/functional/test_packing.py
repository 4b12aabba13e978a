"""Packing loses nothing, at any width and length, and takes the bytes it says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_compact.functional import packing
from hf_compact.functional.packing import look_up_bits, pack_bits, packed_row_bytes, unpack_bits, unpack_numbers

WIDTHS = range(1, 9)


def codes_of(shape: tuple[int, ...], bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**bits, shape, generator=generator, dtype=torch.uint8)


def slow_pack(row: list[int], bits: int) -> list[int]:
    """One little-endian bit stream, through Python's whole numbers."""
    stream = sum(value << (position * bits) for position, value in enumerate(row))
    return list(stream.to_bytes(packed_row_bytes(len(row), bits), "little"))


@given(bits=st.sampled_from(WIDTHS), num_values=st.integers(0, 70), rows=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_unpack_inverts_pack(bits, num_values, rows, seed):
    codes = codes_of((rows, num_values), bits, seed)
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, packed_row_bytes(num_values, bits))
    assert torch.equal(unpack_bits(packed, bits, num_values), codes)


@given(bits=st.sampled_from(WIDTHS), row=st.data())
def test_row_is_one_little_endian_bit_stream(bits, row):
    values = row.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=30))
    assert pack_bits(torch.tensor(values, dtype=torch.uint8), bits).tolist() == slow_pack(values, bits)


@pytest.mark.parametrize("shape", [(13,), (3, 13), (2, 3, 13), (2, 1, 3, 13), (0, 13)], ids=str)
@pytest.mark.parametrize("bits", WIDTHS)
def test_leading_axes_are_kept(bits, shape):
    codes = codes_of(shape, bits)
    packed = pack_bits(codes, bits)
    assert packed.shape == (*shape[:-1], packed_row_bytes(13, bits))
    assert torch.equal(unpack_bits(packed, bits, 13), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_row_is_read_without_the_others(bits):
    codes = codes_of((6, 21), bits)
    picked = torch.tensor([4, 1])
    assert torch.equal(unpack_bits(pack_bits(codes, bits)[picked], bits, 21), codes[picked])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("num_tables", [1, 3])
@pytest.mark.parametrize("shape", [(5,), (2, 7), (0, 3), (150, 301), (2, 90, 201)], ids=str)
@pytest.mark.parametrize("bits", WIDTHS)
def test_levels_are_those_of_the_codes(bits, shape, num_tables, dtype):
    codes = codes_of(shape, bits)
    levels = (torch.arange(num_tables * 2**bits) % 251).view(num_tables, -1).to(dtype)  # whole numbers, exact in every dtype
    tables = torch.arange(codes[..., 0].numel()).view(shape[:-1]) % num_tables
    packed = pack_bits(codes, bits)
    wanted = levels.view(-1)[codes.long() + 2**bits * tables[..., None]]
    assert torch.equal(look_up_bits(packed, bits, shape[-1], levels, tables), wanted)
    assert torch.equal(look_up_bits(packed, bits, shape[-1], levels), levels[0][codes.long()])


def test_fewer_levels_than_codes():
    codes = codes_of((64, 64), 3) % 5
    levels = torch.tensor([[-2.0, -1.0, 0.0, 1.0, 2.0]])
    assert torch.equal(look_up_bits(pack_bits(codes, 3), 3, 64, levels), levels[0][codes.long()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("bits", "lowest"), [(2, -1.5), (3, -4), (4, 0), (8, -127.0)])
def test_consecutive_numbers(bits, lowest, dtype):
    codes = codes_of((64, 65), bits)
    assert torch.equal(unpack_numbers(pack_bits(codes, bits), bits, 65, lowest, dtype), (codes.float() + lowest).to(dtype))


def test_parts_of_a_matrix_make_the_whole(monkeypatch):
    codes, levels = codes_of((30, 41), 4), torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    packed, tables = pack_bits(codes, 4), torch.arange(30) % 3
    whole = look_up_bits(packed, 4, 41, levels, tables)
    monkeypatch.setattr(packing, "PART", 100)
    assert torch.equal(look_up_bits(packed, 4, 41, levels, tables), whole)


def test_numbers_in_bytes_leave_the_bytes_alone():
    packed = torch.tensor([[1, 2]], dtype=torch.uint8)
    assert unpack_numbers(packed, 8, 2, 1, torch.uint8).tolist() == [[2, 3]]
    assert packed.tolist() == [[1, 2]]


def test_more_levels_than_codes():
    with pytest.raises(ValueError, match=r"levels must have at most 2\*\*bits = 4 columns, got 5"):
        look_up_bits(torch.zeros(1, 1, dtype=torch.uint8), 2, 4, torch.zeros(1, 5))


def test_gradients_of_levels_count_their_codes():
    codes = codes_of((64, 64), 2)
    levels = torch.zeros(2, 4, requires_grad=True)
    look_up_bits(pack_bits(codes, 2), 2, 64, levels, torch.arange(64) // 32).sum().backward()
    assert torch.equal(levels.grad, torch.stack([half.flatten().bincount() for half in codes.split(32)]).float())


@given(num_values=st.integers(0, 10_000), bits=st.sampled_from(WIDTHS))
def test_size_is_the_bits_rounded_up_to_bytes(num_values, bits):
    spare = 8 * packed_row_bytes(num_values, bits) - num_values * bits
    assert 0 <= spare < 8


@pytest.mark.parametrize("bits", WIDTHS)
def test_inputs_are_unchanged(bits):
    codes = codes_of((3, 11), bits)
    before = codes.clone()
    packed = pack_bits(codes, bits)
    assert torch.equal(codes, before)
    before = packed.clone()
    unpack_bits(packed, bits, 11)
    assert torch.equal(packed, before)


def test_columns_in_any_memory_order():
    codes = codes_of((11, 4), 3).T
    assert torch.equal(unpack_bits(pack_bits(codes, 3), 3, 11), codes)


@pytest.mark.parametrize("bits", [0, 9])
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match=rf"bits must be in \[1, 8\], got {bits}"):
        pack_bits(torch.zeros(4, dtype=torch.uint8), bits)
    with pytest.raises(ValueError, match=rf"bits must be in \[1, 8\], got {bits}"):
        unpack_bits(torch.zeros(4, dtype=torch.uint8), bits, 4)


def test_only_uint8():
    with pytest.raises(ValueError, match=r"packing works on torch.uint8, got torch.int64"):
        pack_bits(torch.zeros(4, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match=r"packing works on torch.uint8, got torch.int32"):
        unpack_bits(torch.zeros(4, dtype=torch.int32), 4, 8)


@pytest.mark.parametrize("bits", range(1, 8))
def test_value_that_does_not_fit(bits):
    with pytest.raises(ValueError, match=rf"codes must be below 2\*\*bits = {2**bits}, got {2**bits}"):
        pack_bits(torch.tensor([0, 2**bits], dtype=torch.uint8), bits)


def test_row_of_another_length():
    with pytest.raises(ValueError, match="packed rows must have 3 bytes for 7 values of 3 bits, got 2"):
        unpack_bits(torch.zeros(5, 2, dtype=torch.uint8), 3, 7)
