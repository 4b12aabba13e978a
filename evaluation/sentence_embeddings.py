"""Cosine of sentence embeddings before and after compression, on the all-MiniLM-L6-v2 encoder; goes on where it was stopped.

Embeddings are the mean of the last hidden states over the tokens of a sentence, as the model was trained for.
Calibration and evaluation sentences come from different files.

    python -m evaluation.sentence_embeddings MODEL_FOLDER --calibration wiki.valid.raw --text c4.utf8 --output minilm.json

With `--recipe` those recipes are compared in place of the two fixed-rate ones and their controls, each as it is, and JLCM also
without its learning; one with several widths in a file has a row for each. `--plan` adds the recipe of the planner at so many
bits per block weight.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

import hf_compact
from evaluation import steps as stepwise
from hf_compact import api
from hf_compact.calibration import Calibration, from_batches, read_texts
from hf_compact.methods.nested.config import WIDTHS

#: Ending of a label -> what is changed in the recipe's stage.
CHANGES = {"": {}, ", nearest": {"rounding": "nearest"}}
#: Recipe -> its controls: ending of their labels -> what is changed.
CONTROLS = {"jlcm-3bit": {", codes not learned": {"learning": "none"}}}
#: What has to be at least as good as what, with no more bits, on every text: the order that a language model has.
ORDER = [
    ("codebook-4.0bpw", "codebook-4bit"), ("codebook-3.0bpw", "jlcm-3bit"), ("jlcm-3bit", "codebook-3bit"),
    ("jlcm-3bit", "jlcm-3bit, codes not learned"),
    ("codebook-4.0bpw", "codebook-3.0bpw"), ("codebook-3.0bpw", "codebook-2.3bpw"), ("codebook-2.3bpw", "codebook-1.9bpw"),
]  # fmt: skip
#: How far below its target the planner may stay.
NEAR = 0.005

Embed = Callable[[PreTrainedModel], dict[str, dict[str, float]]]


def sentences(path: str, count: int, words: int = 24) -> list[str]:
    """The first `count` pieces of `words` words."""
    tokens = read_texts([path]).split()
    return [" ".join(tokens[i * words : (i + 1) * words]) for i in range(count)]


@torch.no_grad()
def embed(model: torch.nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """`[sentences, hidden]` means over the tokens that are not padding."""
    parts = []
    for batch in batches:
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        parts.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.cat(parts)


def compressed(dense: PreTrainedModel, recipe: Any, calibration: Calibration, cosines: Embed) -> dict[str, Any]:
    """One recipe; of a model with several widths, every one of them."""
    started, model = time.perf_counter(), copy.deepcopy(dense)
    report = hf_compact.compress(model, recipe, calibration=calibration)
    row = {"body_bits_per_weight": report.body_bits_per_weight, "seconds": time.perf_counter() - started}
    if report.recipe["stages"][0]["method"] != "nested":
        return {**row, "cosines": cosines(model)}
    views = {}
    for bits in WIDTHS:
        hf_compact.set_bits(model, bits)
        views[f"{bits}"] = cosines(model)
    return {**row, "cosines": views[f"{WIDTHS[0]}"], "views": views}


def planned(options: argparse.Namespace, dense: PreTrainedModel, bits: float, calibration: Calibration, cosines: Embed) -> dict[str, Any]:  # fmt: skip
    """The planner's recipe, its forecast, and what it came to."""
    started = time.perf_counter()
    found = api.plan_budget(options.model, target_bpw=bits, calibration=calibration, validate=True)
    seconds = time.perf_counter() - started
    points = [{"forecast": forecast.error, "measured": real.error, "bytes": real.file_bytes} for forecast, real in found.measured]
    row = compressed(dense, found.recipe, calibration, cosines)
    return {**row, "target": bits, "planning_seconds": seconds, "points": points}


