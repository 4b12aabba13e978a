"""What every measurement shares: its arguments, steps that are kept as they are done, bars and their table."""

import argparse
import fcntl
import importlib.util
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils.data import Dataset

from hf_compact import api
from hf_compact.calibration import read_texts, tokenize, windows
from hf_compact.checkpoint import write_text

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "evaluation" / "results"
TEXTS = 2
HELD_OUT = 32
#: Sequences that the dense model writes at once, and the tokens of a prompt.
OWN_BATCH, OWN_PROMPT = 128, 64
#: Share of them by which more are written than are asked for: not every token survives its text.
OWN_SLACK = 0.05


def machine(device: str = "cpu") -> str:
    """Processor, cores and memory; the accelerator, where one is used."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    gigabytes = int(Path("/proc/meminfo").read_text().split()[1]) / 1e6
    found = f"{names[0]}, {len(names)} cores, {gigabytes:.0f} GB, torch {torch.__version__}, Python {platform.python_version()}"
    return found if torch.device(device).type == "cpu" else f"{torch.cuda.get_device_name(device)}, {found}"


def commit() -> str:
    """Of the code that measures; where that is no repository, what the variable COMMIT says."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
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
    made.add_argument("--device", default="cpu", help="where models run; times that are claimed are those of a CPU")
    made.add_argument(
        "--rows", action="append", type=Path, default=[],
        help="rows.json of a work folder of another machine, whose rows are held against its own dense model; repeat for several",
    )  # fmt: skip
    return made


def add_training(made: argparse.ArgumentParser) -> None:
    """Arguments of a measurement that trains as well."""
    made.add_argument(
        "--dtype", choices=["auto", "float32"], default="auto",
        help="to prune in one shot, to train and to time in: float32 where the processor computes bfloat16 in software",
    )  # fmt: skip
    made.add_argument(
        "--own-text", action="store_true", help="train on what the dense model writes, not on the calibration texts"
    )


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
    words += [f"--text {Path(path).name}" for path in options.text]
    words += [f"--rows {path.parent.name}/{path.name}" for path in options.rows]
    return " ".join(words + ([f"--device {options.device}"] if options.device != "cpu" else []))


