"""What the examples share: which model, which text, how many steps, and a tiny random model in their place with --quick."""

import argparse
import atexit
import shutil
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from hf_compact.calibration import builtin_text, read_texts


class Setting:
    """The command line of an example, and what follows from it."""

    def __init__(self, doc: str, *options: str, without: tuple[str, ...] = ()) -> None:
        """Parse --model, --text, --output, --steps, --length, --quick, and the further options by name; those `without` are none."""
        parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="dense: Hub id or folder")
        parser.add_argument("--output", type=Path, required=True, help="folder to create")
        optional = {
            "--text": {"type": Path, "nargs": "+", "help": "UTF-8 text to train on; default: Python's documentation"},
            "--steps": {"type": int, "default": 200},
            "--length": {"type": int, "default": 512, "help": "tokens per sequence"},
        }
        for option in (name for name in optional if name not in without):
            parser.add_argument(option, **optional[option])
        parser.add_argument("--quick", action="store_true", help="a tiny random model and a few steps, to see that it runs")
        for option in options:
            parser.add_argument(option)
        self.options = parser.parse_args()
        self.scratch = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, self.scratch, ignore_errors=True)
        self.folder = self.options.model
        if self.options.quick:
            self.options.steps, self.options.length = 8, 32
            self.folder = tiny_model(self.scratch / "tiny")
        self.output = self.options.output
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)

    def model(self):
        """The dense model, in float32, as training needs it."""
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)

    @property
    def text(self) -> str:
        """All of the text."""
        return read_texts(self.options.text) if self.options.text else builtin_text("calibration")

    def rows(self) -> list[dict]:
        """Neighbouring pieces of the text, as many as the steps need."""
        count = 4 * self.options.steps
        ids = self.tokenizer(self.text[: 8 * count * self.options.length], return_tensors="pt").input_ids[0]
        pieces = ids[: len(ids) // self.options.length * self.options.length].view(-1, self.options.length)
        if not len(pieces):
            raise SystemExit(f"--text must hold at least --length tokens ({self.options.length}), got {len(ids)}")
        return [{"input_ids": piece, "labels": piece} for piece in pieces[:count]]

    def arguments(self, **changes) -> TrainingArguments:
        """Usual ones; nothing is saved on the way."""
        return TrainingArguments(
            str(self.scratch), max_steps=self.options.steps, per_device_train_batch_size=4, learning_rate=3e-4,
            save_strategy="no", report_to="none", logging_steps=max(1, self.options.steps // 10),
            use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=False, **changes,
        )  # fmt: skip


def tiny_model(folder: Path) -> Path:
    """A Llama of two layers with random weights, and a tokenizer of single bytes."""
    tokenizer = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=10**7
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(fast), bos_token_id=fast.bos_token_id, eos_token_id=fast.eos_token_id, pad_token_id=fast.pad_token_id,
        tie_word_embeddings=True, max_position_embeddings=256,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder
