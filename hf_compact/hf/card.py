"""The model card and the plot of a compressed folder, made from the measured report."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..checkpoint import QUANT_METHOD, REPORT_NAME, write_plot, write_text
from ..errors import ConfigError
from ..footprint import Comparison
from ..report import Report, format_bytes
from ..results import Results

#: What stands for the name of the model until it is published.
PLACEHOLDER = "path/to/this/folder"
_USE = """```python
import hf_compact  # registers the format with transformers
from transformers import {auto}

model = {auto}.from_pretrained("{place}")
```

Without the import, transformers does not know the format and loading fails with a size mismatch."""
_USE_PLAIN = """An ordinary model of transformers, {needs}:

```python
from transformers import {auto}

model = {auto}.from_pretrained("{place}"{trust})
```"""
_ALONE = "no other library is needed"
_USE_GGUF = f"""A file for llama.cpp, here by `pip install llama-cpp-python huggingface_hub`:

```python
from llama_cpp import Llama

model = Llama.from_pretrained("{PLACEHOLDER}", filename="*.gguf")
```"""
_USE_ONNX = f"""A graph for ONNX Runtime, here by `pip install onnxruntime huggingface_hub`:

```python
import onnxruntime
from huggingface_hub import snapshot_download

session = onnxruntime.InferenceSession(snapshot_download("{PLACEHOLDER}") + "/model.onnx")
print([one.name for one in session.get_inputs()])
```"""
_USE_ADAPTER = f"""```python
import hf_compact  # registers the formats with transformers and PEFT
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{PLACEHOLDER}")
```"""


def model_card(report: Report) -> str:
    """Markdown with Hub metadata; every number in it was measured by the run that made the folder."""
    is_local = Path(report.model).exists() or report.model.endswith(".gguf")
    name = (Path(report.model).resolve() if is_local else Path(report.model)).name
    data = ModelCardData(
        model_name=f"{name}, compressed",
        base_model=None if is_local else report.model,
        library_name="transformers",
        tags=_tags(layer.method for layer in report.layers),
        eval_results=_results(report),
    )
    state = (
        "The folder was reloaded in a fresh process, which gave the same logits, before this card was written."
        if report.is_verified
        else f"**This folder failed its verification**: {(report.verification or {}).get('reason', 'not verified')}"
    )
    worst = sorted(report.body, key=lambda layer: -layer.relative_error)[:5]
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}, compressed",
        state,
        "## Measured",
        replace(report, model=name).to_markdown(),
        "## Use",
        (_USE_PLAIN if report.is_plain else _USE).format(auto=report.auto_class, place=PLACEHOLDER, needs=_ALONE, trust=""),
        "## Layers with the largest error",
        "| layer | bits per weight | relative output error |\n|---|---|---|\n"
        + "\n".join(f"| {layer.name} | {layer.bits_per_weight:.2f} | {layer.relative_error:.2e} |" for layer in worst),
        "![bytes and error per layer](layers.png)",
        *(
            ["## What was removed", Comparison.from_dict(report.footprint).to_markdown(), "![removed per block](removed.png)"]
            if report.footprint
            else []
        ),
        "## How it was made",
        f"Recipe in `recipe.json`, every number in `compression_report.json`. "
        f"Calibration: {', '.join(report.calibration['sources'])}, {report.calibration['num_tokens']} tokens, "
        f"SHA-256 `{report.calibration['sha256'][:16]}…`. "
        f"Versions: {', '.join(f'{k} {v}' for k, v in report.versions.items())}.",
        *(["## Notes", "\n".join(f"- {note}" for note in report.notes)] if report.notes else []),
    ]
    text = "\n\n".join(parts) + "\n"
    ModelCard(text)  # parses the metadata block, or says what is wrong with it
    return text


def short_card(name: str, folder: Path) -> str:
    """The card of a folder that has none: what it is and how it is loaded, no number.

    >>> short_card("tiny", Path("a-folder-of-an-adapter")).splitlines()[1]
    'library_name: peft'
    """
    path = folder / "config.json"
    library, use, methods = "peft", _USE_ADAPTER, []
    if any(folder.glob("*.onnx")):
        library, use = "onnx", _USE_ONNX
    elif path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        quantization = config.get("quantization_config") or {}
        is_ours = quantization.get("quant_method") == QUANT_METHOD
        methods = [stage["method"] for stage in quantization["stages"]] if is_ours else []
        library, use = "transformers", _USE if is_ours else _USE_PLAIN
        model_class = (config.get("architectures") or ["AutoModel"])[0]
        auto = "AutoModelForCausalLM" if model_class.endswith(("ForCausalLM", "LMHeadModel")) else model_class
        needs = "`pip install compressed-tensors`" if quantization.get("quant_method") == "compressed-tensors" else _ALONE
        use = use.format(
            auto=auto, place=PLACEHOLDER, needs=needs, trust=", trust_remote_code=True" if "auto_map" in config else ""
        )
    elif any(folder.glob("*.gguf")):
        library, use = "gguf", _USE_GGUF
    data = ModelCardData(library_name=library, tags=_tags(methods))
    return f"---\n{data.to_yaml()}\n---\n\n# {name}\n\nNo measured report is part of this model.\n\n## Use\n\n{use}\n"


def write_card(report: Report, folder: Path) -> None:
    """Card, plot and report; the report comes last: where it is, the rest is."""
    write_text(folder / "README.md", model_card(report))
    plot_layers(report, folder / "layers.png")
    if report.footprint is not None:
        Comparison.from_dict(report.footprint).plot(folder / "removed.png")
    write_text(folder / REPORT_NAME, json.dumps(report.to_dict(), indent=2) + "\n")


def _tags(methods: Iterable[str]) -> list[str]:
    return ["hf_compact", "compressed", *sorted(set(methods))]


def _results(report: Report) -> list[EvalResult] | None:
    """What the fresh process scored, as the Hub's `model-index` takes it."""
    perplexity = (report.verification or {}).get("perplexity")
    if perplexity is None:
        return None
    dataset = f"held-out end of {', '.join(report.calibration['sources'])}"
    return [_score("text", dataset, "perplexity", "perplexity per token", perplexity)]


