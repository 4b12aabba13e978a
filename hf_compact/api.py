"""The functions behind the command line: compress, plan, evaluate, inspect."""

import copy
import json
import logging
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from . import distributed, verify
from .arch import Architecture, dense_shape, describe
from .calibration import Calibration, builtin_text, from_batches, read_texts, sample, tokenize, windows
from .capture import BlockRunner, Method, Progress, compress_outside_, probe_inputs, stored_bytes
from .checkpoint import (
    FORMAT_VERSION,
    QUANT_METHOD,
    REPORT_NAME,
    Journal,
    TensorSource,
    check_finite,
    check_output,
    disk_errors,
    hash_files,
    write_text,
)
from .config import MethodConfig, Recipe
from .distillation import distill_
from .errors import CalibrationError, ConfigError, FormatError, OutputError, UnsupportedModel, VerificationError
from .hf.card import model_card, plot_layers
from .hf.export import save_dense, save_low_rank
from .hf.quantizer import CompactConfig, attach_, expect_, names_in, outermost
from .methods import LAYERS, METHODS
from .profiling import plot_profile, profile_
from .report import Report, peak_memory_bytes, return_freed_memory
from .scoring import max_positions, perplexity
from .select import select_stages
from .stored import open_linears
from .version import __version__

logger = logging.getLogger(__name__)

#: What imports and buffers of the libraries themselves take, beside tensors of the model.
RUNTIME_BYTES = 400_000_000
#: What of it the solver's matrices may take; wider inputs than that add to it.
SOLVER_BYTES = 100_000_000


@dataclass
class Dense:
    """A dense model that was opened for compression: in memory, or a skeleton with a source of tensors."""

    name: str
    model: PreTrainedModel
    load_tokenizer: Callable[[], PreTrainedTokenizerBase | None]
    """Loaded where it is needed: between the calibration text and the finished folder it would only take memory."""
    source: TensorSource | None
    fingerprint: str
    folder: Path | None


def compress(
    model: str | Path | PreTrainedModel, recipe: Recipe | Mapping[str, Any] | str | Path, *, output: str | Path | None = None,
    calibration: Sequence[str | Path] | Calibration = (), tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int | None = None, progress: Progress = lambda unit, done, total: None,
) -> Report:  # fmt: skip
    """Compress a model and, with an output folder, verify it in a fresh process.

    A model given by name is read block by block where its files allow it, needs `output`, and can be killed and run
    again: it goes on from the last finished block. A model given as an object is compressed in place; it stays the
    same class and is saved by `save_pretrained`.

    Args:
        model: Hub id, folder, `.gguf` file, or a model in memory.
        recipe: a `Recipe`, its dict, or a YAML file.
        output: folder to create.
        calibration: text files, or ready batches; without any, the documentation text that Python ships.
        tokenizer: for a model in memory with calibration from text.
        seed: replaces the recipe's.
        progress: called with the unit, finished and all units.

    Returns:
        The report; for an output folder it is also written there.

    Raises:
        CompactError: bad input, before anything is written; or a failed verification, after which the folder is
            marked as unverified.
    """
    recipe = as_recipe(recipe, seed)
    if isinstance(model, PreTrainedModel):
        return _compress_in_memory(model, recipe, output, calibration, tokenizer, progress)
    if output is None:
        raise ConfigError("output must name a folder when the model is given by name, got None")
    if distributed.world_size() > 1:
        raise ConfigError("compressing to a folder runs in one process; under torchrun give compress() a model in memory")
    output = Path(output)
    check_output_or_resume(output)
    started = time.perf_counter()
    dense = open_dense(model, recipe.dtype, is_whole=recipe.needs_whole_model)
    arch = describe(dense.model)
    prepared = prepare_calibration(calibration, tokenizer or dense.load_tokenizer(), recipe)
    return_freed_memory()
    check_inputs(dense.model, prepared)
    check_distillation(dense.model, recipe)
    if dense.source is None:
        _check_model_finite(dense.model)
    else:
        dense.source.check_finite()
    report = new_report(dense.name, dense.model, arch, recipe, prepared)
    report.seconds["open"] = time.perf_counter() - started
    fingerprint = {
        "recipe": recipe.to_dict(),
        "source": dense.fingerprint,
        "calibration": prepared.fingerprint,
        "versions": {name: value for name, value in report.versions.items() if name != "python"},
    }
    stages = [(METHODS[stage.method], stage) for stage in recipe.stages]
    select_stages(arch.roles, recipe.stages)  # a glob that matches nothing is found before a folder is made
    journal = Journal(output, fingerprint, num_units=1 + len(arch.blocks))
    runner = BlockRunner(dense.model, arch, stages, prepared, report, dense.source, journal)
    logits = _run(runner, recipe, prepared, progress)
    table = _ordered(runner.table, dense.model)
    config = _final_config(dense.model, table, recipe)
    report.file_bytes = journal.finish(
        lambda folder: _write_side_files(folder, dense.model, config, dense.load_tokenizer(), recipe)
    )
    try:
        _verify(output, prepared, logits, report, is_causal_lm(dense.model))
    finally:
        if (output / REPORT_NAME).exists():
            journal.close()
    return report


