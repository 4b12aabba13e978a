r"""Entropy-coded recipes at four rates: compressed, verified and scored on two texts; goes on where it was stopped.

    python -m evaluation.rates --model MODEL.gguf --calibration wiki.valid.raw --calibration wiki.utf8 \
        --calibration technical.utf8 --calibration tiny.utf8 --text wiki.test.raw --text c4.utf8 --work runs/rates

Each recipe runs twice: as it is, and without its distillation, which is the control row. `--recipe` takes some of them
only; what has not run yet is left out of the tables. Results go to `evaluation/results/02-codebook.json` and `.md`.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from evaluation.spine import RESULTS, bar, machine
from hf_compact.checkpoint import TensorSource
from hf_compact.functional.coding import decode

HERE = Path(__file__).parent
#: bits -> most perplexity, times dense, on the two texts.
BARS = {"4.0": (1.025, 1.03), "3.0": (1.10, 1.15), "2.3": (1.40, 1.65), "1.9": (2.2, 3.0)}
MINUTES = 15


def measure(options: argparse.Namespace, bits: str, is_distilled: bool) -> dict[str, Any]:
    """Compress in one process, score in another."""
    name = f"codebook-{bits}bpw" + ("" if is_distilled else "-undistilled")
    recipe = yaml.safe_load(Path(f"configs/recipes/codebook-{bits}bpw.yaml").read_text())
    if not is_distilled:
        recipe["distillation"] = None
    path = options.work / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    folder, scores = options.work / name, options.work / f"{name}.scores.json"
    command = [sys.executable, "-m", "hf_compact"]
    compress = [*command, "compress", options.model, "--recipe", str(path), "--output", str(folder)]
    compress += [argument for text in options.calibration for argument in ("--calibration", text)]
    evaluate = [*command, "evaluate", str(folder), "--json", str(scores)]
    evaluate += [argument for text in options.text for argument in ("--text", text)]
    started = time.perf_counter()
    with (options.work / f"{name}.log").open("w") as log:
        if not folder.exists():
            subprocess.run(compress, check=True, stdout=log, stderr=subprocess.STDOUT)
        seconds = time.perf_counter() - started
        subprocess.run(evaluate, check=True, stdout=log, stderr=subprocess.STDOUT)
    report = json.loads((folder / "compression_report.json").read_text())
    kept = {key: report[key] for key in ("seconds", "totals", "file_bytes", "distillation", "verification", "peak_memory_bytes")}
    perplexities = {Path(row["text"]).name: row["perplexity"] for row in json.loads(scores.read_text())}
    return {"bits": bits, "is_distilled": is_distilled, "command_seconds": seconds, "perplexity": perplexities, **kept}


def decode_speed(folder: Path) -> dict[str, Any]:
    """Megabytes of bfloat16 weights per second that come out of the streams of a folder, on one core."""
    torch.set_num_threads(1)
    source = TensorSource.in_folder(folder)
    table = json.loads((folder / "config.json").read_text())["quantization_config"]["modules"]
    names = [f"{name}.weight" for name, spec in table.items() if spec["layer"] == "entropy_linear" and "tied_to" not in spec]
    streams = [stream.view(torch.uint8) for stream in source.read(names).values()]
    started = time.perf_counter()
    weights = sum(decode(stream).numel() for stream in streams)
    seconds = time.perf_counter() - started
    return {"weights": weights, "command_seconds": seconds, "megabytes_per_second": 2 * weights / seconds / 1e6}


def dense(options: argparse.Namespace) -> dict[str, Any]:
    """Scores of the uncompressed model."""
    scores = options.work / "dense.scores.json"
    command = [sys.executable, "-m", "hf_compact", "evaluate", options.model, "--json", str(scores)]
    command += [argument for text in options.text for argument in ("--text", text)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return {"perplexity": {Path(row["text"]).name: row["perplexity"] for row in json.loads(scores.read_text())}}


def write(rows: list[dict[str, Any]], base: dict[str, float], speed: dict[str, Any], command: str) -> None:
    """Bars of the distilled rows, and a table of all."""
    measured = round(speed["megabytes_per_second"])
    result = [
        bar(
            "decoding: MB of bfloat16 weights per second on one core",
            ">= 100",
            measured,
            measured >= 100,
            speed,
            speed["command_seconds"],
        )
    ]
    lines = [
        "| recipe | bits per block weight | MB on disk | share of fp32 | " + " | ".join(f"{text}, × dense" for text in base) + " | minutes |",
        "|---" * (5 + len(base)) + "|",
    ]  # fmt: skip
    for row in rows:
        totals, minutes = row["totals"], sum(row["seconds"].values()) / 60
        ratios = {text: round(value / base[text], 4) for text, value in row["perplexity"].items()}
        name = f"codebook-{row['bits']}bpw" + ("" if row["is_distilled"] else ", without distillation (control)")
        cells = [
            f"{totals['body_bits_per_weight']:.3f}",
            f"{row['file_bytes'] / 1e6:.1f}",
            f"{100 * totals['share_of_fp32']:.1f} %",
        ]
        lines.append("| " + " | ".join([name, *cells, *(f"{value:.3f}" for value in ratios.values()), f"{minutes:.1f}"]) + " |")
        if not row["is_distilled"]:
            continue
        bits = totals["body_bits_per_weight"]
        result.append(
            bar(
                f"{name}: bits per block weight",
                f"<= {row['bits']} + 0.5 %",
                round(bits, 4),
                bits <= 1.005 * float(row["bits"]),
                row,
                0,
            )
        )
        for (text, value), limit in zip(ratios.items(), BARS[row["bits"]], strict=True):
            result.append(
                bar(
                    f"{name}: perplexity on {text}, times dense",
                    f"<= {limit}",
                    value,
                    value <= limit,
                    row,
                    row["command_seconds"],
                )
            )
        result.append(
            bar(
                f"{name}: minutes to compress",
                f"<= {MINUTES}",
                round(minutes, 1),
                minutes <= MINUTES,
                row,
                row["command_seconds"],
            )
        )
    common = {"seed": 0, "machine": machine(), "command": command}
    (RESULTS / "02-codebook.json").write_text(
        json.dumps({"bars": [row | common for row in result], "rows": rows}, indent=2) + "\n"
    )
    text = "# Entropy-coded recipes\n\n" + f"{machine()}, seed 0; the commit of each row is in the JSON.\n\n" + "\n".join(lines)
    text += "\n\n| claim | target | measured | held |\n|---|---|---|---|\n"
    text += "\n".join(f"| {b['claim']} | {b['target']} | {b['measured']} | {'yes' if b['held'] else '**no**'} |" for b in result)
    (RESULTS / "02-codebook.md").write_text(text + "\n")


def main() -> int:
    """Measure what is missing and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="SmolLM2-135M-Instruct: folder or .gguf file")
    parser.add_argument("--calibration", action="append", required=True, help="calibration text; repeat for several")
    parser.add_argument("--text", action="append", required=True, help="two texts to score")
    parser.add_argument("--recipe", action="append", choices=list(BARS), help="bits; all by default")
    parser.add_argument("--no-control", action="store_true", help="leave the rows without distillation out")
    parser.add_argument("--work", type=Path, default=Path("runs/rates"))
    options = parser.parse_args()
    if len(options.text) != 2:
        parser.error(f"--text must be given twice, got {len(options.text)}")
    options.work.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    names = [Path(path).name for path in (options.model, *options.calibration)]
    command = f"python -m evaluation.rates --model {names[0]} " + " ".join(f"--calibration {name}" for name in names[1:])
    command += " " + " ".join(f"--text {Path(text).name}" for text in options.text)
    kept = options.work / "rows.json"
    found = json.loads(kept.read_text()) if kept.exists() else {}
    keys = [(bits, True) for bits in options.recipe or BARS] + [(bits, False) for bits in options.recipe or BARS]
    for key in ["dense", *keys]:
        name = key if key == "dense" else f"{key[0]}-{key[1]}"
        if name not in found and not (options.no_control and key != "dense" and not key[1]):
            row = dense(options) if key == "dense" else measure(options, *key)
            found[name] = {**row, "commit": commit}
            kept.write_text(json.dumps(found, indent=2) + "\n")
        print(f"done: {name}", flush=True)
    base = found.pop("dense")["perplexity"]
    rows = sorted(found.values(), key=lambda row: (-float(row["bits"]), not row["is_distilled"]))
    speed = decode_speed(options.work / f"codebook-{rows[0]['bits']}bpw") | {"commit": commit}
    write(rows, base, speed, command)
    print((RESULTS / "02-codebook.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
