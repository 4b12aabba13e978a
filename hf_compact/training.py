"""The base of every callback that changes the modules of a model while it is trained.

`prepare`, `step` and `finalize` serve a plain PyTorch or accelerate loop; as a `TrainerCallback` the same object calls
them at the right events. What must survive a checkpoint belongs into parameters and persistent buffers of the model,
and what is drawn at random must follow from a seed and the step, so that a resumed run takes the same decisions.
"""

import hashlib
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

from . import distributed
from .checkpoint import QUANT_METHOD, TensorSource
from .errors import ConfigError, FormatError, UnsupportedModel


class CompactCallback(TrainerCallback):
    """Prepares once, follows every optimizer step, finalises once."""

    def __init__(self) -> None:
        """Nothing has happened yet."""
        self.is_prepared = self.is_finalized = False
        self._model: Callable[[], PreTrainedModel | None] = lambda: None
        self._rate = 0.0

    # What a plain loop calls.

    def prepare(self, model: PreTrainedModel) -> PreTrainedModel:
        """Change the model in place, once, before the optimizer is made.

        Raises:
            CompactError: it is no model of transformers, or not one that the method can change.
        """
        if not self.is_prepared:
            if not isinstance(model, PreTrainedModel | PeftModel):
                raise ConfigError(f"{type(self).__name__} needs a model of transformers, got a {type(model).__name__}")
            self.swap_(model)
            self.is_prepared, self._model = True, weakref.ref(model)
            record_(model, self.modules(model))
        return model

    def finalize(self, model: PreTrainedModel) -> PreTrainedModel:
        """Leave nothing that only training needs, once; `save_pretrained` then writes a compressed model."""
        if not self.is_finalized:
            self.restore_(model)
            self.is_finalized = True
            record_(model, self.modules(model))
        return model

    # What a method fills in.

    def swap_(self, model: PreTrainedModel) -> None:
        """Swap modules; existing `Parameter` objects are kept where they fit."""

    def restore_(self, model: PreTrainedModel) -> None:
        """Swap what only training needs back."""

    def modules(self, model: PreTrainedModel) -> dict[str, dict[str, Any]]:
        """The modules table, empty where the model's own is still right."""
        return {}

    def begin_step(self, model: PreTrainedModel, step: int) -> None:
        """Before the forward passes of an optimizer step, counted from 0."""

    def before_update(self, model: PreTrainedModel, step: int) -> None:
        """Gradients are complete and the same on all ranks; whatever is added to them counts."""

    def step(self, model: PreTrainedModel, step: int, learning_rate: float) -> None:
        """After an optimizer step; `step` counts from 1."""

    # The Trainer's events. Callbacks see the unwrapped model.

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Prepare before the optimizer exists."""
        refuse_sharding(args, type(self).__name__)
        self.prepare(kwargs["model"])

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check what cannot be repaired from here.

        Raises:
            ConfigError: the callback came too late, belongs to another model or has finished with this one, or the optimizer
                does not hold every trained parameter.
            FormatError: the checkpoint that is resumed holds another structure.
        """
        if not self.is_prepared:
            raise ConfigError(
                f"{type(self).__name__} was added after the Trainer was made: pass it in Trainer(callbacks=[...]), "
                "or call its prepare(model) before the Trainer is made"
            )
        model = kwargs["model"]
        if self.is_finalized or self._model() not in set(model.modules()):
            done = "has finished its training" if self.is_finalized else "was prepared for another model"
            raise ConfigError(
                f"{type(self).__name__} {done}: make a new one, and a Trainer, for every training; model_init makes a model anew"
            )
        check_optimizer(model, kwargs["optimizer"], type(self).__name__)
        check_same_on_all_ranks(f"{name} {tuple(tensor.shape)}" for name, tensor in model.state_dict().items())
        if state.global_step:
            check_resumed(model, Path(args.output_dir or "") / f"checkpoint-{state.global_step}")

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """As `begin_step`."""
        self.begin_step(kwargs["model"], state.global_step)

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """As `before_update`."""
        self._rate = kwargs["optimizer"].param_groups[0]["lr"]  # when the step ends, the schedule has gone on
        self.before_update(kwargs["model"], state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """As `step`."""
        self.step(kwargs["model"], state.global_step, self._rate)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Finalise once."""
        self.finalize(kwargs["model"])


def record_(model: PreTrainedModel, modules: Mapping[str, Any]) -> None:
    """Make `save_pretrained` write these modules into the model's table, through the quantizer that is registered with transformers."""
    if modules:
        old = table_of(model)
        config = AutoQuantizationConfig.from_dict(
            {**old, "quant_method": QUANT_METHOD, "modules": old.get("modules", {}) | modules}
        )
        AutoHfQuantizer.from_config(config, pre_quantized=True).attach_(model)


def table_of(model: PreTrainedModel) -> dict[str, Any]:
    """What the config says of a model that this library has compressed, empty for others."""
    config = getattr(model.config, "quantization_config", None)
    return config.to_dict() if config is not None and config.quant_method == QUANT_METHOD else {}


def refuse_cut(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Raise UnsupportedModel where Linears have widths that only the modules table says, in which their new form would take that place."""
    table = table_of(model).get("modules", {})
    if stuck := [name for name in names if name in table]:
        raise UnsupportedModel(
            f"{stuck[0]} has lost units that the config of {model.config.model_type} cannot say, so it cannot change its form: exclude it"
        )


def refuse_sharding(args: TrainingArguments, name: str) -> None:
    """Raise ConfigError under FSDP, where no rank holds a whole parameter, and under DeepSpeed, whose optimizer holds flat copies."""
    is_fsdp = bool(getattr(args, "fsdp", None)) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")
    kind = "FSDP" if is_fsdp else "DeepSpeed" if getattr(args, "hf_deepspeed_config", None) is not None else None
    if kind:
        raise ConfigError(
            f"{name} needs whole parameters on every rank, also in the optimizer, and does not work under {kind}: use DDP"
        )


def refuse_adapters(model: nn.Module) -> None:
    """Raise UnsupportedModel where adapters of PEFT stand beside Linears, whose weights are then not all that they compute."""
    found = next((name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)), None)
    if found is not None:
        raise UnsupportedModel(f"{found} has an adapter of PEFT: take the model that merge_and_unload() gives, or unload() it")


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, name: str) -> None:
    """Raise ConfigError unless the optimizer holds every parameter that takes gradients."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [key for key, parameter in model.named_parameters() if parameter.requires_grad and id(parameter) not in held]
    if missing:
        raise ConfigError(
            f"the optimizer lacks {len(missing)} trained parameters, the first is {missing[0]}: it was made before {name} "
            "changed the model. Call prepare(model) before the optimizer is made, or let the Trainer make it"
        )


def check_same_on_all_ranks(facts: Iterable[str]) -> None:
    """Raise ConfigError unless every rank has come to the same facts."""
    if distributed.world_size() > 1:
        mine = hashlib.sha256("\n".join(facts).encode()).hexdigest()
        found: list[Any] = [None] * distributed.world_size()
        dist.all_gather_object(found, mine)
        if len(set(found)) > 1:
            raise ConfigError("the ranks hold models of different structure: give all of them the same model, recipe and seed")


def check_resumed(model: PreTrainedModel, folder: Path) -> None:
    """Raise FormatError if a checkpoint does not hold the tensors of the model; the Trainer itself only warns."""
    if isinstance(model, PeftModel) or not folder.is_dir() or not list(folder.glob("*.safetensors")):
        return  # PEFT itself writes and checks what it trains, and no more
    stored = {name: tuple(shape) for name, (_, shape, _) in TensorSource.in_folder(folder).rename_for(model).headers().items()}
    for name, tensor in model.state_dict().items():
        is_tied = name in model.all_tied_weights_keys
        if stored.get(name, tuple(tensor.shape) if is_tied else None) != tuple(tensor.shape):
            raise FormatError(
                f"{folder} has {name} as {stored.get(name)}, the model as {tuple(tensor.shape)}: resume with the settings it was made with"
            )
