"""The functions behind the command line: compress, plan, recover, export, inspect."""

import copy
import hashlib
import json
import logging
import platform
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftConfig, TaskType
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
from .arch import Architecture, dense_shape, describe, on_meta
from .calibration import Calibration, builtin_text, from_batches, read_texts, sample, windows
from .capture import BlockRunner, Method, Progress, arrange_, compress_outside_, probe_inputs, stored_bytes
from .checkpoint import (
    FORMAT_VERSION,
    QUANT_METHOD,
    REPORT_NAME,
    Journal,
    TensorSource,
    check_finite,
    check_new_file,
    check_new_folder,
    check_output,
    disk_errors,
    hash_files,
    whole_folder,
    write_text,
)
from .config import CalibrationConfig, DistillationConfig, MethodConfig, Recipe, check_device, check_dtype
from .distillation import distill_
from .errors import CalibrationError, ConfigError, FormatError, NothingMatched, OutputError, UnsupportedModel, VerificationError
from .footprint import Comparison, Footprint, count
from .groups import find_groups, settle_
from .hf.card import scores_of, write_card
from .hf.export import save_bitnet, save_compressed_tensors, save_dense, save_low_rank, save_onnx
from .hf.gguf import GgufKind, save_gguf
from .hf.hub import push_folder
from .hf.quantizer import CompactConfig, attach_, expect_, names_in, outermost
from .measurement import Alternative, ErrorTable, Item, divergence_between, measure, propose
from .methods import LAYERS, METHODS
from .methods.compacter import CompacterConfig
from .planner import BudgetPlan, Point, Programme, Target, files_bytes, find_items, plot_front
from .products import fast_products
from .profiling import plot_profile, profile_
from .recovery import train_adapter
from .report import Report, peak_memory_bytes, return_freed_memory
from .results import Results
from .scoring import is_causal_lm, max_positions, perplexity
from .select import select_stages
from .speed import SpeedConfig, check_positions, compare_by_turns
from .stored import CodedModule, open_linears
from .version import __version__

logger = logging.getLogger(__name__)

#: What a compressed folder can be written as.
ExportKind = Literal[
    "dense", "low_rank", "bitnet", "compressed-tensors", "gguf", "f16", "q8_0", "q4_0", "q4_1", "tq1_0", "tq2_0", "onnx"
]
#: Of these, and of onnx, an ordinary model can be the source too, a pruned one for example.
GGUF_KINDS = ("gguf", *get_args(GgufKind))
#: What imports and buffers of the libraries themselves take, beside tensors of the model.
RUNTIME_BYTES = 400_000_000
#: Tokens that the planner measures errors on, and how many times more gram matrices are made from.
PLAN_TOKENS = 4096
GRAM_TOKENS_PER_TOKEN = 2
#: Where on the front, from the smallest file to the largest, a validation measures beside the recipe itself.
VALIDATED_SHARES = (0.2, 0.5, 0.8)
#: Candidates that come with the library.
BUILT_IN_CANDIDATES = {path.stem: path for path in sorted((Path(__file__).parent / "candidates").glob("*.yaml"))}
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


