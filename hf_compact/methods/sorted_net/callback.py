"""Nested sub-models in one training run: behind every forward pass of the whole model, that of a smaller one.

A forward hook adds the loss of the sub-models to that of the whole, so that the stock Trainer, its accumulation and DDP, which
wants every parameter in every pass, work as they are. Nothing but the order of the units is kept in the model.

Sources: SortedNet (arXiv 2309.00255) and its "sandwich" of the whole and a random part; the whole as the teacher of its parts as in
Once-for-all (arXiv 1908.09791), its head start as in DepS (arXiv 2407.06167), without a ramp.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

from ...errors import ConfigError
from ...functional.divergence import kl_divergence
from ...training import CompactCallback, refuse_adapters
from .apply import FIELD, SubModel, narrowed, sort_units_, sub_model
from .config import SortedNetConfig

_IGNORED = -100


class SortedNetCallback(CompactCallback):
    """Trains all sub-models of a causal language model at once in a stock Trainer; `extract` takes them out.

    Args:
        config: which ones.
        batches: model inputs that say which units come first, where the model is not sorted yet; without them the weights do.
        settings: fields of `SortedNetConfig`, in the place of those of `config`.

    >>> SortedNetCallback(widths=(0.5, 1.0), depths=(1.0,)).config.sub_models
    [(0.5, 1.0)]
    """

    def __init__(
        self, config: SortedNetConfig | None = None, batches: Sequence[Mapping[str, Tensor]] = (), **settings: Any
    ) -> None:  # fmt: skip
        """Keep the settings."""
        super().__init__()
        self.config, self.batches = replace(config or SortedNetConfig(), **settings), batches
        self.num_steps = self.config.num_steps
        self.parts: list[SubModel] = []
        self.draw: random.Random | None = None
        self._handle: Any = None
        self._is_inside = False

    def swap_(self, model: PreTrainedModel) -> None:
        """Sort the model unless it is, and put the hook on it.

        Raises:
            ConfigError: it was sorted for other sub-models.
            UnsupportedModel: it has more than one stack of blocks or adapters, or its family is not known.
        """
        refuse_adapters(model)
        if getattr(model.config, FIELD, None) is None:
            sort_units_(model, self.batches, self.config.kinds, self.config.channel_multiple)
        found = getattr(model.config, FIELD)
        if not set(found["kinds"]) <= set(self.config.kinds) or found["channel_multiple"] != self.config.channel_multiple:
            raise ConfigError(f"the model is sorted with {found}: sorted_net.kinds and channel_multiple must be the same")
        self.parts = [sub_model(model, *shares) for shares in self.config.sub_models]
        self._handle = model.register_forward_hook(self._add_losses, with_kwargs=True)

    def restore_(self, model: PreTrainedModel) -> None:
        """Take the hook away."""
        self._handle.remove()

    def begin_step(self, model: PreTrainedModel, step: int) -> None:
        """Draws of a step follow from its number; none while the whole model has its head start.

        Raises:
            ConfigError: the number of steps is not known.
        """
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            raise ConfigError("sub-models cannot be run again by gradient checkpointing: switch it off")
        if self.config.delay and self.num_steps is None:
            raise ConfigError("sorted_net.num_steps must be given in a loop of your own")
        is_late = step >= self.config.delay * (self.num_steps or 0)
        self.draw = random.Random(f"{self.config.seed} {step}") if is_late else None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check the optimizer and take over the number of steps."""
        self.num_steps = state.max_steps
        super().on_train_begin(args, state, control, **kwargs)

    def _add_losses(self, model: PreTrainedModel, args: Any, kwargs: Mapping[str, Any], output: Any) -> Any:
        """The mean of the losses of the whole model and of the drawn ones."""
        if not model.training or self._is_inside:
            return output
        if kwargs.get("fused_lm_head"):
            raise ConfigError(
                "sorted_net needs a Trainer that trains on the model's loss, this one asks for fused_lm_head and has its own"
            )
        if self.draw is None:
            return output
        if output.get("loss") is None:
            raise ConfigError("sorted_net needs labels in the batch")
        total = output["loss"]
        drawn = self.draw.sample(self.parts, min(self.config.num_sampled, len(self.parts)))
        self._is_inside = True
        try:
            for chosen in drawn:
                with narrowed(model, chosen):
                    part = model(*args, **dict(kwargs) | {"use_cache": False})
                total = total + (part["loss"] if self.config.loss == "labels" else _divergence(output, part, kwargs))
        finally:
            self._is_inside = False
        output["loss"] = total / (1 + len(drawn))
        return output


def _divergence(whole: Any, part: Any, kwargs: Mapping[str, Any]) -> Tensor:
    """Nats per labelled token, of the part's next-token distribution from the whole's."""
    kept = kwargs["labels"][:, 1:] != _IGNORED
    log_p, log_q = (output["logits"][:, :-1][kept].float().log_softmax(-1) for output in (whole, part))
    count = kwargs.get("num_items_in_batch")
    return kl_divergence(log_p.detach(), log_q).sum() / (kept.sum().clamp_min(1) if count is None else count)
