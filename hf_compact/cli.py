"""The command `hf-compact`. It parses, shows progress and prints; all work is in `api`."""

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from typer.core import TyperCommand

from . import api, benchmark, harness
from .checkpoint import check_new_file, write_text
from .config import DistillationConfig, DType
from .errors import CompactError, OutputError
from .methods.compacter import CompacterConfig
from .planner import BudgetPlan
from .report import format_bytes
from .results import Results, with_error
from .scoring import Windows
from .speed import SpeedConfig

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Compress transformers models to smaller folders that `from_pretrained` loads and that were scored before success is reported.",
)


def out() -> Console:
    """Standard output as it is now: rich reads COLUMNS when a console is made, and never again."""
    return Console()


def err() -> Console:
    """Standard error as it is now."""
    return Console(stderr=True)


class SeveralValues(TyperCommand):
    """A command whose repeatable options take several values after one name: `--text a b` is `--text a --text b`.

    Only after a positional argument: in `--text a MODEL` the model stays the model.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the name before every value."""
        names = {name for param in self.params if getattr(param, "multiple", False) for name in param.opts}
        spread: list[str] = []
        current = None
        for arg in args:
            if arg.startswith("-"):
                current, is_first = arg.partition("=")[0], "=" not in arg
                spread.append(arg)
            else:
                spread += [arg] if current not in names or is_first or args[0].startswith("-") else [current, arg]
                is_first = False
        return super().parse_args(ctx, spread)


ModelArgument = Annotated[str, typer.Argument(help="Hub id, folder or .gguf file of a dense model.", metavar="MODEL")]
RecipeOption = Annotated[Path, typer.Option(help="YAML file: `stages: [{method: codebook, bits: 4}]`.", metavar="FILE.yaml")]
SeedOption = Annotated[int | None, typer.Option(help="Replaces the recipe's seed.")]
DeviceOption = Annotated[str | None, typer.Option(help="Where the model runs: cuda, cuda:1. Default: cpu.")]
DTypeOption = Annotated[DType, typer.Option(help="auto is the checkpoint's own, and bfloat16 for float32.")]


@app.command(
    cls=SeveralValues,
    epilog="Examples:\n\n"
    "    hf-compact compress HuggingFaceTB/SmolLM2-135M-Instruct --recipe configs/recipes/codebook-4bit.yaml --output smol-4bit\n\n"
    "    hf-compact compress ./my-model --recipe recipe.yaml --output small --calibration a.txt --calibration b.txt --seed 1",
)
def compress(
    model: ModelArgument,
    recipe: RecipeOption,
    output: Annotated[Path, typer.Option(help="Folder to create; an interrupted run into it goes on.", metavar="DIR")],
    calibration: Annotated[
        list[Path] | None,
        typer.Option(help="UTF-8 text, one or several files. Default: Python's own documentation.", metavar="FILE"),
    ] = None,
    seed: SeedOption = None,
    device: DeviceOption = None,
) -> None:
    """Compress MODEL into a new folder, reload it in a fresh process, score it, and report."""
    with _errors(), progress_bar("compressing") as advance:
        report = api.compress(
            model, recipe, output=output, calibration=calibration or (), seed=seed, device=device, progress=advance
        )
    for note in report.notes:
        err().print(f"note: {note}", highlight=False)
    out().print(report.to_table(f"{output}"))


