"""HESSO in a stock Trainer: the schedule is exact, a stopped run ends alike, ranks agree, the result is ordinary."""

import copy
import json
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments

import hf_compact
from hf_compact import (
    HessoCallback,
    HessoConfig,
    MaskCallback,
    SortedNetCallback,
    SortedNetConfig,
    SparsityConfig,
    SpeedConfig,
)
from hf_compact.arch import as_linear
from hf_compact.calibration import from_batches
from hf_compact.capture import input_moments
from hf_compact.errors import ConfigError, FormatError, UnsupportedModel
from hf_compact.functional.gram import centered, output_energy
from hf_compact.groups import cut_zeros_, find_groups
from hf_compact.methods.pruning import callback as callback_module
from hf_compact.methods.pruning.callback import KEPT, PRUNED, SHRINKING
from hf_compact.methods.pruning.functional import lowest, refit_columns, unit_energy
from hf_compact.methods.sparsity import MaskTraining
from tests.conftest import tiny_inputs, tiny_model
from tests.ranks import run_ranks

SETTINGS = {"target": 0.3, "warm_up_steps": 1, "pruning_steps": 6, "periods": 2, "channel_multiple": 4}


PAPER = {
    "output": 0.0, "magnitude": 0.2, "avg_magnitude": 0.2, "cosine": 0.2, "taylor_first": 0.2, "taylor_second": 0.2,
}  # fmt: skip


def padded(family: str, seed: int) -> dict[str, torch.Tensor]:
    """A batch of two rows, the second one shorter."""
    return tiny_inputs(family, seed=seed) | {"attention_mask": (torch.arange(24) < torch.tensor([[24], [15]])).long()}


BATCHES = [padded("llama", seed) for seed in (50, 51, 52)]


class Tokens(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = tiny_inputs("llama", 1, 16, index)["input_ids"][0]
        return {"input_ids": ids, "labels": ids}


def train(model, callback, folder: Path, resume: str | None = None, **settings) -> Trainer:
    args = TrainingArguments(
        str(folder), per_device_train_batch_size=2, learning_rate=1e-3, report_to=[], save_steps=3, use_cpu=True, disable_tqdm=True,
        logging_steps=1, **({"max_steps": 9} | settings),
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=Tokens(), callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def block_parameters(model) -> int:
    return sum(p.numel() for p in model.model.layers.parameters())


class Energies(HessoCallback):
    """Notes the energy of each block after every step."""

    def step(self, model, step, learning_rate):
        super().step(model, step, learning_rate)
        energies = {s.block: s.slices[-1].module.pruning_energy.clone() for s in self.sets if s.kind == "channels"}
        self.seen = [*getattr(self, "seen", []), energies]


class Watched(HessoCallback):
    """Notes after every step how many groups are zero, and in which state they are."""

    def step(self, model, step, learning_rate):
        super().step(model, step, learning_rate)
        self.seen = [*getattr(self, "seen", []), [len(s.zero_groups()) for s in self.sets]]
        self.marks = [torch.bincount(self.states(s), minlength=3).tolist() for s in self.sets]


@pytest.mark.parametrize("extra", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}, {"optim": "sgd"}], ids=str)
def test_the_schedule_is_exact(extra, tmp_path):
    model, callback = tiny_model("llama"), Watched(**SETTINGS)
    dense = block_parameters(model)
    train(model, callback, tmp_path, **extra)
    channels, heads = callback.counts["channels"], callback.counts["kv_heads"]
    assert heads == 0
    assert [zeros[0] for zeros in callback.seen] == [0] * 3 + [channels // 2] * 3 + [channels] * 3
    assert all(
        marks[KEPT] == s.num_groups - callback.counts[s.kind] for marks, s in zip(callback.marks, callback.sets, strict=True)
    )
    assert model.config.intermediate_size == 72 - channels
    removed = 1 - block_parameters(model) / dense
    assert removed <= 0.3 < removed + 4 * 3 * 32 * 3 / dense
    found = json.loads((tmp_path / "pruning_report.json").read_text())
    assert found["before"]["parameters"] - found["after"]["parameters"] == dense - block_parameters(model)
    assert [of["channels"] for of in found["removed"].values()] == [pytest.approx(channels / 72)] * 3
    assert (tmp_path / "removed.png").is_file()
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.state_dict().keys() == model.state_dict().keys()
    assert not any("pruning" in name for name in again.state_dict())


@pytest.mark.parametrize("unit", ["parameters", "bytes", "macs", "groups"])
def test_the_target_counts_what_it_says(unit):
    model = tiny_model("llama")
    callback = HessoCallback(**SETTINGS | {"unit": unit, "target": 0.5, "channel_multiple": 1})
    callback.prepare(model)
    shares = []
    for group_set in callback.sets:
        group_set.scale_(torch.arange(callback.counts[group_set.kind]), 0)
        shares.append(callback.counts[group_set.kind] / group_set.num_groups)
    dense, weights = block_parameters(model), sum(p.numel() for p in model.model.layers.parameters() if p.dim() > 1)
    callback.finalize(model)
    if unit == "groups":
        assert shares == [0.5] * 6
    else:
        left = (
            block_parameters(model) if unit != "macs" else sum(p.numel() for p in model.model.layers.parameters() if p.dim() > 1)
        )
        whole = weights if unit == "macs" else dense
        assert abs(1 - left / whole - 0.5) <= 3 * 32 / (2 * whole) * 3


@pytest.mark.parametrize("has_batches", [False, True], ids=["training's energies", "first those of batches"])
@pytest.mark.parametrize("is_uniform", [True, False], ids=["uniform", "free"])
def test_a_run_stopped_in_a_period_ends_with_the_same_weights(is_uniform, has_batches, tmp_path):
    settings = SETTINGS | {"is_uniform": is_uniform, "kinds": ("channels", "query_heads")}
    settings |= {"batches": BATCHES} if has_batches else {}
    model, again = tiny_model("llama"), tiny_model("llama")
    train(model, HessoCallback(**settings), tmp_path)
    train(again, HessoCallback(**settings), tmp_path, resume=str(tmp_path / "checkpoint-3"))
    first, second = model.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_blocks_that_compete_lose_as_much_in_all(tmp_path):
    model, callback = tiny_model("llama"), Watched(**SETTINGS | {"is_uniform": False})
    model.model.layers[1].mlp.down_proj.weight.data *= 1e-3
    model.model.layers[1].mlp.up_proj.weight.data *= 1e-3
    train(model, callback, tmp_path)
    widths = [layer.mlp.up_proj.out_features for layer in model.model.layers]
    assert widths[1] < min(widths[0], widths[2])
    assert widths[1] >= 0.2 * 72
    assert sum(callback.seen[-1][::2]) == 3 * callback.counts["channels"]
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(**tiny_inputs("llama")).logits, model.eval()(**tiny_inputs("llama")).logits)


