r"""Structured pruning: in one shot, in training against the dense model trained alike, speed, overhead.

    python -m evaluation.pruning --model MODEL.gguf --calibration wiki.valid.raw --calibration wiki.utf8 \
        --calibration technical.utf8 --calibration tiny.utf8 --text wiki.test.raw --text c4.utf8 --work runs/pruning

It goes on where it was stopped. `--step` takes some of the steps only; what has not run yet is left out of the tables. All rows
that are trained get the same steps of 1024 tokens, 400 by default, from the calibration texts in the same order, the dense
control among them; those that are pruned before lose as many channels and heads as HESSO takes out. Rows of another number of
steps (`--train-steps`), and those that see nothing but what the dense model writes (`--own-text`), say it in their names. Each
is trained at several learning rates, and the best one on windows that no row trains on, of the same texts, counts; the teacher
of distilled rows is the dense model so trained. Several processes may be at it at once. Results go to `evaluation/results/05-pruning.json` and `.md`; `--quick` shows that everything runs.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import Trainer, TrainingArguments

from evaluation import planted
from evaluation import steps as stepwise
from evaluation.planted import PAPER
from evaluation.steps import RESULTS, bar, machine, taken
from hf_compact import DistillationCallback, HessoCallback, SpeedConfig, api, evaluate
from hf_compact.calibration import read_texts, sample
from hf_compact.config import CalibrationConfig
from hf_compact.footprint import count
from hf_compact.groups import find_groups
from hf_compact.methods.pruning.callback import group_counts
from hf_compact.scoring import perplexity

#: recipe -> most perplexity, times dense, on the two texts.
ONE_SHOT = {"prune-20": (1.25, 1.40), "prune-50": (2.1, 2.8)}
#: Other calibration: sequences, and whether a part of the text is what the dense model wrote.
CALIBRATED = {"256": (256, False), "1024": (1024, False), "1024-own-text": (1024, True)}
#: removed share of the block parameters -> most perplexity, times the dense model trained alike.
TRAINED = {20: 1.08, 40: 1.25}
#: How rows that are pruned before they are trained choose; at 20 %.
BEFORE = {
    "flap": {"score": "flap", "compensation": "bias"},
    "magnitude": {"score": "magnitude", "compensation": "none"},
    "random": {"score": "random", "compensation": "none"},
    "obs": {"score": "obs", "compensation": "refit"},  # what HESSO's own refit is to be better than
}
STEPS, LENGTH, BATCH = 400, 512, 2
#: What the names of the steps are made from.
DEFAULTS = argparse.Namespace(steps=STEPS, own_text=False)
RATES = (1e-4, 3e-4)
#: What overhead is measured at.
LEARNING_RATE = 1e-4
#: What is chosen is replaced at once, by the calibration of the recipes; every choice takes a pass over it.
REFIT = {"compensation": "refit", "periods": 2}
#: HESSO warms up for a twentieth of the steps and prunes for a quarter of them.
WARM_UP, PRUNING = 20, 4
#: Row -> removed share in training (None: before it, by the row's name), whether the trained dense model teaches, other settings,
#: sequences of calibration that they are refitted on.
TRAINED_ROWS: dict[str, tuple[float | None, bool, dict[str, Any], int]] = {
    "trained-dense": (None, False, {}, 0),
    **{f"hesso-{percent}": (percent / 100, False, {}, 0) for percent in TRAINED},
    **{f"hesso-{percent}-distilled": (percent / 100, True, {}, 0) for percent in TRAINED},
    **{f"hesso-{percent}-refit": (percent / 100, False, REFIT, 64) for percent in TRAINED},
    **{f"hesso-{percent}-refit-distilled": (percent / 100, True, REFIT, 64) for percent in TRAINED},
    "hesso-20-refit-1024-distilled": (0.2, True, REFIT, 1024),
    "hesso-20-refit-competing-distilled": (0.2, True, REFIT | {"is_uniform": False}, 64),
    "hesso-20-paper-scores": (0.2, False, PAPER, 0),
    **{f"{name}-20-trained": (None, False, {}, 0) for name in BEFORE},
    "flap-20-trained-distilled": (None, True, {}, 0),
}
PREFILL_RATIO, DECODE_RATIO, OVERHEAD = 1.3, 1.2, 0.1


def scored(model: str | Path, options: argparse.Namespace) -> dict[str, float]:
    """Perplexity by text."""
    count_of, length = (2, options.length) if options.quick else (40, 1024)
    rows = evaluate([model], options.text, count_of, length, device=options.device, dtype=options.dtype)
    return {Path(row["text"]).name: row["perplexity"] for row in rows}


def compressed(
    options: argparse.Namespace, name: str, stage: dict[str, Any] | None = None, calibrated: str | None = None,
    texts: list[str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Prune in one shot by a recipe of the project, with other calibration, or by `prune-20` with another stage; then score."""
    known = "prune-20" if stage is not None else "-".join(name.split("-")[:2])
    recipe = yaml.safe_load(Path(f"configs/recipes/{known}.yaml").read_text()) | {"dtype": options.dtype}
    if name != known:
        recipe["distillation"] = None
    if stage is not None:
        recipe["stages"] = [recipe["stages"][0] | stage]
    texts = texts or options.calibration
    if calibrated is not None:
        number, is_own = CALIBRATED[calibrated]
        recipe["calibration"] = {**recipe["calibration"], "num_sequences": number, "batch_size": 16}
        texts = [*texts, stepwise.own_text(options, 4 if options.quick else number, options.length)] if is_own else texts
    if options.quick:
        recipe["calibration"] = {"num_sequences": 4, "sequence_length": options.length}
        recipe["distillation"] = recipe["distillation"] and {"num_sequences": 4}
    folder = options.work / name
    with taken(folder):
        if not (folder / "compression_report.json").exists():
            api.compress(options.model, recipe, output=folder, calibration=texts, device=options.device)
    report = json.loads((folder / "compression_report.json").read_text())
    kept = {key: report[key] for key in ("file_bytes", "seconds", "footprint")}
    return {"command_seconds": sum(report["seconds"].values()), "perplexity": scored(folder, options), **kept}