@app.command(
    cls=SeveralValues,
    epilog="Examples:\n\n"
    "    hf-compact plan ./my-model --recipe configs/recipes/codebook-3bit.yaml\n\n"
    "    hf-compact plan ./my-model --target-size 60MB --calibration a.txt --output recipe.yaml --plot front.png --validate\n\n"
    "    hf-compact plan ./my-model --target-bpw 2.5 --candidates entropy --calibration a.txt --output recipe.yaml\n\n"
    "    hf-compact plan ./my-model --max-ppl-increase 10% --calibration a.txt --output recipe.yaml\n\n"
    "then: hf-compact compress ./my-model --recipe recipe.yaml --output small --calibration a.txt",
)
def plan(  # noqa: PLR0913 - the options
    context: typer.Context,
    model: ModelArgument,
    recipe: Annotated[
        Path | None, typer.Option(help="Dry run of this recipe: layers, bytes, memory, minutes.", metavar="FILE.yaml")
    ] = None,
    target_size: Annotated[
        str | None,
        typer.Option(
            help="Whole file at most: 40MB, 38e6, 36MiB; a note says so if the candidates come no nearer than 0.5 %.",
            metavar="SIZE",
        ),
    ] = None,
    target_bpw: Annotated[float | None, typer.Option(help="Bits per block weight at most, scales and tables counted.")] = None,
    max_ppl_increase: Annotated[
        str | None, typer.Option(help="Smallest file whose forecast perplexity grows by at most this: 10%.", metavar="PERCENT")
    ] = None,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(help="UTF-8 text, one or several files. Default: Python's own documentation.", metavar="FILE"),
    ] = None,
    candidates: Annotated[
        str | None,
        typer.Option(help="Recipe whose stages are alternatives, or codebook (the default), or entropy.", metavar="FILE.yaml"),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Recipe to create.", metavar="FILE.yaml")] = None,
    plot: Annotated[Path | None, typer.Option(help="Plot of the front to create.", metavar="FILE.png")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Measured errors, read and kept; default: beside --output.", metavar="FILE.json")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens that errors are measured on. Default: 4096.")] = None,
    validate: Annotated[bool, typer.Option("--validate", help="Compress some points in memory and measure them.")] = False,
    data_free: Annotated[bool, typer.Option("--data-free", help="Propose from the weights alone, without text.")] = False,
    seed: SeedOption = None,
    device: DeviceOption = None,
) -> None:
    """Show what a recipe would do (writes nothing), or find the recipe that loses least within a budget.

    Exactly one of --recipe, --target-size, --target-bpw and --max-ppl-increase.
    """
    targets = {"--target-size": target_size, "--target-bpw": target_bpw, "--max-ppl-increase": max_ppl_increase}
    others = {"--calibration": calibration, "--candidates": candidates, "--output": output, "--plot": plot, "--cache": cache,
              "--tokens": tokens, "--validate": validate, "--data-free": data_free, "--device": device}  # fmt: skip
    if sum(value is not None for value in (recipe, *targets.values())) != 1:
        raise typer.BadParameter(f"exactly one of --recipe, {', '.join(targets)} must be given", context)
    if recipe is None:
        if output is None:
            raise typer.BadParameter("--output must name the recipe to create", context)
        values: dict[str, Any] = {"target_size": target_size, "target_bpw": target_bpw, "max_ppl_increase": max_ppl_increase}
        with _errors(), progress_bar("planning") as advance:
            found = api.plan_budget(
                model, **values, calibration=calibration or (), candidates=candidates or "codebook", output=output, plot=plot,
                cache=cache, validate=validate, data_free=data_free, seed=seed, device=device or "cpu", progress=advance,
                num_tokens=api.PLAN_TOKENS if tokens is None else tokens,
            )  # fmt: skip
        _print_budget_plan(found, output)
        return
    for name, value in others.items():
        if value:
            raise typer.BadParameter(f"{name} belongs to a target, not to --recipe", context)
    with _errors():
        _print_plan(api.plan(model, recipe, seed))


def _print_budget_plan(found: BudgetPlan, output: Path) -> None:
    table = Table(title=str(output))
    for column in ("", "file", "bits per block weight", f"error ({found.unit})", "perplexity ×"):
        table.add_column(column, justify="right" if column else "left", overflow="fold")
    rows = [("forecast", found.point)]
    for position, (forecast, measured) in enumerate(found.measured):
        rows += [(f"front {position}, forecast", forecast)] if position else []
        rows.append(("measured", measured))
    for label, point in rows:
        size = f"{point.file_bytes / 1e6:.3f} MB"
        factor = f"{point.ppl_factor:.4f}" if found.unit == "divergence" else ""
        table.add_row(label, size, f"{point.body_bits:.3f}", f"{point.error:.4g}", factor)
    out().print(table)
    for stage in found.recipe.to_dict()["stages"]:
        setting = f"{stage['bits']:g} bits" if "bits" in stage else "as in the recipe"
        what = f"{setting}: {', '.join(stage['include'])}" if stage["include"] else "embedding only"
        out().print(f"{stage['method']}, {what}", highlight=False)
    for note in found.notes:
        err().print(f"note: {note}", highlight=False)


