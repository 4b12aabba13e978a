r"""Everything that is claimed of 1.58-bit training, in one run that goes on where it was stopped.

    python -m evaluation.ternary --train wiki.utf8 --train technical.utf8 --train tiny.utf8 \
        --model SmolLM2-135M-Instruct.Q4_1.gguf --text wiki.test.raw --text c4.utf8 --work runs/ternary

Four parts: language models trained from scratch (`scripts/train_ternary_from_scratch.py`; a sweep of learning rate and weight
decay on the smaller size, then full precision, ternary, and ternary with doubled hidden size at the rates that were best for
full precision and for ternary weights, three seeds), the time of a training step, cached distillation of a damaged model against
plain cross-entropy, each at its best rate, and the conversion of SmolLM2 (`scripts/convert_to_ternary.py`), beside the best
row of post-training quantization in `02-codebook.json` that takes no more bytes. Every single run leaves its JSON in the work folder,
and is taken by one process only: the same command, given twice at once, shares the runs. Results go to
`evaluation/results/04-ternary.json`, `.md` and `.png`; `--part` runs some parts only, `--quick` shows that it all works.
"""

import argparse
import copy
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from evaluation import steps as stepwise
from evaluation.steps import RESULTS, bar, bar_table, commit, kept, machine, taken
from hf_compact.checkpoint import write_plot, write_text

SCRIPTS = Path(__file__).parents[1] / "scripts"
PARTS = ("scratch", "steps", "distillation", "conversion")
SEEDS = (0, 1, 2)
#: body weights in millions -> hidden size, five blocks each
SIZES = {"1M": 128, "4M": 256}
KINDS = {
    "full precision": ({}, 1),
    "ternary, absmean": ({"scale": "absmean"}, 1),
    "ternary, absmedian": ({"scale": "absmedian"}, 1),
    "ternary, absmean, doubled": ({"scale": "absmean"}, 2),
    "ternary, absmedian, doubled": ({"scale": "absmedian"}, 2),
}
LEARNING_RATES, DECAYS = (6e-4, 2e-3, 6e-3), (0.0, 0.01, 0.1)
SWEPT = ("full precision", "ternary, absmean")
HEALED = ("cross-entropy", "cached top-64")
HEALING_RATES = (3e-4, 1e-3, 3e-3)
HELD_OUT_WINDOWS = 100
#: Equal for all models of a size. All runs together are to take less than three hours of one core; with so few tokens, steps
#: count for more than their size.
TOKENS = {"1M": 150_000, "4M": 75_000}
QUICK = {"vocabulary": 300, "length": 64, "layers": 1, "tokens": 4096}
SMALL_STEPS = {"batch_size": 4, "length": 128}
#: The model that is damaged and healed has learned what its text can teach it: what it says is worth learning.
TEACHER = {"hidden_size": 128, "tokens": 2_000_000, "learning_rate": 4e-3, "weight_decay": 0.1, "cpu": True}
#: Of the conversion, by device: several times over the text, so that the teacher runs on a part of the tokens.
CONVERSIONS: dict[str, dict[str, Any]] = {
    "cpu": {"tokens": 300_000, "epochs": 2, "batch_size": 2, "learning_rate": 1e-3, "warm_start_epochs": 6,
            "warm_start_tokens": 8192},
    "cuda": {"tokens": 4_800_000, "epochs": 8, "batch_size": 8, "learning_rate": 1e-3, "warm_start_epochs": 6,
             "warm_start_tokens": 65_536, "bf16": True},
}  # fmt: skip


def script(
    name: str, output: Path, arguments: dict[str, Any], texts: list[str], is_patient: bool = True
) -> dict[str, Any] | None:  # fmt: skip
    """Run a training script once; a folder that has its `training.json` is done. None where another process runs it now."""
    done = output / "training.json"
    with taken(output, is_patient) as lock:
        if lock is None:
            return None
        if not done.exists():
            shutil.rmtree(output, ignore_errors=True)  # what a run that was killed has left
            command = [sys.executable, str(SCRIPTS / f"{name}.py"), "--output", str(output), "--text", *texts]
            for key, value in arguments.items():
                command += [f"--{key.replace('_', '-')}"] + ([] if value is True else [str(value)])
            with Path(f"{output}.log").open("w") as log:  # the script holds the lock too, should this process be killed
                subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, pass_fds=[lock])
            print(f"done: {output.name}", flush=True)
        return json.loads(done.read_text())


