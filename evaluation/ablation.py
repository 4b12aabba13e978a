r"""Output error of codebook settings on some layers: how the recipes' defaults were chosen.

Gram matrices come from the dense model, on the calibration text and on two others; a setting is solved on the first
and its error is the geometric mean over the Linears of a few blocks, on all three.

    python evaluation/ablation.py MODEL --calibration wiki.valid.raw --text wiki.test.raw --text c4.utf8 \
        --output evaluation/results/01-ablation.json
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from hf_compact import CalibrationConfig, CodebookConfig, api
from hf_compact.arch import describe
from hf_compact.calibration import Calibration, read_texts, sample
from hf_compact.functional.gram import add_gram_, output_energy
from hf_compact.methods.codebook.apply import compress_linear

BLOCKS = (4, 24)
SETTINGS = {
    "4 bit, groups of 64, feedback only, damp 0.01": {"bits": 4, "refit_rounds": 0, "damp": 0.01},
    "4 bit, groups of 64, damp 0.01": {"bits": 4, "damp": 0.01},
    "4 bit, groups of 64, damp 0.05": {"bits": 4, "damp": 0.05},
    "4 bit, learned levels, groups of 64, damp 0.05": {"bits": 4, "grid": "learned", "damp": 0.05},
    "4 bit, power levels, groups of 64, damp 0.05": {"bits": 4, "grid": "power", "damp": 0.05},
    "4 bit, symmetric, groups of 64, damp 0.05": {"bits": 4, "symmetric": True, "damp": 0.05},
    "4 bit, groups of 32, scales of 6 bits, damp 0.05": {"bits": 4, "group_size": 32, "scale_bits": 6, "damp": 0.05},
    "4 bit, groups of 32, scales of 5 bits, damp 0.05 (recipe)": {"bits": 4, "group_size": 32, "scale_bits": 5, "damp": 0.05},
    "3 bit, groups of 64, feedback only, damp 0.01": {"bits": 3, "refit_rounds": 0, "damp": 0.01},
    "3 bit, groups of 64, damp 0.01": {"bits": 3, "damp": 0.01},
    "3 bit, groups of 64, damp 0.05": {"bits": 3, "damp": 0.05},
    "3 bit, learned levels, groups of 64, damp 0.05": {"bits": 3, "grid": "learned", "damp": 0.05},
    "3 bit, power levels, groups of 64, damp 0.05": {"bits": 3, "grid": "power", "damp": 0.05},
    "3 bit, symmetric, groups of 64, damp 0.05": {"bits": 3, "symmetric": True, "damp": 0.05},
    "3 bit, powers of two, groups of 64, damp 0.05": {"bits": 3, "grid": "pot", "damp": 0.05},
    "3 bit, groups of 48, scales of 8 bits, damp 0.05": {"bits": 3, "group_size": 48, "scale_bits": 8, "damp": 0.05},
    "3 bit, groups of 24, symmetric, scales of 5 bits": {
        "bits": 3, "group_size": 24, "symmetric": True, "scale_bits": 5, "damp": 0.05},
    "3 bit, groups of 32, scales of 5 bits, damp 0.05 (recipe)": {"bits": 3, "group_size": 32, "scale_bits": 5, "damp": 0.05},
    "3 bit, the recipe with four rounds of refit": {
        "bits": 3, "group_size": 32, "scale_bits": 5, "damp": 0.05, "refit_rounds": 4},
}  # fmt: skip


@torch.no_grad()
def grams(model: torch.nn.Module, names: list[str], calibration: Calibration) -> dict[str, Tensor]:
    """Gram matrix of every named Linear's inputs in one pass of the dense model."""
    found = {name: torch.zeros(2 * [model.get_submodule(name).in_features], dtype=torch.float64) for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: add_gram_(found[name], args[0]))
        for name in names
    ]
    try:
        for batch in calibration.batches:
            model.base_model(**batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def main() -> int:
    """Solve every setting and print its errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    model, tokenizer, _ = api.open_for_scoring(options.model)
    arch = describe(model)
    names = [name for block in BLOCKS for name in arch.targets(arch.blocks[block])]
    moments = {}
    for number, (path, count) in enumerate([(options.calibration, 64), *((text, 32) for text in options.text)]):
        calibration = sample(tokenizer, read_texts([path]), CalibrationConfig(num_sequences=count), number, [path])
        moments[Path(path).name] = grams(model, names, calibration)
    rows = []
    for label, settings in SETTINGS.items():
        started = time.perf_counter()
        errors: dict[str, list[float]] = {name: [] for name in moments}
        size = weights = 0
        for name in names:
            linear = model.get_submodule(name)
            gram = moments[Path(options.calibration).name][name]
            module = compress_linear(linear, gram, CodebookConfig(**({"group_size": 64, "scale_bits": None} | settings)))
            dense = linear.weight.detach().float()
            size += sum(buffer.nbytes for buffer in module.buffers())
            weights += dense.numel()
            for text, found in moments.items():
                errors[text].append(output_energy(dense - module.to_dense(), found[name]) / output_energy(dense, found[name]))
        means = {text: math.exp(sum(map(math.log, values)) / len(values)) for text, values in errors.items()}
        rows.append(
            {"setting": label, "bits_per_weight": 8 * size / weights, "errors": means, "seconds": time.perf_counter() - started}
        )
        print(json.dumps(rows[-1]), flush=True)
        options.output.write_text(json.dumps(rows, indent=2) + "\n")
    lines = ["| setting | bits | " + " | ".join(moments) + " |", "|---" * (2 + len(moments)) + "|"]
    for row in rows:
        cells = " | ".join(f"{value:.5f}" for value in row["errors"].values())
        lines.append(f"| {row['setting']} | {row['bits_per_weight']:.2f} | {cells} |")
    options.output.with_suffix(".md").write_text("# Relative output error by setting\n\n" + "\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
