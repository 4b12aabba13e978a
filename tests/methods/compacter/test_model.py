"""Compacter as a PEFT method: placement, counts, files, several adapters, the Trainer, quantized bases."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hf_compact
from hf_compact import CompacterConfig
from hf_compact.calibration import from_batches
from hf_compact.errors import ConfigError, UnsupportedModel
from hf_compact.methods.compacter.layer import CompacterLayer
from tests.conftest import FAMILIES, tiny_inputs, tiny_model

families = pytest.mark.parametrize("family", FAMILIES)
PLACES = {"t5": (8, 6)}  # two encoder and two decoder blocks; no cross-attention


def adapted(family="llama", *, model=None, is_random=True, **settings) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(family) if model is None else model, CompacterConfig(**settings)).eval()
    return randomise_(model) if is_random else model


def randomise_(model: PeftModel, seed: int = 1) -> PeftModel:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


@torch.no_grad()
def logits(model, family="llama"):
    return model(**tiny_inputs(family))[0]


def trainable(model) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


# Placement and counts.


@pytest.mark.parametrize(("variant", "expected"), [("compacter++", 104_704), ("compacter", 161_728)])
def test_t5_base_trains_exactly_the_parameters_of_the_paper(variant, expected):
    config = transformers.T5Config(d_model=768, d_ff=3072, d_kv=64, num_layers=12, num_heads=12, vocab_size=32128)
    with torch.device("meta"):
        model = transformers.T5ForConditionalGeneration(config)
    dense = sum(parameter.numel() for parameter in model.parameters())
    count, _ = get_peft_model(model, CompacterConfig(variant=variant)).get_nb_trainable_parameters()
    assert count == expected
    assert round(100 * count / dense, 3) == {"compacter++": 0.047, "compacter": 0.073}[variant]


@families
def test_adapters_stand_behind_both_sublayers_or_one(family):
    places = [
        sum(isinstance(m, CompacterLayer) for m in adapted(family, variant=v).modules()) for v in ("compacter", "compacter++")
    ]
    both = 2 * len(hf_compact.arch.describe(tiny_model(family)).blocks)
    assert places == [both, both // 2]


@families
def test_starts_as_the_model_and_can_be_switched_off(family):
    base = logits(tiny_model(family), family)
    assert (logits(adapted(family, is_random=False), family) - base).abs().max() < 1e-3
    model = adapted(family)
    assert (logits(model, family) - base).abs().max() > 1e-2
    with model.disable_adapter():
        assert torch.equal(logits(model, family), base)
        assert not trainable(model)
    assert (logits(model, family) - base).abs().max() > 1e-2
    assert torch.equal(logits(model.unload(), family), base)


@families
def test_round_trip(family, tmp_path):
    model = adapted(family)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(family), tmp_path).eval()
    assert torch.equal(logits(again, family), logits(model, family))
    assert not trainable(again)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert [name for name in stored if "slow" in name] == ["base_model.compacter_slow"]
    assert sum(tensor.numel() for tensor in stored.values()) == model.get_nb_trainable_parameters()[0]
    trained = PeftModel.from_pretrained(tiny_model(family), tmp_path, is_trainable=True)
    assert trainable(trained).keys() == trainable(model).keys()


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "snnk", "seed": 5},
        {"kind": "snnk", "feature": "sincos"},
        {"kind": "low_rank"},
        {"rank": None},
        {"shared_slow": False},
    ],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_other_kinds_round_trip(settings, tmp_path):
    model = adapted(**settings)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model("llama"), tmp_path)), logits(model))
    assert not any("frequencies" in name for name in load_file(tmp_path / "adapter_model.safetensors"))


def test_snnk_trains_fewer_parameters_than_two_dense_maps():
    (count, _), bottleneck = adapted(kind="snnk", train_layer_norm=False).get_nb_trainable_parameters(), 1
    assert count == 6 * (32 * bottleneck + 32)


def test_norms_and_targets_can_be_chosen():
    model = adapted(train_layer_norm=False, target_modules=["mlp.down_proj"], exclude_modules=["model.layers.0.mlp.down_proj"])
    names = trainable(model)
    assert not any("norm" in name for name in names)
    assert {name.split(".")[4] for name in names if "layers" in name} == {"1", "2"}


def test_the_callers_config_is_not_changed():
    config = CompacterConfig()
    first = get_peft_model(tiny_model("llama"), config)
    second = get_peft_model(tiny_model("gpt2"), config)
    assert config.target_modules is None
    assert first.peft_config["default"].target_modules[0] == "model.layers.0.self_attn.o_proj"
    assert second.peft_config["default"].target_modules[0] == "transformer.h.0.attn.c_proj"


def test_unknown_families_need_targets():
    plain = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    with pytest.raises(UnsupportedModel, match=r"compacter\.target_modules must name the last Linear of each sub-layer"):
        get_peft_model(plain, CompacterConfig())
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), CompacterConfig(target_modules=["0"]))
    assert model(torch.ones(1, 8)).shape == (1, 8)
    with pytest.raises(UnsupportedModel, match=r"compacter\.target_modules must name linear maps, 0 is a Dropout"):
        get_peft_model(nn.Sequential(nn.Dropout(), nn.Linear(8, 8)), CompacterConfig(target_modules=["0"]))


def test_given_targets_need_no_table(caplog):
    """Not even where the rest of the library refuses the model, such as one with all experts in one tensor."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64, "num_local_experts": 2}
    config = transformers.MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = adapted(model=transformers.MixtralForCausalLM(config), target_modules=["o_proj"])
    assert sum(isinstance(module, CompacterLayer) for module in model.modules()) == 2
    assert not caplog.records
    with pytest.raises(UnsupportedModel, match="'mixtral' is not in the table of families"):
        adapted(model=transformers.MixtralForCausalLM(config))


