"""Distillation in a stock Trainer: its gradients, its caches, what it refuses."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_callback import TrainerControl, TrainerState

from hf_compact import DistillationCallback, TernaryCallback
from hf_compact.distillation import divergence
from hf_compact.errors import ConfigError, FormatError, NumericalError, OutputError
from hf_compact.methods.distillation import DistillationTerms, TeacherCache, write_cache
from hf_compact.methods.distillation.callback import fused_fields, labelled
from tests.conftest import VOCABULARY, tiny_inputs, tiny_model

ROWS = tiny_inputs("llama", 16, 12, seed=3)["input_ids"]


class Rows(torch.utils.data.Dataset):
    """Rows of unequal numbers of labels."""

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        labels = ROWS[index].clone()
        labels[: index % 7] = -100
        return {"input_ids": ROWS[index], "labels": labels}


def damaged() -> torch.nn.Module:
    model = tiny_model("llama")
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def arguments(folder: Path, size: int = 16, **settings) -> TrainingArguments:
    defaults = {"max_steps": 1, "learning_rate": 1e-3, "max_grad_norm": 0.0}
    return FusedArguments(
        str(folder), report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, logging_steps=1,
        per_device_train_batch_size=size, gradient_accumulation_steps=16 // size, **defaults | settings,
    )  # fmt: skip


@dataclass
class FusedArguments(TrainingArguments):
    """Of a Trainer that sums log-probabilities by itself."""

    loss_type: str = "nll"


class FusedTrainer(Trainer):
    """Calls the model and makes its loss as TRL's SFTTrainer does."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        count = outputs.label_mask.sum() if num_items_in_batch is None else num_items_in_batch
        assert outputs.log_probs.shape == outputs.entropy.shape == outputs.is_top1.shape == outputs.label_mask.shape
        return -outputs.log_probs.sum() / torch.as_tensor(count).clamp(min=1)


