r"""Tensor networks: quality without training, healing, composition at equal bytes, speed; goes on where it was stopped.

    python -m evaluation.tensor_network --model MODEL.gguf --calibration wiki.valid.raw --calibration wiki.utf8 \
        --calibration technical.utf8 --calibration tiny.utf8 --text wiki.test.raw --text c4.utf8 --work runs/tensor

`--step` takes some of the steps only; what has not run yet is left out of the tables. Healing trains on windows of the
calibration texts, or of what the dense model writes (`--own-text`): the factors of the decomposed model, or all of its weights,
and, as the control, all weights of the dense one, on the same tokens in the same order; where that makes it worse, the control is
the dense model as it is. Rows of another number of tokens or of
own text say it in their names, as do those that train on fewer tokens several times over. Each is trained at several learning rates, and the best one on windows that no row trains on, of
the same texts, counts; the teacher of distilled rows is the dense model so trained, or, on own text, as it is but for its end of a
text. Rows with `-own` behind the percentage begin with a model that was calibrated on own text as well, those with `-norms` go on
from the row without it, the norms alone being trained on further windows.
Several processes may be at it at once.
Results go to `evaluation/results/03-tensor-network.json` and `.md`.
"""

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from evaluation import steps as stepwise
from evaluation.steps import RESULTS, bar, machine
from hf_compact import DistillationCallback, TensorNetworkCallback, api, verify
from hf_compact.methods.tensor_network import TensorTrainLinear
from hf_compact.scoring import perplexity

#: recipe -> most perplexity, times dense, on the two texts without training; None is reported only.
UNTRAINED = {"20": (2.4, 3.5), "40": (6.0, 12.0), "40-fast": (6.0, 12.0), "60": None}
#: Ending of a row of -40-fast that is calibrated on four times the text -> what else is changed.
FAST = {"256": {}, "256-regression": {"solver": "regression"}}
#: Recipes that are timed against dense.
TIMED = ("40", "40-fast")
#: recipe -> most perplexity after healing, times the dense model trained on the same tokens.
HEALED = {"20": 1.15, "40": 1.4}
TOKENS, LENGTH, BATCH = 500_000, 512, 2
#: Logit of what own text was not allowed to be; finite, as a divergence takes it times a probability of zero.
NEVER = -1e4
#: Of all weights of the dense model, and of healing.
DENSE_RATES, RATES = (3e-5, 1e-4, 3e-4), (3e-5, 1e-4, 3e-4, 1e-3)
#: How the names of rows end, before their rate, that go on with the norms alone, at a rate of their own, on so many more windows;
#: with `--own-text` only.
NORMS, NORM_RATE, NORM_WINDOWS = "-norms", 1e-3, 32
#: What is trained of a decomposed model, and by what: whether the rest beside the factors, whether the dense model teaches.
HEALING = {
    "": (False, False), "-all": (True, False), "-distilled": (False, True), "-all-distilled": (True, True), "-own-distilled": (False, True),
}  # fmt: skip
#: How the names of what was calibrated on text of the dense model too begin, behind the percentage; with `--own-text` only. On four
#: times the tokens of the recipe.
OWN = "-own"
OWN_CALIBRATION = {"num_sequences": 256, "batch_size": 16}
MINUTES = 5
PREFILL, PREFILL_RATIO = 512, 1.15
ENTROPY = {"method": "entropy", "sensitivity": "fisher", "embedding_bits": 6.0}
#: The control has the bits per block weight that the corrected model takes.
CORRECTION = {"method": "correction", "rank": 16}
CORRECTED_BITS = 1.7


def command(*arguments: str, log: Path) -> None:
    """Run `hf-compact` with its output in a log."""
    with log.open("w") as stream:
        subprocess.run([sys.executable, "-m", "hf_compact", *arguments], check=True, stdout=stream, stderr=subprocess.STDOUT)