def test_new_heads_are_trained_and_stored(tmp_path):
    config = transformers.BertConfig(**FAMILIES["bert"][2], num_labels=3)
    torch.manual_seed(0)
    base = transformers.BertForSequenceClassification(config).eval()
    model = randomise_(get_peft_model(copy.deepcopy(base), CompacterConfig(task_type="SEQ_CLS")).eval())
    assert "base_model.model.classifier.modules_to_save.default.weight" in trainable(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))


def test_heads_that_hold_norms_are_stored_once(tmp_path):
    model = adapted("bert_mlm", modules_to_save=["cls"])
    assert not any(name.count("modules_to_save") > 1 for name in trainable(model))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model("bert_mlm"), tmp_path)
    assert torch.equal(logits(again, "bert_mlm"), logits(model, "bert_mlm"))
    assert model.unload().state_dict().keys() == tiny_model("bert_mlm").state_dict().keys()


# The shared matrices.


def test_slow_matrices_are_one_parameter_with_the_sum_of_all_gradients():
    model = adapted()
    layers = [module for module in model.modules() if isinstance(module, CompacterLayer)]
    slow = model.base_model.compacter_slow["default"]
    assert {id(layer.compacter_adapter["default"].slow("down")) for layer in layers} == {id(slow)}
    assert sum(parameter is slow for parameter in model.parameters()) == 1
    model(**tiny_inputs("llama"))[0].square().mean().backward()
    total = slow.grad.clone()
    parts = torch.zeros_like(total)
    for layer in layers:  # each with a copy of its own
        clone = copy.deepcopy(model)
        clone.zero_grad()
        twin = next(m for n, m in clone.named_modules() if n == next(n for n, m in model.named_modules() if m is layer))
        own = nn.ParameterDict({"default": nn.Parameter(slow.detach().clone())})
        twin.compacter_adapter["default"]._shared = (own, "default")
        clone(**tiny_inputs("llama"))[0].square().mean().backward()
        parts += own["default"].grad
    torch.testing.assert_close(parts, total, rtol=1e-4, atol=1e-6)


def test_copies_share_among_themselves_only():
    model = adapted()
    clone = copy.deepcopy(model)
    slow = clone.base_model.compacter_slow["default"]
    layer = next(module for module in clone.modules() if isinstance(module, CompacterLayer))
    assert layer.compacter_adapter["default"].slow("up") is slow
    assert slow is not model.base_model.compacter_slow["default"]
    assert torch.equal(logits(clone), logits(model))


# Several adapters.


def test_named_adapters_are_independent(tmp_path):
    model = adapted()
    first = logits(model)
    before = set(trainable(model))
    model.add_adapter("second", CompacterConfig(variant="compacter++"))
    assert torch.equal(logits(model), first)
    assert set(trainable(model)) == before
    model.set_adapter("second")
    assert all("second" in name for name in trainable(model))
    assert (logits(model) - logits(tiny_model("llama"))).abs().max() < 1e-3
    second = logits(randomise_(model, seed=2))
    model.save_pretrained(tmp_path)
    assert not torch.equal(first, second)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    again.load_adapter(tmp_path / "second", "other")
    assert torch.equal(logits(again), first)
    again.set_adapter("other")
    assert torch.equal(logits(again), second)


@pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted")
def test_deleting_the_active_adapter_activates_another():
    model = adapted()
    model.add_adapter("second", CompacterConfig(variant="compacter++"))
    model.set_adapter("second")
    second = logits(randomise_(model, seed=2))
    model.set_adapter("default")
    model.delete_adapter("default")
    assert model.active_adapters == ["second"]
    assert list(model.base_model.compacter_slow) == ["second"]
    assert torch.equal(logits(model), second)
    assert all("second" in name for name in trainable(model))