def gradients(
    model, folder: Path, size: int, own: DistillationCallback, kind: type[Trainer] = Trainer, **settings
) -> dict[str, torch.Tensor]:
    found = {}

    class Watch(kind):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    class Take(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            found.update({name: p.grad.clone() for name, p in kwargs["model"].named_parameters() if p.grad is not None})

    Watch(
        model, arguments(folder, size, **settings), train_dataset=Rows(), callbacks=[own, Take()],
        data_collator=default_data_collator,
    ).train()  # fmt: skip
    return found


KINDS = {
    "forward": {},
    "reverse": {"divergence": "reverse", "temperature": 2.0},
    "balanced": {"divergence": "balanced", "label_weight": 0.3},
    "sigmoid": {"divergence": "balanced", "balance": "sigmoid"},
    "hidden": {"hidden_weight": 1.0, "hidden_layers": (0, -1), "logits_weight": 0.0},
    "relations": {"relation_weight": 1.0, "relation_heads": 4},
}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_do_not_depend_on_accumulation(kind, tmp_path):
    once, four = (
        gradients(damaged(), tmp_path, size, DistillationCallback(tiny_model("llama"), **KINDS[kind])) for size in (16, 4)
    )
    assert any(gradient.any() for gradient in once.values())
    for name in once:
        torch.testing.assert_close(once[name], four[name], rtol=1e-4, atol=1e-7)


def test_the_loss_is_the_divergence_over_labelled_positions(tmp_path):
    teacher, model = tiny_model("llama"), damaged()
    batch = default_data_collator([Rows()[i] for i in range(16)])
    own = DistillationCallback(teacher)
    own.attach_(model)
    found = model.train()(**batch).loss
    kept = batch["labels"][:, 1:] != -100
    expected = divergence(model(**batch).logits[:, :-1][kept], teacher(**batch).logits[:, :-1][kept])
    torch.testing.assert_close(found, expected)
    assert model.eval()(**batch).loss != found, "evaluation keeps the model's own loss"
    own.detach_()
    assert model.train()(**batch).loss != found
    assert not model._forward_hooks


@pytest.mark.parametrize("is_mixed", [False, True])
def test_the_teacher_multiplies_in_the_precision_of_the_trainer(is_mixed, tmp_path):
    teacher, seen = tiny_model("llama"), []
    teacher.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    settings = arguments(tmp_path, bf16=is_mixed, max_steps=2)
    Trainer(damaged(), settings, train_dataset=Rows(), callbacks=[DistillationCallback(teacher)]).train()
    assert seen == [torch.bfloat16 if is_mixed else torch.float32] * 2


def test_the_same_model_has_no_distance(tmp_path):
    terms = {"hidden_weight": 1.0, "relation_weight": 1.0, "divergence": "balanced"}
    model = tiny_model("llama")
    own = DistillationCallback(copy.deepcopy(model), **terms)
    own.attach_(model)
    assert model.train()(input_ids=ROWS).loss.abs() < 1e-5


def test_a_distilled_ternary_model_comes_nearer(tmp_path):
    """Quantized distillation: both callbacks in one Trainer."""

    def distance(model) -> float:
        with torch.no_grad():
            return divergence(model.eval()(ROWS).logits, tiny_model("llama")(ROWS).logits).item()

    rounded = tiny_model("llama")
    own = TernaryCallback(num_steps=1, ramp_share=0.0)
    own.begin_step(own.prepare(rounded), 0)
    model = tiny_model("llama")
    both = [TernaryCallback(), DistillationCallback(tiny_model("llama"))]
    args = arguments(tmp_path, max_steps=40, learning_rate=5e-3)
    Trainer(model, args, train_dataset=Rows(), callbacks=both, data_collator=default_data_collator).train()
    assert distance(model) < 0.7 * distance(rounded)


def cached(folder: Path, tokenizer, **settings) -> TeacherCache:
    return write_cache(tiny_model("llama"), list(ROWS), folder, tokenizer, **settings)


@pytest.mark.parametrize("size", [16, 4])
def test_a_whole_cache_gives_the_teachers_gradients(size, tmp_path, tokenizer):
    cache = cached(tmp_path / "cache", tokenizer, count=VOCABULARY, tokens_per_shard=50)
    assert len(cache.shards) == 4
    live = gradients(damaged(), tmp_path, 16, DistillationCallback(tiny_model("llama")))
    stored = gradients(damaged(), tmp_path, size, DistillationCallback(cache=cache.folder))
    for name in live:
        assert (live[name] - stored[name]).norm() < 0.02 * live[name].norm()


def test_a_cache_holds_what_it_says(tmp_path, tokenizer):
    cache = cached(tmp_path, tokenizer, count=8)
    tensors = load_file(tmp_path / "teacher-00000.safetensors")
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items() if name in ("ids", "log_probs", "tail")} == {
        "ids": (torch.uint16, (192, 8)), "log_probs": (torch.float16, (192, 8)), "tail": (torch.float32, (192,)),
    }  # fmt: skip
    ids, log_probs = cache.read(ROWS[5])
    with torch.no_grad():
        exact = tiny_model("llama")(ROWS[5:6]).logits[0].log_softmax(-1)
    torch.testing.assert_close(log_probs[:, :-1], exact.gather(1, ids), rtol=1e-3, atol=5e-3)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(12), rtol=2e-3, atol=2e-3)