def plan(model: str | Path, recipe: Recipe | Mapping[str, Any] | str | Path, seed: int | None = None) -> dict[str, Any]:
    """A dry run: what `compress` would do, without reading or writing weights where the files allow it.

    Returns:
        `layers` (name, role, shape, method, dense and compressed bytes), `skipped` (name, reason), and totals: bytes
        before and after, expected peak memory and minutes on this machine.
    """
    recipe = as_recipe(recipe, seed)
    dense = open_dense(model, recipe.dtype)
    check_distillation(dense.model, recipe)
    arch = describe(dense.model)
    width = dense.model.dtype.itemsize
    num_parameters = count_parameters(dense.model)
    memory, minutes = peak_memory_estimate(dense, arch, recipe), minutes_estimate(dense.model, arch, recipe)
    stages = [(METHODS[stage.method], stage) for stage in recipe.stages]
    chosen = select_stages(arch.roles, recipe.stages)
    parameters = [name for name, _ in dense.model.named_parameters()]
    made, _ = compress_outside_(dense.model, arch, stages, LAYERS, solve=False)
    layers, skipped = [], []

    def add(name: str, role: str, method: str, old: torch.nn.Module, new: torch.nn.Module) -> None:
        layers.append(
            {
                "name": name,
                "role": role,
                "shape": list(dense_shape(old)),
                "method": method,
                "dense_bytes": old.weight.numel() * width,
                "compressed_bytes": stored_bytes(new),
            }
        )

    for name in (arch.embedding, arch.head):
        if name in made:
            add(name, made[name].role, made[name].config.method, made[name].old, made[name].new)
        elif name is not None:
            skipped.append({"name": name, "reason": "the recipe leaves it in the model's dtype"})
    for name, role in arch.roles.items():
        old = dense.model.get_submodule(name)
        mine = [stage for stage, names in zip(stages, chosen, strict=True) if name in names]
        if not mine:
            skipped.append({"name": name, "reason": "excluded by the recipe"})
            continue
        add(name, role, "+".join(config.method for _, config in mine), old, _empty(_on_meta(old), mine))
    handled = {layer["name"] for layer in layers} | {entry["name"] for entry in skipped} | set(arch.tied)
    rest = [name for name in parameters if name.rpartition(".")[0] not in handled]
    skipped += [{"name": name, "reason": "not a Linear of a block: stays in the model's dtype"} for name in rest]
    before = num_parameters * width
    after = before - sum(layer["dense_bytes"] - layer["compressed_bytes"] for layer in layers)
    return {
        "model": dense.name,
        "family": arch.family,
        "is_known_family": arch.is_known,
        "is_streamed": dense.source is not None and not recipe.needs_whole_model,
        "recipe": recipe.to_dict(),
        "layers": layers,
        "skipped": skipped,
        "num_parameters": num_parameters,
        "bytes_before": before,
        "bytes_after": after,
        "body_bits_per_weight": _body_bits(layers, width),
        "peak_memory_bytes": memory,
        "minutes": minutes,
    }


