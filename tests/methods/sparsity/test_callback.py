"""Masks in a stock Trainer: the schedule is exact, a stopped run ends alike, ranks agree, files hold what stays."""

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

import hf_compact
from hf_compact import HessoCallback, MaskCallback, SparsityConfig
from hf_compact.calibration import from_batches
from hf_compact.errors import ConfigError, NothingMatched, UnsupportedModel
from hf_compact.methods.sparsity.layer import MaskedLinear, SparseLinear
from tests.conftest import tiny_inputs, tiny_model
from tests.ranks import run_ranks

SHORT = {"start_share": 0.25, "end_share": 0.75, "interval": 2}


def train(model, callback, folder: Path, resume: str | None = None, family: str = "llama", **settings) -> None:
    args = TrainingArguments(
        str(folder), per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], save_steps=5, use_cpu=True, disable_tqdm=True,
        **({"max_steps": 8, "weight_decay": 0.1} | settings),
    )  # fmt: skip
    ids = [tiny_inputs(family, 1, 16, seed)["input_ids"][0] for seed in range(16)]
    callbacks = callback if isinstance(callback, list) else [callback]
    Trainer(model, args, train_dataset=[{"input_ids": row, "labels": row} for row in ids], callbacks=callbacks).train(
        resume_from_checkpoint=resume
    )


class Watched(MaskCallback):
    """Notes how many weights are zero after every step."""

    def step(self, model, step, learning_rate):
        super().step(model, step, learning_rate)
        self.seen = [*getattr(self, "seen", []), [int((module.weight == 0).sum()) for module in self.dense.values()]]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("extra", [{}, {"gradient_accumulation_steps": 2, "bf16": True}], ids=["plain", "accumulated bf16"])
def test_the_sparsity_is_that_of_the_schedule(family, extra, tmp_path):
    model, callback = tiny_model(family), Watched(SparsityConfig(sparsity=0.6), **SHORT, storage="dense")
    train(model, callback, tmp_path, family=family, **extra)
    shares = [0.0, 0.0, 0.0, 0.6 * (1 - 0.5**3), 0.6 * (1 - 0.5**3), 0.6, 0.6, 0.6]
    sizes = [module.weight.numel() for module in callback.dense.values()]
    assert callback.seen == [[int(share * size + 1e-9) for size in sizes] for share in shares]
    assert not any("mask" in name for name in model.state_dict())
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, module in callback.dense.items():
        assert torch.equal(again.get_submodule(name).weight, module.weight)


def test_masked_weights_stay_where_they_are_and_the_file_holds_the_others(tmp_path):
    sizes = {}
    for storage in ("dense", "bitmap"):
        model = tiny_model("llama")
        train(model, MaskCallback(SparsityConfig(sparsity=0.75), **SHORT, storage=storage), tmp_path)
        with torch.no_grad():
            before = model.eval()(**tiny_inputs("llama")).logits
        model.save_pretrained(tmp_path / storage)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / storage).eval()
        with torch.no_grad():
            assert torch.equal(again(**tiny_inputs("llama")).logits, before)
        sizes[storage] = (tmp_path / storage / "model.safetensors").stat().st_size
        assert isinstance(again.model.layers[0].mlp.up_proj, SparseLinear) == (storage == "bitmap")
    weights = sum(p.numel() for p in tiny_model("llama").model.layers.parameters() if p.dim() == 2)
    assert sizes["dense"] - sizes["bitmap"] == pytest.approx(weights * (4 - 0.25 * 4 - 1 / 8), rel=0.05)


@pytest.mark.parametrize("backward", ["same", "own"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_pattern_is_trained_through(family, backward, tmp_path):
    model = tiny_model(family)
    callback = MaskCallback(SparsityConfig(pattern="2:4"), start_share=0.25, backward=backward, decay=2e-4, storage="bitmap")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, callback, tmp_path, family=family)
    for name, module in callback.dense.items():
        layer = model.get_submodule(name)
        mask = layer.to_dense() != 0
        assert (mask.unflatten(1, (-1, 4)).sum(2) == 2).all()
        old = before[f"{name}.weight"]
        assert not torch.equal(layer.to_dense()[mask], (old.T if family == "gpt2" else old)[mask])
        assert isinstance(module, torch.nn.Module)
    with torch.no_grad():
        logits = model.eval()(**tiny_inputs(family)).logits
    model.save_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(**tiny_inputs(family)).logits, logits)


def test_the_decay_pulls_at_masked_weights_only():
    model = tiny_model("llama")
    callback = MaskCallback(SparsityConfig(pattern="2:4"), start_share=0.0, decay=0.5, num_steps=1)
    callback.prepare(model)
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, MaskedLinear)
    callback.begin_step(model, 0)
    layer.weight.grad = torch.zeros_like(layer.weight)
    callback.before_update(model, 0)
    assert torch.equal(layer.weight.grad, 0.5 * layer.weight.detach() * ~layer.masks[0])


@pytest.mark.parametrize("config", [SparsityConfig(sparsity=0.6), SparsityConfig(pattern="2:4")], ids=["gradual", "2:4"])
def test_a_stopped_run_ends_with_the_same_weights(config, tmp_path):
    model, again = tiny_model("llama"), tiny_model("llama")
    train(model, MaskCallback(config, **SHORT), tmp_path)
    train(again, MaskCallback(config, **SHORT), tmp_path, resume=str(tmp_path / "checkpoint-5"))
    first, second = model.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("num_steps", [30, 80, 120])
