r"""Full fine-tuning, LoRA, BitFit, Compacter and Compacter++ on GLUE tasks, with the same examples and epochs for each.

    python scripts/glue_compacter.py --model MODEL --data glue --task SST-2 MRPC --seed 0 1 2 --work runs/glue

An ordinary Trainer script: PEFT makes the model, the Trainer trains it. Every run has a process of its own, so that its
peak memory is its own, and its row is kept in WORK/rows.json: the same command goes on where it was stopped. LoRA gets the
smallest rank on query and value with at least as many trainable parameters as Compacter. Without `--data` the tasks come
from the Hub. The accuracy is that of the validation split (for MRPC in local files, of the test split) after the last epoch.
"""

import argparse
import csv
import json
import math
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

METHODS = ("full", "lora", "bitfit", "compacter", "compacter++")
#: One learning rate per method, chosen for MiniLM on training examples that were held out (`--hold-out`, `--learning-rate`).
LEARNING_RATES = {"full": 1e-4, "lora": 2e-3, "bitfit": 1e-2, "compacter": 2e-3, "compacter++": 2e-3}
#: task -> (name on the Hub, text fields there, training examples, epochs)
TASKS = {
    "SST-2": ("sst2", ("sentence",), 8000, 2),
    "MRPC": ("mrpc", ("sentence1", "sentence2"), 3668, 4),
    "RTE": ("rte", ("sentence1", "sentence2"), 2490, 4),
    "CoLA": ("cola", ("sentence",), 8551, 2),
}
#: Settings of Compacter that are options here. With as few steps as above, one set of 4 x 4 matrices for the whole model hardly
#: learns, however wide the bottleneck: twelve of 12 x 12, a wider bottleneck and a higher rank stay below 0.5 % of MiniLM.
SIZE = {"hypercomplex_division": 12, "reduction_factor": 4, "rank": 8}


def read_task(task: str, folder: Path | None) -> tuple[list, list]:
    """Rows `(label, text, second text or None)` for training and for validation."""
    if folder is None:
        from datasets import load_dataset

        name, fields, *_ = TASKS[task]
        splits = load_dataset("nyu-mll/glue", name)
        return tuple(
            [(row["label"], row[fields[0]], row[fields[1]] if len(fields) > 1 else None) for row in splits[split]]
            for split in ("train", "validation")
        )
    folder = folder / task
    if task == "SST-2":
        return tuple(
            [(int(label), text, None) for text, label in table(folder / name)[1:]] for name in ("train_full.tsv", "dev.tsv")
        )
    if task == "MRPC":
        names = ("msr_paraphrase_train.txt", "msr_paraphrase_test.txt")
        return tuple([(int(row[0]), row[3], row[4]) for row in table(folder / name)[1:]] for name in names)
    if task == "CoLA":
        parts = [[(int(row[1]), row[3], None) for row in table(folder / f"{name}.tsv")]
                 for name in ("in_domain_train", "in_domain_dev", "out_of_domain_dev")]  # fmt: skip
        return parts[0], parts[1] + parts[2]
    splits = []
    for name in ("train.jsonl", "val.jsonl"):
        rows = [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
        splits.append([(int(row["label"] == "not_entailment"), row["premise"], row["hypothesis"]) for row in rows])
    return tuple(splits)


def table(path: Path) -> list[list[str]]:
    """Rows of a tab-separated file without quoting."""
    with path.open(encoding="utf-8-sig", newline="") as stream:
        return list(csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))


def adapted(model, method: str, size: dict):
    """The model as one method trains it; `size` holds settings of Compacter."""
    from peft import LoraConfig, get_peft_model

    from hf_compact import CompacterConfig

    if method == "full":
        return model
    if method == "bitfit":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith(".bias") or name.startswith("classifier"))
        return model
    if method == "lora":
        wanted = compacter_parameters(model, size)
        width, layers = model.config.hidden_size, model.config.num_hidden_layers
        head = sum(p.numel() for p in model.classifier.parameters())
        rank = math.ceil((wanted - head) / (layers * 2 * 2 * width))
        return get_peft_model(
            model, LoraConfig(task_type="SEQ_CLS", r=rank, lora_alpha=2 * rank, target_modules=["query", "value"])
        )
    return get_peft_model(model, CompacterConfig(task_type="SEQ_CLS", variant=method, **size))


