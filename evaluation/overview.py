r"""Every method that leaves a smaller model, on one model, in one table; goes on where it was stopped.

    python -m evaluation.overview --model SmolLM2-135M-Instruct.Q4_1.gguf --calibration wiki.valid.raw --calibration wiki.utf8 \
        --calibration technical.utf8 --calibration tiny.utf8 --text wiki.test.raw --text c4.utf8 --task-data rows \
        --limit 500 --work runs/overview

Every row is a folder in the work folder: the recipes of `configs/recipes`, an adapter trained on top of one of them, a model
pruned while it was trained, and one converted to ternary weights. Then all of them are scored in one run beside the dense
model: bytes, perplexity, tasks with their errors, prefill and decoding by turns, peak memory, seconds to compress. Methods
that leave no model (1-bit Adam, distillation) have measurements of their own. `--row` takes some rows only; a row that cannot
be made is named with its reason, and the others go on. The table goes to `evaluation/results/08-overview.md`, `.html` and
`.json`; the rows of the tasks stay in the work folder. `--quick` shows that everything runs: tiny calibration, few tokens.

`--times` times every method and writes `08-times`, without hours of calibration and training: how fast a model is and what memory
it takes come from its formats and shapes, and rows of the settings of `--quick` have those, with other values in them; only what is
dealt out by calibration (ranks, bits per matrix) differs a little.
"""

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml
from transformers import Trainer, TrainingArguments, default_data_collator

from evaluation import compare
from evaluation.steps import RESULTS, commit
from hf_compact import DistillationCallback, HessoCallback, Protocol, SpeedConfig, Windows, api, measure
from hf_compact.calibration import read_texts, sample
from hf_compact.config import CalibrationConfig
from hf_compact.results import Results

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))
TASKS = ("arc_easy", "hellaswag", "lambada_openai", "piqa", "winogrande")
#: What the adapter is trained on top of.
RECOVERED = "codebook-3bit"
#: Share of the parameters in blocks that HESSO removes.
HESSO_TARGET = 0.2
#: Of the tasks: another one moves the last digits, so all machines have the same.
BATCH_SIZE = 64
QUICK_CALIBRATION = {"num_sequences": 4, "sequence_length": 32, "batch_size": 2}