def from_scratch(options: argparse.Namespace, runs: list[tuple[str, str, float, float, int]]) -> list[dict[str, Any]]:
    """Rows of the runs (size, kind, learning rate, weight decay, seed): first those that no other process has taken."""
    quick = QUICK if options.quick else {}
    for is_patient in (False, True):
        rows = []
        for size, kind, rate, decay, seed in runs:
            settings, factor = KINDS[kind]
            arguments = {"tokens": TOKENS[size], "cpu": True} | SMALL_STEPS | quick | settings
            arguments |= {"learning_rate": rate, "weight_decay": decay, "seed": seed}
            arguments |= {"hidden_size": (32 if options.quick else SIZES[size]) * factor} | ({"bits": 1.58} if settings else {})
            output = options.work / scratch_name(size, kind, rate, decay, seed)
            found = script("train_ternary_from_scratch", output, arguments, options.train, is_patient)
            if found is not None:
                rows.append({"size": size, "kind": kind, **{key: value for key, value in found.items() if key != "losses"}})
    return rows


def scratch_name(size: str, kind: str, rate: float, decay: float, seed: int) -> str:
    """Of the folder of a run."""
    return f"{size}-{kind.replace(', ', '-').replace(' ', '_')}-{rate:g}-{decay:g}-{seed}"


def scratch(options: argparse.Namespace) -> dict[str, Any]:
    """The sweep on the smaller size, then all sizes, kinds and seeds at equal tokens and the best rates of the sweep."""
    rates, seeds = (LEARNING_RATES[:1], SEEDS[:1]) if options.quick else (LEARNING_RATES, SEEDS)
    sweep = from_scratch(
        options, [("1M", kind, rate, decay, SEEDS[0]) for kind in SWEPT for rate in rates for decay in DECAYS]
    )  # fmt: skip
    best = {kind: best_of([row for row in sweep if row["kind"] == kind]) for kind in SWEPT}
    rows = from_scratch(
        options,
        [(size, kind, *best[SWEPT[bool(KINDS[kind][0])]], seed) for size in SIZES for kind in KINDS for seed in seeds],
    )
    every = {
        scratch_name(row["size"], row["kind"], row["learning_rate"], row["weight_decay"], row["seed"]): row
        for row in (*sweep, *rows)
    }
    return {
        "sweep": sweep, "rows": rows, "seconds": sum(row["seconds"] for row in every.values()),
        "cpu_seconds": sum(row["cpu_seconds"] for row in every.values()),
    }  # fmt: skip