def compacter_parameters(model, size: dict) -> int:
    """Trainable parameters of Compacter on a copy of the model without memory."""
    import torch
    from peft import get_peft_model

    from hf_compact import CompacterConfig

    with torch.device("meta"):
        skeleton = type(model)(model.config)
    return get_peft_model(skeleton, CompacterConfig(task_type="SEQ_CLS", **size)).get_nb_trainable_parameters()[0]


def train(options: argparse.Namespace) -> None:
    """One run; prints one line of JSON."""
    import numpy as np
    import torch
    import transformers
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    from hf_compact.report import peak_memory_bytes

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if options.threads:
        torch.set_num_threads(options.threads)
    task, method, seed = options.task[0], options.method[0], options.seed[0]
    tokenizer = AutoTokenizer.from_pretrained(options.model)

    def encode(rows: list) -> list[dict]:
        labels, first, second = zip(*rows, strict=True)
        tokens = tokenizer(list(first), None if second[0] is None else list(second), truncation=True, max_length=128)
        return [{"input_ids": ids, "label": label} for ids, label in zip(tokens["input_ids"], labels, strict=True)]

    rows, validation = (encode(part) for part in read_task(task, options.data))
    count = options.examples or TASKS[task][2]
    picked = np.random.default_rng(seed).permutation(len(rows))
    if options.hold_out:
        validation, picked = [rows[i] for i in picked[: options.hold_out]], picked[options.hold_out :]
    rows = [rows[i] for i in picked[:count]]
    validation = validation[: options.validation]
    torch.manual_seed(seed)
    size = {name: getattr(options, name) for name in SIZE}
    model = adapted(AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=2), method, size)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    epochs = options.epochs or TASKS[task][3]
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            scratch, per_device_train_batch_size=32, per_device_eval_batch_size=64, num_train_epochs=epochs,
            learning_rate=options.learning_rate or LEARNING_RATES[method], warmup_steps=0.06, lr_scheduler_type="linear",
            weight_decay=0.0, seed=seed, bf16=options.bf16,
            use_cpu=not torch.cuda.is_available(), train_sampling_strategy="group_by_length", save_strategy="no", report_to="none", disable_tqdm=True,
            logging_steps=50, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, train_dataset=rows, eval_dataset=validation, data_collator=DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
            compute_metrics=lambda output: {"accuracy": float((output.predictions.argmax(-1) == output.label_ids).mean())},
        )  # fmt: skip
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        peak = peak_memory_bytes()
        accuracy = trainer.evaluate()["eval_accuracy"]
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    row = {
        "task": task, "method": method, "seed": seed, "accuracy": accuracy, "trainable_parameters": trainable,
        "peak_memory_bytes": peak, "seconds_per_epoch": seconds / epochs, "seconds": seconds, "epochs": epochs,
        "examples": len(rows), "validation_examples": len(validation), "learning_rate": arguments.learning_rate,
        "steps": trainer.state.global_step, "last_loss": logged[-1] if logged else None, "bf16": options.bf16,
    }  # fmt: skip
    print(json.dumps(row))


def run_missing(options: argparse.Namespace) -> list[dict]:
    """Every row of the table, those of earlier runs first."""
    from hf_compact.checkpoint import write_text

    options.work.mkdir(parents=True, exist_ok=True)
    kept = options.work / "rows.json"
    rows = json.loads(kept.read_text()) if kept.exists() else []
    settings = {name: getattr(options, name) for name in ("examples", "epochs", "validation", "hold_out", "bf16", *SIZE)}
    settings |= {"model": Path(options.model).name, "learning_rate": options.learning_rate}
    if any(row["settings"] != settings for row in rows):
        sys.exit(f"{kept} holds rows of other settings ({rows[0]['settings']}): choose another --work")
    passed = [argument for name in ("examples", "epochs", "validation", "hold_out", "learning_rate", "threads", "data", *SIZE)
              if (value := getattr(options, name)) is not None
              for argument in (f"--{name.replace('_', '-')}", str(value))]  # fmt: skip
    passed += ["--bf16" if options.bf16 else "--no-bf16"]
    wanted = [(task, method, seed) for seed in options.seed for task in options.task for method in options.method]
    done = {(row["task"], row["method"], row["seed"]) for row in rows}
    writing = threading.Lock()

    def run(task: str, method: str, seed: int) -> None:
        command = [sys.executable, __file__, "--one", "--model", options.model, "--task", task, "--method", method,
                   "--seed", str(seed), *passed]  # fmt: skip
        row = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])
        with writing:
            rows.append(row | {"settings": settings})
            write_text(kept, json.dumps(rows, indent=2) + "\n")
            accuracy = f"accuracy {row['accuracy']:.4f}, {row['seconds']:.0f} s"
            print(f"{len(rows)}/{len(wanted)}: {task}, {method}, seed {seed}: {accuracy}", flush=True)

    with ThreadPoolExecutor(options.processes) as pool:
        for future in [pool.submit(run, *row) for row in wanted if row not in done]:
            future.result()
    return [row for row in rows if (row["task"], row["method"], row["seed"]) in wanted]


