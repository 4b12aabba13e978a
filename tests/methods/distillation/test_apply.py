"""Block-wise distillation brings a coarse model nearer, and touches nothing else."""

import pytest
import torch

from hf_compact import TernaryCallback
from hf_compact.distillation import divergence
from hf_compact.errors import ConfigError, NumericalError
from hf_compact.methods.distillation import distill_blocks_
from tests.conftest import tiny_inputs, tiny_model

BATCHES = [tiny_inputs("llama", 4, 16, seed) for seed in range(12)]


def latent(family: str = "llama"):
    model, own = tiny_model(family), TernaryCallback()
    own.set_strength_(own.prepare(model), 1.0)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_warm_start_brings_the_model_nearer(family):
    model, teacher = latent(family), tiny_model(family)
    outside = model.get_input_embeddings().weight.clone()
    test = tiny_inputs(family, 4, 16, seed=9)

    def distance() -> float:
        with torch.no_grad():
            return divergence(model(**test).logits, teacher(**test).logits).item()

    before = distance()
    done = []
    losses = distill_blocks_(model, teacher, BATCHES, epochs=5, learning_rate=5e-3, progress=lambda *at: done.append(at))
    assert [at[0] for at in done] == [0, 1, 2, 3]
    assert distance() < 0.8 * before
    assert all(len(curve) == 60 and curve[-1] < curve[0] for curve in losses.values())
    assert torch.equal(model.get_input_embeddings().weight, outside)
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), tiny_model(family).parameters(), strict=True))


def test_a_model_that_is_its_teacher_has_nothing_to_learn():
    model = tiny_model("llama")
    assert max(max(curve) for curve in distill_blocks_(model, tiny_model("llama"), BATCHES[:1]).values()) < 1e-9


def test_padding_is_left_out():
    losses = []
    for filler in (3, 7):
        batch = tiny_inputs("llama", 2, 16)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][:, -6:] = 0
        batch["input_ids"][:, -6:] = filler
        losses.append(distill_blocks_(latent(), tiny_model("llama"), [batch]))
    assert losses[0] == {name: pytest.approx(curve) for name, curve in losses[1].items()}


def test_a_block_that_is_frozen_has_no_losses():
    model = latent()
    model.model.layers[1].requires_grad_(False)
    assert [len(curve) for curve in distill_blocks_(model, tiny_model("llama"), BATCHES[:2]).values()] == [2, 0, 2]


def test_what_cannot_be_distilled_says_so():
    with pytest.raises(ConfigError, match="one stack of equal length in both models, got 2 and 3"):
        distill_blocks_(tiny_model("llama", num_hidden_layers=2), tiny_model("llama"), BATCHES)
    with pytest.raises(ConfigError, match="batches and epochs must be at least 1, got 0 and 1"):
        distill_blocks_(tiny_model("llama"), tiny_model("llama"), [])
    with pytest.raises(ConfigError, match="must be on one device, got meta and cpu"):
        distill_blocks_(tiny_model("llama").to("meta"), tiny_model("llama"), BATCHES)
    model = tiny_model("llama")
    torch.nn.init.constant_(model.model.layers[1].mlp.up_proj.weight, float("nan"))
    with pytest.raises(NumericalError, match=r"loss of model.layers.1 is not finite in step 0"):
        distill_blocks_(model, tiny_model("llama"), BATCHES)
