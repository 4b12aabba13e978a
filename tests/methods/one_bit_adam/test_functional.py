import itertools

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from hf_compact.functional.packing import pack_bits, unpack_bits
from hf_compact.methods.one_bit_adam.functional import (
    STEPS,
    Segment,
    add_decoded_,
    encode_,
    message_bytes,
    pack_signs,
    quantize_,
    split_into_chunks,
    unpack_signs,
)

BITS = (1, 2, 4, 8, 16)
sizes_and_bits = st.lists(st.tuples(st.integers(1, 70), st.sampled_from(BITS)), min_size=1, max_size=6)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_values", [0, 1, 7, 8, 9, 16, 1000, 1003])
def test_fast_signs_equal_the_slow_packing(num_values):
    values = normal(num_values)
    packed = pack_signs(values)
    codes = (~torch.signbit(values)).to(torch.uint8)
    assert torch.equal(packed, pack_bits(codes, 1))
    scale = torch.tensor(0.37)
    assert torch.equal(
        unpack_signs(packed, num_values, scale), torch.where(unpack_bits(packed, 1, num_values).bool(), scale, -scale)
    )


def test_zero_counts_as_positive_and_its_sign_bit_is_what_both_sides_see():
    values = torch.tensor([0.0, -0.0, 2.0])
    packed = quantize_(values, 1, torch.tensor(1.0))
    assert unpack_signs(packed, 3, torch.tensor(1.0)).tolist() == [1.0, -1.0, 1.0]
    assert values.tolist() == [-1.0, 1.0, 1.0]


@hypothesis.given(sizes_and_bits, st.integers(1, 5))
def test_chunks_are_a_partition_of_about_equal_bytes(tensors, num_chunks):
    sizes, bits = zip(*tensors, strict=True)
    chunks = split_into_chunks(sizes, bits, num_chunks)
    assert len(chunks) == num_chunks
    segments = list(itertools.chain(*chunks))
    assert segments[0].start == 0
    assert segments[-1].stop == sum(sizes)
    assert all(first.stop == second.start for first, second in itertools.pairwise(segments))
    offsets = [0, *itertools.accumulate(sizes)]
    for segment in segments:
        assert offsets[segment.tensor] <= segment.start < segment.stop <= offsets[segment.tensor + 1]
        assert segment.bits == bits[segment.tensor]
        assert segment.stop == offsets[segment.tensor + 1] or (segment.stop - offsets[segment.tensor]) % 8 == 0
    share = sum(size * width for size, width in tensors) / num_chunks
    used = [sum(segment.num_values * segment.bits for segment in chunk) for chunk in chunks]
    assert max(used) <= share + 8 * max(bits)


@hypothesis.given(sizes_and_bits, st.integers(1, 4), st.integers(0, 10))
def test_decoded_and_error_add_up_to_what_was_encoded(tensors, num_chunks, seed):
    sizes, bits = zip(*tensors, strict=True)
    for chunk in split_into_chunks(sizes, bits, num_chunks):
        length = sum(segment.num_values for segment in chunk)
        values = normal(length, seed=seed) * 3
        error, message = values.clone(), torch.full((message_bytes(chunk) + 4,), 255, dtype=torch.uint8)
        encode_(error, chunk, [segment.num_values for segment in chunk], message)
        decoded = torch.zeros(length)
        add_decoded_(decoded, chunk, message)
        torch.testing.assert_close(decoded + error, values, rtol=1e-5, atol=1e-5)
        half = torch.ones(length)
        add_decoded_(half, chunk, message, 0.5)
        torch.testing.assert_close(half, 1 + decoded / 2, rtol=1e-5, atol=1e-5)
        assert message[message_bytes(chunk) :].tolist() == [255] * 4  # nothing is written past the end


def test_one_bit_keeps_the_norm_and_more_bits_miss_less():
    values = normal(1_000_000)
    scale = torch.linalg.vector_norm(values) / 1000
    missed = {}
    for bits in BITS:
        error = values.clone()
        quantize_(error, bits, scale)
        missed[bits] = float(error.square().mean())
        if bits == 1:
            torch.testing.assert_close((values - error).norm(), values.norm(), rtol=1e-3, atol=0)
    assert missed[1] > missed[2] > missed[4] > missed[8] > missed[16]
    # Max 1960: the least error of a uniform quantizer on a normal variable.
    assert missed[2] == pytest.approx(0.1188, rel=0.05)
    assert missed[4] == pytest.approx(0.01154, rel=0.05)
    assert set(STEPS) == set(BITS) - {16}


@pytest.mark.parametrize("bits", BITS)
def test_zeros_have_no_error_that_grows(bits):
    error = torch.zeros(20)
    codes = quantize_(error, bits, torch.tensor(0.0))
    assert error.tolist() == [0.0] * 20
    assert codes.dtype == torch.uint8


def test_error_feedback_makes_the_mean_over_time_right():
    generator = torch.Generator().manual_seed(0)
    error, target, total = torch.zeros(512), normal(512, seed=1), torch.zeros(512)
    chunk, steps = [Segment(0, 0, 512, 1)], 300
    message = torch.empty(message_bytes(chunk), dtype=torch.uint8)
    for _ in range(steps):
        error.add_(target + torch.randn(512, generator=generator) / 2)
        encode_(error, chunk, [512], message)
        add_decoded_(total, chunk, message)
    assert float((total / steps - target).norm() / target.norm()) < 0.1
