r"""One table and its pictures from any number of `results.json`: Markdown, an HTML file that needs nothing else, a JSON of all.

    hf-compact evaluate my-model-4bit my-model-3bit --compare my-model --text a.txt --tasks piqa --output results.json
    python -m evaluation.compare results.json --output table.html --output table.md

Rows are models, of all files together; a model that several files name is one row. Numbers stand in one column only if they
were measured alike: another window, other rows or another version of the harness is an error that names the column. What
ran on another machine than the first file says so below the table.
Differences are to the base of the same file, pair by pair, with their own standard error, which is smaller than that of
either value.
"""

import argparse
import dataclasses
import html
import io
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from evaluation.pareto import draw_front
from hf_compact.checkpoint import write_text
from hf_compact.errors import CompactError, ConfigError
from hf_compact.results import ModelResult, Results, with_error

#: What of a protocol stands behind a column of a text and behind one of a task.
TEXT_SETTINGS = ("windows", "dtype")
TASK_SETTINGS = ("limit", "num_fewshot", "batch_size", "dtype")
#: Names are names, with dollar signs in them too.
PLAIN = {"text.parse_math": False}
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1500px; padding: 0 1rem; color: #1c2024; background: #fff; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #dde1e6; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
thead th { border-bottom: 2px solid #69707a; vertical-align: bottom; }
td small { display: block; color: #5a626c; }
figure { margin: 1.5rem 0; } figure svg { max-width: 100%; height: auto; }
"""


def merge(files: Iterable[tuple[str, Results]]) -> Results:
    """All models of several results, each once.

    Args:
        files: names for messages, and what the files hold.

    Raises:
        ConfigError: a column would hold numbers that were not measured alike, or two models have one name.
    """
    settings: dict[str, tuple[str, Any]] = {}
    models: dict[str, tuple[str, ModelResult]] = {}
    merged: Results | None = None
    for name, given in files:
        results = dataclasses.replace(given, protocol={**given.protocol, "speed": _timing(given)})
        for column, value in _settings(results).items():
            other, earlier = settings.setdefault(column, (name, value))
            if earlier != value:
                raise ConfigError(f"{column} was not measured alike in {other} and {name}: {_difference(earlier, value)}")
        elsewhere = {} if merged is None or _place(results) == _place(merged) else {"measured_on": _place(results)}
        for model in results.models:
            if model.name not in models:
                models[model.name] = name, dataclasses.replace(model, provenance=elsewhere | model.provenance)
                continue
            other, earlier = models[model.name]
            if earlier.fingerprint != model.fingerprint:
                raise ConfigError(f"{model.name} is not the same model in {other} and {name}: rename one folder")
            _join(earlier, model, elsewhere)
        if merged is None:
            merged = dataclasses.replace(results, skipped=dict(results.skipped))
        else:
            merged.skipped |= results.skipped
            merged.base = merged.base or results.base
            merged.versions = results.versions | merged.versions
            merged.protocol = _joined(merged.protocol, results.protocol)
    if merged is None:
        raise ConfigError("no results were given")
    skipped = {name: reason for name, reason in merged.skipped.items() if name not in models}
    return dataclasses.replace(merged, models=[model for _, model in models.values()], skipped=skipped)


def _settings(results: Results) -> dict[str, Any]:
    """Column -> everything that decides its numbers."""
    protocol = results.protocol
    texts = {
        text: {"sha256": digest, **{key: protocol[key] for key in TEXT_SETTINGS}} for text, digest in protocol["texts"].items()
    }
    version = results.versions.get("lm_eval")
    tasks = {
        task: {"lm_eval": version, "rows": protocol["task_data"].get(task), **{key: protocol[key] for key in TASK_SETTINGS}}
        for task in protocol["tasks"]
    }
    speed = {} if protocol["speed"] is None else {"speed": protocol["speed"]}
    shared = {
        "perplexity": {key: protocol[key] for key in TEXT_SETTINGS} if texts else None,
        "tasks": {"lm_eval": version, **{key: protocol[key] for key in TASK_SETTINGS}} if tasks else None,
    }  # the page states these once
    return texts | tasks | speed | {name: value for name, value in shared.items() if value is not None}


def _timing(results: Results) -> dict[str, Any] | None:
    """What was timed, in what dtype and where; as it was for a page that was made of several files."""
    speed: dict[str, Any] | None = results.protocol["speed"]
    return speed and {"dtype": results.protocol["dtype"], "machine": _place(results), **speed}


def _place(results: Results) -> str:
    """The machine in words."""
    machine = results.machine
    return f"{machine.get('accelerator', machine['processor'])}, {machine['threads']} of {machine['cores']} cores"


def _joined(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """One protocol for what two files measured: the settings of texts, tasks and speed from a file that has them."""
    kept = {key: (a if a["texts"] else b)[key] for key in TEXT_SETTINGS}
    kept |= {key: (a if a["tasks"] else b)[key] for key in TASK_SETTINGS if key not in kept}
    lists = {"texts": b["texts"] | a["texts"], "task_data": b["task_data"] | a["task_data"]}
    return {**a, **kept, **lists, "tasks": list(dict.fromkeys([*a["tasks"], *b["tasks"]])), "speed": a["speed"] or b["speed"]}


def _difference(a: dict[str, Any], b: dict[str, Any]) -> str:
    return ", ".join(f"{key} {a[key]!r} and {b[key]!r}" for key in a if a[key] != b[key])


def _join(into: ModelResult, other: ModelResult, elsewhere: dict[str, str]) -> None:
    """Add what another file measured of the same model and the earlier ones did not; where, if that was another machine."""
    if not {*other.perplexity, *other.tasks} <= {*into.perplexity, *into.tasks}:
        into.provenance = elsewhere | into.provenance
    into.perplexity = other.perplexity | into.perplexity
    into.tasks = other.tasks | into.tasks
    into.speed, into.memory = into.speed or other.speed, into.memory or other.memory
    if into.comparison is None or other.comparison is None:
        into.comparison = into.comparison or other.comparison
        return
    joined = {key: other.comparison[key] | into.comparison[key] for key in ("perplexity", "tasks")}
    into.comparison = {**other.comparison, **into.comparison, **joined}


def main_metric(task: dict[str, Any]) -> str:
    """The one that is quoted: length-normalised accuracy where the task has it, else accuracy, else the first.

    >>> main_metric({"metrics": {"acc": {}, "acc_norm": {}}})
    'acc_norm'
    """
    metrics = task["metrics"]
    return next((name for name in ("acc_norm", "acc") if name in metrics), next(iter(metrics)))


def mean_score(model: ModelResult, tasks: Sequence[str]) -> float | None:
    """Mean of the quoted metrics; None unless the model has all of the tasks, with finite values."""
    if not tasks or not set(tasks) <= set(model.tasks):
        return None
    values = [model.tasks[task]["metrics"][main_metric(model.tasks[task])]["value"] for task in tasks]
    return None if None in values else sum(values) / len(values)


#: A cell: what is shown, and what stands below it in small print.
Cell = tuple[str, str]


def columns(results: Results) -> dict[str, Callable[[ModelResult], Cell]]:
    """Heading -> the cell of a model, for everything that any model has."""
    models = results.models
    texts = list(dict.fromkeys(text for model in models for text in model.perplexity))
    tasks = list(dict.fromkeys(task for model in models for task in model.tasks))
    found: dict[str, Callable[[ModelResult], Cell]] = {
        "MB": lambda model: (f"{model.file_bytes / 1e6:.1f}", ""),
        "bits per parameter": lambda model: (f"{model.bits_per_parameter:.2f}", _body(model)),
    }
    for text in texts:
        found[f"perplexity, {text}"] = lambda model, text=text: _perplexity(model, text)
    for task in tasks:
        metric = main_metric(next(model.tasks[task] for model in models if task in model.tasks))
        found[f"{task}, {metric}"] = lambda model, task=task: _task(model, task)
    if len(tasks) > 1:
        found["mean of the tasks"] = lambda model: (_number(mean_score(model, tasks), ".4f"), "")
    if any(model.speed for model in models):
        found["prefill, tokens/s"] = lambda model: _speed(model, "prefill")
        found["decode, tokens/s"] = lambda model: _speed(model, "decode")
        found["first token, s"] = lambda model: (_number(model.speed and model.speed["first_token_seconds"], ".3f"), "")
    if any(model.speed and "joules_per_token" in model.speed for model in models):
        found["J per token"] = lambda model: (_number(model.speed and model.speed.get("joules_per_token"), ".2f"), "")
    if any(model.memory for model in models):
        found["peak MB"] = lambda model: (_number(model.memory and model.memory["peak_bytes"] / 1e6, ".0f"), _runtime(model))
        found["load, s"] = lambda model: (_number(model.memory and model.memory["load_seconds"], ".1f"), "")
    if any(model.compression for model in models):
        found["compression, s"] = lambda model: (_number(model.compression and model.compression["seconds"], ".0f"), "")
    return found


def markdown(results: Results) -> str:
    """The table; small print in brackets."""
    heads = columns(results)
    lines = ["| model | " + " | ".join(map(_plain, heads)) + " |", "|---" + "|---:" * len(heads) + "|"]
    for model in results.models:
        cells = [f"{shown} ({small})" if small else shown for shown, small in (cell(model) for cell in heads.values())]
        lines.append(f"| {_plain(model.name)} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"- {note}" for note in stated(results))]) + "\n"


def page(results: Results, title: str) -> str:
    """One HTML file with the table and the pictures in it."""
    heads = columns(results)
    rows = []
    for model in results.models:
        cells = [f"<td>{html.escape(shown)}{_small(small)}</td>" for shown, small in (cell(model) for cell in heads.values())]
        rows.append(f"<tr><td>{html.escape(model.name)}</td>{''.join(cells)}</tr>")
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("model", *heads))
    figures = [f'<figure id="{name}">{_svg(figure)}</figure>' for name, figure in pictures(results).items()]
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in stated(results))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style></head>\n'
        f"<body><h1>{html.escape(title)}</h1>\n<table><thead><tr>{head}</tr></thead><tbody>\n" + "\n".join(rows) + "\n</tbody></table>\n"
        f"<ul>{notes}</ul>\n" + "\n".join(figures) + "\n</body></html>\n"
    )  # fmt: skip


def stated(results: Results) -> list[str]:
    """The protocol and the machine in sentences."""
    protocol = results.protocol
    lines = []
    if protocol["texts"]:
        windows = protocol["windows"]
        count = windows["num_windows"] or "all"
        start = ", BOS before each" if windows["bos"] else ""
        stride = f", {windows['stride']} tokens apart" if windows["stride"] else ", side by side"
        lines.append(
            f"perplexity: {count} windows of {windows['window_length']} tokens{stride}{start}; small: × base ± standard error of the paired difference, KL from the base in nats per token"
        )
    if protocol["tasks"]:
        rows = "all rows" if protocol["limit"] is None else f"the first {protocol['limit']} rows"
        lines.append(
            f"tasks: lm-evaluation-harness {results.versions.get('lm_eval')}, {rows} of each; ± is the standard error; small: paired difference to the base, rows right or wrong as there"
        )
    if timing := _timing(results):
        speed = protocol["speed"]
        lines.append(
            f"speed: {speed['prompt_tokens']} tokens of prompt, {speed['new_tokens']} generated, median of {speed['repeats']} turns with the base, {timing['dtype']} on {timing['machine']}; small: times as fast as it"
        )
    lines.append(f"{_place(results)}, " + ", ".join(f"{name} {version}" for name, version in results.versions.items()))
    elsewhere: dict[str, list[str]] = {}
    for model in results.models:
        if (place := model.provenance.get("measured_on", _place(results))) != _place(results):
            elsewhere.setdefault(place, []).append(model.name)
    lines += [f"{place}: {', '.join(names)}, held against the base there" for place, names in elsewhere.items()]
    reasons: dict[str, list[str]] = {}
    for name, reason in results.skipped.items():
        reasons.setdefault(reason, []).append(name)
    return lines + [f"skipped: {', '.join(names)}: {reason}" for reason, names in reasons.items()]


@rc_context(PLAIN)
def pictures(results: Results) -> dict[str, Figure]:
    """Bytes against quality, and bars of the tasks with their errors; what can be drawn of these."""
    texts = list(dict.fromkeys(text for model in results.models for text in model.perplexity))
    tasks = list(dict.fromkeys(task for model in results.models for task in model.tasks))
    panels: dict[str, list[tuple[str, float, float]]] = {}
    for text in texts:
        found = [(m.name, m.file_bytes / 1e6, m.perplexity[text]["perplexity"]) for m in results.models if text in m.perplexity]
        panels[f"perplexity on {text}"] = [point for point in found if point[2] is not None and math.isfinite(point[2])]
    means = [(model.name, model.file_bytes / 1e6, mean_score(model, tasks)) for model in results.models]
    panels["mean of the tasks"] = [(name, size, value) for name, size, value in means if value is not None]
    panels = {name: points for name, points in panels.items() if len(points) > 1}
    found: dict[str, Figure] = {}
    if panels:
        figure = found["pareto"] = Figure(figsize=(6 * len(panels), 5), layout="constrained")
        for axes, (label, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            draw_front(axes, {"models": points}, label, is_more_better=label == "mean of the tasks")
    if tasks:
        found["tasks"] = _bars(results.models, tasks)
    return found


def _bars(models: Sequence[ModelResult], tasks: Sequence[str]) -> Figure:
    """One panel a task, one bar a model."""
    figure = Figure(figsize=(2 + 2.6 * len(tasks), 1 + 0.3 * len(models)), layout="constrained")
    for number, (axes, task) in enumerate(zip(figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0], tasks, strict=True)):
        having = [(place, model.tasks[task]) for place, model in enumerate(models) if task in model.tasks]
        metric = main_metric(having[0][1])
        having = [(place, found) for place, found in having if found["metrics"][metric]["value"] is not None]
        values = [found["metrics"][metric] for _, found in having]
        errors = [value["stderr"] or 0.0 for value in values]
        axes.barh(
            [place for place, _ in having], [value["value"] for value in values], xerr=errors, capsize=2, color="C0", alpha=0.8
        )
        axes.set_title(f"{task}, {metric}", fontsize=10)
        axes.grid(axis="x", alpha=0.3)
        axes.locator_params(axis="x", nbins=4)
        if number == 0:
            axes.set_yticks(range(len(models)), [model.name for model in models])
            axes.invert_yaxis()
    return figure


def _svg(figure: Figure) -> str:
    """The figure as an element of a page, its text as text."""
    stream = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "hf_compact", **PLAIN}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


def _plain(name: str) -> str:
    """A name that ends neither its cell nor its row."""
    return " ".join(name.replace("|", "\\|").split())


def _small(text: str) -> str:
    return f"<small>{html.escape(text)}</small>" if text else ""


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _body(model: ModelResult) -> str:
    return "" if model.body_bits_per_weight is None else f"blocks {model.body_bits_per_weight:.2f}"


def _runtime(model: ModelResult) -> str:
    return f"{model.memory['runtime_bytes'] / 1e6:.0f} before loading" if model.memory and model.memory["runtime_bytes"] else ""


def _perplexity(model: ModelResult, text: str) -> Cell:
    if text not in model.perplexity:
        return "", ""
    value = model.perplexity[text]["perplexity"]
    shown = "not finite" if value is None else f"{value:.3f}"
    beside = (model.comparison or {"perplexity": {}})["perplexity"].get(text)
    if beside is None or beside["ratio"] is None:
        return shown, ""
    error = beside["nll_difference_stderr"]
    small = f"× {beside['ratio']:.4f}" + ("" if error is None else f" ± {beside['ratio'] * error:.4f}")
    return shown, small + (f", KL {beside['kl']:.4f}" if beside.get("kl") is not None else "")


def _task(model: ModelResult, task: str) -> Cell:
    if task not in model.tasks:
        return "", ""
    found = model.tasks[task]
    metric = main_metric(found)
    value = found["metrics"][metric]
    beside = (model.comparison or {"tasks": {}})["tasks"].get(task)
    parts = []
    if beside is not None and metric in beside["metrics"]:
        change = beside["metrics"][metric]
        parts.append(with_error(change["difference"], change["stderr"], sign="+"))
        if "agreement" in change:
            parts.append(f"{100 * change['agreement']:.1f} % alike")
    return with_error(value["value"], value["stderr"]), ", ".join(parts)


def _speed(model: ModelResult, kind: str) -> Cell:
    if model.speed is None:
        return "", ""
    faster = (model.comparison or {}).get("speed")
    return f"{model.speed[f'{kind}_tokens_per_second']:.1f}", f"× {faster[kind]:.2f}" if faster else ""


def write(results: Results, path: Path, title: str) -> None:
    """The page, the table or the results themselves, by the file's ending."""
    if path.suffix == ".json":
        results.write(path)
    else:
        write_text(path, page(results, title) if path.suffix == ".html" else f"# {title}\n\n{markdown(results)}")


def main() -> int:
    """Read, merge, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="results.json files")
    parser.add_argument(
        "--output", action="append", type=Path, required=True, help=".html, .md or .json file to write; repeat for several"
    )
    parser.add_argument("--title", default="Compressed models", help="heading of the page")
    options = parser.parse_args()
    for path in options.output:
        if path.suffix not in (".html", ".md", ".json"):
            parser.error(f"--output must end in .html, .md or .json, got {str(path)!r}")
    try:
        results = merge((path.name, Results.read(path)) for path in options.results)
    except CompactError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    missing = [path for path in options.output if not path.absolute().parent.is_dir()]
    if missing:
        print(f"error: --output must lie in a folder that exists, got {str(missing[0])!r}", file=sys.stderr)
        return 2
    for path in options.output:
        write(results, path, options.title)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
