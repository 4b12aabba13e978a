"""The block runner: blocks in order, their inputs taken through the already compressed prefix.

The skeleton outside the blocks is run once per batch with stand-ins for the blocks, which records what the model
hands to each block beside the hidden state (masks, rotary tables, an encoder's output). From then on only blocks run,
one at a time, so a checkpoint larger than memory goes through the same loop as a model in memory.

Inside a block the Linears are grouped by the tensor they read (q, k and v share one gram matrix) and compressed group
by group, so that the inputs of `down_proj` already come through the compressed `up_proj`.
"""

import copy
import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from . import distributed
from .arch import Architecture, as_linear, dense_shape, describe, prediction_of
from .calibration import Calibration
from .checkpoint import Journal, TensorSource, check_finite, rebuild_, share_buffers_, tie_parts_
from .config import MethodConfig, ReconstructionConfig
from .errors import NumericalError, UnsupportedModel
from .fitting import fit_, patched_forwards, relative_error
from .functional.gram import add_gram_, centered, output_energy, without_padding
from .groups import linear_spec
from .products import plain_products
from .report import LayerReport, Report, peak_memory_bytes, return_freed_memory
from .select import replace_modules, select_stages
from .stored import dense_once, open_linears, tied_parts

logger = logging.getLogger(__name__)

_PROBE_TOKENS = 64
_BATCHES_PER_TRIM = 8
Progress = Callable[[str, int, int], None]
"""Called as `progress(unit, finished units, all units)` before each unit and once at the end."""


class Guide(Protocol):
    """What a method has found out about the dense model."""

    def share(self, name: str, finished: Sequence[LayerReport], num_inputs: float) -> Any:
        """What `compress_linear` gets as `guide`, given the layers that are finished and the inputs behind its gram matrix."""


@dataclass(frozen=True)
class Method:
    """What a slice gives to the runner."""

    config: type[MethodConfig]
    """Its settings."""
    layers: Mapping[str, type[nn.Module]]
    """Name in the modules table -> class with `empty_like(old, **spec)`, `to_dense()` and `spec()`."""
    compress_linear: Callable[..., nn.Module]
    """`(linear, gram [in, in] | None, config, solve=True) -> module`, and `guide=` its share where there is a `prepare`; without a gram matrix the inputs are unknown.
    With `solve=False` it returns the empty module, which another rank's solution fills."""
    compress_embedding: Callable[..., nn.Module | None]
    """`(embedding or head, config, solve=True) -> module`, or None to leave it."""
    tied_layer: str
    """Name in `layers` of the Linear that shares the tensors of a compressed embedding."""
    arrange: Callable[..., set[str]] | None = None
    """`(model, arch, block, names, config, solve=True) -> arranged names`, run on a dense block before any of its Linears are
    compressed: it may reorder hidden units. `compress_linear` then gets `is_arranged=`. With `solve=False` it only names."""
    prepare: Callable[..., Guide | None] | None = None
    """`(model, arch, names, batches, config, progress) -> guide`, run on the dense model before anything is compressed."""
    is_dealt: bool = True
    """Whether the ranks deal the Linears out and send each other the results, whose sizes they must know beforehand;
    otherwise each solves all of them."""
    finish: Callable[..., None] | None = None
    """`(module, linear, gram, config)`, run in place once later stages have compressed the Linears that a module is built
    of; `linear` is the dense one, `gram` that of its inputs."""

    cut_block: Callable[..., dict[str, float]] | None = None
    """`(model, arch, block, names, config, moments, outputs) -> lost energy by name`: takes hidden units out of a dense block in
    place, instead of compressing its Linears; `moments(name)` are those of a Linear's inputs, `outputs(name)` the guide's
    share; without moments it cuts to size only."""
    shorten: Callable[..., list[str]] | None = None
    """`(model, arch, batches, config) -> names`: takes whole blocks out of a dense model, before anything else."""

    def empty(self, name: str, linear: nn.Linear, config: MethodConfig, arranged: Collection[str]) -> nn.Module:
        """What a Linear becomes, without its values; `arranged` are those whose rows are in order."""
        hints = {"is_arranged": name in arranged} if self.arrange else {}
        return self.compress_linear(linear, None, config, solve=False, **hints)

    def table_entry(self, module: nn.Module) -> dict[str, Any]:
        """The modules-table entry of a module that this method made."""
        name = next(name for name, cls in self.layers.items() if type(module) is cls)
        return {"layer": name, **module.spec()}


class _Moments(NamedTuple):
    """Sums over the calibration inputs of a Linear, float64; None where nobody needs them."""

    gram: Tensor | None
    """`[in, in]` of x x^T."""
    total: Tensor | None
    """`[in + 1]` of x, and the number of inputs."""
    cross: Tensor | None
    """`[in, in]` of x_dense x^T, the dense model's input times the one that comes through the compressed prefix."""


class _Stage(NamedTuple):
    """A method at work on one block."""

    method: Method
    config: MethodConfig
    guide: Guide | None
    arranged: set[str]
    """Linears whose rows `method.arrange` has put in order."""