def _print_plan(found: dict[str, Any]) -> None:
    table = Table(title=f"{found['model']} ({found['family']})")
    for column in ("layer", "role", "shape", "method", "before", "after"):
        table.add_column(column, overflow="fold")
    for layer in found["layers"]:
        shape = "×".join(map(str, layer["shape"]))
        sizes = (format_bytes(layer["dense_bytes"]), format_bytes(layer["compressed_bytes"]))
        table.add_row(layer["name"], layer["role"], shape, layer["method"], *sizes)
    out().print(table)
    for entry in found["skipped"]:
        out().print(f"skipped: {entry['name']} ({entry['reason']})", highlight=False)
    if not found["is_known_family"]:
        out().print(f"note: model_type {found['family']} is not in the table of families; blocks were found by structure")
    before, after = found["bytes_before"], found["bytes_after"]
    out().print(f"bytes: {format_bytes(before)} → {format_bytes(after)} ({100 * after / before:.1f} %)", highlight=False)
    out().print(f"body: {found['body_bits_per_weight']:.3f} bits per weight", highlight=False)
    how = "read block by block" if found["is_streamed"] else "loaded whole"
    out().print(f"peak memory: about {format_bytes(found['peak_memory_bytes'])} ({how})", highlight=False)
    out().print(f"time: about {found['minutes']:.1f} minutes on this machine", highlight=False)


@app.command(
    cls=SeveralValues,
    epilog="Examples:\n\n"
    "    hf-compact evaluate ./my-model ./my-model-4bit --text wiki.test.raw c4.txt --json scores.json\n\n"
    "    hf-compact evaluate ./my-model-4bit --compare ./my-model --text wiki.test.raw --tasks hellaswag,piqa,lambada_openai "
    "--task-data rows --limit 500 --speed --output results.json",
)
def evaluate(  # noqa: PLR0913 - one argument per option
    context: typer.Context,
    models: Annotated[list[str], typer.Argument(help="Dense or compressed models; ratios are to the first.", metavar="MODEL...")],
    text: Annotated[list[Path] | None, typer.Option(help="UTF-8 text to score, one or several files.", metavar="FILE")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness, with commas between them (extra: eval).", metavar="A,B,C")
    ] = None,
    task_data: Annotated[
        Path | None,
        typer.Option(help="Folder with the rows of each task as TASK.jsonl; without it they come from the Hub.", metavar="DIR"),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Rows of each task, from the first. Default: all.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples shown before each row. Default: the task's own.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences of the tasks at a time. Default: 8.")] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            help="Base, measured first and kept in memory: each MODEL is compared with it token by token, row by row, turn by turn.",
            metavar="BASE",
        ),
    ] = None,
    speed: Annotated[
        bool, typer.Option("--speed", help="Time prefill, first token and decoding; loading and memory too.")
    ] = False,
    prompt_tokens: Annotated[int | None, typer.Option(help="With --speed: tokens of the prompt. Default: 256.")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="With --speed: tokens that are generated. Default: 32.")] = None,
    repeats: Annotated[int | None, typer.Option(help="With --speed: counted turns, after one to warm up. Default: 5.")] = None,
    windows: Annotated[int | None, typer.Option(help="Windows from the start of each text. Default: 40.", min=1)] = None,
    window_length: Annotated[int | None, typer.Option(help="Tokens per window. Default: 1024.", min=2)] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens between the beginnings of windows. Default: side by side.")] = None,
    bos: Annotated[bool, typer.Option("--bos", help="Put the tokenizer's BOS token before every window.")] = False,
    dtype: DTypeOption = "auto",
    device: Annotated[str, typer.Option(help="Where models run: cpu, cuda, cuda:1, mps.")] = "cpu",
    output: Annotated[
        Path | None,
        typer.Option(
            help="results.json with everything, rows included; written after every model, and gone on with.", metavar="OUT"
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the perplexities here, one row each.", metavar="OUT")
    ] = None,
) -> None:
    """Score each MODEL: perplexity on texts (--text), lm-evaluation-harness (--tasks), speed and memory (--speed).

    Perplexity is that of consecutive windows, no overlap, no special tokens, unless --stride or --bos say otherwise.
    """
    timing: dict[str, Any] = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repeats": repeats}
    cut: dict[str, Any] = {"windows": windows, "window_length": window_length, "stride": stride, "bos": bos or None}
    asked: dict[str, Any] = {"limit": limit, "num_fewshot": num_fewshot, "batch_size": batch_size}
    if not text and not tasks and not speed:
        raise typer.BadParameter("at least one of --text, --tasks and --speed must be given", context)
    for owner, is_given, others in (
        ("--text", text, cut | {"json": json_file}),
        ("--tasks", tasks, asked | {"task_data": task_data}),
        ("--speed", speed, timing),
    ):
        for name, value in others.items():
            if value is not None and not is_given:
                raise typer.BadParameter(f"--{name.replace('_', '-')} belongs to {owner}, which is not given", context)
    with _errors(), progress_bar("scoring") as advance:
        if json_file is not None and not (
            json_file.absolute().parent.is_dir() and os.access(json_file.absolute().parent, os.W_OK)
        ):
            raise OutputError(f"--json {str(json_file)!r} cannot be written: its folder must exist and be writable")
        cut["num_windows"] = cut.pop("windows")
        timing, cut, asked = ({k: v for k, v in given.items() if v is not None} for given in (timing, cut, asked))
        protocol = benchmark.Protocol(
            windows=Windows(**cut), tasks=tuple(name for name in (tasks or "").split(",") if name), **asked,
            speed=SpeedConfig(**timing) if speed else None, dtype=dtype, device=device,
        )  # fmt: skip
        results = benchmark.measure(
            models, text or (), protocol, compare_with=compare, task_data=task_data, output=output, progress=advance
        )
        rows = benchmark.perplexity_rows(results, ([compare] if compare else []) + models, text or ())
        if json_file is not None:
            _write_json(json_file, rows)
    if rows:
        _print_perplexities(rows, results)
    if protocol.tasks:
        _print_tasks(results)
    if speed:
        _print_speed(results)


