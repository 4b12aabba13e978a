"""What every choice for every layer costs the model, by replacing one layer at a time in the dense one.

One trial per layer, at a middling choice, is scored by the divergence of the model's next-token distribution from the
dense one's; its ratio to the layer's own output error, known from the gram matrix of the inputs, turns the output errors
of all other choices into divergences. So the forward passes are one per layer, and the choices are tried on some rows.

Block by block, like the runner: what comes before a block is run once and replayed, so that a trial costs the rest of
the model only, and a finished block is saved.
"""

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .arch import Architecture, as_linear, dense_shape, on_meta, prediction_of
from .capture import Method, Progress, StopForward, correct_bias_, without_cache
from .checkpoint import check_same_run, disk_errors, write_text
from .config import MethodConfig
from .distillation import divergence
from .errors import NumericalError, OutputError, UnsupportedModel
from .fitting import patched_forwards
from .functional.gram import add_gram_, centered, output_energy, without_padding
from .functional.histogram import histogram_divergence
from .products import plain_products
from .report import return_freed_memory

_SEARCH_ROWS = 128  # of a Linear, on which its choices are tried
_LOGIT_ROWS = 256  # positions whose logits are in float32 at a time


@dataclass(frozen=True)
class Alternative:
    """One way to store the modules of an item."""

    method: Method
    config: MethodConfig
    tensors: Mapping[str, Tensor]
    """What replaces the weights in a file, on meta; a forecast where the method codes them."""

    @property
    def stored_bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class Item:
    """Modules that get one choice together."""

    name: str
    """What an error table calls it."""
    modules: tuple[str, ...]
    """Linears that read the same input, the embedding with the head, or all Linears of a method that deals out its bits."""
    block: str | None
    """The block that holds them, None for what is outside the blocks or in all of them."""
    alternatives: tuple[Alternative, ...]
    """From the smallest to the largest."""