def bars(rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The order of the methods, and where the planner lands."""
    result = []
    for better, worse in ORDER:
        for text in rows[better]["cosines"] if {better, worse} <= rows.keys() else ():
            one, other = (rows[name]["cosines"][text]["mean"] for name in (better, worse))
            claim = f"{better}: mean cosine on {text}, above that of {worse}"
            result.append(
                stepwise.bar(claim, f"> {other:.4f}", round(one, 4), one > other, rows[better], rows[better]["seconds"])
            )
    for name, row in rows.items():
        if "target" in row:
            share = row["body_bits_per_weight"] / row["target"]
            is_held = 1 - NEAR <= share <= 1
            result.append(stepwise.bar(f"{name}: bits, share of the target", f"in [{1 - NEAR}, 1]", round(share, 4), is_held, row, row["seconds"]))  # fmt: skip
    return result


def write(rows: dict[str, dict[str, Any]], path: Path, common: dict[str, Any]) -> str:
    """The JSON, and a table of all rows and of the bars."""
    claims = bars(rows)
    kept = [{"label": name, **row} for name, row in rows.items()]
    path.write_text(json.dumps({"bars": [{**common, **claim} for claim in claims], "rows": kept}, indent=2) + "\n")
    texts = next(iter(rows.values()))["cosines"]
    lines = ["| recipe | bits per block weight | " + " | ".join(f"{name}, mean | worst" for name in texts) + " |"]
    lines.append("|---" * (2 + 2 * len(texts)) + "|")
    for name, row in rows.items():
        views = (
            {f"{name}, {bits} bits": found for bits, found in row["views"].items()} if "views" in row else {name: row["cosines"]}
        )
        for label, cosines in views.items():
            cells = [f"{value['mean']:.4f} | {value['worst']:.4f}" for value in cosines.values()]
            lines.append(f"| {label} | {row['body_bits_per_weight']:.2f} | {' | '.join(cells)} |")
    for name, row in rows.items():
        if "points" in row:
            lines += ["", f"{name}: one minus the cosine of the outputs, forecast and measured, along the front:", ""]
            lines += [f"- {p['bytes'] / 1e6:.1f} MB: {p['forecast']:.4f}, {p['measured']:.4f}" for p in row["points"]]
    text = "# Cosine of sentence embeddings to the dense model's\n\n" + "\n".join(lines) + "\n"
    text += f"\n{stepwise.bar_table(claims)}\n" if claims else ""
    path.with_suffix(".md").write_text(text)
    return text


def main(arguments: list[str] | None = None) -> int:
    """Compress with a few settings and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the encoder")
    parser.add_argument("--calibration", action="append", required=True, help="text; repeat for several")
    parser.add_argument("--text", action="append", required=True, help="text; repeat for several")
    parser.add_argument("--recipe", action="append", default=[], help="name below configs/recipes; repeat for several")
    parser.add_argument("--plan", action="append", type=float, default=[], help="bits per block weight; repeat for several")
    parser.add_argument("--output", type=Path, required=True, help="JSON; a table of the same name comes beside it")
    parser.add_argument("--work", type=Path, default=Path("runs/encoder"), help="folder of the rows that are done")
    options = parser.parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    dense = AutoModel.from_pretrained(options.model).eval()

    def batches(paths: list[str], count: int) -> list[dict[str, Tensor]]:
        lines = [line for path in paths for line in sentences(path, count // len(paths))]
        return [
            dict(tokenizer(lines[i : i + 32], padding=True, truncation=True, max_length=128, return_tensors="pt"))
            for i in range(0, count, 32)
        ]

    calibration = from_batches(batches(options.calibration, 2048))
    evaluation = {text: batches([text], 256) for text in options.text}
    reference = {text: embed(dense, inputs) for text, inputs in evaluation.items()}

    def cosines(model: PreTrainedModel) -> dict[str, dict[str, float]]:
        found = {}
        for text, inputs in evaluation.items():
            values = torch.nn.functional.cosine_similarity(embed(model, inputs), reference[text])
            found[Path(text).name] = {"mean": values.mean().item(), "worst": values.min().item()}
        return found

    def named(name: str, change: dict[str, Any]) -> dict[str, Any]:
        recipe = hf_compact.Recipe.from_yaml(f"configs/recipes/{name}.yaml").to_dict()
        recipe["stages"][0] |= change
        return compressed(dense, recipe, calibration, cosines)

    fixed = {f"{bits} bit{end}": (f"codebook-{bits}bit", change) for bits in (4, 3) for end, change in CHANGES.items()}
    wanted = {
        name + ending: (name, change) for name in options.recipe for ending, change in ({"": {}} | CONTROLS.get(name, {})).items()
    } or fixed
    todo: dict[str, Callable[[], dict[str, Any]]] = {
        label: lambda name=name, change=change: named(name, change) for label, (name, change) in wanted.items()
    }
    todo |= {
        f"planned, {bits:g} bits": lambda bits=bits: planned(options, dense, bits, calibration, cosines) for bits in options.plan
    }
    rows = stepwise.run(todo, options.work, list(todo))
    words = [f"--calibration {Path(path).name}" for path in options.calibration]
    words += [f"--text {Path(path).name}" for path in options.text] + [f"--recipe {name}" for name in options.recipe]
    command = " ".join(
        ["python -m evaluation.sentence_embeddings MINILM_FOLDER", *words, *(f"--plan {bits:g}" for bits in options.plan)]
    )
    print(write(rows, options.output, {"seed": 0, "machine": stepwise.machine(), "command": command}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
