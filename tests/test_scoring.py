"""Perplexity against its definition."""

import math

import pytest
import torch
from torch import nn

from hf_compact.errors import CalibrationError, ConfigError
from hf_compact.scoring import perplexity
from tests.conftest import VOCABULARY, tiny_model


def token_ids(length: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(0))


def test_uniform_logits_have_the_perplexity_of_the_vocabulary():
    model = tiny_model("llama_untied")
    nn.init.zeros_(model.lm_head.weight)
    found = perplexity(model, token_ids(100), window_length=20, num_windows=None)
    assert found["perplexity"] == pytest.approx(VOCABULARY, rel=1e-5)
    assert found["mean_nll"] == pytest.approx(math.log(VOCABULARY), rel=1e-6)


def test_equals_the_loss_of_the_model():
    model, ids = tiny_model("llama"), token_ids(64)
    with torch.no_grad():
        losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in ids.view(4, 16)]
    found = perplexity(model, ids, window_length=16)
    assert found["mean_nll"] == pytest.approx(sum(losses) / 4, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / 4), rel=1e-5)


def test_counts_and_progress():
    done = []
    found = perplexity(tiny_model("llama"), token_ids(70), window_length=16, num_windows=3, progress=done.append)
    assert (found["num_windows"], found["num_tokens"], found["window_length"]) == (3, 45, 16)
    assert done == [1, 2, 3]


def test_rows_are_scored_in_parts_that_join(monkeypatch):
    model, ids = tiny_model("llama"), token_ids(40)
    whole = perplexity(model, ids, window_length=20)
    monkeypatch.setattr("hf_compact.scoring._ROWS", 7)
    assert perplexity(model, ids, window_length=20)["mean_nll"] == pytest.approx(whole["mean_nll"], rel=1e-6)


def test_overflow_is_infinite():
    model = tiny_model("llama_untied")
    nn.init.normal_(model.lm_head.weight, std=1e4)
    assert perplexity(model, token_ids(40), window_length=20)["perplexity"] == math.inf


def test_text_is_too_short():
    with pytest.raises(CalibrationError, match="text has 15 tokens, fewer than one window of 16"):
        perplexity(tiny_model("llama"), token_ids(15), window_length=16)


@pytest.mark.parametrize("window_length", [0, 1])
def test_window_without_a_prediction(window_length):
    with pytest.raises(ConfigError, match=f"window_length must be at least 2, got {window_length}"):
        perplexity(tiny_model("llama"), token_ids(15), window_length=window_length)


def test_no_windows():
    with pytest.raises(ConfigError, match="num_windows must be at least 1 or None for all, got 0"):
        perplexity(tiny_model("llama"), token_ids(15), window_length=4, num_windows=0)


def test_scoring_keeps_no_gradients():
    model = tiny_model("llama")
    with torch.enable_grad():
        seen = []
        handle = model.register_forward_hook(lambda module, args, output: seen.append(output.logits.requires_grad))
        perplexity(model, torch.arange(64), window_length=32, num_windows=2)
        handle.remove()
    assert seen == [False, False]
