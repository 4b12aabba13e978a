"""HESSO: structured pruning inside a training run, to a target that is met exactly.

After a warm-up groups are chosen period by period and brought to zero linearly while everything is trained; what has been
chosen stays zero. At the end it is cut out. What has been chosen is in buffers of the model, so a checkpoint holds it.

Source: HESSO, arXiv 2409.09085. Differs: groups are scored by what they add to the output unless its own five scores are
asked for, they compete within their kind, already chosen ones are masked and not sorted by number, every block keeps a share,
and the direction is what the optimizer's step has really taken off.
"""

import copy
import inspect
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

from ... import distributed, sensitivity
from ...arch import as_linear, dense_shape, describe
from ...capture import evaluating, input_moments, without_cache
from ...checkpoint import disk_errors, write_shard, write_text
from ...errors import ConfigError, FormatError, NumericalError, UnsupportedModel
from ...footprint import Comparison, count
from ...functional.gram import centered
from ...groups import HIDDEN, GroupSet, cut_zeros_, find_groups, least_valid, says_heads, stock_of
from ...reorder import Slice
from ...scoring import is_causal_lm
from ...speed import SpeedConfig, check_positions, compare_by_turns
from ...training import CompactCallback, check_same_on_all_ranks, refuse_adapters
from .apply import TAYLOR_TOKENS, unit_scores
from .config import HessoConfig
from .cric import FILE_NAME, Correction
from .functional import refit, saliency, select_by_residual

logger = logging.getLogger(__name__)

#: States of a group, in a buffer `[groups]` uint8 of the module that reads it.
KEPT, SHRINKING, PRUNED = 0, 1, 2
#: Buffer `[in]` of a module that reads groups: sums of its squared inputs in training.
_ENERGY = "pruning_energy"
#: Beginning of buffers `[groups]` of such a module: scores that were taken before training.
_ONE_SHOT = "pruning_one_shot"
#: One-shot scores that look at inputs.
ON_BATCHES = ("wanda_sp", "flap", "taylor")


