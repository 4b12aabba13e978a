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

from . import api
from .checkpoint import write_text
from .errors import CompactError, OutputError
from .report import format_bytes

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Compress transformers models to smaller folders that `from_pretrained` loads and that were scored before success is reported.",
)
out = Console()
err = Console(stderr=True)


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
) -> None:
    """Compress MODEL into a new folder, reload it in a fresh process, score it, and report."""
    with _errors(), progress_bar("compressing") as advance:
        report = api.compress(model, recipe, output=output, calibration=calibration or (), seed=seed, progress=advance)
    for note in report.notes:
        err.print(f"note: {note}", highlight=False)
    out.print(report.to_table(f"{output}"))


@app.command(epilog="Example:\n\n    hf-compact plan ./my-model --recipe configs/recipes/codebook-3bit.yaml")
def plan(model: ModelArgument, recipe: RecipeOption, seed: SeedOption = None) -> None:
    """Show what `compress` would do: layers, bytes, memory, minutes, and what is skipped. Writes nothing."""
    with _errors():
        found = api.plan(model, recipe, seed)
    table = Table(title=f"{found['model']} ({found['family']})")
    for column in ("layer", "role", "shape", "method", "before", "after"):
        table.add_column(column, overflow="fold")
    for layer in found["layers"]:
        shape = "×".join(map(str, layer["shape"]))
        sizes = (format_bytes(layer["dense_bytes"]), format_bytes(layer["compressed_bytes"]))
        table.add_row(layer["name"], layer["role"], shape, layer["method"], *sizes)
    out.print(table)
    for entry in found["skipped"]:
        out.print(f"skipped: {entry['name']} ({entry['reason']})", highlight=False)
    if not found["is_known_family"]:
        out.print(f"note: model_type {found['family']} is not in the table of families; blocks were found by structure")
    before, after = found["bytes_before"], found["bytes_after"]
    out.print(f"bytes: {format_bytes(before)} → {format_bytes(after)} ({100 * after / before:.1f} %)", highlight=False)
    out.print(f"body: {found['body_bits_per_weight']:.3f} bits per weight", highlight=False)
    how = "read block by block" if found["is_streamed"] else "loaded whole"
    out.print(f"peak memory: about {format_bytes(found['peak_memory_bytes'])} ({how})", highlight=False)
    out.print(f"time: about {found['minutes']:.1f} minutes on this machine", highlight=False)


@app.command(
    cls=SeveralValues,
    epilog="Example:\n\n    hf-compact evaluate ./my-model ./my-model-4bit --text wiki.test.raw c4.txt --json scores.json",
)
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Dense or compressed models; ratios are to the first.", metavar="MODEL...")],
    text: Annotated[list[Path], typer.Option(help="UTF-8 text to score, one or several files.", metavar="FILE")],
    windows: Annotated[int, typer.Option(help="Windows from the start of each text.", min=1)] = 40,
    window_length: Annotated[int, typer.Option(help="Tokens per window.", min=2)] = 1024,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the scores here too.", metavar="OUT")] = None,
) -> None:
    """Perplexity of each MODEL on each text: consecutive windows, no overlap, no special tokens."""
    with _errors(), progress_bar("scoring") as advance:
        if json_file is not None and not (
            json_file.absolute().parent.is_dir() and os.access(json_file.absolute().parent, os.W_OK)
        ):
            raise OutputError(f"--json {str(json_file)!r} cannot be written: its folder must exist and be writable")
        rows = api.evaluate(models, text, windows, window_length, lambda name, done: advance(name, done, windows))
        if json_file is not None:
            _write_json(json_file, rows)
    table = Table()
    for column in ("model", "text", "perplexity", "× first", "MB", "tokens", "seconds"):
        table.add_column(column, justify="left" if column in ("model", "text") else "right", overflow="fold")
    for row in rows:
        numbers = (f"{row['perplexity']:.3f}", f"{row['ratio']:.4f}", f"{row['file_bytes'] / 1e6:.1f}")
        table.add_row(row["model"], Path(row["text"]).name, *numbers, str(row["num_tokens"]), f"{row['seconds']:.1f}")
    out.print(table)


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
    out.print(table)


@app.command(epilog="Example:\n\n    hf-compact export ./my-model-small --output ./my-model-plain --to low_rank")
def export(
    folder: Annotated[Path, typer.Argument(help="A compressed folder.", metavar="DIR")],
    output: Annotated[Path, typer.Option(help="Folder to create.", metavar="DIR")],
    to: Annotated[Literal["dense", "low_rank"], typer.Option(help="Dense, or two Linears per low-rank layer.")] = "dense",
) -> None:
    """Write a compressed folder as one that loads without this library."""
    with _errors():
        api.export(folder, output, to)
    out.print(f"{output}: {to}", highlight=False)


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
    out.print(table)
    out.print(f"body: {found['body_bits_per_weight']:.3f} bits per weight", highlight=False)
    out.print(
        f"whole file: {format_bytes(found['file_bytes'])}, {found['file_bits_per_weight']:.3f} bits per weight, "
        f"{100 * found['share_of_fp32']:.1f} % of fp32, {100 * found['share_of_bf16']:.1f} % of bf16",
        highlight=False,
    )
    out.print(f"verified: {'yes' if found['is_verified'] else 'no'}", highlight=False)


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
        err.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar with the time left on a terminal; on anything else one line per tenth."""
    if not err.is_terminal:
        last = -1

        def report(unit: str, done: int, total: int) -> None:
            nonlocal last
            if 10 * done // total != last:
                last = 10 * done // total
                err.print(f"{title}: {done}/{total} {unit}", highlight=False)

        yield report
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err) as bar:
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
