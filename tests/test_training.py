"""Callbacks that change modules: in a stock Trainer, in a plain loop, stopped and resumed, on two ranks."""

import copy
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

import hf_compact
from hf_compact import DistillationCallback, TensorNetworkCallback, TernaryCallback
from hf_compact.arch import describe
from hf_compact.calibration import from_batches
from hf_compact.capture import input_moments
from hf_compact.errors import ConfigError, FormatError, NumericalError, UnsupportedModel
from hf_compact.functional.gram import output_energy
from hf_compact.methods.distillation import DistillationTerms
from hf_compact.methods.tensor_network import TensorNetworkTraining, TensorTrainLinear
from hf_compact.methods.ternary import TernaryTraining
from hf_compact.training import CompactCallback, check_resumed, check_same_on_all_ranks, refuse_sharding
from tests.conftest import tiny_inputs, tiny_model
from tests.ranks import run_ranks

SCHEDULES = {
    "heal": {"schedule": "heal"},
    "trp": {"schedule": "trp", "interval": 2, "energy": 0.9},
    "maestro": {"schedule": "maestro", "lasso_weight": 1e-3, "threshold": 1e-3},
}


def test_keywords_replace_fields_of_settings_that_are_given():
    trp = TensorNetworkTraining(schedule="trp", energy=0.8)
    assert TensorNetworkCallback(trp, interval=7).training == TensorNetworkTraining(schedule="trp", energy=0.8, interval=7)
    mixed = DistillationCallback(tiny_model("llama"), terms=DistillationTerms(label_weight=0.5), temperature=2.0).terms
    assert mixed == DistillationTerms(label_weight=0.5, temperature=2.0)
    shown = TernaryCallback(training=TernaryTraining(ramp_share=0.3), ramp="cosine").training
    assert shown == TernaryTraining(ramp_share=0.3, ramp="cosine")


schedules = pytest.mark.parametrize("settings", SCHEDULES.values(), ids=SCHEDULES)


class Tokens(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = tiny_inputs("llama", 1, 16, index)["input_ids"][0]
        return {"input_ids": ids, "labels": ids}


def start(settings: dict):
    model = tiny_model("llama")
    if settings["schedule"] == "heal":
        stage = {"method": "tensor_network", "keep_ratio": 0.6, "allocation": "uniform", "rank_multiple": 1}
        hf_compact.compress(model, {"stages": [stage]}, calibration=from_batches([tiny_inputs("llama", seed=1)]))
    return model


def arguments(folder: Path, **settings) -> TrainingArguments:
    return TrainingArguments(
        str(folder), per_device_train_batch_size=4, max_steps=6, learning_rate=1e-2, report_to=[], save_steps=3, use_cpu=True,
        disable_tqdm=True, logging_steps=1, **settings,
    )  # fmt: skip


def train(model, callback, folder: Path, resume: str | None = None, **settings) -> Trainer:
    trainer = Trainer(model, arguments(folder, **settings), train_dataset=Tokens(), callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@schedules
def test_a_stopped_run_ends_with_the_same_weights(settings, tmp_path):
    model = start(settings)
    train(model, TensorNetworkCallback(**settings), tmp_path / "a")
    again = start(settings)
    train(again, TensorNetworkCallback(**settings), tmp_path / "a", resume=str(tmp_path / "a" / "checkpoint-3"))
    first, second = model.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@schedules
def test_what_was_trained_is_saved_compressed(settings, tmp_path):
    model = start(settings)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, TensorNetworkCallback(**settings), tmp_path / "run")
    trains = {name: m for name, m in model.named_modules() if isinstance(m, TensorTrainLinear)}
    assert trains
    assert all(module.active_rank is None for module in trains.values())
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(**tiny_inputs("llama")).logits, model.eval()(**tiny_inputs("llama")).logits)
    if settings["schedule"] == "heal":
        after = model.state_dict()
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert {name for name in moved if "out_order" not in name} == {name for name in before if ".core" in name}, "factors only"