@pytest.mark.parametrize(("width", "multiple"), [(256, 32), (72, 32)], ids=["whole multiples", "a rest"])
def test_blocks_that_compete_lose_all_that_is_zeroed(width, multiple):
    model = tiny_model("llama", intermediate_size=width).train()
    model.model.layers[1].mlp.down_proj.weight.data *= 0.3
    callback = HessoCallback(
        target=0.5, unit="groups", pruning_steps=3, periods=3, kinds=("channels",), channel_multiple=multiple, is_uniform=False
    )
    callback.prepare(model)
    for step in range(callback.config.last_step):
        model(**tiny_inputs("llama", seed=step))
        callback.before_update(model, step)
        callback.step(model, step + 1, 0.0)
    zeroed = sum(len(group_set.zero_groups()) for group_set in callback.sets)
    assert zeroed == 3 * callback.counts["channels"]
    callback.finalize(model)
    widths = [layer.mlp.up_proj.out_features for layer in model.model.layers]
    assert 3 * width - sum(widths) == zeroed
    assert all(kept % multiple == 0 for kept in widths)
    assert 0.5 - multiple / width < zeroed / (3 * width) <= 0.5
    assert width != 256 or widths[1] < min(widths[0], widths[2])


def test_the_residual_stream_on_request(tmp_path):
    model, callback = tiny_model("llama"), HessoCallback(**SETTINGS | {"kinds": ("hidden",), "target": 0.25})
    dense = block_parameters(model)
    train(model, callback, tmp_path)
    assert (model.config.hidden_size, model.config.head_dim) == (24, 8)
    assert block_parameters(model) == 0.75 * dense
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(**tiny_inputs("llama")).logits, model.eval()(**tiny_inputs("llama")).logits)


def test_dead_channels_go_first_and_chosen_ones_fall_linearly():
    model, callback = (
        tiny_model("llama"),
        HessoCallback(target=0.3, pruning_steps=4, periods=1, channel_multiple=1, kinds=("channels",), **PAPER),
    )
    mlp = model.model.layers[0].mlp
    for dead in (5, 40):
        mlp.gate_proj.weight.data[dead] = mlp.up_proj.weight.data[dead] = mlp.down_proj.weight.data[:, dead] = 1e-6
    callback.prepare(model)
    start = mlp.up_proj.weight.detach().clone()
    for step in range(4):  # no optimizer: only the callback moves the weights
        callback.before_update(model, step)
        callback.step(model, step + 1, 0.0)
        states = callback.states(callback.sets[0])
        assert int((states == SHRINKING).sum()) == callback.counts["channels"]
        assert {5, 40} <= set((states == SHRINKING).nonzero()[:, 0].tolist())
        torch.testing.assert_close(mlp.up_proj.weight[states == SHRINKING], start[states == SHRINKING] * (3 - step) / 4)
        assert torch.equal(mlp.up_proj.weight[states == KEPT], start[states == KEPT])
    assert len(find_groups(model, ("channels",))[0].zero_groups()) == callback.counts["channels"]
    assert PRUNED not in states


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_channels_that_add_nothing_go_first_however_large_they_are(family):
    model = tiny_model(family).train()
    callback = HessoCallback(target=0.1, unit="groups", pruning_steps=4, periods=1, channel_multiple=1, kinds=("channels",))
    callback.prepare(model)
    silent = {5, 40}
    for group_set in callback.sets:
        for part in group_set.slices:  # what reads them is large, and what makes them is zero
            is_read = part is group_set.slices[-1]
            part.parameter.data.index_fill_(part.dim, part.positions(torch.tensor(sorted(silent))), 100.0 if is_read else 0.0)
    model(**tiny_inputs(family))
    callback.before_update(model, 0)
    callback.step(model, 1, 0.0)
    for group_set in callback.sets:
        chosen = set((callback.states(group_set) == SHRINKING).nonzero()[:, 0].tolist())
        assert silent <= chosen
        assert len(chosen) == callback.counts["channels"]
    halved = group_set.slices[-1].module.pruning_energy.clone()
    model.eval()(**tiny_inputs(family))
    callback.step(model, 2, 0.0)
    assert torch.equal(group_set.slices[-1].module.pruning_energy, halved)  # evaluation is not counted