def test_padding_does_not_hide_a_sequence(tmp_path, tokenizer):
    cache = cached(tmp_path, tokenizer)
    model, losses = damaged().train(), []
    for left in (0, 3):
        own = DistillationCallback(cache=cache)
        own.attach_(model)
        pad = torch.nn.functional.pad
        mask = pad(torch.ones_like(ROWS), (left, 0))
        position = (mask.cumsum(1) - 1).clamp_min(0)
        ids = pad(ROWS, (left, 0))
        losses.append(model(input_ids=ids, attention_mask=mask, position_ids=position).loss.item())
        own.detach_()
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("kind", ["left", "labelled pads"])
def test_what_a_cache_lacks_is_not_compared(kind, tmp_path, tokenizer):
    """The pad before the first token has a label, that token, and so have pads that nobody masked; the teacher was never asked there."""
    model = tiny_model("llama").train()
    own = DistillationCallback(cache=cached(tmp_path, tokenizer, count=VOCABULARY))
    own.attach_(model)
    widths = (3, 0) if kind == "left" else (0, 3)
    ids, mask = (torch.nn.functional.pad(rows, widths) for rows in (ROWS, torch.ones_like(ROWS)))
    labels = ids.masked_fill(mask == 0, -100) if kind == "left" else ids
    position = (mask.cumsum(1) - 1).clamp_min(0)
    assert model(input_ids=ids, attention_mask=mask, position_ids=position, labels=labels).loss.item() < 1e-3


def test_a_cache_of_something_else_is_refused(tmp_path, tokenizer):
    cache = cached(tmp_path, tokenizer)
    for wrong, match in (
        ({"teacher": damaged()}, "was made with another model"), ({"rows": list(ROWS[1:])}, "was made with another packing"),
    ):  # fmt: skip
        with pytest.raises(FormatError, match=match):
            TeacherCache(tmp_path, **wrong)
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<new>"])
    with pytest.raises(FormatError, match="was made with another tokenizer"):
        TeacherCache(tmp_path, tokenizer=other)
    args = arguments(tmp_path / "run")
    trainer = Trainer(damaged(), args, train_dataset=Rows(), callbacks=[DistillationCallback(cache=cache)], processing_class=other,
                      data_collator=default_data_collator)  # fmt: skip
    with pytest.raises(FormatError, match="was made with another tokenizer"):
        trainer.train()
    with pytest.raises(FormatError, match="has no outputs for a sequence of 12 tokens"):
        cache.read(ROWS[0] + 1)
    with pytest.raises(OutputError, match="belongs to a run with another model"):
        write_cache(damaged(), list(ROWS), tmp_path, tokenizer)
    TeacherCache(tmp_path, tokenizer=tokenizer, teacher=tiny_model("llama"), rows=list(ROWS))


def test_an_interrupted_cache_goes_on(tmp_path, tokenizer):
    whole = cached(tmp_path / "whole", tokenizer, tokens_per_shard=50)

    def stop(done: int, total: int) -> None:
        if done >= 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path / "part", tokenizer, tokens_per_shard=50, progress=stop)
    with pytest.raises(FormatError, match="is not a complete cache"):
        TeacherCache(tmp_path / "part")
    first = tmp_path / "part" / "teacher-00000.safetensors"
    stamp = first.stat().st_mtime_ns
    again = cached(tmp_path / "part", tokenizer, tokens_per_shard=50)
    assert first.stat().st_mtime_ns == stamp
    assert all(torch.equal(a, b) for row in ROWS for a, b in zip(again.read(row), whole.read(row), strict=True))
    (tmp_path / "part" / "teacher-00002.safetensors").unlink()
    with pytest.raises(FormatError, match="lacks shard 2"):
        TeacherCache(tmp_path / "part")
    index = tmp_path / "whole" / "cache.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"format_version": 7}))
    with pytest.raises(FormatError, match="format_version must be 1, got 7"):
        TeacherCache(tmp_path / "whole")


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"count": 0}, r"count must be in \[1, 384\], got 0"), ({"temperature": 0.0}, "must be above 0"), ({"tokens_per_shard": 0}, "must be above 0")],
    ids=str,
)  # fmt: skip
def test_bad_settings_of_a_cache_name_themselves(settings, match, tmp_path, tokenizer):
    with pytest.raises(ConfigError, match=match):
        cached(tmp_path / "cache", tokenizer, **settings)
    with pytest.raises(ConfigError, match="rows must hold at least one sequence"):
        write_cache(tiny_model("llama"), [], tmp_path / "cache", tokenizer)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"divergence": "l2"}, "divergence must be one of forward, reverse, balanced"), ({"logits_weight": -1.0}, "logits_weight must be at least 0"),
     ({"logits_weight": 0.0}, "must have one weight above 0"), ({"temperature": 0.0}, "temperature must be above 0"),
     ({"hidden_layers": ()}, "hidden_layers must name at least one block")],
    ids=str,
)  # fmt: skip
def test_bad_terms_name_themselves(settings, match):
    with pytest.raises(ConfigError, match=match):
        DistillationTerms(**settings)