def _print_perplexities(rows: list[dict[str, Any]], results: Results) -> None:
    is_compared = results.base is not None
    table = Table()
    columns = (
        "model",
        "text",
        "perplexity",
        "× first",
        *(("divergence", "same token") if is_compared else ()),
        "MB",
        "tokens",
        "seconds",
    )
    for column in columns:
        table.add_column(column, justify="left" if column in ("model", "text") else "right", overflow="fold")
    names = benchmark.model_names([row["model"] for row in rows])
    for row in rows:
        model = results.named(names[row["model"]])
        assert model is not None, "a row is of a model"
        beside = [] if not is_compared else ["", ""]
        if model.comparison is not None:
            found = model.comparison["perplexity"][Path(row["text"]).name]
            divergence = "not finite" if found["kl"] is None else f"{found['kl']:.4f}"
            beside = [divergence, f"{100 * found['top1_agreement']:.1f} %"]
        numbers = (f"{row['perplexity']:.3f}", f"{row['ratio']:.4f}", *beside, f"{row['file_bytes'] / 1e6:.1f}")
        table.add_row(row["model"], Path(row["text"]).name, *numbers, str(row["num_tokens"]), f"{row['seconds']:.1f}")
    out().print(table)


@app.command(epilog="Example:\n\n    hf-compact compare ./my-model ./my-model-pruned --plot removed.png")
def compare(
    before: ModelArgument,
    after: Annotated[str, typer.Argument(help="Compressed or pruned model.", metavar="SMALLER")],
    plot: Annotated[Path | None, typer.Option(help="Bar chart to create: what each block has lost.", metavar="OUT.png")] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt, at batch size 1.")] = 256,
    new_tokens: Annotated[int, typer.Option(help="Tokens that are generated behind it.")] = 32,
    repeats: Annotated[int, typer.Option(help="Turns of both models; medians are shown.")] = 5,
    dtype: DTypeOption = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers here too.", metavar="OUT")] = None,
) -> None:
    """Parameters, multiply-adds, bytes and measured speed of MODEL and of a SMALLER one, side by side."""
    with _errors():
        if json_file is not None:
            check_new_file(json_file)
        speed = SpeedConfig(prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=repeats)
        found = api.compare(before, after, plot=plot, speed=speed, dtype=dtype)
        if json_file is not None:
            _write_json(json_file, found.to_dict())
    out().print(found.to_table(f"{before} → {after}"))