@torch.no_grad()
def wanda_sp(model, sets, num_removed: int) -> list[list[int]]:
    """What the one-shot score takes out of each block, from the inputs of the dense model."""
    grams = {}

    def add(module, args):
        rows = args[0].view(2, 24, -1)[batch["attention_mask"].bool()].double()
        grams[module] = grams.get(module, 0) + rows.T @ rows

    handles = [group_set.slices[-1].module.register_forward_pre_hook(add) for group_set in sets]
    for batch in BATCHES:
        model.eval()(**batch)
    for handle in handles:
        handle.remove()
    found = []
    for group_set in sets:
        reader = group_set.slices[-1]
        weight = reader.parameter if reader.dim else reader.parameter.T
        scores = unit_energy(weight, grams[reader.module], reader.index)
        found.append(lowest(scores, num_removed, group_set.num_groups).sort().values.tolist())
    return found


@pytest.mark.parametrize("warm_up_steps", [0, 2])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_with_batches_the_first_choice_is_that_of_wanda_sp(family, warm_up_steps):
    model, one_shot = tiny_model(family), tiny_model(family)
    stage = {"method": "pruning", "channel_sparsity": 0.25, "score": "wanda_sp", "compensation": "none", "channel_multiple": 1}
    hf_compact.compress(one_shot, {"stages": [stage]}, calibration=from_batches(BATCHES))
    callback = HessoCallback(
        batches=BATCHES, target=0.5, unit="groups", warm_up_steps=warm_up_steps, pruning_steps=4, periods=2, channel_multiple=1,
        kinds=("channels",),
    )  # fmt: skip
    callback.prepare(model)
    width = callback.sets[0].num_groups
    expected = wanda_sp(model, callback.sets, width // 4)
    kept = find_groups(one_shot, ("channels",))[0].slices[0].parameter  # later blocks are chosen behind pruned ones
    first = callback.sets[0].slices[0]
    stays = torch.tensor([channel for channel in range(width) if channel not in expected[0]])
    assert torch.equal(kept, first.parameter.index_select(first.dim, first.positions(stays)))
    model.train()
    for step in range(warm_up_steps + 1):  # no optimizer, so the weights are the dense model's
        model(**tiny_inputs(family, seed=step))
        callback.before_update(model, step)
        callback.step(model, step + 1, 0.0)
    assert [(callback.states(s) == SHRINKING).nonzero()[:, 0].tolist() for s in callback.sets] == expected
    readers = [group_set.slices[-1].module for group_set in callback.sets]
    first_choice = [reader.pruning_energy.clone() for reader in readers]
    model(**tiny_inputs(family, seed=9))
    callback.step(model, warm_up_steps + 2, 0.0)
    assert all(bool((now.pruning_energy > was).any()) for now, was in zip(readers, first_choice, strict=True))


def test_batches_leave_the_modes_of_a_model_alone():
    model = tiny_model("llama", attention_dropout=0.5).train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    callback = HessoCallback(**SETTINGS, batches=BATCHES)
    callback.prepare(model)
    assert [module.training for module in model.modules()] == modes
    assert model.config.use_cache
    quiet = tiny_model("llama")
    HessoCallback(**SETTINGS, batches=BATCHES).prepare(quiet)
    mine, theirs = ([m.pruning_energy for m in of.modules() if hasattr(m, "pruning_energy")] for of in (model, quiet))
    assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))
    assert all(energy.min() > 0 and not energy.requires_grad for energy in mine)


def refitted(family, batches):
    """A model in which the channels of the first choice have just been replaced."""
    model = tiny_model(family)
    settings = {"target": 0.25, "unit": "groups", "kinds": ("channels",), "periods": 1, "channel_multiple": 4}
    callback = HessoCallback(compensation="refit", batches=batches, **settings)
    callback.prepare(model)
    callback.step(model, 1, 1e-3)
    return model, callback


@pytest.mark.parametrize(
    ("family", "reader"),
    [("llama", "model.layers.0.mlp.down_proj"), ("gpt2", "transformer.h.0.mlp.c_proj"), ("opt", "model.decoder.layers.0.fc2")],
)
def test_a_refit_is_that_of_one_shot(family, reader):
    """In the first block, whose inputs are the same there; what is chosen is zero at once."""
    batches = [padded(family, seed) for seed in (50, 51, 52)]
    model, callback = refitted(family, batches)
    group_set = callback.sets[0]
    assert {*callback.states(group_set).tolist()} == {KEPT, PRUNED}
    assert len(group_set.zero_groups()) == callback.counts["channels"]
    callback.finalize(model)
    expected = tiny_model(family)
    stage = {"method": "pruning", "channel_sparsity": 0.25, "score": "obs", "compensation": "refit", "channel_multiple": 4}
    hf_compact.compress(expected, {"stages": [stage]}, calibration=from_batches(batches))
    for name, parameter in expected.get_submodule(reader).named_parameters():
        torch.testing.assert_close(model.get_submodule(reader).get_parameter(name), parameter, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "t5"])
