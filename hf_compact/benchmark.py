"""What models score, how fast they run and what they take, in one run with one protocol: the work behind `hf-compact evaluate`.

Run as a module, this file is the fresh process that loading time and peak memory are measured in.
"""

import copy
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .api import (
    base_folder,
    build_skeleton,
    count_parameters,
    fingerprint_of,
    inspect_folder,
    local_folder,
    open_for_scoring,
    versions,
)
from .calibration import read_texts, tokenize
from .checkpoint import QUANT_METHOD, REPORT_NAME, check_same_run, disk_errors, hash_files
from .config import check_device, check_dtype
from .errors import ConfigError, FormatError, OutputError, UnsupportedModel
from .harness import load_tasks, run_tasks
from .report import Report, peak_memory_bytes, return_freed_memory
from .results import ModelResult, Results, compare
from .scoring import Windows, per_word, score, score_beside
from .speed import SpeedConfig, alternate, check_positions, generation, ratios, summary

#: Called with what is being done, finished and all units.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How models are measured."""

    windows: Windows = Windows()  # noqa: RUF009 - frozen
    """How texts are cut."""
    tasks: tuple[str, ...] = ()
    """Of lm-evaluation-harness."""
    limit: int | None = None
    """Rows of each task, from the first; None for all."""
    num_fewshot: int | None = None
    """Examples shown before each row; None is the task's own number."""
    batch_size: int = 8
    """Sequences of the tasks at a time."""
    speed: SpeedConfig | None = None
    """What is timed; None leaves times and memory out."""
    dtype: str = "auto"
    """auto is the checkpoint's own, and bfloat16 for float32; or float32, bfloat16, float16."""
    device: str = "cpu"
    """Where models run: cpu, cuda, cuda:1, mps."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("limit", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ConfigError(f"num_fewshot must be at least 0, got {self.num_fewshot}")
        check_dtype(self.dtype)
        check_device(self.device)


@dataclass(frozen=True)
class _Work:
    """A run's inputs, read once."""

    protocol: Protocol
    texts: Mapping[str, str]
    tasks: Mapping[str, Any]
    progress: Progress