def _print_tasks(results: Results) -> None:
    table = Table(title=f"lm-evaluation-harness {results.versions['lm_eval']}")
    for column in ("model", "task", "metric", "value", "- base", "same choice", "lost, gained", "rows"):
        table.add_column(column, justify="left" if column in ("model", "task", "metric") else "right", overflow="fold")
    for model in results.models:
        for task, result in model.tasks.items():
            beside = (model.comparison or {"tasks": {}})["tasks"].get(task)
            for metric, found in result["metrics"].items():
                change = None if beside is None else beside["metrics"].get(metric)
                agreement = "" if beside is None or beside["agreement"] is None else f"{100 * beside['agreement']:.1f} %"
                differs = "" if change is None else with_error(change["difference"], change["stderr"], sign="+")
                moved = "" if change is None or "agreement" not in change else f"{change['num_lost']}, {change['num_gained']}"
                value = with_error(found["value"], found["stderr"])
                table.add_row(model.name, task, metric, value, differs, agreement, moved, str(result["num_items"]))
    out().print(table)


def _print_speed(results: Results) -> None:
    table = Table(title=f"{results.protocol['speed']['prompt_tokens']} tokens of prompt, {results.machine['threads']} threads")
    columns = ("model", "prefill tok/s", "× base", "first token s", "decode tok/s", "× base", "load s", "peak MB", "J/token")
    for column in columns:
        table.add_column(column, justify="left" if column == "model" else "right", overflow="fold")
    for model in results.models:
        found, memory, faster = model.speed, model.memory, (model.comparison or {}).get("speed", {})
        assert found is not None, "asked for"
        assert memory is not None, "asked for"
        times = (
            f"{found['prefill_tokens_per_second']:.1f}",
            f"{found['first_token_seconds']:.3f}",
            f"{found['decode_tokens_per_second']:.2f}",
        )
        ratio = [f"{faster[key]:.2f}" if faster else "" for key in ("prefill", "decode")]
        joules = f"{found['joules_per_token']:.2f}" if "joules_per_token" in found else ""
        rest = (f"{memory['load_seconds']:.1f}", f"{memory['peak_bytes'] / 1e6:.0f}", joules)
        table.add_row(model.name, times[0], ratio[0], times[1], times[2], ratio[1], *rest)
    out().print(table)


@app.command(
    name="lm-eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    epilog="Example:\n\n    hf-compact lm-eval run --model hf_compact --model_args pretrained=./my-model-4bit --tasks hellaswag",
)  # fmt: skip
def lm_eval(context: typer.Context) -> None:
    """The command line of lm-evaluation-harness, with the model `hf_compact`; all arguments are its own."""
    with _errors():
        harness.command_line(context.args)


@app.command(
    cls=SeveralValues,
    epilog="Examples:\n\n"
    "    hf-compact recover ./my-model-3bit --text train.txt\n\n"
    "    hf-compact recover ./my-model-3bit --teacher ./my-model --text a.txt b.txt --output my-adapter --learning-rate 1e-3",
)
def recover(  # noqa: PLR0913 - one argument per option
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a compressed model.", metavar="MODEL")],
    text: Annotated[
        list[Path] | None,
        typer.Option(help="UTF-8 text to train on, one or several files. Default: Python's own documentation.", metavar="FILE"),
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="Dense model to learn from, beside the text.", metavar="MODEL")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to create. Default: MODEL-adapter.", metavar="DIR")] = None,
    variant: Annotated[
        Literal["compacter", "compacter++"],
        typer.Option(help="Adapters behind both sub-layers, or (++) behind feed-forward ones only."),
    ] = "compacter",
    reduction_factor: Annotated[float, typer.Option(help="Hidden width / bottleneck of the adapters.")] = 32,
    rank: Annotated[int, typer.Option(help="Rank of their factors.")] = 1,
    num_sequences: Annotated[int, typer.Option(help="Sequences to train on.")] = 256,
    sequence_length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 512,
    epochs: Annotated[int, typer.Option(help="How often each is used.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Sequences per step.")] = 4,
    learning_rate: Annotated[float, typer.Option(help="Highest, after a warm-up; it falls along a cosine.")] = 3e-3,
    seed: Annotated[int, typer.Option(help="Of the sequences, the start and the order.")] = 0,
) -> None:
    """Train a small adapter on top of a compressed MODEL, verify it, and save it beside the model."""
    with _errors(), progress_bar("recovering") as advance:
        adapter = CompacterConfig(variant=variant, reduction_factor=reduction_factor, rank=rank)
        training = DistillationConfig(
            num_sequences=num_sequences, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate
        )
        found = api.recover(
            model, text or (), output=output, teacher=teacher, adapter=adapter, training=training,
            sequence_length=sequence_length, seed=seed, progress=advance,
        )  # fmt: skip
    before, after = found["perplexity_before"], found["perplexity_after"]
    out().print(f"held-out perplexity: {before:.3f} → {after:.3f} ({found['held_out_tokens']} tokens)", highlight=False)
    if after >= before:
        err().print("note: the adapter did not help: give more text, more epochs or another learning rate", highlight=False)
    out().print(
        f"adapter: {found['output']}, {format_bytes(found['adapter_bytes'])}, {found['trainable_parameters']} trained parameters",
        highlight=False,
        soft_wrap=True,
    )
    out().print(
        f"load it: AutoPeftModelForCausalLM.from_pretrained({found['output']!r}) after `import hf_compact`",
        highlight=False,
        soft_wrap=True,
    )