def scored(model: str, options: argparse.Namespace, name: str) -> dict[str, float]:
    """Perplexity by text."""
    path = options.work / f"{name}.scores.json"
    texts = [argument for text in options.text for argument in ("--text", text)]
    command("evaluate", model, "--json", str(path), "--device", options.device, *texts, log=options.work / f"{name}.evaluate.log")
    return {Path(row["text"]).name: row["perplexity"] for row in json.loads(path.read_text())}


def compressed(
    options: argparse.Namespace, name: str, recipe: dict[str, Any], calibration: list[str] | None = None
) -> dict[str, Any]:  # fmt: skip
    """Compress with a recipe, score, and keep what the report says."""
    path, folder = options.work / f"{name}.yaml", options.work / name
    path.write_text(yaml.safe_dump(recipe))
    if not folder.exists():
        texts = [argument for text in calibration or options.calibration for argument in ("--calibration", text)]
        arguments = (
            "compress",
            options.model,
            "--recipe",
            str(path),
            "--output",
            str(folder),
            "--device",
            options.device,
            *texts,
        )
        command(*arguments, log=options.work / f"{name}.log")
    report = json.loads((folder / "compression_report.json").read_text())
    num_kept = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if ".layers." in name]  # noqa: SIM118 (not a dict)
            num_kept += sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    body = [layer for layer in report["layers"] if layer["role"] not in ("embedding", "head")]
    kept = {key: report[key] for key in ("totals", "file_bytes", "seconds", "distillation", "verification")}
    return {
        "command_seconds": sum(report["seconds"].values()),
        "perplexity": scored(str(folder), options, name),
        "solver_seconds": sum(layer["seconds"] for layer in body),
        "kept_share": num_kept / (num_kept + sum(layer["num_weights"] - layer["compressed_bytes"] / 2 for layer in body)),
        **kept,
    }


def recipe(name: str) -> dict[str, Any]:
    """A recipe of the project as a dict."""
    return yaml.safe_load(Path(f"configs/recipes/{name}.yaml").read_text())


def healed(options: argparse.Namespace, percent: str | None, kind: str, rate: float) -> dict[str, Any]:
    """Train a decomposed model, or the dense one as it is, on the same tokens; then score."""
    callbacks: list[TrainerCallback] = []
    name = healed_name(percent, kind, rate, variant(options))
    opened = api.open_dense(options.model, "float32", is_whole=True)
    model, tokenizer = opened.model, opened.load_tokenizer()
    if percent is not None:
        trains_rest, is_distilled = HEALING[kind]
        if is_distilled:
            if options.own_text:
                teacher = own_teacher(options)
            else:
                teacher = verify.load_model(options.work / best(options, None, ""), dtype=torch.float32)
            callbacks.append(DistillationCallback(teacher))
        callbacks.append(TensorNetworkCallback(schedule="heal", trains_rest=trains_rest))
        start = f"tensor-network-{percent}{OWN if kind.startswith(OWN) else ''}"
        stepwise.done(steps(options), options.work, start, options.device)
        model = verify.load_model(options.work / start, dtype=torch.float32)
    texts = [*own_texts(options)] if options.own_text else options.calibration
    data = stepwise.TrainingWindows(texts, tokenizer, LENGTH, num_windows(options))
    row = trained(options, name, model, tokenizer, data, callbacks, rate)
    return row | {"num_tokens": len(data) * LENGTH * options.epochs}


def polished(options: argparse.Namespace, percent: str | None, kind: str, rate: float) -> dict[str, Any]:
    """Go on from a healed model, or from its control, with the norms alone, on windows that neither has trained on."""
    before = healed_name(percent, kind, rate, variant(options))
    earlier = stepwise.done(steps(options), options.work, before, options.device)
    model = verify.load_model(options.work / before, dtype=torch.float32)
    tokenizer = api.open_dense(options.model).load_tokenizer()
    for key, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in key)
    data = stepwise.TrainingWindows([*own_texts(options)], tokenizer, LENGTH, num_windows(options))
    data.rows = data.spare[:NORM_WINDOWS]
    callbacks: list[TrainerCallback] = [] if percent is None else [DistillationCallback(own_teacher(options))]
    name = healed_name(percent, kind + NORMS, rate, variant(options))
    row = trained(options, name, model, tokenizer, data, callbacks, NORM_RATE)
    return row | {"num_tokens": earlier["num_tokens"] + len(data) * LENGTH * options.epochs}