def scores_of(results: Results, fingerprint: str) -> list[EvalResult]:
    """What a run of `evaluate` has measured of the model with these weights, as `model-index` takes it.

    Raises:
        ConfigError: it has measured others.
    """
    model = next((model for model in results.models if model.fingerprint == fingerprint), None)
    if model is None:
        raise ConfigError("results hold no model with these weights: run evaluate on this folder")
    windows, found = results.protocol["windows"], []
    for text, score in model.perplexity.items():
        name = f"{text}, {windows['num_windows']} windows of {windows['window_length']} tokens"
        found.append(_score("text", name, "perplexity", "perplexity per token", score["perplexity"], text))
    for task, entry in model.tasks.items():
        name = f"{task}, {entry['num_items']} rows, {entry['num_fewshot'] or 0} shown"
        for metric, values in entry["metrics"].items():
            stated = metric if values["stderr"] is None else f"{metric} ± {values['stderr']:.4f}"
            found.append(_score(task, name, metric, stated, values["value"]))
    return [score for score in found if score.metric_value is not None]


def _score(kind: str, dataset: str, metric: str, name: str, value: float | None, config: str | None = None) -> EvalResult:
    return EvalResult(
        task_type="text-generation", dataset_type=kind, dataset_name=dataset, dataset_config=config, metric_type=metric,
        metric_name=name, metric_value=value,
    )  # fmt: skip


def with_scores(text: str, scores: Sequence[EvalResult], name: str) -> str:
    """A card whose `model-index` holds these scores too."""
    if not scores:
        return text
    card = ModelCard(text)
    card.data.model_name = card.data.model_name or name
    card.data.eval_results = [*(card.data.eval_results or []), *scores]
    return str(card)


def plot_layers(report: Report, path: Path) -> None:
    """A PNG: relative error and bytes of every compressed module, in the order of the model."""
    from matplotlib.figure import Figure  # here, because no other step needs the memory it takes

    figure = Figure(figsize=(10, 6), layout="constrained")
    errors, sizes = figure.subplots(2, 1, sharex=True)
    roles = list(dict.fromkeys(layer.role for layer in report.layers))
    for role in roles:
        points = [(i, layer) for i, layer in enumerate(report.layers) if layer.role == role]
        places = [i for i, _ in points]
        errors.semilogy(places, [max(layer.relative_error, 1e-12) for _, layer in points], "o", ms=3, label=role)
        sizes.bar(places, [layer.compressed_bytes / 1e3 for _, layer in points], label=role)
    errors.set_ylabel("relative output error")
    errors.legend(ncols=min(8, len(roles)), fontsize="small")
    errors.grid(alpha=0.3)
    sizes.set_ylabel("kB")
    sizes.set_yscale("log")
    sizes.set_xlabel("compressed module, in the order of the model")
    total = "" if report.file_bytes is None else f", {format_bytes(report.file_bytes)} on disk"
    errors.set_title(f"{Path(report.model).name}: {report.body_bits_per_weight:.2f} bits per block weight{total}")
    write_plot(path, figure)