def test_pivoted_products_are_trained_as_balanced_ones(tmp_path):
    """The function, the files and the table are those of the pivoted model before and after, and of a plain one between."""
    model, callback = start(SCHEDULES["heal"]), TensorNetworkCallback(schedule="heal")
    table = copy.deepcopy(model.config.quantization_config.modules)
    inputs = tiny_inputs("llama")
    with torch.no_grad():
        before = model(**inputs).logits
        callback.prepare(model)
        between = model(**inputs).logits
        for train_ in (m for m in model.modules() if isinstance(m, TensorTrainLinear)):
            up, down = train_.factors()
            torch.testing.assert_close(up.T @ up, down @ down.T, rtol=1e-3, atol=1e-4)
            assert not train_.is_pivoted
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(again(**inputs).logits, between)
        callback.finalize(model)
        after = model(**inputs).logits
    torch.testing.assert_close(between, before, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
    assert model.config.quantization_config.modules == table


@schedules
def test_a_plain_loop_gives_what_the_trainer_gives(settings, tmp_path):
    """Without clipping and decay the Trainer's steps are those of the optimizer it is given."""
    data = [Tokens()[i] for i in range(24)]
    model, callback = start(settings), TensorNetworkCallback(**settings)
    callback.prepare(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for step in range(6):
        callback.begin_step(model, step)
        ids = torch.stack([data[4 * step + i]["input_ids"] for i in range(4)])
        model(input_ids=ids, labels=ids).loss.backward()
        callback.before_update(model, step)
        optimizer.step()
        optimizer.zero_grad()
        callback.step(model, step + 1, 1e-2)
    callback.finalize(model)
    callback.finalize(model)  # the second time nothing happens

    class InOrder(Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    other = start(settings)
    prepared = TensorNetworkCallback(**settings)
    prepared.prepare(other)
    sgd = torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=1e-2)
    InOrder(
        other, arguments(tmp_path, max_grad_norm=0.0, lr_scheduler_type="constant"), train_dataset=Tokens(), callbacks=[prepared],
        optimizers=(sgd, torch.optim.lr_scheduler.ConstantLR(sgd, factor=1.0)),
    ).train()  # fmt: skip
    assert model.state_dict().keys() == other.state_dict().keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], rtol=1e-3, atol=1e-5)


def test_a_callback_that_comes_too_late_says_so(tmp_path):
    trainer = Trainer(tiny_model("llama"), arguments(tmp_path), train_dataset=Tokens())
    trainer.add_callback(TensorNetworkCallback(schedule="maestro"))
    with pytest.raises(ConfigError, match="was added after the Trainer was made"):
        trainer.train()


def test_a_callback_serves_one_training_of_one_model(tmp_path):
    callback = TensorNetworkCallback(schedule="maestro")
    trainer = train(tiny_model("llama"), callback, tmp_path, save_strategy="no")
    with pytest.raises(ConfigError, match="TensorNetworkCallback has finished its training: make a new one"):
        trainer.train()
    trainer = Trainer(
        model_init=lambda: tiny_model("llama"), args=arguments(tmp_path), train_dataset=Tokens(),
        callbacks=[TensorNetworkCallback(schedule="maestro")],
    )  # fmt: skip
    with pytest.raises(ConfigError, match="was prepared for another model"):
        trainer.train()


def test_an_optimizer_of_other_parameters_is_found(tmp_path):
    model = tiny_model("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    trainer = Trainer(
        model, arguments(tmp_path), train_dataset=Tokens(), callbacks=[TensorNetworkCallback(schedule="maestro")],
        optimizers=(optimizer, None),
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"the optimizer lacks 42 trained parameters, the first is .*core0.weight"):
        trainer.train()


def test_a_checkpoint_of_another_structure_is_refused(tmp_path):
    model = TensorNetworkCallback(schedule="maestro").prepare(tiny_model("llama"))
    model.save_pretrained(tmp_path)
    check_resumed(model, tmp_path)
    check_resumed(model, tmp_path / "absent")
    model.set_rank(0.5)
    with pytest.raises(FormatError, match="resume with the settings it was made with"):
        check_resumed(model, tmp_path)


def test_healing_an_adapter_goes_on(tmp_path):
    def adapted():
        return get_peft_model(start({"schedule": "heal"}), LoraConfig(target_modules=r".*q_proj\.core0", r=2))

    whole, resumed = adapted(), adapted()
    train(whole, TensorNetworkCallback(schedule="heal"), tmp_path)
    train(resumed, TensorNetworkCallback(schedule="heal"), tmp_path, str(tmp_path / "checkpoint-3"))
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(tensor, resumed.state_dict()[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("schedule", ["trp", "maestro"])
def test_what_is_compressed_already_stays_in_the_table(schedule, tmp_path):
    model = tiny_model("llama")
    stage = {"method": "pruning", "include": ["model.layers.0.*"], "channel_sparsity": 0.5}
    hf_compact.compress(model, {"stages": [stage]}, calibration=from_batches([tiny_inputs("llama", seed=1)]))
    with pytest.raises(UnsupportedModel, match=r"mlp.(gate|up|down)_proj has lost units that the config of llama cannot say"):
        TensorNetworkCallback(schedule=schedule).prepare(model)
    with pytest.raises(UnsupportedModel, match="exclude it"):
        TernaryCallback().prepare(model)
    settings = {"interval": 1, "energy": 0.5} if schedule == "trp" else {}
    callback = TensorNetworkCallback(schedule=schedule, include=("*self_attn*",), **settings)
    callback.prepare(model)
    callback.step(model, 1, 1e-3)
    callback.finalize(model.eval()).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**tiny_inputs("llama")).logits, model(**tiny_inputs("llama")).logits)
    assert {spec["layer"] for spec in again.config.quantization_config.modules.values()} == {
        "tensor_train_linear",
        "pruned_linear",
    }