@fast_products()
def compress(
    model: str | Path | PreTrainedModel, recipe: Recipe | Mapping[str, Any] | str | Path, *, output: str | Path | None = None,
    calibration: Sequence[str | Path] | Calibration = (), tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int | None = None, device: str | None = None, progress: Progress = lambda unit, done, total: None,
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
        device: where a model given by name runs, by default on the CPU, as solvers always do. A model in memory stays where it is.
        progress: called with the unit, finished and all units.

    Returns:
        The report; for an output folder it is also written there.

    Raises:
        CompactError: bad input, before anything is written; or a failed verification, after which the folder is
            marked as unverified.
    """
    recipe = as_recipe(recipe, seed)
    if isinstance(model, PreTrainedModel):
        if device is not None:
            raise ConfigError(
                f"device is for a model given by name, one in memory stays on its own ({model.device}), got {device!r}"
            )
        return _compress_in_memory(model, recipe, output, calibration, tokenizer, progress)
    if output is None:
        raise ConfigError("output must name a folder when the model is given by name, got None")
    device = check_device("cpu" if device is None else device, needs_double=True)
    if distributed.world_size() > 1:
        raise ConfigError("compressing to a folder runs in one process; under torchrun give compress() a model in memory")
    output = Path(output)
    check_output_or_resume(output)
    started = time.perf_counter()
    dense = open_dense(model, recipe.dtype, is_whole=recipe.needs_whole_model)
    arch = describe(dense.model)
    prepared = prepare_calibration(calibration, tokenizer or dense.load_tokenizer(), recipe).to(device)
    return_freed_memory()
    check_inputs(dense.model, prepared)
    check_training(recipe)
    if dense.source is None:
        _check_model_finite(dense.model.to(device))
    else:
        dense.source.check_finite()
    report = new_report(dense.name, dense.model, arch, recipe, prepared)
    report.seconds["open"] = time.perf_counter() - started
    stages = [(METHODS[stage.method], stage) for stage in recipe.stages]
    check_nesting(arch, recipe)  # a glob that matches nothing is found before a folder is made
    check_outside(dense.model, arch, recipe)
    check_cuts(dense.model, arch, recipe)
    before = _footprint(dense.model, recipe)
    arch, dropped = _shorten(dense.model, arch, recipe, prepared.batches, report.notes)
    fingerprint = {
        "recipe": recipe.to_dict(),
        "source": dense.fingerprint,
        "calibration": prepared.fingerprint,
        "versions": versions(),
        "dropped": dropped,  # chosen anew by every run, which another device may round to other blocks
        **_hashes_of_profiles(recipe),
    }
    with Journal(output, fingerprint, num_units=1 + len(arch.blocks)) as journal:
        runner = BlockRunner(dense.model, arch, stages, prepared, report, dense.source, journal, recipe.reconstruction)
        logits = _run(runner, recipe, prepared, progress)
        table = _ordered(_settled(runner), dense.model)
        _compare(before, dropped, dense.model, report)
        config = _final_config(dense.model, table, recipe)
        report.file_bytes = journal.finish(
            lambda folder: _write_side_files(folder, dense.model, config, dense.load_tokenizer(), recipe)
        )
        try:
            _verify(output, prepared, logits, report, is_causal_lm(dense.model), device)
        finally:
            if (output / REPORT_NAME).exists():
                journal.close()
    return report


@fast_products()
def plan(model: str | Path, recipe: Recipe | Mapping[str, Any] | str | Path, seed: int | None = None) -> dict[str, Any]:
    """A dry run: what `compress` would do, without reading or writing weights where the files allow it.

    Returns:
        `layers` (name, role, shape, method, dense and compressed bytes), `skipped` (name, reason), and totals: bytes
        before and after, expected peak memory and minutes on this machine.
    """
    recipe = as_recipe(recipe, seed)
    dense = open_dense(model, recipe.dtype)
    check_training(recipe)
    arch = describe(dense.model)
    width = dense.model.dtype.itemsize
    num_parameters = count_parameters(dense.model)
    memory, minutes = peak_memory_estimate(dense, arch, recipe), minutes_estimate(dense.model, arch, recipe)
    stages = [(METHODS[stage.method], stage) for stage in recipe.stages]
    chosen = check_nesting(arch, recipe)
    arch, dropped = _shorten(dense.model, arch, recipe, (), [])  # without inputs the first ones go: all are of one size
    chosen = select_stages(arch.roles, recipe.stages) if dropped else chosen
    num_left = count_parameters(dense.model)
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
    cut = _shapes_of(dense.model)
    for (method, stage), names in zip(stages, chosen, strict=True):
        if method.cut_block is not None:
            find_groups(cut)
            for block in arch.blocks:
                method.cut_block(cut, arch, block, names, stage, None)
    arranged = arrange_(cut, arch, arch.blocks, stages, chosen, solve=False)
    for name, role in arch.roles.items():
        old = dense.model.get_submodule(name)
        mine = [(*stage, rows) for stage, rows, names in zip(stages, arranged, chosen, strict=True) if name in names]
        if not mine:
            skipped.append({"name": name, "reason": "excluded by the recipe"})
            continue
        add(
            name,
            role,
            "+".join(config.method for _, config, _ in mine),
            old,
            _empty(name, on_meta(cut.get_submodule(name)), mine),
        )
    handled = {layer["name"] for layer in layers} | {entry["name"] for entry in skipped} | set(arch.tied)
    rest = [name for name in parameters if name.rpartition(".")[0] not in handled]
    skipped += [{"name": name, "reason": "not a Linear of a block: stays in the model's dtype"} for name in rest]
    skipped += [{"name": f"{len(dropped)} blocks", "reason": "taken out, the calibration says which"}] if dropped else []
    before = num_parameters * width
    after = num_left * width - sum(layer["dense_bytes"] - layer["compressed_bytes"] for layer in layers)
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


@fast_products()
def plan_budget(  # noqa: PLR0913 - by keyword
    model: str | Path, *, target_size: str | float | None = None, target_bpw: float | None = None,
    max_ppl_increase: str | float | None = None, candidates: Recipe | Mapping[str, Any] | str | Path = "codebook",
    calibration: Sequence[str | Path] | Calibration = (), output: str | Path | None = None, plot: str | Path | None = None,
    cache: str | Path | None = None, validate: bool = False, data_free: bool = False, num_tokens: int = PLAN_TOKENS,
    seed: int | None = None, device: str = "cpu", progress: Progress = lambda unit, done, total: None,
) -> BudgetPlan:  # fmt: skip
    """The recipe that loses least within a budget, from the measured error of every choice for every layer.

    The model is loaded whole. Errors are measured on one part of the calibration text, inputs on another; they are kept in
    a file, so that a killed run goes on with the next block and another target for the same model takes seconds.

    Args:
        model: Hub id, folder or `.gguf` file of a dense model.
        target_size: bytes of the whole folder's safetensors files, at most: a number or a text like `"40MB"`.
        target_bpw: bits per compressed weight inside the blocks at most, scales and tables counted. The embedding takes the
            choice with the least error.
        max_ppl_increase: a fraction, or a text like `"10%"`; the smallest file with that forecast.
        candidates: a recipe whose stages are alternatives, as a `Recipe`, its dict or a YAML file; or `"codebook"` or
            `"entropy"`, which come with the library. A stage with `include: []` is one for embedding and head only.
        calibration: text files, or ready batches; without any, the documentation text that Python ships.
        output: YAML file to create for the recipe.
        plot: PNG file to create for the front.
        cache: JSON file of the measured errors; by default beside `output`, without an output none is kept.
        validate: compress some points of the front in memory and measure them.
        data_free: propose from the weights alone, without any text and without a forecast of the perplexity.
        num_tokens: about how many tokens errors are measured on.
        seed: replaces that of the candidates.
        device: where the model runs; solvers work on the processor.
        progress: called with the unit, finished and all units.

    Returns:
        The recipe, its forecast, the front, and what was measured. The recipe comes as near to a size as the candidates
        allow; where that is more than 0.5 % below, `notes` says by how much and what the next size above is.

    Raises:
        CompactError: bad input or a target that these candidates cannot meet, before anything is written; for
            `max_ppl_increase` that is known only after the measurement, whose file stays.
    """
    target = Target.parse(target_size, target_bpw, max_ppl_increase)
    recipe = as_recipe(BUILT_IN_CANDIDATES.get(str(candidates), candidates), seed)
    device = check_device(device, needs_double=True)
    files = [Path(path) for path in (output, plot) if path is not None]
    _check_plan(recipe, num_tokens)
    _check_plan_files(files, plot, cache)
    if data_free:
        _check_data_free(recipe, target, validate, {"calibration": calibration, "cache": cache})
    dense = open_dense(model, recipe.dtype, is_whole=True)
    _check_model_finite(dense.model.to(device))
    arch = describe(dense.model)
    items = find_items(dense.model, arch, [(METHODS[stage.method], stage) for stage in recipe.stages])
    Programme(dense.model, arch, items).check(target)
    if data_free:
        programme = Programme(dense.model, arch, items, propose(dense.model, arch, items, progress))
    else:
        prepared = prepare_calibration(calibration, dense.load_tokenizer(), recipe).to(device)
        check_inputs(dense.model, prepared)
        check_training(recipe)
        _check_increase(dense.model, target)
        if cache is None and output is not None:
            cache = Path(output).with_suffix(".sensitivity.json")
        planned = {"candidates": recipe.to_dict(), "tokens": num_tokens}
        kept = _measured_errors(dense, arch, items, prepared, planned, None if cache is None else Path(cache), progress)
        programme = Programme(dense.model, arch, items, kept.errors)
    chosen = programme.solve(target)
    front = tuple(programme.point(table) for table in programme.tables())
    found = BudgetPlan(
        replace(recipe, stages=programme.stages(chosen)), programme.point(chosen), front, (), _error_unit(dense.model, data_free),
        target, programme.next_size(chosen, target),
    )  # fmt: skip
    if validate:
        found = replace(found, measured=_validated(dense.model, arch, programme, chosen, prepared, num_tokens, kept, progress))
    for path in files:
        with disk_errors(path.absolute().parent):
            if path == Path(output or ""):
                write_text(path, found.to_yaml(str(path)))
            else:
                plot_front(found, dense.name, path)
    return found


def compare(
    before: str | Path, after: str | Path, *, plot: str | Path | None = None, speed: SpeedConfig | None = None, dtype: str = "auto"
) -> Comparison:  # fmt: skip
    """Two models side by side: parameters, multiply-adds, bytes, measured seconds of a prompt and of a token, removed units.

    Both are in memory at once, and are run by turns.

    Args:
        before: Hub id, folder or `.gguf` file of a causal language model.
        after: likewise; compressed or pruned.
        plot: PNG file to create: what each block has lost.
        speed: what is timed, by default as it stands there; medians are reported.
        dtype: of both models: float32, bfloat16 or float16; auto is the checkpoint's own, and bfloat16 for float32.

    Raises:
        CompactError: a model cannot be opened, a prompt is longer than a model allows, there is no such dtype, or the file cannot
            be created.
    """
    check_dtype(dtype)
    if plot is not None:
        check_new_file(Path(plot))
    speed = speed or SpeedConfig()
    models = {side: open_for_scoring(name, dtype)[0] for side, name in (("before", before), ("after", after))}
    for name, model in zip((before, after), models.values(), strict=True):
        check_positions(model, repr(str(name)), speed)
    found = compare_by_turns(**models, config=speed)
    if plot is not None:
        with disk_errors(Path(plot).absolute().parent):
            found.plot(Path(plot))
    return found


def recover(  # noqa: PLR0913 - settings, by keyword
    model: str | Path, texts: str | Path | Sequence[str | Path] = (), *, output: str | Path | None = None,
    teacher: str | Path | None = None, adapter: CompacterConfig | None = None, training: DistillationConfig | None = None,
    sequence_length: int = 512, seed: int = 0, progress: Progress = lambda unit, done, total: None,
) -> dict[str, Any]:  # fmt: skip
    """Train an adapter on top of a compressed model, verify it in a fresh process, and save it beside the model.

    Args:
        model: folder or Hub id of a compressed (or pruned) causal language model; it is not changed.
        texts: text file or files to train on; without any, the documentation text that Python ships.
        output: folder to create; None is the model's name with `-adapter`.
        teacher: dense model of the same vocabulary whose next-token distributions are learnt; None learns the text.
        adapter: None is Compacter behind both sub-layers.
        training: sequences, epochs, batch size, learning rate; None is their defaults with a learning rate of 3e-3.
        sequence_length: tokens per sequence.
        seed: of the sequences, the adapter's start and the order.
        progress: called with the unit, finished and all units.

    Returns:
        `perplexity_before` and `perplexity_after` on text that is held out, `trainable_parameters`, `adapter_bytes`,
        `loss_first` and `loss_last` (nats per token, means of up to 8 steps), `seconds`, `output`, and the settings;
        also written to `recovery.json`.

    Raises:
        CompactError: bad input or a loss that is not finite, before anything is written; or a failed verification,
            after which what was written is in `OUTPUT.partial`.
    """
    if distributed.world_size() > 1:
        raise ConfigError("recover runs in one process; under torchrun give the Trainer a model from get_peft_model")
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed must be in [0, 2**32), got {seed}")
    texts = [texts] if isinstance(texts, str | Path) else texts
    started = time.perf_counter()
    named = Path(model).resolve() if Path(model).name in ("", "..") else Path(model)  # "." has no name to add to
    output = Path(f"{named}-adapter" if output is None else output)
    partial = check_new_folder(output)
    folder = local_folder(str(model))
    if is_adapter(folder):
        raise UnsupportedModel(f"model {str(model)!r} is an adapter: give the folder of its base model")
    training = training or DistillationConfig(learning_rate=3e-3)
    text = read_texts(texts) if texts else builtin_text("calibration")
    tokenizer = _tokenizer(folder)
    if tokenizer is None:
        raise ConfigError(f"model {str(model)!r} has no tokenizer in its folder, which training on text needs")
    size = CalibrationConfig(num_sequences=1, sequence_length=sequence_length)
    data = sample(tokenizer, text, size, seed, [Path(path).name for path in texts], training)
    base = verify.load_model(folder, dtype=torch.float32)
    if not is_causal_lm(base):
        raise UnsupportedModel(f"model {str(model)!r} is a {type(base).__name__}: recover trains causal language models")
    # A relative name would be looked for where the next user stands, and then on the Hub.
    base.name_or_path = base.config.name_or_path = str(folder.resolve()) if Path(model).is_dir() else str(model)
    check_inputs(base, data)
    dense = None
    if teacher is not None:
        dense = open_dense(teacher, "float32", is_whole=True).model
        sizes = [m.config.get_text_config().vocab_size for m in (dense, base)]
        if sizes[0] != sizes[1]:
            raise ConfigError(f"teacher {str(teacher)!r} must have the {sizes[1]} tokens of the model, it has {sizes[0]}")
    length = min(512, len(data.held_out), sequence_length)
    before = perplexity(base.eval(), data.held_out, length, None)["perplexity"]
    adapter = copy.copy(adapter or CompacterConfig())
    adapter.task_type, adapter.inference_mode = TaskType.CAUSAL_LM, False  # a stored one says that it is not trained
    adapted, losses = train_adapter(
        base, data.distillation, adapter, training, teacher=dense, seed=seed,
        progress=lambda done, total: progress("training", done, total),
    )  # fmt: skip
    result = {
        "model": str(model),
        "teacher": None if teacher is None else str(teacher),
        "texts": list(data.sources),
        "text_sha256": data.fingerprint,
        "sequence_length": sequence_length,
        "training": asdict(training),
        "seed": seed,
        "perplexity_before": before,
        "perplexity_after": perplexity(adapted, data.held_out, length, None)["perplexity"],
        "held_out_tokens": len(data.held_out),
        "loss_first": sum(losses[:8]) / len(losses[:8]),
        "loss_last": sum(losses[-8:]) / len(losses[-8:]),
        "trainable_parameters": adapted.get_nb_trainable_parameters()[0],
        "output": str(output),
    }
    probe = {"input_ids": data.held_out[None, :length].to(adapted.device)}
    with torch.no_grad():
        logits = adapted(**probe)[0].cpu()
    with disk_errors(partial):
        adapted.save_pretrained(partial)
    result["verification"] = verify.verify(partial, probe, logits, None, str(adapted.device))
    result["adapter_bytes"] = sum(path.stat().st_size for path in partial.glob("*.safetensors"))
    result["seconds"] = time.perf_counter() - started
    with disk_errors(partial):
        write_text(partial / "recovery.json", json.dumps(result, indent=2) + "\n")
        output.rmdir() if output.exists() else None
        partial.rename(output)
    return result


@fast_products()
def profile(
    model: str | Path, recipe: Recipe | Mapping[str, Any] | str | Path, *, output: str | Path, ratios: Sequence[float] = (0.25, 0.5, 0.75),
    calibration: Sequence[str | Path] | Calibration = (), seed: int | None = None, device: str = "cpu",
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
        device: where the model runs; solvers work on the processor.
        progress: called with the Linear, finished and all Linears.

    Returns:
        As `profiling.profile_`.

    Raises:
        CompactError: bad input, before anything is measured.
    """
    recipe, output, device = as_recipe(recipe, seed), Path(output), check_device(device, needs_double=True)
    stage = recipe.stages[0]
    if not hasattr(stage, "keep_ratio"):
        raise ConfigError(f"recipe.stages[0] must be a method with a keep_ratio, like tensor_network, got {stage.method}")
    if getattr(stage, "basis_group", 1) > 1:
        raise ConfigError(
            f"recipe.stages[0].basis_group must be 1 for a profile, which compresses every Linear alone, got {stage.basis_group}"
        )
    if not ratios or not all(0 < ratio < 1 for ratio in ratios):
        raise ConfigError(f"ratios must be in (0, 1), got {list(ratios)}")
    if not output.absolute().parent.is_dir() or output.is_dir() or output.suffix != ".json":
        raise OutputError(f"output {str(output)!r} must name a .json file in a folder that exists")
    dense = open_dense(model, recipe.dtype, is_whole=True)
    if not is_causal_lm(dense.model):
        raise UnsupportedModel(f"model {str(model)!r} is a {type(dense.model).__name__}: a profile needs a causal language model")
    prepared = prepare_calibration(calibration, dense.load_tokenizer(), recipe)
    check_inputs(dense.model.to(device), prepared)
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


def export(folder: str | Path, output: str | Path, kind: ExportKind = "dense") -> None:
    """Write a compressed folder as one that loads without this library.

    Args:
        folder: compressed.
        output: folder to create.
        kind: `dense`; `low_rank`: two plain Linears for each low-rank layer, under `trust_remote_code=True`; `bitnet`:
            transformers' own ternary format; `compressed-tensors`: packed int4 and int8. Or `model.gguf` for llama.cpp in
            the folder: `f16`, `q8_0`, `q4_0`, `q4_1`, `tq1_0`, `tq2_0`, and `gguf` for the smallest that holds the model
            as it is. Or `onnx`: `model.onnx` in float32, for scoring, classes and embeddings.

    Raises:
        CompactError: the folder is not compressed by this library, or has layers that `kind` cannot say.
    """
    folder, output = Path(folder), Path(output)
    if kind not in get_args(ExportKind):
        raise ConfigError(f"kind must be one of {', '.join(get_args(ExportKind))}, got {kind!r}")
    if kind not in (*GGUF_KINDS, "onnx") or getattr(_read_config(folder), "quantization_config", None):
        inspect_folder(folder)
    check_output(output)
    model, tokenizer = verify.load_model(folder), _tokenizer(folder)
    with whole_folder(output) as partial:
        if kind == "dense":
            save_dense(model, partial)
        elif kind == "bitnet":
            save_bitnet(model, partial)
        elif kind == "compressed-tensors":
            save_compressed_tensors(model, partial)
        elif kind == "onnx":
            save_onnx(model, partial)
        elif kind == "low_rank":
            save_low_rank(model, partial, "AutoModelForCausalLM" if is_causal_lm(model) else "AutoModel")
        else:
            save_gguf(model, partial, kind, tokenizer)
        if tokenizer is not None and kind not in GGUF_KINDS:
            tokenizer.save_pretrained(partial)


def push(  # noqa: PLR0913 - by keyword
    folder: str | Path, repo_id: str, *, private: bool = True, force: bool = False, overwrite: bool = False,
    base: str | None = None, token: str | None = None, commit_message: str | None = None, results: str | Path | None = None,
) -> str:  # fmt: skip
    """Upload a folder to the Hub: weights, config, tokenizer, chat template, recipe, report, plots and card.

    Arguments, result and errors are those of `hf.hub.push_folder`; a compressed folder is checked against its own table first.
    `model.push_to_hub` does the same for a compressed model in memory. `results` is a file of `evaluate`, whose scores of this
    folder then stand in the card too; ConfigError if it holds none of these weights.
    """
    folder = Path(folder)
    scores = [] if results is None else scores_of(Results.read(Path(results)), fingerprint_of(str(folder)))
    if (folder / "config.json").is_file() and not is_adapter(folder):
        quantization = getattr(_read_config(folder), "quantization_config", None)
        if isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD:
            inspect_folder(folder)
    return push_folder(
        folder, repo_id, private=private, force=force, overwrite=overwrite, base=base, token=token, commit_message=commit_message,
        scores=scores,
    )  # fmt: skip


def inspect_folder(folder: str | Path) -> dict[str, Any]:
    """What a compressed folder holds, read from safetensors headers and JSON files only.

    Returns:
        `layers` (name, layer, settings, shape, bytes, bits per weight) and totals, which are shares of the dense model where the
        folder has a report, else of one with the config's widths; `memory_bytes`, the weights as they are
        kept in memory, in the dtype of the file, once what is coded is decoded; `is_verified` from the report.

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
    built = copy.deepcopy(skeleton)
    expect_(built, table, source.files)
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
    report = Report.read(folder / REPORT_NAME) if (folder / REPORT_NAME).exists() else None
    # of the dense model, which a config of pruned widths does not know
    num_parameters = (report.num_parameters if report else 0) or count_parameters(skeleton)
    outside = {name for name in table if not any(name.startswith(b + ".") for b in describe(skeleton).blocks)}
    body = [layer for layer in layers if layer["name"] not in outside]
    weights = sum(torch.Size(layer["shape"]).numel() for layer in body)
    tied = {name for name, spec in table.items() if "tied_to" in spec}
    coded = {name: module for name, module in built.named_modules() if isinstance(module, CodedModule)}
    decoded = sum(module.decoded_bytes for name, module in coded.items() if name not in tied)
    return {
        "folder": str(folder),
        "format_version": FORMAT_VERSION,
        "layers": layers,
        "num_parameters": num_parameters,
        "file_bytes": file_bytes,
        "memory_bytes": sum(nbytes for _, _, nbytes in headers.values()) + decoded,
        "file_bits_per_weight": 8 * file_bytes / num_parameters,
        "body_bits_per_weight": 8 * sum(layer["bytes"] for layer in body) / weights if weights else 0.0,
        "share_of_fp32": file_bytes / (4 * num_parameters),
        "share_of_bf16": file_bytes / (2 * num_parameters),
        "is_verified": report is not None and report.is_verified,
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


def open_for_scoring(model: str | Path, dtype: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase, int]:
    """A model, or one with an adapter, ready to be scored; its tokenizer, and the bytes of its weight files.

    The dtype auto is the checkpoint's own, and bfloat16 for float32.
    """
    name = str(model)
    wanted = None if dtype == "auto" else getattr(torch, dtype)
    if name.endswith(".gguf"):
        dense = _open_gguf(Path(name), wanted or torch.bfloat16)
        return dense.model, dense.load_tokenizer(), Path(name).stat().st_size
    folder = local_folder(name)
    base = base_folder(folder)
    config = _read_config(base)
    usual = torch.bfloat16 if config.dtype in (None, torch.float32) else config.dtype
    TensorSource.in_folder(base)  # before transformers looks for weights, in a folder of ONNX say
    loaded = verify.load_model(folder, dtype=wanted or usual).eval()
    if not is_causal_lm(loaded):
        raise UnsupportedModel(f"model {name!r} is a {type(loaded).__name__}: perplexity needs a causal language model")
    tokenizer = _tokenizer(base)
    if tokenizer is None:
        raise ConfigError(f"model {name!r} has no tokenizer in its folder, which scoring text needs")
    files = [*TensorSource.in_folder(base).files, *(folder.glob("adapter_model.safetensors") if base != folder else ())]
    return loaded, tokenizer, sum(path.stat().st_size for path in files)


def fingerprint_of(path: str) -> str:
    """SHA-256 of a model's weight files and config, of those below an adapter too."""
    if path.endswith(".gguf"):
        return hash_files([Path(path)])
    folder = local_folder(path)
    folders = dict.fromkeys((base_folder(folder), folder))
    return hash_files(
        [file for one in folders for file in (*sorted(one.glob("*.safetensors")), *sorted(one.glob("*config.json")))]
    )


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter rather than a model."""
    return (folder / "adapter_config.json").is_file()


def base_folder(folder: Path) -> Path:
    """The folder of the model below an adapter; that of a model itself."""
    return local_folder(PeftConfig.from_pretrained(folder).base_model_name_or_path) if is_adapter(folder) else folder


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


def check_training(recipe: Recipe) -> None:
    """Raise ConfigError if a reconstruction or a distillation is asked for where it cannot run."""
    for name in ("reconstruction", "distillation"):
        if getattr(recipe, name) is not None and distributed.world_size() > 1:
            raise ConfigError(f"recipe.{name} runs in one process: set it to null under torchrun")


def check_outside(model: PreTrainedModel, arch: Architecture, recipe: Recipe) -> None:
    """Raise UnsupportedModel, before the first block, if the embedding or the head cannot be what a stage makes of it."""
    for name in (arch.embedding, arch.head):
        for stage in recipe.stages if name else ():
            if METHODS[stage.method].compress_embedding(model.get_submodule(name), stage, solve=False) is not None:
                break


def check_nesting(arch: Architecture, recipe: Recipe) -> list[set[str]]:
    """The targets of every stage, once it is sure that each finds something to compress.

    Raises:
        ConfigError: a stage leaves a Linear to a later one that there is not, or comes third: what is taken apart twice is
            not looked into. Or it goes by the numbers of blocks, which another stage changes, or by
            inputs of the dense model where another one cuts.
    """
    chosen = select_stages(arch.roles, recipe.stages)
    built = dict.fromkeys(arch.roles, 0)
    for position, (stage, names) in enumerate(zip(recipe.stages, chosen, strict=True)):
        method, later = METHODS[stage.method], set().union(*chosen[position + 1 :])
        if method.finish is not None and (alone := sorted(names - later)):
            raise ConfigError(f"recipe.stages[{position}] corrects {alone[0]}, which no later stage compresses: exclude it")
        if deep := sorted(name for name in names if built[name] > 1):
            raise ConfigError(
                f"recipe.stages[{position}] selects {deep[0]}, which two earlier stages take apart into Linears, one inside the "
                "other: exclude it in one"
            )
        for name in names if method.cut_block is None else ():
            built[name] += 1
        if stage.needs_dense_inputs and (name := _in_cut_block(arch, names, recipe.stages[:position], chosen)):
            raise ConfigError(
                f"recipe.stages[{position}] compares {name} with the dense model, from which an earlier stage has cut units of that "
                "block: set its solver to whitened, or exclude it in one"
            )
        if any(getattr(other, "num_layers", 0) for other in recipe.stages) and (name := _chosen_by_number(arch, names)):
            raise ConfigError(
                f"recipe.stages[{position}] selects {name} and not the same Linear of every block, but num_layers takes blocks out and "
                "numbers the others anew: prune first, then compress what is left"
            )
    return chosen


def _in_cut_block(
    arch: Architecture, names: Collection[str], earlier: Sequence[MethodConfig], chosen: Sequence[Collection[str]]
) -> str | None:
    """One of the Linears whose block loses units in an earlier stage."""
    cut = [
        name
        for stage, picked in zip(earlier, chosen, strict=False)
        if getattr(stage, "channel_sparsity", 0) or getattr(stage, "head_sparsity", 0)
        for name in picked
    ]
    blocks = [block for block in arch.blocks if any(name.startswith(f"{block}.") for name in cut)]
    return next((name for name in sorted(names) if any(name.startswith(f"{block}.") for block in blocks)), None)


def _chosen_by_number(arch: Architecture, names: Collection[str]) -> str | None:
    """A Linear that is selected where that of another block of its stack is not."""
    for stack in arch.stacks:
        alike: dict[str, list[str]] = {}
        for block in stack:
            for name in arch.targets(block):
                alike.setdefault(name.removeprefix(block), []).append(name)
        for group in alike.values():
            if (mine := [name for name in group if name in names]) and len(mine) < len(group):
                return mine[0]
    return None


def check_cuts(model: PreTrainedModel, arch: Architecture, recipe: Recipe) -> None:
    """Raise before the first block, if stages cut what cannot be cut or could not be loaded.

    Raises:
        NothingMatched: a stage cuts nothing.
        UnsupportedModel: the family is not known, or the config cannot say widths that a later stage's layers need.
        ConfigError: blocks would lose unequal shares, or a stage cuts what an earlier one has compressed.
    """
    chosen = select_stages(arch.roles, recipe.stages)
    for position, (stage, names) in enumerate(zip(recipe.stages, chosen, strict=True)):
        method = METHODS[stage.method]
        if method.cut_block is None:
            continue
        find_groups(model)
        shapes = _shapes_of(model)
        cut = [set(method.cut_block(shapes, arch, block, names, stage, None)) for block in arch.blocks]
        if not any(cut) and not getattr(stage, "num_layers", 0):
            raise NothingMatched(f"recipe.stages[{position}] removes nothing: every number of groups rounds to 0")
        earlier = set().union(
            *(chosen[i] for i, other in enumerate(recipe.stages[:position]) if METHODS[other.method].cut_block is None)
        )
        if changed := sorted(set().union(*cut) & earlier):
            raise ConfigError(f"recipe.stages[{position}] cuts {changed[0]}, which an earlier stage has compressed: cut first")
        later = set().union(*chosen[position + 1 :])
        stuck = sorted(set(settle_(shapes, arch)) & later)
        if stuck:
            raise UnsupportedModel(
                f"{stuck[0]} would have a width that the config of {arch.family} cannot say, and recipe.stages[{position + 1}:] "
                "compresses it: include the same Linears of every block, and set head_sparsity to 0"
            )


def _shapes_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model on meta, with a config of its own."""
    with torch.device("meta"):
        return type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype)


