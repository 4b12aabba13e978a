r"""Everything that is claimed of 1.58-bit training, in one run that goes on where it was stopped.

    python -m evaluation.ternary --train wiki.utf8 --train technical.utf8 --train tiny.utf8 \
        --model SmolLM2-135M-Instruct.Q4_1.gguf --text wiki.test.raw --text c4.utf8 --work runs/ternary

Four parts: language models trained from scratch (`scripts/train_ternary_from_scratch.py`; full precision, ternary, and ternary
with doubled hidden size, three seeds, and a sweep of learning rate and weight decay), the time of a training step, cached
distillation of a damaged model against plain cross-entropy, and the conversion of SmolLM2 (`scripts/convert_to_ternary.py`)
against post-training quantization to as many bits. Every single run leaves its JSON in the work folder. Results go to
`evaluation/results/04-ternary.json` and `.md`; `--part` runs some parts only, `--quick` shows that it all works.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from evaluation.steps import RESULTS, bar, bar_table, commit, machine

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
TOKENS = {False: 3_000_000, True: 4096}


def script(name: str, output: Path, arguments: dict[str, Any], texts: list[str]) -> dict[str, Any]:
    """Run a training script once; a folder that has its `training.json` is done."""
    done = output / "training.json"
    if not done.exists():
        command = [sys.executable, str(SCRIPTS / f"{name}.py"), "--output", str(output), "--text", *texts]
        for key, value in arguments.items():
            command += [f"--{key.replace('_', '-')}"] + ([] if value is True else [str(value)])
        with Path(f"{output}.log").open("w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    print(f"done: {output.name}", flush=True)
    return json.loads(done.read_text())


def scratch(options: argparse.Namespace) -> dict[str, Any]:
    """All sizes, kinds and seeds at equal tokens, then the sweep on the smaller size."""
    common = {"tokens": TOKENS[options.quick], "cpu": True} | (
        {"vocabulary": 300, "length": 64, "layers": 1} if options.quick else {}
    )
    rows = []

    def one(label: str, size: str, seed: int, **arguments: Any) -> None:
        name = label.replace(", ", "-").replace(" ", "_")
        found = script(
            "train_ternary_from_scratch",
            options.work / f"{size}-{name}-{seed}",
            {**common, **arguments, "seed": seed},
            options.train,
        )
        rows.append({"size": size, "kind": label, **{key: value for key, value in found.items() if key != "losses"}})

    for size, hidden in SIZES.items():
        for kind, (settings, factor) in KINDS.items():
            for seed in SEEDS[:1] if options.quick else SEEDS:
                bits = {"bits": 1.58} if settings else {}
                one(kind, size, seed, hidden_size=(32 if options.quick else hidden) * factor, **bits, **settings)
    for rate in LEARNING_RATES[:1] if options.quick else LEARNING_RATES:
        for decay in DECAYS:
            hidden = 32 if options.quick else SIZES["1M"]
            one(f"sweep {rate:g} {decay:g}", "1M", 0, hidden_size=hidden, bits=1.58, learning_rate=rate, weight_decay=decay)
    return {"rows": rows, "seconds": sum(row["seconds"] for row in rows)}


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


def distillation(options: argparse.Namespace) -> dict[str, Any]:
    """A trained model is damaged by noise and healed by as many tokens of either loss; held-out perplexities."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

    from hf_compact import DistillationCallback
    from hf_compact.calibration import read_texts, sample
    from hf_compact.config import CalibrationConfig
    from hf_compact.methods.distillation import write_cache
    from hf_compact.scoring import perplexity

    started = time.perf_counter()
    folder = options.work / "4M-full_precision-0"
    if not (folder / "training.json").exists():
        raise SystemExit("the part distillation needs the models of the part scratch: run that first")
    length = 64 if options.quick else 256
    teacher, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows: list[dict[str, Any]] = []
    for seed in SEEDS[:1] if options.quick else SEEDS:
        size = CalibrationConfig(num_sequences=16 if options.quick else 512, sequence_length=length, batch_size=16)
        data = sample(tokenizer, read_texts(options.train), size, seed, options.train)
        texts = [row for batch in data.batches for row in batch["input_ids"]]
        cache = write_cache(teacher, texts, options.work / f"teacher-{seed}", tokenizer)
        for kind in ("damaged", "cross-entropy", "cached top-64"):
            model = copy.deepcopy(teacher)
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.dim() == 2 and ".layers." in name:
                        parameter += 0.5 * parameter.std() * torch.randn(parameter.shape, generator=generator)
            if kind != "damaged":
                args = TrainingArguments(
                    str(options.work / "trainer"), per_device_train_batch_size=16, num_train_epochs=1, learning_rate=1e-3, seed=seed,
                    report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, lr_scheduler_type="cosine",
                )  # fmt: skip
                callbacks = [DistillationCallback(cache=cache)] if kind == "cached top-64" else []
                dataset = [{"input_ids": row, "labels": row} for row in texts]
                Trainer(model, args, train_dataset=dataset, data_collator=default_data_collator, callbacks=callbacks).train()
            held_out = perplexity(model.eval(), data.held_out, length, None)["perplexity"]
            rows.append({"kind": kind, "seed": seed, "perplexity": held_out, "tokens": len(texts) * length})
    return {
        "rows": rows,
        "dense": perplexity(teacher.eval(), data.held_out, length, None)["perplexity"],
        "seconds": time.perf_counter() - started,
    }


