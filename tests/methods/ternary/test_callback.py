"""Training: in a stock Trainer and a plain loop, stopped and resumed, accumulated, checkpointed, in bfloat16, on two ranks."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hf_compact
from hf_compact import TernaryCallback, TernaryConfig
from hf_compact.errors import ConfigError
from hf_compact.methods.ternary import LatentLinear, TernaryLinear
from tests.conftest import tiny_inputs, tiny_model
from tests.ranks import run_ranks

CONFIGS = {
    "ternary": (TernaryConfig(), {}),
    "norms": (TernaryConfig(scale="absmedian"), {"is_sub_norm": True, "ramp": "cosine"}),
    "learned": (TernaryConfig(scale="lsq", bits=2, granularity="row"), {"ramp": "step"}),
}
configs = pytest.mark.parametrize("kind", CONFIGS)


class Tokens(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = tiny_inputs("llama", 1, 16, index)["input_ids"][0]
        return {"input_ids": ids, "labels": ids}


def callback(kind: str) -> TernaryCallback:
    config, settings = CONFIGS[kind]
    return TernaryCallback(config, ramp_share=0.5, **settings)


def arguments(folder: Path, **settings) -> TrainingArguments:
    defaults = {"per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 1e-2, "weight_decay": 0.1, "save_steps": 3}
    return TrainingArguments(str(folder), report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1, **defaults | settings)


def train(kind: str, folder: Path, resume: str | None = None, **settings):
    model = tiny_model("llama")
    trainer = Trainer(model, arguments(folder, **settings), train_dataset=Tokens(), callbacks=[callback(kind)])
    trainer.train(resume_from_checkpoint=resume)
    return model


@configs
def test_a_stopped_run_ends_with_the_same_weights(kind, tmp_path):
    first = train(kind, tmp_path).state_dict()
    second = train(kind, tmp_path, resume=str(tmp_path / "checkpoint-3")).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["model.layers.0.mlp.up_proj.weight"].dtype == torch.uint8


@configs
def test_what_was_trained_is_saved_packed(kind, tmp_path):
    model = train(kind, tmp_path / "run")
    assert not any(isinstance(module, LatentLinear) for module in model.modules())
    assert sum(isinstance(module, TernaryLinear) for module in model.modules()) == 21 + 1  # and the tied head
    model.save_pretrained(tmp_path / "out")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        assert torch.equal(again(**tiny_inputs("llama")).logits, model.eval()(**tiny_inputs("llama")).logits)
    assert hf_compact.inspect_folder(tmp_path / "out")["body_bits_per_weight"] < 5


def test_norms_of_a_bfloat16_model_do_not_make_it_a_float32_one(tmp_path):
    model = tiny_model("llama", torch.bfloat16)
    own = callback("norms")
    own.finalize(own.prepare(model)).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(again(**tiny_inputs("llama")).logits, model(**tiny_inputs("llama")).logits)


def test_a_checkpoint_in_the_middle_is_a_dense_one(tmp_path):
    train("ternary", tmp_path)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3", output_loading_info=True)
    assert not any(info.values())
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_the_packed_model_is_what_was_trained(tmp_path):
    """The loss of the last state in training is that of the packed model, before the embedding is rounded."""
    model, own = tiny_model("llama"), TernaryCallback(TernaryConfig(embedding_bits=None), num_steps=1, ramp_share=0.0)
    own.prepare(model)
    own.begin_step(model, 0)
    with torch.no_grad():
        before = model(**tiny_inputs("llama")).logits
        after = own.finalize(model)(**tiny_inputs("llama")).logits
    assert (before - after).abs().max() <= 1e-5 * before.abs().max().clamp_min(1)


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"bf16": True},
        {"torch_compile": True, "torch_compile_backend": "eager"},
    ],
    ids=["checkpointing", "accumulation", "bf16", "compiled"],
)
def test_other_ways_to_train_give_the_same_model(settings, tmp_path, recwarn):
    recwarn.clear()
    plain, other = train("ternary", tmp_path / "a"), train("ternary", tmp_path / "b", **settings)
    name = "model.layers.0.mlp.up_proj"
    a, b = plain.get_submodule(name).to_dense(), other.get_submodule(name).to_dense()
    lost = (a - b).norm() / a.norm()
    assert lost < (0.5 if "bf16" in settings else 0.05)
    assert torch.isfinite(other(**tiny_inputs("llama")).logits).all()


def test_ramps_rise_from_nothing_to_all():
    ramps = {ramp: TernaryCallback(ramp=ramp, ramp_share=0.4, num_steps=20) for ramp in ("linear", "cosine", "step")}
    found = {ramp: [one.strength(step) for step in range(20)] for ramp, one in ramps.items()}
    assert found["linear"][:9] == pytest.approx([0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1])
    assert found["step"][:9] == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1]
    assert found["cosine"][4] == pytest.approx(0.5)
    assert all(values == sorted(values) and set(values[8:]) == {1.0} for values in found.values())
    assert TernaryCallback(ramp_share=0.0, num_steps=5).strength(0) == 1.0
    with pytest.raises(ConfigError, match="num_steps must be given in a loop of your own"):
        TernaryCallback().strength(0)


def test_weight_decay_ends_half_way():
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": weights[:1], "weight_decay": 0.1}, {"params": weights[1:], "weight_decay": 0.0}])
    own = TernaryCallback(num_steps=10)
    seen = []
    for step in (0, 4, 5, 9, 2):  # the last one: a run that is resumed with another length finds its decay again
        own.set_decay_(optimizer, step)
        seen.append([group["weight_decay"] for group in optimizer.param_groups])
    assert seen == [[0.1, 0.0], [0.1, 0.0], [0.0, 0.0], [0.0, 0.0], [0.1, 0.0]]


def test_learned_steps_do_not_decay(tmp_path):
    class Still(Trainer):
        """Its gradients are all zero, so what moves has decayed."""

        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) * 0

    config = TernaryConfig(scale="lsq", bits=2, granularity="row", embedding_bits=None)
    own, model, name = TernaryCallback(config, decay_share=1.0), tiny_model("llama"), "model.layers.0.mlp.up_proj"
    embedding = model.get_input_embeddings().weight.detach().clone()
    trainer = Still(model, arguments(tmp_path, save_strategy="no"), train_dataset=Tokens(), callbacks=[own])
    steps = model.get_submodule(name).step.detach().clone()
    trainer.train()
    assert torch.equal(model.get_submodule(name).scale, steps.flatten())
    assert not torch.equal(model.get_input_embeddings().weight, embedding)
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.1, 0.0]
    assert sum(parameter.numel() == 72 for group in trainer.optimizer.param_groups for parameter in group["params"]) == 6


def test_norms_start_with_the_size_of_their_inputs():
    model, batches = tiny_model("llama"), [tiny_inputs("llama")]
    seen = {}
    handle = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda m, a: seen.update(x=a[0]))
    with torch.no_grad():
        before = model(**batches[0]).logits
    handle.remove()
    own = TernaryCallback(is_sub_norm=True, calibration=batches, num_steps=4)
    own.prepare(model)
    own.begin_step(model, 0)
    with torch.no_grad():
        assert torch.equal(model(**batches[0]).logits, before)
    norm = model.model.layers[0].mlp.down_proj.sub_norm
    torch.testing.assert_close(norm.detach(), torch.full_like(norm, seen["x"].square().mean().sqrt().item()))
    assert model.model.layers[0].self_attn.o_proj.sub_norm is not None
    assert model.model.layers[0].mlp.up_proj.sub_norm is None


@pytest.mark.parametrize(("share", "is_told"), [(1.0, True), (0.5, False)], ids=["all", "half"])
def test_a_training_that_ends_before_full_strength_says_so(share, is_told, tmp_path, caplog):
    own = TernaryCallback(ramp_share=share)
    args = arguments(tmp_path, max_steps=4, save_strategy="no")
    Trainer(tiny_model("llama"), args, train_dataset=Tokens(), callbacks=[own]).train()
    assert ("training ended at step 4, before" in caplog.text) == is_told


@pytest.mark.parametrize(("best", "is_told"), [(2, True), (4, False)], ids=["ramp", "full"])
def test_a_best_checkpoint_from_the_ramp_says_so(best, is_told, tmp_path, caplog):
    class Scored(Trainer):
        def evaluate(self, *args, **kwargs):
            metrics = {"eval_loss": float(self.state.global_step != best)}
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    args = arguments(tmp_path, save_steps=2, eval_steps=2, eval_strategy="steps", load_best_model_at_end=True)
    own = TernaryCallback(ramp_share=0.5)
    Scored(tiny_model("llama"), args, train_dataset=Tokens(), eval_dataset=Tokens(), callbacks=[own]).train()
    assert ("the best checkpoint is from step 2, before" in caplog.text) == is_told


def test_training_learns_what_rounding_loses():
    """A toy language: after 120 steps the trained model is far better than the same one rounded."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack(
        [(torch.arange(16) * int(a) + int(b)) % 50 + 3 for a, b in torch.randint(1, 5, (64, 2), generator=generator)]
    )

    def loss(model) -> torch.Tensor:
        return model(input_ids=ids, labels=ids).loss

    model, own = tiny_model("llama", num_hidden_layers=1), TernaryCallback(num_steps=120)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.5)
    own.prepare(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(120):
        own.begin_step(model, step)
        own.set_decay_(optimizer, step)
        loss(model.train()).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        trained = loss(own.finalize(model).eval()).item()
    dense = tiny_model("llama", num_hidden_layers=1)
    optimizer = torch.optim.AdamW(dense.parameters(), lr=1e-2)
    for _ in range(120):
        loss(dense.train()).backward()
        optimizer.step()
        optimizer.zero_grad()
    rounded = TernaryCallback(num_steps=1).prepare(dense)
    with torch.no_grad():
        for module in rounded.modules():
            if isinstance(module, LatentLinear):
                module.strength.fill_(1.0)
        assert loss(rounded.eval()).item() > trained + 1.0


def _rank(rank: int, folder: Path) -> None:
    model = train("norms", folder / "run", per_device_train_batch_size=2, save_strategy="no", ddp_backend="gloo")
    states = [None, None]
    dist.all_gather_object(states, {name: tensor.float().sum().item() for name, tensor in model.state_dict().items()})
    assert states[0] == states[1]
    if rank == 0:
        model.save_pretrained(folder / "two")


@pytest.mark.distributed
def test_two_ranks_train_one_model(tmp_path):
    run_ranks(_rank, tmp_path, seconds=280)
    one = train("norms", tmp_path / "one", save_strategy="no")
    two = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    name = "model.layers.0.mlp.up_proj"
    a, b = one.get_submodule(name).to_dense(), two.get_submodule(name).to_dense()
    assert (a - b).norm() / a.norm() < 0.2
