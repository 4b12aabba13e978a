r"""Codebook recipes and their controls: compressed, verified and scored on two texts; goes on where it was stopped.

    python -m evaluation.rates --model MODEL.gguf --calibration wiki.valid.raw --calibration wiki.utf8 \
        --calibration technical.utf8 --calibration tiny.utf8 --text wiki.test.raw --text c4.utf8 --work runs/rates

Every row is a recipe, as it is or with some of its stages of work left out: the difference is what that work is worth.
`--row` takes some of them only; what has not run yet is left out of the tables. Results go to
`evaluation/results/02-codebook.json` and `.md`.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from evaluation import steps
from evaluation.steps import RESULTS, bar, machine
from hf_compact.checkpoint import TensorSource
from hf_compact.functional.coding import decode
from hf_compact.functional.trellis import values_of

HERE = Path(__file__).parent
MINUTES = 15
MEGABYTES_PER_SECOND = 100
DECODING = ": decoding, MB of bfloat16 weights per second on one core"
RECONSTRUCTION = {"epochs": 3, "learning_rate": 1e-3}
DISTILLATION = {"num_sequences": 160, "epochs": 1, "batch_size": 2, "learning_rate": 2e-3}


@dataclass(frozen=True)
class Row:
    """One way to compress."""

    recipe: str
    changes: dict[str, Any] = field(default_factory=dict)
    """Of the recipe."""
    stage: dict[str, Any] = field(default_factory=dict)
    """Of its only stage."""
    seed: int = 0
    """Of the draw of calibration texts."""


class Bar(NamedTuple):
    """What a recipe is to reach."""

    body_bits: float | None
    share_of_fp32: float | None
    ratios: tuple[float | None, float | None]
    """Most perplexity, times dense, on the two texts."""


RATES = ("4.0", "3.0", "2.3", "1.9")
ONE_GRID = {"grid": "uniform"}
PLAIN = {"distillation": None}
# Measured with the settings that the trellis made room to improve.
ONE_GRID_4 = Row("codebook-4.0bpw", {"distillation": DISTILLATION}, {**ONE_GRID, "embedding_bits": 6.0})
ROWS = {
    **{f"codebook-{bits}bpw": Row(f"codebook-{bits}bpw") for bits in RATES},
    "codebook-7percent": Row("codebook-7percent"),
    "jlcm-3bit": Row("jlcm-3bit"),
    "codebook-4.0bpw, one grid, embedding at 6 bits": ONE_GRID_4,
    **{f"codebook-{bits}bpw, one grid": Row(f"codebook-{bits}bpw", {}, ONE_GRID) for bits in RATES[1:]},
    "codebook-2.3bpw, not distilled": Row("codebook-2.3bpw", PLAIN),
    **{f"codebook-2.3bpw, not distilled, seed {seed}": Row("codebook-2.3bpw", PLAIN, seed=seed) for seed in (1, 2)},
    "codebook-4.0bpw, one grid, embedding at 6 bits, not distilled": replace(ONE_GRID_4, changes=PLAIN),
    "codebook-2.3bpw, one grid, not distilled": Row("codebook-2.3bpw", PLAIN, ONE_GRID),
    "codebook-2.3bpw, one grid, equal rates, not distilled": Row("codebook-2.3bpw", PLAIN, {**ONE_GRID, "sensitivity": "none"}),
    "codebook-2.3bpw, one grid, reconstructed, not distilled": Row(
        "codebook-2.3bpw", {**PLAIN, "reconstruction": RECONSTRUCTION}, ONE_GRID
    ),
    "codebook-7percent, not distilled": Row("codebook-7percent", PLAIN),
    "codebook-7percent, equal rates, not distilled": Row("codebook-7percent", PLAIN, {"sensitivity": "none"}),
    "jlcm-3bit, not distilled": Row("jlcm-3bit", PLAIN),
    "jlcm-3bit, codes not learned, not distilled": Row("jlcm-3bit", PLAIN, {"learning": "none"}),
    "jlcm-3bit, equal steps": Row("jlcm-3bit", {}, {"grid": "uniform", "row_order": "given", "learning": "none"}),
}
BARS = {
    "codebook-4.0bpw": Bar(4.0, None, (1.025, 1.03)),
    "codebook-3.0bpw": Bar(3.0, None, (1.10, 1.15)),
    "codebook-2.3bpw": Bar(2.3, None, (1.40, 1.65)),
    "codebook-1.9bpw": Bar(1.9, None, (2.2, 3.0)),
    "jlcm-3bit": Bar(3.3, None, (1.30, 1.45)),
    "codebook-7percent": Bar(None, 0.07, (2.8, None)),
}


def measure(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Compress in one process, score in another."""
    row = ROWS[name]
    recipe = yaml.safe_load(Path(f"configs/recipes/{row.recipe}.yaml").read_text()) | row.changes
    recipe["stages"] = [recipe["stages"][0] | row.stage]
    label = name.replace(", ", "-").replace(" ", "_")
    path = options.work / f"{label}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    folder, scores = options.work / label, options.work / f"{label}.scores.json"
    command = [sys.executable, "-m", "hf_compact"]
    compress = [*command, "compress", options.model, "--recipe", str(path), "--output", str(folder)]
    compress += ["--seed", str(row.seed), *(argument for text in options.calibration for argument in ("--calibration", text))]
    compress += ["--device", options.device]
    evaluate = [*command, "evaluate", str(folder), "--json", str(scores), "--device", options.device]
    evaluate += [argument for text in options.text for argument in ("--text", text)]
    started = time.perf_counter()
    with (options.work / f"{label}.log").open("w") as log:
        if not folder.exists():
            subprocess.run(compress, check=True, stdout=log, stderr=subprocess.STDOUT)
        seconds = time.perf_counter() - started
        subprocess.run(evaluate, check=True, stdout=log, stderr=subprocess.STDOUT)
    report = json.loads((folder / "compression_report.json").read_text())
    kept = {key: report[key] for key in ("seconds", "totals", "file_bytes", "distillation", "verification", "peak_memory_bytes")}
    perplexities = {Path(row["text"]).name: row["perplexity"] for row in json.loads(scores.read_text())}
    return {"folder": label, "command_seconds": seconds, "perplexity": perplexities, **kept}


