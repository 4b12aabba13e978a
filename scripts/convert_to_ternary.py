r"""An ordinary causal language model, converted to 1.58 (2, 3, 4) bits: blocks first, then the whole against its teacher.

    python scripts/convert_to_ternary.py --model my-model --text a.txt b.txt --output my-model-ternary --tokens 300000

1. The teacher runs once; what it says is kept in OUTPUT.teacher (or `--cache`), which a second run uses again.
2. Block-wise warm start: every block learns its dense block's output.
3. The whole model learns the stored next-token distributions, in a stock Trainer with two callbacks.

The result is OUTPUT, which `from_pretrained` loads after `import hf_compact`, and OUTPUT/training.json with the loss curve and
the held-out perplexities of the dense model, of rounding alone, of the warm start and of the result. Few tokens give a
demonstration, not a good model: published conversions take billions.
"""

import argparse
import copy
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments, default_data_collator

import hf_compact
from hf_compact import DistillationCallback, TernaryCallback, TernaryConfig
from hf_compact.api import open_dense
from hf_compact.calibration import read_texts, sample
from hf_compact.checkpoint import check_output, write_text
from hf_compact.config import CalibrationConfig
from hf_compact.errors import CompactError
from hf_compact.methods.distillation import distill_blocks_, write_cache
from hf_compact.scoring import perplexity


def convert(options: argparse.Namespace) -> dict:
    """All three steps, and the scores after each."""
    check_output(options.output)
    dense = open_dense(options.model, "float32", is_whole=True)
    teacher, tokenizer = dense.model.eval(), dense.load_tokenizer()
    device = "cpu" if options.cpu or not torch.cuda.is_available() else "cuda"
    teacher.to(device)
    count = max(1, options.tokens // options.length)
    drawn = CalibrationConfig(num_sequences=count, sequence_length=options.length, batch_size=options.batch_size)
    data = sample(tokenizer, read_texts(options.text), drawn, options.seed, [path.name for path in options.text])
    rows = [row for batch in data.batches for row in batch["input_ids"]]
    window = min(options.length, len(data.held_out))

    def score(model: PreTrainedModel) -> float:
        return perplexity(model.eval(), data.held_out, window, None)["perplexity"]

    times: dict[str, float] = {}
    result: dict = {
        "model": Path(options.model).name,
        "tokens": count * options.length,
        "seed": options.seed,
        "bits": options.bits,
    }
    result["perplexity"] = {"dense": score(teacher)}
    cache = Path(f"{options.output}.teacher") if options.cache is None else options.cache
    started = time.perf_counter()
    stored = write_cache(teacher, rows, cache, tokenizer, count=options.count, progress=shown("teacher", len(rows)))
    times["teacher"] = time.perf_counter() - started

    student = copy.deepcopy(teacher)
    config = TernaryConfig(bits=options.bits, scale=options.scale, granularity=options.granularity)
    callback = TernaryCallback(config, ramp_share=0.0)
    callback.set_strength_(callback.prepare(student), 1.0)
    result["perplexity"]["rounded"] = score(student)
    started = time.perf_counter()
    if options.warm_start_epochs:
        batches = data.batches[: max(1, options.warm_start_tokens // (options.batch_size * options.length))]
        curves = distill_blocks_(
            student, teacher, batches, epochs=options.warm_start_epochs, learning_rate=options.warm_start_learning_rate,
            progress=shown("blocks", 1),
        )  # fmt: skip
        result["blocks"] = {name: [curve[0], curve[-1]] for name, curve in curves.items()}
        result["perplexity"]["after the warm start"] = score(student)
    times["warm start"] = time.perf_counter() - started
    del teacher, dense
    scratch = tempfile.TemporaryDirectory()  # nothing is saved there, but the Trainer makes it
    arguments = TrainingArguments(
        scratch.name, per_device_train_batch_size=options.batch_size, num_train_epochs=options.epochs,
        learning_rate=options.learning_rate, lr_scheduler_type="cosine", warmup_steps=0.05, weight_decay=0.05, max_grad_norm=1.0,
        save_strategy="no", report_to="none", logging_steps=10, seed=options.seed, use_cpu=device == "cpu", bf16=options.bf16,
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(
        student, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows], data_collator=default_data_collator,
        callbacks=[callback, DistillationCallback(cache=stored, label_weight=options.label_weight)], processing_class=tokenizer,
    )  # fmt: skip
    started = time.perf_counter()
    trainer.train()
    times["training"] = time.perf_counter() - started
    scratch.cleanup()
    result["perplexity"]["trained"] = score(student)
    student.cpu().save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    found = hf_compact.inspect_folder(options.output)
    result |= {name: found[name] for name in ("body_bits_per_weight", "file_bits_per_weight", "file_bytes")}
    result |= {"losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]}
    result |= {
        "seconds": {name: round(value, 1) for name, value in times.items()},
        "tokens_seen": round(count * options.length * options.epochs),
    }
    write_text(options.output / "training.json", json.dumps(result, indent=2) + "\n")
    return result


def shown(what: str, every: int):
    """Progress in lines, about twenty of them."""

    def report(done: int, total: int) -> None:
        if done % max(1, every // 20) == 0 or done == total:
            print(f"{what}: {done}/{total}", file=sys.stderr, flush=True)

    return report


def main() -> int:
    """Parse, convert, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="dense: folder, Hub id or .gguf file")
    parser.add_argument(
        "--text", type=Path, nargs="+", required=True, help="UTF-8 text, one or several files; a part is held out"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to create")
    parser.add_argument("--cache", type=Path, help="folder of teacher outputs; default OUTPUT.teacher")
    parser.add_argument("--bits", type=float, choices=(1.58, 2, 3, 4), default=1.58)
    parser.add_argument("--scale", choices=("absmean", "absmedian", "lsq"), default="absmean")
    parser.add_argument("--granularity", choices=("tensor", "row"), default="tensor")
    parser.add_argument("--tokens", type=int, default=300_000, help="tokens of the text that are used")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--label-weight", type=float, default=0.2, help="of the cross-entropy beside the distillation")
    parser.add_argument("--count", type=int, default=64, help="log-probabilities kept per position")
    parser.add_argument("--warm-start-tokens", type=int, default=16_384)
    parser.add_argument("--warm-start-epochs", type=int, default=10, help="0 leaves the warm start out")
    parser.add_argument("--warm-start-learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    options = parser.parse_args()
    try:
        result = convert(options)
    except CompactError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({name: value for name, value in result.items() if name not in ("losses", "blocks")}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
