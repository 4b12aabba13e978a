r"""Our folders and other libraries on the same model, the same texts and tasks, in one run; each row in a fresh process.

    python evaluation/peers.py MODEL.gguf --ours runs/codebook-4bit --text wiki.test.raw --text c4.utf8 --output peers.json

Quantizers take the Linears inside the blocks and leave the embedding alone; their bytes are those of the tensors they
really hold, except where the table of `PEERS` says otherwise. Pruners cut the channels of the MLPs. A peer that cannot run
here is skipped with its message. `--match` puts a row of ours beside each of theirs that takes as many bytes: an
entropy-coded model at its bits, or one pruned to its share. Rows are kept in the output file, which is a `results.json`, so an
interrupted run goes on; the table lies beside it as `.md`.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hf_compact import Protocol, SpeedConfig, Windows, api, measure
from hf_compact.arch import describe
from hf_compact.benchmark import Loaded
from hf_compact.calibration import Calibration
from hf_compact.checkpoint import REPORT_NAME
from hf_compact.results import ModelResult, Results

#: Calibrates a peer that needs it: ours by default, so that both see the same tokens.
CALIBRATION = {"num_sequences": 64, "sequence_length": 512, "batch_size": 4}
DENSE = "dense bf16"


@dataclass(frozen=True)
class Peer:
    """Another library, with one setting."""

    apply: Callable[[nn.Module, list[str], Calibration], int]
    """Changes the named Linears of a model in place and returns the bytes of what it holds of them."""
    match: dict[str, Any] | None = None
    """Stage of ours that takes as many bytes; None where the bits of the peer say it."""


def leaves(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor subclass holds."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from leaves(getattr(tensor, name))


def bitsandbytes_4bit(kind: str) -> Callable[[nn.Module, list[str], Calibration], int]:
    """NF4 or FP4 in blocks of 64 with float32 scales, the larger and better of its two forms."""

    def apply(model: nn.Module, names: list[str], _: Calibration) -> int:
        import bitsandbytes as bnb

        total = 0
        for name in names:
            old = model.get_submodule(name)
            sizes = old.in_features, old.out_features
            new = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.bfloat16, quant_type=kind, compress_statistics=False)
            new.weight = bnb.nn.Params4bit(
                old.weight.data.clone(), requires_grad=False, quant_type=kind, compress_statistics=False
            )
            new.bias = old.bias
            new = new.to("cpu")
            new.weight._quantize("cpu") if new.weight.quant_state is None else None
            state = new.weight.quant_state
            # Counted before the first forward pass, which repacks the weight in place on a CPU.
            total += new.weight.nbytes + sum(t.nbytes for t in state.as_dict(packed=True).values() if isinstance(t, Tensor))
            model.set_submodule(name, new)
        return total

    return apply


def bitsandbytes_int8(model: nn.Module, names: list[str], _: Calibration) -> int:
    """LLM.int8(): a scale per row, outlying inputs in 16 bits."""
    import bitsandbytes as bnb

    total = 0
    for name in names:
        old = model.get_submodule(name)
        new = bnb.nn.Linear8bitLt(old.in_features, old.out_features, bias=False, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(old.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
        new.bias = old.bias
        new = new.to("cpu")
        total += new.weight.data.nbytes + new.weight.SCB.nbytes
        model.set_submodule(name, new)
    return total


def hqq(bits: int, group_size: int) -> Callable[[nn.Module, list[str], Calibration], int]:
    """Half-quadratic quantization, data-free."""

    def apply(model: nn.Module, names: list[str], _: Calibration) -> int:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        total = 0
        settings = BaseQuantizeConfig(nbits=bits, group_size=group_size, axis=1)
        for name in names:
            new = HQQLinear(model.get_submodule(name), settings, compute_dtype=torch.bfloat16, device="cpu", del_orig=False)
            total += new.W_q.nbytes + sum(new.meta[key].nbytes for key in ("scale", "zero"))
            model.set_submodule(name, new)
        return total

    return apply


def quanto(kind: str) -> Callable[[nn.Module, list[str], Calibration], int]:
    """optimum-quanto's weights with its own choice of group size."""

    def apply(model: nn.Module, names: list[str], _: Calibration) -> int:
        from optimum import quanto

        quanto.quantize(model, weights=getattr(quanto, kind), include=names)
        quanto.freeze(model)
        return sum(leaf.nbytes for name in names for leaf in leaves(model.get_submodule(name).weight))

    return apply