def test_models_that_cannot_be_compared_are_refused(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match="exactly one of teacher and cache"):
        DistillationCallback(tiny_model("llama"), cache=tmp_path)
    cache = cached(tmp_path, tokenizer)
    with pytest.raises(ConfigError, match="a cache holds log-probabilities only"):
        DistillationCallback(cache=cache, hidden_weight=1.0)
    with pytest.raises(ConfigError, match=r"temperature must be that of the cache, 1.0, got 2.0"):
        DistillationCallback(cache=cache, temperature=2.0)
    with pytest.raises(ConfigError, match="must have one vocabulary, got 100 and 384"):
        DistillationCallback(tiny_model("llama", vocab_size=100)).attach_(tiny_model("llama"))
    with pytest.raises(ConfigError, match="layer 5 must be a block of both models, which have 3 and 3"):
        DistillationCallback(tiny_model("llama"), hidden_weight=1.0, hidden_layers=(5,)).attach_(tiny_model("llama"))
    with pytest.raises(ConfigError, match="relations need separate queries, keys and values"):
        DistillationCallback(tiny_model("gpt2"), relation_weight=1.0).attach_(tiny_model("gpt2"))
    for terms, match in (
        ({"hidden_weight": 1.0}, "hidden states must have one width, got 32 and 16"), ({"label_weight": 1.0}, "needs labels"),
        ({"relation_weight": 1.0, "relation_heads": 3}, "terms.relation_heads must divide the width"),
    ):  # fmt: skip
        model = tiny_model("llama").train()
        DistillationCallback(tiny_model("llama", hidden_size=16), **terms).attach_(model)
        with pytest.raises(ConfigError, match=match):
            model(input_ids=ROWS)


def test_labels_of_other_models_are_not_shifted():
    labels = torch.tensor([[-100, 5, -100]])
    model = tiny_model("bert_mlm")
    assert labelled(model, torch.zeros(1, 3, 7), {"labels": labels}).tolist() == [[False, True, False]]
    assert labelled(tiny_model("llama"), torch.zeros(1, 3, 7), {"labels": labels}).tolist() == [[True, False, False]]
    mask = torch.tensor([[1, 0, 1]])
    assert labelled(model, torch.zeros(1, 3, 7), {"attention_mask": mask}).tolist() == [[True, False, True]]
    assert labelled(model, torch.zeros(2, 7), {"labels": torch.zeros(2)}).tolist() == [True, True]