@app.command(
    cls=SeveralValues,
    epilog="Example:\n\n    hf-compact profile ./my-model --recipe configs/recipes/tensor-network-40.yaml --output profile.json "
    "--ratio 0.3 0.6 --calibration text.txt",
)
def profile(
    model: ModelArgument,
    recipe: RecipeOption,
    output: Annotated[Path, typer.Option(help="JSON file; the heat map lies beside it as .png.", metavar="OUT.json")],
    ratio: Annotated[
        list[float] | None, typer.Option(help="Kept share of a Linear, one or several. Default: 0.25 0.5 0.75.", metavar="SHARE")
    ] = None,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(help="UTF-8 text, one or several files. Default: Python's own documentation.", metavar="FILE"),
    ] = None,
    seed: SeedOption = None,
    device: DeviceOption = None,
) -> None:
    """Measure what compressing each Linear of MODEL alone costs; a stopped run goes on. The stage reads it as `profile`."""
    with _errors(), progress_bar("profiling") as advance:
        found = api.profile(
            model,
            recipe,
            output=output,
            ratios=ratio or (0.25, 0.5, 0.75),
            calibration=calibration or (),
            seed=seed,
            device=device or "cpu",
            progress=advance,
        )
    table = Table(title="divergence, nats per token: mean over the blocks")
    curves = [(layer["role"], layer["curve"]) for layer in found["layers"].values()]
    ratios = list(curves[0][1])
    for column in ("role", *(f"kept {share}" for share in ratios)):
        table.add_column(column)
    for role in dict.fromkeys(role for role, _ in curves):
        rows = [curve for other, curve in curves if other == role]
        means = [sum(curve[share]["divergence"] for curve in rows) / len(rows) for share in ratios]
        table.add_row(role, *(f"{mean:.4f}" for mean in means))
    out().print(table)


@app.command(
    epilog="Examples:\n\n    hf-compact export ./my-model-small --output ./my-model-plain --to low_rank\n\n"
    "    hf-compact export ./my-model-4bit --output ./my-model-gguf --to gguf\n\n"
    "    hf-compact export ./my-model-4bit --output ./my-model-int4 --to compressed-tensors"
)
def export(
    folder: Annotated[Path, typer.Argument(help="A compressed folder.", metavar="DIR")],
    output: Annotated[Path, typer.Option(help="Folder to create.", metavar="DIR")],
    to: Annotated[
        api.ExportKind,
        typer.Option(
            help="Dense; two Linears per low-rank layer; ternary layers as bitnet; packed int4 or int8 as compressed-tensors; "
            "onnx in float32; a file for llama.cpp: gguf is the first of tq2_0, q4_0, q4_1, q8_0 that holds the layers as they are, else f16, or a type by name."
        ),
    ] = "dense",
) -> None:
    """Write a compressed folder as one that loads without this library."""
    with _errors():
        api.export(folder, output, to)
    out().print(f"{output}: {to}", highlight=False)