def summary(rows: list[dict]) -> list[dict]:
    """Means over the seeds, one per task and method, with the spread of the accuracy."""
    result = []
    for task, method in dict.fromkeys((row["task"], row["method"]) for row in rows):
        group = [row for row in rows if (row["task"], row["method"]) == (task, method)]
        accuracies = [100 * row["accuracy"] for row in group]
        result.append(
            {
                "task": task,
                "method": method,
                "seeds": [row["seed"] for row in group],
                "accuracy": statistics.mean(accuracies),
                "accuracy_spread": statistics.pstdev(accuracies),
                **{name: statistics.mean(row[name] for row in group)
                   for name in ("trainable_parameters", "peak_memory_bytes", "seconds_per_epoch")},
            }
        )  # fmt: skip
    return result


def markdown(table: list[dict]) -> str:
    """One line per task and method."""
    lines = ["| task | method | accuracy, % (spread over seeds) | trainable parameters | of full | peak MB | seconds per epoch |", "|---" * 7 + "|"]  # fmt: skip
    for row in table:
        full = next((other for other in table if (other["task"], other["method"]) == (row["task"], "full")), row)
        share = f"{100 * row['trainable_parameters'] / full['trainable_parameters']:.3f} %"
        lines.append(
            f"| {row['task']} | {row['method']} | {row['accuracy']:.2f} ({row['accuracy_spread']:.2f}) "
            f"| {row['trainable_parameters']:,.0f} | {share} | {row['peak_memory_bytes'] / 1e6:.0f} | {row['seconds_per_epoch']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def plot(table: list[dict], path: Path) -> None:
    """Accuracy over trainable parameters, a panel per task."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row["task"] for row in table))
    figure = Figure(figsize=(5 * len(tasks), 4), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for row in (row for row in table if row["task"] == task):
            axes.errorbar(row["trainable_parameters"], row["accuracy"], row["accuracy_spread"], marker="o", label=row["method"])
        axes.set(title=task, xscale="log", xlabel="trainable parameters", ylabel="accuracy, %")
        axes.legend()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="an encoder: Hub id or folder")
    parser.add_argument("--data", type=Path, help="folder with SST-2, MRPC, RTE, CoLA below it; default: the Hub")
    parser.add_argument("--task", nargs="+", choices=TASKS, default=["SST-2", "MRPC"])
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seed", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("runs/glue"), help="folder for rows.json, table.md and plot.png")
    parser.add_argument("--examples", type=int, help="training examples; default: see TASKS")
    parser.add_argument("--validation", type=int, help="validation examples; default: all")
    parser.add_argument(
        "--hold-out", type=int, help="score so many training examples that are left out of training, to choose settings by"
    )
    for name, default in SIZE.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help="of Compacter; default: %(default)s")
    parser.add_argument("--epochs", type=int, help="default: see TASKS")
    parser.add_argument("--learning-rate", type=float, help="for every method; default: see LEARNING_RATES")
    parser.add_argument("--threads", type=int, help="of torch, in each process")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="autocast to bfloat16")
    parser.add_argument("--quick", action="store_true", help="one seed, 64 examples, one epoch: does everything run?")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        train(options)
        return 0
    if options.quick:
        options.seed, options.examples, options.epochs, options.validation = [0], 64, 1, 64
    try:
        table = summary(run_missing(options))
    except subprocess.CalledProcessError as error:
        sys.exit(
            f"a run ended with exit code {error.returncode}; what it said is above, rows that are done are kept in {options.work}"
        )
    (options.work / "table.md").write_text(markdown(table))
    plot(table, options.work / "plot.png")
    print(markdown(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