def trained(
    options: argparse.Namespace, name: str, model: PreTrainedModel, tokenizer: Any, data: stepwise.TrainingWindows,
    callbacks: list[TrainerCallback], rate: float,
) -> dict[str, Any]:  # fmt: skip
    """Train what has gradients, save, score."""
    started, folder = time.perf_counter(), options.work / name
    num_updates = options.epochs * len(data) // BATCH
    arguments = TrainingArguments(
        str(options.work / f"{name}-trainer"), per_device_train_batch_size=BATCH, num_train_epochs=options.epochs,
        bf16=options.dtype == "auto", use_cpu=options.device == "cpu", learning_rate=rate, lr_scheduler_type="cosine",
        warmup_steps=num_updates // 30, weight_decay=0.0,
        save_steps=20, save_total_limit=1, report_to=[], disable_tqdm=True, logging_steps=20, seed=0,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=callbacks)
    saved = list(Path(arguments.output_dir).glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=bool(saved))
    model.save_pretrained(folder)  # in float32; scoring takes bfloat16
    tokenizer.save_pretrained(folder)
    row = {
        "learning_rate": rate,
        "batch_tokens": BATCH * LENGTH,
        "command_seconds": time.perf_counter() - started,
    }
    held_out = None if data.held_out is None else perplexity(model.eval(), data.held_out, LENGTH, None)["perplexity"]
    return row | {"held_out": held_out, "perplexity": scored(str(folder), options, name)}


def own_teacher(options: argparse.Namespace) -> PreTrainedModel:
    """The dense model as it wrote own text."""
    teacher = api.open_dense(options.model, "float32", is_whole=True).model
    teacher.register_forward_hook(never_ending)
    return teacher


def never_ending(model: PreTrainedModel, args: Any, output: Any) -> None:
    """A hook: the model's distribution without its end of a text, which is the one that own text was drawn from."""
    output.logits[..., model.config.eos_token_id] = NEVER


def own_texts(options: argparse.Namespace) -> Iterator[Path]:
    """The files that the dense model has written, or writes when they are asked for."""
    return stepwise.own_training_texts(options, num_windows(options), LENGTH)


def num_windows(options: argparse.Namespace) -> int:
    """How many windows are trained on; every epoch sees all."""
    return options.tokens // LENGTH // options.epochs


def variant(options: argparse.Namespace) -> str:
    """The end of the names of rows that are trained on another number of tokens, several times over, or on other text."""
    tokens = "" if options.tokens == TOKENS else f"-{options.tokens}"
    epochs = "" if options.epochs == 1 else f"-{options.epochs}-epochs"
    return tokens + epochs + "-own-text" * options.own_text


def healed_name(percent: str | None, kind: str, rate: float, ending: str) -> str:
    """Of the row and its folder."""
    return f"healed-{percent or 'dense'}{kind}-{rate:g}{ending}"


def rows_of(percent: str | None, kind: str, ending: str) -> list[str]:
    """The same at all rates."""
    return [healed_name(percent, kind, rate, ending) for rate in (DENSE_RATES if percent is None else RATES)]


def best(options: argparse.Namespace, percent: str | None, kind: str) -> str:
    """The row at the rate that is best on held-out windows; measures what is missing."""
    todo = steps(options)
    rows = {row: stepwise.done(todo, options.work, row, options.device) for row in rows_of(percent, kind, variant(options))}
    return stepwise.best_held_out(rows)


def chosen(found: dict[str, Any], percent: str | None, kind: str, ending: str) -> dict[str, Any] | None:
    """The best row that there is."""
    return found.get(stepwise.best_held_out({row: found[row] for row in rows_of(percent, kind, ending) if row in found}))