def conversion(options: argparse.Namespace) -> dict[str, Any]:
    """Dense, rounded, warm-started and trained perplexity, and that of codes of as many bits without training."""
    started = time.perf_counter()
    settings = {"model": options.model, "tokens": 2048 if options.quick else options.tokens, "cpu": not torch.cuda.is_available()}
    settings |= {"length": 64, "warm_start_epochs": 1, "warm_start_tokens": 256} if options.quick else {}
    folder = options.work / "converted"
    found = script("convert_to_ternary", folder, {k: v for k, v in settings.items() if v is not False}, options.train)
    peer = options.work / "as-many-bits"
    if not (peer / "compression_report.json").exists():
        recipe = yaml.safe_load(Path("configs/recipes/codebook-1.9bpw.yaml").read_text())
        recipe["stages"][0]["bits"] = round(found["body_bits_per_weight"], 3)
        if options.quick:
            recipe |= {"distillation": None, "calibration": {"num_sequences": 4, "sequence_length": 64}}
        path = options.work / "as-many-bits.yaml"
        path.write_text(yaml.safe_dump(recipe))
        command = [sys.executable, "-m", "hf_compact", "compress", options.model, "--recipe", str(path), "--output", str(peer)]
        subprocess.run([*command, "--calibration", *options.train], check=True)
    scores = options.work / "scores.json"
    command = [sys.executable, "-m", "hf_compact", "evaluate", options.model, str(folder), str(peer), "--json", str(scores)]
    command += ["--text", *options.text] + (["--windows", "2", "--window-length", "64"] if options.quick else [])
    subprocess.run(command, check=True)
    names = {options.model: "dense", str(folder): "ternary, trained", str(peer): "codes of as many bits, not trained"}
    rows = [{"kind": names[row["model"]], "text": Path(row["text"]).name, "ratio": row["ratio"], "file_bytes": row["file_bytes"]}
            for row in json.loads(scores.read_text())]  # fmt: skip
    return {"training": found, "rows": rows, "seconds": time.perf_counter() - started}


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
    for dtype, row in found.get("steps", {}).get("steps", {}).items():
        part, ratio = found["steps"], round(row["ratio"], 3)
        result.append(bar(f"training step in {dtype}, × plain", "<= 1.35", ratio, ratio <= 1.35, part, part["seconds"]))
    if part := found.get("distillation"):
        by_kind = {
            kind: [row["perplexity"] for row in part["rows"] if row["kind"] == kind]
            for kind in ("cross-entropy", "cached top-64")
        }
        plain, cached = (statistics.mean(values) for values in by_kind.values())
        won = all(b < a for a, b in zip(*by_kind.values(), strict=True))
        claim = "cached top-64 distillation, perplexity × cross-entropy, better with every seed"
        result.append(bar(claim, "< 1", round(cached / plain, 4), won, part, part["seconds"]))
    return result


def mean_perplexities(rows: list[dict[str, Any]]) -> dict[tuple[str, str], tuple[float, float]]:
    """(size, kind) -> mean and standard deviation over the seeds."""
    values: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        values.setdefault((row["size"], row["kind"]), []).append(row["held_out_perplexity"])
    return {key: (statistics.mean(some), statistics.pstdev(some)) for key, some in values.items()}


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
    if part := found.get("distillation"):
        lines += ["", "| damaged model, healed by | seed | held-out perplexity |", "|---|---|---|"]
        lines += [f"| {row['kind']} | {row['seed']} | {row['perplexity']:.3f} |" for row in part["rows"]]
    if part := found.get("conversion"):
        training = part["training"]
        lines += [
            "",
            f"Conversion: {training['tokens_seen']} tokens, {training['body_bits_per_weight']:.3f} bits per block weight.",
            "",
        ]
        lines += ["| held-out perplexity of the training text | |", "|---|---|"]
        lines += [f"| {name} | {value:.2f} |" for name, value in training["perplexity"].items()]
        lines += ["", "| model | text | perplexity, × dense | MB |", "|---|---|---|---|"]
        lines += [
            f"| {row['kind']} | {row['text']} | {row['ratio']:.3f} | {row['file_bytes'] / 1e6:.1f} |" for row in part["rows"]
        ]
    lines += ["", bar_table(bars)]
    text = "\n".join(lines) + "\n"
    (folder / "04-ternary.json").write_text(json.dumps({"bars": [b | common for b in bars], **found}, indent=2) + "\n")
    (folder / "04-ternary.md").write_text(text)
    return text


def main() -> int:
    """Measure what is missing and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="append", required=True, help="text to train on; repeat for several")
    parser.add_argument("--model", help="SmolLM2-135M-Instruct: folder or .gguf file")
    parser.add_argument("--text", action="append", help="text to score; repeat for several")
    parser.add_argument("--tokens", type=int, default=300_000, help="of the conversion")
    parser.add_argument("--part", action="append", choices=PARTS, help="default: all")
    parser.add_argument("--quick", action="store_true", help="tiny models and few tokens; results go to the work folder")
    parser.add_argument("--work", type=Path, default=Path("runs/ternary"))
    options = parser.parse_args()
    parts = options.part or list(PARTS)
    if "conversion" in parts and (options.model is None or not options.text):
        parser.error("--model and --text are needed for the part conversion")
    options.work.mkdir(parents=True, exist_ok=True)
    at = commit()
    runs = {"scratch": scratch, "steps": steps, "distillation": distillation, "conversion": conversion}
    for part in parts:
        path = options.work / f"{part}.json"
        if not path.exists():
            path.write_text(json.dumps({**runs[part](options), "commit": at}, indent=2) + "\n")
        print(f"done: {part}", flush=True)
    found = {part: json.loads(path.read_text()) for part in PARTS if (path := options.work / f"{part}.json").exists()}
    command = " ".join(__doc__.split("\n\n")[1].replace("\\\n", "").split())
    print(
        write(found, {"seeds": list(SEEDS), "machine": machine(), "command": command}, options.work if options.quick else RESULTS)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