def test_a_refit_takes_over_the_output_of_what_goes(family):
    batches = [tiny_inputs(family, seed=seed) for seed in (50, 51, 52)]
    dense = tiny_model(family)
    model, callback = refitted(family, batches)
    readers = [s.slices[-1].module for s in callback.sets]
    names = [name for name, module in model.named_modules() if module in readers]
    for name, (gram, total) in input_moments(dense, names, batches).items():
        gram = gram if model.get_submodule(name).bias is None else centered(gram, total)
        before, after = (as_linear(m.get_submodule(name)).weight.double() for m in (dense, model))
        zeroed = before * (after != 0).any(0)
        assert (after == 0).all(0).any(), name
        assert output_energy(before - after, gram) < 0.8 * output_energy(before - zeroed, gram)


@pytest.mark.parametrize("is_uniform", [True, False], ids=["uniform", "competing"])
def test_the_schedule_is_exact_with_a_refit(is_uniform, tmp_path):
    settings = SETTINGS | {"compensation": "refit", "is_uniform": is_uniform}
    dense = tiny_model("llama")
    callback = HessoCallback(batches=BATCHES, **settings)
    trainer = train(copy.deepcopy(dense), callback, tmp_path / "whole")
    widths = [layer.mlp.up_proj.out_features for layer in trainer.model.model.layers]
    assert sum(widths) == 3 * (72 - callback.counts["channels"])
    assert not is_uniform or len({*widths}) == 1
    stopped = HessoCallback(batches=BATCHES, **settings)
    again = train(copy.deepcopy(dense), stopped, tmp_path / "again", resume=str(tmp_path / "whole" / "checkpoint-3"))
    weights = trainer.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in again.model.state_dict().items())


def test_later_units_cost_no_less_than_earlier_ones(monkeypatch):
    model = tiny_model("llama")
    callback = HessoCallback(target=0.3, compensation="refit", batches=BATCHES, is_uniform=False)
    callback.prepare(model)
    monkeypatch.setattr(
        callback_module, "select_by_residual", lambda *args: (torch.tensor([5, 3, 4]), torch.tensor([1.0, 3.0, 2.0]).double())
    )
    group_set = next(s for s in callback.sets if s.kind == "channels")
    found = callback._residuals(group_set, torch.eye(72), torch.ones(73), callback.counts)
    assert found[[5, 3, 4]].tolist() == [1.0, 3.0, 3.0]
    assert found[:3].isinf().all()


def test_a_refit_leaves_less_error_than_none():
    """Of the logits, untrained, on other inputs than it was fitted to."""
    found = {}
    for compensation in ("none", "refit"):
        model = tiny_model("llama")
        batches = [tiny_inputs("llama", seed=seed) for seed in range(60, 64)]
        inputs = tiny_inputs("llama", seed=64)
        with torch.no_grad():
            before = model(**inputs).logits
            callback = HessoCallback(target=0.3, pruning_steps=4, periods=4, batches=batches, compensation=compensation)
            callback.prepare(model)
            for step in range(1, 5):
                callback.step(model, step, 0.0)
            found[compensation] = (callback.finalize(model)(**inputs).logits - before).norm().item()
    assert found["refit"] < 0.95 * found["none"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compensation": "bias"}, "compensation must be one of none, refit, got 'bias'"),
        ({"compensation": "refit"}, "compensation refit needs batches to fit to, got none"),
        ({"compensation": "refit", "cric": True}, "compensation must be none with cric"),
        ({"compensation": "refit", "kinds": ("hidden",)}, "and for the kind hidden, which nothing alone reads"),
        ({"damp": 2.0}, r"damp must be in \[0, 1\], got 2.0"),
    ],
)
def test_compensations_that_do_not_fit(settings, message):
    with pytest.raises(ConfigError, match=message):
        HessoCallback(**settings)


def test_batches_need_the_score_they_fill():
    with pytest.raises(ConfigError, match=r"hesso\.output must be above 0 with batches, .* got 0"):
        HessoCallback(**SETTINGS, **PAPER, batches=BATCHES)


@pytest.mark.parametrize("is_bf16", [False, True], ids=["float32", "bf16"])
def test_the_report_times_dense_and_pruned_on_request(is_bf16, tmp_path):
    model, plain = tiny_model("llama"), tiny_model("llama")
    speed = SpeedConfig(prompt_tokens=8, new_tokens=3, repeats=2)
    handle = model.register_forward_hook(partial(lambda *args: None, (row for row in ())))  # a generator cannot be copied
    train(model, HessoCallback(**SETTINGS, speed=speed), tmp_path / "timed", bf16=is_bf16, save_strategy="no")
    handle.remove()
    train(plain, HessoCallback(**SETTINGS), tmp_path / "plain", bf16=is_bf16, save_strategy="no")
    timed, untimed = (json.loads((tmp_path / name / "pruning_report.json").read_text()) for name in ("timed", "plain"))
    for side in ("before", "after"):
        seconds = {key: timed[side].pop(key) for key in ("prefill_seconds", "decode_seconds")}
        assert all(0 < value < 60 for value in seconds.values())
        assert all(untimed[side].pop(key) is None for key in seconds)
    assert timed == untimed
    assert all(torch.equal(model.state_dict()[name], value) for name, value in plain.state_dict().items())


