"""A Trainer script as users write it, started by torchrun: trains, resumes, or loses a rank; what came out goes to files."""

import argparse
import json
import logging
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import save_file

import hf_compact
from hf_compact import HessoCallback, OneBitAdamCallback, OneBitAdamConfig, TensorNetworkCallback, TernaryCallback
from hf_compact.calibration import from_batches
from hf_compact.errors import UnsupportedModel
from tests.conftest import tiny_inputs, tiny_model

SAVED, STEPS, STEPS_AFTER_50 = 12, 24, 64
PRUNING = {"target": 0.3, "warm_up_steps": 10, "pruning_steps": 8, "periods": 2}
FACTORED = {"method": "tensor_network", "keep_ratio": 0.6, "allocation": "uniform", "rank_multiple": 1}
CONFIG = OneBitAdamConfig(freeze=8, min_numel=1024, check_every=5)
#: For a checkpoint in which it comes too late.
LATER = OneBitAdamConfig(freeze=10, min_numel=1024, check_every=5)


class KillRank(transformers.TrainerCallback):
    """Loses rank 1 as a machine does: without a word."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == SAVED + 3 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)


class Interrupt(transformers.TrainerCallback):
    """Ctrl-C after the switch, once."""

    done = False

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == SAVED and not self.done:
            self.done = True
            raise KeyboardInterrupt


class ZeroSmallWeights(transformers.TrainerCallback):
    """Stands for another callback that changes weights, like a pruning schedule."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.masked_fill_(parameter.abs() < 1e-3, 0.0)


class WarningsOf(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts = []
        logging.getLogger("hf_compact").addHandler(self)

    def emit(self, record):
        self.texts.append(record.getMessage())


def factored_model() -> transformers.PreTrainedModel:
    model = tiny_model("llama")
    hf_compact.compress(model, {"stages": [FACTORED]}, calibration=from_batches([tiny_inputs("llama", seed=1)]))
    return model


def train(
    folder: Path, name: str, *, callbacks=(), resume: str | None = None, config=CONFIG, callback=True, model=None, **arguments
) -> transformers.Trainer:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 384, (64, 16), generator=generator)
    rows[:, 8:] = rows[:, :8]  # something to learn: the second half repeats the first
    data = [{"input_ids": row, "labels": row} for row in rows]
    defaults = {
        "output_dir": str(folder / name), "max_steps": STEPS, "save_steps": SAVED, "logging_steps": 4, "learning_rate": 3e-3,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "use_cpu": True, "report_to": [], "disable_tqdm": True,
        "seed": 1, "lr_scheduler_type": "linear", "warmup_steps": 2, "max_grad_norm": 1.0,
    }  # fmt: skip
    ours = OneBitAdamCallback(config)
    trainer = transformers.Trainer(
        model=(model or tiny_model("llama")).train(), args=transformers.TrainingArguments(**defaults | arguments), train_dataset=data,
        callbacks=[*([ours] if callback else []), *callbacks],
    )  # fmt: skip
    try:
        trainer.train(resume_from_checkpoint=resume)
    except KeyboardInterrupt:
        trainer.train()
    tensors = {key: value.clone().contiguous() for key, value in trainer.model.state_dict().items()}
    tensors.pop("lm_head.weight", None)
    save_file(tensors, folder / f"{name}-rank{trainer.args.process_index}.safetensors")
    if trainer.args.process_index == 0:
        result = {
            "log": trainer.state.log_history,
            "report": ours.report.to_dict(),
            "max_grad_norm": trainer.args.max_grad_norm,
        }
        (folder / f"{name}.json").write_text(json.dumps(result))
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("what", choices=["killed", "all", "four"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    heard = WarningsOf()
    folder = options.folder
    checkpoint = str(folder / "killed" / f"checkpoint-{SAVED}")
    if options.what == "killed":
        train(folder, "killed", callbacks=[KillRank()], max_steps=STEPS_AFTER_50)
    elif options.what == "four":
        train(folder, "four", resume=checkpoint, max_steps=SAVED + 8)
        (folder / f"four-{dist.get_rank()}.json").write_text(json.dumps(heard.texts))
    else:
        train(folder, "straight", callbacks=[ZeroSmallWeights()])
        train(folder, "plain", max_steps=STEPS_AFTER_50)
        assert not any("has no errors" in text for text in heard.texts)
        train(folder, "killed", resume=checkpoint, max_steps=STEPS_AFTER_50)
        moved = {"resume": checkpoint, "resume_from_checkpoint": checkpoint, "max_steps": STEPS_AFTER_50}
        train(folder, "moved", config=LATER, **moved)
        assert not any("has no errors" in text for text in heard.texts)
        if dist.get_rank() == 0:
            late = "one_bit_adam.freeze = 10 changes nothing: the variance was frozen at step 8, with 8"
            assert late in heard.texts
        dist.barrier()
        if dist.get_rank() == 1:
            Path(checkpoint, "one_bit_adam_rank1.safetensors").unlink()
        train(folder, "forgetful", **moved)
        assert any("has no errors of 1-bit Adam for 2 ranks" in text for text in heard.texts)
        train(
            folder,
            "bf16",
            bf16=True,
            config=OneBitAdamConfig(freeze="auto", min_numel=1024, local_steps=4, local_steps_double_every=3),
        )
        train(folder, "ternary", callbacks=[TernaryCallback(ramp_share=0.5)])
        train(folder, "healed", model=factored_model(), callbacks=[TensorNetworkCallback(schedule="heal")])
        train(folder, "again", callbacks=[Interrupt()])
        train(folder, "pruned", callbacks=[HessoCallback(**PRUNING)])
        train(folder, "late", config=OneBitAdamConfig(freeze=STEPS))
        if dist.get_rank() == 0:
            assert any(f"nothing is compressed: the warm-up of {STEPS} steps" in text for text in heard.texts)
        with pytest.raises(UnsupportedModel, match="FSDP shards them"):
            train(folder, "fsdp", fsdp="full_shard")
        (folder / f"all-{dist.get_rank()}.done").touch()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