@dataclass
class _Built:
    """A module that was built of Linears, while later stages may compress those."""

    method: Method
    config: MethodConfig
    linear: nn.Linear
    gram: Tensor | None


class StopForward(Exception):
    """Ends a forward pass early once it has given what it was run for."""


@dataclass
class _Call:
    """What the model passes to one block for one batch, without the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class BlockRunner:
    """Runs the recipe over a model, block by block; see the module header.

    Args:
        model: in memory, or a skeleton with meta tensors if `source` is given.
        arch: where its blocks are.
        stages: methods with their configs, in order.
        calibration: model inputs; each rank of a process group works on its share. Tensors of a `source` go to its device.
        report: filled as blocks finish.
        source: dense tensors of a model that is not in memory, under the model's own names.
        journal: where finished units are written; without it nothing is written.
        reconstruction: how each block is fitted to its dense form once its Linears are compressed; None leaves it out.
    """

    def __init__(
        self, model: PreTrainedModel, arch: Architecture, stages: Sequence[tuple[Method, MethodConfig]],
        calibration: Calibration, report: Report, source: TensorSource | None = None, journal: Journal | None = None,
        reconstruction: ReconstructionConfig | None = None,
    ) -> None:  # fmt: skip
        """Resolve the targets of every stage."""
        self.model, self.arch, self.stages = model, arch, list(stages)
        self.report, self.source, self.journal, self.reconstruction = report, source, journal, reconstruction
        self.layers = {name: cls for method, _ in stages for name, cls in method.layers.items()}
        self.targets = select_stages(arch.roles, [config for _, config in stages])
        batches = distributed.share(calibration.batches)
        self.batches = [
            {name: value.to(model.device) if source is None else value for name, value in batch.items()}
            for batch in [*batches, probe_inputs(calibration)]
        ]
        self.device = next(iter(self.batches[0].values())).device
        if source is not None:
            move_buffers_(model, self.device)
        self.table: dict[str, dict[str, Any]] = {}
        self.cuts: dict[str, dict[str, Any]] = {}  # Linears that have lost units, as they are before later stages
        self.hidden: list[Tensor] = []
        self.dense_hidden: list[Tensor] = []  # as `hidden`, of the dense model; only where a stage compares with it
        self.outputs: list[list[Any]] = []
        self.is_tuple: bool | None = None
        # Parts of the block whose targets are all compressed -> their output per batch. Attention is the dear one: without
        # this it would run for each group of inputs that comes after it.
        self.settled: dict[nn.Module, dict[int, Any]] = {}
        self.resident: set[int] = set()
        self.built: dict[str, _Built] = {}
        self.guides: list[Guide | None] = [None] * len(self.stages)
        self.num_resumed = 0 if journal is None else len(journal.entries)

    @torch.no_grad()
    def run(self, progress: Progress = lambda unit, done, total: None) -> Tensor:
        """Compress everything.

        Returns:
            Output of the compressed model for the probe, the first `_PROBE_TOKENS` tokens of the first sequence.

        Raises:
            NumericalError: a weight or a block's output is not finite.
            OutputError: the journal cannot be written.
        """
        started = time.perf_counter()
        training = self.model.training
        self.model.eval()
        units = ["embeddings", *self.arch.blocks]
        with without_cache(self.model):
            progress(units[0], 0, len(units))
            for position, (method, config) in enumerate(self.stages):
                if method.prepare is not None and self.num_resumed < len(units):
                    names = [name for name in self.arch.roles if name in self.targets[position]]
                    if not names:
                        continue
                    self.guides[position] = method.prepare(
                        self.model, self.arch, names, self.batches[:-1], config, partial(progress, "sensitivity")
                    )
                    return_freed_memory()
            self._prepare(0, self._outside_blocks())
            self._compress(0, units[0], self._compress_outside)
            for stack in self.arch.stacks:
                first = units.index(stack[0])
                twins = {stack[0]: self._twin(stack[0])}  # before an earlier run's result takes its place
                self._prepare(first, self._inside(stack[0]))
                calls = self._record(stack)
                self.dense_hidden = list(self.hidden)
                for position, block in enumerate(stack, start=first):
                    progress(block, position, len(units))
                    dense = twins.pop(block) if block in twins else self._twin(block)
                    self._prepare(position, self._inside(block))
                    self._compress(position, block, lambda: self._compress_block(block, calls[block], dense))  # noqa: B023
                    for number, call in enumerate(calls[block] if dense is not None else ()):
                        self.dense_hidden[number] = self._run_dense(dense, number, call)
                    self._advance(block, calls.pop(block))
                    if self.source is not None:
                        self.model.get_submodule(block).to("meta")
                self.outputs.append([(hidden, None, None) for hidden in self.hidden] if self.is_tuple else self.hidden)
            logits = self._probe_output()
            progress("finished", len(units), len(units))
        self.model.train(training)
        self.report.seconds["compress"] = time.perf_counter() - started
        self.report.peak_memory_bytes = peak_memory_bytes()
        return logits

    @torch.no_grad()
    def rewrite(self) -> Tensor:
        """Write every unit again, with `report.distillation`, after the whole model was changed; it must be in memory.

        Returns:
            As `run`.

        Raises:
            OutputError: the journal cannot be written.
        """
        if self.journal is not None:
            for position, block in enumerate(["", *self.arch.blocks]):
                names = self._inside(block) if position else self._outside_blocks()
                self.journal.replace(position, self._tensors(names), {"distillation": self.report.distillation})
        training = self.model.training
        self.model.eval()
        with without_cache(self.model):
            output = prediction_of(self.model(**self.batches[-1])).cpu()
        self.model.train(training)
        return output

    def pruned_linears(self, prefix: str = "") -> list[nn.Linear | Conv1D]:
        """The dense Linears of a model that a stage prunes; none of another."""
        is_pruned = any(method.cut_block is not None for method, _ in self.stages)
        modules = [self.model.get_submodule(name) for name in self.arch.roles if is_pruned and name.startswith(prefix)]
        return [module for module in modules if isinstance(module, nn.Linear | Conv1D)]

    # Units: what is loaded, compressed and written together.

    def _inside(self, block: str) -> list[str]:
        return [name for name in self.model.state_dict() if name.startswith(block + ".")]

    def _outside_blocks(self) -> list[str]:
        prefixes = tuple(block + "." for block in self.arch.blocks)
        return [name for name in self.model.state_dict() if not name.startswith(prefixes)]

    def _prepare(self, position: int, names: list[str]) -> None:
        """Make a unit resident: as an earlier run has compressed it, or dense from the source."""
        if position in self.resident:
            return
        self.resident.add(position)
        if self.journal is not None and position < self.num_resumed:
            entry = self.journal.entries[position]
            rebuild_(self.model, entry.get("cuts", {}), self.layers)
            self.cuts |= entry.get("cuts", {})
            rebuild_(self.model, entry["modules"], self.layers)
            self.table |= entry["modules"]
            self.report.layers += [LayerReport(**layer) for layer in entry["layers"]]
            self.report.notes += entry["notes"]
            if entry.get("reconstruction") is not None:
                self.report.reconstruction[entry["unit"]] = entry["reconstruction"]
            shard = TensorSource([self.journal.folder / entry["file"]])
            assign_(self.model, shard.read(shard.file_of), self.device)
            for name, spec in entry["modules"].items():
                if "tied_to" in spec:
                    share_buffers_(self.model.get_submodule(name), self.model.get_submodule(spec["tied_to"]))
            self.model.tie_weights()
        elif self.source is not None:
            assign_(self.model, self.source.read(name for name in names if name in self.source.file_of), self.device)
            self.model.tie_weights()

    def _compress(self, position: int, unit: str, work: Callable[[], Mapping[str, LayerReport | None]]) -> None:
        """Compress a resident unit and write it, unless an earlier run has."""
        if position < self.num_resumed:
            return
        notes = len(self.report.notes)
        modules = work()
        self.report.layers += [layer for layer in modules.values() if layer is not None]
        if self.journal is None:
            return
        names = self._outside_blocks() if position == 0 else self._inside(unit)
        record = {
            "modules": {name: self.table[name] for name in modules if name in self.table},
            "cuts": {name: self.cuts[name] for name in modules if name in self.cuts},
            "layers": [asdict(layer) for layer in modules.values() if layer is not None],
            "notes": self.report.notes[notes:],
            "reconstruction": self.report.reconstruction.get(unit),
        }
        self.journal.append(unit, self._tensors(names), record)

    def _tensors(self, names: list[str]) -> dict[str, Tensor]:
        """State of the named tensors, each storage once: the embedding's name wins over names tied to it.

        A part that is another module's is stored there, maybe in another unit.
        """
        first = self.arch.embedding or ""
        tied = tuple(f"{name}.{part}." for name, module in self.model.named_modules() for part in tied_parts(module))
        seen, kept = set(), {}
        for name in sorted(names, key=lambda name: not name.startswith(first + ".")):
            if name.startswith(tied):
                continue
            tensor = self.model.get_parameter_or_buffer(name).data
            key = (tensor.data_ptr(), tensor.shape)
            if key not in seen:
                seen.add(key)
                kept[name] = tensor
        return kept

    # Compression of one unit. Each returns module name -> its layer report, None for a module that shares another's tensors.

    def _compress_outside(self) -> dict[str, LayerReport | None]:
        for name in (self.arch.embedding, self.arch.head):
            if name is not None:
                check_finite(name + ".weight", self.model.get_submodule(name).weight)
        made, table = compress_outside_(self.model, self.arch, self.stages, self.layers)
        self.table |= table
        reports = {
            name: self._report(name, part.role, part.config.method, part.old, part.new, None, part.seconds)
            for name, part in made.items()
        }
        return {name: reports.get(name) for name in table}

    def _compress_block(self, block: str, calls: list[_Call], dense: nn.Module | None) -> dict[str, LayerReport | None]:
        found: dict[str, LayerReport | None] = {}
        module = self.model.get_submodule(block)
        self.built = {}
        if self.reconstruction is not None:
            targets_of = [self._run_block(module, number, call) for number, call in enumerate(calls[:-1])]
        arranged: list[set[str]] | None = None
        for position, ((method, config), targets, guide) in enumerate(zip(self.stages, self.targets, self.guides, strict=True)):
            names = [part for name in self.arch.targets(block) if name in targets for part in self._linears(name)]
            for name in names:
                check_finite(name + ".weight", self.model.get_submodule(name).weight)
            if names and method.cut_block is not None:
                found |= self._cut_block(method, config, guide, block, names, calls)
            elif names:
                if arranged is None:
                    arranged = arrange_(self.model, self.arch, [block], self.stages, self.targets)
                self._run_stage(_Stage(method, config, guide, arranged[position]), block, names, calls, dense, found)
        if self.reconstruction is not None and found:
            self.settled = {}
            self._reconstruct(block, module, calls, targets_of)
        return found

    def _cut_block(
        self, method: Method, config: MethodConfig, guide: Guide | None, block: str, names: list[str], calls: list[_Call]
    ) -> dict[str, LayerReport | None]:  # fmt: skip
        """Take units out of a block; every rank does the same."""
        started = time.perf_counter()
        self.settled = {}
        sizes = {name: self.model.get_submodule(name).weight.numel() for name in self.arch.targets(block)}
        lost = method.cut_block(
            self.model, self.arch, block, names, config,
            lambda name: self._moments(block, name, calls)[:2],
            lambda name: None if guide is None else guide.share(name, [], 0.0),
        )  # fmt: skip
        self.settled = {}
        seconds = (time.perf_counter() - started) / max(1, len(lost))
        self.cuts |= {name: linear_spec(self.model, name) for name in lost}
        return {
            name: LayerReport(
                name=name,
                role=self.arch.roles[name],
                method=config.method,
                num_weights=sizes[name],
                compressed_bytes=stored_bytes(self.model.get_submodule(name)),
                relative_error=error,
                seconds=seconds,
                operations_ratio=self.model.get_submodule(name).weight.numel() / sizes[name],
            )
            for name, error in lost.items()
        }

    def _run_stage(
        self, stage: _Stage, block: str, names: list[str], calls: list[_Call], dense: nn.Module | None,
        found: dict[str, LayerReport | None],
    ) -> None:  # fmt: skip
        """Compress a stage's Linears of one block, group by group; adds to what the block's earlier stages have found."""
        module, config = self.model.get_submodule(block), stage.config
        self.settled = {}
        waiting = set(names)
        for group in self._input_groups(module, names, calls) if config.needs_calibration else [names]:
            sums = _Moments(None, None, None)
            if config.needs_calibration:
                sums = self._moments(block, group[0], calls, dense if config.needs_dense_inputs else None)
            started = time.perf_counter()
            found |= self._compress_group(group, sums, stage, [layer for layer in found.values() if layer is not None])
            waiting -= set(group)
            for outer in dict.fromkeys(map(self._outer, group)):
                if outer not in group and not any(self._outer(name) == outer for name in waiting):
                    found[outer] = self._close(outer, config, sums.gram, time.perf_counter() - started)
            for part, child in module.named_children():
                inside = [name for name in names if name.startswith(f"{block}.{part}.")]
                if inside and all(name in found for name in inside):
                    self.settled.setdefault(child, {})

    def _reconstruct(self, block: str, module: nn.Module, calls: list[_Call], targets: list[Tensor]) -> None:
        """Fit a compressed block to its dense outputs on the calibration batches, padding left out."""

        def loss_of(call: Callable[..., Any], step: int) -> Tensor:
            number = step % len(targets)
            output = call(self.hidden[number], *calls[number].args, **calls[number].kwargs)
            output = output[0] if isinstance(output, tuple) else output
            mask = self.batches[number].get(self.arch.mask_of(block))
            return relative_error(without_padding(output, mask), without_padding(targets[number], mask))

        num_steps = self.reconstruction.epochs * len(targets)
        linears = self.pruned_linears(f"{block}.")
        losses = list(fit_(module, loss_of, num_steps, self.reconstruction.learning_rate, "reconstruction", linears))
        first, last = losses[: len(targets)], losses[-len(targets) :]
        self.report.reconstruction[block] = [sum(first) / len(first), sum(last) / len(last)]

    def _linears(self, name: str) -> list[str]:
        """A Linear itself, or those that an earlier stage has built it of."""
        module = self.model.get_submodule(name)
        if isinstance(module, nn.Linear | Conv1D):
            return [name]
        return [f"{name}.{part}" for part in open_linears(module)]

    def _outer(self, name: str) -> str:
        """The Linear of the dense model that this one is, or is a part of."""
        while name not in self.arch.roles:
            name = name.rpartition(".")[0]
        return name

    def _compress_group(
        self, names: list[str], sums: _Moments, stage: _Stage, earlier: Sequence[LayerReport]
    ) -> dict[str, LayerReport | None]:  # fmt: skip
        """Compress Linears that share one input; the ranks deal them out by cost and exchange the results.

        A Linear with a bias answers for the spread of its inputs only: what the mean input loses goes into the bias.
        """
        gram, total, cross = sums
        method, config = stage.method, stage.config
        old = {name: as_linear(self.model.get_submodule(name)) for name in names}
        owners = distributed.owners([linear.weight.numel() * linear.in_features for linear in old.values()])
        found: dict[str, LayerReport | None] = {}
        new: dict[str, nn.Module] = {}
        for owner, (name, linear) in zip(owners, old.items(), strict=True):
            started = time.perf_counter()
            moments = None if gram is None or not gram.diagonal().any() else gram
            if gram is not None and moments is None:
                self.report.notes.append(f"{name} never saw an input that is not zero: rounded to nearest")
            elif moments is not None and linear.bias is not None:
                moments = centered(gram, total)
            return_freed_memory()
            is_mine = owner == distributed.rank() or not method.is_dealt
            known = [*earlier, *(layer for layer in found.values() if layer is not None)]
            hints = self._hints(name, stage, known, total)
            if cross is not None and moments is not None and linear.bias is None:
                hints["cross"] = cross
            with plain_products():
                made = method.compress_linear(linear, moments, config, solve=is_mine, **hints)
            outer = self._outer(name)
            if made is linear:
                seconds = time.perf_counter() - started
                found[name] = self._report(name, self.arch.roles[outer], "dense", linear, linear, None, seconds)
                continue
            new[name] = made
            if method.is_dealt:
                distributed.broadcast_(made.buffers(), owner)
            if moments is not None and linear.bias is not None:
                correct_bias_(made, linear.weight, total)
            self.table[name] = method.table_entry(made)
            seconds = time.perf_counter() - started
            report = self._report(name, self.arch.roles[outer], config.method, linear, made, moments, seconds)
            found[name] = report if name == outer else None
            if open_linears(made):
                self.built[name] = _Built(method, config, linear, moments)
        return found | dict.fromkeys(self._put(new))

    def _put(self, new: Mapping[str, nn.Module]) -> list[str]:
        """Put new modules in their places; their tied parts share what they name, or what a later stage has made of it.

        Returns:
            The names of such parts, which have table entries of their own.
        """
        if not new:
            return []
        replace_modules(self.model, new, lambda name, _: new[name])
        twins = {
            f"{name}.{part}": {**self.table[source], "tied_to": source}
            for name, module in new.items() for part, source in tied_parts(module).items() if source in self.table
        }  # fmt: skip
        rebuild_(self.model, twins, self.layers)
        self.table |= twins
        for name in new:
            tie_parts_(self.model, name)
        return [*twins]

    def _hints(self, name: str, stage: _Stage, known: Sequence[LayerReport], total: Tensor | None) -> dict[str, Any]:
        """What the stage has prepared for one Linear."""
        hints: dict[str, Any] = {"is_arranged": name in stage.arranged} if stage.method.arrange else {}
        if stage.guide is not None:  # the report knows whole blocks only
            num_inputs = 0.0 if total is None else total[-1].item()
            hints["guide"] = stage.guide.share(name, [*self.report.layers, *known], num_inputs)
        return hints

    def _close(self, outer: str, config: MethodConfig, gram: Tensor | None, seconds: float) -> LayerReport:
        """Finish a module whose Linears a later stage has compressed, and report both stages as one."""
        started = time.perf_counter()
        built = self.built[outer]
        gram = gram if built.gram is None else built.gram
        module = self.model.get_submodule(outer)
        if built.method.finish is not None:
            built.method.finish(module, built.linear, gram, built.config)
        methods = f"{built.config.method}+{config.method}"
        seconds += time.perf_counter() - started
        return self._report(outer, self.arch.roles[outer], methods, built.linear, module, gram, seconds)

    def _report(
        self, name: str, role: str, method: str, old: nn.Module, new: nn.Module, gram: Tensor | None, seconds: float
    ) -> LayerReport:  # fmt: skip
        return LayerReport(
            name=name,
            role=role,
            method=method,
            num_weights=old.weight.numel(),
            compressed_bytes=stored_bytes(new),
            relative_error=_relative_error(old.weight, new, gram),
            seconds=seconds,
            operations_ratio=new.num_multiply_adds / old.weight.numel() if hasattr(new, "num_multiply_adds") else None,
        )

    # Forward passes.

    def _record(self, stack: tuple[str, ...]) -> dict[str, list[_Call]]:
        """Run the skeleton once per batch: the hidden state that enters the stack, and each block's side inputs.

        The first block really runs once; if it returns more than the hidden state (T5's position bias), it runs for
        every batch, because later blocks take those values as inputs.
        """
        blocks = {name: self.model.get_submodule(name) for name in stack}
        calls: dict[str, list[_Call]] = {name: [] for name in stack}
        self.hidden, self.is_tuple = [], None
        extras: tuple[Any, ...] = ()

        def stand_in(name: str, *args: Any, **kwargs: Any) -> Any:
            nonlocal extras
            hidden, call = split_call(args, kwargs)
            calls[name].append(call)
            if name == stack[0]:
                self.hidden.append(hidden)
                if self.is_tuple is not False:
                    output = type(blocks[name]).forward(blocks[name], hidden, *call.args, **call.kwargs)
                    self.is_tuple = isinstance(output, tuple)
                    extras = output[1:] if self.is_tuple else ()
            if name == stack[-1]:
                raise StopForward
            return (hidden, *extras) if self.is_tuple else hidden

        for number, batch in enumerate(self.batches):
            forwards = {block: partial(stand_in, name) for name, block in blocks.items()} | self._replay(number)
            with patched_forwards(forwards), suppress(StopForward):
                self.model(**batch)
        if any(len(calls[name]) != len(self.batches) for name in stack):
            raise UnsupportedModel(
                f"{stack[0]} and its siblings must each run once per calibration batch, and with these inputs they do not: "
                "the model shares blocks between layers or needs other inputs"
            )
        return calls

    def _replay(self, number: int) -> dict[nn.Module, Callable[..., Any]]:
        """Stand-ins for the stacks that are finished: every block returns the stack's output that was kept.

        What a block returns beside it is read by later blocks only, which are stand-ins themselves.
        """
        forwards: dict[nn.Module, Callable[..., Any]] = {}
        for stack, outputs in zip(self.arch.stacks, self.outputs, strict=False):
            for name in stack:
                forwards[self.model.get_submodule(name)] = lambda *args, output=outputs[number], **kwargs: output
        return forwards

    def _input_groups(self, block: nn.Module, names: list[str], calls: list[_Call]) -> list[list[str]]:
        """Targets by the tensor they read, in the order they run; a target that does not run stands alone."""
        groups: dict[tuple[Any, ...], list[str]] = {}
        alive = []  # inputs are kept until the end, or a freed address could come back as another tensor

        def note(name: str, x: Tensor) -> None:
            alive.append(x)
            groups.setdefault((x.data_ptr(), x.shape, x.stride()), []).append(name)

        handles = [
            self.model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
            for name in names
        ]
        try:
            self._run_block(block, 0, calls[0])
        finally:
            for handle in handles:
                handle.remove()
        seen = {name for group in groups.values() for name in group}
        return [*groups.values(), *([name] for name in names if name not in seen)]

    def _moments(self, block: str, name: str, calls: list[_Call], dense: nn.Module | None = None) -> _Moments:
        """Moments of a target's inputs over all calibration batches (and ranks), padding left out.

        With the dense block also those between its inputs and the target's.
        """
        target = self.model.get_submodule(name)
        size = dense_shape(target)[1]
        gram = torch.zeros(size, size, dtype=torch.float64, device=self.hidden[0].device)
        total = torch.zeros(size + 1, dtype=torch.float64, device=gram.device)
        part = name.removeprefix(block + ".")
        has_twin = dense is not None and any(part == other for other, _ in dense.named_modules())
        cross = torch.zeros_like(gram) if has_twin else None
        mask: Tensor | None = None
        twin: Tensor | None = None

        def kept(x: Tensor) -> Tensor:
            return without_padding(x, mask).flatten(0, -2)

        def note_dense(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            nonlocal twin
            twin = kept(args[0])
            raise StopForward

        def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = kept(args[0])
            add_gram_(gram, x)
            if cross is not None:
                cross.add_(twin.float().T @ x.float())
            total[:-1] += x.sum(0, dtype=torch.float32)
            total[-1] += len(x)
            raise StopForward

        handles = [target.register_forward_pre_hook(note)]
        if cross is not None:
            handles.append(dense.get_submodule(part).register_forward_pre_hook(note_dense))
        module = self.model.get_submodule(block)
        try:
            with dense_once(module):
                for number, batch in enumerate(self.batches[:-1]):
                    mask = batch.get(self.arch.mask_of(block, self._outer(name)))
                    if cross is not None:
                        with suppress(StopForward):
                            self._run_dense(dense, number, calls[number])
                    with suppress(StopForward):
                        self._run_block(module, number, calls[number])
        finally:
            for handle in handles:
                handle.remove()
        distributed.sum_([gram, total, *([] if cross is None else [cross])])
        if not gram.isfinite().all():
            raise NumericalError("inputs of a layer are not finite: the model overflows on the calibration text")
        # Solvers work on the CPU, in float64.
        return _Moments(gram.cpu(), total.cpu(), None if cross is None else cross.cpu())

    def _run_block(self, block: nn.Module, number: int, call: _Call) -> Tensor:
        """One block on one batch; the parts of it that are settled run once and are remembered."""
        if number % _BATCHES_PER_TRIM == 0:
            return_freed_memory()
        with patched_forwards({child: partial(self._remember, child, number) for child in self.settled}):
            output = block(self.hidden[number], *call.args, **call.kwargs)
        return output[0] if isinstance(output, tuple) else output

    def _twin(self, block: str) -> nn.Module | None:
        """A copy of a block that stays dense, where a stage compares with it."""
        needs = any(config.needs_dense_inputs for _, config in self.stages)
        return copy.deepcopy(self.model.get_submodule(block)) if needs else None

    def _run_dense(self, dense: nn.Module, number: int, call: _Call) -> Tensor:
        """The dense block on what the dense model would have handed to it."""
        output = dense(self.dense_hidden[number], *call.args, **call.kwargs)
        return output[0] if isinstance(output, tuple) else output

    def _remember(self, child: nn.Module, number: int, *args: Any, **kwargs: Any) -> Any:
        kept = self.settled[child]
        if number not in kept:
            kept[number] = type(child).forward(child, *args, **kwargs)
        return kept[number]

    def _advance(self, block: str, calls: list[_Call]) -> None:
        """Replace every batch's hidden state by the compressed block's output."""
        module = self.model.get_submodule(block)
        with dense_once(module):
            for number, call in enumerate(calls):
                self.hidden[number] = self._run_block(module, number, call)
                if not self.hidden[number].isfinite().all():
                    raise NumericalError(f"{block} gives values that are not finite on calibration batch {number}")
        self.settled = {}

    def _probe_output(self) -> Tensor:
        with patched_forwards(self._replay(len(self.batches) - 1)):
            return prediction_of(self.model(**self.batches[-1])).cpu()


def arrange_(
    model: PreTrainedModel, arch: Architecture, blocks: Sequence[str], stages: Sequence[tuple[Method, MethodConfig]],
    targets: Sequence[Collection[str]], solve: bool = True,
) -> list[set[str]]:  # fmt: skip
    """Put rows in order, for all stages at once: only what is dense can be permuted.

    Nothing is where another stage has measured the dense model, of which it knows the old order.

    Args:
        model: the blocks are dense.
        arch: its roles.
        blocks: which.
        stages: methods with their configs, in order.
        targets: the names that each selects.
        solve: with False nothing is moved and no weight is read, also on meta.

    Returns:
        By stage, names of the Linears whose rows are in order.
    """
    found: list[set[str]] = [set() for _ in stages]
    for block in () if any(config.needs_whole_model for _, config in stages) else blocks:
        taken: set[str] = set()
        for arranged, (method, config), names in zip(found, stages, targets, strict=True):
            here = [name for name in arch.targets(block) if name in names and name not in taken]
            if here and method.arrange is not None:
                arranged |= method.arrange(model, arch, block, here, config, solve=solve)
            if method.cut_block is None:
                taken.update(here)
    return found


class Outside(NamedTuple):
    """An embedding or a head that was replaced."""

    role: str
    method: Method
    config: MethodConfig
    old: nn.Module
    new: nn.Module
    seconds: float


def compress_outside_(
    model: PreTrainedModel, arch: Architecture, stages: Sequence[tuple[Method, MethodConfig]],
    layers: Mapping[str, type[nn.Module]], solve: bool = True,
) -> tuple[dict[str, Outside], dict[str, dict[str, Any]]]:  # fmt: skip
    """Replace embedding and head, each by the first stage that takes it; what is tied to the embedding shares its tensors.

    Args:
        model: dense outside its blocks; with `solve=False` also on meta.
        arch: names the embedding, the head and what is tied.
        stages: methods with their configs, in order.
        layers: class name -> class, for the tied modules.
        solve: whether the new modules are filled.

    Returns:
        What was made by name, and the modules-table entries, those of tied modules included.
    """
    made: dict[str, Outside] = {}
    table: dict[str, dict[str, Any]] = {}
    for name, role in ((arch.embedding, "embedding"), (arch.head, "head")):
        for method, config in stages if name else ():
            started = time.perf_counter()
            old = model.get_submodule(name)
            with plain_products():
                new = method.compress_embedding(old, config, solve=solve)
            if new is None:
                continue
            made[name] = Outside(role, method, config, old, new, time.perf_counter() - started)
            table[name] = method.table_entry(new)
            model.set_submodule(name, new)
            if role == "embedding":
                ties = {}
                for other in arch.tied:
                    layer = method.tied_layer if isinstance(model.get_submodule(other), nn.Linear) else table[name]["layer"]
                    ties[other] = {**table[name], "layer": layer, "tied_to": name}
                rebuild_(model, ties, layers)
                table |= ties
            break
    return made, table


def probe_inputs(calibration: Calibration) -> dict[str, Tensor]:
    """The first tokens of the first sequence (or the first sample of an input that is not text)."""
    first = calibration.batches[0]
    return {name: value[:1, :_PROBE_TOKENS] if value.dim() == 2 else value[:1] for name, value in first.items()}


def assign_(model: nn.Module, tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Put tensors in the place of a skeleton's meta tensors, on a device; they take the dtype that stands there."""
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        old = model.get_parameter_or_buffer(name)
        tensor = tensor.to(device, old.dtype)
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=False) if isinstance(old, nn.Parameter) else tensor)


