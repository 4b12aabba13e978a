"""CRIC: channels that score low and cannot be spared stay, and a stopped cycle ends alike."""

import copy

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from evaluation import planted
from evaluation.planted import DIED, PLANTED, SETTINGS, SURVIVED, errors, rows, train
from hf_compact import HessoCallback, HessoConfig
from hf_compact.errors import ConfigError, FormatError
from hf_compact.groups import find_groups
from hf_compact.methods.pruning.callback import KEPT, SHRINKING
from hf_compact.methods.pruning.cric import FILE_NAME, Correction
from tests.conftest import tiny_inputs, tiny_model


@pytest.fixture(scope="module")
def trained():
    model = planted.model()
    assert all(error < 1e-3 for error in errors(model))
    return model


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
    assert min(found[False][1]) > DIED
    assert found[True][0] == [KEPT, KEPT]
    assert max(found[True][1]) < SURVIVED


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


@pytest.mark.parametrize("stop", [2, 9])
def test_a_training_that_ends_in_a_cycle_leaves_nothing_on_its_way(stop, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            control.should_training_stop = state.global_step == stop

    model = tiny_model("llama")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    callback = HessoCallback(target=0.5, cric=True, cric_steps=10, cric_cycles=2, pruning_steps=10)
    data = [{"input_ids": row, "labels": row} for row in tiny_inputs("llama", 8, 16)["input_ids"]]
    args = TrainingArguments(
        str(tmp_path), max_steps=40, learning_rate=1e-9, max_grad_norm=0, report_to=[], save_strategy="no", disable_tqdm=True,
        use_cpu=True,
    )  # fmt: skip
    Trainer(model, args, train_dataset=data, callbacks=[callback, Stop()]).train()
    assert callback.correction is None
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=1e-6)


def test_scaled_gradients_are_refused(tmp_path):
    args = TrainingArguments(str(tmp_path), max_steps=60, report_to=[], max_grad_norm=0, use_cpu=True)
    args.fp16 = True  # which needs an accelerator
    model = tiny_model("llama")
    callback = HessoCallback(**SETTINGS | {"cric": True})
    callback.prepare(model)
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(ConfigError, match=r"fp16 must be false with hesso\.cric"):
        callback.on_train_begin(args, TrainerState(), TrainerControl(), model=model, optimizer=optimizer)


def test_clipped_gradients_are_refused(tmp_path):
    args = TrainingArguments(str(tmp_path), max_steps=20, report_to=[], use_cpu=True)  # the default clips to 1.0
    data = [{"input_ids": row, "labels": row} for row in rows(4)]
    with pytest.raises(ConfigError, match=r"max_grad_norm must be 0 with hesso\.cric, .*, got 1\.0"):
        Trainer(tiny_model("llama"), args, train_dataset=data, callbacks=[HessoCallback(**SETTINGS | {"cric": True})]).train()