@dataclass(kw_only=True)
class Loaded:
    """A model in memory, with what its files would say of it."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    file_bytes: int
    num_parameters: int | None = None
    """Of the dense model that it stands for; None counts them."""
    body_bits_per_weight: float | None = None
    compression: dict[str, Any] | None = None
    path: str | None = None
    """Where it came from; None for one that has no files, whose loading time and memory are not measured."""


def measure(
    models: Sequence[str | Path | Loaded], texts: Sequence[str | Path] = (), protocol: Protocol | None = None, *,
    compare_with: str | Path | Loaded | None = None, task_data: str | Path | None = None, output: str | Path | None = None,
    provenance: Mapping[str, Any] | None = None, progress: Progress = lambda unit, done, total: None,
) -> Results:  # fmt: skip
    """Measure models by one protocol.

    Args:
        models: Hub ids, folders, adapters or `.gguf` files; or models in memory.
        texts: text files for the perplexity.
        protocol: None is the perplexity in windows of 1024 tokens.
        compare_with: the base, measured too. Every model is compared with it token by token, row by row and turn by turn, for
            which both are in memory.
        task_data: folder of JSONL files, as `harness.load_tasks` takes it.
        provenance: kept with every model that this call measures.
        output: `results.json`, written after every model; a file of the same run is gone on with.
        progress: called with what is being done, finished and all units.

    Returns:
        Everything that was measured, the base first.

    Raises:
        CompactError: bad input, before the first model is opened; a model that cannot be opened or compared.
    """
    protocol = protocol or Protocol()
    _check(models, texts, protocol)
    given = [*([] if compare_with is None else [compare_with]), *models]
    ready = {model.name: model for model in given if isinstance(model, Loaded)}
    names = model_names(given)
    base = None if compare_with is None else next(iter(names.values()))
    for path in names:
        if path not in ready:
            _check_model(path)
    contents = {Path(path).name: read_texts([path]) for path in texts}
    data = None if task_data is None else Path(task_data)
    tasks = load_tasks(protocol.tasks, data) if protocol.tasks else {}
    results = Results(
        protocol=_stated(protocol, contents, data), machine=machine(protocol.device), versions=_versions(tasks), base=base
    )
    if output is not None:
        results = _continued(results, Path(output))
    work = _Work(protocol, contents, tasks, progress)
    rest = []
    for path, name in names.items():
        kept = results.named(name)
        if kept is None:
            rest.append(path)
        elif path not in ready and fingerprint_of(path) != kept.fingerprint:
            raise OutputError(f"--output {str(output)!r} holds {name} with other weights: choose another --output or delete it")
    beside = None
    if base is not None and rest:
        beside = ready.get(base) or _open(str(compare_with), base, protocol)
    for path in rest:
        opened = ready.get(path) or (beside if names[path] == base and beside is not None else _open(path, names[path], protocol))
        found = _measured(opened, beside, results, work)
        found.provenance = dict(provenance or {})
        results.models.append(found)
        del opened
        return_freed_memory()
        if output is not None:
            with disk_errors(Path(output).absolute().parent):
                results.write(Path(output))
    return results


def evaluate(
    models: Sequence[str | Path], texts: Sequence[str | Path], num_windows: int | None = 40, window_length: int = 1024,
    progress: Callable[[str, int], None] = lambda name, done: None, device: str = "cpu", dtype: str = "auto",
) -> list[dict[str, Any]]:  # fmt: skip
    """Perplexity of each model on each text, in windows side by side without special tokens.

    With the dtype auto a model given as float32 is scored in bfloat16, the dtype of the protocol. Ratios are to the first model.

    Returns:
        One dict per model and text: `model`, `text`, `file_bytes`, `dtype`, `seconds`, `ratio`, and what `scoring.score` and
        `scoring.per_word` return.

    Raises:
        CompactError: a model cannot be opened or a text cannot be read.
    """
    protocol = Protocol(windows=Windows(window_length=window_length, num_windows=num_windows), device=device, dtype=dtype)
    found = measure(models, texts, protocol, progress=lambda unit, done, total: progress(unit, done))
    return perplexity_rows(found, models, texts)


def perplexity_rows(results: Results, models: Sequence[str | Path], texts: Sequence[str | Path]) -> list[dict[str, Any]]:
    """The perplexities of results as flat rows, models and texts as they were given."""
    rows: list[dict[str, Any]] = []
    first: dict[str, float] = {}
    for path, name in model_names(models).items():
        model = results.named(name)
        assert model is not None, "results hold what was asked for"
        for text in map(str, texts):
            found = model.perplexity[Path(text).name]
            value = math.inf if found["perplexity"] is None else found["perplexity"]
            ratio = value / first.setdefault(text, value)
            row = {"model": path, "text": text, "file_bytes": model.file_bytes, "dtype": model.dtype, "ratio": ratio, **found}
            rows.append({**row, "perplexity": value})
    return rows


def machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, threads, memory and accelerator, for beside numbers that depend on them."""
    names = [platform.processor() or platform.machine()]
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ] or names
    found = {
        "processor": names[0],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
    }
    return found | ({"accelerator": torch.cuda.get_device_name(device)} if torch.device(device).type == "cuda" else {})


def _check(models: Sequence[Any], texts: Sequence[str | Path], protocol: Protocol) -> None:
    """Raise ConfigError if there is nothing to do, or results could not be told apart."""
    if not models:
        raise ConfigError("models must name at least one model, got none")
    if not texts and not protocol.tasks and protocol.speed is None:
        raise ConfigError("nothing to measure: give texts, tasks or speed")
    if len({Path(path).name for path in texts}) != len(texts):
        raise ConfigError("texts must have different file names: results are told apart by them")


def _check_model(path: str) -> None:
    """Raise ConfigError if there is no such model, before hours are spent on others."""
    if not path.endswith(".gguf"):
        local_folder(path)
    elif not Path(path).is_file():
        raise ConfigError(f"model {path!r} does not exist")


def model_names(models: Sequence[str | Path | Loaded]) -> dict[str, str]:
    """What was given -> the name in the results: the last part of a path, where that tells models apart."""
    short = {}
    for model in models:
        path = model.name if isinstance(model, Loaded) else str(model)
        is_path = not isinstance(model, Loaded) and Path(path).exists()
        short[path] = Path(path).absolute().name if is_path else path
    return {path: name if list(short.values()).count(name) == 1 else path for path, name in short.items()}