def move_buffers_(model: nn.Module, device: torch.device) -> None:
    """Take the buffers of a skeleton that are not on meta, rotary tables for example, to a device."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if not buffer.is_meta:
                module._buffers[name] = buffer.to(device)


def correct_bias_(module: nn.Module, weight: Tensor, total: Tensor) -> None:
    """Put into the bias of a compressed Linear what it loses of the mean input.

    Args:
        module: compressed, with a bias.
        weight: `[out, in]` dense.
        total: `[in + 1]` sum of the inputs and behind it their number.
    """
    mean = (total[:-1] / total[-1]).to(weight.device, torch.float32)
    module.bias.data += ((weight.float() - module.to_dense()) @ mean).to(module.bias.dtype)


def stored_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a compressed module in a file, its bias and what is another module's left out."""
    tied = tuple(f"{part}." for part in tied_parts(module))
    return {name: tensor for name, tensor in module.state_dict().items() if name != "bias" and not name.startswith(tied)}


def stored_bytes(module: nn.Module) -> int:
    """Bytes of a compressed module in a file, its bias left out."""
    return sum(buffer.nbytes for buffer in stored_tensors(module).values())


def _relative_error(weight: Tensor, module: nn.Module, gram: Tensor | None) -> float:
    """Share of the output energy that is lost, row block by row block, so that an embedding needs little memory."""
    lost = total = 0.0
    gram = None if gram is None else gram.to(weight.device, torch.float32)
    for rows in torch.arange(len(weight), device=weight.device).split(1024):
        dense = weight[rows].float()
        total += output_energy(dense, gram)
        new = module.weight[rows].float() if isinstance(module, nn.Linear) else module.to_dense(rows=rows)
        lost += output_energy(dense - new, gram)
    return lost / max(total, 1e-30)


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, _Call]:
    """The hidden state, which is the first argument of every block, and the rest."""
    if args:
        return args[0], _Call(args[1:], dict(kwargs))
    rest = dict(kwargs)
    return rest.pop("hidden_states"), _Call((), rest)