def decode_speed(folder: Path) -> dict[str, Any]:
    """Megabytes of bfloat16 weights per second that come out of the streams of a folder, on one core."""
    torch.set_num_threads(1)
    source = TensorSource.in_folder(folder)
    table = json.loads((folder / "config.json").read_text())["quantization_config"]["modules"]
    is_trellis = {
        f"{name}.weight": spec.get("is_trellis", False)  # not in folders of before there was one
        for name, spec in table.items()
        if spec["layer"] == "entropy_linear" and "tied_to" not in spec
    }
    streams = source.read(list(is_trellis))
    started = time.perf_counter()
    weights = 0
    for name, stream in streams.items():
        codes = decode(stream.view(torch.uint8))
        weights += (values_of(codes) if is_trellis[name] else codes).numel()
    seconds = time.perf_counter() - started
    return {"weights": weights, "command_seconds": seconds, "megabytes_per_second": 2 * weights / seconds / 1e6}


def decode_speeds(work: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Decoding by row. Of a folder that is gone, what was measured on it: kept in the work folder, or else in the results."""
    folders = {name: work / found[name]["folder"] for name in found if name in BARS and name.startswith("codebook")}
    todo = {name: lambda folder=folder: decode_speed(folder) for name, folder in folders.items() if folder.exists()}
    measured = steps.run(todo, work / "speeds")
    path = RESULTS / "02-codebook.json"
    for row in json.loads(path.read_text())["bars"] if path.exists() else ():
        name = row["claim"].removesuffix(DECODING)
        if name in folders and row["claim"] == name + DECODING and name not in measured:
            measured[name] = {
                "megabytes_per_second": row["measured"],
                "command_seconds": row["seconds"],
                "commit": row["commit"],
            }
    return {name: measured[name] for name in folders if name in measured}


def dense(options: argparse.Namespace) -> dict[str, Any]:
    """Scores of the uncompressed model."""
    scores = options.work / "dense.scores.json"
    command = [sys.executable, "-m", "hf_compact", "evaluate", options.model, "--json", str(scores), "--device", options.device]
    command += [argument for text in options.text for argument in ("--text", text)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return {"perplexity": {Path(row["text"]).name: row["perplexity"] for row in json.loads(scores.read_text())}}


def check(name: str, row: dict[str, Any], base: dict[str, float]) -> list[dict[str, Any]]:
    """The claims of one row: its minutes, unless blocks are reconstructed, and those of a recipe as it is."""
    totals, result = row["totals"], []

    def claim(what: str, target: str, measured: float, is_held: bool, seconds: float = 0) -> None:
        result.append(bar(f"{name}: {what}", target, measured, is_held, row, seconds) | {"seed": ROWS[name].seed})

    if "reconstruction" not in ROWS[name].changes and steps.is_of_cpu(row):
        minutes = sum(row["seconds"].values()) / 60
        claim("minutes to compress", f"<= {MINUTES}", round(minutes, 1), minutes <= MINUTES, row["command_seconds"])
        alone = minutes - row["seconds"].get("distill", 0) / 60
        if alone < minutes:
            claim("minutes to compress, distillation apart", f"<= {MINUTES}", round(alone, 1), alone <= MINUTES)
    if name not in BARS:
        return result
    goal = BARS[name]
    if goal.body_bits is not None:
        bits = totals["body_bits_per_weight"]
        claim("bits per block weight", f"<= {goal.body_bits}", round(bits, 4), bits <= goal.body_bits)
    if goal.share_of_fp32 is not None:
        share = totals["share_of_fp32"]
        claim("file, share of fp32", f"<= {goal.share_of_fp32}", round(share, 4), share <= goal.share_of_fp32)
    for text, limit in zip(row["perplexity"], goal.ratios, strict=True):
        if limit is not None:
            ratio = round(steps.ratio(row, text, base), 4)
            claim(f"perplexity on {text}, times dense", f"<= {limit}", ratio, ratio <= limit, row["command_seconds"])
    return result


def write(found: dict[str, Any], base: dict[str, float], speeds: dict[str, Any], common: dict[str, Any]) -> str:
    """All claims, and a table of all rows."""
    bars = []
    for name, speed in speeds.items():
        measured = round(speed["megabytes_per_second"])
        held = measured >= MEGABYTES_PER_SECOND
        bars.append(
            bar(name + DECODING, f">= {MEGABYTES_PER_SECOND}", measured, held, speed, speed["command_seconds"])
            | {"seed": ROWS[name].seed}
        )
    lines = [
        "| recipe | bits per block weight | MB on disk | share of fp32 | " + " | ".join(f"{text}, × dense" for text in base) + " | minutes |",
        "|---" * (5 + len(base)) + "|",
    ]  # fmt: skip
    for name in ROWS:
        if name not in found:
            continue
        row = found[name]
        bars += check(name, row, base)
        totals = row["totals"]
        sizes = [
            f"{totals['body_bits_per_weight']:.3f}",
            f"{row['file_bytes'] / 1e6:.1f}",
            f"{100 * totals['share_of_fp32']:.1f} %",
        ]
        ratios = [f"{steps.ratio(row, text, base):.3f}" for text in row["perplexity"]]
        minutes = "" if not steps.is_of_cpu(row) else f"{sum(row['seconds'].values()) / 60:.1f}"
        lines.append("| " + " | ".join([name, *sizes, *ratios, minutes]) + " |")
    rows = [{"name": name, **found[name]} for name in ROWS if name in found]
    (RESULTS / "02-codebook.json").write_text(json.dumps({"bars": [common | b for b in bars], "rows": rows}, indent=2) + "\n")
    text = f"# Codebook recipes\n\n{machine()}; the commit of each row is in the JSON.\n\n" + "\n".join(lines)
    text += f"\n\n{steps.bar_table(bars)}\n"
    (RESULTS / "02-codebook.md").write_text(text)
    return text


def main() -> int:
    """Measure what is missing and write the tables."""
    parser = steps.parser(__doc__, "runs/rates")
    parser.add_argument("--row", action="append", choices=list(ROWS), help="a row by name; all by default")
    options = steps.parse(parser)
    todo = {"dense": lambda: dense(options)} | {name: lambda name=name: measure(options, name) for name in ROWS}
    found = steps.run(todo, options.work, options.row, options.device, options.rows)
    base = found.pop("dense")["perplexity"]
    print(
        write(
            found,
            base,
            decode_speeds(options.work, found),
            {"machine": machine(), "command": steps.command_line("rates", options)},
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