def _stated(protocol: Protocol, contents: Mapping[str, str], task_data: Path | None) -> dict[str, Any]:
    texts = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in contents.items()}
    stated = {**asdict(protocol), "tasks": list(protocol.tasks), "texts": texts}
    files = {}
    for name in protocol.tasks if task_data is not None else ():
        rows = [task_data / f"{name}.jsonl", task_data / f"{name}.train.jsonl"]  # of which the latter are shown in prompts
        files[name] = hash_files([path for path in rows if path.is_file()])
    return stated | {"task_data": files}


def _versions(tasks: Mapping[str, Any]) -> dict[str, str]:
    return versions() | ({"lm_eval": importlib.metadata.version("lm_eval")} if tasks else {})


def _continued(fresh: Results, output: Path) -> Results:
    """What a file already holds of this run."""
    if not output.exists():
        folder = output.absolute().parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise OutputError(f"--output {str(output)!r} cannot be written: its folder must exist and be writable")
        return fresh
    advice = "choose another --output or delete it"
    try:
        earlier = Results.read(output)
    except FormatError as error:
        raise OutputError(f"--output {str(output)!r} exists and is no results file: {advice}") from error
    now = dataclasses.replace(fresh, models=[]).to_dict()
    before = dataclasses.replace(earlier, models=[]).to_dict()
    compared = ("protocol", "versions", "base", *(["machine"] if fresh.protocol["speed"] else []))
    check_same_run(output, before, {key: now[key] for key in compared}, advice)
    return earlier


def _open(path: str, name: str, protocol: Protocol) -> Loaded:
    model, tokenizer, file_bytes = open_for_scoring(path, dtype=protocol.dtype)
    return Loaded(name=name, model=model.to(protocol.device), tokenizer=tokenizer, file_bytes=file_bytes, path=path)


def _measured(opened: Loaded, beside: Loaded | None, results: Results, work: _Work) -> ModelResult:
    """Everything of one model; `beside` is the base, which may be the model itself."""
    base = None if beside is None or beside is opened else beside
    found = _described(opened)
    extra: dict[str, Any] = {}
    for text, content in work.texts.items():
        started = time.perf_counter()
        found.perplexity[text], extra[text] = _scored(opened, base, text, content, work)
        found.perplexity[text]["seconds"] = time.perf_counter() - started
    if work.tasks:
        protocol = work.protocol
        found.tasks = run_tasks(
            opened.model, opened.tokenizer, work.tasks, limit=protocol.limit, num_fewshot=protocol.num_fewshot,
            batch_size=protocol.batch_size, progress=lambda done, total: work.progress(f"{opened.name} requests", done, total),
        )  # fmt: skip
    faster = None
    if work.protocol.speed is not None:
        found.speed, faster = _timed(opened, base, work)
        found.memory = None if opened.path is None else _memory(opened.path, work)
    if base is not None:
        reference = results.named(base.name)
        assert reference is not None, "the base is measured first"
        found.comparison = compare(found, reference)
        for text, entry in extra.items():
            found.comparison["perplexity"][text] = entry
        if faster is not None:
            found.comparison["speed"] = faster
    return found


def _scored(opened: Loaded, base: Loaded | None, text: str, content: str, work: _Work) -> tuple[dict[str, Any], dict[str, Any]]:
    """The score of a text, and its comparison with the base."""
    windows, tokenizer = work.protocol.windows, opened.tokenizer
    ids = tokenize(tokenizer, content)
    total = len(windows.spans(len(ids)))

    def advance(done: int) -> None:
        work.progress(f"{opened.name} {text}", done, total)

    if base is None:
        score_of = score(opened.model, ids, windows, tokenizer.bos_token_id, advance)
        beside: dict[str, Any] = {}
    else:
        if not torch.equal(ids, tokenize(base.tokenizer, content)):
            raise UnsupportedModel(
                f"{opened.name} and {base.name} split {text} into different tokens: they cannot be compared by them"
            )
        score_of, beside = score_beside(opened.model, base.model, ids, windows, tokenizer.bos_token_id, advance)
    return score_of | per_word(score_of, tokenizer, ids, windows), beside


