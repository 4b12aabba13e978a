"""HESSO: structured pruning inside a training run, to a target that is met exactly.

After a warm-up groups are chosen period by period and brought to zero linearly while everything is trained; what has been
chosen stays zero. At the end it is cut out. What has been chosen is in buffers of the model, so a checkpoint holds it.

Source: HESSO, arXiv 2409.09085. Differs: groups compete within their kind, already chosen ones are masked and not sorted
by number, every block keeps a share, and the direction is what the optimizer's step has really taken off.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

from ...arch import describe
from ...errors import ConfigError
from ...groups import GroupSet, cut_zeros_, find_groups
from ...training import CompactCallback, check_same_on_all_ranks
from .config import HessoConfig
from .functional import saliency

logger = logging.getLogger(__name__)

#: States of a group, in a buffer `[groups]` uint8 of the module that reads it.
KEPT, SHRINKING, PRUNED = 0, 1, 2


class HessoCallback(CompactCallback):
    """See `HessoConfig`.

    Args:
        config: the schedule; keyword arguments make one.
        settings: fields of `HessoConfig`.

    >>> HessoCallback(target=0.4, warm_up_steps=20).config.last_step
    120
    """

    def __init__(self, config: HessoConfig | None = None, **settings: Any) -> None:
        """Keep the settings."""
        super().__init__()
        self.config = config or HessoConfig(**settings)
        self.sets: list[GroupSet] = []
        self.counts: dict[str, int] = {}
        self.before: dict[nn.Parameter, Tensor] = {}
        self.table: dict[str, Any] = {}

    def swap_(self, model: PreTrainedModel) -> None:
        """Find the groups, and how many of each kind a block loses.

        Raises:
            ConfigError: the floors forbid the target.
            NothingMatched: the model has no groups.
            UnsupportedModel: its family is not known.
        """
        self.sets = find_groups(model, self.config.kinds)
        self.counts = group_counts(model, self.sets, self.config)
        for group_set in self.sets:
            reader = group_set.slices[-1].module
            states = torch.zeros(group_set.num_groups, dtype=torch.uint8, device=reader.weight.device)
            reader.register_buffer(_name(group_set), states)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """As the base; the run must be long enough.

        Raises:
            ConfigError: training ends before all groups are zero.
        """
        super().on_train_begin(args, state, control, **kwargs)
        if 0 < state.max_steps < self.config.last_step:
            raise ConfigError(
                f"hesso.warm_up_steps + pruning_steps must be at most the {state.max_steps} steps of the run, got {self.config.last_step}"
            )

    def before_update(self, model: PreTrainedModel, step: int) -> None:
        """Where groups are chosen after this step, remember the weights."""
        if self._position(step + 1) == 0:
            parameters = {part.parameter for group_set in self.sets for part in group_set.slices}
            self.before = {parameter: parameter.detach().clone() for parameter in parameters}

    @torch.no_grad()
    def step(self, model: PreTrainedModel, step: int, learning_rate: float) -> None:
        """Choose at the start of a period, then shrink what is chosen and keep zero what was."""
        position, config = self._position(step), self.config
        if position == 0:
            for group_set in self.sets:
                states = self.states(group_set)
                states[states == SHRINKING] = PRUNED
            self._choose((step - config.warm_up_steps - 1) // config.period_steps + 1)
        left = 0 if position is None else config.period_steps - position
        for group_set in self.sets:
            states = self.states(group_set).cpu()
            group_set.scale_((states == SHRINKING).nonzero()[:, 0], (left - 1) / left if left else 0)
            group_set.scale_((states == PRUNED).nonzero()[:, 0], 0)

    def restore_(self, model: PreTrainedModel) -> None:
        """Cut out what is zero; the model stays of its class."""
        for group_set in self.sets:
            del group_set.slices[-1].module._buffers[_name(group_set)]
        size = model.num_parameters()
        self.table = cut_zeros_(model, self.config.kinds, self.config.is_uniform, self.config.channel_multiple)
        logger.info("cut from %d to %d parameters", size, model.num_parameters())
        self.before = {}

    def modules(self, model: PreTrainedModel) -> dict[str, dict[str, Any]]:
        """What the config cannot say."""
        return self.table

    def states(self, group_set: GroupSet) -> Tensor:
        """State of every group of a set."""
        return group_set.slices[-1].module.get_buffer(_name(group_set))

    def _position(self, step: int) -> int | None:
        """Which step of its period a step is, counted from 0; None outside of the pruning steps."""
        first = self.config.warm_up_steps + 1
        return (step - first) % self.config.period_steps if first <= step <= self.config.last_step else None

    def _choose(self, period: int) -> None:
        """Mark the groups with the lowest scores, until as many as are due by the end of this period, from 1, are chosen."""
        for kind in self.config.kinds:
            mine = [group_set for group_set in self.sets if group_set.kind == kind]
            count, periods = self.counts.get(kind, 0), self.config.periods
            due = count if period == periods else period * (count // periods)
            scores = self._scores(mine)
            if self.config.is_uniform:
                for group_set, score in zip(mine, scores, strict=True):
                    self._mark(group_set, score, due)
            else:
                self._mark_freely(mine, scores, due)
        self.before = {}
        check_same_on_all_ranks(f"{s.block} {s.kind} {self.states(s).tolist()}" for s in self.sets)

    def _scores(self, sets: list[GroupSet]) -> list[Tensor]:
        if not sets:
            return []

        def sums(value: Any) -> Tensor:
            return torch.cat([group_set.totals(value) for group_set in sets])

        def taken(part: Any) -> Tensor:
            return self.before[part.parameter].float() - part.parameter.float()

        found = saliency(
            sums(lambda part: self.before[part.parameter].float().square()),
            sums(lambda part: self.before[part.parameter].float() * taken(part)),
            sums(lambda part: taken(part).square()),
            torch.cat([group_set.sizes() for group_set in sets]),
            self.config.weights,
        )
        return list(found.split([group_set.num_groups for group_set in sets]))

    def _mark(self, group_set: GroupSet, score: Tensor, due: int) -> None:
        """The lowest of a set, equally many of each pool."""
        states = self.states(group_set)
        score = score.masked_fill(states.cpu() != KEPT, torch.inf)
        each = due // group_set.num_pools
        for pool, marks in zip(score.view(group_set.num_pools, -1), states.view(group_set.num_pools, -1), strict=True):
            missing = each - int((marks != KEPT).sum())
            marks[pool.argsort(stable=True)[: max(0, missing)].to(marks.device)] = SHRINKING

    def _mark_freely(self, sets: list[GroupSet], scores: list[Tensor], due: int) -> None:
        """The lowest of a kind in all blocks, as long as every block keeps its floor; pools lose a row together."""
        due *= len(sets)
        flat: list[tuple[float, int, list[int]]] = []
        for number, (group_set, score) in enumerate(zip(sets, scores, strict=True)):
            is_free = (self.states(group_set).cpu() == KEPT).view(group_set.num_pools, -1)
            pools = score.view(group_set.num_pools, -1).masked_fill(~is_free, torch.inf).sort(dim=1, stable=True)
            for column in range(int(is_free.sum(1).min())):
                groups = [row * is_free.shape[1] + int(index) for row, index in enumerate(pools.indices[:, column])]
                flat.append((float(pools.values[:, column].sum()), number, groups))
        marked = sum(int((self.states(group_set) != KEPT).sum()) for group_set in sets)
        for _, number, groups in sorted(flat):
            states = self.states(sets[number])
            room = most_removed(sets[number], self.config) - int((states != KEPT).sum())
            if marked + len(groups) <= due and len(groups) <= room:
                states[groups] = SHRINKING
                marked += len(groups)


def group_counts(model: PreTrainedModel, sets: list[GroupSet], config: HessoConfig) -> dict[str, int]:
    """How many groups of each kind a block loses, in the mean.

    Raises:
        ConfigError: the floors forbid the target.
    """
    firsts = {group_set.kind: group_set for group_set in sets}

    def cost(parts: Any) -> float:
        if config.unit == "macs":
            return sum(p.numel() for p in parts if p.dim() > 1)
        return sum(p.numel() * (p.element_size() if config.unit == "bytes" else 1) for p in parts)

    counts = {}
    heads = 0.0
    for kind, first in firsts.items():
        if kind != "channels":
            counts[kind] = _rounded(first, min(config.target * first.num_groups, most_removed(first, config)))
            heads += counts[kind] * _group_cost(first, cost) * sum(s.kind == kind for s in sets)
    if "channels" in firsts:
        first, number = firsts["channels"], sum(s.kind == "channels" for s in sets)
        arch = describe(model)
        blocks = {id(p): p for block in arch.blocks for p in model.get_submodule(block).parameters()}
        wanted = config.target * first.num_groups
        if config.unit != "groups":
            wanted = (config.target * cost(blocks.values()) - heads) / (number * _group_cost(first, cost))
        kept = -(-(first.num_groups - max(0, round(wanted))) // config.channel_multiple) * config.channel_multiple
        counts["channels"] = max(0, first.num_groups - kept)
        if kept <= 0 or counts["channels"] > most_removed(first, config):
            raise ConfigError(
                f"hesso.target {config.target} of {config.unit} needs {round(wanted)} of {first.num_groups} channels of every block, "
                f"and hesso.min_kept {config.min_kept} forbids it: lower one of them or add kinds"
            )
    if not any(counts.values()):
        raise ConfigError(
            f"hesso.target {config.target} is less than one group of a block: raise it or lower hesso.channel_multiple"
        )
    return counts


def most_removed(group_set: GroupSet, config: HessoConfig) -> int:
    """How many groups of a block may go."""
    floor = max(group_set.num_pools, -(-int(config.min_kept * group_set.num_groups * 1000) // 1000))
    return group_set.num_groups - floor


def _rounded(group_set: GroupSet, number: float) -> int:
    return int(number + 1e-9) // group_set.num_pools * group_set.num_pools


def _group_cost(group_set: GroupSet, cost: Any) -> float:
    return sum(cost([part.parameter]) * part.index.shape[1] / part.parameter.shape[part.dim] for part in group_set.slices)


def _name(group_set: GroupSet) -> str:
    return f"pruning_{group_set.kind}"