class ErrorTable:
    """Errors by item, one for each alternative, and whole models that were measured; a JSON file that grows with each."""

    def __init__(self, path: Path | None, fingerprint: Mapping[str, Any]) -> None:
        """Take up what is there; without a path nothing is kept.

        Raises:
            OutputError: the file belongs to another model, other candidates or another text, or cannot be read.
        """
        self.path, self.fingerprint = path, dict(fingerprint)
        self.errors: dict[str, list[float]] = {}
        self.points: dict[str, dict[str, Any]] = {}
        """By the SHA-256 of the stages: the numbers of a model that they have compressed."""
        if path is None or not path.exists():
            return
        advice = "choose another --cache or delete the file"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            earlier, errors, points = found["fingerprint"], found["errors"], found["points"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise OutputError(f"{path} is not a table of errors that can be read: {advice}") from error
        check_same_run(path, earlier, self.fingerprint, advice)
        self.errors, self.points = errors, points

    def add(self, errors: Mapping[str, list[float]] = {}, points: Mapping[str, dict[str, Any]] = {}) -> None:
        """Keep what is finished, in memory and in the file.

        Raises:
            OutputError: the file cannot be written.
        """
        self.errors |= errors
        self.points |= points
        if self.path is None:
            return
        content = {"fingerprint": self.fingerprint, "errors": self.errors, "points": self.points}
        with disk_errors(self.path.absolute().parent):
            write_text(self.path, json.dumps(content, indent=1) + "\n")


@torch.no_grad()
def measure(
    model: PreTrainedModel, arch: Architecture, items: Sequence[Item], batches: Sequence[Mapping[str, Tensor]],
    scored: Sequence[Mapping[str, Tensor]], table: ErrorTable, compressed: Callable[[Alternative], PreTrainedModel],
    progress: Progress = lambda unit, done, total: None,
) -> None:  # fmt: skip
    """Fill the table with the divergence, in nats per token, that every alternative of every item brings alone.

    For a model without an output distribution it is one minus the cosine between its outputs and the dense ones.

    Args:
        model: dense and whole, in evaluation mode; the same again afterwards.
        arch: its blocks.
        items: what is to be chosen for.
        batches: model inputs that gram matrices are made from.
        scored: model inputs that trials are scored on.
        table: items that it holds are not measured again.
        compressed: gives a copy of the model in which an alternative's method has compressed all its Linears.
        progress: called with the unit, finished and all units.

    Raises:
        NumericalError: a trial's output is not finite, or a gram matrix cannot be factorised.
        UnsupportedModel: a block does not run.
        OutputError: the table cannot be written.
    """
    blocks = [block for block in arch.blocks if any(item.block == block for item in items)]
    total = len(blocks) + sum(len(item.alternatives) for item in items if item.block is None)
    done = 0
    with without_cache(model):
        for item in (item for item in items if item.block is None):
            errors = list(table.errors.get(item.name, ()))  # a run that was killed goes on with the next alternative
            for number, alternative in enumerate(item.alternatives):
                progress(item.name, done, total)
                done += 1
                if number < len(errors):
                    continue
                if item.modules[0] in arch.roles:
                    other = compressed(alternative)
                    with without_cache(other):
                        errors.append(divergence_between(other, model, scored))
                else:
                    tensors = _embeddings(model, item, alternative)
                    errors += _scores(model, scored, [(item.name, tensors)], lambda number: {}, lambda number: {})
                table.add({item.name: list(errors)})
                return_freed_memory()
        for stack in arch.stacks:
            kept: list[Any] | None = None
            for position, block in enumerate(stack):
                here = [item for item in items if item.block == block]
                if not here:
                    kept = None
                    continue
                progress(block, done, total)
                done += 1
                if all(item.name in table.errors for item in here):
                    kept = None
                    continue
                before = partial(_replay, model, stack[:position], kept)
                moments, kept = _moments(model, arch, block, here, [*batches, *scored], before)
                after = partial(_replay, model, stack[: position + 1], kept)
                skip = len(batches)
                table.add(_block_errors(
                    model, here, moments, scored, lambda n, f=after: f(n + skip), lambda n, f=before: f(n + skip)  # noqa: B023
                ))  # fmt: skip
                return_freed_memory()
    progress("finished", total, total)


def propose(model: PreTrainedModel, arch: Architecture, items: Sequence[Item], progress: Progress) -> dict[str, list[float]]:
    """Errors without any text: how far quantization moves the histogram of each weight, times the number of weights.

    A proposal and no measurement: it ignores what a weight does, and says little below four bits. AdaPT gives every layer
    the fewest bits whose divergence stays below a common threshold; here divergences are added up, so that one
    programme serves both kinds of table.
    """
    errors = {}
    for done, item in enumerate(items):
        progress("weights", done, len(items))
        moved = [0.0] * len(item.alternatives)
        for name in item.modules:
            module = model.get_submodule(name)
            count = module.weight.numel()
            for index, alternative in enumerate(item.alternatives):
                if name in arch.roles:
                    old: nn.Module = _some_rows(module)
                    new = alternative.method.compress_linear(old, None, alternative.config)
                else:
                    old, new = module, alternative.method.compress_embedding(module, alternative.config)
                moved[index] += count * histogram_divergence(old.weight.detach(), new.to_dense())
        errors[item.name] = moved
    progress("finished", len(items), len(items))
    return errors


@torch.no_grad()
def divergence_between(other: PreTrainedModel, model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]]) -> float:
    """Mean divergence of another model's output from the model's, as `measure` counts it.

    Raises:
        NumericalError: it is not finite.
    """
    mean = _Mean()
    for batch in batches:
        mean.add(*_distance(model, prediction_of(other(**batch)), prediction_of(model(**batch)), batch))
    return mean.value("the compressed model")