@app.command(
    epilog="Examples:\n\n    hf-compact push ./my-model-4bit me/my-model-4bit\n\n"
    "    HF_TOKEN=$(cat token.txt) hf-compact push ./my-model-4bit me/my-model-4bit --public --message 'First version'\n\n"
    "    hf-compact push ./my-model-4bit-adapter me/my-adapter --base me/my-model-4bit",
)
def push(
    folder: Annotated[Path, typer.Argument(help="A folder of compress, recover or export.", metavar="DIR")],
    repo_id: Annotated[str, typer.Argument(help="Repository, created if there is none.", metavar="USER/NAME")],
    public: Annotated[bool, typer.Option("--public", help="Everybody may read it; without, nobody else may.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Although it was not verified, or has changed since.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the repository holds.")] = False,
    base: Annotated[
        str | None, typer.Option(help="Where the model of an adapter is, if it was trained on a folder.", metavar="USER/NAME")
    ] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    results: Annotated[
        Path | None,
        typer.Option(help="File of `evaluate --output`, whose scores of this folder join the card.", metavar="FILE.json"),
    ] = None,
) -> None:
    """Upload a verified folder to the Hub; interrupted, the same command goes on.

    The token is that of `hf auth login` or of the variable HF_TOKEN.
    """
    with _errors():
        address = api.push(
            folder, repo_id, private=not public, force=force, overwrite=overwrite, base=base, commit_message=message, results=results
        )  # fmt: skip
    out().print(address, highlight=False, soft_wrap=True)


@app.command(epilog="Example:\n\n    hf-compact inspect ./my-model-4bit --json")
def inspect(
    folder: Annotated[Path, typer.Argument(help="A compressed folder.", metavar="DIR")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show what a compressed folder holds, from file headers and JSON only."""
    with _errors():
        found = api.inspect_folder(folder)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    table = Table(title=str(folder))
    for column in ("layer", "format", "shape", "kB", "bits per weight"):
        table.add_column(column, overflow="fold")
    for layer in found["layers"]:
        kind = " ".join(str(part) for part in (layer["layer"], _bits(layer), layer.get("grid"), _rank(layer)) if part)
        shape = "×".join(map(str, layer["shape"]))
        table.add_row(layer["name"], kind, shape, f"{layer['bytes'] / 1e3:.1f}", f"{layer['bits_per_weight']:.3f}")
    out().print(table)
    out().print(f"body: {found['body_bits_per_weight']:.3f} bits per weight", highlight=False)
    out().print(
        f"whole file: {format_bytes(found['file_bytes'])}, {found['file_bits_per_weight']:.3f} bits per weight, "
        f"{100 * found['share_of_fp32']:.1f} % of fp32, {100 * found['share_of_bf16']:.1f} % of bf16",
        highlight=False,
    )
    out().print(f"weights in memory: {format_bytes(found['memory_bytes'])}", highlight=False)
    out().print(f"verified: {'yes' if found['is_verified'] else 'no'}", highlight=False)


def _bits(layer: dict[str, Any]) -> str:
    return f"{layer['bits']} bit" if "bits" in layer else ""


def _rank(layer: dict[str, Any]) -> str:
    ranks = layer.get("ranks") or ([layer["rank"]] if "rank" in layer else [])
    return f"rank {'·'.join(map(str, ranks))}" if ranks else ""


@contextmanager
def _errors() -> Iterator[None]:
    """Our own errors are one line and exit code 2; anything else is a defect and shows its traceback."""
    try:
        yield
    except CompactError as error:
        err().print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar with the time left on a terminal; on anything else one line per tenth."""
    console = err()
    if not console.is_terminal:
        last = -1

        def report(unit: str, done: int, total: int) -> None:
            nonlocal last
            if 10 * done // total != last:
                last = 10 * done // total
                console.print(f"{title}: {done}/{total} {unit}", highlight=False)

        yield report
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=None)

        def advance(unit: str, done: int, total: int) -> None:
            if total != bar.tasks[0].total:  # another phase, with a speed of its own
                bar.reset(task, total=total)
            bar.update(task, description=f"{title} {unit}", completed=done)

        yield advance


def _write_json(path: Path, value: Any) -> None:
    try:
        write_text(path, json.dumps(value, indent=2) + "\n")
    except OSError as error:
        raise OutputError(f"--json {str(path)!r} cannot be written: {error}") from error


def main() -> None:
    """Entry point of `hf-compact` and `python -m hf_compact`."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    app()


if __name__ == "__main__":
    main()