def test_a_short_run_is_gradual_too(num_steps):
    """Without an interval there are at least ten masks on the way."""
    model, callback = tiny_model("llama"), MaskCallback(SparsityConfig(sparsity=0.6), num_steps=num_steps)
    callback.prepare(model)
    weight, shares = model.model.layers[0].mlp.up_proj.weight, []
    for step in range(1, num_steps + 1):
        callback.step(model, step, 1e-3)
        shares.append(float((weight == 0).float().mean()))
    assert len(set(shares)) > 10
    assert max(b - a for a, b in itertools.pairwise(shares)) < 0.2
    assert shares[-1] == pytest.approx(0.6, abs=1e-3)


def test_what_cannot_work_is_named():
    with pytest.raises(UnsupportedModel, match=r"layers\.0\.mlp\.down_proj has 36 inputs, which sparsity.pattern 2:8"):
        MaskCallback(SparsityConfig(pattern="2:8", include=("*.down_proj",))).prepare(tiny_model("llama", intermediate_size=36))
    config = SparsityConfig(pattern="2:8", include=("*.up_proj",))
    with pytest.raises(UnsupportedModel, match=r"layers\.0\.mlp\.up_proj has 36 outputs"):
        MaskCallback(config, backward="own").prepare(tiny_model("llama", intermediate_size=36))
    with pytest.raises(NothingMatched, match="include glob 'nothing' matches none"):
        MaskCallback(SparsityConfig(include=("nothing",))).prepare(tiny_model("llama"))
    callback = MaskCallback()
    model = callback.prepare(tiny_model("llama"))
    with pytest.raises(ConfigError, match=r"training\.num_steps must be given in a loop of your own"):
        callback.step(model, 1, 0.0)


def test_a_decay_that_would_be_scaled_is_refused(tmp_path):
    model, callback = tiny_model("llama"), MaskCallback(SparsityConfig(pattern="2:4"), decay=2e-4)
    args = TrainingArguments(str(tmp_path), max_steps=4, report_to=[], max_grad_norm=0, use_cpu=True)
    args.fp16 = True  # which needs an accelerator
    callback.prepare(model)
    with pytest.raises(ConfigError, match=r"max_grad_norm must be above 0 with fp16 and training\.decay"):
        callback.on_train_begin(args, TrainerState(), TrainerControl(), model=model)


def test_a_run_that_ends_early_is_told_about(tmp_path, caplog):
    class Stopped(MaskCallback):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            control.should_training_stop = state.global_step == 3

    train(tiny_model("llama"), Stopped(**SHORT), tmp_path)
    assert "0 zeros of 14976 that sparsity 0.5 asks for: training ended early" in caplog.text


@pytest.mark.parametrize("storage", ["bitmap", "dense"])
def test_what_hesso_has_cut_is_packed(storage, tmp_path):
    model = tiny_model("llama")
    pruner = HessoCallback(target=0.3, pruning_steps=6, periods=2, channel_multiple=4)
    train(model, [pruner, MaskCallback(SparsityConfig(sparsity=0.6), **SHORT, storage=storage)], tmp_path)
    assert model.config.intermediate_size < 72
    weight = model.model.layers[0].mlp.down_proj
    weight = weight.weight if storage == "dense" else weight.to_dense()
    assert weight.shape[1] == model.config.intermediate_size
    assert (weight == 0).float().mean() > 0.3
    with torch.no_grad():
        before = model.eval()(**tiny_inputs("llama")).logits
    model.save_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(**tiny_inputs("llama")).logits, before)


def test_widths_that_the_config_cannot_say_stay_dense(tmp_path, caplog):
    model = tiny_model("gpt2")
    stage = {"method": "pruning", "channel_sparsity": 0.0, "head_sparsity": 0.5}
    hf_compact.compress(model, {"stages": [stage]}, calibration=from_batches([tiny_inputs("gpt2")]))
    train(model, MaskCallback(**SHORT), tmp_path, family="gpt2", save_strategy="no")
    assert "6 Linears stay dense with zeros" in caplog.text
    assert isinstance(model.transformer.h[0].mlp.c_fc, SparseLinear)
    assert (model.transformer.h[0].attn.c_attn.weight == 0).float().mean() == 0.5
    with torch.no_grad():
        before = model.eval()(**tiny_inputs("gpt2")).logits
    model.save_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(**tiny_inputs("gpt2")).logits, before)


def test_the_best_checkpoint_keeps_its_own_zeros(tmp_path, caplog):
    class Earlier(MaskCallback):
        def on_train_end(self, args, state, control, **kwargs):
            model = kwargs["model"]
            model.load_state_dict(load_file(tmp_path / "checkpoint-5" / "model.safetensors"), strict=False)
            super().on_train_end(args, state, control, **kwargs)

    model = tiny_model("llama")
    train(model, Earlier(SparsityConfig(sparsity=0.6), **SHORT, storage="dense"), tmp_path)
    stored = load_file(tmp_path / "checkpoint-5" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(model.state_dict()[name], stored[name])
    assert "an earlier checkpoint came back" in caplog.text


def _worker(rank: int, folder: str) -> None:
    for name, config in (("gradual", SparsityConfig()), ("pattern", SparsityConfig(pattern="2:4"))):
        model = tiny_model("llama")
        train(
            model,
            MaskCallback(config, **SHORT, storage="dense"),
            Path(folder) / "run",
            ddp_backend="gloo",
            save_strategy="no",
        )
        state = {k: v.clone().contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
        save_file(state, f"{folder}/{name}-{rank}.safetensors")


@pytest.mark.distributed
def test_two_ranks_have_the_same_masks(tmp_path):
    run_ranks(_worker, str(tmp_path), seconds=280)
    for name in ("gradual", "pattern"):
        first, second = (load_file(tmp_path / f"{name}-{rank}.safetensors") for rank in (0, 1))
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert (first["model.layers.0.mlp.up_proj.weight"] == 0).float().mean() == 0.5