def test_a_step_is_told_its_own_learning_rate(tmp_path):
    class Noting(CompactCallback):
        rates: ClassVar[list[float]] = []

        def step(self, model, step: int, learning_rate: float) -> None:
            self.rates.append(learning_rate)

    train(tiny_model("llama"), Noting(), tmp_path, save_strategy="no")
    assert Noting.rates == pytest.approx([1e-2 * (6 - done) / 6 for done in range(6)])


@pytest.mark.parametrize("kind", ["fsdp", "environment", "deepspeed"])
def test_sharded_parameters_are_refused_by_name(kind, tmp_path, monkeypatch):
    args = arguments(tmp_path)
    if kind == "fsdp":
        args.fsdp = True
    elif kind == "environment":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    else:
        args.hf_deepspeed_config = object()
    with pytest.raises(ConfigError, match=r"TensorNetworkCallback .* does not work under (FSDP|DeepSpeed): use DDP"):
        TensorNetworkCallback().on_init_end(args, TrainerState(), TrainerControl(), model=tiny_model("llama"))
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    refuse_sharding(arguments(tmp_path), "it")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"schedule": "once"}, "schedule must be one of heal, trp, maestro, got once"),
        ({"interval": 0}, "interval must be at least 1"),
        ({"energy": 1.1}, r"energy must be in \(0, 1\]"),
        ({"shares": (0.0,)}, r"shares must be in \(0, 1\]"),
        ({"threshold": -1.0}, "threshold must be at least 0"),
        ({"lasso_weight": float("nan")}, "lasso_weight must be at least 0, got nan"),
    ],
    ids=str,
)
def test_bad_settings_name_themselves(settings, match):
    with pytest.raises(ConfigError, match=match):
        TensorNetworkTraining(**settings)


def test_schedules_that_do_not_fit_the_model_say_so():
    with pytest.raises(ConfigError, match="heal needs a decomposed model"):
        TensorNetworkCallback(schedule="heal").prepare(tiny_model("llama"))
    quantized = tiny_model("gpt2")  # biases are left, but they are no factors
    stages = [
        {"method": "tensor_network", "allocation": "uniform"},
        {"method": "codebook", "bits": 4, "group_size": 8, "refit_rounds": 0, "shrink_steps": 2},
    ]
    hf_compact.compress(quantized, {"stages": stages}, calibration=from_batches([tiny_inputs("gpt2")]))
    with pytest.raises(ConfigError, match="whose cores are not quantized, got none"):
        TensorNetworkCallback(schedule="heal").prepare(quantized)
    for schedule in ("trp", "maestro"):
        with pytest.raises(ConfigError, match="starts from a dense model"):
            TensorNetworkCallback(schedule=schedule).prepare(start({"schedule": "heal"}))


def test_batches_for_another_schedule_are_refused():
    with pytest.raises(ConfigError, match=r"batches are for training.schedule trp, got maestro"):
        TensorNetworkCallback(schedule="maestro", batches=[tiny_inputs("llama")])


def test_trp_keeps_the_energy_of_the_outputs_on_its_batches():
    """Where the inputs have few directions, most of a weight may go; by its own values it would lose other things."""
    batch = {**tiny_inputs("llama", 2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.int64)}
    batch["attention_mask"][1, 4:] = 0
    model = tiny_model("llama")
    dense = copy.deepcopy(model)
    callback = TensorNetworkCallback(schedule="trp", interval=2, energy=0.9, nuclear_weight=0.0, batches=[batch])
    callback.prepare(model)
    callback.step(model, 2, 1e-2)
    for name, (gram, _) in input_moments(dense, callback.names, [batch]).items():
        before, after = dense.get_submodule(name).weight, model.get_submodule(name).weight
        share = output_energy(before - after, gram) / output_energy(before, gram)
        assert 1e-3 < share < 0.11  # the ridge lets a little more go
        assert torch.linalg.matrix_rank(after) < min(after.shape)


def test_trp_takes_the_nuclear_step_of_all_steps_since_the_last_truncation():
    found = {}
    for weight in (0.0, 3.0):
        model = tiny_model("llama")
        callback = TensorNetworkCallback(schedule="trp", interval=5, energy=1.0, nuclear_weight=weight)
        callback.prepare(model)
        callback.step(model, 5, 1e-3)
        found[weight] = torch.linalg.svdvals(model.model.layers[0].mlp.up_proj.weight.double())
    torch.testing.assert_close(found[3.0], (found[0.0] - 5 * 1e-3 * 3.0).clamp_min(0), atol=1e-6, rtol=0)