def test_what_cannot_be_timed_is_refused_before_training():
    with pytest.raises(UnsupportedModel, match="speed must be None for a BertModel: it times causal language models"):
        HessoCallback(**SETTINGS, speed=SpeedConfig()).prepare(tiny_model("bert"))
    with pytest.raises(ConfigError, match="must be at most 64, the positions of the LlamaForCausalLM, got 288"):
        HessoCallback(**SETTINGS, speed=SpeedConfig()).prepare(tiny_model("llama", max_position_embeddings=64))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": 1.0}, r"target must be in \(0, 0.95\], got 1.0"),
        ({"unit": "watts"}, "unit must be one of parameters, bytes, macs, groups, got 'watts'"),
        ({"warm_up_steps": 0.1}, "hesso.warm_up_steps must be a whole number, got 0.1"),
        ({"pruning_steps": 10.5}, "hesso.pruning_steps must be a whole number, got 10.5"),
        ({"kinds": ("layers",)}, "kinds must be of channels, kv_heads, query_heads"),
        ({"kinds": ("kv_heads", "query_heads")}, "not both: they share query heads"),
        ({"warm_up_steps": -1}, "warm_up_steps must be at least 0"),
        ({"magnitude": -1.0}, "weights of scores must be at least 0"),
        ({"cosine": float("nan")}, "weights of scores must be at least 0 and not all 0"),
        ({"loss": float("nan")}, "loss at least 0"),
        ({"min_kept": 1.0}, r"min_kept must be in \[0, 1\), got 1.0"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ConfigError, match=message):
        HessoConfig(**settings)


@pytest.mark.parametrize(
    ("family", "settings"),
    [("llama", {}), ("opt", {"dropout": 0.0, "attention_dropout": 0.0}), ("t5", {"dropout_rate": 0.0})],
    ids=["llama", "opt", "t5"],
)
@pytest.mark.parametrize("is_positional", [False, True], ids=["by name", "by position"])
def test_padding_adds_no_energy(family, settings, is_positional):
    model = tiny_model(family, **settings).train()
    callback = HessoCallback(target=0.3, warm_up_steps=9, unit="groups", kinds=("channels",))
    callback.prepare(model)
    lengths = {"input_ids": (24, 15)} | ({"decoder_input_ids": (12, 7)} if family == "t5" else {})
    rows = tiny_inputs(family)
    masks = {
        name.replace("input_ids", "attention_mask"): torch.stack([torch.arange(each[0]) < length for length in each]).long()
        for name, each in lengths.items()
    }

    def energies(batches):
        for group_set in callback.sets:
            group_set.slices[-1].module.pruning_energy.zero_()
        for batch in batches:
            first = (
                [batch.pop(name) for name in ("input_ids", "attention_mask")]
                if is_positional and "attention_mask" in batch
                else ()
            )
            model(*first, **batch)
        callback.step(model, 1, 0.0)
        return [group_set.slices[-1].module.pruning_energy.clone() for group_set in callback.sets]

    alone = [{name: rows[name][row, None, : each[row]] for name, each in lengths.items()} for row in range(2)]
    expected = energies(alone)
    torch.testing.assert_close(energies([rows | masks]), expected, rtol=1e-4, atol=1e-4)


def test_settings_beside_a_config_count():
    assert HessoCallback(HessoConfig(target=0.4), periods=2).config == HessoConfig(target=0.4, periods=2)
    masks = MaskCallback(SparsityConfig(pattern="2:4"), MaskTraining(interval=3), decay=0.1)
    assert masks.training == MaskTraining(interval=3, decay=0.1)
    assert HessoCallback(kinds=["hidden"]).config == HessoConfig(kinds=("hidden",))
    both = SortedNetCallback(SortedNetConfig(seed=3), delay=0.1)
    assert both.config == SortedNetConfig(seed=3, delay=0.1)


def test_a_refit_goes_by_what_is_left():
    """Heads at zero still read something, and have nothing to say: they cannot make up for others."""
    model = tiny_model("llama_untied", num_attention_heads=8, num_key_value_heads=2, head_dim=8)
    batches = [tiny_inputs("llama", 8, 24, seed) for seed in range(8)]
    callback = HessoCallback(
        kinds=("query_heads",),
        compensation="refit",
        batches=batches,
        target=0.5,
        periods=2,
        pruning_steps=4,
        min_kept=0.1,
        damp=0.0,
        unit="groups",
    )
    callback.prepare(model)
    name = "model.layers.1.self_attn.o_proj"
    (heads,) = (group_set for group_set in callback.sets if group_set.block == "model.layers.1")
    gone = torch.tensor([0, 4])
    with torch.no_grad():
        heads.scale_(gone, 0)
        callback.states(heads)[gone] = PRUNED
    gram, total = input_moments(model, [name], batches)[name]
    assert (gram.diagonal().view(8, 8).sum(1)[gone] > 0).all()
    with torch.no_grad():
        found = callback._residuals(heads, gram, total, {"query_heads": 4})
    weight, index = model.get_submodule(name).weight.detach().double(), heads.slices[-1].index

    def cost(head: int) -> float:
        kept = index[[other for other in range(8) if other not in (0, 4, head)]].flatten()
        lost = weight.clone()
        lost[:, kept] -= refit_columns(weight, gram, kept, 0.0)
        return output_energy(lost, gram)

    costs = {head: cost(head) for head in range(8) if head not in (0, 4)}
    first = min(costs, key=costs.get)  # the others cost more once it is gone
    assert found.argmin() == first
    assert found[first].item() == pytest.approx(costs[first], rel=1e-3)


