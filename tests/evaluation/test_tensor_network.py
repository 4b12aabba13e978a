"""What is claimed of rows that are measured once, on an accelerator or in hours."""

import argparse

import torch

from evaluation import tensor_network
from hf_compact.distillation import divergence
from tests.conftest import tiny_inputs, tiny_model


def row(wiki: float, c4: float, held_out: float = 10.0) -> dict:
    return {"perplexity": {"wiki": wiki, "c4": c4}, "held_out": held_out, "command_seconds": 60.0, "commit": "c0ffee"}


FOUND = {
    "dense": row(20.0, 30.0),
    "healed-dense-3e-05": row(15.0, 27.0, 9.5),
    "healed-dense-0.0001": row(14.0, 28.0, 9.0),
    "healed-20-0.0001": row(15.4, 33.6),
    "healed-40-distilled-0.0003": row(21.0, 42.0),
    "healed-dense-0.0001-120000": row(16.0, 29.0),
    "healed-40-0.0003-120000": row(24.0, 43.5),
    "healed-dense-0.0001-120000-own-text": row(20.0, 30.0),
    "healed-20-all-0.001-120000-own-text": row(22.0, 36.0),
}


def test_healed_rows_are_held_against_the_dense_model_of_the_same_tokens():
    bars = [(bar["claim"].split(":")[0], bar["measured"], bar["held"]) for bar in tensor_network.bars(FOUND)]
    assert bars == [
        ("healed-20", 1.1, True), ("healed-20", 1.2, False), ("healed-40-distilled", 1.5, False), ("healed-40-distilled", 1.5, False),
        ("healed-40, 120000 tokens", 1.5, False), ("healed-40, 120000 tokens", 1.5, False),
        ("healed-20-all, 120000 tokens, own text", 1.1, True), ("healed-20-all, 120000 tokens, own text", 1.2, False),
    ]  # fmt: skip


def test_rows_that_go_on_with_the_norms_are_held_against_both_controls():
    names = ["healed-dense-3e-05", "healed-dense-norms-3e-05", "healed-20-own-distilled-norms-3e-05"]
    rows = {"dense": row(20.0, 30.0)} | dict(zip(names, (row(19.0, 30.0), row(18.0, 31.0), row(20.9, 33.0)), strict=True))
    bars = [(bar["claim"].split(", times ")[1], bar["measured"], bar["held"]) for bar in tensor_network.bars(rows)]
    worse = [("dense", 1.1, True)]  # what norms have made of the control on the second text
    assert bars == [("healed-dense", 1.1, True), ("healed-dense", 1.1, True), ("healed-dense-norms", 1.1611, False), *worse]


def test_a_control_that_training_made_worse_is_none():
    rows = {"dense": row(20.0, 30.0), "healed-dense-3e-05": row(22.0, 27.0), "healed-20-distilled-3e-05": row(24.0, 32.4)}
    bars = [(bar["claim"].split(", times ")[1], bar["measured"], bar["held"]) for bar in tensor_network.bars(rows)]
    assert bars == [("dense", 1.2, False), ("healed-dense", 1.2, False)]


def test_models_of_own_text_are_calibrated_on_it(tmp_path, monkeypatch):
    options = argparse.Namespace(
        own_text=True,
        tokens=120_000,
        epochs=1,
        calibration=["a.txt", "b.txt"],
        work=tmp_path,
        model="model",
        device="cpu",
        dtype="auto",
        text=[],
    )
    (tmp_path / "own-text-140-512.txt").write_text("written")
    seen = []
    monkeypatch.setattr(tensor_network, "compressed", lambda options, *arguments: seen.append(arguments))
    todo = tensor_network.steps(options)
    for name in ("tensor-network-20", "tensor-network-20-own"):
        todo[name]()
    plain = tensor_network.recipe("tensor-network-20")
    changed = plain | {"calibration": plain["calibration"] | {"num_sequences": 256, "batch_size": 16}}
    own = ("tensor-network-20-own", changed, ["a.txt", "b.txt", str(tmp_path / "own-text-140-512.txt")])
    assert seen == [("tensor-network-20", plain), own]
    assert "healed-20-own-distilled-3e-05-120000-own-text" in todo
    options.epochs, options.tokens = 2, 240_000  # the same windows, and so the same own text
    assert "healed-20-own-distilled-3e-05-240000-2-epochs-own-text" in tensor_network.steps(options)
    tensor_network.steps(options)["tensor-network-20-own"]()
    assert seen[-1] == own
    options.own_text = False
    assert [name for name in tensor_network.steps(options) if "-own" in name] == []


@torch.no_grad()
def test_the_teacher_of_own_text_never_ends_it():
    model, inputs = tiny_model("llama"), tiny_inputs("llama", 2, 8)
    before, end = model(**inputs).logits, model.config.eos_token_id
    model.register_forward_hook(tensor_network.never_ending)
    after = model(**inputs).logits
    assert after.softmax(-1)[..., end].max() == 0
    rest = torch.arange(before.shape[-1]) != end
    torch.testing.assert_close(after.softmax(-1)[..., rest], before[..., rest].softmax(-1))
    torch.testing.assert_close(divergence(before, after), -(1 - before.softmax(-1)[..., end]).log().mean())
