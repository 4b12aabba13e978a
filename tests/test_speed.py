import pytest
import torch

from hf_compact import api, speed


@pytest.mark.parametrize(("is_fast", "num_words"), [(False, 1), (True, 0)], ids=["software", "hardware"])
def test_slow_bfloat16_is_told_once(is_fast, num_words, monkeypatch, caplog):
    monkeypatch.setattr(speed, "has_fast_bfloat16", lambda: is_fast)
    speed.note_slow_bfloat16.cache_clear()
    for dtype in (torch.float32, torch.bfloat16, torch.bfloat16):
        assert api._usual(dtype) == dtype
    assert [record.message.count("dtype float32") for record in caplog.records] == [1] * num_words


def test_a_cpu_with_wide_vectors_is_fast():
    assert speed.has_fast_bfloat16() or "AVX512" not in torch.backends.cpu.get_cpu_capability()
