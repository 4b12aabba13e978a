r"""Every number of the spine and the first codebook slice, in one run that goes on where it was stopped.

    python -m evaluation.spine --model MODEL.gguf --encoder MINILM_FOLDER --calibration wiki.valid.raw \
        --encoder-calibration technical.utf8 --encoder-calibration wiki.utf8 --text wiki.test.raw --text c4.utf8 --work runs/spine

Steps leave their JSON in the work folder and are skipped when it is there. The bars and their values go to
`evaluation/results/01-spine.json` and `.md`.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from evaluation.peers import markdown, rows
from evaluation.steps import RESULTS, bar, bar_table, commit, machine
from hf_compact.results import Results

HERE = Path(__file__).parent
PEERS = (
    "bitsandbytes nf4 g64", "HQQ 4 bit g64", "HQQ 3 bit g64", "optimum-quanto qint4", "nearest, 3 bit g64 (control)",
    "nearest, 4 bit g64 (control)",
)  # fmt: skip
RECIPES = ("codebook-4bit", "codebook-3bit", "codebook-4bit-small")


def run(command: list[str], log: Path) -> float:
    """Run a command with its output in a log; returns seconds."""
    started = time.perf_counter()
    with log.open("w") as stream:
        subprocess.run(command, check=True, stdout=stream, stderr=subprocess.STDOUT)
    return time.perf_counter() - started


def calibration_forward(model: str, text: str) -> dict[str, Any]:
    """Seconds of one forward pass of the dense model over the calibration batches, blocks only."""
    from hf_compact import api

    dense = api.open_dense(model)
    recipe = api.as_recipe("configs/recipes/codebook-4bit.yaml")
    calibration = api.prepare_calibration([text], dense.load_tokenizer(), recipe)
    with torch.no_grad():
        dense.model.base_model(**calibration.batches[0], use_cache=False)
        started = time.perf_counter()
        for batch in calibration.batches:
            dense.model.base_model(**batch, use_cache=False)
    return {"seconds": time.perf_counter() - started, "num_tokens": calibration.num_tokens}


def steps(options: argparse.Namespace, at: str) -> dict[str, Any]:
    """Run what is missing; returns everything that was measured."""
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)

    def once(name: str, measure: Any) -> Any:
        path = work / f"{name}.json"
        if not path.exists():
            value = measure()
            path.write_text(json.dumps({"commit": at, "value": value}, indent=2) + "\n")
        print(f"done: {name}", flush=True)
        kept = json.loads(path.read_text())
        return {**kept["value"], "commit": kept["commit"]}

    python = sys.executable
    found: dict[str, Any] = {"forward": once("forward", lambda: calibration_forward(options.model, options.calibration))}
    for recipe in RECIPES:
        command = [python, "-m", "hf_compact", "compress", options.model, "--recipe", f"configs/recipes/{recipe}.yaml"]
        command += ["--output", str(work / recipe), "--calibration", options.calibration]

        def compress(command: list[str] = command, recipe: str = recipe) -> Any:
            seconds = run(command, work / f"{recipe}.log")
            report = json.loads((work / recipe / "compression_report.json").read_text())
            return {
                "command_seconds": seconds,
                **{key: report[key] for key in ("seconds", "totals", "file_bytes", "verification")},
            }

        found[recipe] = once(f"compress-{recipe}", compress)
    memory = [options.memory_python, str(HERE / "memory.py"), options.model, "--recipe", "configs/recipes/codebook-4bit.yaml"]
    memory += ["--text", options.calibration, "--output", str(work / "memory-result.json")]
    found["memory"] = once(
        "memory", lambda: run(memory, work / "memory.log") and json.loads((work / "memory-result.json").read_text())
    )
    encoder = [python, "-m", "evaluation.sentence_embeddings", options.encoder]
    encoder += ["--output", str(work / "encoder-result.json"), "--work", str(work / "encoder")]
    for path in (options.calibration, *options.encoder_calibration):
        encoder += ["--calibration", path]
    encoder += [argument for text in options.text for argument in ("--text", text)]
    found["encoder"] = once(
        "encoder",
        lambda: run(encoder, work / "encoder.log") and {"rows": json.loads((work / "encoder-result.json").read_text())["rows"]},
    )
    peers = [python, str(HERE / "peers.py"), options.model, "--output", str(work / "peers.json")]
    peers += [argument for recipe in RECIPES for argument in ("--ours", str(work / recipe))]
    peers += [argument for text in options.text for argument in ("--text", text)]
    peers += ["--commit", at, *(argument for peer in PEERS for argument in ("--peer", peer))]
    run(peers, work / "peers.log")
    found["peers"] = [
        {**row, "label": Path(row["label"]).name} for row in rows(Results.read(work / "peers.json"))
    ]  # where the folders lay is nobody's business
    return found


def bars(found: dict[str, Any], texts: list[str]) -> list[dict[str, Any]]:
    """Claim by claim: target, measured, held."""
    command = __doc__.split("\n\n")[1].replace("\\\n", "").split()
    common = {"seed": 0, "machine": machine(), "command": " ".join(command)}
    names = [Path(text).name for text in texts]
    return [row | common for row in (*quality_bars(found["peers"], names), *cost_bars(found))]


def quality_bars(rows: list[dict[str, Any]], texts: list[str]) -> list[dict[str, Any]]:
    """Perplexity against the limits and against the peers of the run."""
    by_name = {Path(row["label"]).name: row for row in rows}
    dense = by_name["dense bf16"]["scores"]

    def ratios(row: dict[str, Any]) -> list[float]:
        return [round(row["scores"][text] / dense[text], 4) for text in texts]

    result = []
    for recipe, most_bits, limits in (("codebook-4bit", 4.35, (1.09, 1.12)), ("codebook-3bit", 3.3, (1.42, 1.65))):
        ours = by_name[recipe]
        bits = ours["body_bits_per_weight"]
        result.append(
            bar(f"{recipe}: bits per block weight", f"<= {most_bits}", round(bits, 4), bits <= most_bits, ours, ours["seconds"])
        )
        for text, limit, value in zip(texts, limits, ratios(ours), strict=True):
            claim = f"{recipe}: perplexity on {text}, times dense"
            result.append(bar(claim, f"<= {limit}", value, value <= limit, ours, ours["seconds"]))
        peers = [row for row in rows if row["label"].startswith(("bitsandbytes", "HQQ", "optimum"))]
        for peer in (row for row in peers if ("3 bit" in row["label"]) == ("3bit" in recipe)):
            if "skipped" in peer:
                result.append(
                    bar(
                        f"{recipe} against {peer['label']}",
                        "better on both texts",
                        f"skipped: {peer['skipped']}",
                        False,
                        ours,
                        0.0,
                    )
                )
                continue
            pairs = [list(pair) for pair in zip(ratios(ours), ratios(peer), strict=True)]
            is_better = all(mine < other for mine, other in pairs) and bits <= peer["body_bits_per_weight"] + 1e-3
            claim = f"{recipe} ({bits:.3f} bits) against {peer['label']} ({peer['body_bits_per_weight']:.3f} bits)"
            result.append(
                bar(claim, "better on both texts, peer not smaller: [ours, peer]", pairs, is_better, peer, peer["seconds"])
            )
    return result


def cost_bars(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Bytes, seconds, memory, and the second architecture."""
    result = []
    for recipe, limit in (("codebook-4bit", 0.32), ("codebook-4bit-small", 0.275)):
        share = found[recipe]["totals"]["share_of_bf16"]
        claim = f"{recipe}: whole file, share of bf16"
        result.append(bar(claim, f"<= {limit}", round(share, 4), share <= limit, found[recipe], found[recipe]["command_seconds"]))
    forward, spent = found["forward"]["seconds"], found["codebook-4bit"]["seconds"]["compress"]
    limit = 1.5 * forward + 180
    claim = f"codebook-4bit: seconds to compress; one calibration forward pass took {forward:.1f}"
    result.append(
        bar(claim, f"<= 1.5 x forward + 180 = {limit:.0f}", round(spent, 1), spent <= limit, found["codebook-4bit"], spent)
    )
    memory = found["memory"]
    target = f"<= {memory['bound_bytes'] / 1e6:.0f} (embeddings + 2 blocks + activations + 400)"
    measured = round(memory["peak_bytes"] / 1e6)
    result.append(bar("disk door: peak resident MB", target, measured, memory["held"], memory, memory["seconds"]))
    four = next(row for row in found["encoder"]["rows"] if row["label"] == "4 bit")
    for text, values in four["cosines"].items():
        claim = f"MiniLM, 4 bit: mean cosine of sentence embeddings to dense, {text}"
        result.append(bar(claim, ">= 0.99", round(values["mean"], 4), values["mean"] >= 0.99, found["encoder"], four["seconds"]))
    return result


