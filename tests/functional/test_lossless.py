"""Lossless coding: every bit of every 16-bit float comes back, at about two thirds of the size, and damage has a name."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from hf_compact.functional.lossless import decode_exact, encode_exact


def bits(weight: torch.Tensor) -> torch.Tensor:
    return weight.view(torch.int16)


@settings(max_examples=40)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 99), st.sampled_from(["bfloat16", "float16"]))
def test_any_bits_come_back(rows, columns, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(-(2**15), 2**15, (rows, columns), generator=generator, dtype=torch.int32).to(torch.int16)
    weight = raw.view(getattr(torch, dtype))  # infinities and NaN among them
    assert torch.equal(bits(decode_exact(encode_exact(weight), dtype)), raw)


@pytest.mark.parametrize(("dtype", "share"), [("bfloat16", 0.68), ("float16", 0.87)])
def test_normal_values_shrink(dtype, share):
    weight = torch.randn(512, 256, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    stream = encode_exact(weight)
    assert len(stream) < share * 2 * weight.numel()
    assert torch.equal(decode_exact(stream, dtype), weight)


def test_the_input_is_unchanged():
    weight = torch.randn(8, 8).bfloat16()
    before = weight.clone()
    encode_exact(weight.T)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("position", [*range(9), 20, -1])
def test_damage_is_an_error(position):
    stream = encode_exact(torch.randn(40, 40, generator=torch.Generator().manual_seed(0)).bfloat16())
    stream[position] ^= 1
    with pytest.raises(ValueError, match="coded weight"):
        decode_exact(stream, "bfloat16")


def test_what_is_cut_short_is_an_error():
    with pytest.raises(ValueError, match="losslessly coded weight of 3 bytes does not begin as one"):
        decode_exact(torch.zeros(3, dtype=torch.uint8), "bfloat16")


@pytest.mark.parametrize("weight", [torch.zeros(2, 2), torch.zeros(4).bfloat16(), torch.zeros(0, 2).bfloat16()])
def test_another_input_is_an_error(weight):
    with pytest.raises(ValueError, match="weight must be a matrix of 16-bit floats"):
        encode_exact(weight)