def test_the_nuclear_weight_means_the_same_on_more_batches():
    found = []
    for number in (1, 4):
        model = tiny_model("llama")
        batches = [tiny_inputs("llama", 2, 8)] * number
        callback = TensorNetworkCallback(schedule="trp", interval=5, energy=0.9, nuclear_weight=3.0, batches=batches)
        callback.prepare(model)
        callback.step(model, 5, 1e-3)
        found.append(model.model.layers[0].mlp.up_proj.weight)
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-3)


def test_batches_leave_modes_alone_and_have_to_be_finite():
    model = tiny_model("llama").train()
    model.model.layers[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    names = ["model.layers.0.mlp.up_proj"]
    input_moments(model, names, [tiny_inputs("llama")])
    assert {name: module.training for name, module in model.named_modules()} == modes
    model.model.embed_tokens.weight.data.fill_(torch.inf)
    with pytest.raises(NumericalError, match=r"model.layers.0.mlp.up_proj reads inputs that are not finite"):
        input_moments(model, names, [tiny_inputs("llama")])
    assert not model.get_submodule(names[0])._forward_pre_hooks


@pytest.mark.parametrize("family", ["llama", "opt", "t5"])
def test_padding_does_not_count_in_moments(family):
    model, inputs = tiny_model(family), tiny_inputs(family, seed=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][:, -5:] = 0
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][:, -5:] = 3
    names = [name for name in describe(model).roles if "decoder" not in name or family == "opt"]
    one, two = (input_moments(model, names, [batch]) for batch in (inputs, other))
    for name in names:
        for first, second in zip(one[name], two[name], strict=True):
            torch.testing.assert_close(first, second)


def test_maestro_leaves_what_is_excluded():
    model = tiny_model("llama")
    TensorNetworkCallback(schedule="maestro").prepare(model)
    callback = TensorNetworkCallback(schedule="maestro", exclude=("*.mlp.*",))
    callback.prepare(model)
    assert callback.names
    assert not any(".mlp." in name for name in callback.names)


def test_healing_keeps_what_is_frozen_and_how_a_train_multiplies():
    model = start({"schedule": "heal"})
    trains = [module for module in model.modules() if isinstance(module, TensorTrainLinear)]
    trains[0].requires_grad_(False)
    trains[0].mode = "dense"
    name = next(name for name, module in model.named_modules() if module is trains[0])
    callback = TensorNetworkCallback(schedule="heal")
    callback.prepare(model)
    for finish in (lambda: None, lambda: callback.finalize(model)):
        finish()
        assert model.get_submodule(name).mode == "dense"
        assert not any(parameter.requires_grad for parameter in model.get_submodule(name).parameters())
    assert all(parameter.requires_grad for key, parameter in model.named_parameters() if not key.startswith(name))


def test_maestro_finds_the_rank_of_what_it_learns():
    """A map of rank 4, learned by factors of full rank under the lasso, is cut to rank 4."""
    torch.manual_seed(0)
    target = torch.randn(24, 4) @ torch.randn(4, 24) / 5
    layer = TensorTrainLinear([24, 1], [1, 24], [24])
    callback = TensorNetworkCallback(schedule="maestro", lasso_weight=2e-2, threshold=1e-2)
    model = torch.nn.ModuleDict({"layer": layer})
    callback.names = ["layer"]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(800):
        callback.begin_step(model, step)
        x = torch.randn(64, 24)
        (layer(x) - x @ target.T).square().mean().backward()
        callback.before_update(model, step)
        optimizer.step()
        optimizer.zero_grad()
        callback.step(model, step + 1, 1e-2)
    callback.restore_(model)
    assert layer.ranks == [4]
    assert (layer.to_dense() - target).norm() < 0.2 * target.norm()


def test_the_base_does_nothing_by_itself(tmp_path):
    trainer = train(tiny_model("llama"), CompactCallback(), tmp_path)
    assert getattr(trainer.model.config, "quantization_config", None) is None


# Two ranks.


def _worker(rank: int, folder: str, settings: dict) -> None:
    model = start(settings)
    train(model, TensorNetworkCallback(**settings), Path(folder) / "run", ddp_backend="gloo")
    from safetensors.torch import save_file

    save_file(
        {k: v.clone().contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"},
        f"{folder}/{rank}.safetensors",
    )
    if rank == 0:
        with pytest.raises(ConfigError, match="different structure"):
            check_same_on_all_ranks(["this"])
    else:
        with pytest.raises(ConfigError, match="different structure"):
            check_same_on_all_ranks(["that"])


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["trp", "maestro"])
def test_two_ranks_end_with_the_same_model(name, tmp_path):
    from safetensors.torch import load_file

    run_ranks(_worker, str(tmp_path), SCHEDULES[name], seconds=240)
    first, second = load_file(tmp_path / "0.safetensors"), load_file(tmp_path / "1.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(".core" in key for key in first)
