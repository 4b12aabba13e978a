"""Quantization-aware training: latent weights, a strength that rises from 0 to 1, packed at the end.

The strength and the weight decay follow from the number of the step, everything else is in parameters, so that a resumed
run takes the same steps.

Sources: BitNet b1.58 for weight decay that ends half way; the study of converted models by Hugging Face (2024) for the ramp,
which small models hardly need; BitDistill (arXiv 2510.13998) for the norms before `o` and `down`. Their gains start from
the RMS of calibration inputs, and the norm's strength rises with the quantization's, so that training starts from the
model as it was.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

from ...arch import Architecture, describe
from ...capture import compress_outside_, mean_input_squares
from ...errors import ConfigError
from ...select import replace_modules, select_names
from ...training import CompactCallback, refuse_cut
from .apply import METHOD
from .config import TernaryConfig, TernaryTraining
from .layer import LatentLinear

logger = logging.getLogger(__name__)


class TernaryCallback(CompactCallback):
    """Trains block Linears at 1.58, 2, 3 or 4 bits in a stock Trainer, and leaves a packed model.

    Args:
        config: the levels, and which Linears; by default 1.58 bits in all blocks.
        training: the schedule.
        calibration: model inputs, for the norms' first gains only; without them the gains start at 1.
        settings: fields of `TernaryTraining`, in the place of those of `training`.

    >>> TernaryCallback(ramp="cosine").training.ramp
    'cosine'
    """

    def __init__(
        self, config: TernaryConfig | None = None, training: TernaryTraining | None = None,
        calibration: Sequence[Mapping[str, Tensor]] = (), **settings: Any,
    ) -> None:  # fmt: skip
        """Keep the settings."""
        super().__init__()
        self.config, self.training = config or TernaryConfig(), replace(training or TernaryTraining(), **settings)
        self.calibration = calibration
        self.num_steps = self.training.num_steps
        self.arch: Architecture | None = None
        self.names: list[str] = []
        self._groups: list[tuple[dict[str, Any], list[Tensor]]] = []

    def swap_(self, model: PreTrainedModel) -> None:
        """Make the selected Linears latent.

        Raises:
            NothingMatched: a glob matches no Linear.
            UnsupportedModel: one has widths that the config cannot say.
        """
        self.arch = describe(model)
        self.names = select_names(self.arch.roles, self.config.include, self.config.exclude)
        refuse_cut(model, self.names)
        normed = {name for name in self.names if self.training.is_sub_norm and self.arch.roles[name] in ("o", "down")}
        inputs = {name: model.get_submodule(name) for name in sorted(normed)}
        squares = mean_input_squares(model, inputs.values(), self.calibration) if self.calibration and normed else {}
        replace_modules(model, self.names, lambda name, module: LatentLinear(module, self.config, name in normed))
        for name, dense in inputs.items():
            if dense in squares:
                nn.init.constant_(model.get_submodule(name).sub_norm, squares[dense].mean().sqrt().item())

    def strength(self, step: int) -> float:
        """The strength of the quantization in a step, counted from 0.

        Raises:
            ConfigError: the number of steps is not known.
        """
        if self.num_steps is None:
            raise ConfigError("training.num_steps must be given in a loop of your own")
        length = self.training.ramp_share * self.num_steps
        done = min(1.0, step / length) if length else 1.0
        if self.training.ramp == "cosine":
            return (1 - math.cos(math.pi * done)) / 2
        return math.floor(4 * done) / 4 if self.training.ramp == "step" else done

    def begin_step(self, model: PreTrainedModel, step: int) -> None:
        """Set the strength."""
        self.set_strength_(model, self.strength(step))

    def set_strength_(self, model: PreTrainedModel, strength: float) -> None:
        """Set the strength by hand, as a warm start before the training needs it."""
        for name in self.names:
            model.get_submodule(name).strength.fill_(strength)

    def set_decay_(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Switch weight decay off once its share of the steps is done; for a loop of your own, before each step."""
        for group in optimizer.param_groups:
            decay = group.setdefault("initial_weight_decay", group.get("weight_decay", 0.0))
            if "weight_decay" in group:
                group["weight_decay"] = decay if step < self.training.decay_share * (self.num_steps or math.inf) else 0.0

    def set_apart_(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
        """Until `put_back_`, let learned steps have no weight decay, which would pull them to 0.

        For one update only: a checkpoint counts parameters by their groups, and those must stay the Trainer's.
        """
        steps = {id(model.get_submodule(name).step) for name in self.names if self.config.scale == "lsq"}
        for group in list(optimizer.param_groups):
            apart = [parameter for parameter in group["params"] if id(parameter) in steps]
            if apart and group.get("weight_decay"):
                self._groups.append((group, group["params"]))
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in steps]
                optimizer.param_groups.append(group | {"params": apart, "weight_decay": 0.0})

    def put_back_(self, optimizer: torch.optim.Optimizer) -> None:
        """Undo `set_apart_`."""
        for group, parameters in self._groups:
            group["params"] = parameters
            optimizer.param_groups.pop()
        self._groups.clear()

    def restore_(self, model: PreTrainedModel) -> None:
        """Pack the Linears, then embedding and head."""
        packed = replace_modules(model, self.names, lambda _, latent: latent.pack())
        table = {name: METHOD.table_entry(module) for name, module in packed.items()}
        with torch.no_grad():
            _, outside = compress_outside_(model, self.arch, [(METHOD, self.config)], METHOD.layers)
        self.table = table | outside

    def modules(self, model: PreTrainedModel) -> dict[str, dict[str, Any]]:
        """Empty while training: the checkpoints are dense ones."""
        return self.table if self.is_finalized else {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check the optimizer and take over the number of steps."""
        self.num_steps = state.max_steps
        super().on_train_begin(args, state, control, **kwargs)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Strength and weight decay of the step."""
        super().on_step_begin(args, state, control, **kwargs)
        self.set_decay_(kwargs["optimizer"], state.global_step)

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Learned steps do not decay."""
        super().on_pre_optimizer_step(args, state, control, **kwargs)
        self.set_apart_(kwargs["model"], kwargs["optimizer"])

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The groups are the Trainer's again."""
        self.put_back_(kwargs["optimizer"])

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Finalise once; weights that never ran at full strength are told about."""
        is_best = args.load_best_model_at_end and state.best_global_step is not None
        step = state.best_global_step if is_best else state.global_step
        if self.names and self.strength(step - 1) < 1:  # steps count from 0: these are the weights of the one before
            which = "the best checkpoint is from step" if is_best else "training ended at step"
            logger.warning("%s %d, before the quantization had its full strength", which, step)
        super().on_train_end(args, state, control, **kwargs)