@pytest.mark.parametrize(("kind", "unit"), [("kv_heads", "parameters"), ("query_heads", "macs"), ("query_heads", "bytes")])
def test_heads_alone_meet_the_target_to_one_group(kind, unit):
    """They are no share of their number then, as attention is a part of a block."""
    model = tiny_model("llama", num_attention_heads=16, num_key_value_heads=8, head_dim=8)
    blocks = model.model.layers[0]

    def size() -> int:
        return sum(p.numel() for p in blocks.parameters() if unit != "macs" or p.dim() > 1)

    before, callback = size(), HessoCallback(target=0.3, unit=unit, kinds=(kind,), is_uniform=False)
    callback.prepare(model)
    first = callback.sets[0]
    first.scale_(
        torch.arange(first.num_groups).view(first.num_pools, -1)[:, : callback.counts[kind] // first.num_pools].flatten(), 0
    )
    one = first.num_pools * float(first.sizes()[-1]) / before
    cut_zeros_(model, (kind,), is_uniform=False)
    assert 0.3 - one < 1 - size() / before <= 0.3


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "bert"])
def test_equal_blocks_are_an_ordinary_model(family):
    """Heads stay where the config of the family cannot say how many there are."""
    callback = HessoCallback(**SETTINGS)
    callback.prepare(tiny_model(family))
    assert set(callback.counts) == {"channels"}
    with pytest.raises(ConfigError, match=r"hesso\.is_uniform must be false with kinds kv_heads in a \w+"):
        HessoCallback(kinds=("kv_heads",)).prepare(tiny_model(family))
    callback = HessoCallback(**SETTINGS, is_uniform=False)
    callback.prepare(tiny_model(family))
    assert set(callback.counts) == {"channels", "kv_heads"}


class WithMore(LlamaForCausalLM):
    def __init__(self, config, more=None):
        if more is None:
            raise TypeError("more is missing")
        super().__init__(config)


def test_what_could_not_be_cut_in_the_end_is_refused_before(tmp_path):
    model = tiny_model("llama")
    with pytest.raises(UnsupportedModel, match="a WithMore is not made from its config alone: more is missing"):
        HessoCallback(**SETTINGS).prepare(WithMore(model.config, more=1))
    for adapted in (get_peft_model(tiny_model("llama"), LoraConfig()), tiny_model("llama")):
        if not isinstance(adapted, PeftModel):
            adapted.add_adapter(LoraConfig(target_modules=["q_proj"]))
        for callback in (HessoCallback(**SETTINGS), MaskCallback(), SortedNetCallback()):
            with pytest.raises(UnsupportedModel, match=r"q_proj has an adapter of PEFT: take the model that merge_and_unload"):
                callback.prepare(adapted)
    with pytest.raises(ConfigError, match="HessoCallback needs a model of transformers, got a Linear"):
        HessoCallback(**SETTINGS).prepare(torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="batches must hold model inputs by name, got a Tensor"):
        HessoCallback(batches=iter([torch.zeros(2, 2)]))


@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "MistralForQuestionAnswering", "Qwen2ForTokenClassification"])
def test_other_heads_follow_a_narrower_stream(name, tmp_path):
    base = tiny_model({"L": "llama", "M": "mistral", "Q": "qwen2"}[name[0]])
    model = getattr(transformers, name)(base.config).eval()
    (found,) = find_groups(model, ("hidden",))
    found.scale_(torch.arange(0, 32, 4), 0)
    with torch.no_grad():
        expected = model(**tiny_inputs("llama"))[0]
        assert cut_zeros_(model, ("hidden",)) == {}
        torch.testing.assert_close(model(**tiny_inputs("llama"))[0], expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        again = type(model).from_pretrained(tmp_path)(**tiny_inputs("llama"))[0]
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)


