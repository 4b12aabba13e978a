"""CRIC: channels that score low and cannot be spared stay, and a stopped cycle ends alike."""

import copy

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_compact import HessoCallback, HessoConfig
from hf_compact.errors import ConfigError, FormatError
from hf_compact.groups import find_groups
from hf_compact.methods.pruning.callback import KEPT, SHRINKING
from hf_compact.methods.pruning.cric import FILE_NAME, Correction
from tests.conftest import tiny_model
from tests.methods.pruning.test_hesso import PAPER

#: (layer, channel, token it answers to, token that must follow, residual dimension it reads, that it writes)
PLANTED = ((0, 7, 300, 310, 28, 29), (2, 50, 301, 311, 30, 31))
SETTINGS = {"target": 0.2, "unit": "groups", "kinds": ("channels",), "channel_multiple": 1, "warm_up_steps": 1, "pruning_steps": 4,
            "periods": 1, "cric_cycles": 3, "cric_steps": 4, **PAPER}  # fmt: skip


def rows(number: int = 24, seed: int = 0) -> torch.Tensor:
    """Words that follow each other by rule, and after some the planted tokens and what must follow them."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, 200, (number, 4), generator=generator)
    parts = [words, (words * 7) % 197 + 3]
    for _, _, token, answer, _, _ in PLANTED:
        parts += [torch.full((number, 4), token), torch.full((number, 4), answer)]
    return torch.stack(parts, 2).flatten(1)


@torch.no_grad()
def plant_(model) -> None:
    """Small weights that read a loud dimension and write one that the head hears well: their task is solved beyond doubt."""
    for layer, channel, token, answer, reads, writes in PLANTED:
        model.model.embed_tokens.weight[:, [reads, writes]] = 0
        model.model.embed_tokens.weight[:, reads] = -3.0
        model.model.embed_tokens.weight[token, reads] = 3.0
        model.lm_head.weight[:, [reads, writes]] = 0
        model.lm_head.weight[answer, writes] = 30.0
        for number, block in enumerate(model.model.layers):
            block.self_attn.o_proj.weight[[reads, writes]] = 0
            block.mlp.down_proj.weight[[reads, writes]] = 0
            for reader in (
                block.self_attn.q_proj,
                block.self_attn.k_proj,
                block.self_attn.v_proj,
                block.mlp.gate_proj,
                block.mlp.up_proj,
            ):
                reader.weight[:, [reads, writes]] = 0
            if number == layer:
                block.post_attention_layernorm.weight[reads] = 20.0
        mlp = model.model.layers[layer].mlp
        mlp.gate_proj.weight[channel] = mlp.up_proj.weight[channel] = 0
        mlp.down_proj.weight[:, channel] = 0
        mlp.gate_proj.weight[channel, reads] = mlp.up_proj.weight[channel, reads] = 0.2
        mlp.down_proj.weight[writes, channel] = 0.2


@pytest.fixture(scope="module")
def trained():
    model = tiny_model("llama_untied")
    plant_(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    for step in range(30):
        ids = rows(8, seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(error < 1e-3 for error in errors(model))
    return model


@torch.no_grad()
def errors(model) -> list[float]:
    """Cross-entropy behind each of the planted tokens."""
    ids = rows(seed=100)
    logits = model.eval()(input_ids=ids).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return [float(losses[ids[:, :-1] == token].mean()) for _, _, token, *_ in PLANTED]


def train(model, callback, folder, resume=None, **settings) -> None:
    args = TrainingArguments(
        str(folder), per_device_train_batch_size=4, learning_rate=3e-4, max_steps=callback.config.last_step, report_to=[], use_cpu=True,
        disable_tqdm=True, save_steps=3, max_grad_norm=0.0, **settings,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in rows()]
    Trainer(model, args, train_dataset=data, callbacks=[callback]).train(resume_from_checkpoint=resume)


def test_what_is_frozen_is_put_back_too():
    """A trial shrinks every weight of a group, whoever trains it."""
    model = tiny_model("llama_untied")
    for block in model.model.layers:
        block.mlp.down_proj.requires_grad_(False)
    sets = find_groups(model, ("channels",))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    correction = Correction(model, sets)
    for group_set in sets:
        group_set.scale_(torch.arange(4), 0)
    correction.end_cycle(model, 1)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


class Watched(HessoCallback):
    """Keeps the states of the last step."""

    def restore_(self, model):
        self.last = [self.states(group_set).clone() for group_set in self.sets]
        super().restore_(model)


@pytest.mark.parametrize("is_uniform", [True, False], ids=["uniform", "free"])
def test_what_cannot_be_spared_survives_with_cric_only(trained, tmp_path, is_uniform):
    found = {}
    for cric in (False, True):
        model, callback = copy.deepcopy(trained), Watched(**SETTINGS | {"cric": cric, "is_uniform": is_uniform})
        train(model, callback, tmp_path, save_strategy="no")
        found[cric] = [int(callback.last[layer][channel]) for layer, channel, *_ in PLANTED], errors(model)
        assert sum(int((states != KEPT).sum()) for states in callback.last) == 3 * callback.counts["channels"]
    assert found[False][0] == [SHRINKING, SHRINKING]
    assert min(found[False][1]) > 1
    assert found[True][0] == [KEPT, KEPT]
    assert max(found[True][1]) < 0.05


def test_cycles_put_the_weights_back_and_try_what_they_choose(trained):
    model, callback = copy.deepcopy(trained), HessoCallback(**SETTINGS | {"cric": True, "warm_up_steps": 0})
    callback.prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    tried: set[int] = set()
    for step in range(12):
        correction = callback.correction
        ids = rows(4, seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        callback.before_update(model, step)
        optimizer.step()
        callback.step(model, step + 1, 1e-3)
        optimizer.zero_grad()
        correction = callback.correction or correction
        if callback.correction is not None and step % 4 == 3:
            assert all(torch.equal(p, correction.reference[name]) for name, p in model.named_parameters())
        elif callback.correction is not None:
            tried |= set(correction.is_trial.nonzero()[:, 0].tolist())
            assert correction.num_samples == step + 1
    assert callback.correction is None
    chosen = torch.cat([callback.states(group_set) for group_set in callback.sets]).nonzero()[:, 0].tolist()
    assert len(chosen) == 3 * callback.counts["channels"]
    assert set(chosen) <= tried
    assert len(tried) > len(chosen)  # what was planted was tried and spared


@pytest.mark.parametrize("stop", [3, 9], ids=["in the first cycle", "after the first"])
def test_a_stopped_cycle_ends_with_the_same_weights(trained, tmp_path, stop):
    first, second = copy.deepcopy(trained), copy.deepcopy(trained)
    settings = SETTINGS | {"cric": True}
    train(first, HessoCallback(**settings), tmp_path)
    assert (tmp_path / "checkpoint-3" / FILE_NAME).is_file()
    train(second, HessoCallback(**settings), tmp_path, resume=str(tmp_path / f"checkpoint-{stop}"))
    assert first.state_dict().keys() == second.state_dict().keys()
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    if stop == 3:
        (tmp_path / "checkpoint-3" / FILE_NAME).unlink()
        with pytest.raises(FormatError, match=r"checkpoint-3 lacks cric\.safetensors"):
            train(copy.deepcopy(trained), HessoCallback(**settings), tmp_path, resume=str(tmp_path / "checkpoint-3"))


def test_cycles_of_other_groups_are_refused(trained):
    sets = find_groups(trained, ("channels",))
    with pytest.raises(FormatError, match=r"cric\.safetensors was written for other groups"):
        Correction(trained, sets).load_(Correction(trained, sets[:1]).tensors())


def test_settings(tmp_path):
    config = HessoConfig(cric=True, warm_up_steps=3, cric_cycles=2, cric_steps=5, pruning_steps=7)
    assert (config.first_step, config.period_steps, config.last_step) == (14, 7, 20)
    with pytest.raises(ConfigError, match="cric_cycles and cric_steps must be at least 1, loss at least 0"):
        HessoConfig(cric_steps=0)
    model = tiny_model("llama")
    args = TrainingArguments(str(tmp_path), max_steps=5, report_to=[], use_cpu=True, max_grad_norm=0.0)
    data = [{"input_ids": row, "labels": row} for row in rows(4)]
    with pytest.raises(ConfigError, match=r"cric_cycles \* cric_steps must be at most the 5 steps of the run, got 17"):
        Trainer(model, args, train_dataset=data, callbacks=[HessoCallback(**SETTINGS | {"cric": True})]).train()


def test_clipped_gradients_are_refused(tmp_path):
    args = TrainingArguments(str(tmp_path), max_steps=20, report_to=[], use_cpu=True)  # the default clips to 1.0
    data = [{"input_ids": row, "labels": row} for row in rows(4)]
    with pytest.raises(ConfigError, match=r"max_grad_norm must be 0 with hesso\.cric, .*, got 1\.0"):
        Trainer(tiny_model("llama"), args, train_dataset=data, callbacks=[HessoCallback(**SETTINGS | {"cric": True})]).train()
