"""Nested sub-models: sorting changes nothing, a sub-model in place is the one that is taken out, and all of them learn."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_compact import SortedNetCallback, SortedNetConfig, extract, sort_units_
from hf_compact.errors import ConfigError, UnsupportedModel
from hf_compact.groups import find_groups
from hf_compact.methods.sorted_net import active
from tests.conftest import tiny_inputs, tiny_model
from tests.ranks import run_ranks

PAIRS = [(width, depth) for width in (0.5, 0.75, 1.0) for depth in (1 / 3, 2 / 3, 1.0)]


def output(model, family: str = "llama") -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**tiny_inputs(family))[0]


def loss_of(model) -> float:
    ids = torch.cat([tiny_inputs("llama", 1, 16, seed)["input_ids"] for seed in range(8)])
    with torch.no_grad():
        return float(model.eval()(input_ids=ids, labels=ids).loss)


def train(model, callbacks, folder: Path, resume: str | None = None, **settings) -> None:
    args = TrainingArguments(
        str(folder), **({"per_device_train_batch_size": 2, "max_steps": 6, "learning_rate": 1e-2} | settings), report_to=[], save_steps=3,
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    rows = [tiny_inputs("llama", 1, 16, seed)["input_ids"][0] for seed in range(8)]
    trainer = Trainer(model, args, train_dataset=[{"input_ids": row, "labels": row} for row in rows], callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)


@pytest.mark.parametrize("is_measured", [False, True], ids=["weights", "inputs"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2", "gpt_neox", "opt", "bert", "vit", "t5"])
def test_sorting_changes_no_output_and_puts_the_strong_first(family, is_measured):
    model = tiny_model(family)
    before = output(model, family)
    batches = [tiny_inputs(family, seed=seed) for seed in (1, 2)] if is_measured else []
    assert sort_units_(model, batches) is model
    torch.testing.assert_close(output(model, family), before, rtol=0, atol=2e-5)
    if not is_measured:
        for group_set in find_groups(model, model.config.sorted_units["kinds"]):
            reader = group_set.slices[-1]
            energy = group_set.totals(lambda part, reader=reader: part.parameter.square() * (part is reader))
            assert torch.equal(energy, energy.sort(descending=True).values)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2", "opt"])
def test_a_sub_model_in_place_is_the_one_that_is_taken_out(family, tmp_path):
    model = sort_units_(tiny_model(family))
    for width, depth in PAIRS:
        before = output(model, family)
        with active(model, width, depth):
            inside = output(model, family)
        assert torch.equal(output(model, family), before)
        small = extract(model, width, depth)
        torch.testing.assert_close(output(small, family), inside, rtol=0, atol=1e-5)
        assert small.num_parameters() < model.num_parameters() or (width, depth) == (1.0, 1.0)
    small = extract(model, 0.5, 2 / 3)
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not hasattr(again.config, "quantization_config")
    assert again.config.num_hidden_layers == 2
    ids = tiny_inputs(family, 1, 8)["input_ids"]
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(again.generate(ids, **settings), small.generate(ids, **settings, use_cache=False))


def test_all_sub_models_learn_and_the_whole_one_too(tmp_path):
    start = {pair: loss_of(extract(sort_units_(tiny_model("llama")), *pair)) for pair in PAIRS}
    model, alone = tiny_model("llama"), tiny_model("llama")
    settings = {"max_steps": 60, "save_strategy": "no"}
    train(model, [SortedNetCallback(widths=(0.5, 0.75, 1.0), depths=(1 / 3, 2 / 3, 1.0), num_sampled=2)], tmp_path, **settings)
    train(alone, [], tmp_path, **settings)
    found = {pair: loss_of(extract(model, *pair)) for pair in PAIRS}
    assert all(found[pair] < 0.6 * start[pair] for pair in PAIRS)
    sort_units_(alone)
    assert all(found[pair] < loss_of(extract(alone, *pair)) for pair in PAIRS[:-1])
    assert not model._forward_hooks


@pytest.mark.parametrize("loss", ["labels", "whole"])
def test_accumulation_gives_the_gradients_of_the_whole_batch(loss, tmp_path):
    found = []
    for settings in ({"per_device_train_batch_size": 4}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}):
        model = tiny_model("llama")
        callback = SortedNetCallback(widths=(0.5,), depths=(1.0,), loss=loss)
        train(
            model,
            [callback],
            tmp_path,
            **settings,
            max_steps=2,
            optim="sgd",
            learning_rate=0.1,
            save_strategy="no",
            max_grad_norm=0,
        )
        found.append(model.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5)


def test_the_whole_model_has_its_head_start():
    model = tiny_model("llama").train()
    callback = SortedNetCallback(delay=0.5, num_steps=4)
    callback.prepare(model)
    batch = tiny_inputs("llama")
    with torch.no_grad():
        plain = tiny_model("llama")(**batch, labels=batch["input_ids"]).loss
        for step in range(4):
            callback.begin_step(model, step)
            loss = model(**batch, labels=batch["input_ids"]).loss
            assert torch.isclose(loss, plain, rtol=1e-6) == (step < 2)
    callback.finalize(model)


def test_a_stopped_run_ends_with_the_same_weights(tmp_path):
    model, again = tiny_model("llama"), tiny_model("llama")
    train(model, [SortedNetCallback()], tmp_path)
    train(again, [SortedNetCallback()], tmp_path, resume=str(tmp_path / "checkpoint-3"))
    first, second = model.state_dict(), again.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_cannot_work_is_named():
    with pytest.raises(ConfigError, match="the model is not sorted: call sort_units_"):
        extract(tiny_model("llama"), 0.5)
    model = sort_units_(tiny_model("llama"))
    with pytest.raises(ConfigError, match=r"depth must be in \(0, 1\], got 0"):
        extract(model, 0.5, 0)
    with pytest.raises(UnsupportedModel, match="sub-models need one stack of blocks, a T5ForConditionalGeneration has 2"):
        extract(sort_units_(tiny_model("t5")), 0.5)
    with pytest.raises(UnsupportedModel, match="cannot be left out"):
        extract(sort_units_(tiny_model("bert")), 0.5, 0.5)
    with pytest.raises(ConfigError, match=r"the model is sorted with .*channel_multiple.*: sorted_net\.kinds"):
        SortedNetCallback(channel_multiple=4).prepare(model)
    callback = SortedNetCallback()
    callback.prepare(model.train())
    callback.begin_step(model, 0)
    with pytest.raises(ConfigError, match="sorted_net needs labels in the batch"):
        model(**tiny_inputs("llama"))
    model.activation_checkpointing_enable()
    with pytest.raises(ConfigError, match="cannot be run again by gradient checkpointing"):
        callback.begin_step(model, 0)
    with pytest.raises(ConfigError, match=r"sorted_net\.num_steps must be given"):
        SortedNetCallback(delay=0.5).begin_step(tiny_model("llama"), 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depths": (0.0,)}, r"depths must be in \(0, 1\], got 0.0"),
        ({"widths": (1.0,), "depths": (1.0,)}, "must name at least one sub-model"),
        ({"loss": "none"}, "loss must be one of labels, whole, got 'none'"),
        ({"num_sampled": 0}, "num_sampled and channel_multiple must be at least 1"),
        ({"delay": 1.0}, r"delay must be in \[0, 1\), got 1.0"),
        ({"kinds": ("layers",)}, "kinds must be of channels, kv_heads"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ConfigError, match=message):
        SortedNetConfig(**settings)


def _worker(rank: int, folder: str) -> None:
    model = tiny_model("llama")
    train(model, [SortedNetCallback()], Path(folder) / "run", ddp_backend="gloo", save_strategy="no")
    state = {k: v.clone().contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(state, f"{folder}/{rank}.safetensors")


@pytest.mark.distributed
def test_two_ranks_train_the_same_parts(tmp_path):
    run_ranks(_worker, str(tmp_path), seconds=280)
    first, second = load_file(tmp_path / "0.safetensors"), load_file(tmp_path / "1.safetensors")
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_trainer_with_a_loss_of_its_own_is_refused():
    """A head that is fused with the loss leaves the model's loss unread."""
    model, own = tiny_model("llama"), SortedNetCallback()
    own.prepare(model)
    with pytest.raises(ConfigError, match="asks for fused_lm_head and has its own"):
        model.train()(**tiny_inputs("llama"), fused_lm_head=True)