def test_targets_that_cannot_be_met(tmp_path):
    with pytest.raises(ConfigError, match=r"needs \d+ of 72 channels of every block, and hesso\.min_kept 0\.2 forbids it"):
        HessoCallback(target=0.8, kinds=("channels",)).prepare(tiny_model("llama"))
    with pytest.raises(ConfigError, match="is less than one group of a block"):
        HessoCallback(target=0.1, kinds=("kv_heads",)).prepare(tiny_model("llama"))
    message = r"hesso\.target 0\.6 of parameters takes \d\.\d of 2 kv_heads and hesso\.min_kept 0\.2 allows 1, and there are no channels"
    with pytest.raises(ConfigError, match=message):
        HessoCallback(target=0.6, kinds=("kv_heads",)).prepare(tiny_model("llama"))
    with pytest.raises(ConfigError, match=r"takes 28\.8 of 32 hidden and hesso\.min_kept 0\.5 allows 16"):
        HessoCallback(target=0.9, kinds=("hidden",), min_kept=0.5).prepare(tiny_model("llama"))
    model = tiny_model("llama")
    find_groups(model, ("channels",))[1].cut_(model, torch.arange(8))
    with pytest.raises(ConfigError, match=r"needs blocks of one size, and their numbers of channels are \[8, 72\]"):
        HessoCallback(**SETTINGS).prepare(model)
    with pytest.raises(ConfigError, match="must be at most the 4 steps of the run, got 7"):
        train(tiny_model("llama"), HessoCallback(**SETTINGS), tmp_path, max_steps=4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_one_shot_has_pruned_is_pruned_on(family, tmp_path):
    model = tiny_model(family)
    stage = {"method": "pruning", "head_sparsity": 0.5 if family == "gpt2" else 0.0}
    hf_compact.compress(model, {"stages": [stage]}, calibration=from_batches([tiny_inputs(family)]))
    channels, heads = (find_groups(model)[i].num_groups for i in (0, 1))
    settings = {"target": 0.5, "channel_multiple": 1, "is_uniform": family != "gpt2"}  # whose config cannot say fewer heads
    train(model, HessoCallback(**SETTINGS | settings), tmp_path, save_strategy="no")
    assert [found.num_groups for found in find_groups(model, ("kv_heads",))] == [heads // 2] * 3
    assert find_groups(model)[0].num_groups < channels
    model.eval().save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(**tiny_inputs(family)).logits, model(**tiny_inputs(family)).logits)


def test_a_run_that_ends_early_is_told_about(tmp_path, caplog):
    class Stopped(HessoCallback):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            control.should_training_stop = state.global_step == 5

    callback = Stopped(**SETTINGS)
    train(tiny_model("llama"), callback, tmp_path, save_strategy="no")
    assert f"of {3 * callback.counts['channels']} groups are zero and are cut: training ended before the target" in caplog.text


def test_a_checkpoint_of_another_schedule_is_refused(tmp_path):
    train(tiny_model("llama"), HessoCallback(**SETTINGS), tmp_path, max_steps=7)
    for changed in ({"target": 0.2}, {"target": 0.45}, {"periods": 3}, {"pruning_steps": 5, "warm_up_steps": 3}):
        with pytest.raises(FormatError, match=r"after step 3 the schedule has chosen .* and the model has \["):
            train(tiny_model("llama"), HessoCallback(**SETTINGS | changed), tmp_path, resume=str(tmp_path / "checkpoint-3"))


def test_callbacks_that_swap_its_linears_are_refused(tmp_path):
    callbacks = [HessoCallback(**SETTINGS), MaskCallback(SparsityConfig(pattern="2:4"))]
    args = TrainingArguments(str(tmp_path), max_steps=9, report_to=[], use_cpu=True)
    with pytest.raises(ConfigError, match=r"another callback has swapped Linears of model\.layers\.0 that HessoCallback prunes"):
        Trainer(tiny_model("llama"), args, train_dataset=Tokens(), callbacks=callbacks).train()


def _measure_worker(rank: int, folder: str) -> None:
    model = tiny_model("llama")
    HessoCallback(**SETTINGS, batches=BATCHES).prepare(model)
    save_file({name: b for name, b in model.named_buffers() if name.endswith("pruning_energy")}, f"{folder}/{rank}.safetensors")
    save_file(_ranked("flap") | _ranked("taylor"), f"{folder}/one-shot-{rank}.safetensors")


def _ranked(score: str) -> dict[str, torch.Tensor]:
    model = tiny_model("llama")
    HessoCallback(**SETTINGS, one_shot=score, batches=BATCHES).prepare(model)
    return {f"{score} {name}": buffer for name, buffer in model.named_buffers() if "pruning_one_shot" in name}


@pytest.mark.distributed
def test_two_ranks_share_the_batches(tmp_path):
    run_ranks(_measure_worker, str(tmp_path), seconds=120)
    first, second = load_file(tmp_path / "0.safetensors"), load_file(tmp_path / "1.safetensors")
    model = tiny_model("llama")
    HessoCallback(**SETTINGS, batches=BATCHES).prepare(model)
    assert len(first) == 6
    for name, energy in first.items():
        assert torch.equal(energy, second[name])
        torch.testing.assert_close(energy, model.get_buffer(name))
    first, second = load_file(tmp_path / "one-shot-0.safetensors"), load_file(tmp_path / "one-shot-1.safetensors")
    assert len(first) == 12
    assert all(torch.equal(score, second[name]) for name, score in first.items())
    for name, score in _ranked("flap").items():  # the labels that gradients are taken of are drawn rank by rank
        torch.testing.assert_close(first[name], score)


def _refit_worker(rank: int, folder: str) -> None:
    """The second rank rounds otherwise, in what it chooses and in what it fits."""
    model, solve = tiny_model("llama"), callback_module.refit
    if rank == 1:
        callback_module.refit = lambda weight, *args: solve(weight * 1.01, *args)
        callback_module.HessoCallback._residuals = lambda self, group_set, *args: -torch.arange(group_set.num_groups).double()
    train(model, HessoCallback(**SETTINGS, compensation="refit", batches=BATCHES), Path(folder) / "run", ddp_backend="gloo")
    save_file({k: v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}, f"{folder}/{rank}.safetensors")


@pytest.mark.distributed
def test_two_ranks_refit_alike(tmp_path):
    run_ranks(_refit_worker, str(tmp_path), seconds=240)
    first, second = load_file(tmp_path / "0.safetensors"), load_file(tmp_path / "1.safetensors")
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert first["model.layers.0.mlp.up_proj.weight"].shape[0] < 72


def _worker(rank: int, folder: str, broadcast: bool) -> None:
    model, again, callback = tiny_model("llama"), tiny_model("llama"), Energies(**SETTINGS | {"warm_up_steps": 3})
    settings = {"ddp_backend": "gloo", "ddp_broadcast_buffers": broadcast, "gradient_accumulation_steps": 2}
    train(model, callback, Path(folder) / "run", **settings)
    state = {k: v.clone().contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(state | callback.seen[2], f"{folder}/{rank}.safetensors")
    train(again, HessoCallback(callback.config), Path(folder) / "run", resume=f"{folder}/run/checkpoint-3", **settings)
    resumed = again.state_dict()
    assert all(torch.equal(resumed[name], value) for name, value in model.state_dict().items())


@pytest.mark.distributed
@pytest.mark.parametrize("broadcast", [True, False], ids=["buffers of rank 0", "own buffers"])
def test_two_ranks_prune_what_one_does_on_all_batches(broadcast, tmp_path):
    run_ranks(_worker, str(tmp_path), broadcast, seconds=280)
    first, second = load_file(tmp_path / "0.safetensors"), load_file(tmp_path / "1.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert first["model.layers.0.mlp.up_proj.weight"].shape[0] < 72
    alone = Energies(**SETTINGS | {"warm_up_steps": 3})
    train(tiny_model("llama"), alone, tmp_path / "alone", gradient_accumulation_steps=4)
    for block, energy in alone.seen[2].items():
        torch.testing.assert_close(first[block], energy, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("kinds", "heads", "left"), [
    (("channels", "kv_heads"), 8, (32, 8)), (("channels", "query_heads"), 8, (32, 8)), (("hidden",), 6, (24, 6)),
])  # fmt: skip
def test_a_llama_keeps_heads_that_divide_its_width(kinds, heads, left, tmp_path):
    """What transformers refuses to write or to read is not made: channels make up for heads that stay."""
    model = tiny_model("llama", num_attention_heads=heads, num_key_value_heads=heads, hidden_size=32 if heads == 8 else 36)
    before = block_parameters(model)
    train(model, HessoCallback(**SETTINGS | {"kinds": kinds, "target": 0.34}), tmp_path, save_strategy="no")
    model.save_pretrained(tmp_path / "smaller")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "smaller")
    assert (loaded.config.hidden_size, loaded.config.num_attention_heads) == left
    assert not hasattr(loaded.config, "quantization_config")
    if "channels" in kinds:
        assert 1 - block_parameters(loaded) / before == pytest.approx(0.34, abs=0.05)


def test_hidden_dimensions_that_stay_for_the_config_are_told(caplog):
    model = tiny_model("llama", num_attention_heads=6, num_key_value_heads=6, hidden_size=36)
    HessoCallback(**SETTINGS | {"kinds": ("hidden",), "target": 0.45}).prepare(model)
    assert "24 of 36 hidden dimensions stay, for target 0.45 20 would: the config of a LlamaForCausalLM wants" in caplog.text


def test_heads_alone_that_the_config_cannot_say_are_refused():
    model = tiny_model("llama", num_attention_heads=8, num_key_value_heads=8)
    with pytest.raises(ConfigError, match=r"cannot say 5 of 8 kv_heads, as its hidden size has to be a multiple"):
        HessoCallback(**SETTINGS | {"kinds": ("kv_heads",), "target": 0.4, "unit": "groups"}).prepare(model)


@pytest.mark.parametrize("is_uniform", [True, False], ids=["uniform", "free"])
@pytest.mark.parametrize("score", ["magnitude", "wanda_sp", "flap", "taylor", "random"])
def test_groups_of_one_shot_go_in_training(score, is_uniform, tmp_path):
    """What one-shot pruning cuts out of the dense model, of its first block at least, is what training brings to zero."""
    model, dense = tiny_model("llama"), tiny_model("llama")
    given = BATCHES if score in ("wanda_sp", "flap", "taylor") else []
    settings = SETTINGS | {"kinds": ("channels",), "unit": "groups", "target": 0.25, "one_shot": score, "is_uniform": is_uniform}
    callback = HessoCallback(**settings, batches=given)
    watched, ranked = [], []
    callback.restore_ = lambda model, restore=callback.restore_: (
        watched.append([group_set.zero_groups().tolist() for group_set in callback.sets]),
        ranked.append([callback._one_shot(group_set).clone() for group_set in callback.sets]), restore(model),
    )  # fmt: skip
    train(model, callback, tmp_path, save_strategy="no")
    assert sum(map(len, watched[0])) == 3 * callback.counts["channels"]
    if not is_uniform:  # runs of four compete by their mean, so that all that is lost is of low scores, but for part of a run
        scores, gone = (
            torch.cat(ranked[0]),
            torch.cat([torch.isin(torch.arange(72), torch.tensor(numbers)) for numbers in watched[0]]),
        )
        assert scores[gone].mean() < scores[~gone].mean()
        assert gone[scores.argsort()[: len(scores) // 12]].float().mean() > 0.8
    assert not [name for name, _ in model.named_buffers() if "pruning" in name]
    if not is_uniform:
        return
    stage = {"method": "pruning", "score": score, "compensation": "none", "channel_sparsity": 0.25, "channel_multiple": 4}
    hf_compact.compress(dense, {"stages": [stage]}, calibration=from_batches(BATCHES))
    kept = [number for number in range(72) if number not in watched[0][0]]
    assert torch.equal(dense.model.layers[0].mlp.up_proj.weight, tiny_model("llama").model.layers[0].mlp.up_proj.weight[kept])


def test_a_stopped_run_keeps_its_one_shot_scores(tmp_path):
    settings = SETTINGS | {"one_shot": "taylor", "batches": BATCHES}
    first, second = tiny_model("llama"), tiny_model("llama")
    train(first, HessoCallback(**settings), tmp_path)
    train(second, HessoCallback(**settings), tmp_path, resume=str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


@pytest.mark.parametrize(("settings", "message"), [
    ({"one_shot": "flap"}, r"hesso\.one_shot flap needs batches"),
    ({"one_shot": "random", "batches": BATCHES}, r"hesso\.one_shot random reads no batches"),
    ({"one_shot": "random", "cric": True}, r"hesso\.one_shot must be null with cric, .*, got random"),
    ({"one_shot": "magnitude", "kinds": ("hidden",)}, r"for the kind hidden, which nothing alone reads, got magnitude"),
    ({"one_shot": "obs", "batches": BATCHES}, r"one_shot must be .*, got 'obs'"),
])  # fmt: skip
def test_one_shot_scores_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        HessoCallback(**settings)