@pytest.mark.parametrize(
    ("settings", "terms", "match"),
    [({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor must be 0, got 0.1"),
     ({"loss_type": "dft"}, {}, "loss_type must be nll, got dft"),
     ({"torch_compile": True, "torch_compile_backend": "eager"}, {"hidden_weight": 1.0}, "which torch_compile leaves out")],
    ids=["smoothing", "weighed", "compiled"],
)  # fmt: skip
def test_trainings_that_would_leave_terms_out_are_refused(settings, terms, match, tmp_path):
    own = DistillationCallback(tiny_model("llama"), **terms)
    with pytest.raises(ConfigError, match=match):
        own.on_train_begin(arguments(tmp_path, **settings), TrainerState(), TrainerControl(), model=damaged())


def test_a_compiled_training_learns_from_the_cache_as_well(tmp_path, tokenizer):
    """The hook reads files, which no graph can hold."""
    cache = cached(tmp_path / "cache", tokenizer, count=8)
    plain, compiled = (
        gradients(damaged(), tmp_path, 4, DistillationCallback(cache=cache), **settings)
        for settings in ({}, {"torch_compile": True, "torch_compile_backend": "eager"})
    )
    assert any(gradient.any() for gradient in plain.values())
    for name in plain:
        torch.testing.assert_close(compiled[name], plain[name], rtol=1e-4, atol=1e-7)


def test_a_cache_of_a_larger_vocabulary_is_refused(tmp_path, tokenizer):
    cache = write_cache(tiny_model("llama"), list(ROWS % 90), tmp_path, tokenizer)
    model = tiny_model("llama", vocab_size=100).train()
    DistillationCallback(cache=cache).attach_(model)
    with pytest.raises(ConfigError, match=r"must have one vocabulary, got outputs for id \d+ and 100 entries"):
        model(input_ids=ROWS % 90)


def test_a_teacher_that_overflows_is_not_kept(tmp_path, tokenizer):
    teacher = tiny_model("llama")
    torch.nn.init.constant_(teacher.model.layers[1].mlp.up_proj.weight, float("inf"))
    with pytest.raises(NumericalError, match="outputs of a sequence of 12 tokens are not finite"):
        write_cache(teacher, list(ROWS), tmp_path, tokenizer)
    assert not list(tmp_path.glob("*.safetensors"))


def test_terms_without_a_gradient_are_refused():
    """As inside a block with reentrant checkpointing, where the loss has one all the same."""
    model = damaged().train().requires_grad_(False)
    model.model.norm.requires_grad_()
    DistillationCallback(tiny_model("llama"), relation_weight=1.0).attach_(model)
    with pytest.raises(ConfigError, match=r"output of model.layers.2.self_attn.q_proj has no gradient"):
        model(input_ids=ROWS)


def test_adapters_are_distilled_through_their_wrapper(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(damaged(), LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights="gaussian"))
    own = DistillationCallback(tiny_model("llama"))
    args = arguments(tmp_path, max_steps=3)
    trainer = Trainer(model, args, train_dataset=Rows(), callbacks=[own], data_collator=default_data_collator)
    found = trainer.train().training_loss
    with torch.no_grad():
        start = divergence(damaged()(ROWS).logits, tiny_model("llama")(ROWS).logits).item()
    assert found == pytest.approx(start, rel=0.5)


def classifier(seed: int) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


@pytest.mark.parametrize("term", ["hidden", "relation"])
def test_terms_of_a_classifier_do_not_depend_on_padding(term):
    student, teacher = classifier(0).train(), classifier(1).eval()
    own = DistillationCallback(teacher, logits_weight=0.0, **{f"{term}_weight": 1.0}, relation_heads=4)
    own.attach_(student)
    mask = torch.ones_like(ROWS)
    mask[::2, 8:] = 0
    losses = [student(input_ids=ROWS, attention_mask=mask, labels=torch.zeros(len(ROWS), dtype=torch.long)).loss]
    for right in (0, 5):
        one = [torch.nn.functional.pad(values, (0, right)) for values in (ROWS, mask)]
        rows = [student(input_ids=one[0][i, None], attention_mask=one[1][i, None]).loss for i in range(len(ROWS))]
        losses.append(torch.stack(rows).mean())
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0])
    assert losses[0] > 0