@contextmanager
def taken(place: Path, is_patient: bool = True) -> Iterator[int | None]:
    """One process at a time; the lock's file descriptor, or None where another one holds it and this one does not wait."""
    with Path(f"{place}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if is_patient else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
        else:
            yield lock.fileno()


def kept(place: Path, measure: Callable[[], dict[str, Any]], is_patient: bool = True) -> dict[str, Any] | None:
    """What has been measured, or is now, by one process; None where another one is at it and this one does not wait."""
    with taken(place, is_patient) as lock:
        if lock is None:
            return None
        if not place.exists():
            write_text(place, json.dumps(measure(), indent=2) + "\n")
            print(f"done: {place.stem}", flush=True)
        return json.loads(place.read_text())


def run(
    todo: dict[str, Callable[[], dict[str, Any]]], work: Path, wanted: Collection[str] | None = None, device: str = "cpu",
    others: Iterable[Path] = (),
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Measure what is missing in a work folder; the same command, given several times at once, shares the steps.

    Args:
        todo: Step by name, in the order they need each other; the first one is the dense model, which all are held against.
        work: Each step leaves its JSON in the folder `rows` there; all of them are in `rows.json` at the end.
        wanted: Names of the steps to take besides the first; all if None.
        device: Where.
        others: `rows.json` of other machines. Their rows come with the scores of their own dense model, as `base`, and take the
            place of those that were measured here.
    """
    work.mkdir(parents=True, exist_ok=True)
    first, together = next(iter(todo), None), work / "rows.json"
    earlier = json.loads(together.read_text()) if together.exists() else {}
    names = [name for name in todo if name not in earlier and (name == first or not wanted or name in wanted)]
    for is_patient in (False, True):
        for name in names:
            done(todo, work, name, device, is_patient)
    found = {name: json.loads(path.read_text()) for name in todo if (path := work / "rows" / f"{name}.json").exists()}
    with taken(together):  # other processes may have added theirs
        found = (json.loads(together.read_text()) if together.exists() else {}) | found
        write_text(together, json.dumps(found, indent=2) + "\n")
    for path in others:
        rows = json.loads(path.read_text())
        found |= {name: {**row, "base": rows[first]["perplexity"]} for name, row in rows.items() if name != first}
    return {name: found[name] for name in dict.fromkeys([*todo, *found]) if name in found}


def done(
    todo: dict[str, Callable[[], dict[str, Any]]], work: Path, name: str, device: str = "cpu", is_patient: bool = True
) -> dict[str, Any] | None:  # fmt: skip
    """One step as it was measured, or is now; None where another process is at it and this one does not wait."""
    (work / "rows").mkdir(parents=True, exist_ok=True)
    place = work / "rows" / f"{name}.json"
    at = {"commit": commit(), "machine": machine(device), "device": device}
    return kept(place, lambda: {**at, **todo[name]()}, is_patient)


def best_held_out(rows: dict[str, dict[str, Any]]) -> str | None:
    """The name of the row with the least perplexity on held-out windows; the first where none has any."""
    return min(rows, key=lambda name: rows[name].get("held_out") or math.inf, default=None)


def is_of_cpu(row: dict[str, Any]) -> bool:
    """Whether the times of a row are those of a CPU."""
    return row.get("device", "cpu") == "cpu"


def ratio(row: dict[str, Any], text: str, dense: dict[str, float]) -> float:
    """Perplexity over that of the dense model on the machine of the row."""
    return row["perplexity"][text] / row.get("base", dense)[text]


def quantized(file_bytes: int) -> dict[str, Any] | None:
    """The best row of `02-codebook.json`, on its first text, with at most so many bytes; same model, texts and windows."""
    measured = json.loads((RESULTS / "02-codebook.json").read_text())["rows"]
    fitting = (row for row in measured if row["file_bytes"] <= file_bytes)
    return min(fitting, key=lambda row: next(iter(row["perplexity"].values())), default=None)


def own_text(options: argparse.Namespace, number: int, length: int, is_prompted: bool = False) -> Path:
    """The file of sequences that the dense model writes, behind single random tokens or prompts; made if it is missing.

    Every token is drawn from the model's own distribution, but for its end of a text, which it may not write. Behind single tokens
    it is data of no domain, as in LLM-QAT (https://arxiv.org/abs/2305.17888), which takes the likeliest for the first tokens; a
    model this small soon writes what is like no text. Behind prompts out of the calibration texts, which are not kept, it is
    nearer to them, and for a shorter while, so that a sequence is two texts. Processes that are at it together share its parts;
    whole parts serve any number of sequences.
    """
    kind = "prompted" if is_prompted else "own"
    path, parts = options.work / f"{kind}-text-{number}-{length}.txt", options.work / "own-text"
    if path.exists():
        return path
    parts.mkdir(exist_ok=True)
    sizes = [min(OWN_BATCH, number - start) for start in range(0, number, OWN_BATCH)]
    for is_patient in (False, True):
        found = [
            kept(
                parts / f"{kind}-text-{length}-{part}-{size}.json",
                lambda part=part, size=size: written(options, part, size, length, is_prompted),
                is_patient,
            )
            for part, size in enumerate(sizes)
        ]
    with taken(path):
        write_text(path, "\n\n".join(text for part in found for text in part["texts"]))
    return path


@torch.no_grad()
def written(options: argparse.Namespace, part: int, size: int, length: int, is_prompted: bool) -> dict[str, Any]:
    """Texts of so many sequences; the part seeds them."""
    opened = api.open_dense(options.model, "bfloat16" if options.dtype == "auto" else options.dtype, is_whole=True)
    model, tokenizer = opened.model.to(options.device), opened.load_tokenizer()
    torch.manual_seed(part)
    if is_prompted:
        first, num_new = prompts(options.calibration, tokenizer, 2 * size), length // 2
    else:
        first, num_new = torch.randint(model.config.vocab_size, (size, 1)), length - 1
    first = first.to(options.device)
    ids = model.generate(
        first, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, min_new_tokens=num_new, max_new_tokens=num_new,
        pad_token_id=model.config.eos_token_id, attention_mask=torch.ones_like(first),
        cache_implementation="static", disable_compile=True,  # a cache that grows is copied for every token
    )  # fmt: skip
    return {"texts": tokenizer.batch_decode(ids[:, OWN_PROMPT:] if is_prompted else ids, skip_special_tokens=True)}


def prompts(texts: list[str], tokenizer: Any, number: int) -> torch.Tensor:
    """`[number, OWN_PROMPT]` token ids at random positions of the texts, by turns."""
    ids = [tokenize(tokenizer, read_texts([text])) for text in texts]
    sources = [ids[index % len(ids)] for index in range(number)]
    return torch.stack([source[torch.randint(len(source) - OWN_PROMPT, ()) :][:OWN_PROMPT] for source in sources])


def own_training_texts(options: argparse.Namespace, number: int, length: int) -> Iterator[Path]:
    """As much of it as so many windows take, those that are held out among them: one half of each kind, written when asked for."""
    half = math.ceil((1 + OWN_SLACK) * (number + HELD_OUT) / 2)
    return (own_text(options, half, length, is_prompted) for is_prompted in (False, True))


def ending_of(name: str, trained: Iterable[str]) -> str | None:
    """How the names of all rows end that are trained as this one is, `trained` being how they begin; None for other rows."""
    found = re.fullmatch(rf"(?:{'|'.join(map(re.escape, trained))})(-.*)?", name)
    return found and (found[1] or "")


class TrainingWindows(Dataset):
    """As many windows of `length` tokens as asked for, spread evenly over the texts; every row of a comparison trains on them.

    `held_out` are up to `HELD_OUT` of the windows between them, one behind the other, or None: settings are chosen by these. `spare`
    are the others between them.
    """

    def __init__(self, texts: list[str], tokenizer: Any, length: int, number: int) -> None:
        rows = list(windows(tokenize(tokenizer, read_texts(texts)), length, None))
        if number > len(rows):
            raise ValueError(f"the texts hold {len(rows)} windows of {length} tokens, and {number} are asked for")
        used = {i * len(rows) // number for i in range(number)}
        self.rows = [rows[i * len(rows) // number][0] for i in range(number)]
        rest = [row[0] for i, row in enumerate(rows) if i not in used]
        held_out = range(0, len(rest), max(1, len(rest) // HELD_OUT))[:HELD_OUT]
        self.held_out = torch.cat([rest[i] for i in held_out]) if rest else None
        self.spare = [row for i, row in enumerate(rest) if i not in held_out]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def bar(claim: str, target: str, measured: Any, held: bool, source: dict[str, Any], seconds: float) -> dict[str, Any]:
    """One row of the results; `source` is the step that measured it."""
    row = {"claim": claim, "target": target, "measured": measured, "held": bool(held)}
    where = {"machine": source["machine"]} if "machine" in source else {}
    return row | {"seconds": round(seconds, 1), "commit": source["commit"]} | where


def bar_table(bars: list[dict[str, Any]]) -> str:
    """Of what is claimed: target, measured, held."""
    lines = ["| claim | target | measured | held |", "|---|---|---|---|"]
    lines += [f"| {b['claim']} | {b['target']} | {b['measured']} | {'yes' if b['held'] else '**no**'} |" for b in bars]
    return "\n".join(lines)