@torch.no_grad()
def speed(options: argparse.Namespace, recipe: str) -> dict[str, Any]:
    """Seconds of prefill and of one decoded token, dense and decomposed by turns in one process; medians of 15."""
    stepwise.done(steps(options), options.work, f"tensor-network-{recipe}", options.device)
    started = time.perf_counter()
    models = {"dense": api.open_for_scoring(options.model, dtype=options.dtype)[0]}
    models[recipe] = api.open_for_scoring(options.work / f"tensor-network-{recipe}", dtype=options.dtype)[0]
    ids = torch.arange(PREFILL)[None] % 1000
    times: dict[str, list[float]] = {f"{kind} {name}": [] for name in models for kind in ("prefill", "decode")}
    for turn in range(16):
        for name, model in models.items():
            at = time.perf_counter()
            cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
            middle = time.perf_counter()
            for _ in range(8):
                model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
            if turn:  # the first turn warms up
                times[f"prefill {name}"].append(middle - at)
                times[f"decode {name}"].append((time.perf_counter() - middle) / 8)
    found = {key: statistics.median(values) for key, values in times.items()}
    layers = [m for m in models[recipe].modules() if isinstance(m, TensorTrainLinear)]
    sums = {
        "multiply_adds": sum(m.num_multiply_adds for m in layers),
        "values": sum(m.num_values for m in layers),
        "dense": sum(m.in_features * m.out_features for m in layers),
    }
    return {
        **found,
        "machine": machine(),
        "device": "cpu",
        "dtype": options.dtype,
        "factored_layers": sums,
        "threads": torch.get_num_threads(),
        "command_seconds": time.perf_counter() - started,
    }


