"""One line in a Trainer script: `callbacks=[OneBitAdamCallback()]`, launched with torchrun or accelerate launch.

The Trainer builds its AdamW as ever. When training begins, the callback puts `OneBitAdam` in its place, with the same
groups and state, and registers the gradient hook with DDP.
"""

import gc
import json
import logging
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ...checkpoint import write_text
from ...distributed import rank, sum_, world_size
from ...errors import ConfigError, UnsupportedModel
from ...report import CommReport
from .config import OneBitAdamConfig
from .optimizer import OneBitAdam

logger = logging.getLogger(__name__)

REPORT_FILE = "comm_report.json"


class OneBitAdamCallback(TrainerCallback):
    """Train with 1-bit Adam in a stock Trainer.

    Logs get `comm_mb_per_step`, what each rank sent per step, and `comm_reduction`, how many times fewer bytes that is than
    float32 gradients; the whole report is printed at the end and written to `comm_report.json` in the output folder.

    Clipping by `max_grad_norm` uses one norm for all ranks, see `OneBitAdam.clip_grad_norm_`. Errors are saved with every
    checkpoint and found again in `output_dir` or in `TrainingArguments.resume_from_checkpoint`.

    >>> callback = OneBitAdamCallback(OneBitAdamConfig(freeze=0.15))
    """

    def __init__(self, config: OneBitAdamConfig | None = None):
        """Take a config, all defaults without one. Nothing happens before training."""
        if config is not None and not isinstance(config, OneBitAdamConfig):
            raise ConfigError(f"OneBitAdamCallback takes an OneBitAdamConfig, got {config!r}")
        self.config = config or OneBitAdamConfig()
        self.optimizer: OneBitAdam | None = None
        self._max_grad_norm = 0.0
        self._logged = (0.0, 0)

    @property
    def report(self) -> CommReport:
        """Bytes sent so far; empty before training."""
        return CommReport() if self.optimizer is None else self.optimizer.report

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refuse sharded training before anything is loaded or wrapped."""
        if args.fsdp:
            raise UnsupportedModel(
                f"1-bit Adam needs whole parameters on every rank: FSDP shards them, got fsdp={args.fsdp}; use DDP"
            )
        if args.deepspeed:
            raise UnsupportedModel("1-bit Adam needs whole parameters on every rank: DeepSpeed ZeRO shards them; use DDP")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the optimizer in place, register the hook, take up the errors of a checkpoint."""
        model, wrapped = kwargs["model"], kwargs["optimizer"]
        mode = str(getattr(wrapped.accelerator_state.distributed_type, "value", ""))
        for name, refused in (("FSDP", "FSDP"), ("DEEPSPEED", "DeepSpeed ZeRO"), ("MEGATRON_LM", "Megatron-LM")):
            if mode == name:
                raise UnsupportedModel(f"1-bit Adam needs whole parameters on every rank: {refused} shards them; use DDP")
        if args.n_gpu > 1:
            raise UnsupportedModel(
                f"{args.n_gpu} GPUs in one process is nn.DataParallel: launch one process per GPU with torchrun"
            )
        self.optimizer, before = self._install(args, state, wrapped), self.optimizer
        trained = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        orphans = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in trained]
        if orphans:
            raise ConfigError(
                f"{len(orphans)} trainable parameters are not in the optimizer, first {orphans[0]}: replace modules before the Trainer is made"
            )
        self.optimizer.attach(_wrapper_of(model, before), agrees_on_overflow=wrapped.scaler is not None)
        if world_size() > 1:
            # Clipping is done here, by the norm over all ranks; the Trainer would clip by each rank's own.
            # A run that broke off and begins again, as with auto_find_batch_size, has its 0 still there.
            self._max_grad_norm, args.max_grad_norm = args.max_grad_norm or self._max_grad_norm, 0.0
        if self.optimizer.is_compressing and not any(self.optimizer.load_errors(folder) for folder in _checkpoints(args, state)):
            logger.warning(
                "the checkpoint of step %d has no errors of 1-bit Adam for %d ranks (another number of ranks, or another output_dir "
                "than resume_from_checkpoint): they start at 0, which costs a little accuracy for some steps", state.global_step, world_size(),
            )  # fmt: skip
        if self.config.exchange == "power_sgd" and state.global_step and world_size() > 1:
            logger.warning("the errors of PowerSGD are not saved: after step %d they start at 0", state.global_step)
        if self.optimizer.has_frozen and world_size() == 1:
            logger.warning(
                "the checkpoint of step %d is of 1-bit Adam on several ranks: one rank alone goes on as AdamW, without their errors",
                state.global_step,
            )
        self._logged = (self.report.total_bytes, sum(self.report.num_steps.values()))

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Clip."""
        if self._max_grad_norm:
            self._own().clip_grad_norm_(self._max_grad_norm)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End local steps before anything looks at the model."""
        if control.should_save or control.should_evaluate or control.should_training_stop:
            self._own().synchronize()

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End local steps before anything looks at the model."""
        self.on_step_end(args, state, control)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add bytes, and the gradient norm of all ranks in place of this one's."""
        logs = kwargs["logs"]
        if self.optimizer is None or "loss" not in logs:
            return
        more: dict[str, float] = {}
        if self.optimizer.is_compressing and "grad_norm" in logs:
            square = torch.tensor(float(logs["grad_norm"]) ** 2, device=next(iter(self.optimizer.state)).device)
            sum_([square])
            more["grad_norm"] = float(square / world_size()) ** 0.5
        sent, steps = self.report.total_bytes, sum(self.report.num_steps.values())
        if steps > self._logged[1]:
            per_step = (sent - self._logged[0]) / (steps - self._logged[1])
            more["comm_mb_per_step"] = per_step / 1e6
            more["comm_reduction"] = self.report.dense_bytes_per_step / per_step if per_step else 1.0
        self._logged = (sent, steps)
        logs.update(more)
        state.log_history[-1].update(more)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write this rank's errors beside the checkpoint."""
        if not args.save_only_model:
            self._own().save_errors(Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Compare the ranks' parameters, print and write the report."""
        optimizer = self._own()
        optimizer.synchronize()
        optimizer.check_replicas()
        if world_size() > 1:
            args.max_grad_norm, self._max_grad_norm = self._max_grad_norm, 0.0
        if world_size() > 1 and rank() == 0:
            Console(stderr=True).print(self.report.to_table())
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            write_text(Path(args.output_dir, REPORT_FILE), json.dumps(self.report.to_dict(), indent=2) + "\n")

    def _own(self) -> OneBitAdam:
        if self.optimizer is None:
            raise ConfigError("OneBitAdamCallback was added after training had begun: pass it to Trainer(callbacks=[...])")
        return self.optimizer

    def _install(self, args: TrainingArguments, state: TrainerState, wrapped: Any) -> OneBitAdam:
        """The optimizer inside the Trainer's `AcceleratedOptimizer`, replaced if it is not ours already."""
        if isinstance(wrapped.optimizer, OneBitAdam):
            if wrapped.optimizer.config != self.config:
                raise ConfigError(
                    "OneBitAdam and OneBitAdamCallback have different configs: give both the same, or leave the optimizer to the callback"
                )
            return wrapped.optimizer
        warmup_steps = args.get_warmup_steps(state.max_steps)
        new = OneBitAdam.from_adamw(wrapped.optimizer, config=self.config, total_steps=state.max_steps, warmup_steps=warmup_steps)
        wrapped.optimizer = new
        if wrapped.scaler is not None:
            # accelerate notes by a wrapper around `step` whether the scaler skipped it, and made that of the old optimizer.
            wrapped.__setstate__({})
        return new


def _wrapper_of(model: nn.Module, before: OneBitAdam | None) -> nn.Module:
    """The DDP module around a model; the model itself where there is none.

    The Trainer passes callbacks the bare model and keeps the wrapper to itself, so it is looked for among all objects. A
    Trainer that begins again after it ran out of memory makes another one, while the optimizer `before` holds the old.
    """
    gc.collect()  # wrappers that nobody holds
    wrappers = [o for o in gc.get_objects() if issubclass(type(o), DistributedDataParallel) and o.module is model]
    if before is not None and len(wrappers) > 1:
        wrappers = [wrapper for wrapper in wrappers if wrapper is not before.ddp]
    if len(wrappers) > 1:
        raise UnsupportedModel(
            f"{len(wrappers)} DistributedDataParallel hold this model, and the Trainer trains one of them: delete the others"
        )
    return wrappers[0] if wrappers else model


def _checkpoints(args: TrainingArguments, state: TrainerState) -> list[Path]:
    """Where the checkpoint that training resumes from can be."""
    folders = [Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")]
    if isinstance(args.resume_from_checkpoint, str):
        folders.insert(0, Path(args.resume_from_checkpoint))
    return folders
