"""Distillation in a stock Trainer: a forward hook puts the loss in the place of the model's own.

The hook sees what the model sees, runs the teacher or reads the cache, and sums over the labelled positions. It divides by
`num_items_in_batch` where the Trainer gives it, which is the count over all micro-batches (and ranks): a mean per
micro-batch would be as many times too large.

Newer SFTTrainers of TRL ask for `fused_lm_head`, a forward pass without logits, and sum its `log_probs` themselves. They get
the logits' pass, and in the place of log-probabilities values that add up to the distillation loss.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ...arch import describe
from ...capture import without_cache
from ...errors import ConfigError
from ...functional.divergence import kl_divergence, lost_energy
from .cache import TeacherCache, check_rows_say_all, has_two_inputs, logits_of
from .config import DistillationTerms
from .functional import balanced_kl, entropy, gather_log_probs, log_probs_of, relation_divergence

_IGNORED = -100
_NOT_FOR_TEACHER = ("labels", "num_items_in_batch", "fused_lm_head")


class DistillationCallback(TrainerCallback):
    """The loss of training becomes the distance from a teacher; evaluation keeps the model's own.

    Args:
        teacher: a model with the same tokenizer, or
        cache: what `write_cache` has stored of one.
        terms: what is added up.
        settings: fields of `DistillationTerms`, in the place of those of `terms`.

    Raises:
        ConfigError: not exactly one of teacher and cache is given, or the cache cannot give the terms.

    >>> DistillationCallback()
    Traceback (most recent call last):
    hf_compact.errors.ConfigError: exactly one of teacher and cache must be given
    """

    def __init__(
        self, teacher: PreTrainedModel | None = None, cache: TeacherCache | str | Path | None = None,
        terms: DistillationTerms | None = None, **settings: Any,
    ) -> None:  # fmt: skip
        """Open the cache."""
        if (teacher is None) == (cache is None):
            raise ConfigError("exactly one of teacher and cache must be given")
        self.terms = replace(terms or DistillationTerms(), **settings)
        self.teacher = teacher
        self.cache = TeacherCache(cache) if isinstance(cache, str | Path) else cache
        if self.cache is not None and self.terms.needs_teacher:
            raise ConfigError("terms of hidden states and relations need a teacher, a cache holds log-probabilities only")
        if self.cache is not None and self.cache.temperature != self.terms.temperature:
            raise ConfigError(
                f"terms.temperature must be that of the cache, {self.cache.temperature}, got {self.terms.temperature}"
            )
        self._handles: list[Any] = []
        self._seen: dict[str, Tensor] = {}
        self._pairs: list[tuple[str, str, str]] = []
        self._loss_type: Any = None
        self._is_fused = False
        self._mixed: torch.dtype | None = None

    def attach_(self, model: nn.Module) -> None:
        """Put the hooks on a model, also one that an adapter wraps; for a loop of your own.

        Raises:
            ConfigError: teacher and student cannot be compared, or the cache cannot tell the student's sequences apart.
        """
        student = unwrapped(model)
        if self.cache is not None:
            check_rows_say_all(student)
        if self.teacher is not None:
            self._check(student)
        self._handles.append(student.register_forward_pre_hook(self._ask_for_logits, with_kwargs=True))
        self._handles.append(student.register_forward_hook(self._replace_loss, with_kwargs=True))
        for mine, theirs, _ in self._pairs:
            for side, owner, name in (("student", student, mine), ("teacher", self.teacher, theirs)):
                self._handles.append(owner.get_submodule(name).register_forward_hook(self._note(f"{side} {name}")))

    def detach_(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.clear()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """As `attach_`; the tokenizer that the Trainer knows must be that of the cache.

        Raises:
            ConfigError: the Trainer smooths labels or weighs tokens, and so has a loss of its own, or it compiles the modules
                that terms look into.
        """
        if getattr(args, "label_smoothing_factor", 0):
            raise ConfigError(
                f"label_smoothing_factor must be 0, got {args.label_smoothing_factor}: its loss would replace this one"
            )
        self._loss_type = getattr(args, "loss_type", None)
        if self._loss_type == "dft":
            raise ConfigError(
                "loss_type must be nll, got dft: it weighs tokens by their probabilities, which would replace this loss"
            )
        if getattr(args, "torch_compile", False) and self.terms.needs_teacher:
            raise ConfigError("terms of hidden states and relations need hooks inside the model, which torch_compile leaves out")
        # The Trainer's mixed precision ends with the student's forward, before the hook that asks the teacher.
        self._mixed = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        tokenizer = kwargs.get("processing_class")
        if self.cache is not None and tokenizer is not None:
            TeacherCache(self.cache.folder, tokenizer=tokenizer)
        if self.teacher is not None and self.teacher.device != args.device:  # some quantized models cannot be moved
            self.teacher.to(args.device)
        self.detach_()
        self.attach_(kwargs["model"])

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """As `detach_`."""
        self.detach_()
        self._mixed = None

    def _check(self, student: PreTrainedModel) -> None:
        teacher, terms = self.teacher, self.terms
        sizes = [getattr(model.config.get_text_config(), "vocab_size", None) for model in (student, teacher)]
        if sizes[0] != sizes[1]:
            raise ConfigError(f"teacher and student must have one vocabulary, got {sizes[1]} and {sizes[0]} entries")
        self._pairs = []
        if not terms.needs_teacher:
            return
        arch = describe(teacher)
        mine, theirs = describe(student).blocks, arch.blocks
        for layer in (
            *(terms.hidden_layers if terms.hidden_weight else ()),
            *([terms.relation_layer] * bool(terms.relation_weight)),
        ):
            if not all(-len(blocks) <= layer < len(blocks) for blocks in (mine, theirs)):
                raise ConfigError(f"layer {layer} must be a block of both models, which have {len(mine)} and {len(theirs)}")
            for model, block in ((student, mine[layer]), (teacher, theirs[layer])):
                if has_two_inputs(model) and model.get_submodule(block) not in set(model.get_decoder().modules()):
                    raise ConfigError(
                        f"layer {layer} must be a block of the decoder of {type(model).__name__}, it is {block}: "
                        "labels have no positions in the encoder"
                    )
        if terms.hidden_weight:
            self._pairs += [(mine[i], theirs[i], "hidden") for i in terms.hidden_layers]
        if terms.relation_weight:
            block = theirs[terms.relation_layer]
            names = [name for name in arch.targets(block) if arch.roles[name] in ("q", "k", "v")]
            if len(names) != 3:
                raise ConfigError(f"relations need separate queries, keys and values, {block} has {len(names)} of them")
            self._pairs += [(mine[terms.relation_layer] + name.removeprefix(block), name, "relation") for name in names]

    def _note(self, key: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._seen[key] = output[0] if isinstance(output, tuple) else output

        return hook

    @torch.compiler.disable
    def _ask_for_logits(self, model: PreTrainedModel, args: Any, kwargs: Mapping[str, Any]) -> Any:
        self._is_fused = model.training and bool(kwargs.get("fused_lm_head"))
        if not self._is_fused:
            return None
        if self._loss_type != "nll":  # as in DPO, whose loss is no sum of log-probabilities
            raise ConfigError(
                f"a Trainer that asks for fused_lm_head must have loss_type nll, got {self._loss_type}: another loss is not replaced"
            )
        if kwargs.get("labels") is None:
            raise ConfigError("a Trainer that asks for fused_lm_head must give labels, which are not shifted")
        return args, {name: value for name, value in kwargs.items() if name != "fused_lm_head"}

    @torch.compiler.disable
    def _replace_loss(self, model: PreTrainedModel, args: Any, kwargs: Mapping[str, Any], output: Any) -> Any:
        if not model.training:
            self._seen.clear()
            return output
        terms, logits = self.terms, logits_of(model, output)
        inputs = {name: value for name, value in kwargs.items() if name not in _NOT_FOR_TEACHER}
        inputs |= {"input_ids": args[0]} if args else {}
        inputs |= decoder_inputs(model, kwargs)
        kept = labelled(model, logits, kwargs)
        mask = inputs.get("attention_mask")
        if has_two_inputs(model) and logits.dim() == 3:
            mask = inputs.get("decoder_attention_mask", kept)  # the other one is of the encoder's tokens
        if self.cache is not None and mask is not None and mask.shape == kept.shape:
            kept = kept & mask.bool()  # a cache holds nothing of padding, the pad before the first token included
        target = None
        if self.teacher is not None:
            mixed = nullcontext() if self._mixed is None else torch.autocast(logits.device.type, self._mixed)
            with torch.no_grad(), without_cache(self.teacher), mixed:
                target = logits_of(self.teacher, self.teacher.eval()(**inputs))[kept]
        total = self._sum(logits, target, kept, inputs, mask)
        self._seen.clear()
        count = kwargs.get("num_items_in_batch")
        loss = total / (kept.sum().clamp_min(1) if count is None else count)
        if terms.label_weight:
            if output.get("loss") is None:
                raise ConfigError("terms.label_weight needs labels in the batch")
            if count is not None or kept.any():  # the model's mean over no labels is not a number
                loss = loss + terms.label_weight * output["loss"]
        output["loss"] = loss
        if self._is_fused:
            whole = loss * (kept.sum() if count is None else count)
            for name, values in fused_fields(logits.detach(), kwargs["labels"], whole).items():
                output[name] = values
        return output

    def _sum(self, logits: Tensor, target: Tensor | None, kept: Tensor, inputs: Mapping[str, Any], mask: Tensor | None) -> Tensor:
        """All terms but the labels', over the kept positions."""
        terms = self.terms
        total = logits.new_zeros((), dtype=torch.float32)
        if terms.logits_weight:
            total = total + terms.logits_weight * terms.temperature**2 * self._divergence(logits, target, kept, inputs).sum()
        for kind, weight in (("hidden", terms.hidden_weight), ("relation", terms.relation_weight)):
            values = [self._distance(pair, mask) for pair in self._pairs if pair[2] == kind]
            if logits.dim() == 2:  # one output for a whole sequence
                values = [sequence_means(value, mask) for value in values]
            total = total + weight * sum(value[kept].sum() for value in values) / max(len(values), 1)
        return total

    def _divergence(self, logits: Tensor, target: Tensor | None, kept: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Nats of every kept position."""
        terms = self.terms
        if target is not None:
            log_p, log_q = (log_probs_of(values, terms.temperature) for values in (target, logits[kept]))
        else:
            ids, log_p = self._stored(inputs, kept, logits.shape[-1])
            log_q = gather_log_probs(logits[kept], ids, terms.temperature)
        if terms.divergence == "balanced":
            return balanced_kl(log_p, log_q, terms.balance, terms.balance_weight, terms.balance_slope)
        return kl_divergence(log_p, log_q) if terms.divergence == "forward" else kl_divergence(log_q, log_p)

    def _stored(self, inputs: Mapping[str, Any], kept: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        found = [self.cache.read(row[own]) for row, own in zip(ids, mask, strict=True)]
        highest = max(int(stored.max()) for stored, _ in found)
        if highest >= vocabulary:
            raise ConfigError(
                f"cache and student must have one vocabulary, got outputs for id {highest} and {vocabulary} entries"
            )
        chosen = [own[there] for own, there in zip(kept, mask, strict=True)]
        return tuple(
            torch.cat([part[position][own.cpu()] for part, own in zip(found, chosen, strict=True)]).to(ids.device)
            for position in (0, 1)
        )

    def _distance(self, pair: tuple[str, str, str], mask: Tensor | None) -> Tensor:
        """`[B, T]`."""
        student, teacher = self._seen[f"student {pair[0]}"], self._seen[f"teacher {pair[1]}"]
        if torch.is_grad_enabled() and not student.requires_grad:
            raise ConfigError(
                f"the output of {pair[0]} has no gradient: nothing before it is trained, or gradient checkpointing is reentrant, "
                "which gradient_checkpointing_kwargs={'use_reentrant': False} changes"
            )
        if pair[2] == "relation":
            try:
                return relation_divergence(student, teacher, self.terms.relation_heads, mask)
            except ValueError as error:
                raise ConfigError(f"terms.{error}") from error
        if student.shape != teacher.shape:
            raise ConfigError(f"hidden states must have one width, got {student.shape[-1]} and {teacher.shape[-1]}")
        return lost_energy(student, teacher)


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside an adapter's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def fused_fields(logits: Tensor, labels: Tensor, whole: Tensor) -> dict[str, Tensor]:
    """What a fused head puts out of logits `[B, T, C]`, but log-probabilities whose sum is `-whole`: `[B, T - 1]` each."""
    logits, labels = logits[:, :-1], labels[:, 1:]
    mask = labels != _IGNORED
    spread = torch.zeros(mask.shape, dtype=torch.float32, device=logits.device)
    spread[mask] = entropy(logits[mask].float().log_softmax(-1))
    log_probs = -(whole / mask.sum().clamp_min(1)) * mask
    return {"log_probs": log_probs, "label_mask": mask, "entropy": spread, "is_top1": (logits.argmax(-1) == labels) & mask}


def decoder_inputs(model: PreTrainedModel, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """What an encoder-decoder makes of the labels by itself, and the teacher, which gets none, does not."""
    labels, make = kwargs.get("labels"), getattr(model, "prepare_decoder_input_ids_from_labels", None)
    is_given = any(kwargs.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds"))
    return {} if is_given or labels is None or make is None else {"decoder_input_ids": make(labels=labels)}


def sequence_means(values: Tensor, mask: Tensor | None) -> Tensor:
    """Means `[B]` of values `[B, T]` over attended tokens; over all of them where the mask is not one of these tokens.

    >>> sequence_means(torch.tensor([[1.0, 3.0, 8.0]]), torch.tensor([[1, 1, 0]])).tolist()
    [2.0]
    """
    if mask is None or mask.shape != values.shape:
        return values.mean(1)
    return values.where(mask.bool(), 0).sum(1) / mask.bool().sum(1).clamp_min(1)


def labelled(model: nn.Module, logits: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """Which positions of the logits count: those with a label (the next token's, in a causal model), or all attended ones."""
    labels = kwargs.get("labels")
    mask = kwargs.get("decoder_attention_mask" if has_two_inputs(model) else "attention_mask")
    if labels is not None and labels.shape == logits.shape[:-1] and logits.dim() == 3:
        kept = labels != _IGNORED
        if type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            kept = torch.nn.functional.pad(kept[:, 1:], (0, 1), value=False)
        return kept
    if mask is not None and mask.shape == logits.shape[:-1]:
        return mask.bool()
    return torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