def best_of(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Learning rate and weight decay with the least perplexity."""
    best = min(rows, key=lambda row: row["held_out_perplexity"])
    return best["learning_rate"], best["weight_decay"]


def steps(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a plain and of a quantization-aware training step, taken in turn; medians."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_compact import TernaryCallback

    width = 64 if options.quick else 512
    config = LlamaConfig(
        hidden_size=width, intermediate_size=3 * width, num_hidden_layers=4, num_attention_heads=8, vocab_size=2048,
    )  # fmt: skip
    started, rounds, result = time.perf_counter(), 2 if options.quick else 9, {}
    ids = torch.randint(0, 2048, (4, 32 if options.quick else 256), generator=torch.Generator().manual_seed(0))
    for dtype in ("float32", "bfloat16"):
        plain = LlamaForCausalLM(config).train()
        callback = TernaryCallback(num_steps=1, ramp_share=0.0)
        models = {"plain": plain, "ternary": callback.prepare(copy.deepcopy(plain))}
        callback.begin_step(models["ternary"], 0)
        optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-4) for name, model in models.items()}
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(rounds):
            for name, model in models.items():
                begin = time.perf_counter()
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                    loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
                optimizers[name].step()
                optimizers[name].zero_grad()
                seconds[name].append(time.perf_counter() - begin)
        medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
        result[dtype] = medians | {"ratio": medians["ternary"] / medians["plain"]}
    return {"steps": result, "seconds": time.perf_counter() - started}


def healed(
    teacher: Any, cache: Any, texts: list[torch.Tensor], held_out: torch.Tensor, length: int, seed: int, kind: str, rate: float
) -> dict[str, Any]:
    """The teacher, damaged by noise and trained on the texts."""
    from transformers import Trainer, TrainingArguments, default_data_collator

    from hf_compact import DistillationCallback
    from hf_compact.scoring import perplexity

    model = copy.deepcopy(teacher)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and ".layers." in name:
                parameter += 0.5 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    if kind != "damaged":
        callbacks = [DistillationCallback(cache=cache)] if kind == "cached top-64" else []
        dataset = [{"input_ids": row, "labels": row} for row in texts]
        with tempfile.TemporaryDirectory() as folder:  # nothing is saved there, but the Trainer makes it
            args = TrainingArguments(
                folder, per_device_train_batch_size=4, num_train_epochs=1, learning_rate=rate, seed=seed, report_to="none",
                save_strategy="no", use_cpu=True, disable_tqdm=True, lr_scheduler_type="cosine",
            )  # fmt: skip
            Trainer(model, args, train_dataset=dataset, data_collator=default_data_collator, callbacks=callbacks).train()
    found = perplexity(model.eval(), held_out, length, HELD_OUT_WINDOWS)["perplexity"]
    return {"kind": kind, "seed": seed, "learning_rate": rate, "perplexity": found, "tokens": len(texts) * length}


def distillation(options: argparse.Namespace) -> dict[str, Any]:
    """A trained model is damaged by noise and healed by as many tokens of either loss; held-out perplexities."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_compact.calibration import read_texts, sample, tokenize
    from hf_compact.config import CalibrationConfig
    from hf_compact.methods.distillation import write_cache
    from hf_compact.scoring import perplexity

    started = time.perf_counter()
    folder = options.work / "teacher"
    settings = TEACHER | (QUICK | {"hidden_size": 32} if options.quick else {})
    script("train_ternary_from_scratch", folder, settings, options.train)
    length = 64 if options.quick else 256
    teacher, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    split = stepwise.script("train_ternary_from_scratch").split  # what the teacher has not seen
    text, rest = ("".join(parts) for parts in zip(*(split(read_texts([path])) for path in options.train), strict=True))
    held_out = tokenize(tokenizer, rest)
    rows: list[dict[str, Any]] = []
    rates = HEALING_RATES[:1] if options.quick else HEALING_RATES
    for seed in SEEDS[:1] if options.quick else SEEDS:
        size = CalibrationConfig(num_sequences=16 if options.quick else 256, sequence_length=length, batch_size=16)
        data = sample(tokenizer, text, size, seed, options.train)
        texts = [row for batch in data.batches for row in batch["input_ids"]]
        cache = write_cache(teacher, texts, options.work / f"teacher-{seed}", tokenizer)
        heal = partial(healed, teacher, cache, texts, held_out, length, seed)
        for kind, rate in (("damaged", 0.0), *((kind, rate) for kind in HEALED for rate in rates)):
            rows.append(kept(options.work / f"healed-{seed}-{kind.replace(' ', '_')}-{rate:g}.json", partial(heal, kind, rate)))
    return {
        "rows": rows,
        "dense": perplexity(teacher.eval(), held_out, length, HELD_OUT_WINDOWS)["perplexity"],
        "seconds": time.perf_counter() - started,
    }


def conversion(options: argparse.Namespace) -> dict[str, Any]:
    """Dense, rounded, warm-started and trained perplexity, and that of post-training quantization to as many bytes."""
    started = time.perf_counter()
    settings = {"model": options.model, **CONVERSIONS["cpu" if options.device == "cpu" else "cuda"]}
    settings["tokens"] = (options.tokens or settings["tokens"]) // settings["epochs"]
    settings |= {"tokens": 1024, "length": 64, "warm_start_epochs": 1, "warm_start_tokens": 256} if options.quick else {}
    settings |= {"cpu": True} if options.device == "cpu" else {}
    folder, scores = options.work / "converted", options.work / "scores.json"
    found = script("convert_to_ternary", folder, settings, options.train)
    command = [sys.executable, "-m", "hf_compact", "evaluate", options.model, str(folder), "--json", str(scores)]
    command += ["--dtype", "float32", "--device", options.device, "--text", *options.text]
    subprocess.run(command + (["--windows", "2", "--window-length", "64"] if options.quick else []), check=True)
    names = {options.model: "dense", str(folder): "ternary, trained"}
    rows = [{"kind": names[row["model"]], "text": Path(row["text"]).name, "perplexity": row["perplexity"],
             "file_bytes": row["file_bytes"]} for row in json.loads(scores.read_text())]  # fmt: skip
    return {
        "training": found,
        "rows": rows + quantized_after_training(found["file_bytes"]),
        "machine": machine(options.device),
        "seconds": time.perf_counter() - started,
    }


def quantized_after_training(file_bytes: int) -> list[dict[str, Any]]:
    """The scores of the row of the codebook measurements with as many bytes: weights are not trained there."""
    row = stepwise.quantized(file_bytes)
    return [
        {"kind": f"{row['name']} (02-codebook)", "text": text, "perplexity": value, "file_bytes": row["file_bytes"]}
        for text, value in (row["perplexity"].items() if row else ())
    ]


def check(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Claim by claim."""
    result = []
    if part := found.get("scratch"):
        means = mean_perplexities(part["rows"])
        for size in SIZES:
            best = min(means[size, kind][0] for kind in KINDS if "doubled" in kind)
            ratio = round(best / means[size, "full precision"][0], 4)
            result.append(
                bar(
                    f"{size}: doubled ternary, perplexity × full precision",
                    "<= 1.02",
                    ratio,
                    ratio <= 1.02,
                    part,
                    part["seconds"],
                )
            )
        hours = round(part["cpu_seconds"] / 3600, 2)
        result.append(bar("models from scratch, CPU hours", "< 3", hours, hours < 3, part, part["seconds"]))
    for dtype, row in found.get("steps", {}).get("steps", {}).items():
        part, ratio = found["steps"], round(row["ratio"], 3)
        result.append(bar(f"training step in {dtype}, × plain", "<= 1.35", ratio, ratio <= 1.35, part, part["seconds"]))
    if part := found.get("distillation"):
        by_kind = {kind: best_healing(part["rows"], kind) for kind in HEALED}
        plain, cached = (statistics.mean(values) for values in by_kind.values())
        won = all(b < a for a, b in zip(*by_kind.values(), strict=True))
        claim = "cached top-64 distillation, perplexity × cross-entropy, better with every seed"
        result.append(bar(claim, "< 1", round(cached / plain, 4), won, part, part["seconds"]))
    return result


def best_healing(rows: list[dict[str, Any]], kind: str) -> list[float]:
    """Perplexities of all seeds at the learning rate with the least mean."""
    by_rate: dict[float, list[float]] = {}
    for row in rows:
        if row["kind"] == kind:
            by_rate.setdefault(row["learning_rate"], []).append(row["perplexity"])
    return min(by_rate.values(), key=statistics.mean)


def mean_perplexities(rows: list[dict[str, Any]]) -> dict[tuple[str, str], tuple[float, float]]:
    """(size, kind) -> mean and standard deviation over the seeds."""
    values: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        values.setdefault((row["size"], row["kind"]), []).append(row["held_out_perplexity"])
    return {
        key: (statistics.mean(some), statistics.pstdev(some) if all(map(math.isfinite, some)) else math.inf)
        for key, some in values.items()
    }  # fmt: skip


def write(found: dict[str, Any], common: dict[str, Any], folder: Path) -> str:
    """JSON and Markdown."""
    bars = check(found)
    lines = [f"# 1.58-bit training\n\n{machine()}; the commit of each part is in the JSON.\n"]
    if part := found.get("scratch"):
        lines += ["| body weights | model | held-out perplexity | spread |", "|---|---|---|---|"]
        lines += [
            f"| {size} | {kind} | {mean:.3f} | {spread:.3f} |"
            for (size, kind), (mean, spread) in mean_perplexities(part["rows"]).items()
        ]
        lines += ["", "| 1M, seed 0 | learning rate | weight decay | held-out perplexity |", "|---|---|---|---|"]
        lines += [
            f"| {row['kind']} | {row['learning_rate']:g} | {row['weight_decay']:g} | {row['held_out_perplexity']:.3f} |"
            for row in part["sweep"]
        ]
    if part := found.get("distillation"):
        lines += ["", "| damaged model, healed by | learning rate | seed | held-out perplexity |", "|---|---|---|---|"]
        lines += [f"| not damaged | | | {part['dense']:.3f} |"]
        lines += [
            f"| {row['kind']} | {row['learning_rate']:g} | {row['seed']} | {row['perplexity']:.3f} |" for row in part["rows"]
        ]
    if part := found.get("conversion"):
        training = part["training"]
        lines += [
            "",
            f"Conversion ({part['machine']}): {training['tokens_seen']} tokens, {training['body_bits_per_weight']:.3f} bits per block weight.",
            "",
        ]
        lines += ["| held-out perplexity of the training text | |", "|---|---|"]
        lines += [f"| {name} | {value:.2f} |" for name, value in training["perplexity"].items()]
        lines += ["", "| model | text | perplexity, × dense | MB |", "|---|---|---|---|"]
        dense = {row["text"]: row["perplexity"] for row in part["rows"] if row["kind"] == "dense"}
        lines += [
            f"| {row['kind']} | {row['text']} | {row['perplexity'] / dense[row['text']]:.3f} | {row['file_bytes'] / 1e6:.1f} |"
            for row in part["rows"]
        ]
        plot_losses(training["losses"], folder / "04-ternary.png")
        lines += ["", "![loss of the conversion](04-ternary.png)"]
    lines += ["", bar_table(bars)]
    text = "\n".join(lines) + "\n"
    write_text(folder / "04-ternary.json", json.dumps({"bars": [b | common for b in bars], **found}, indent=2) + "\n")
    write_text(folder / "04-ternary.md", text)
    return text


def plot_losses(losses: list[float], path: Path) -> None:
    """The loss curve of the conversion, every entry over ten steps."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([10 * (i + 1) for i in range(len(losses))], losses)
    axes.set(xlabel="step", ylabel="distillation loss, nats", title="Conversion of SmolLM2-135M to 1.58 bits", yscale="log")
    axes.grid(alpha=0.3)
    write_plot(path, figure)


def main() -> int:
    """Measure what is missing and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="append", required=True, help="text to train on; repeat for several")
    parser.add_argument("--model", help="SmolLM2-135M-Instruct: folder or .gguf file")
    parser.add_argument("--text", action="append", help="text to score; repeat for several")
    parser.add_argument("--tokens", type=int, help="of the conversion; default: 300,000 on the CPU, 4.8 million elsewhere")
    parser.add_argument("--part", action="append", choices=PARTS, help="default: all")
    parser.add_argument("--quick", action="store_true", help="tiny models and few tokens; results go to the work folder")
    parser.add_argument("--work", type=Path, default=Path("runs/ternary"))
    parser.add_argument("--device", default="cpu", help="of the conversion: cpu or cuda")
    options = parser.parse_args()
    parts = options.part or list(PARTS)
    if "conversion" in parts and (options.model is None or not options.text):
        parser.error("--model and --text are needed for the part conversion")
    options.work.mkdir(parents=True, exist_ok=True)
    at = commit()
    runs = {"scratch": scratch, "steps": steps, "distillation": distillation, "conversion": conversion}
    for part in parts:
        path = options.work / f"{part}.json"
        if part == "scratch" and not path.exists():
            scratch(options)  # with whoever else is at it; what follows only collects
        kept(path, lambda part=part: {**runs[part](options), "commit": at})
    earlier = RESULTS / "04-ternary.json"
    found = json.loads(earlier.read_text()) if earlier.exists() and not options.quick else {}
    found = {part: found[part] for part in PARTS if part in found}  # of work folders that are gone
    found |= {part: json.loads(path.read_text()) for part in PARTS if (path := options.work / f"{part}.json").exists()}
    command = " ".join(__doc__.split("\n\n")[1].replace("\\\n", "").split())
    with taken(options.work / "results"):
        common = {"seeds": list(SEEDS), "machine": machine(), "command": command}
        print(write(found, common, options.work if options.quick else RESULTS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