def torchao_int8(model: nn.Module, names: list[str], _: Calibration) -> int:
    """Torchao's 8-bit weights, a scale per row."""
    from torchao.quantization import Int8WeightOnlyConfig

    return _torchao(model, names, Int8WeightOnlyConfig(), None)


def torchao_intx(bits: int, group_size: int) -> Callable[[nn.Module, list[str], Calibration], int]:
    """Torchao's grouped integers. On a CPU it holds a code per byte; it is counted as packed, with its scales and offsets."""

    def apply(model: nn.Module, names: list[str], _: Calibration) -> int:
        from torchao.quantization import IntxWeightOnlyConfig, PerGroup

        config = IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(group_size))
        return _torchao(model, names, config, bits)

    return apply


def _torchao(model: nn.Module, names: list[str], config: Any, bits: int | None) -> int:
    from torchao.quantization import quantize_

    chosen = set(names)
    quantize_(model, config, lambda module, name: name in chosen)
    total = 0
    for name in names:
        weight = model.get_submodule(name).weight
        codes, *rest = leaves(weight)
        total += (codes.nbytes if bits is None else codes.numel() * bits // 8) + sum(leaf.nbytes for leaf in rest)
    return total


def gptq(bits: int, group_size: int) -> Callable[[nn.Module, list[str], Calibration], int]:
    """llm-compressor's GPTQ, symmetric; it leaves rounded weights, which are counted as packed, with bfloat16 scales."""

    def apply(model: nn.Module, names: list[str], calibration: Calibration) -> int:
        from llmcompressor import oneshot
        from llmcompressor.modifiers.gptq import GPTQModifier

        weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": group_size}
        groups = {"group_0": {"targets": names, "weights": weights}}
        rows = torch.cat([batch["input_ids"] for batch in calibration.batches])
        data = DataLoader([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows])
        oneshot(model=model, dataset=data, recipe=GPTQModifier(config_groups=groups), num_calibration_samples=len(rows))
        sizes = [model.get_submodule(name).weight.numel() for name in names]
        return sum(size * bits // 8 + 2 * size // group_size for size in sizes)

    return apply


def torch_pruning(share: float) -> Callable[[nn.Module, list[str], Calibration], int]:
    """Torch-Pruning: the MLP channels of least norm in every block, without a refit."""

    def apply(model: nn.Module, names: list[str], calibration: Calibration) -> int:
        import torch_pruning as tp

        arch = describe(model)
        first = [name for name in names if arch.roles[name] == ("gate" if "gate" in arch.roles.values() else "up")]
        inside = {name for name in names if arch.roles[name] in ("gate", "up", "down")}
        with torch.enable_grad():  # it finds out by autograd what hangs together
            pruner = tp.pruner.BasePruner(
                model, {"input_ids": calibration.batches[0]["input_ids"][:1, :32]}, importance=tp.importance.GroupMagnitudeImportance(p=2),
                pruning_ratio=0.0, pruning_ratio_dict={model.get_submodule(name): share for name in first}, round_to=8,
                ignored_layers=[module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in inside],
                output_transform=lambda output: output.logits,
            )  # fmt: skip
            pruner.step()
        return sum(2 * model.get_submodule(name).weight.numel() for name in names)

    return apply


def round_to_nearest(bits: int) -> Callable[[nn.Module, list[str], Calibration], int]:
    """Our own format without calibration: the control that shows what error feedback and refits are worth."""

    def apply(model: nn.Module, names: list[str], _: Calibration) -> int:
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


PEERS: dict[str, Peer] = {
    "bitsandbytes nf4 g64": Peer(bitsandbytes_4bit("nf4")),
    "HQQ 4 bit g64": Peer(hqq(4, 64)),
    "HQQ 3 bit g64": Peer(hqq(3, 64)),
    "optimum-quanto qint4": Peer(quanto("qint4")),
    "GPTQ 4 bit g128 (llm-compressor)": Peer(gptq(4, 128)),
    "GPTQ 3 bit g128 (llm-compressor)": Peer(gptq(3, 128)),
    "torchao int4 g32": Peer(torchao_intx(4, 32)),
    "torchao int3 g32": Peer(torchao_intx(3, 32)),
    "Torch-Pruning, 20 % of channels": Peer(torch_pruning(0.2), {"method": "pruning", "channel_sparsity": 0.2}),
    "Torch-Pruning, 50 % of channels": Peer(torch_pruning(0.5), {"method": "pruning", "channel_sparsity": 0.5}),
    "HQQ 2 bit g16": Peer(hqq(2, 16)),
    "optimum-quanto qint2": Peer(quanto("qint2")),
    "bitsandbytes fp4 g64": Peer(bitsandbytes_4bit("fp4")),
    "bitsandbytes int8": Peer(bitsandbytes_int8),
    "torchao int8": Peer(torchao_int8),
    "nearest, 3 bit g64 (control)": Peer(round_to_nearest(3), {}),
    "nearest, 4 bit g64 (control)": Peer(round_to_nearest(4), {}),
}


def dense(name: str) -> Loaded:
    """The model that all rows begin with, in bfloat16."""
    model, tokenizer, _ = api.open_for_scoring(name, dtype="bfloat16")
    count = api.count_parameters(model)
    return Loaded(
        name=DENSE, model=model, tokenizer=tokenizer, file_bytes=2 * count, num_parameters=count, body_bits_per_weight=16.0
    )


def changed(label: str, name: str, texts: Sequence[str]) -> Loaded:
    """The model as a peer leaves it."""
    found = dense(name)
    model = found.model
    names = list(describe(model).roles)
    weights = sum(model.get_submodule(module).weight.numel() for module in names)
    recipe = api.as_recipe({"stages": [{"method": "codebook"}], "calibration": CALIBRATION})
    calibration = api.prepare_calibration(texts, found.tokenizer, recipe)
    started = time.perf_counter()
    with torch.no_grad():
        body = PEERS[label].apply(model, names, calibration)
    seconds = time.perf_counter() - started
    found.name, found.file_bytes = label, body + 2 * (found.num_parameters - weights)
    found.body_bits_per_weight = 8 * body / weights
    found.compression = {"methods": [label], "seconds": seconds, "peak_memory_bytes": None, "is_verified": None}
    return found


def run_row(label: str, options: argparse.Namespace) -> Results:
    """Score one row in this process, and put it into the output."""
    transformers.logging.set_verbosity_error()
    base = dense(options.model)
    timing = SpeedConfig(prompt_tokens=options.prompt_tokens, repeats=options.repeats) if options.speed else None
    protocol = Protocol(
        windows=Windows(num_windows=options.windows, window_length=options.window_length), tasks=tuple(options.task),
        limit=options.limit, speed=timing, dtype="bfloat16",
    )  # fmt: skip
    models = [] if label == DENSE else [changed(label, options.model, options.calibration) if label in PEERS else label]
    return measure(
        [base, *models], options.text, protocol, compare_with=base, task_data=options.task_data, output=options.output,
        provenance={"commit": options.commit},
    )  # fmt: skip


def matching(label: str, found: ModelResult, options: argparse.Namespace) -> Path | None:
    """A folder of ours that takes the bytes of a peer; None where there is none to make."""
    stage = PEERS[label].match
    if stage is None:
        bits = found.body_bits_per_weight / 1.005  # the rate is met within half a per cent
        if bits > 7:
            return None
        stage = {"method": "entropy", "bits": round(bits, 3), "embedding_bits": None}
    if not stage:
        return None
    folder = options.output.with_suffix("") / ("ours-" + "-".join(str(value) for value in stage.values() if value is not None))
    if not (folder / REPORT_NAME).exists():  # it goes on where it was stopped
        folder.parent.mkdir(exist_ok=True)
        recipe = folder.with_suffix(".yaml")
        recipe.write_text(yaml.safe_dump({"stages": [stage], "calibration": CALIBRATION, "dtype": "bfloat16"}))
        command = [
            sys.executable,
            "-m",
            "hf_compact",
            "compress",
            options.model,
            "--recipe",
            str(recipe),
            "--output",
            str(folder),
        ]
        subprocess.run([*command, *(word for text in options.calibration for word in ("--calibration", text))], check=True)
    return folder


def rows(results: Results) -> list[dict[str, Any]]:
    """The models of a run as flat rows, skipped ones last."""
    found = [
        {
            "label": model.name,
            "body_bits_per_weight": model.body_bits_per_weight,
            "file_bytes": model.file_bytes,
            "scores": {text: score["perplexity"] for text, score in model.perplexity.items()},
            "seconds": sum(score["seconds"] for score in model.perplexity.values())
            + (model.compression or {"seconds": 0})["seconds"],
            "commit": model.provenance.get("commit", ""),
        }
        for model in results.models
    ]
    return found + [{"label": label, "skipped": reason} for label, reason in results.skipped.items()]


def markdown(rows: list[dict], texts: list[str]) -> str:
    """Flat rows as a table, ratios to the dense one."""
    names = [Path(text).name for text in texts]
    dense = next(row for row in rows if row["label"] == DENSE)
    lines = [
        "| row | bits per block weight | MB on disk | " + " | ".join(f"{name} | × dense" for name in names) + " |",
        "|---" * (3 + 2 * len(names)) + "|",
    ]
    for row in rows:
        if "skipped" in row:
            lines.append(f"| {Path(row['label']).name} | skipped: {row['skipped']} |" + " |" * (1 + 2 * len(names)))
            continue
        size = "" if row["file_bytes"] is None else f"{row['file_bytes'] / 1e6:.1f}"
        cells = [
            "not finite |"
            if row["scores"][name] is None
            else f"{row['scores'][name]:.3f} | {row['scores'][name] / dense['scores'][name]:.4f}"
            for name in names
        ]
        bits = "" if row["body_bits_per_weight"] is None else f"{row['body_bits_per_weight']:.3f}"
        lines.append(f"| {Path(row['label']).name} | {bits} | {size} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run every missing row and write the table beside the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the dense model: folder or .gguf file")
    parser.add_argument("--ours", action="append", default=[], help="a compressed folder; repeat for several")
    parser.add_argument("--peer", action="append", choices=list(PEERS), help="peers to run; repeat for several, all by default")
    parser.add_argument("--match", action="store_true", help="compress a model of ours to the bytes of each peer")
    parser.add_argument("--calibration", action="append", default=[], help="text for peers that need it and for --match")
    parser.add_argument("--text", action="append", required=True, help="a text to score; repeat for several")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--window-length", type=int, default=1024)
    parser.add_argument("--task", action="append", default=[], help="a task of lm-evaluation-harness; repeat for several")
    parser.add_argument("--task-data", type=Path, help="folder of their rows")
    parser.add_argument("--limit", type=int, help="rows of each task")
    parser.add_argument("--speed", action="store_true", help="time prefill and decoding, by turns with the dense model")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True, help="results.json; its rows are kept when the run is repeated")
    parser.add_argument("--commit", default="", help="revision of the code, kept with every row")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        run_row(options.row, options)
        return 0

    def run(label: str) -> None:
        found = Results.read(options.output) if options.output.exists() else None
        if found is not None and found.named(Path(label).name if label not in PEERS else label) is not None:
            return
        command = [sys.executable, __file__, *sys.argv[1:], "--row", label]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        if not options.output.exists():
            sys.exit(f"the dense model cannot be scored: {_reason(process.stderr)}")
        found = Results.read(options.output)
        found.skipped.pop(label, None)
        if process.returncode:
            found.skipped[label] = _reason(process.stderr)
        found.write(options.output)
        print(f"{label}: {found.skipped.get(label, 'done')}", flush=True)

    # What is compared first comes first, the controls last: an interrupted run has something to say.
    for label in [DENSE, *options.ours, *(options.peer or PEERS)]:
        run(label)
    for label in (options.peer or PEERS) if options.match else ():
        theirs = Results.read(options.output).named(label)
        folder = None if theirs is None else matching(label, theirs, options)
        if folder is not None:
            run(str(folder))
    table = markdown(rows(Results.read(options.output)), options.text)
    options.output.with_suffix(".md").write_text(table)
    print(table)
    return 0


def _reason(stderr: str) -> str:
    return (stderr.strip().splitlines() or ["it ended without a word"])[-1]


if __name__ == "__main__":
    sys.exit(main())