class HessoCallback(CompactCallback):
    """See `HessoConfig`.

    Args:
        config: the schedule.
        batches: model inputs that the energies of `output` are taken from before training, as the one-shot score `wanda_sp` does:
            the first choice, of the weights as they are then, is by them alone, and batches of training count from then on. With
            compensation `refit` every choice is made on them: that many forward passes, and `in * in` float64 for every reader.
            With `one_shot` its scores are taken on them.
        speed: what is timed at the end, dense and pruned by turns, for the report; it takes a copy of the model. None leaves it out.
        settings: fields of `HessoConfig`, in the place of those of `config`.

    Raises:
        ConfigError: there are batches, and nothing reads them, or they are no batches; or none, and `compensation` needs them.

    >>> HessoCallback(target=0.4, warm_up_steps=20).config.last_step
    120
    """

    def __init__(
        self, config: HessoConfig | None = None, batches: Iterable[Mapping[str, Tensor]] = (), speed: SpeedConfig | None = None,
        **settings: Any,
    ) -> None:  # fmt: skip
        """Keep the settings."""
        super().__init__()
        self.config, self.batches, self.speed = replace(config or HessoConfig(), **settings), list(batches), speed
        wrong = next((batch for batch in self.batches if not isinstance(batch, Mapping)), None)
        if wrong is not None:
            raise ConfigError(f"hesso: batches must hold model inputs by name, got a {type(wrong).__name__}")
        is_refitted, score = self.config.compensation == "refit", self.config.one_shot
        if score and bool(self.batches) != (score in ON_BATCHES):
            raise ConfigError(f"hesso.one_shot {score} {'needs batches' if score in ON_BATCHES else 'reads no batches'}")
        if self.batches and not (self.config.output or is_refitted or score):
            raise ConfigError("hesso.output must be above 0 with batches, which fill the energies that it weighs, got 0")
        if is_refitted and not self.batches:
            raise ConfigError("hesso.compensation refit needs batches to fit to, got none")
        self.kinds: tuple[str, ...] = self.config.kinds
        self.sets: list[GroupSet] = []
        self.counts: dict[str, int] = {}
        self.before: dict[nn.Parameter, Tensor] = {}
        self.hooks: list[Any] = []
        self.table: dict[str, Any] = {}
        self.fresh: dict[nn.Module, Tensor] = {}
        self.is_measuring = False
        self.masks: dict[nn.Module, str] = {}
        self.inputs: dict[str, Any] = {}
        self.correction: Correction | None = None
        self.comparison: Comparison | None = None

    def swap_(self, model: PreTrainedModel) -> None:
        """Find the groups, and how many of each kind a block loses.

        Raises:
            ConfigError: the floors forbid the target, or the model has too few positions for what is timed, or only heads are to
                go, everywhere as many, where the config cannot say it.
            NothingMatched: the model has no groups.
            UnsupportedModel: its family is not known, it has adapters, its class cannot make a smaller one, or it is to be timed and
                does not generate.
        """
        refuse_adapters(model)
        if self.speed is not None:
            if not is_causal_lm(model):
                raise UnsupportedModel(f"speed must be None for a {type(model).__name__}: it times causal language models")
            check_positions(model, f"the {type(model).__name__}", self.speed)
        arch = describe(model)
        stock_of(model, arch)  # which is needed when all is done
        if self.config.is_uniform and not says_heads(arch):
            self.kinds = tuple(kind for kind in self.config.kinds if kind in ("channels", HIDDEN))
            if not self.kinds:
                raise ConfigError(
                    f"hesso.is_uniform must be false with kinds {', '.join(self.config.kinds)} in a {type(model).__name__}, "
                    "whose config cannot say how many there are"
                )
        self.sets = find_groups(model, self.kinds)
        self.counts = group_counts(model, self.sets, self.config)
        for group_set in self.sets:
            reader = group_set.slices[-1].module
            states = torch.zeros(group_set.num_groups, dtype=torch.uint8, device=reader.weight.device)
            reader.register_buffer(_name(group_set), states)
        if self.config.one_shot:
            self._rank_(model, self.config.one_shot)
        elif self.config.output and self.config.compensation == "none":
            self._attach_(model)
            if self.batches:
                self._measure_(model)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """As the base; the run must be long enough.

        Raises:
            ConfigError: training ends before all groups are zero, another callback has taken the Linears away, or gradients
                are clipped or scaled while CRIC measures with them.
            FormatError: the checkpoint that is resumed lacks the cycle of CRIC that it is in, or was written by another schedule.
        """
        super().on_train_begin(args, state, control, **kwargs)
        self.fresh = {}
        if self.config.cric and args.max_grad_norm:
            raise ConfigError(
                "max_grad_norm must be 0 with hesso.cric, which adds up gradients as the growth of the loss: clipping makes the "
                f"steps in which it grows most count least, got {args.max_grad_norm}"
            )
        if self.config.cric and args.fp16:
            raise ConfigError(
                "fp16 must be false with hesso.cric, which adds up gradients, and fp16 scales them from step to step: use bf16"
            )
        held = set(kwargs["model"].modules())
        lost = [s.block or s.kind for s in self.sets if any(part.module not in held for part in s.slices)]
        if lost:
            raise ConfigError(
                f"another callback has swapped Linears of {lost[0]} that HessoCallback prunes: use it in a run of its own"
            )
        self._resume(kwargs["model"], Path(args.output_dir or "") / f"checkpoint-{state.global_step}", state.global_step)
        if 0 < state.max_steps < self.config.last_step:
            raise ConfigError(
                f"hesso.warm_up_steps + pruning_steps{' + cric_cycles * cric_steps' if self.config.cric else ''} must be at most "
                f"the {state.max_steps} steps of the run, got {self.config.last_step}"
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """In a cycle of CRIC the weights before it belong to the checkpoint."""
        if self.correction is not None and state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            with disk_errors(folder):
                write_shard(folder / FILE_NAME, self.correction.tensors())

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """As the base; `pruning_report.json` and `removed.png` in the Trainer's folder say what was removed."""
        super().on_train_end(args, state, control, **kwargs)
        if self.comparison is not None and state.is_world_process_zero:
            folder = Path(args.output_dir)
            with disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
                write_text(folder / "pruning_report.json", json.dumps(self.comparison.to_dict(), indent=2) + "\n")
                self.comparison.plot(folder / "removed.png")

    def before_update(self, model: PreTrainedModel, step: int) -> None:
        """Where groups are scored after this step, remember the weights; in a cycle of CRIC, add the gradients up."""
        if self.config.cric and step == self.config.warm_up_steps:
            self.correction = Correction(model, self.sets)
        if self.correction is not None:
            self.correction.add_gradients(model, self.sets)
        is_scored = self.correction is not None or (self._position(step + 1) == 0 and not self.config.cric)
        is_scored &= self.config.compensation == "none" and self.config.one_shot is None
        if is_scored and any(self.config.weights[1:]):
            parameters = {part.parameter for group_set in self.sets for part in group_set.slices}
            self.before = {parameter: parameter.detach().clone() for parameter in parameters}

    @torch.no_grad()
    def step(self, model: PreTrainedModel, step: int, learning_rate: float) -> None:
        """Choose at the start of a period, then shrink what is chosen and keep zero what was."""
        position, config = self._position(step), self.config
        if self.batches and step <= config.warm_up_steps + 1:  # until the first choice, or trial, is made
            self.fresh = {}
        self._collect()
        if self.correction is not None:
            self._correct(model, step)
        if step < config.first_step:
            return
        if position == 0 and not config.cric:
            for group_set in self.sets:
                states = self.states(group_set)
                states[states == SHRINKING] = PRUNED
            due = self._due((step - config.first_step) // config.period_steps + 1)
            if config.compensation == "refit":
                self._replace_(model, due)
            else:
                self._choose(due)
        left = 0 if position is None else config.period_steps - position
        for group_set in self.sets:
            states = self.states(group_set).cpu()
            group_set.scale_((states == SHRINKING).nonzero()[:, 0], (left - 1) / left if left else 0)
            group_set.scale_((states == PRUNED).nonzero()[:, 0], 0)

    def restore_(self, model: PreTrainedModel) -> None:
        """Cut out what is zero; the model stays of its class. One that is not at its target is told about."""
        if self.correction is not None:  # training has ended in a cycle, whose groups are on their way
            self.correction.put_back_(model)
            self.correction = None
        due, found = sum(self.counts[s.kind] for s in self.sets), sum(len(s.zero_groups()) for s in self.sets)
        if found < due:
            logger.warning(
                "%d of %d groups are zero and are cut: training ended before the target, or an earlier checkpoint came back",
                found,
                due,
            )
        for group_set in self.sets:
            for name in (_name(group_set), _name(group_set, _ONE_SHOT)):
                group_set.slices[-1].module._buffers.pop(name, None)
        for hook in self.hooks:
            hook.remove()
        for module in self._readers() if self.hooks else ():
            del module._buffers[_ENERGY]
        self.hooks, self.fresh, self.inputs = [], {}, {}
        # Ranks on one machine would disturb each other; the first one writes the report.
        dense = _copied(model) if self.speed is not None and distributed.rank() == 0 else None
        before = count(model)
        self.table = cut_zeros_(model, self.kinds, self.config.is_uniform, self.config.channel_multiple)
        self.comparison = Comparison(before=before, after=count(model))
        if dense is not None:
            with evaluating(model):
                self.comparison = compare_by_turns(dense, model, self.speed)
        logger.info("cut from %d to %d parameters", before.parameters, self.comparison.after.parameters)
        self.before = {}

    def modules(self, model: PreTrainedModel) -> dict[str, dict[str, Any]]:
        """What the config cannot say."""
        return self.table

    def _readers(self) -> list[nn.Module]:
        """Modules that read groups, in order."""
        return list(dict.fromkeys(part.module for group_set in self.sets for part in group_set.slices if _is_read(part)))

    def _attach_(self, model: PreTrainedModel) -> None:
        """Collect the energy of what is read, and the masks of the batches that it is collected over."""
        arch = describe(model)
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        self.masks = {model.get_submodule(name): arch.mask_of(block) for block in arch.blocks for name in arch.targets(block)}

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = dict(zip(names, args, strict=False)) | kwargs
            self.inputs = {name: given.get(name) for name in ("attention_mask", "decoder_attention_mask")}

        self.hooks.append(model.register_forward_pre_hook(note, with_kwargs=True))
        for module in self._readers():
            module.register_buffer(_ENERGY, torch.zeros(dense_shape(module)[1], device=module.weight.device))
            self.hooks.append(module.register_forward_pre_hook(self._add_energy))

    @torch.no_grad()
    def _rank_(self, model: PreTrainedModel, score: str) -> None:
        """Keep a one-shot score of every group in a buffer, which a checkpoint brings along."""
        arch = describe(model)
        paths = {id(model.get_submodule(name)): name for block in arch.blocks for name in arch.targets(block)}
        names = [paths[id(group_set.slices[-1].module)] for group_set in self.sets]
        moments, outputs = input_moments(model, names, self.batches), dict[str, Tensor]()
        if score == "taylor":
            mine = [{key: value.to(model.device) for key, value in batch.items()} for batch in distributed.share(self.batches)]
            with evaluating(model), without_cache(model):
                outputs = sensitivity.measure(model, arch, names, mine, TAYLOR_TOKENS, 0, is_full=True).outputs
        for group_set, name in zip(self.sets, names, strict=True):
            gram, total = moments.get(name, (None, None))
            spread = centered(gram, total) if score == "flap" else gram
            found = unit_scores(name, group_set, score, spread, outputs.get(name)).float()
            reader = group_set.slices[-1].module
            reader.register_buffer(_name(group_set, _ONE_SHOT), found.to(reader.weight.device))
        distributed.broadcast_([self._one_shot(group_set) for group_set in self.sets], 0)  # ranks may round to another order

    def _one_shot(self, group_set: GroupSet) -> Tensor:
        return group_set.slices[-1].module.get_buffer(_name(group_set, _ONE_SHOT))

    def _measure_(self, model: PreTrainedModel) -> None:
        """The energies of `batches`, dealt out to the ranks. A checkpoint that is resumed brings its own, which replace them."""
        self.is_measuring = True
        try:
            with evaluating(model), without_cache(model):
                for batch in distributed.share(self.batches):
                    model(**{name: value.to(model.device) for name, value in batch.items()})
        finally:
            self.is_measuring = False
        self._collect()

    @torch.no_grad()
    def _add_energy(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Into no buffer: DDP overwrites those of a rank before every forward pass. Padding is left out."""
        if not module.training and not self.is_measuring:
            return
        squares = args[0].detach().flatten(0, -2).float().square()
        mask = self.inputs.get(self.masks.get(module, "attention_mask"))
        # OPT's MLP reads `[B * T, in]`, so positions are counted; other shapes of masks say more than what is padding.
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.numel() == len(squares):
            squares = squares.masked_fill(~mask.to(squares.device).bool().flatten()[:, None], 0)
        new = squares.sum(0)
        self.fresh[module] = self.fresh[module] + new if module in self.fresh else new

    def _collect(self) -> None:
        """What the forward passes of all ranks have given since the last call goes into the buffers."""
        for module in self._readers() if self.hooks else ():
            energy = module.get_buffer(_ENERGY)
            new = self.fresh.pop(module, torch.zeros_like(energy)).to(energy)
            distributed.sum_([new])
            energy.add_(new)

    def states(self, group_set: GroupSet) -> Tensor:
        """State of every group of a set."""
        return group_set.slices[-1].module.get_buffer(_name(group_set))

    def _resume(self, model: PreTrainedModel, folder: Path, step: int) -> None:
        """Go on with what has been chosen, or with a cycle of CRIC.

        Raises:
            FormatError: the checkpoint lacks the cycle, or another number of groups is chosen than the schedule says.
        """
        is_chosen = any(bool((self.states(group_set) != KEPT).any()) for group_set in self.sets)
        self.correction = None
        done = max(0, min(-(-(step + 1 - self.config.first_step) // self.config.period_steps), self.config.num_periods))
        self._check_chosen(self._due(1 if self.config.cric and is_chosen else done), step)
        if not self.config.cric or is_chosen or not self.config.warm_up_steps < step < self.config.first_step:
            return
        if not (folder / FILE_NAME).is_file():
            raise FormatError(f"{folder} lacks {FILE_NAME}, which a cycle of CRIC needs to go on: resume from its own folder")
        self.correction = Correction(model, self.sets)
        self.correction.load_(load_file(folder / FILE_NAME))

    def _position(self, step: int) -> int | None:
        """Which step of its period a step is, counted from 0; None outside of the pruning steps."""
        first = self.config.first_step
        return (step - first) % self.config.period_steps if first <= step <= self.config.last_step else None

    def _choose(self, due: dict[str, int]) -> None:
        """Mark the groups with the lowest scores, until as many as are due are chosen."""
        self._mark(self._lowest(self._scores(), due))
        for module in self._readers() if self.hooks else ():
            module.get_buffer(_ENERGY).mul_(0.5)

    def _replace_(self, model: PreTrainedModel, due: dict[str, int]) -> None:
        """Choose by what is left of the error after a refit, and let what stays take over at once."""
        arch = describe(model)
        paths = {id(model.get_submodule(name)): name for block in arch.blocks for name in arch.targets(block)}
        names = {group_set: paths[id(group_set.slices[-1].module)] for group_set in self.sets}
        moments = input_moments(model, [*names.values()], self.batches)
        scores = [self._residuals(group_set, *moments[name], due) for group_set, name in names.items()]
        chosen = [mask.to(model.device) for mask in self._lowest(scores, due)]
        distributed.broadcast_(chosen, 0)  # ranks may round to other choices, and to other weights
        self._mark(chosen)
        for group_set, name in names.items():
            states, part = self.states(group_set), group_set.slices[-1]
            kept = part.index[(states == KEPT).cpu()].flatten().sort().values
            weight, bias = as_linear(part.module).weight.cpu(), part.module.bias
            new, change = refit(weight, *moments[name], kept, bias is not None, self.config.damp)
            (part.parameter if part.dim else part.parameter.T)[:, kept] = new.to(part.parameter)
            distributed.broadcast_([part.parameter], 0)
            if bias is not None:
                bias += change.to(bias)
                distributed.broadcast_([bias], 0)
            states[states == SHRINKING] = PRUNED

    def _residuals(self, group_set: GroupSet, gram: Tensor, total: Tensor, due: dict[str, int]) -> Tensor:
        """`[groups]` what each costs when it is removed after those that cost less; of those that would stay, infinity."""
        is_kept = (self.states(group_set) == KEPT).cpu()
        most = due[group_set.kind] if self.config.is_uniform else most_removed(group_set, self.config)
        number, per_pool = most - int((~is_kept).sum()), int(is_kept.sum()) // group_set.num_pools
        found = torch.full((group_set.num_groups,), torch.inf, dtype=torch.float64)
        if number > 0:
            reader, index = group_set.slices[-1].module, group_set.slices[-1].index[is_kept]
            spread = gram if reader.bias is None else centered(gram, total)
            left = index.flatten().sort().values  # what is gone can take nothing over, though heads at zero still read
            weight, places = as_linear(reader).weight.cpu()[:, left], torch.searchsorted(left, index)
            try:
                order, costs = select_by_residual(weight, spread[left][:, left], places, number, per_pool, self.config.damp)
            except ValueError as error:
                raise NumericalError(f"{group_set.kind} of {group_set.block}: {error}") from error
            # The next one costs more but for rounding; where it does not, it must still not come before.
            found[is_kept.nonzero()[:, 0][order]] = costs.cummax(0).values
        return found

    def _due(self, period: int) -> dict[str, int]:
        """Groups of each kind that a block has lost by the end of a period, in the mean."""
        periods = self.config.num_periods
        return {kind: count if period == periods else period * (count // periods) for kind, count in self.counts.items()}

    def _check_chosen(self, due: dict[str, int], step: int) -> None:
        for kind, number in due.items():
            mine = [group_set for group_set in self.sets if group_set.kind == kind]
            chosen = [int((self.states(group_set) != KEPT).sum()) for group_set in mine]
            pools = mine[0].num_pools
            each = [number // pools * pools] * len(mine)
            total = number * len(mine) // pools * pools
            if chosen != each if self.config.is_uniform else sum(chosen) != total:
                raise FormatError(
                    f"after step {step} the schedule has chosen {each if self.config.is_uniform else total} of the {kind} of the blocks, "
                    f"and the model has {chosen}: resume with the settings it was made with"
                )

    def _mark(self, chosen: list[Tensor]) -> None:
        """Groups, given by a mask for each set, start to shrink."""
        for group_set, mask in zip(self.sets, chosen, strict=True):
            states = self.states(group_set)
            states[mask.to(states.device)] = SHRINKING
        self.before = {}
        check_same_on_all_ranks(f"{s.block} {s.kind} {self.states(s).tolist()}" for s in self.sets)

    def _correct(self, model: PreTrainedModel, step: int) -> None:
        """One step of a cycle of CRIC; at the end of the last one groups are chosen for good."""
        correction, config, kinds = self.correction, self.config, [s.kind for s in self.sets]
        done = step - config.warm_up_steps
        correction.add_scores(self._scores())
        if done == 1:
            correction.is_trial = torch.cat(self._lowest(correction.totals(kinds, config.loss), self.counts))
        left = config.cric_steps - (done - 1) % config.cric_steps
        for group_set, groups in zip(self.sets, correction.trials(), strict=True):
            group_set.scale_(groups, (left - 1) / left)
        if left > 1:
            return
        correction.end_cycle(model, config.cric_steps)
        lowest = self._lowest(correction.totals(kinds, config.loss), self.counts)
        correction.is_trial = torch.cat(lowest) & ~correction.is_tried
        check_same_on_all_ranks([str(correction.is_trial.tolist())])
        is_last = step == config.first_step - 1
        if is_last and correction.is_trial.any():
            logger.warning("CRIC ends with %d chosen groups that it has not tried", int(correction.is_trial.sum()))
        if is_last or not correction.is_trial.any():
            self._mark(lowest)
            self.correction = None

    def _lowest(self, scores: list[Tensor], due: dict[str, int]) -> list[Tensor]:
        """Masks of the groups that join those already chosen, set by set: the lowest scores of each kind."""
        found: dict[GroupSet, Tensor] = {}
        for kind in dict.fromkeys(group_set.kind for group_set in self.sets):
            mine = [(group_set, score) for group_set, score in zip(self.sets, scores, strict=True) if group_set.kind == kind]
            found |= self._lowest_in_each(mine, due[kind]) if self.config.is_uniform else self._lowest_in_all(mine, due[kind])
        return [found[group_set] for group_set in self.sets]

    def _scores(self) -> list[Tensor]:
        """Of every set; groups compete within their kind."""
        if self.config.one_shot:
            return [self._one_shot(group_set).double().cpu() for group_set in self.sets]
        found: dict[GroupSet, Tensor] = {}
        for kind in dict.fromkeys(group_set.kind for group_set in self.sets):
            mine = [group_set for group_set in self.sets if group_set.kind == kind]
            found |= dict(zip(mine, self._scores_of_kind(mine), strict=True))
        return [found[group_set] for group_set in self.sets]

    def _scores_of_kind(self, sets: list[GroupSet]) -> list[Tensor]:
        energies = {module: module.get_buffer(_ENERGY).float() for module in self._readers()} if self.hooks else {}

        def sums(value: Callable[[Slice], Tensor]) -> Tensor:
            return torch.cat([group_set.totals(value) for group_set in sets])

        def added(part: Slice) -> Tensor:
            if part.module not in energies or not _is_read(part):
                return torch.zeros_like(part.parameter)
            energy = energies[part.module]
            return part.parameter.float().square() * (energy if part.dim else energy[:, None])

        def start(part: Slice) -> Tensor:
            return self.before.get(part.parameter, part.parameter).float()

        def taken(part: Slice) -> Tensor:
            return start(part) - part.parameter.float()

        found = saliency(
            sums(added),
            sums(lambda part: start(part).square()),
            sums(lambda part: start(part) * taken(part)),
            sums(lambda part: taken(part).square()),
            torch.cat([group_set.sizes() for group_set in sets]),
            self.config.weights,
        )
        return list(found.split([group_set.num_groups for group_set in sets]))

    def _lowest_in_each(self, sets: list[tuple[GroupSet, Tensor]], due: int) -> dict[GroupSet, Tensor]:
        """The lowest of every set, equally many of each pool."""
        found = {}
        for group_set, score in sets:
            is_taken = (self.states(group_set) != KEPT).cpu().view(group_set.num_pools, -1)
            chosen = torch.zeros_like(is_taken)
            score = score.view(group_set.num_pools, -1).masked_fill(is_taken, torch.inf)
            for pool, taken, row in zip(score, is_taken, chosen, strict=True):
                missing = due // group_set.num_pools - int(taken.sum())
                row[pool.argsort(stable=True)[: max(0, missing)]] = True
            found[group_set] = chosen.flatten()
        return found

    def _lowest_in_all(self, sets: list[tuple[GroupSet, Tensor]], due: int) -> dict[GroupSet, Tensor]:
        """The lowest in all blocks, as long as every block keeps its floor; pools lose a row together.

        What is cut are multiples, so what would go if all were chosen now is planned first, in runs that end where a block
        keeps a multiple and that compete by their mean score. The lowest rows of the plan are chosen.
        """
        first, config = sets[0][0], self.config
        num_pools, num_rows = first.num_pools, first.num_groups // first.num_pools
        multiple = config.channel_multiple if first.kind in ("channels", HIDDEN) else 1
        free, runs, ends = [], [], []
        for number, (group_set, score) in enumerate(sets):
            is_free = (self.states(group_set).cpu() == KEPT).view(num_pools, -1)
            rows = score.view(num_pools, -1).masked_fill(~is_free, torch.inf).sort(dim=1, stable=True)
            num_free = int(is_free.sum(1).min())
            values = rows.values[:, :num_free].sum(0)
            free.append((values, rows.indices[:, :num_free] + torch.arange(num_pools)[:, None] * num_rows))
            taken = num_rows - num_free
            ends.append(num_rows - num_free // multiple * multiple)  # a run that is begun is finished
            last = num_rows - _multiple(num_rows - most_removed(group_set, config) // num_pools, multiple)
            starts = range(ends[number] - taken, last - taken, multiple)
            runs += [(float(values[start : start + multiple].mean()), number) for start in starts]
        left = self.counts[first.kind] * len(sets) // num_pools - sum(ends)
        for _, number in sorted(runs)[: max(0, left // multiple)]:
            ends[number] += multiple
        planned = [
            (float(values[row]), number, row)
            for number, (values, _) in enumerate(free)
            for row in range(ends[number] - num_rows + len(values))
        ]
        missing = due * len(sets) // num_pools - sum(num_rows - len(values) for values, _ in free)
        found = {group_set: torch.zeros(group_set.num_groups, dtype=torch.bool) for group_set, _ in sets}
        for _, number, row in sorted(planned)[: max(0, missing)]:
            found[sets[number][0]][free[number][1][:, row]] = True
        return found


def group_counts(model: PreTrainedModel, sets: list[GroupSet], config: HessoConfig) -> dict[str, int]:
    """How many groups of each kind a block loses, in the mean.

    Raises:
        ConfigError: the floors forbid the target, or blocks differ in size.
    """
    firsts = {group_set.kind: group_set for group_set in sets}

    def cost(parts: Any) -> float:
        if config.unit == "macs":
            return sum(p.numel() for p in parts if p.dim() > 1)
        return sum(p.numel() * (p.element_size() if config.unit == "bytes" else 1) for p in parts)

    _check_sizes(sets, firsts)
    blocks = {id(p): p for block in describe(model).blocks for p in model.get_submodule(block).parameters()}
    due = config.target * cost(blocks.values())
    costs = {kind: _group_cost(first, cost) * sum(s.kind == kind for s in sets) for kind, first in firsts.items()}
    counts: dict[str, int] = {}
    for kind in sorted(firsts, key=lambda kind: kind == "channels"):  # which make up the rest
        first, is_share = firsts[kind], kind == HIDDEN or (kind != "channels" and "channels" in firsts)
        wanted = config.target * first.num_groups
        if config.unit != "groups" and not is_share:
            wanted = (due - sum(costs[other] * number for other, number in counts.items())) / costs[kind]
        if kind == "channels":
            counts[kind] = _channel_count(first, wanted, config)
            continue
        if "channels" not in firsts:
            _check_floor(first, wanted, config)
        counts[kind] = _rounded(first, min(wanted, most_removed(first, config)))
        counts[kind] = _valid_count(model, first, counts[kind], config, is_alone="channels" not in firsts)
    if not any(counts.values()):
        raise ConfigError(
            f"hesso.target {config.target} is less than one group of a block: raise it or lower hesso.channel_multiple"
        )
    return counts


def _valid_count(model: PreTrainedModel, first: GroupSet, count: int, config: HessoConfig, is_alone: bool) -> int:
    """As many heads or hidden dimensions of `count` as the config lets go."""
    wanted = first.num_groups - count
    if first.kind == HIDDEN:
        wanted = min(_multiple(wanted, config.channel_multiple), first.num_groups)
        kept = least_valid(model, first, wanted, config.channel_multiple)
        if kept != wanted:
            logger.warning(
                "%d of %d hidden dimensions stay, for target %s %d would: the config of a %s wants a multiple of its heads, and "
                "hesso.channel_multiple is %d",
                kept, first.num_groups, config.target, wanted, type(model).__name__, config.channel_multiple,
            )  # fmt: skip
        return first.num_groups - kept
    if not config.is_uniform:
        return count
    kept = least_valid(model, first, wanted)
    if is_alone and kept != wanted:
        raise ConfigError(
            f"hesso.is_uniform must be false, or channels be among the kinds, with target {config.target}: the config of a "
            f"{type(model).__name__} cannot say {wanted} of {first.num_groups} {first.kind}, as its hidden size has to be a multiple "
            "of the number of heads"
        )
    return first.num_groups - kept


def _channel_count(first: GroupSet, wanted: float, config: HessoConfig) -> int:
    kept = _multiple(first.num_groups - max(0, round(wanted)), config.channel_multiple)
    count = max(0, first.num_groups - kept)
    if kept <= 0 or count > most_removed(first, config):
        raise ConfigError(
            f"hesso.target {config.target} of {config.unit} needs {round(wanted)} of {first.num_groups} channels of every block, "
            f"and hesso.min_kept {config.min_kept} forbids it: lower one of them or add kinds"
        )
    return count


def _check_sizes(sets: list[GroupSet], kinds: Iterable[str]) -> None:
    for kind in kinds:
        sizes = sorted({group_set.num_groups for group_set in sets if group_set.kind == kind})
        if len(sizes) > 1:
            raise ConfigError(f"hesso needs blocks of one size, and their numbers of {kind} are {sizes}")


def _check_floor(first: GroupSet, wanted: float, config: HessoConfig) -> None:
    most = most_removed(first, config)
    if wanted >= most + first.num_pools:
        raise ConfigError(
            f"hesso.target {config.target} of {config.unit} takes {wanted:.1f} of {first.num_groups} {first.kind} and "
            f"hesso.min_kept {config.min_kept} allows {most}, and there are no channels to make up for it: lower one of them or add kinds"
        )


def most_removed(group_set: GroupSet, config: HessoConfig) -> int:
    """How many groups of a block may go."""
    floor = max(group_set.num_pools, -(-int(config.min_kept * group_set.num_groups * 1000) // 1000))
    return group_set.num_groups - floor


def _rounded(group_set: GroupSet, number: float) -> int:
    return int(number + 1e-9) // group_set.num_pools * group_set.num_pools


def _multiple(number: int, multiple: int) -> int:
    """Rounded up."""
    return -(-number // multiple) * multiple


def _group_cost(group_set: GroupSet, cost: Any) -> float:
    return sum(cost([part.parameter]) * part.index.shape[1] / part.parameter.shape[part.dim] for part in group_set.slices)


def _copied(model: PreTrainedModel) -> PreTrainedModel:
    """In evaluation mode and without hooks, as those of other callbacks may hold a teacher or what cannot be copied."""
    hooks = [values for module in model.modules() for name, values in vars(module).items() if name.endswith("_hooks")]
    return copy.deepcopy(model, {id(values): type(values)() for values in hooks}).eval()


def _is_read(part: Slice) -> bool:
    """Whether the groups are inputs of a Linear or Conv1D there; an embedding writes along dimension 1."""
    return part.parameter.dim() > 1 and part.dim == int(isinstance(part.module, nn.Linear))


def _name(group_set: GroupSet, prefix: str = "pruning") -> str:
    return f"{prefix}_{group_set.kind}"