def test_the_hidden_term_of_a_classifier_is_a_mean_over_tokens():
    student, teacher = classifier(0).train(), classifier(1).eval()
    mask = torch.ones_like(ROWS)
    mask[1:, 7:] = 0
    batch = {"input_ids": ROWS, "attention_mask": mask, "output_hidden_states": True}
    mine, theirs = (model(**batch).hidden_states[-1] for model in (student, teacher))
    lost = (mine - theirs).square().sum(-1) / theirs.square().sum(-1)
    expected = torch.stack([row[own.bool()].mean() for row, own in zip(lost, mask, strict=True)]).mean()
    DistillationCallback(teacher, logits_weight=0.0, hidden_weight=1.0, hidden_layers=(-1,)).attach_(student)
    torch.testing.assert_close(student(**batch).loss, expected)


def sentences() -> dict[str, torch.Tensor]:
    labels = ROWS.flip(1)[:, :8].clone()
    labels[::3, 5:] = -100
    return {"input_ids": ROWS, "attention_mask": torch.ones_like(ROWS), "labels": labels}


def other_t5() -> torch.nn.Module:
    teacher = tiny_model("t5", dropout_rate=0.0)
    torch.nn.init.normal_(teacher.lm_head.weight, std=0.3, generator=torch.Generator().manual_seed(1))
    return teacher


def test_an_encoder_decoder_is_distilled_by_its_labels():
    teacher, student, batch = other_t5(), tiny_model("t5", dropout_rate=0.0).train(), sentences()
    DistillationCallback(teacher).attach_(student)
    found = student(**batch)
    kept = batch["labels"] != -100
    with torch.no_grad():
        target = teacher(**batch).logits[kept]
    torch.testing.assert_close(found.loss, divergence(found.logits[kept], target))
    given = student.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    torch.testing.assert_close(student(**batch, decoder_input_ids=given).loss, found.loss)


@pytest.mark.parametrize("term", ["hidden", "relation"])
def test_terms_of_a_decoder_count_its_own_tokens(term):
    settings = {"logits_weight": 0.0, f"{term}_weight": 1.0, "relation_heads": 4}
    teacher, student, batch = other_t5(), tiny_model("t5", dropout_rate=0.0).train(), sentences()
    with torch.no_grad():
        teacher.decoder.block[0].layer[0].SelfAttention.q.weight.mul_(2)
    DistillationCallback(teacher, **settings).attach_(student)
    padded = torch.nn.functional.pad(batch["labels"], (0, 4), value=-100)
    found = student(**batch).loss
    assert found > 0
    torch.testing.assert_close(student(**batch | {"labels": padded}).loss, found)
    with pytest.raises(ConfigError, match=r"layer 0 must be a block of the decoder of T5.*, it is encoder.block.0"):
        DistillationCallback(teacher, **settings | {"hidden_layers": (0,), "relation_layer": 0}).attach_(student)


def test_a_cache_refuses_an_encoder_decoder(tmp_path, tokenizer):
    rule = "a cache finds sequences by their input_ids, T5ForConditionalGeneration is an encoder-decoder"
    with pytest.raises(ConfigError, match=rule):
        write_cache(tiny_model("t5"), list(ROWS), tmp_path / "t5", tokenizer)
    assert not (tmp_path / "t5").exists()
    with pytest.raises(ConfigError, match=rule):
        DistillationCallback(cache=cached(tmp_path, tokenizer)).attach_(tiny_model("t5"))


def test_a_model_without_logits_is_refused_by_name(tmp_path, tokenizer):
    model = BertForQuestionAnswering(classifier(0).config).train()
    DistillationCallback(classifier(1)).attach_(model)
    with pytest.raises(ConfigError, match="the outputs of BertForQuestionAnswering have none"):
        model(input_ids=ROWS)
    student = classifier(0).train()
    DistillationCallback(model).attach_(student)
    with pytest.raises(ConfigError, match="the outputs of BertForQuestionAnswering have none"):
        student(input_ids=ROWS)
    with pytest.raises(ConfigError, match="the outputs of BertForQuestionAnswering have none"):
        write_cache(model, list(ROWS), tmp_path, tokenizer)