def check_output_or_resume(output: Path) -> None:
    """Raise OutputError unless the output can be created or belongs to an unfinished run."""
    if output.name in ("", ".."):
        raise OutputError(f"output {str(output)!r} must name a folder to create")
    if not Journal.is_unfinished(output):
        check_output(output)


def count_parameters(model: PreTrainedModel) -> int:
    """Parameters of a dense model, tied ones once."""
    tied = model.get_expanded_tied_weights_keys(all_submodels=True).keys()
    return sum(p.numel() for name, p in model.named_parameters() if name not in tied)


def versions() -> dict[str, str]:
    """Versions of the libraries that decide a result."""
    return {"hf_compact": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


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
        versions={**versions(), "python": platform.python_version()},
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
    if recipe.reconstruction is not None:  # the targets beside the inputs, and one block's gradients
        training = width * hidden + _activation_bytes(dense.model, shapes, recipe, recipe.calibration.batch_size) // len(inside)
    if any(stage.needs_whole_model for stage in recipe.stages):  # a gram matrix of each Linear, and one sequence's gradients
        moments = 4 * sum(columns**2 for _, columns in shapes)
        training = max(training, moments + _activation_bytes(dense.model, shapes, recipe, 1))
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
    if recipe.reconstruction is not None:  # forward and backward, after one dense pass
        passes += 1.0 + 5.0 * recipe.reconstruction.epochs
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


# Inside plan_budget.


def _check_plan(recipe: Recipe, num_tokens: int) -> None:
    """Raise before the model is opened, if nothing can come of it."""
    if num_tokens < 1:
        raise ConfigError(f"num_tokens must be at least 1, got {num_tokens}")
    if distributed.world_size() > 1:
        raise ConfigError("planning runs in one process, not under torchrun")
    for position, stage in enumerate(recipe.stages):
        if METHODS[stage.method].cut_block is not None:
            raise ConfigError(
                f"candidates must compress Linears one by one, which {stage.method} does not: prune first, then plan"
            )
        if METHODS[stage.method].finish is not None:
            raise ConfigError(
                f"candidates: stages[{position}].method must store a Linear by itself, which {stage.method} leaves to a later "
                "stage: plan without it, and put it before the stages that are found"
            )


def _check_plan_files(files: Sequence[Path], plot: str | Path | None, cache: str | Path | None) -> None:
    """Raise OutputError for files that cannot be written, or would take each other's place."""
    if plot is not None and Path(plot).suffix != ".png":
        raise OutputError(f"plot {str(plot)!r} must be a name that ends in .png")
    kept = [] if cache is None else [Path(cache)]
    names = [str(path.absolute()) for path in (*files, *kept)]
    if len(set(names)) < len(names):
        raise OutputError(f"output, plot and cache must be different files, got {', '.join(names)}")
    for path in [*files, *(path for path in kept if not path.exists())]:
        check_new_file(path)


def _check_data_free(recipe: Recipe, target: Target, validate: bool, unread: Mapping[str, Any]) -> None:
    """Raise ConfigError for what cannot be had from the weights alone, or would not be looked at."""
    if validate or target.increase is not None:
        what = "validate" if validate else "max_ppl_increase"
        raise ConfigError(f"data_free proposes from the weights alone: {what} needs a measurement on text")
    for name, value in unread.items():
        if value:
            raise ConfigError(f"data_free proposes from the weights alone: {name} must not be given, got {str(value)[:80]}")
    if any(stage.deals_out_bits for stage in recipe.stages):
        raise ConfigError("data_free proposes from the weights alone: candidates that deal out their bits by gradients need text")


def _error_unit(model: PreTrainedModel, data_free: bool) -> Literal["divergence", "cosine", "histogram"]:
    if data_free:
        return "histogram"
    return "cosine" if model.get_output_embeddings() is None else "divergence"


def _check_increase(model: PreTrainedModel, target: Target) -> None:
    """Raise ConfigError where a perplexity means nothing."""
    if target.increase is not None and not is_causal_lm(model):
        raise ConfigError(f"max_ppl_increase needs a model of the next token, which a {type(model).__name__} is not")


def _measured_errors(
    dense: Dense, arch: Architecture, items: Sequence[Item], prepared: Calibration, planned: Mapping[str, Any],
    cache: Path | None, progress: Progress,
) -> ErrorTable:  # fmt: skip
    """The table of errors, taken up from the cache and finished."""
    seen, scored = _split_batches(prepared, planned["tokens"])
    fingerprint = {"model": dense.fingerprint, **planned, "calibration": prepared.fingerprint, "versions": versions()}
    table = ErrorTable(cache, fingerprint)

    def compressed(alternative: Alternative) -> PreTrainedModel:
        bare = replace(alternative.method, compress_embedding=lambda module, config, solve=True: None)
        return _compressed_copy(dense.model, arch, [(bare, alternative.config)], replace(prepared, batches=seen))

    measure(dense.model, arch, items, seen, scored, table, compressed, progress)
    return table


def _validated(
    model: PreTrainedModel, arch: Architecture, programme: Programme, chosen: Sequence[int], prepared: Calibration,
    num_tokens: int, kept: ErrorTable, progress: Progress,
) -> tuple[tuple[Point, Point], ...]:  # fmt: skip
    """Forecast and measurement of the chosen table and of some of the front, calibrated on what is not scored.

    What is measured is kept with the errors, so that a run that was killed goes on with the next.
    """
    seen, scored = _split_batches(prepared, num_tokens)
    rest = replace(prepared, batches=prepared.batches[: len(prepared.batches) - len(scored)] or seen)
    tables = programme.tables()
    sizes = [programme.point(table).file_bytes for table in tables]
    wanted = [sizes[0] + share * (sizes[-1] - sizes[0]) for share in VALIDATED_SHARES]
    picked = [chosen, *(min(zip(sizes, tables, strict=True), key=lambda pair: abs(pair[0] - size))[1] for size in wanted)]
    pairs = []
    for done, table in enumerate(picked):
        progress("validation", done, len(picked))
        stages = programme.stages(table)
        key = hashlib.sha256(repr(stages).encode()).hexdigest()
        if key not in kept.points:
            other = _compressed_copy(model, arch, [(METHODS[stage.method], stage) for stage in stages], rest)
            kept.add(points={key: asdict(_measured_point(other, model, arch, scored))})
        pairs.append((programme.point(table), Point(**kept.points[key])))
    progress("validation", len(picked), len(picked))
    return tuple(pairs)


def _split_batches(calibration: Calibration, num_tokens: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The batches that gram matrices are made from, and others, from the end, that errors are measured on.

    With a single batch it serves for both.
    """
    batches = calibration.batches
    if len(batches) == 1:
        return batches, batches
    sizes = [next(iter(batch.values())).shape[:2].numel() for batch in batches]
    first = next((i for i in range(len(batches) - 1, 1, -1) if sum(sizes[i:]) >= num_tokens), 1)
    last = next((i for i in range(1, first) if sum(sizes[:i]) >= GRAM_TOKENS_PER_TOKEN * num_tokens), first)
    return batches[:last], batches[first:]


def _compressed_copy(
    model: PreTrainedModel, arch: Architecture, stages: Sequence[tuple[Any, Any]], calibration: Calibration
) -> PreTrainedModel:
    report = Report(model="", family=arch.family, recipe={})
    runner = BlockRunner(copy.deepcopy(model), arch, stages, calibration, report)
    runner.run()
    return runner.model


def _measured_point(other: PreTrainedModel, model: PreTrainedModel, arch: Architecture, scored: Sequence[Any]) -> Point:
    """A compressed model in numbers, its files as a run would write them."""
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    tensors = {
        name: tensor
        for name, tensor in other.state_dict().items()
        if name not in tied and name.rpartition(".")[0] not in arch.tied
    }
    stored = [module for name in arch.roles if isinstance(module := other.get_submodule(name), tuple(LAYERS.values()))]
    weights = sum(module.out_features * module.in_features for module in stored)
    bits = 8 * sum(stored_bytes(module) for module in stored) / weights
    return Point(files_bytes(tensors, arch), bits, divergence_between(other, model, scored))


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
        check_new_folder(Path(output))
    elif recipe.auto_map:
        raise ConfigError("recipe.auto_map writes a file beside a model: give an output folder, got None")
    if any(isinstance(module, tuple(LAYERS.values())) for module in model.modules()):
        raise UnsupportedModel("model holds compressed layers of a run that did not finish: load the dense model again")
    arch = describe(model)
    check_nesting(arch, recipe)
    prepared = prepare_calibration(calibration, tokenizer, recipe).to(model.device)
    check_inputs(model, prepared)
    check_training(recipe)
    _check_model_finite(model)
    check_outside(model, arch, recipe)
    check_cuts(model, arch, recipe)
    report = new_report(model.config.name_or_path or type(model).__name__, model, arch, recipe, prepared)
    before = _footprint(model, recipe)
    arch, dropped = _shorten(model, arch, recipe, prepared.batches, report.notes)
    stages = [(METHODS[stage.method], stage) for stage in recipe.stages]
    runner = BlockRunner(model, arch, stages, prepared, report, reconstruction=recipe.reconstruction)
    logits = _run(runner, recipe, prepared, progress)
    table = _ordered(_settled(runner), model)
    _compare(before, dropped, model, report)
    if table:
        attach_(model, table, recipe.stages)
    if output is not None and distributed.rank() == 0:
        with whole_folder(Path(output)) as partial:
            model.save_pretrained(partial)
            _write_side_files(partial, model, model.config, tokenizer, recipe)
        report.file_bytes = sum(path.stat().st_size for path in Path(output).glob("*.safetensors"))
        _verify(Path(output), prepared, logits, report, is_causal_lm(model), str(model.device))
    distributed.barrier()
    return report


def _hashes_of_profiles(recipe: Recipe) -> dict[str, str]:
    """What the files that stages read hold, where there are any: their names alone do not decide the result."""
    profiles = [Path(path) for stage in recipe.stages if (path := getattr(stage, "profile", None))]
    return {"profiles": hash_files(profiles)} if profiles and all(path.is_file() for path in profiles) else {}


def _shorten(
    model: PreTrainedModel, arch: Architecture, recipe: Recipe, batches: Sequence[Mapping[str, torch.Tensor]], notes: list[str]
) -> tuple[Architecture, list[str]]:
    """Take out the blocks that stages remove; describe what is left, and name what is gone."""
    gone: list[str] = []
    names = list(arch.blocks)
    for stage in recipe.stages:
        method = METHODS[stage.method]
        dropped = method.shorten(model, arch, batches, stage) if method.shorten else []
        if dropped:
            notes.append(f"{stage.method} has removed {len(dropped)} of {len(arch.blocks)} blocks: {', '.join(dropped)}")
            out = [names[arch.blocks.index(name)] for name in dropped]
            gone, names = gone + out, [name for name in names if name not in out]
            arch = describe(model)
    return arch, gone


def _footprint(model: PreTrainedModel, recipe: Recipe) -> Footprint | None:
    """What the dense model costs, where a stage removes units."""
    return count(model) if any(METHODS[stage.method].cut_block for stage in recipe.stages) else None


def _compare(before: Footprint | None, dropped: Sequence[str], model: PreTrainedModel, report: Report) -> None:
    if before is not None:
        report.footprint = Comparison(before=before, after=count(model), dropped=tuple(dropped)).to_dict()


def _settled(runner: BlockRunner) -> dict[str, Any]:
    """The modules table; the config takes over what it can say of cut Linears."""
    cut = settle_(runner.model, runner.arch) if runner.cuts else {}
    if cut:
        runner.report.notes.append(
            f"{len(cut)} Linears, {next(iter(cut))} among them, have widths that the config of {runner.arch.family} cannot say: "
            "the folder loads with hf_compact only"
        )
    table = runner.table | cut
    runner.report.is_plain = not table
    return table


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
        lambda done, total: progress("distillation", done, total), runner.pruned_linears(),
    )  # fmt: skip
    first, last = losses[:8], losses[-8:]
    runner.report.distillation = {"steps": len(losses), "first": sum(first) / len(first), "last": sum(last) / len(last)}
    runner.report.seconds["distill"] = time.perf_counter() - started
    return runner.rewrite()


def _verify(
    output: Path, calibration: Calibration, logits: torch.Tensor, report: Report, is_causal: bool, device: str
) -> None:  # fmt: skip
    """Verify, then write report, card and plot whatever the outcome; raise if it failed."""
    failure: VerificationError | None = None
    try:
        held_out = calibration.held_out if is_causal else None
        report.verification = verify.verify(output, probe_inputs(calibration), logits, held_out, device)
        report.seconds["verify"] = report.verification.pop("seconds")
    except VerificationError as error:
        failure = error
        report.verification = {"verified": False, "reason": str(error)}
    report.peak_memory_bytes = max(report.peak_memory_bytes, peak_memory_bytes())
    with disk_errors(output):
        write_card(report, output)
    if failure is not None:
        raise failure


def _final_config(model: PreTrainedModel, table: Mapping[str, Any], recipe: Recipe) -> PreTrainedConfig:
    config = model.config
    if table:  # cut to equal widths, a model is an ordinary one
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
    if not folder.is_dir():  # which transformers would look for on the Hub
        raise FormatError(f"{str(folder)!r} is no folder here")
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise FormatError(f"{folder} has no config.json that transformers can read: {str(error).splitlines()[0]}") from error


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    if not any((folder / name).exists() for name in names):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, LookupError) as error:
        raise FormatError(f"{folder} has a tokenizer that cannot be read: {' '.join(str(error).split())}") from error


def _empty(name: str, linear: torch.nn.Linear, stages: Sequence[tuple[Method, MethodConfig, set[str]]]) -> torch.nn.Module:
    """What the stages, each with the names whose rows it finds in order, make of a Linear, without its values.

    Those that come later take what it is built of, or the Linear where it is still one.
    """
    (method, config, arranged), *rest = stages
    module = method.empty(name, linear, config, arranged)
    if module is linear and rest:
        return _empty(name, linear, rest)
    for part in open_linears(module) if rest else ():
        module.set_submodule(part, _empty(f"{name}.{part}", module.get_submodule(part), rest))
    return module


def _body_bits(layers: Sequence[Mapping[str, Any]], width: int) -> float:
    body = [layer for layer in layers if layer["role"] not in ("embedding", "head")]
    weights = sum(layer["dense_bytes"] for layer in body) / width
    return 8 * sum(layer["compressed_bytes"] for layer in body) / weights if weights else 0.0