def evaluate(
    models: Sequence[str | Path], texts: Sequence[str | Path], num_windows: int | None = 40, window_length: int = 1024,
    progress: Callable[[str, int], None] = lambda name, done: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Perplexity of each model on each text, with the protocol of `scoring`.

    A model given as float32 is scored in bfloat16, the dtype of the protocol. Ratios are to the first model.

    Returns:
        One dict per model and text: `model`, `text`, `file_bytes`, `dtype`, `seconds`, `ratio`, and what `scoring.perplexity` returns.

    Raises:
        CompactError: a model cannot be opened or a text cannot be read.
    """
    contents = {str(path): read_texts([path]) for path in texts}
    rows: list[dict[str, Any]] = []
    first: dict[str, float] = {}
    for name in models:
        model, tokenizer, file_bytes = open_for_scoring(name)
        for path, text in contents.items():
            started = time.perf_counter()
            score = perplexity(
                model, tokenize(tokenizer, text), window_length, num_windows, lambda done, name=name: progress(str(name), done)
            )
            first.setdefault(path, score["perplexity"])
            rows.append(
                {
                    "model": str(name),
                    "text": path,
                    "file_bytes": file_bytes,
                    "dtype": str(model.dtype).removeprefix("torch."),
                    "ratio": score["perplexity"] / first[path],
                    "seconds": time.perf_counter() - started,
                    **score,
                }
            )
        del model
    return rows


def profile(
    model: str | Path, recipe: Recipe | Mapping[str, Any] | str | Path, *, output: str | Path, ratios: Sequence[float] = (0.25, 0.5, 0.75),
    calibration: Sequence[str | Path] | Calibration = (), seed: int | None = None,
    progress: Progress = lambda unit, done, total: None,
) -> dict[str, Any]:  # fmt: skip
    """What compressing each Linear alone costs a causal language model, at several sizes.

    Writes the table to `output`, which the setting `profile` of a `tensor_network` stage reads, and a heat map beside it
    with the ending `.png`. Killed at any time, the same call goes on.

    Args:
        model: Hub id, folder or `.gguf` file.
        recipe: its first stage has a `keep_ratio`, which is replaced by each ratio.
        output: JSON file.
        ratios: kept parameters / dense parameters.
        calibration: text files; the end of the text, which no gram matrix sees, is what the divergence is taken on.
        seed: replaces the recipe's.
        progress: called with the Linear, finished and all Linears.

    Returns:
        As `profiling.profile_`.

    Raises:
        CompactError: bad input, before anything is measured.
    """
    recipe, output = as_recipe(recipe, seed), Path(output)
    stage = recipe.stages[0]
    if not hasattr(stage, "keep_ratio"):
        raise ConfigError(f"recipe.stages[0] must be a method with a keep_ratio, like tensor_network, got {stage.method}")
    if not ratios or not all(0 < ratio < 1 for ratio in ratios):
        raise ConfigError(f"ratios must be in (0, 1), got {list(ratios)}")
    if not output.absolute().parent.is_dir() or output.is_dir() or output.suffix != ".json":
        raise OutputError(f"output {str(output)!r} must name a .json file in a folder that exists")
    dense = open_dense(model, recipe.dtype, is_whole=True)
    if not is_causal_lm(dense.model):
        raise UnsupportedModel(f"model {str(model)!r} is a {type(dense.model).__name__}: a profile needs a causal language model")
    prepared = prepare_calibration(calibration, dense.load_tokenizer(), recipe)
    check_inputs(dense.model, prepared)
    if prepared.held_out is None:
        raise CalibrationError("a profile takes the divergence on the end of a text: give calibration as text files")
    _check_model_finite(dense.model)
    fingerprint = {
        "stage": stage.to_dict(), "ratios": list(ratios), "source": dense.fingerprint, "calibration": prepared.fingerprint
    }  # fmt: skip
    length = min(len(prepared.held_out), recipe.calibration.sequence_length)
    probes = list(windows(prepared.held_out, length, None))
    found = profile_(
        dense.model, (METHODS[stage.method], stage), ratios, prepared.batches, probes, output, fingerprint, progress
    )  # fmt: skip
    with disk_errors(output.parent):
        plot_profile(found, output.with_suffix(".png"))
    return found


def export(folder: str | Path, output: str | Path, kind: Literal["dense", "low_rank"] = "dense") -> None:
    """Write a compressed folder as one that loads without this library.

    Args:
        folder: compressed.
        output: folder to create.
        kind: `dense`, or `low_rank`: two plain Linears for each low-rank layer, under `trust_remote_code=True`.

    Raises:
        CompactError: the folder is not compressed by this library, or has layers that `kind` cannot say.
    """
    folder, output = Path(folder), Path(output)
    if kind not in ("dense", "low_rank"):
        raise ConfigError(f"kind must be one of dense, low_rank, got {kind!r}")
    inspect_folder(folder)
    check_output(output)
    model = verify.load_model(folder)
    with disk_errors(output):
        if kind == "dense":
            save_dense(model, output)
        else:
            save_low_rank(model, output, "AutoModelForCausalLM" if is_causal_lm(model) else "AutoModel")
        tokenizer = _tokenizer(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(output)


def inspect_folder(folder: str | Path) -> dict[str, Any]:
    """What a compressed folder holds, read from safetensors headers and JSON files only.

    Returns:
        `layers` (name, layer, settings, shape, bytes, bits per weight) and totals; `is_verified` from the report.

    Raises:
        FormatError: the folder is not a complete compressed model.
    """
    folder = Path(folder)
    config = _read_config(folder)
    quantization = getattr(config, "quantization_config", None)
    if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
        raise FormatError(f"{folder} is not compressed by hf_compact: its config.json has no quantization_config of ours")
    del config.quantization_config
    skeleton = build_skeleton(config, torch.bfloat16)
    table = names_in(skeleton, CompactConfig(**quantization).modules)
    source = TensorSource.in_folder(folder).rename_for(skeleton)
    expect_(copy.deepcopy(skeleton), table, source.files)
    headers = source.headers()
    layers = []
    for name in outermost(table):
        spec = {key: value for key, value in table[name].items() if key != "layer"}
        if "tied_to" in spec:
            continue
        shape = dense_shape(skeleton.get_submodule(name))
        size = sum(nbytes for key, (_, _, nbytes) in headers.items() if key.startswith(f"{name}.") and key != f"{name}.bias")
        parts = [table[part] for part in table if part.startswith(f"{name}.")]
        kinds = dict.fromkeys(part["layer"] for part in [table[name], *parts])
        spec |= {key: value for part in parts for key, value in part.items() if key != "layer"}
        layers.append(
            {
                "name": name,
                "layer": "+".join(kinds),
                **spec,
                "shape": list(shape),
                "bytes": size,
                "bits_per_weight": 8 * size / shape.numel(),
            }
        )
    file_bytes = sum(path.stat().st_size for path in source.files)
    num_parameters = count_parameters(skeleton)
    outside = {name for name in table if not any(name.startswith(b + ".") for b in describe(skeleton).blocks)}
    body = [layer for layer in layers if layer["name"] not in outside]
    weights = sum(torch.Size(layer["shape"]).numel() for layer in body)
    report = folder / REPORT_NAME
    return {
        "folder": str(folder),
        "format_version": FORMAT_VERSION,
        "layers": layers,
        "num_parameters": num_parameters,
        "file_bytes": file_bytes,
        "file_bits_per_weight": 8 * file_bytes / num_parameters,
        "body_bits_per_weight": 8 * sum(layer["bytes"] for layer in body) / weights if weights else 0.0,
        "share_of_fp32": file_bytes / (4 * num_parameters),
        "share_of_bf16": file_bytes / (2 * num_parameters),
        "is_verified": report.exists() and Report.read(report).is_verified,
    }


# Opening.


def as_recipe(recipe: Recipe | Mapping[str, Any] | str | Path, seed: int | None = None) -> Recipe:
    """A recipe from any of its forms, with another seed if one is given."""
    if isinstance(recipe, str | Path):
        recipe = Recipe.from_yaml(recipe)
    elif not isinstance(recipe, Recipe):
        recipe = Recipe.from_dict(dict(recipe))
    return recipe if seed is None else Recipe.from_dict({**recipe.to_dict(), "seed": seed})


def open_dense(model: str | Path, dtype: str = "auto", is_whole: bool = False) -> Dense:
    """Open a dense model by Hub id, folder or `.gguf` file; with `is_whole` all of it is in memory.

    Raises:
        UnsupportedModel: it is compressed already, or its class is not in transformers.
        ConfigError: it is neither a folder nor a file nor a Hub id that can be reached.
    """
    name = str(model)
    if name.endswith(".gguf"):
        return _open_gguf(Path(name), torch.bfloat16 if dtype == "auto" else getattr(torch, dtype))
    folder = local_folder(name)
    config = _read_config(folder)
    if getattr(config, "quantization_config", None):
        quantization = config.quantization_config
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        raise UnsupportedModel(f"model {name!r} is compressed already (quant_method {method!r}): give the dense model")
    source = TensorSource.in_folder(folder)
    stored = {kind for kind, _, _ in source.headers().values()}
    auto = config.dtype or (torch.bfloat16 if "BF16" in stored else torch.float16 if "F16" in stored else torch.float32)
    chosen = auto if dtype == "auto" else getattr(torch, dtype)
    skeleton = build_skeleton(config, chosen)
    try:
        source.rename_for(skeleton)
    except FormatError as error:
        logger.info("%s; the model is loaded whole", error)
        skeleton, source = verify.load_model(folder, dtype=chosen), None
    else:
        source.check_fits(skeleton)
        if is_whole:
            skeleton, source = verify.load_model(folder, dtype=chosen), None
    if skeleton.can_generate() and (folder / "generation_config.json").exists():
        skeleton.generation_config = GenerationConfig.from_pretrained(folder)
    skeleton.eval()
    fingerprint = hash_files([*TensorSource.in_folder(folder).files, folder / "config.json"])
    return Dense(name, skeleton, partial(_tokenizer, folder), source, fingerprint, folder)


def open_for_scoring(model: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, int]:
    """A dense or compressed model ready to be scored, its tokenizer and the bytes of its weight files."""
    name = str(model)
    if name.endswith(".gguf"):
        dense = _open_gguf(Path(name), torch.bfloat16)
        return dense.model, dense.load_tokenizer(), Path(name).stat().st_size
    folder = local_folder(name)
    config = _read_config(folder)
    dtype = torch.bfloat16 if config.dtype in (None, torch.float32) else config.dtype
    loaded = verify.load_model(folder, dtype=dtype).eval()
    if not is_causal_lm(loaded):
        raise UnsupportedModel(f"model {name!r} is a {type(loaded).__name__}: perplexity needs a causal language model")
    tokenizer = _tokenizer(folder)
    if tokenizer is None:
        raise ConfigError(f"model {name!r} has no tokenizer in its folder, which scoring text needs")
    return loaded, tokenizer, sum(path.stat().st_size for path in TensorSource.in_folder(folder).files)


def local_folder(name: str) -> Path:
    """The folder of a model: itself, or the local copy of a Hub repository.

    Raises:
        ConfigError: neither exists, or the Hub cannot be reached.
    """
    if Path(name).is_dir():
        return Path(name)
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"model {name!r} is no folder or .gguf file here, and not a Hub id that can be fetched: {reason}"
        ) from error


def build_skeleton(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model that a config describes, parameters on meta, buffers real.

    Raises:
        UnsupportedModel: the config names no class of transformers.
    """
    names = config.architectures or []
    cls = getattr(transformers, names[0], None) if names else None
    if cls is None:
        raise UnsupportedModel(f"config.architectures must name a class of transformers, got {names}")
    with init_empty_weights(include_buffers=False):
        return cls._from_config(config, dtype=dtype)


def prepare_calibration(
    calibration: Sequence[str | Path] | Calibration, tokenizer: PreTrainedTokenizerBase | None, recipe: Recipe
) -> Calibration:
    """Calibration batches from text files, from ready batches, or from Python's own documentation text.

    Raises:
        CalibrationError: no tokenizer, or a text that is missing, empty or too short.
    """
    if isinstance(calibration, Calibration):
        return calibration
    if isinstance(calibration, str | Path):
        calibration = [calibration]
    if calibration and isinstance(calibration[0], Mapping):
        return from_batches(calibration)
    if tokenizer is None:
        raise CalibrationError(
            "calibration from text needs a tokenizer, and the model's folder has none: pass tokenizer or batches"
        )
    text = read_texts(calibration) if calibration else builtin_text("calibration")
    names = [Path(path).name for path in calibration] or ["pydoc_data.topics (calibration part)"]
    return sample(tokenizer, text, recipe.calibration, recipe.seed, names, recipe.distillation)


def check_inputs(model: PreTrainedModel, calibration: Calibration) -> None:
    """Raise CalibrationError if an encoder-decoder gets nothing to decode, or sequences are longer than the model allows."""
    if model.config.is_encoder_decoder and any("decoder_input_ids" not in batch for batch in calibration.batches):
        raise CalibrationError(f"{model.config.model_type} has a decoder: give calibration batches with decoder_input_ids")
    longest = max((batch["input_ids"].shape[1] for batch in calibration.batches if "input_ids" in batch), default=0)
    positions = max_positions(model)
    if positions is not None and longest > positions:
        raise CalibrationError(
            f"calibration.sequence_length must be at most {positions}, the positions of the model, got {longest}"
        )


def check_distillation(model: PreTrainedModel, recipe: Recipe) -> None:
    """Raise ConfigError if a distillation is asked for where it cannot run."""
    if recipe.distillation is None:
        return
    if distributed.world_size() > 1:
        raise ConfigError("recipe.distillation runs in one process: set it to null under torchrun")
    if not is_causal_lm(model):
        name = type(model).__name__
        raise ConfigError(f"recipe.distillation compares next-token distributions, which a {name} has not: set it to null")


def check_output_or_resume(output: Path) -> None:
    """Raise OutputError unless the output can be created or belongs to an unfinished run."""
    if output.name in ("", ".."):
        raise OutputError(f"output {str(output)!r} must name a folder to create")
    if not Journal.is_unfinished(output):
        check_output(output)


def is_causal_lm(model: PreTrainedModel) -> bool:
    """Whether perplexity means something for the model."""
    return model.get_output_embeddings() is not None and not model.config.is_encoder_decoder and model.can_generate()


def count_parameters(model: PreTrainedModel) -> int:
    """Parameters of a dense model, tied ones once."""
    tied = model.get_expanded_tied_weights_keys(all_submodels=True).keys()
    return sum(p.numel() for name, p in model.named_parameters() if name not in tied)


def new_report(name: str, model: PreTrainedModel, arch: Architecture, recipe: Recipe, calibration: Calibration) -> Report:
    """A report with everything that is known before the first block."""
    report = Report(
        model=name,
        family=arch.family,
        auto_class="AutoModelForCausalLM" if is_causal_lm(model) else "AutoModel",
        recipe=recipe.to_dict(),
        calibration={
            "sources": list(calibration.sources),
            "num_tokens": calibration.num_tokens,
            "sha256": calibration.fingerprint,
        },
        num_parameters=count_parameters(model),
        versions={
            "hf_compact": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    )
    if not arch.is_known:
        report.notes.append(f"model_type {arch.family!r} is not in the table of families: blocks were found by structure")
    return report


# Estimates.


def peak_memory_estimate(dense: Dense, arch: Architecture, recipe: Recipe) -> int:
    """Expected peak resident bytes: what stays resident, two dense blocks, the activations, the libraries."""
    width = dense.model.dtype.itemsize
    inside = {block: sum(p.numel() for p in dense.model.get_submodule(block).parameters()) for block in arch.blocks}
    outside = count_parameters(dense.model) - sum(inside.values())
    resident = sum(inside.values()) if recipe.needs_whole_model or dense.source is None else 2 * max(inside.values())
    hidden = (
        recipe.calibration.num_sequences * recipe.calibration.sequence_length * dense.model.config.get_text_config().hidden_size
    )
    shapes = [dense_shape(dense.model.get_submodule(name)) for name in arch.roles]
    solver = 5 * 8 * max(columns for _, columns in shapes) ** 2
    training = 0
    if any(stage.needs_whole_model for stage in recipe.stages):  # a gram matrix of each Linear, and one sequence's gradients
        training = 4 * sum(columns**2 for _, columns in shapes) + _activation_bytes(dense.model, shapes, recipe, 1)
    if recipe.distillation is not None:  # the dense model beside the decoded integers, in bytes and as they are multiplied
        weights = sum(shape.numel() for shape in shapes)
        batch = _activation_bytes(
            dense.model, shapes, recipe, min(recipe.distillation.batch_size, recipe.distillation.num_sequences)
        )
        training = max(training, width * (outside + 2 * weights) + weights + batch)
    return width * (outside + resident + hidden) + training + max(0, solver - SOLVER_BYTES) + RUNTIME_BYTES


def _activation_bytes(model: PreTrainedModel, shapes: Sequence[torch.Size], recipe: Recipe, batch_size: int) -> int:
    """What a backward pass keeps: inputs and outputs of every Linear, and a few float32 copies of the logits."""
    config = model.config.get_text_config()
    per_token = model.dtype.itemsize * sum(rows + columns for rows, columns in shapes) + 4 * 4 * getattr(config, "vocab_size", 0)
    return batch_size * recipe.calibration.sequence_length * per_token


def minutes_estimate(model: PreTrainedModel, arch: Architecture, recipe: Recipe) -> float:
    """Expected minutes on this machine, from the speed of one matrix product in the model's dtype and in float32."""
    tokens = recipe.calibration.num_sequences * recipe.calibration.sequence_length
    shapes = [dense_shape(model.get_submodule(name)) for name in arch.roles]
    forward = 2 * tokens * sum(rows * columns for rows, columns in shapes)
    needs = any(stage.needs_calibration for stage in recipe.stages)
    grams = 2 * tokens * sum(columns**2 for _, columns in shapes) / 2 if needs else 0
    solve = sum(columns * (4e-4 + 2e-8 * rows * columns / 100) for rows, columns in shapes) if needs else 0
    passes = 5.0 if needs else 2.0  # attention and elementwise work take about as long as the products of small models
    if any(stage.needs_whole_model for stage in recipe.stages):  # gradients of a part of the calibration set
        passes += 3.0
    if recipe.distillation is not None:  # forward and backward, and the dense model's forward
        trained = recipe.distillation.num_sequences * recipe.distillation.epochs
        passes += 6.0 * trained / recipe.calibration.num_sequences
    seconds = passes * forward / _speed(model.dtype) + grams / _speed(torch.float32) + solve
    return seconds / 60


def _speed(dtype: torch.dtype) -> float:
    """Floating point operations per second of a matrix product of a usual size."""
    a, b = torch.ones(1024, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    a @ b
    started = time.perf_counter()
    for _ in range(4):
        a @ b
    return 4 * 2 * 1024**3 / (time.perf_counter() - started)


# Inside compress.


def _compress_in_memory(
    model: PreTrainedModel, recipe: Recipe, output: str | Path | None, calibration: Sequence[str | Path] | Calibration,
    tokenizer: PreTrainedTokenizerBase | None, progress: Progress,
) -> Report:  # fmt: skip
    if getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedModel(
            f"model is quantized already ({model.hf_quantizer.quantization_config.quant_method}): give the dense model"
        )
    if output is not None:
        check_output(Path(output))
    if any(isinstance(module, tuple(LAYERS.values())) for module in model.modules()):
        raise UnsupportedModel("model holds compressed layers of a run that did not finish: load the dense model again")
    arch = describe(model)
    select_stages(arch.roles, recipe.stages)
    prepared = prepare_calibration(calibration, tokenizer, recipe)
    check_inputs(model, prepared)
    check_distillation(model, recipe)
    _check_model_finite(model)
    report = new_report(model.config.name_or_path or type(model).__name__, model, arch, recipe, prepared)
    stages = [(METHODS[stage.method], stage) for stage in recipe.stages]
    runner = BlockRunner(model, arch, stages, prepared, report)
    logits = _run(runner, recipe, prepared, progress)
    attach_(model, _ordered(runner.table, model), recipe.stages)
    if output is not None and distributed.rank() == 0:
        model.save_pretrained(output)
        _write_side_files(Path(output), model, model.config, tokenizer, recipe)
        report.file_bytes = sum(path.stat().st_size for path in Path(output).glob("*.safetensors"))
        _verify(Path(output), prepared, logits, report, is_causal_lm(model))
    distributed.barrier()
    return report


def _run(runner: BlockRunner, recipe: Recipe, calibration: Calibration, progress: Progress) -> torch.Tensor:
    """All stages, then the distillation; the output for the probe."""
    if recipe.distillation is None:
        return runner.run(progress)
    if runner.journal is not None and runner.journal.is_replaced:
        runner.report.distillation = runner.journal.entries[-1]["distillation"]
        return runner.run(progress)
    teacher = copy.deepcopy(runner.model)
    runner.run(progress)
    started = time.perf_counter()
    losses = distill_(
        runner.model, teacher, calibration.distillation or calibration.batches, recipe.distillation,
        lambda done, total: progress("distillation", done, total),
    )  # fmt: skip
    first, last = losses[:8], losses[-8:]
    runner.report.distillation = {"steps": len(losses), "first": sum(first) / len(first), "last": sum(last) / len(last)}
    runner.report.seconds["distill"] = time.perf_counter() - started
    return runner.rewrite()


def _verify(output: Path, calibration: Calibration, logits: torch.Tensor, report: Report, is_causal: bool) -> None:
    """Verify, then write report, card and plot whatever the outcome; raise if it failed."""
    failure: VerificationError | None = None
    try:
        held_out = calibration.held_out if is_causal else None
        report.verification = verify.verify(output, probe_inputs(calibration), logits, held_out)
        report.seconds["verify"] = report.verification.pop("seconds")
    except VerificationError as error:
        failure = error
        report.verification = {"verified": False, "reason": str(error)}
    report.peak_memory_bytes = max(report.peak_memory_bytes, peak_memory_bytes())
    with disk_errors(output):  # the report comes last: where it is, the rest is
        write_text(output / "README.md", model_card(report))
        plot_layers(report, output / "layers.png")
        write_text(output / REPORT_NAME, json.dumps(report.to_dict(), indent=2) + "\n")
    if failure is not None:
        raise failure


def _final_config(model: PreTrainedModel, table: Mapping[str, Any], recipe: Recipe) -> PreTrainedConfig:
    config = model.config
    config.quantization_config = CompactConfig(modules=table, stages=recipe.stages)
    config.dtype = model.dtype
    config.architectures = [type(model).__name__]
    return config


#: `save_pretrained` copies the file of a class that came through `auto_map`, so the class has to be the stub's own.
_STUB = """\"\"\"Imports the library that reads this checkpoint.\"\"\"

import hf_compact
import transformers


class {name}(transformers.{name}):
    pass
"""


def _write_side_files(
    folder: Path, model: PreTrainedModel, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None, recipe: Recipe
) -> None:
    """Config, generation config, tokenizer, recipe and, if wanted, the stub."""
    if recipe.auto_map:
        name = config.architectures[0]
        auto = "AutoModelForCausalLM" if is_causal_lm(model) else "AutoModel"
        config = copy.deepcopy(config)
        config.auto_map = {auto: f"modeling_hf_compact.{name}"}
        write_text(folder / "modeling_hf_compact.py", _STUB.format(name=name))
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    write_text(folder / "recipe.json", json.dumps(recipe.to_dict(), indent=2) + "\n")


def _ordered(table: Mapping[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """The table in the order of the model, sources of ties before what is tied to them."""
    order = {name: position for position, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
    return dict(sorted(table.items(), key=lambda item: ("tied_to" in item[1], order[item[0]])))


def _check_model_finite(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        check_finite(name, parameter)


def _open_gguf(path: Path, dtype: torch.dtype) -> Dense:
    if not path.is_file():
        raise ConfigError(f"model {str(path)!r} does not exist")
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
        )
    except (OSError, ValueError, LookupError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise FormatError(f"model {str(path)!r} cannot be read as a GGUF file: {type(error).__name__}: {reason}") from error
    # What is left of the GGUF loader would make save_pretrained refuse.
    for name in ("hf_quantizer", "quantization_method"):
        model.__dict__.pop(name, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized = False
    model.config.architectures = config.architectures or [type(model).__name__]
    load_tokenizer = partial(AutoTokenizer.from_pretrained, path.parent, gguf_file=path.name)
    return Dense(str(path), model.eval(), load_tokenizer, None, hash_files([path]), None)


def _read_config(folder: Path) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise FormatError(f"{folder} has no config.json that transformers can read: {str(error).splitlines()[0]}") from error


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    return AutoTokenizer.from_pretrained(folder) if any((folder / name).exists() for name in names) else None


def _on_meta(module: torch.nn.Module) -> torch.nn.Linear:
    out_features, in_features = dense_shape(module)
    return torch.nn.Linear(in_features, out_features, bias=module.bias is not None, device="meta", dtype=module.weight.dtype)


def _empty(linear: torch.nn.Linear, stages: Sequence[tuple[Method, MethodConfig]]) -> torch.nn.Module:
    """What the stages make of a Linear, without its values; those that come later take what it is built of."""
    (method, config), *rest = stages
    module = method.compress_linear(linear, None, config, solve=False)
    for name in open_linears(module) if rest else ():
        module.set_submodule(name, _empty(module.get_submodule(name), rest))
    return module


def _body_bits(layers: Sequence[Mapping[str, Any]], width: int) -> float:
    body = [layer for layer in layers if layer["role"] not in ("embedding", "head")]
    weights = sum(layer["dense_bytes"] for layer in body) / width
    return 8 * sum(layer["compressed_bytes"] for layer in body) / weights if weights else 0.0