class _Mean:
    """Over the positions of several batches."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, total: float, count: int) -> None:
        self.total += total
        self.count += count

    def value(self, what: str) -> float:
        mean = self.total / self.count
        if not -1e-3 < mean < float("inf"):
            raise NumericalError(f"the output of the model with {what} replaced is not finite: it overflows")
        return max(0.0, mean)


def _distance(model: PreTrainedModel, output: Tensor, target: Tensor, batch: Mapping[str, Tensor]) -> tuple[float, int]:
    """Sum over positions, and their number."""
    mask = batch.get("decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask")
    output, target = (without_padding(values, mask).flatten(0, -2) for values in (output, target))
    if model.get_output_embeddings() is None:
        return (1 - nn.functional.cosine_similarity(output.float(), target.float())).sum().item(), len(output)
    pairs = zip(output.split(_LOGIT_ROWS), target.split(_LOGIT_ROWS), strict=True)
    return sum(divergence(rows, wanted).item() * len(rows) for rows, wanted in pairs), len(output)


def _scores(
    model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]], trials: Sequence[tuple[str, Mapping[str, Tensor]]],
    dense: Callable[[int], Mapping[nn.Module, Any]], replaced: Callable[[int], Mapping[nn.Module, Any]],
) -> list[float]:  # fmt: skip
    """Divergence of each trial; `dense` and `replaced` give the stand-ins of batch n, without and with a trial."""
    means = [_Mean() for _ in trials]
    for number, batch in enumerate(batches):
        with patched_forwards(dense(number)):
            target = prediction_of(model(**batch))
        for mean, (_, tensors) in zip(means, trials, strict=True):
            with _replaced(model, tensors), patched_forwards(replaced(number)):
                mean.add(*_distance(model, prediction_of(model(**batch)), target, batch))
    return [mean.value(name) for mean, (name, _) in zip(means, trials, strict=True)]


@contextmanager
def _replaced(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Other values of parameters; tied ones change with them."""
    before = {name: model.get_parameter(name).data for name in tensors}
    try:
        for name, tensor in tensors.items():
            model.get_parameter(name).data = tensor
        yield
    finally:
        for name, tensor in before.items():
            model.get_parameter(name).data = tensor


def _replay(model: nn.Module, blocks: Sequence[str], kept: Sequence[Any] | None, number: int) -> dict[nn.Module, Any]:
    """Stand-ins for the blocks before a place: each returns what the last of them has returned for this batch."""
    if kept is None:
        return {}
    return {model.get_submodule(block): lambda *args, **kwargs: kept[number] for block in blocks}


def _moments(
    model: PreTrainedModel, arch: Architecture, block: str, items: Sequence[Item], batches: Sequence[Mapping[str, Tensor]],
    stand_ins: Callable[[int], Mapping[nn.Module, Any]],
) -> tuple[dict[str, tuple[Tensor, Tensor]], list[Any]]:  # fmt: skip
    """`(gram [in, in], total [in + 1])` of the inputs of each item, and the block's output for every batch."""
    firsts = {item.modules[0]: item.name for item in items}
    masks = {item.name: arch.mask_of(block, item.modules[0]) for item in items}
    sizes = {item.name: dense_shape(model.get_submodule(item.modules[0]))[1] for item in items}
    grams = {name: torch.zeros(size, size, dtype=torch.float64, device=model.device) for name, size in sizes.items()}
    totals = {name: torch.zeros(size + 1, dtype=torch.float64, device=model.device) for name, size in sizes.items()}
    outputs: list[Any] = []
    batch: Mapping[str, Tensor] = {}

    def note(name: str, args: tuple[Tensor, ...]) -> None:
        x = without_padding(args[0], batch.get(masks[name])).flatten(0, -2)
        add_gram_(grams[name], x)
        totals[name][:-1] += x.sum(0, dtype=torch.float32)
        totals[name][-1] += len(x)

    def stop(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs.append(output)
        raise StopForward

    hooks = [
        model.get_submodule(module).register_forward_pre_hook(lambda _, args, name=name: note(name, args))
        for module, name in firsts.items()
    ]
    hooks.append(model.get_submodule(block).register_forward_hook(stop))
    try:
        for number, batch in enumerate(batches):
            with patched_forwards(stand_ins(number)), suppress(StopForward):
                model(**batch)
            if len(outputs) != number + 1:
                raise UnsupportedModel(f"{block} does not run with these inputs: its layers cannot be measured")
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (grams[name].cpu(), totals[name].cpu()) for name in grams}, outputs