@torch.no_grad()
def input_moments(
    model: PreTrainedModel, names: Collection[str], batches: Sequence[Mapping[str, Tensor]]
) -> dict[str, tuple[Tensor, Tensor]]:  # fmt: skip
    """Moments of the inputs of some Linears of the blocks over batches, which ranks deal out, padding left out.

    Returns:
        By name, on the CPU, in float64: `[in, in]` sum of x x^T, and `[in + 1]` sum of x and behind it their number; nothing
        without batches.

    Raises:
        NumericalError: an input is not finite.
    """
    if not batches:
        return {}
    arch, one = describe(model), dict[str, Tensor]()
    modules = {name: model.get_submodule(name) for name in names}
    dtype = torch.float32 if model.device.type == "mps" else torch.float64  # which has none
    found = {}
    for name, module in modules.items():
        size, device = dense_shape(module)[1], module.weight.device
        found[name] = torch.zeros(size, size, dtype=dtype, device=device), torch.zeros(size + 1, dtype=dtype, device=device)
    masks = {name: arch.mask_of(block, name) for block in arch.blocks for name in arch.targets(block)}

    def note(name: str, args: tuple[Tensor, ...]) -> None:
        x = without_padding(args[0], one.get(masks[name])).flatten(0, -2)
        gram, total = found[name]
        add_gram_(gram, x)
        total[:-1] += x.sum(0, dtype=torch.float32)
        total[-1] += len(x)

    handles = [module.register_forward_pre_hook(lambda _, args, name=name: note(name, args)) for name, module in modules.items()]
    try:
        with evaluating(model), without_cache(model):
            for batch in distributed.share(batches):
                one = {name: value.to(model.device) for name, value in batch.items()}
                model.base_model(**one)
    finally:
        for handle in handles:
            handle.remove()
    for name, sums in found.items():
        distributed.sum_(sums)
        if not all(part.isfinite().all() for part in sums):
            raise NumericalError(f"{name} reads inputs that are not finite: the model overflows on these batches")
    return {name: (gram.double().cpu(), total.double().cpu()) for name, (gram, total) in found.items()}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No gradients and no dropout; modes come back module by module, as parts may stand in evaluation on purpose."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def mean_input_squares(
    model: PreTrainedModel, modules: Iterable[nn.Module], batches: Sequence[Mapping[str, Tensor]]
) -> dict[nn.Module, Tensor]:
    """Mean square of every input of some modules over all tokens of the batches, in float64; modules that never ran are left out."""
    sums: dict[nn.Module, Tensor] = {}
    counts = dict.fromkeys(modules, 0)

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = args[0].flatten(0, -2).double()
        sums[module] = sums.get(module, 0) + rows.square().sum(0)
        counts[module] += len(rows)

    handles = [module.register_forward_pre_hook(note) for module in counts]
    try:
        with evaluating(model), without_cache(model):
            for batch in batches:
                model(**{name: value.to(model.device) for name, value in batch.items()})
    finally:
        for handle in handles:
            handle.remove()
    return {module: total / counts[module] for module, total in sums.items()}


@contextmanager
def without_cache(model: PreTrainedModel) -> Iterator[None]:
    """Generation caches off while calibrating: they would keep every key and value, and pass them on to the next call.

    The stacks of T5 have configs of their own.
    """
    configs = [model.config.get_text_config(decoder=True), *(m.config for m in model.modules() if isinstance(m, PreTrainedModel))]
    before = [(config, config.use_cache) for config in configs if hasattr(config, "use_cache")]
    try:
        for config, _ in before:
            config.use_cache = False
        yield
    finally:
        for config, value in before:
            config.use_cache = value
