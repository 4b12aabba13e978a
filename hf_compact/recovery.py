"""Winning quality back: a small adapter trained on top of a compressed model by the stock Trainer.

The compressed modules stay as they are; gradients pass through them. Products are taken in bfloat16 where the device has
instructions for them, the adapter and its optimizer stay in float32. With a teacher the loss is the divergence of the
next-token distributions.
"""

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)

from .config import DistillationConfig
from .errors import NumericalError
from .methods.compacter import CompacterConfig
from .methods.distillation import DistillationCallback
from .products import has_fast_bfloat16


def _has_bfloat16() -> bool:
    """Whether the device that a Trainer takes has instructions for bfloat16, which take less time."""
    if torch.accelerator.is_available():
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and has_fast_bfloat16()


class _Follow(TrainerCallback):
    """Tells the caller about steps, and the user about a loss that is not a number."""

    def __init__(self, progress: Callable[[int, int], None]) -> None:
        self.progress = progress
        self.losses: list[float] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.progress(state.global_step, state.max_steps)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])
            if not math.isfinite(logs["loss"]):
                advice = "lower the learning rate" if state.global_step > 1 else "nothing is trained yet, so check the model"
                raise NumericalError(f"the loss of step {state.global_step} is not finite: {advice}")


def train_adapter(
    model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]], adapter: CompacterConfig, training: DistillationConfig, *,
    teacher: PreTrainedModel | None = None, seed: int = 0, progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[PeftModel, list[float]]:  # fmt: skip
    """Put an adapter on a causal language model and train it on token ids.

    Args:
        model: compressed or dense, in memory; frozen.
        batches: `input_ids [batch, T]`, shuffled anew in every epoch.
        adapter: which adapter.
        training: batch size, epochs and learning rate.
        teacher: dense, with the same vocabulary; without it the loss is the cross-entropy on the text.
        seed: of the adapter's start and of the order.
        progress: called with finished and all steps.

    Returns:
        The model with its adapter, in evaluation mode, and the loss of every step in nats per token.

    Raises:
        NumericalError: the loss is not finite.
    """
    from transformers import Trainer  # here, because it takes most of a second, and every process starts with this package

    torch.manual_seed(seed)
    adapted = get_peft_model(model, adapter)
    rows = [{"input_ids": row, "labels": row} for batch in batches for row in batch["input_ids"]]
    follow = _Follow(progress)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            scratch, per_device_train_batch_size=training.batch_size, num_train_epochs=training.epochs, seed=seed,
            learning_rate=training.learning_rate, lr_scheduler_type="cosine", warmup_steps=0.1, logging_steps=1,
            save_strategy="no", report_to="none", disable_tqdm=True, logging_nan_inf_filter=False,
            dataloader_pin_memory=False, use_cpu=not torch.accelerator.is_available(), bf16=_has_bfloat16(),
        )  # fmt: skip
        callbacks: list[TrainerCallback] = [follow] if teacher is None else [follow, DistillationCallback(teacher)]
        trainer = Trainer(adapted, arguments, train_dataset=rows, data_collator=default_data_collator, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)  # progress is the caller's
        trainer.train()
        trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)  # or its forward stays in bfloat16
    return adapted.eval(), follow.losses
