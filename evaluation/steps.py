"""What every measurement shares: its arguments, steps that are kept as they are done, bars and their table."""

import argparse
import importlib.util
import json
import platform
import subprocess
from collections.abc import Callable, Collection
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils.data import Dataset

from hf_compact.calibration import read_texts, tokenize, windows

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "evaluation" / "results"
TEXTS = 2


def machine() -> str:
    """Processor, cores and memory."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    gigabytes = int(Path("/proc/meminfo").read_text().split()[1]) / 1e6
    return f"{names[0]}, {len(names)} cores, {gigabytes:.0f} GB, torch {torch.__version__}, Python {platform.python_version()}"


def commit() -> str:
    """Of the code that measures."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()


def script(name: str) -> ModuleType:
    """A file of `scripts/` as a module; the folder is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parser(description: str, work: str) -> argparse.ArgumentParser:
    """Arguments of a measurement of one language model on two texts."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", required=True, help="SmolLM2-135M-Instruct: folder or .gguf file")
    made.add_argument("--calibration", action="append", required=True, help="calibration and training text; repeat for several")
    made.add_argument("--text", action="append", required=True, help="two texts to score")
    made.add_argument("--work", type=Path, default=Path(work), help="folder of everything that is made")
    return made


def parse(made: argparse.ArgumentParser, arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the arguments of `parser` and make the work folder."""
    options = made.parse_args(arguments)
    if len(options.text) != TEXTS:
        made.error(f"--text must be given twice, got {len(options.text)}")
    options.work.mkdir(parents=True, exist_ok=True)
    return options


def command_line(module: str, options: argparse.Namespace) -> str:
    """How the results were made; where the files lay is nobody's business."""
    words = [f"python -m evaluation.{module} --model {Path(options.model).name}"]
    words += [f"--calibration {Path(path).name}" for path in options.calibration]
    return " ".join(words + [f"--text {Path(path).name}" for path in options.text])


def run(
    todo: dict[str, Callable[[], dict[str, Any]]], kept: Path, wanted: Collection[str] | None = None
) -> dict[str, dict[str, Any]]:
    """Measure what is not in the file `kept`, which is written after every step.

    Args:
        todo: Step by name, in the order they need each other; the first one is the dense model, which all are held against.
        kept: JSON of what has been measured.
        wanted: Names of the steps to take besides the first; all if None.
    """
    found = json.loads(kept.read_text()) if kept.exists() else {}
    at = commit()
    for number, (name, measure) in enumerate(todo.items()):
        if name not in found and (number == 0 or not wanted or name in wanted):
            found[name] = {**measure(), "commit": at}
            partial = kept.with_suffix(".partial")
            partial.write_text(json.dumps(found, indent=2) + "\n")
            partial.replace(kept)
            print(f"done: {name}", flush=True)
    return found


class TrainingWindows(Dataset):
    """As many windows of `length` tokens as asked for, spread evenly over the texts; every row of a comparison trains on them."""

    def __init__(self, texts: list[str], tokenizer: Any, length: int, number: int) -> None:
        rows = list(windows(tokenize(tokenizer, read_texts(texts)), length, None))
        self.rows = [rows[i * len(rows) // number][0] for i in range(number)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def bar(claim: str, target: str, measured: Any, held: bool, source: dict[str, Any], seconds: float) -> dict[str, Any]:
    """One row of the results; `source` is the step that measured it."""
    row = {"claim": claim, "target": target, "measured": measured, "held": bool(held)}
    return row | {"seconds": round(seconds, 1), "commit": source["commit"]}


def bar_table(bars: list[dict[str, Any]]) -> str:
    """Of what is claimed: target, measured, held."""
    lines = ["| claim | target | measured | held |", "|---|---|---|---|"]
    lines += [f"| {b['claim']} | {b['target']} | {b['measured']} | {'yes' if b['held'] else '**no**'} |" for b in bars]
    return "\n".join(lines)
