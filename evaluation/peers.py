"""Our folders and other libraries on the same model, the same texts, in one run; each row in a fresh process.

Peers quantize the Linears inside the blocks and leave the embedding alone; their bytes are those of the tensors they
really hold. A peer that cannot run here is skipped with its message. Finished rows are kept in the output file, so an
interrupted run goes on.

    python evaluation/peers.py MODEL.gguf --ours runs/codebook-4bit --text wiki.test.raw --text c4.utf8 --output peers.json
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from hf_compact import api
from hf_compact.arch import describe
from hf_compact.calibration import read_texts, tokenize
from hf_compact.scoring import perplexity


def bitsandbytes_nf4(model: nn.Module, names: list[str]) -> int:
    """NF4 in blocks of 64 with float32 scales, the larger and better of its two forms."""
    import bitsandbytes as bnb

    total = 0
    for name in names:
        old = model.get_submodule(name)
        new = bnb.nn.Linear4bit(
            old.in_features,
            old.out_features,
            bias=False,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
            compress_statistics=False,
        )
        new.weight = bnb.nn.Params4bit(old.weight.data.clone(), requires_grad=False, quant_type="nf4", compress_statistics=False)
        new = new.to("cpu")
        new.weight._quantize("cpu") if new.weight.quant_state is None else None
        state = new.weight.quant_state
        # Counted before the first forward pass, which repacks the weight in place on a CPU.
        total += new.weight.nbytes + sum(t.nbytes for t in state.as_dict(packed=True).values() if isinstance(t, Tensor))
        model.set_submodule(name, new)
    return total


def hqq(bits: int, group_size: int) -> Callable[[nn.Module, list[str]], int]:
    """Half-quadratic quantization, data-free."""

    def apply(model: nn.Module, names: list[str]) -> int:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        total = 0
        settings = BaseQuantizeConfig(nbits=bits, group_size=group_size, axis=1)
        for name in names:
            new = HQQLinear(model.get_submodule(name), settings, compute_dtype=torch.bfloat16, device="cpu", del_orig=False)
            total += new.W_q.nbytes + sum(new.meta[key].nbytes for key in ("scale", "zero"))
            model.set_submodule(name, new)
        return total

    return apply


def quanto_qint4(model: nn.Module, names: list[str]) -> int:
    """optimum-quanto's 4-bit weights with its own choice of group size."""
    from optimum.quanto import freeze, qint4, quantize

    quantize(model, weights=qint4, include=names)
    freeze(model)
    total = 0
    for name in names:
        weight = model.get_submodule(name).weight
        inner, _ = weight.__tensor_flatten__()
        for leaf in inner:
            tensor = getattr(weight, leaf)
            parts = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else []
            total += sum(getattr(tensor, part).nbytes for part in parts) if parts else tensor.nbytes
    return total


def round_to_nearest(bits: int) -> Callable[[nn.Module, list[str]], int]:
    """Our own format without calibration: the control that shows what error feedback and refits are worth."""

    def apply(model: nn.Module, names: list[str]) -> int:
        from hf_compact.methods.codebook import CodebookConfig
        from hf_compact.methods.codebook.apply import compress_linear

        config = CodebookConfig(bits=bits, group_size=64, scale_bits=None, rounding="nearest")
        total = 0
        for name in names:
            new = compress_linear(model.get_submodule(name), None, config)
            total += sum(buffer.nbytes for buffer in new.buffers())
            model.set_submodule(name, new.dense_module(torch.bfloat16))
        return total

    return apply


PEERS: dict[str, Callable[[nn.Module, list[str]], int] | None] = {
    "dense bf16": None,
    "nearest, 4 bit g64 (control)": round_to_nearest(4),
    "nearest, 3 bit g64 (control)": round_to_nearest(3),
    "bitsandbytes nf4 g64": bitsandbytes_nf4,
    "HQQ 4 bit g64": hqq(4, 64),
    "HQQ 3 bit g64": hqq(3, 64),
    "optimum-quanto qint4": quanto_qint4,
}


def run_row(label: str, model_name: str, texts: list[str], windows: int, length: int) -> dict:
    """Score one row in this process."""
    transformers.logging.set_verbosity_error()
    started = time.perf_counter()
    model, tokenizer, _ = api.open_for_scoring(model_name)
    row = {"label": label, "model": Path(model_name).name}
    if label in PEERS:
        names = list(describe(model).roles)
        weights = sum(model.get_submodule(name).weight.numel() for name in names)
        num_parameters = api.count_parameters(model)  # before a peer packs them
        body = PEERS[label](model, names) if PEERS[label] else 2 * weights
        row["body_bits_per_weight"] = 8 * body / weights
        row["file_bytes"] = body + 2 * (num_parameters - weights)
    else:
        found = api.inspect_folder(model_name)
        row |= {key: found[key] for key in ("body_bits_per_weight", "file_bytes")}
    row["quantize_seconds"] = time.perf_counter() - started
    row["scores"] = {}
    for text in texts:
        row["scores"][Path(text).name] = perplexity(model, tokenize(tokenizer, read_texts([text])), length, windows)["perplexity"]
    row["seconds"] = time.perf_counter() - started
    return row


def markdown(rows: list[dict], texts: list[str]) -> str:
    """The rows as a table, ratios to the dense one."""
    names = [Path(text).name for text in texts]
    dense = next(row for row in rows if row["label"] == "dense bf16")
    lines = [
        "| row | bits per block weight | MB on disk | " + " | ".join(f"{name} | × dense" for name in names) + " |",
        "|---" * (3 + 2 * len(names)) + "|",
    ]
    for row in rows:
        if "skipped" in row:
            lines.append(f"| {Path(row['label']).name} | skipped: {row['skipped']} |" + " |" * (1 + 2 * len(names)))
            continue
        size = "" if row["file_bytes"] is None else f"{row['file_bytes'] / 1e6:.1f}"
        cells = [f"{row['scores'][name]:.3f} | {row['scores'][name] / dense['scores'][name]:.4f}" for name in names]
        lines.append(f"| {Path(row['label']).name} | {row['body_bits_per_weight']:.3f} | {size} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run every missing row and write the table beside the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the dense model: folder or .gguf file")
    parser.add_argument("--ours", action="append", default=[], help="a compressed folder; repeat for several")
    parser.add_argument("--text", action="append", required=True, help="a text to score; repeat for several")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--window-length", type=int, default=1024)
    parser.add_argument("--output", type=Path, required=True, help="JSON file; its rows are kept when the run is repeated")
    parser.add_argument("--commit", default="", help="revision of the code, kept with every row")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        name = options.model if options.row in PEERS else options.row
        print(json.dumps(run_row(options.row, name, options.text, options.windows, options.window_length)))
        return 0
    rows = json.loads(options.output.read_text()) if options.output.exists() else []
    rows = [row for row in rows if "skipped" not in row]
    done = {row["label"] for row in rows}
    # What is compared first comes first, the controls last: an interrupted run has something to say.
    for label in ["dense bf16", *options.ours, *list(PEERS)[:0:-1]]:
        if label in done:
            continue
        command = [sys.executable, __file__, *sys.argv[1:], "--row", label]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        if process.returncode:
            reason = process.stderr.strip().splitlines()[-1]
            rows.append({"label": label, "skipped": reason, "commit": options.commit})
        else:
            rows.append({**json.loads(process.stdout.splitlines()[-1]), "commit": options.commit})
        print(json.dumps(rows[-1]))
        options.output.write_text(json.dumps(rows, indent=2) + "\n")
    table = markdown(rows, options.text)
    options.output.with_suffix(".md").write_text(table)
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