def python(*arguments: str, log: Path) -> None:
    """Run a command of this interpreter with its output in a log.

    Raises:
        CalledProcessError: it failed; the last line of the log is in its output.
    """
    with log.open("w") as stream:
        done = subprocess.run([sys.executable, *arguments], stdout=stream, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        last = (log.read_text().strip().splitlines() or ["it ended without a word"])[-1]
        raise subprocess.CalledProcessError(done.returncode, arguments, output=last)


def from_recipe(name: str, output: Path, options: argparse.Namespace) -> None:
    """`hf-compact compress` with a file of `configs`."""
    recipe = yaml.safe_load(next(path for path in RECIPES if path.stem == name).read_text())
    if options.quick:
        recipe["calibration"] = QUICK_CALIBRATION
        recipe["distillation"] = recipe["distillation"] and {**recipe["distillation"], "num_sequences": 4}
        for stage in recipe["stages"]:
            stage |= {"learning_steps": 2} if "learning_steps" in stage else {}
    path = options.work / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    texts = [word for text in options.calibration for word in ("--calibration", text)]
    arguments = ("-m", "hf_compact", "compress", str(dense(options)), "--recipe", str(path), "--output", str(output), *texts)
    arguments += ("--device", options.device)
    python(*arguments, log=Path(f"{output}.log"))


def recovered(name: str, output: Path, options: argparse.Namespace) -> None:
    """`hf-compact recover`: an adapter that learns the dense model's distributions."""
    size = ["--num-sequences", "24", "--sequence-length", "32"] if options.quick else []
    texts = [word for text in options.calibration for word in ("--text", text)]
    arguments = ("-m", "hf_compact", "recover", str(options.work / RECOVERED), "--teacher", str(dense(options)))
    python(*arguments, *texts, "--output", str(output), *size, log=Path(f"{output}.log"))


def converted(name: str, output: Path, options: argparse.Namespace) -> None:
    """`scripts/convert_to_ternary.py`: blocks first, then the whole against its teacher."""
    size = ["--tokens", "128", "--length", "32", "--warm-start-epochs", "1", "--warm-start-tokens", "64"] if options.quick else []
    arguments = (
        str(ROOT / "scripts" / "convert_to_ternary.py"),
        "--model",
        str(dense(options)),
        "--output",
        str(output),
        *(["--cpu"] if options.device == "cpu" else []),
    )
    python(*arguments, *size, "--text", *options.calibration, log=Path(f"{output}.log"))


def pruned_in_training(name: str, output: Path, options: argparse.Namespace) -> None:
    """HESSO in a stock Trainer, with the dense model as the teacher; the row's process calls `hesso`."""
    python("-m", "evaluation.overview", *sys.argv[1:], "--hesso", str(output), log=Path(f"{output}.log"))


def hesso(output: Path, options: argparse.Namespace) -> None:
    """Train and cut; 200 steps of 4 x 512 tokens."""
    opened = api.open_dense(dense(options), "float32", is_whole=True)
    teacher = api.open_dense(dense(options), "float32", is_whole=True).model
    tokenizer = opened.load_tokenizer()
    steps, length = (4, 32) if options.quick else (200, 512)
    size = CalibrationConfig(num_sequences=4 * steps, sequence_length=length, batch_size=4)
    data = sample(tokenizer, read_texts(options.calibration), size, 0, options.calibration)
    rows = [{"input_ids": row, "labels": row} for batch in data.batches for row in batch["input_ids"]]
    pruner = HessoCallback(target=HESSO_TARGET, warm_up_steps=steps // 10, pruning_steps=steps // 2, periods=min(10, steps // 2))
    arguments = TrainingArguments(
        str(output) + ".trainer", per_device_train_batch_size=4, num_train_epochs=1, learning_rate=5e-5, lr_scheduler_type="cosine",
        warmup_steps=0.05, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=options.device == "cpu", seed=0,
    )  # fmt: skip
    Trainer(
        opened.model, arguments, train_dataset=rows, data_collator=default_data_collator,
        callbacks=[pruner, DistillationCallback(teacher)],
    ).train()  # fmt: skip
    opened.model.bfloat16().save_pretrained(output)
    tokenizer.save_pretrained(output)


#: Row -> what makes its folder, in an order in which later ones find what they need.
ROWS: dict[str, Callable[[str, Path, argparse.Namespace], None]] = {
    **{path.stem: from_recipe for path in RECIPES},
    f"{RECOVERED}-adapter": recovered,
    "hesso-20": pruned_in_training,
    "ternary": converted,
}


def dense(options: argparse.Namespace) -> Path:
    """The model as a folder in bfloat16, which every row begins with and is held against."""
    folder = options.work / "dense"
    if not folder.exists():
        opened = api.open_dense(options.model, "bfloat16", is_whole=True)
        partial = folder.with_name("dense.partial")
        opened.model.save_pretrained(partial)
        opened.load_tokenizer().save_pretrained(partial)
        partial.rename(folder)
    return folder


def make(options: argparse.Namespace, commit: str) -> tuple[list[Path], dict[str, str]]:
    """Every row that is missing; the folders that are there, and why others are not."""
    folders, skipped = [], {}
    for name in options.row or ROWS:
        folder, kept = options.work / name, options.work / f"{name}.seconds.json"
        if not kept.exists():
            started = time.perf_counter()
            if ROWS[name] is not from_recipe:  # which alone goes on with what a stopped run has left
                for remnant in (folder, Path(f"{folder}.partial")):
                    shutil.rmtree(remnant, ignore_errors=True)
            try:
                ROWS[name](name, folder, options)
            except subprocess.CalledProcessError as error:
                skipped[name] = error.output.replace(f"{options.work}/", "")  # where it lay is nobody's business
                print(f"skipped: {name}: {skipped[name]}", flush=True)
                continue
            kept.write_text(json.dumps({"seconds": time.perf_counter() - started, "commit": commit}) + "\n")
        print(f"made: {name}", flush=True)
        folders.append(folder)
    return folders, skipped


def finished(results: Results, options: argparse.Namespace) -> Results:
    """The results with the wall-clock seconds of each row, and without the rows of the tasks."""
    models = []
    for model in results.models:
        kept = options.work / f"{model.name}.seconds.json"
        found = json.loads(kept.read_text()) if kept.exists() else None
        is_claimed = found is not None and not options.times  # the seconds of tiny settings say nothing
        models.append(
            dataclasses.replace(
                model,
                compression={**(model.compression or {}), "seconds": found["seconds"]} if is_claimed else None,
                provenance={**model.provenance, **({} if found is None else {"compressed_at": found["commit"]})},
                tasks={task: {**entry, "items": {}} for task, entry in model.tasks.items()},
            )
        )
    return dataclasses.replace(results, models=models)


def main() -> int:
    """Make what is missing, score what is new, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="dense: folder, Hub id or .gguf file")
    parser.add_argument(
        "--calibration", action="append", required=True, help="text to calibrate and train on; repeat for several"
    )
    parser.add_argument("--text", action="append", required=True, help="text to score; repeat for several")
    parser.add_argument("--task", action="append", help=f"task of lm-evaluation-harness; default: {', '.join(TASKS)}")
    parser.add_argument("--task-data", type=Path, help="folder with their rows; default: from the Hub")
    parser.add_argument("--limit", type=int, help="rows of each task; default: all")
    parser.add_argument("--row", action="append", choices=list(ROWS), help="rows to make; all by default")
    parser.add_argument("--work", type=Path, default=Path("runs/overview"), help="folder of everything that is made")
    parser.add_argument("--device", default="cpu", help="where models run")
    parser.add_argument("--no-speed", action="store_true", help="leave times and memory out: others are at work on this machine")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    parser.add_argument("--quick", action="store_true", help="tiny settings that only show that it runs")
    parser.add_argument(
        "--times", action="store_true", help="only time rows, which are made as by --quick, in a work folder of their own"
    )
    parser.add_argument("--hesso", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.times and options.no_speed:
        parser.error("--times with --no-speed leaves nothing to measure")
    options.quick |= options.times
    options.work.mkdir(parents=True, exist_ok=True)
    if options.hesso:
        hesso(options.hesso, options)
        return 0
    at = commit()
    folders, skipped = make(options, at)
    skipped |= {name: "not run" for name in ROWS if options.row and name not in options.row}
    timing = SpeedConfig(prompt_tokens=16, new_tokens=3, repeats=1) if options.quick and not options.times else SpeedConfig()
    protocol = Protocol(
        windows=Windows(window_length=64, num_windows=2) if options.quick else Windows(),
        tasks=() if options.times else tuple(options.task or TASKS), limit=options.limit,
        speed=None if options.no_speed else timing, dtype="bfloat16", device=options.device, batch_size=BATCH_SIZE,
    )  # fmt: skip
    last = ""

    def advance(unit: str, done: int, total: int) -> None:
        nonlocal last
        if unit != last:
            last = unit
            print(f"scoring: {unit}", flush=True)

    results = measure(
        folders, () if options.times else options.text, protocol, compare_with=dense(options), task_data=options.task_data,
        output=options.work / "results.json", provenance={"commit": at}, progress=advance,
    )  # fmt: skip
    results = finished(dataclasses.replace(results, skipped=skipped), options)
    options.results.mkdir(exist_ok=True)
    name, title = ("08-times", "Times of methods") if options.times else ("08-overview", "Methods")
    for kind in ("json", "md", "html"):
        compare.write(results, options.results / f"{name}.{kind}", f"{title} on {Path(options.model).name}")
    print(compare.markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