def test_nothing_stays_of_an_adapter_that_could_not_be_added():
    model = adapted(model=tiny_model("llama", intermediate_size=36))
    before, names = logits(model), dict(model.named_parameters()).keys()
    with pytest.raises(ConfigError, match=r"compacter\.hypercomplex_division must divide the width 32, got 5"):
        model.add_adapter("second", CompacterConfig(hypercomplex_division=5))
    with pytest.raises(ConfigError, match="must divide the width 36, got 8"):  # after others have been made
        model.add_adapter("second", CompacterConfig(hypercomplex_division=8, target_modules=["o_proj", "gate_proj"]))
    assert dict(model.named_parameters()).keys() == names
    model.add_adapter("second", CompacterConfig(variant="compacter++", hypercomplex_division=2))
    assert torch.equal(logits(model), before)
    model.set_adapter("second")
    assert (logits(model) - logits(tiny_model("llama", intermediate_size=36))).abs().max() < 1e-3


@pytest.mark.filterwarnings(
    "ignore:You are trying to modify a model with PEFT for a second time", "ignore:Already found a `peft_config`"
)
def test_a_model_with_adapters_is_not_wrapped_again():
    base = tiny_model("llama", intermediate_size=36)
    with pytest.raises(ConfigError, match="must divide the width 36, got 8"):
        get_peft_model(base, CompacterConfig(hypercomplex_division=8, target_modules=["o_proj", "gate_proj"]))
    model = get_peft_model(base, CompacterConfig())
    with pytest.raises(UnsupportedModel, match=r"adapters already: call add_adapter of its PeftModel, or unload\(\) first"):
        get_peft_model(base, CompacterConfig())
    assert get_peft_model(model.unload(), CompacterConfig()).get_nb_trainable_parameters()[0] == 936


def test_adapters_without_norms_stack():
    model = adapted(train_layer_norm=False)
    model.add_adapter("second", CompacterConfig(train_layer_norm=False))
    model.set_adapter("second")
    randomise_(model, seed=2)
    alone = logits(model)
    model.base_model.set_adapter(["default", "second"])
    assert not torch.equal(logits(model), alone)
    assert {name.split(".")[-2] for name in trainable(model) if "layers" in name} == {"default", "second"}


def test_an_adapter_for_each_row_is_refused():
    model = adapted()
    with pytest.raises(UnsupportedModel, match="adapter_names, an adapter for each row, cannot be had with Compacter"):
        model(**tiny_inputs("llama"), adapter_names=["default", "__base__"])
    assert model(**tiny_inputs("llama"), adapter_names=None).logits.isfinite().all()


def test_gradients_can_be_asked_for_by_name():
    model = adapted()
    model.set_requires_grad("default", requires_grad=False)
    assert not trainable(model)
    model.set_requires_grad(["default"])
    assert "base_model.compacter_slow.default" in trainable(model)


# What PEFT offers.


def test_automatic_classes_and_empty_weights(dense_folder, tmp_path):
    model = adapted(model=AutoModelForCausalLM.from_pretrained(dense_folder), task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    base = AutoModelForCausalLM.from_pretrained(dense_folder)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True)), logits(model))
    with pytest.raises(ValueError, match=r"uses shared state stored on the tuner\. Please use `get_peft_model` instead"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter"])
def test_merging_says_why_it_cannot(method):
    with pytest.raises(NotImplementedError, match="nonlinearity between its two maps, so no weight of the model can take it in"):
        getattr(adapted(), method)()


def test_loading_without_the_import_says_what_to_import(dense_folder, tmp_path):
    adapted(model=AutoModelForCausalLM.from_pretrained(dense_folder), task_type="CAUSAL_LM").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "COMPACTER (import hf_compact first)"
    program = f"from peft import AutoPeftModelForCausalLM\nAutoPeftModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "import hf_compact first" in done.stderr.splitlines()[-1]
    done = subprocess.run([sys.executable, "-c", "import hf_compact\n" + program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_cached_decoding_is_the_same():
    model = adapted()
    ids = tiny_inputs("llama", batch=1)["input_ids"]
    wanted = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    before = logits(model)
    model.merge_cache()
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=8, do_sample=False), wanted)
    model.train()
    assert all(m._dense is None for m in model.modules() if hasattr(m, "_dense"))


def test_the_whole_printed_count(capsys):
    adapted().print_trainable_parameters()
    assert "trainable params: 936 ||" in capsys.readouterr().out


# Training.


def train(model, folder: Path, **settings) -> Trainer:
    rows = [{"input_ids": ids, "labels": ids} for ids in tiny_inputs("llama", batch=16)["input_ids"]]
    arguments = TrainingArguments(
        folder, **{"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none", "use_cpu": True,
                   "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no", "dataloader_pin_memory": False, **settings},
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=settings.get("save_strategy") == "steps" and any(Path(folder).glob("checkpoint-*")))
    return trainer


def loss(model, is_training: bool = False) -> float:
    ids = tiny_inputs("llama", batch=16)["input_ids"]
    with torch.no_grad():
        return model.train(is_training)(input_ids=ids, labels=ids).loss.item()


def test_trainer_learns_and_leaves_the_base_alone(tmp_path):
    model = adapted(is_random=False, task_type="CAUSAL_LM")
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    moved = {name: p.detach().clone() for name, p in trainable(model).items()}
    before = loss(model)
    trainer = train(model, tmp_path, max_steps=30)
    assert loss(model) < before - 0.3
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    assert not any(torch.equal(after[name], value) for name, value in moved.items())
    trainer.save_model(tmp_path / "adapter")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in (tmp_path / "adapter").iterdir()}