def share_of_groups(options: argparse.Namespace, target: float) -> dict[str, float]:
    """Channels and key-value heads that HESSO takes out of a block, as shares of all."""
    model = api.open_dense(options.model, "float32", is_whole=True).model
    callback = HessoCallback(target=target)
    sets = find_groups(model, callback.config.kinds)
    found = {s.kind: s.num_groups for s in sets}
    counts = group_counts(model, sets, callback.config)
    return {kind: counts[kind] / number for kind, number in found.items()}


def variant(options: argparse.Namespace) -> str:
    """The end of the names of rows that are trained for another number of steps, or on other text."""
    return ("" if options.steps == STEPS else f"-{options.steps}-steps") + "-own-text" * options.own_text


def row_name(name: str, rate: float, ending: str) -> str:
    """Of a row that is trained at a rate."""
    return f"{name}-{rate:g}{ending}"


def ending_of(name: str) -> str | None:
    """How the names end of all rows that are trained as this one is; None for those that are not."""
    return stepwise.ending_of(name, [row_name(row, rate, "") for row in TRAINED_ROWS for rate in RATES])


def trained(options: argparse.Namespace, name: str, rate: float) -> dict[str, Any]:
    """Train the dense model as it is, with HESSO, or after it was pruned in one shot; then score."""
    target, is_distilled, settings, sequences = TRAINED_ROWS[name]
    texts = options.calibration
    if options.own_text:
        texts = [*map(str, stepwise.own_training_texts(options, options.steps * BATCH, options.length))]
    opened = api.open_dense(options.model, "float32", is_whole=True)
    model, tokenizer = opened.model, opened.load_tokenizer()
    callbacks: list[transformers.TrainerCallback] = []
    if is_distilled:
        teacher = options.work / best(options, "trained-dense")
        callbacks.append(DistillationCallback(transformers.AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)))
    if target is not None:
        schedule = {"warm_up_steps": max(1, options.steps // WARM_UP), "pruning_steps": options.steps // PRUNING, **settings}
        schedule |= {"periods": 2} if options.quick else {}
        known = CalibrationConfig(num_sequences=4 if options.quick else sequences, sequence_length=options.length)
        batches = sample(tokenizer, read_texts(texts), known, 0, []).batches if sequences else ()
        callbacks.append(HessoCallback(target=target, batches=batches, **schedule))
    before = count(model)
    if target is None and name != "trained-dense":
        before_training = name.partition("-trained")[0]
        pruned = options.work / (before_training + "-own-text" * options.own_text)
        shares = share_of_groups(options, 0.2)
        stage = {"channel_sparsity": shares["channels"], "head_sparsity": shares.get("kv_heads", 0.0)}
        compressed(options, pruned.name, BEFORE[before_training.split("-")[0]] | stage, texts=texts)
        model = transformers.AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32)
    started, name = time.perf_counter(), row_name(name, rate, variant(options))
    data = stepwise.TrainingWindows(texts, tokenizer, options.length, options.steps * BATCH)
    arguments = TrainingArguments(
        str(options.work / f"{name}-trainer"), per_device_train_batch_size=BATCH, max_steps=options.steps, bf16=options.dtype == "auto",
        use_cpu=options.device == "cpu", learning_rate=rate, lr_scheduler_type="cosine", warmup_steps=options.steps // 20, weight_decay=0.0,
        save_steps=50, save_total_limit=1, report_to=[], disable_tqdm=True, logging_steps=20, seed=0,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=bool(list(Path(arguments.output_dir).glob("checkpoint-*"))))
    folder = options.work / name
    model.save_pretrained(folder)  # in float32; scoring takes bfloat16
    tokenizer.save_pretrained(folder)
    after = count(model)
    blocks = [sum(of["parameters"] for of in side.blocks.values()) for side in (before, after)]
    held_out = None if data.held_out is None else perplexity(model.eval(), data.held_out, options.length, None)["perplexity"]
    return {
        "learning_rate": rate,
        "held_out": held_out,
        "num_tokens": options.steps * BATCH * options.length,
        "removed_share": 1 - blocks[1] / blocks[0],
        "parameters": after.parameters,
        "command_seconds": time.perf_counter() - started,
        "perplexity": scored(folder, options),
    }


def best(options: argparse.Namespace, name: str) -> str:
    """The row at the rate that is best on held-out windows; measures what is missing."""
    todo = steps(options)
    names = [row_name(name, rate, variant(options)) for rate in RATES]
    return stepwise.best_held_out({row: stepwise.done(todo, options.work, row, options.device) for row in names})


def chosen(found: dict[str, Any], name: str, ending: str) -> dict[str, Any] | None:
    """The best row that there is of those that are trained alike."""
    rows = {row: found[row] for rate in RATES if (row := row_name(name, rate, ending)) in found}
    return found.get(stepwise.best_held_out(rows))


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Dense and pruned by turns in one process."""
    started = time.perf_counter()
    is_quick, shares = options.quick, share_of_groups(options, 0.4)
    sizes = {"channel_sparsity": shares["channels"], "head_sparsity": shares.get("kv_heads", 0.0)}
    compressed(options, "random-40", BEFORE["random"] | sizes)  # what goes makes no difference to times
    timed = SpeedConfig(prompt_tokens=16, new_tokens=2, repeats=1) if is_quick else SpeedConfig(prompt_tokens=512, repeats=15)
    found = api.compare(options.model, options.work / "random-40", speed=timed, dtype=options.dtype)
    values: dict[str, Any] = {}
    for name, side in (("dense", found.before), ("-40 %", found.after)):
        values |= {f"prefill {name}": side.prefill_seconds, f"decode {name}": side.decode_seconds}
    return {
        **values,
        "threads": torch.get_num_threads(),
        "dtype": options.dtype,
        "machine": machine(),
        "device": "cpu",
        "command_seconds": time.perf_counter() - started,
    }


def overhead(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of training steps and of the callback in them, over a warm-up, two periods and the time after."""
    started = time.perf_counter()
    opened = api.open_dense(options.model, "float32", is_whole=True)
    model, number = opened.model.train(), 8 if options.quick else 40
    callback = HessoCallback(target=0.2, warm_up_steps=number // 4, pruning_steps=number // 2, periods=2)
    hooked, started_at = 0.0, 0.0

    def note_start(*_: Any) -> None:
        nonlocal started_at
        started_at = time.perf_counter()

    def note_end(*_: Any) -> None:
        nonlocal hooked
        hooked += time.perf_counter() - started_at

    readers = [module for name, module in model.named_modules() if name.endswith(("o_proj", "down_proj"))]
    for module in readers:
        module.register_forward_pre_hook(note_start)
    callback.prepare(model)  # whose hooks come between
    for module in readers:
        module.register_forward_pre_hook(note_end)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    data = stepwise.TrainingWindows(options.calibration, opened.load_tokenizer(), options.length, BATCH)
    ids = torch.stack([data[i]["input_ids"] for i in range(BATCH)])
    steps, calls = [], []
    for step in range(number):
        at, hooked = time.perf_counter(), 0.0
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        one = time.perf_counter()
        callback.before_update(model, step)
        two = time.perf_counter()
        optimizer.step()
        three = time.perf_counter()
        callback.step(model, step + 1, LEARNING_RATE)
        four = time.perf_counter()
        optimizer.zero_grad()
        calls.append(hooked + two - one + four - three)
        steps.append(time.perf_counter() - at - calls[-1])
    return {
        "step_seconds": statistics.mean(steps),
        "callback_seconds": statistics.mean(calls),
        "callback_median": statistics.median(calls),
        "machine": machine(),
        "device": "cpu",
        "command_seconds": time.perf_counter() - started,
    }


def cric() -> dict[str, Any]:
    """What becomes of planted channels that score low and cannot be spared, with CRIC and without."""
    started = time.perf_counter()
    return {**planted.survivors(), "seeds": list(planted.SEEDS), "command_seconds": time.perf_counter() - started}


def steps(options: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    """Every step by name, in the order they need each other."""
    found: dict[str, Callable[[], dict[str, Any]]] = {
        "dense": lambda: {"perplexity": scored(options.model, options), "command_seconds": 0.0}
    }
    found |= {name: lambda name=name: compressed(options, name) for name in ONE_SHOT}
    for name in ONE_SHOT:
        found[f"{name}-not-distilled"] = lambda name=name: compressed(options, f"{name}-not-distilled")
        found |= {
            f"{name}-{key}": lambda name=name, key=key: compressed(options, f"{name}-{key}", None, key) for key in CALIBRATED
        }
    for name in TRAINED_ROWS:
        found |= {
            row_name(name, rate, variant(options)): lambda name=name, rate=rate: trained(options, name, rate) for rate in RATES
        }  # fmt: skip
    found["speed"] = lambda: speed(options)
    found["overhead"] = lambda: overhead(options)
    found["cric"] = cric
    return found


Add = Callable[[str, str, float, bool, dict[str, Any]], None]


def bars(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What is claimed, held against what was measured; steps that have not run are left out."""
    result: list[dict[str, Any]] = []

    def add(claim: str, target: str, measured: float, is_held: bool, row: dict[str, Any]) -> None:
        result.append(bar(claim, target, round(measured, 4), is_held, row, row["command_seconds"]))

    base = found["dense"]["perplexity"]
    for name, limits in ONE_SHOT.items():
        for text, limit in zip(found.get(name, {}).get("perplexity", {}), limits, strict=False):
            ratio = stepwise.ratio(found[name], text, base)
            add(f"{name}: perplexity on {text}, times dense", f"<= {limit}", ratio, ratio <= limit, found[name])
    for ending in sorted({ending_of(name) for name in found} - {None}):
        trained_bars(found, ending, add)
    if "speed" in found:
        row = found["speed"]
        for kind, least in (("prefill", PREFILL_RATIO), ("decode", DECODE_RATIO)):
            ratio = row[f"{kind} dense"] / row[f"{kind} -40 %"]
            where = "" if row.get("dtype", "auto") == "auto" else f", {row['dtype']}"
            add(f"-40 % of block parameters: {kind}, times as fast as dense{where}", f">= {least}", ratio, ratio >= least, row)
    if "overhead" in found:
        row = found["overhead"]
        share = row["callback_seconds"] / row["step_seconds"]
        add("time of the callback, share of a training step", f"<= {OVERHEAD}", share, share <= OVERHEAD, row)
    if "cric" in found:
        row = found["cric"]
        worst = max(error for errors in row["with"] for error in errors)
        claim = f"planted channels, {len(row['seeds'])} seeds: cross-entropy behind their tokens, nats, the worst"
        add(f"{claim} with CRIC", f"< {planted.SURVIVED}", worst, worst < planted.SURVIVED, row)
        least = min(error for errors in row["without"] for error in errors)
        add(f"{claim.replace('the worst', 'the best')} without it", f"> {planted.DIED}", least, least > planted.DIED, row)
    return result


def trained_bars(found: dict[str, Any], ending: str, add: Add) -> None:
    """Of rows that were trained alike, against the dense control and against those that were pruned before."""
    base, words = found["dense"]["perplexity"], f" ({ending[1:].replace('-', ' ')})" if ending else ""
    for percent, limit in TRAINED.items():
        for name in (
            row for row, (target, _, settings, _) in TRAINED_ROWS.items() if target == percent / 100 and settings is not PAPER
        ):
            row, control = chosen(found, name, ending), chosen(found, "trained-dense", ending)
            for text in row["perplexity"] if row and control else ():
                ratio = stepwise.ratio(row, text, base) / stepwise.ratio(control, text, base)
                claim = f"{name}: perplexity on {text}, times the dense model trained alike{words}"
                add(claim, f"<= {limit}", ratio, ratio <= limit, row)
    for ours, other_name in (
        *((ours, f"{name}-20-trained") for ours in ("hesso-20", "hesso-20-refit") for name in BEFORE),
        ("hesso-20-distilled", "flap-20-trained-distilled"),
        ("hesso-20-refit-distilled", "flap-20-trained-distilled"),
    ):
        row, other = chosen(found, ours, ending), chosen(found, other_name, ending)
        for text in row["perplexity"] if row and other else ():
            ratio = stepwise.ratio(row, text, base) / stepwise.ratio(other, text, base)
            add(f"{ours}: perplexity on {text}, times {other_name}{words}", "< 1", ratio, ratio < 1, row)


def write(found: dict[str, Any], line: str, folder: Path = RESULTS) -> str:
    """The JSON, and a table of all rows and of the bars."""
    base, claims = found["dense"]["perplexity"], bars(found)
    columns = (
        [f"{text}, × dense" for text in base] + [f"{text}, × dense trained alike" for text in base] + ["held-out perplexity"]
    )
    lines = ["| row | removed of the blocks | " + " | ".join(columns) + " | minutes |", "|---" * (3 + len(columns)) + "|"]
    for name, row in found.items():
        if "perplexity" not in row:
            continue
        removed = f"{100 * row['removed_share']:.1f} %" if "removed_share" in row else ""
        ratios = [f"{stepwise.ratio(row, text, base):.3f}" for text in row["perplexity"]]
        ending = ending_of(name)
        control = ({} if ending is None else chosen(found, "trained-dense", ending)) or {}
        alike = {
            text: stepwise.ratio(row, text, base) / stepwise.ratio(control, text, base) for text in control.get("perplexity", {})
        }
        ratios += [f"{alike[text]:.3f}" if alike else "" for text in base]
        held = f"{row['held_out']:.2f}" if row.get("held_out") else ""
        lines.append("| " + " | ".join([name, removed, *ratios, held, f"{row['command_seconds'] / 60:.1f}"]) + " |")
    common = {"seed": 0, "machine": machine(), "command": line}
    (folder / "05-pruning.json").write_text(json.dumps({"bars": [common | b for b in claims], "rows": found}, indent=2) + "\n")
    text = f"# Structured pruning\n\n{machine()}, seed 0; the commit of each row is in the JSON.\n\n" + "\n".join(lines)
    if "speed" in found:
        text += "\n\n" + ", ".join(f"{key}: {1e3 * value:.1f} ms" for key, value in found["speed"].items() if " " in key)
    text += f"\n\n{stepwise.bar_table(claims)}\n"
    (folder / "05-pruning.md").write_text(text)
    return text


def main(arguments: list[str] | None = None) -> int:
    """Measure what is missing and write the tables."""
    parser = stepwise.parser(__doc__, "runs/pruning")
    parser.add_argument("--step", action="append", choices=list(steps(DEFAULTS)), help="a step by name; all by default")
    stepwise.add_training(parser)
    parser.add_argument("--train-steps", type=int, default=STEPS, help="steps of 1024 tokens of the rows that are trained")
    parser.add_argument("--quick", action="store_true", help="only shows that everything runs; tables go to the work folder")
    options = stepwise.parse(parser, arguments)
    options.steps, options.length = (8, 32) if options.quick else (options.train_steps, LENGTH)
    todo = steps(options)
    wanted = options.step and [new for old, new in zip(steps(DEFAULTS), todo, strict=True) if old in options.step]
    found = stepwise.run(todo, options.work, wanted, options.device, options.rows)
    line = stepwise.command_line("pruning", options) + f" --train-steps {options.steps}" + " --own-text" * options.own_text
    line += f" --dtype {options.dtype}" if options.dtype != "auto" else ""
    print(write(found, line, options.work if options.quick else RESULTS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