def steps(options: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    """Every step by name, in the order they need each other."""
    found: dict[str, Callable[[], dict[str, Any]]] = {
        "dense": lambda: {"perplexity": scored(options.model, options, "dense"), "command_seconds": 0.0}
    }
    for name in UNTRAINED:
        full = f"tensor-network-{name}"
        found[full] = lambda full=full: compressed(options, full, recipe(full))
    for percent in HEALED if options.own_text else ():
        full = f"tensor-network-{percent}"
        changed = recipe(full)
        changed["calibration"] |= OWN_CALIBRATION
        found[full + OWN] = lambda full=full, changed=changed: compressed(
            options, full + OWN, changed, [*options.calibration, str(next(own_texts(options)))]
        )
    for ending, change in FAST.items():
        changed = recipe("tensor-network-40-fast")
        changed["stages"][0] |= change
        changed["calibration"] |= {"num_sequences": 256, "batch_size": 16}
        full = f"tensor-network-40-fast-{ending}"
        found[full] = lambda full=full, changed=changed: compressed(options, full, changed)
    for name in TIMED:
        found[f"speed-{name}"] = lambda name=name: speed(options, name)
    small = {key: value for key, value in recipe("compactifai-93").items() if key not in ("stages", "distillation")}
    found["correction"] = lambda: compressed(
        options, "correction", small | {"stages": [CORRECTION, {**ENTROPY, "bits": CORRECTED_BITS, "sensitivity": "none"}]}
    )
    found["correction-control"] = lambda: compressed(
        options,
        "correction-control",
        small | {"stages": [{**ENTROPY, "sensitivity": "none", "bits": _body_bits(options, "correction")}]},
    )
    found["compactifai-93"] = lambda: compressed(options, "compactifai-93", recipe("compactifai-93"))
    found["compactifai-93-control"] = lambda: compressed(options, "compactifai-93-control", _control(options))
    kinds = [(None, ""), *((percent, kind) for percent in HEALED for kind in HEALING)]
    kinds = [(percent, kind) for percent, kind in kinds if options.own_text or not kind.startswith(OWN)]
    for percent, kind in kinds:
        for rate in DENSE_RATES if percent is None else RATES:
            found[healed_name(percent, kind, rate, variant(options))] = lambda percent=percent, kind=kind, rate=rate: healed(
                options, percent, kind, rate
            )
            if options.own_text and kind in ("", f"{OWN}-distilled"):
                found[healed_name(percent, kind + NORMS, rate, variant(options))] = lambda percent=percent, kind=kind, rate=rate: (
                    polished(options, percent, kind, rate)
                )
    return found


def _body_bits(options: argparse.Namespace, name: str) -> float:
    stepwise.done(steps(options), options.work, name, options.device)
    return json.loads((options.work / name / "compression_report.json").read_text())["totals"]["body_bits_per_weight"]


def _control(options: argparse.Namespace) -> dict[str, Any]:
    """Quantization alone, at the bits per block weight that the composition took."""
    composed = recipe("compactifai-93")
    quantizer = {**composed["stages"][-1], "sensitivity": "fisher", "bits": _body_bits(options, "compactifai-93")}
    return composed | {"stages": [quantizer]}


Add = Callable[[str, str, float, bool, dict[str, Any]], None]


def bars(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What is claimed, held against what was measured; steps that have not run are left out."""
    result: list[dict[str, Any]] = []

    def add(claim: str, target: str, measured: float, is_held: bool, row: dict[str, Any]) -> None:
        result.append(bar(claim, target, round(measured, 4), is_held, row, row["command_seconds"]))

    untrained_bars(found, add)
    relative_bars(found, add)
    for name in TIMED:
        if row := found.get(f"speed-{name}"):
            decode, prefill = row["decode dense"] / row[f"decode {name}"], row["prefill dense"] / row[f"prefill {name}"]
            where = "" if row.get("dtype", "auto") == "auto" else f", {row['dtype']}"
            add(f"-{name}: decoding at batch 1, times as fast as dense{where}", ">= 1", decode, decode >= 1, row)
            claim = f"-{name}: prefill of {PREFILL} tokens, times as fast as dense{where}"
            add(claim, f">= {PREFILL_RATIO}", prefill, prefill >= PREFILL_RATIO, row)
    return result


def untrained_bars(found: dict[str, Any], add: Add) -> None:
    """Of the recipes as they are."""
    base = found["dense"]["perplexity"]
    for name, limits in UNTRAINED.items():
        row = found.get(f"tensor-network-{name}")
        if row is None or limits is None:
            continue
        for text, limit in zip(row["perplexity"], limits, strict=True):
            ratio = stepwise.ratio(row, text, base)
            add(f"-{name}, no training: perplexity on {text}, times dense", f"<= {limit}", ratio, ratio <= limit, row)
        if stepwise.is_of_cpu(row):
            minutes = row["solver_seconds"] / 60
            add(f"-{name}: minutes of the solvers", f"<= {MINUTES}", minutes, minutes <= MINUTES, row)
        share, wanted = row["kept_share"], 1 - int(name[:2]) / 100
        add(f"-{name}: kept share of the block weights", f"<= {wanted:.2f} + 0.005", share, share <= wanted + 0.005, row)


def relative_bars(found: dict[str, Any], add: Add) -> None:
    """Of rows against a control row of their own."""
    pairs: list[tuple[str, Any, str, Any, float]] = []
    controls = rows_of(None, "", "")
    for ending in sorted({stepwise.ending_of(name, controls) for name in found} - {None}):
        dense = chosen(found, None, "", ending)
        words = re.sub(r"-(\d+)-epochs", r", \1 epochs", ending)
        words = re.sub(r"^-(\d+)", r", \1 tokens", words).replace("-own-text", ", own text")
        pairs += [
            (f"healed-{name}{kind}{words}", chosen(found, name, kind, ending), "healed-dense", dense, limit)
            for name, limit in HEALED.items() for kind in HEALING
        ]  # fmt: skip
        kind = f"{OWN}-distilled{NORMS}"
        controls_of_norms = {"healed-dense": dense, f"healed-dense{NORMS}": chosen(found, None, NORMS, ending)}
        pairs += [
            (f"healed-{name}{kind}{words}", chosen(found, name, kind, ending), control, other, limit)
            for name, limit in HEALED.items() for control, other in controls_of_norms.items()
        ]  # fmt: skip
    pairs += [
        (name, found.get(name), f"{name}-control", found.get(f"{name}-control"), 1.0) for name in ("correction", "compactifai-93")
    ]
    if row := found.get("compactifai-93"):
        control = stepwise.quantized(row["file_bytes"])
        if control and control["perplexity"].keys() == row["perplexity"].keys():
            pairs.append(("compactifai-93", row, f"{control['name']} of no more bytes (02-codebook)", control, 1.0))
    base = found["dense"]["perplexity"]
    for name, row, control, other, limit in pairs:
        for text in row["perplexity"] if row and other else ():
            against, of_dense = control, stepwise.ratio(other, text, base)
            if control.startswith("healed-dense") and of_dense > 1:  # what training has made worse is no control
                against, of_dense = "dense", 1.0
            ratio = stepwise.ratio(row, text, base) / of_dense
            add(f"{name}: perplexity on {text}, times {against}", f"<= {limit}", ratio, ratio <= limit, row)


def write(found: dict[str, Any], line: str) -> str:
    """The JSON, and a table of all rows and of the bars."""
    base = found["dense"]["perplexity"]
    held = bars(found)
    lines = [
        "| row | bits per compressed weight | MB on disk | vs fp32 | vs bf16 | "
        + " | ".join(f"{text}, × dense" for text in base) + " | held-out perplexity | minutes |",
        "|---" * (7 + len(base)) + "|",
    ]  # fmt: skip
    for name, row in found.items():
        if "perplexity" not in row:
            continue
        totals = row.get("totals")
        sizes = ["", "", "", ""]
        if totals:
            shares = [f"{100 * totals[key]:.1f} %" for key in ("share_of_fp32", "share_of_bf16")]
            sizes = [f"{totals['body_bits_per_weight']:.2f}", f"{row['file_bytes'] / 1e6:.1f}", *shares]
        ratios = [f"{stepwise.ratio(row, text, base):.3f}" for text in row["perplexity"]]
        ratios.append(f"{row['held_out']:.2f}" if row.get("held_out") else "")
        lines.append("| " + " | ".join([name, *sizes, *ratios, f"{row['command_seconds'] / 60:.1f}"]) + " |")
    common = {"seed": 0, "machine": machine(), "command": line}
    (RESULTS / "03-tensor-network.json").write_text(
        json.dumps({"bars": [common | b for b in held], "rows": found}, indent=2) + "\n"
    )
    text = f"# Tensor networks\n\n{machine()}, seed 0; the commit of each row is in the JSON.\n\n" + "\n".join(lines)
    for name in TIMED:
        if row := found.get(f"speed-{name}"):
            text += "\n\n" + ", ".join(f"{key}: {1e3 * value:.1f} ms" for key, value in row.items() if " " in key)
            text += f" ({row.get('dtype', 'auto')}, {row['machine']})" if "machine" in row else ""
    text += f"\n\n{stepwise.bar_table(held)}\n"
    (RESULTS / "03-tensor-network.md").write_text(text)
    return text


def main() -> int:
    """Measure what is missing and write the tables."""
    parser = stepwise.parser(__doc__, "runs/tensor")
    parser.add_argument("--step", action="append", help="a step by name; all by default")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="to heal on, and to train the dense control on")
    parser.add_argument("--epochs", type=int, default=1, help="the tokens are so many times the same")
    stepwise.add_training(parser)
    options = stepwise.parse(parser)
    if options.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {options.epochs}")
    todo = steps(options)
    if unknown := [name for name in options.step or () if name not in todo]:
        parser.error(f"--step must be one of {', '.join(todo)}, got {unknown[0]!r}")
    found = stepwise.run(todo, options.work, options.step, options.device, options.rows)
    line = stepwise.command_line("tensor_network", options) + f" --tokens {options.tokens}" + " --own-text" * options.own_text
    line += f" --epochs {options.epochs}" if options.epochs != 1 else ""
    line += f" --dtype {options.dtype}" if options.dtype != "auto" else ""
    print(write(found, line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