@pytest.mark.parametrize("size", [16, 8], ids=["once", "twice"])
@pytest.mark.parametrize("kind", ["balanced", "hidden"])
def test_a_trainer_with_a_fused_head_gives_the_same_gradients(kind, size, tmp_path):
    stock, fused = (
        gradients(damaged(), tmp_path, size, DistillationCallback(tiny_model("llama"), **KINDS[kind]), one)
        for one in (Trainer, FusedTrainer)
    )
    assert any(gradient.any() for gradient in stock.values())
    for name in stock:
        torch.testing.assert_close(fused[name], stock[name], rtol=1e-4, atol=1e-7)


def test_what_a_fused_head_puts_out_beside_the_loss():
    logits = tiny_model("llama")(ROWS).logits.detach()
    labels = ROWS.clone()
    labels[::2, :5] = -100
    labels[1, 1] = logits[1, 0].argmax()
    found = fused_fields(logits, labels, torch.tensor(3.0))
    mask = labels[:, 1:] != -100
    assert torch.equal(found["label_mask"], mask)
    assert -found["log_probs"].sum() == pytest.approx(3.0)
    expected = torch.distributions.Categorical(logits=logits[:, :-1]).entropy() * mask
    torch.testing.assert_close(found["entropy"], expected)
    assert found["is_top1"][1, 0]
    assert not found["is_top1"][~mask].any()


def test_a_fused_batch_without_labelled_tokens_has_a_gradient_of_zero(tmp_path):
    model = damaged().train()
    own = DistillationCallback(tiny_model("llama"), label_weight=1.0)
    own.on_train_begin(arguments(tmp_path), TrainerState(), TrainerControl(), model=model)
    found = model(input_ids=ROWS, labels=torch.full_like(ROWS, -100), fused_lm_head=True)
    found.log_probs.sum().backward()
    assert found.log_probs.sum() == 0
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_fused_losses_of_another_kind_are_refused(tmp_path):
    model = damaged().train()
    own = DistillationCallback(tiny_model("llama"))
    own.on_train_begin(arguments(tmp_path, loss_type="sigmoid"), TrainerState(), TrainerControl(), model=model)
    with pytest.raises(ConfigError, match="must have loss_type nll, got sigmoid"):
        model(input_ids=ROWS, labels=ROWS, fused_lm_head=True)
    own.on_train_begin(arguments(tmp_path), TrainerState(), TrainerControl(), model=model)
    with pytest.raises(ConfigError, match="must give labels"):
        model(input_ids=ROWS, fused_lm_head=True)


@pytest.mark.filterwarnings("ignore")  # of another library
@pytest.mark.parametrize("size", [16, 8], ids=["once", "twice"])
def test_the_sft_trainer_gives_the_gradients_of_the_stock_one(size, tmp_path, tokenizer):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    rows = [Rows()[i] for i in range(16)]
    data = Dataset.from_dict({
        "input_ids": [row["input_ids"].tolist() for row in rows],
        "completion_mask": [(row["labels"] != -100).long().tolist() for row in rows],
    })  # fmt: skip
    found = {}

    class Watch(trl.SFTTrainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    class Take(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            found.update({name: p.grad.clone() for name, p in kwargs["model"].named_parameters() if p.grad is not None})

    args = trl.SFTConfig(
        str(tmp_path), max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=16 // size, max_grad_norm=0.0,
        report_to=[], save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
        completion_only_loss=True,
    )  # fmt: skip
    own, processing = DistillationCallback(tiny_model("llama"), label_weight=0.3), copy.deepcopy(tokenizer)
    processing.pad_token = processing.eos_token = processing.convert_ids_to_tokens(1)
    Watch(damaged(), args, train_dataset=data, processing_class=processing, callbacks=[own, Take()]).train()
    stock = gradients(damaged(), tmp_path, size, DistillationCallback(tiny_model("llama"), label_weight=0.3))
    for name in stock:
        torch.testing.assert_close(found[name], stock[name], rtol=1e-4, atol=1e-7)
