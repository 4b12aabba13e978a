r"""A small Llama-shaped language model, in full precision or at 1.58 (2, 3, 4) bits, from any text.

    python scripts/train_ternary_from_scratch.py --text a.txt b.txt --output runs/small --hidden-size 128 --layers 5
    python scripts/train_ternary_from_scratch.py --text a.txt b.txt --output runs/ternary --hidden-size 256 --layers 5 \
        --bits 1.58 --scale absmedian --learning-rate 3e-3

An ordinary Trainer script; the one line that makes it quantization-aware is the callback. A block has about 12 D^2 weights:
128 x 5 layers is 1M of them, 48 x 4 is 110K, 256 x 5 is 4M, 512 x 15 is 47M. The last twentieth of every text is held out. The
tokenizer is a byte-level BPE trained on the rest, the same for the same text and size. The result is OUTPUT, which
`from_pretrained` loads, and OUTPUT/training.json.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments, default_data_collator

import hf_compact
from hf_compact import TernaryCallback, TernaryConfig
from hf_compact.calibration import read_texts, tokenize
from hf_compact.checkpoint import check_output, write_text
from hf_compact.errors import CompactError, ConfigError
from hf_compact.scoring import perplexity

QUANTIZATION = {"scale": "absmean", "dequantization": "shared", "ramp_share": 0.03}


def check(options: argparse.Namespace) -> None:
    """Set the defaults of the options that go with --bits.

    Raises:
        ConfigError: a number is out of range, or an option has no effect.
    """
    for name in ("hidden_size", "layers", "tokens", "length", "batch_size", "windows"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    heads = num_heads(options.hidden_size)
    if options.hidden_size % (2 * heads):
        raise ConfigError(
            f"--hidden-size must be even, and from 64 on divide into {heads} heads of an even width, as multiples of 32 do, "
            f"got {options.hidden_size}"
        )
    for name, default in QUANTIZATION.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
        elif options.bits is None:
            raise ConfigError(f"--{name.replace('_', '-')} needs --bits, got {getattr(options, name)} without it")


def num_heads(hidden_size: int) -> int:
    """One per 32 dimensions."""
    return max(1, hidden_size // 32)


def train_tokenizer(text: str, size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def new_model(options: argparse.Namespace, vocabulary: int) -> LlamaForCausalLM:
    """Random weights by the seed; the feed-forward part is 8/3 times as wide, rounded up to 8."""
    torch.manual_seed(options.seed)
    width = options.hidden_size
    config = LlamaConfig(
        hidden_size=width, intermediate_size=-(-8 * width // 24) * 8, num_hidden_layers=options.layers,
        num_attention_heads=num_heads(width), vocab_size=vocabulary, max_position_embeddings=max(1024, options.length),
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def body_parameters(model: torch.nn.Module) -> int:
    """Weights of the Linears inside the blocks."""
    return sum(module.weight.numel() for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear))


def split(text: str) -> tuple[str, str]:
    """The first 19 twentieths, up to the end of a line, and the rest."""
    stop = len(text) * 19 // 20
    cut = text.rfind("\n", 0, stop) + 1 or stop
    return text[:cut], text[cut:]


def train(options: argparse.Namespace) -> dict:
    """Train, save, score."""
    check(options)
    check_output(options.output)
    text, rest = ("".join(parts) for parts in zip(*(split(read_texts([path])) for path in options.text), strict=True))
    tokenizer = train_tokenizer(text, options.vocabulary)
    ids, held_out = tokenize(tokenizer, text), tokenize(tokenizer, rest)
    if len(ids) < options.length or len(held_out) < options.length:
        raise ConfigError(
            f"--length must be at most the tokens of the text, {len(held_out)} of them held out, got {options.length}"
        )
    rows = [
        {"input_ids": row, "labels": row} for row in ids[: len(ids) // options.length * options.length].view(-1, options.length)
    ]
    model = new_model(options, len(tokenizer))
    weights = body_parameters(model)
    callbacks = []
    if options.bits is not None:
        config = TernaryConfig(bits=options.bits, scale=options.scale, dequantization=options.dequantization)
        callbacks.append(TernaryCallback(config, ramp_share=options.ramp_share))
    tokens_per_step = options.batch_size * options.length
    scratch = tempfile.TemporaryDirectory()  # nothing is saved there, but the Trainer makes it
    arguments = TrainingArguments(
        scratch.name, per_device_train_batch_size=options.batch_size, seed=options.seed,
        max_steps=max(1, options.tokens // tokens_per_step), learning_rate=options.learning_rate, weight_decay=options.weight_decay,
        lr_scheduler_type="cosine", warmup_steps=0.05, adam_beta2=0.95, max_grad_norm=1.0, save_strategy="no", report_to="none",
        logging_steps=50, use_cpu=options.cpu, bf16=options.bf16, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=default_data_collator, callbacks=callbacks)
    started, began = time.perf_counter(), time.process_time()
    trainer.train()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - began
    scratch.cleanup()
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    scores = perplexity(model.eval(), held_out, options.length, options.windows)
    result = {
        "body_parameters": weights, "tokens": arguments.max_steps * tokens_per_step, "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "seed": options.seed, "bits": options.bits, "scale": options.scale if options.bits else None,
        "learning_rate": options.learning_rate, "weight_decay": options.weight_decay, "hidden_size": options.hidden_size,
        "held_out_perplexity": scores["perplexity"], "held_out_tokens": scores["num_tokens"],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "file_bytes": (options.output / "model.safetensors").stat().st_size,
    }  # fmt: skip
    if options.bits is not None:
        found = hf_compact.inspect_folder(options.output)
        result |= {name: found[name] for name in ("body_bits_per_weight", "file_bits_per_weight")}
    write_text(options.output / "training.json", json.dumps(result, indent=2) + "\n")
    return result


def main() -> int:
    """Parse, train, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="UTF-8 text, one or several files")
    parser.add_argument("--output", type=Path, required=True, help="folder to create")
    parser.add_argument("--bits", type=float, choices=(1.58, 2, 3, 4), help="full precision without it")
    parser.add_argument("--scale", choices=("absmean", "absmedian", "lsq"), help="absmean by default; needs --bits")
    parser.add_argument("--dequantization", choices=("shared", "weights"), help="shared by default; needs --bits")
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=2_000_000, help="tokens to train on")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--ramp-share", type=float, help="0.03 by default; needs --bits")
    parser.add_argument("--windows", type=int, default=200, help="held-out windows to score")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    options = parser.parse_args()
    try:
        result = train(options)
    except CompactError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    shown = {name: value for name, value in result.items() if name != "losses"}
    print(json.dumps(shown, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