def _block_errors(
    model: PreTrainedModel, items: Sequence[Item], moments: Mapping[str, tuple[Tensor, Tensor]],
    scored: Sequence[Mapping[str, Tensor]], dense: Callable[[int], Mapping[nn.Module, Any]],
    replaced: Callable[[int], Mapping[nn.Module, Any]],
) -> dict[str, list[float]]:  # fmt: skip
    """Errors of the items of one block: output errors of all choices, in the currency of the one that is tried."""
    trials, tried = [], []
    for item in items:
        middle = (len(item.alternatives) - 1) // 2
        trials.append((item.name, _trial(model, item, item.alternatives[middle], *moments[item.name])))
        tried.append(middle)
    errors = {}
    for item, middle, score in zip(items, tried, _scores(model, scored, trials, dense, replaced), strict=True):
        lost = _output_errors(model, item, *moments[item.name])
        sensitivity = score / lost[middle] if lost[middle] > 0 else 0.0
        errors[item.name] = [sensitivity * value for value in lost]
    return errors


def _trial(model: nn.Module, item: Item, alternative: Alternative, gram: Tensor, total: Tensor) -> dict[str, Tensor]:
    """The parameters of an item as an alternative would make them."""
    tensors = {}
    for name in item.modules:
        module = model.get_submodule(name)
        linear = copy.copy(as_linear(module))
        linear._parameters = dict(linear._parameters)
        if linear.bias is not None:  # the compressed Linear takes it over, and its values change
            linear.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        moments = _spread(linear, gram, total)
        with plain_products():
            new = alternative.method.compress_linear(
                linear, moments if alternative.config.needs_calibration else None, alternative.config
            )
        if linear.bias is not None:
            if moments is not None and alternative.config.needs_calibration:
                correct_bias_(new, linear.weight, total)
            tensors[f"{name}.bias"] = new.bias.data
        dense = new.to_dense().to(module.weight.dtype)
        tensors[f"{name}.weight"] = dense.T.contiguous() if isinstance(module, Conv1D) else dense
    return tensors


def _output_errors(model: nn.Module, item: Item, gram: Tensor, total: Tensor) -> list[float]:
    """Output error of every alternative, in the units of the outputs; from some rows of each Linear."""
    lost = [0.0] * len(item.alternatives)
    for name in item.modules:
        module = model.get_submodule(name)
        moments = _spread(module, gram, total)
        part = _some_rows(module)
        share = dense_shape(module)[0] / len(part.weight)
        for index, alternative in enumerate(item.alternatives):
            given = moments if alternative.config.needs_calibration else None
            with plain_products():
                new = alternative.method.compress_linear(part, given, alternative.config)
            lost[index] += share * output_energy(part.weight.detach().float() - new.to_dense(), moments)
    return lost


def _spread(module: nn.Module, gram: Tensor, total: Tensor) -> Tensor | None:
    """The gram matrix that a module answers for: of the spread of its inputs if its bias answers for their mean."""
    if not gram.diagonal().any():
        return None
    return gram if module.bias is None else centered(gram, total)


def _some_rows(module: nn.Module) -> nn.Linear:
    weight = as_linear(module).weight.detach()
    rows = weight[:: max(1, len(weight) // _SEARCH_ROWS)].clone()
    part = on_meta(module)
    part.out_features, part.bias = len(rows), None
    part.weight = nn.Parameter(rows, requires_grad=False)
    return part


def _embeddings(model: nn.Module, item: Item, alternative: Alternative) -> dict[str, Tensor]:
    tensors = {}
    for name in item.modules:
        module = model.get_submodule(name)
        new = alternative.method.compress_embedding(module, alternative.config)
        assert new is not None, "an alternative of an item takes its modules"
        tensors[f"{name}.weight"] = new.to_dense(module.weight.dtype)
    return tensors