def _timed(opened: Loaded, base: Loaded | None, work: _Work) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Medians of a model, and how many times as fast as the base it is, by turns with it."""
    config = work.protocol.speed
    assert config is not None, "asked for"
    models = {opened.name: opened.model} if base is None else {base.name: base.model, opened.name: opened.model}
    for name, model in models.items():
        check_positions(model, repr(name), config)
    turns = alternate(
        models, prompt(opened.model, config.prompt_tokens), config,
        lambda done, total: work.progress(f"{opened.name} turns", done, total),
    )  # fmt: skip
    faster = None if base is None else ratios(turns[opened.name], turns[base.name])
    return summary(turns[opened.name], config.prompt_tokens), faster


def prompt(model: PreTrainedModel, length: int) -> Tensor:
    """Random token ids `[1, length]`, the same for every model with that vocabulary."""
    size = model.config.get_text_config().vocab_size
    return torch.randint(size, (1, length), generator=torch.Generator().manual_seed(0))


def _unquantized(config: PreTrainedConfig) -> PreTrainedConfig:
    """Of the dense model that a quantized one stands for."""
    dense = copy.deepcopy(config)
    del dense.quantization_config
    return dense


def _described(opened: Loaded) -> ModelResult:
    """What is known of a model without running it."""
    found = ModelResult(
        name=opened.name,
        fingerprint="",
        dtype=str(opened.model.dtype).removeprefix("torch."),
        file_bytes=opened.file_bytes,
        num_parameters=opened.num_parameters or count_parameters(opened.model),
        body_bits_per_weight=opened.body_bits_per_weight,
        compression=opened.compression,
    )
    if opened.path is None:
        return found
    found.fingerprint = fingerprint_of(opened.path)
    if opened.path.endswith(".gguf"):
        return found
    folder = base_folder(local_folder(opened.path))
    quantization = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    if quantization and quantization.get("quant_method") != QUANT_METHOD:  # packed tensors, each of many weights
        found.num_parameters = count_parameters(build_skeleton(_unquantized(opened.model.config), torch.float32))
    if quantization.get("quant_method") == QUANT_METHOD:
        inspected = inspect_folder(folder)
        found.num_parameters, found.body_bits_per_weight = inspected["num_parameters"], inspected["body_bits_per_weight"]
    if (folder / REPORT_NAME).exists():
        report = Report.read(folder / REPORT_NAME)
        found.num_parameters = report.num_parameters or found.num_parameters
        found.compression = {
            "methods": [stage["method"] for stage in report.recipe["stages"]],
            "seconds": sum(report.seconds.values()),
            "peak_memory_bytes": report.peak_memory_bytes,
            "is_verified": report.is_verified,
        }
    return found


def _memory(path: str, work: _Work) -> dict[str, Any]:
    """Loading time and memory of a fresh process that does nothing else."""
    config = work.protocol.speed
    assert config is not None, "asked for"
    arguments = {"model": path, "dtype": work.protocol.dtype, "device": work.protocol.device, "speed": asdict(config)}
    command = [sys.executable, "-P", "-m", "hf_compact.benchmark", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
        raise UnsupportedModel(f"{path} does not run in a fresh process: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def _fresh(model: str, dtype: str, device: str, speed: Mapping[str, int]) -> dict[str, Any]:
    """What the fresh process measures of itself."""
    process, is_cuda = psutil.Process(), torch.device(device).type == "cuda"
    before = 0 if is_cuda else process.memory_info().rss
    started = time.perf_counter()
    loaded = open_for_scoring(model, dtype=dtype)[0].to(device)
    seconds = time.perf_counter() - started
    after = torch.cuda.memory_allocated(device) if is_cuda else process.memory_info().rss
    generation(loaded, prompt(loaded, speed["prompt_tokens"]), speed["new_tokens"])
    peak = torch.cuda.max_memory_allocated(device) if is_cuda else peak_memory_bytes()
    return {"device": device, "load_seconds": seconds, "runtime_bytes": before, "loaded_bytes": after, "peak_bytes": peak}


if __name__ == "__main__":
    print(json.dumps(_fresh(**json.loads(sys.argv[1]))))  # noqa: T201 - the parent process reads it
