"""Cosine of sentence embeddings before and after compression, on the all-MiniLM-L6-v2 encoder.

Embeddings are the mean of the last hidden states over the tokens of a sentence, as the model was trained for.
Calibration and evaluation sentences come from different files.

    python evaluation/sentence_embeddings.py MODEL_FOLDER --calibration wiki.valid.raw --text c4.utf8 --output minilm.json

With `--recipe` those recipes are compared in place of the two fixed-rate ones and their controls, each as it is.
"""

import argparse
import copy
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import hf_compact
from hf_compact.calibration import from_batches, read_texts

#: Ending of a label -> what is changed in the recipe's stage.
CHANGES = {"": {}, ", nearest": {"rounding": "nearest"}}


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


def main() -> int:
    """Compress with a few settings and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the encoder")
    parser.add_argument("--calibration", action="append", required=True, help="text; repeat for several")
    parser.add_argument("--text", action="append", required=True, help="text; repeat for several")
    parser.add_argument("--recipe", action="append", default=[], help="name below configs/recipes; repeat for several")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    dense = AutoModel.from_pretrained(options.model).eval()

    def batches(paths: list[str], count: int) -> list[dict[str, Tensor]]:
        lines = [line for path in paths for line in sentences(path, count // len(paths))]
        return [
            dict(tokenizer(lines[i : i + 32], padding=True, truncation=True, max_length=128, return_tensors="pt"))
            for i in range(0, count, 32)
        ]

    calibration, evaluation = (
        from_batches(batches(options.calibration, 2048)),
        {text: batches([text], 256) for text in options.text},
    )
    reference = {text: embed(dense, inputs) for text, inputs in evaluation.items()}
    rows = []
    fixed = {f"{bits} bit{end}": (f"codebook-{bits}bit", change) for bits in (4, 3) for end, change in CHANGES.items()}
    for label, (name, change) in ({name: (name, {}) for name in options.recipe} or fixed).items():
        started = time.perf_counter()
        model = copy.deepcopy(dense)
        recipe = hf_compact.Recipe.from_yaml(f"configs/recipes/{name}.yaml").to_dict()
        recipe["stages"][0] |= change
        report = hf_compact.compress(model, recipe, calibration=calibration)
        seconds = time.perf_counter() - started
        row = {"label": label, "body_bits_per_weight": report.body_bits_per_weight, "seconds": seconds, "cosines": {}}
        for text, inputs in evaluation.items():
            cosines = torch.nn.functional.cosine_similarity(embed(model, inputs), reference[text])
            row["cosines"][Path(text).name] = {"mean": cosines.mean().item(), "worst": cosines.min().item()}
        rows.append(row)
        print(json.dumps(rows[-1]), flush=True)
    options.output.write_text(json.dumps(rows, indent=2) + "\n")
    names = list(evaluation)
    lines = ["| recipe | bits per block weight | " + " | ".join(f"{Path(name).name}, mean | worst" for name in names) + " |"]
    lines.append("|---" * (2 + 2 * len(names)) + "|")
    for row in rows:
        cells = [f"{value['mean']:.4f} | {value['worst']:.4f}" for value in row["cosines"].values()]
        lines.append(f"| {row['label']} | {row['body_bits_per_weight']:.2f} | {' | '.join(cells)} |")
    options.output.with_suffix(".md").write_text(
        "# Cosine of sentence embeddings to the dense model's\n\n" + "\n".join(lines) + "\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
