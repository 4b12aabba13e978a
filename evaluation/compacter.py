r"""Everything that is claimed of Compacter, in one run that goes on where it was stopped.

    python -m evaluation.compacter --encoder MINILM_FOLDER --glue GLUE_FOLDER --model SMOLLM2.gguf \
        --instructions alpaca_en_999.json --work runs/compacter

Four parts: GLUE tasks (`scripts/glue_compacter.py`), the time of a decoded token, memory and time of a training step (rows
of the GLUE part), and SmolLM2 on instructions against full fine-tuning at equal tokens. Each leaves its JSON in the work
folder. Results go to `evaluation/results/06-compacter.json` and `.md`; `--part` runs some parts only.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from evaluation.steps import RESULTS, bar, bar_table, commit, machine, script

HERE = Path(__file__).parent
GLUE = HERE.parent / "scripts" / "glue_compacter.py"
PARTS = ("glue", "decode", "instructions")
#: What is compared; the script has two more.
GLUE_METHODS = ("full", "lora", "compacter")
#: Of the two ways to train SmolLM2; 480 rows of up to 160 tokens, once.
INSTRUCTION_RATES = {"full": 2e-5, "compacter++": 3e-3}


def glue(options: argparse.Namespace) -> dict[str, Any]:
    """Rows of the script, which has a journal of its own, one run per core at a time, and how long they took together."""
    processes = os.cpu_count() or 1
    command = [
        sys.executable,
        str(GLUE),
        "--model",
        options.encoder,
        "--data",
        options.glue,
        "--work",
        str(options.work / "glue"),
        "--threads",
        "1",
        "--processes",
        str(processes),
        "--method",
        *GLUE_METHODS,
    ]
    subprocess.run(command, check=True)
    rows = json.loads((options.work / "glue" / "rows.json").read_text())
    return {"rows": rows, "seconds": sum(row["seconds"] for row in rows) / processes}


def decode(options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds per decoded token of SmolLM2, alone and with Compacter++, taken in turn; medians of the rounds."""
    from peft import get_peft_model

    from hf_compact import CompacterConfig, api

    started = time.perf_counter()
    dense = api.open_dense(options.model)
    plain = dense.model.to(torch.float32)
    ids = torch.randint(100, 20_000, (1, 64), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def milliseconds(model: Any, tokens: int = 24) -> float:
        model.generate(input_ids=ids, max_new_tokens=2, min_new_tokens=2, do_sample=False)
        before = time.perf_counter()
        model.generate(input_ids=ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        return 1e3 * (time.perf_counter() - before) / tokens

    adapted = get_peft_model(plain, CompacterConfig(variant="compacter++", task_type="CAUSAL_LM")).eval()
    times: dict[str, list[float]] = {"base": [], "compacter++": [], "compacter++, merge_cache": []}
    for _ in range(options.rounds):
        bare = adapted.unload()  # the stock model, without PEFT's copies of the norms
        times["base"].append(milliseconds(bare))
        adapted = get_peft_model(bare, CompacterConfig(variant="compacter++", task_type="CAUSAL_LM")).eval()
        times["compacter++"].append(milliseconds(adapted))
        adapted.merge_cache()
        times["compacter++, merge_cache"].append(milliseconds(adapted))
    return {"milliseconds": {name: statistics.median(values) for name, values in times.items()}, "rounds": times,
            "seconds": time.perf_counter() - started}  # fmt: skip


def instructions(options: argparse.Namespace) -> dict[str, Any]:
    """Held-out loss of SmolLM2 before and after one epoch, in the whole and with Compacter++; one process each."""
    found = {}
    for method in INSTRUCTION_RATES:
        kept = options.work / f"instructions-{method}.json"
        if not kept.exists():
            command = [sys.executable, "-m", "evaluation.compacter", "--model", options.model, "--instructions", options.instructions,
                       "--one", method, "--rows", str(options.rows)]  # fmt: skip
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            kept.write_text(done.stdout.splitlines()[-1] + "\n")
        found[method] = json.loads(kept.read_text())
        print(f"done: instructions, {method}: {found[method]['before']:.4f} -> {found[method]['after']:.4f}", flush=True)
    return {"rows": found, "seconds": sum(row["seconds"] for row in found.values())}


def train_instructions(options: argparse.Namespace) -> dict[str, Any]:
    """One of the two ways: the loss is on the answers only, in nats per token."""
    import tempfile

    import transformers
    from peft import get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    from hf_compact import CompacterConfig, api
    from hf_compact.report import peak_memory_bytes

    transformers.logging.set_verbosity_error()
    dense = api.open_dense(options.model)
    tokenizer = dense.load_tokenizer()
    model = dense.model.to(torch.float32)
    examples = []
    for row in json.loads(Path(options.instructions).read_text(encoding="utf-8")):
        prompt = tokenizer(f"{row['instruction']}\n{row['input']}\n\n", add_special_tokens=False)["input_ids"]
        answer = [*tokenizer(row["output"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ids, labels = (prompt + answer)[:160], ([-100] * len(prompt) + answer)[:160]
        if len(prompt) < 120:
            examples.append({"input_ids": ids, "labels": labels})
    held_out, rows = examples[-100:], examples[:-100][: options.rows]
    torch.manual_seed(0)
    if options.one != "full":
        model = get_peft_model(model, CompacterConfig(variant=options.one, task_type="CAUSAL_LM"))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            scratch, per_device_train_batch_size=8, per_device_eval_batch_size=8, num_train_epochs=1, seed=0, bf16=True,
            use_cpu=not torch.cuda.is_available(), learning_rate=INSTRUCTION_RATES[options.one], warmup_steps=0.06,
            train_sampling_strategy="group_by_length", save_strategy="no", report_to="none", disable_tqdm=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
        trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=held_out, data_collator=collator)
        before = trainer.evaluate()["eval_loss"]
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        peak = peak_memory_bytes()
        after = trainer.evaluate()["eval_loss"]
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "before": before,
        "after": after,
        "seconds": seconds,
        "peak_memory_bytes": peak,
        "trainable_parameters": trainable,
        "tokens": sum(len(row["input_ids"]) for row in rows),
        "learning_rate": INSTRUCTION_RATES[options.one],
    }


def bars(found: dict[str, Any], table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Claim by claim, for the parts that have been run."""
    result = []
    rows = {(row["task"], row["method"]): row for row in table}
    for task in dict.fromkeys(row["task"] for row in table):
        full, lora, ours = (rows.get((task, method)) for method in ("full", "lora", "compacter"))
        if None in (full, lora, ours):
            continue
        source, seconds = found["glue"], found["glue"]["seconds"]
        gap = round(full["accuracy"] - ours["accuracy"], 2)
        result.append(bar(f"{task}: points of accuracy below full fine-tuning", "<= 1.0", gap, gap <= 1.0, source, seconds))
        share = ours["trainable_parameters"] / full["trainable_parameters"]
        result.append(
            bar(f"{task}: share of its trainable parameters", "<= 0.005", round(share, 5), share <= 0.005, source, seconds)
        )
        lead = round(ours["accuracy"] - lora["accuracy"], 2)
        claim = f"{task}: points of accuracy ahead of LoRA, which has {lora['trainable_parameters']:,.0f} trainable parameters against {ours['trainable_parameters']:,.0f}"  # fmt: skip
        result.append(bar(claim, "> 0", lead, lead > 0, source, seconds))
        for name, field in (("seconds per epoch", "seconds_per_epoch"), ("peak memory", "peak_memory_bytes")):
            ratio = round(ours[field] / full[field], 3)
            result.append(bar(f"{task}: {name} of compacter, times full fine-tuning", "< 1", ratio, ratio < 1, source, seconds))
    if "glue" in found:
        seconds = round(found["glue"]["seconds"])
        result.append(
            bar("GLUE part: minutes of training", "<= 90", round(seconds / 60, 1), seconds <= 5400, found["glue"], seconds)
        )
        seeds = sorted({row["seed"] for row in found["glue"]["rows"]})
        result = [row | {"seed": seeds} for row in result]
    if "decode" in found:
        times = found["decode"]["milliseconds"]
        for name, way in (("compacter++, merge_cache", "with merge_cache()"), ("compacter++", "as it is trained")):
            overhead = round(times[name] / times["base"] - 1, 4)
            claim = f"decoding: overhead of Compacter++ per token, {way}"
            result.append(bar(claim, "<= 0.08", overhead, overhead <= 0.08, found["decode"], found["decode"]["seconds"]))
    if "instructions" in found:
        ways = found["instructions"]["rows"]
        won = {name: row["before"] - row["after"] for name, row in ways.items()}
        share = round(won["compacter++"] / won["full"], 3)
        claim = f"SmolLM2, instructions: share of the held-out loss that full fine-tuning wins ({won['full']:.3f} nats)"
        held = won["full"] > 0 and share >= 0.8
        result.append(bar(claim, ">= 0.8", share, held, found["instructions"], found["instructions"]["seconds"]))
        for name, field in (("seconds of training", "seconds"), ("peak memory", "peak_memory_bytes")):
            ratio = round(ways["compacter++"][field] / ways["full"][field], 3)
            claim = f"SmolLM2, instructions: {name} of compacter++, times full fine-tuning"
            result.append(bar(claim, "< 1", ratio, ratio < 1, found["instructions"], found["instructions"]["seconds"]))
    return result


def write(found: dict[str, Any], command: str) -> None:
    """The JSON and the tables of what has been run."""
    glue = script("glue_compacter")
    table = glue.summary(found["glue"]["rows"]) if "glue" in found else []
    result = [{"seed": 0, **row, "machine": machine(), "command": command} for row in bars(found, table)]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "06-compacter.json").write_text(json.dumps({"bars": result, **found}, indent=2) + "\n")
    text = f"# Compacter\n\n{machine()}; the commit of each part is in the JSON.\n\n" + bar_table(result) + "\n"
    if table:
        glue.plot(table, RESULTS / "06-compacter.png")
        text += "\n## GLUE\n\n" + glue.markdown(table)
        rates = ", ".join(f"{name} {glue.LEARNING_RATES[name]:g}" for name in GLUE_METHODS)
        size = ", ".join(f"{name} {value}" for name, value in glue.SIZE.items())
        text += f"\nLearning rates: {rates}. Compacter: {size}.\n"
    if "decode" in found:
        text += "\n## Decoding\n\n| | milliseconds per token |\n|---|---|\n"
        text += "".join(f"| {name} | {value:.2f} |\n" for name, value in found["decode"]["milliseconds"].items())
    if "instructions" in found:
        text += "\n## SmolLM2 on instructions\n\n| | loss before | after | trainable parameters | seconds | peak MB |\n|---|---|---|---|---|---|\n"
        text += "".join(
            f"| {name} | {row['before']:.4f} | {row['after']:.4f} | {row['trainable_parameters']:,} | {row['seconds']:.0f} "
            f"| {row['peak_memory_bytes'] / 1e6:.0f} |\n"
            for name, row in found["instructions"]["rows"].items()
        )
    (RESULTS / "06-compacter.md").write_text(text)


def main() -> int:
    """Measure what is missing and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--glue", help="folder with the GLUE tasks")
    parser.add_argument("--model", help="SmolLM2-135M-Instruct: folder or .gguf file")
    parser.add_argument("--instructions", help="JSON list of {instruction, input, output}")
    parser.add_argument("--part", action="append", choices=PARTS, help="default: all")
    parser.add_argument("--rows", type=int, default=480, help="instructions to train on")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of decoding")
    parser.add_argument("--work", type=Path, default=Path("runs/compacter"))
    parser.add_argument("--one", choices=INSTRUCTION_RATES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(train_instructions(options)))
        return 0
    parts = options.part or list(PARTS)
    needed = {"glue": ("encoder", "glue"), "decode": ("model",), "instructions": ("model", "instructions")}
    for part in parts:
        for name in needed[part]:
            if getattr(options, name) is None:
                parser.error(f"--{name} is needed for the part {part}")
    options.work.mkdir(parents=True, exist_ok=True)
    at = commit()
    for part in parts:
        path = options.work / f"{part}.json"
        if not path.exists():
            value = {"glue": glue, "decode": decode, "instructions": instructions}[part](options)
            path.write_text(json.dumps({**value, "commit": at}, indent=2) + "\n")
        print(f"done: {part}", flush=True)
    found = {part: json.loads(path.read_text()) for part in PARTS if (path := options.work / f"{part}.json").exists()}
    write(found, " ".join(__doc__.split("\n\n")[1].replace("\\\n", "").split()))
    print((RESULTS / "06-compacter.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