def main() -> int:
    """Measure what is missing and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="SmolLM2-135M-Instruct: folder or .gguf file")
    parser.add_argument("--encoder", required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--calibration", required=True, help="calibration text")
    parser.add_argument("--encoder-calibration", action="append", default=[], help="more calibration text for the encoder")
    parser.add_argument("--text", action="append", required=True, help="two texts to score")
    parser.add_argument(
        "--memory-python", default=sys.executable,
        help="interpreter of an environment without the peers: transformers imports hqq where it finds it",
    )  # fmt: skip
    parser.add_argument("--work", type=Path, default=Path("runs/spine"))
    options = parser.parse_args()
    if len(options.text) != 2:
        parser.error(f"--text must be given twice, got {len(options.text)}")
    found = steps(options, commit())
    result = bars(found, options.text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "01-spine.json").write_text(
        json.dumps({"bars": result, "rows": found["peers"], "encoder": found["encoder"]["rows"]}, indent=2) + "\n"
    )
    table = markdown(found["peers"], options.text)
    text = (
        "# Spine and first codebook slice\n\n"
        + f"{machine()}, seed 0; the commit of each row is in the JSON.\n\n"
        + bar_table(result)
    )
    text += "\n\n## All rows of the run\n\n" + table
    (RESULTS / "01-spine.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