def test_resuming_is_the_same_as_not_stopping(tmp_path):
    whole = adapted(is_random=False, task_type="CAUSAL_LM")
    train(whole, tmp_path / "whole", lr_scheduler_type="constant")
    saving = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
    train(adapted(is_random=False, task_type="CAUSAL_LM"), tmp_path / "parts", **saving, max_steps=3)
    resumed = adapted(is_random=False, task_type="CAUSAL_LM")
    train(resumed, tmp_path / "parts", **saving)
    wanted, found = trainable(whole), trainable(resumed)
    assert wanted.keys() == found.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=0)


@pytest.mark.parametrize("is_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(is_reentrant):
    plain, saving = adapted(task_type="CAUSAL_LM"), adapted(task_type="CAUSAL_LM")
    saving.activation_checkpointing_enable({"use_reentrant": is_reentrant})
    saving.enable_input_require_grads()
    ids = tiny_inputs("llama")["input_ids"]
    for model in (plain, saving):
        model.train()(input_ids=ids, labels=ids).loss.backward()
    others = trainable(saving)
    for name, parameter in trainable(plain).items():
        torch.testing.assert_close(others[name].grad, parameter.grad, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("is_autocast", [True, False])
def test_bfloat16(is_autocast, tmp_path):
    model = adapted(
        model=tiny_model("llama", torch.float32 if is_autocast else torch.bfloat16), is_random=False, task_type="CAUSAL_LM"
    )
    before = loss(model)
    train(model, tmp_path, bf16=is_autocast, max_steps=20)
    assert loss(model) < before - 0.1
    adapters = {p.dtype for name, p in trainable(model).items() if "compacter" in name}
    assert adapters == {torch.float32}


# Quantized bases.


def quantized(kind: str):
    if kind in ("codebook", "entropy"):
        model = tiny_model("llama")
        stage = {"codebook": {"method": "codebook", "bits": 3}, "entropy": {"method": "entropy", "bits": 5.0}}[kind]
        hf_compact.compress(model, {"stages": [stage]}, calibration=from_batches([tiny_inputs("llama")]))
        return model
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = tiny_model("llama", hidden_size=64, intermediate_size=128)  # its kernels need whole blocks
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "layers" in name:
            if kind == "nf4":
                new = bitsandbytes.nn.Linear4bit(
                    module.in_features, module.out_features, bias=False, quant_type="nf4", compute_dtype=torch.float32
                )
                new.weight = bitsandbytes.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            else:
                new = bitsandbytes.nn.Linear8bitLt(module.in_features, module.out_features, bias=False, has_fp16_weights=False)
                new.weight = bitsandbytes.nn.Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
            model.set_submodule(name, new)
    return model.to("cpu")


@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
@pytest.mark.parametrize("kind", ["codebook", "entropy", "nf4", "int8"])
def test_quantized_bases_train(kind, tmp_path):
    model = quantized(kind)
    base = logits(model.train())  # bitsandbytes has another kernel, without gradients, for evaluation
    model = adapted(model=model, is_random=False, task_type="CAUSAL_LM").train()
    limit = 0.1 if kind == "int8" else 1e-3  # its inputs are rounded too, so that a small change may become a step
    assert (logits(model) - base).abs().max() < limit * base.abs().max()
    ids = tiny_inputs("llama")["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in trainable(model).values())
    assert model.base_model.compacter_slow["default"].grad.abs().max() > 0
    model.zero_grad()
    stored = {name: buffer.clone() for name, buffer in model.named_buffers()}
    before = loss(model, is_training=True)
    train(model, tmp_path, max_steps=20)
    assert loss(model, is_training=True) < before - 0.1
    assert all(torch.equal(stored[name], buffer) for name, buffer in model.named_buffers() if name in stored)
    assert torch.equal(logits(model.unload().train()), base)
