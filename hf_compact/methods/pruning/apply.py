"""One-shot structured pruning of a block: choose units by what reads them, cut, refit the reader.

The reader of the MLP's channels is `down`, that of the heads is `o`; its inputs come through the pruned blocks before.
"""

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ... import sensitivity
from ...arch import Architecture, as_linear, dense_shape
from ...errors import ConfigError, NumericalError, UnsupportedModel
from ...functional.gram import centered, output_energy, without_padding
from ...groups import GroupSet, block_groups, drop_layers_
from .config import PruningConfig
from .functional import loss_increase, lowest, refit_columns, select_by_residual, unit_energy

#: What the second-order score takes gradients of.
TAYLOR_TOKENS = 8192
Moments = Callable[[str], tuple[Tensor, Tensor]]
"""Name of a Linear -> `[in, in]` sum of x x^T, and `[in + 1]` sum of x and behind it their number."""


def compress_linear(linear: nn.Linear, gram: Tensor | None, config: PruningConfig, solve: bool = True) -> nn.Module:
    """Linears stay what they are: blocks are cut as a whole."""
    return linear


def compress_embedding(module: nn.Embedding | nn.Linear, config: PruningConfig, solve: bool = True) -> None:
    """Embeddings and heads are left alone."""
    return


class FisherGuide:
    """Second moments of the gradients at the output of every reader."""

    def __init__(self, outputs: Mapping[str, Tensor]) -> None:
        """Keep `[out, out]` by name."""
        self.outputs = outputs

    def share(self, name: str, finished: Sequence[Any], num_inputs: float) -> Tensor:
        """Those of one reader."""
        return self.outputs[name]


def prepare(
    model: PreTrainedModel, arch: Architecture, names: Sequence[str], batches: Sequence[Mapping[str, Tensor]],
    config: PruningConfig, progress: Callable[[int, int], None],
) -> FisherGuide | None:  # fmt: skip
    """Gradients of the dense model, for score taylor.

    Raises:
        ConfigError: a part of the blocks would get a bias that the config gives to all or none.
    """
    _check_biases(model, arch, names, config)
    readers = [name for name in names if arch.roles[name] in ("o", "down")]
    if config.score != "taylor" or not readers:
        return None
    return FisherGuide(sensitivity.measure(model, arch, readers, batches, TAYLOR_TOKENS, 0, progress, is_full=True).outputs)


def _check_biases(model: PreTrainedModel, arch: Architecture, names: Collection[str], config: PruningConfig) -> None:
    cut = {"down": config.channel_sparsity > 0, "o": config.head_sparsity > 0}
    for role, is_cut in cut.items():
        readers = [name for name, found in arch.roles.items() if found == role]
        left = [name for name in readers if name not in names]
        bare = any(model.get_submodule(name).bias is None for name in readers)
        if is_cut and config.compensation == "bias" and bare and 0 < len(left) < len(readers):
            raise ConfigError(
                f"pruning.include must hold all blocks with compensation bias, which this family has in all or none, got none of {left[0]}"
            )


def shorten(
    model: PreTrainedModel, arch: Architecture, batches: Sequence[Mapping[str, Tensor]], config: PruningConfig
) -> list[str]:  # fmt: skip
    """Take `num_layers` blocks out in place: those whose input and output have the most alike directions.

    Returns:
        Names of the blocks that are gone.

    Raises:
        UnsupportedModel: not so many blocks can be left out.
    Source: ShortGPT's block influence, arXiv 2403.03853.
    """
    if not config.num_layers:
        return []
    offered = [s.block for block in arch.blocks for s in block_groups(model, arch, block) if s.kind == "layers"]
    most = len(offered) - (len(offered) == len(arch.blocks))
    if config.num_layers > most:
        raise UnsupportedModel(f"pruning.num_layers must be at most {most} for this {arch.family} model, got {config.num_layers}")
    sums, current = dict.fromkeys(offered, 0.0), dict[str, Tensor]()

    def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before, after = args[0] if args else kwargs["hidden_states"], output[0] if isinstance(output, tuple) else output
        mask = current.get(arch.mask_of(name))
        before, after = without_padding(before.float(), mask), without_padding(after.float(), mask)
        sums[name] += float(nn.functional.cosine_similarity(before, after, dim=-1).sum())

    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, kwargs, output, name=name: note(name, args, kwargs, output), with_kwargs=True
        )
        for name in offered
    ]
    try:
        with torch.no_grad():
            for batch in batches:
                current.clear()
                current.update(batch)
                model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    dropped = sorted(offered, key=lambda name: -sums[name])[: config.num_layers]
    drop_layers_(model, dropped)
    return [name for name in offered if name in dropped]


@torch.no_grad()
def cut_block(
    model: PreTrainedModel, arch: Architecture, block: str, names: Collection[str], config: PruningConfig,
    moments: Moments | None, outputs: Callable[[str], Tensor | None] = lambda name: None,
) -> dict[str, float]:  # fmt: skip
    """Cut heads and channels out of a block, in place.

    Args:
        model: the block is in memory; without `moments` it may be on meta.
        arch: the roles of the Linears.
        block: which.
        names: Linears of the stage; units whose reader is not among them stay.
        config: settings.
        moments: of the inputs of a Linear; None cuts to size without a choice.
        outputs: `[out, out]` gradients' second moments at a reader, for score taylor.

    Returns:
        Name of every cut Linear -> share of its branch's output energy that is lost.

    Raises:
        UnsupportedModel: a bias is wanted where the family has none.
    """
    lost: dict[str, float] = {}
    paths = {id(model.get_submodule(name)): name for name in arch.targets(block)}
    for group_set in list(block_groups(model, arch, block)):  # before a cut, after which the widths are others
        reader = group_set.slices[-1].module
        name = paths[id(reader)]
        count = num_removed(group_set, config)
        if not count or name not in names:
            continue
        if moments is None:
            group_set.cut_(model, torch.arange(group_set.num_groups - count))
            error = 0.0
        else:
            error = _cut_solved(model, name, group_set, count, config, moments(name), outputs(name))
        lost |= dict.fromkeys([paths[id(part.module)] for part in group_set.slices], error)
    return lost


def num_removed(group_set: GroupSet, config: PruningConfig) -> int:
    """How many groups of a set go.

    >>> num_removed(GroupSet("block", "channels", (), 100), PruningConfig(channel_sparsity=0.2, channel_multiple=12))
    16
    """
    number = group_set.num_groups
    if group_set.kind == "channels":
        kept = number - int(config.channel_sparsity * number + 1e-9)
        return max(0, number - -(-kept // config.channel_multiple) * config.channel_multiple)
    return min(int(config.head_sparsity * number + 1e-9), number - 1) if group_set.kind == "kv_heads" else 0


def _cut_solved(
    model: PreTrainedModel, name: str, group_set: GroupSet, count: int, config: PruningConfig, sums: tuple[Tensor, Tensor],
    outputs: Tensor | None,
) -> float:  # fmt: skip
    """Choose, cut and compensate; returns the share of the output energy that is lost."""
    gram, total = sums
    reader = group_set.slices[-1].module
    dense, index = as_linear(reader).weight.detach().cpu().double(), group_set.slices[-1].index
    has_bias = reader.bias is not None or config.compensation == "bias"
    spread = centered(gram, total) if has_bias and config.compensation != "none" else gram
    # Two scores say by themselves whether a mean counts, the others go by what the compensation leaves.
    metric = gram if config.score == "wanda_sp" else centered(gram, total) if config.score == "flap" else spread
    removed = _chosen(name, group_set, dense, index, count, config, metric, outputs)
    is_kept = torch.ones(group_set.num_groups, dtype=torch.bool)
    is_kept[removed] = False
    kept = index[is_kept].flatten().sort().values
    group_set.cut_(model, is_kept.nonzero()[:, 0])
    new = refit_columns(dense, spread, kept, config.damp) if config.compensation == "refit" else dense[:, kept]
    weight = new.to(reader.weight)
    reader.weight.data = weight if as_linear(reader) is reader else weight.T.contiguous()
    lost = dense.clone()
    lost[:, kept] -= new
    if has_bias and config.compensation != "none":
        _bias_of(model, name, group_set).data += (lost @ (total[:-1] / total[-1])).to(reader.weight)
    return output_energy(lost, spread) / max(output_energy(dense, gram), 1e-30)


def _chosen(
    name: str, group_set: GroupSet, dense: Tensor, index: Tensor, count: int, config: PruningConfig, gram: Tensor,
    outputs: Tensor | None,
) -> Tensor:  # fmt: skip
    """Numbers of the groups that go."""
    per_pool = group_set.num_groups // group_set.num_pools
    if config.score == "obs":
        try:
            return select_by_residual(dense, gram, index, count, per_pool, config.damp)[0]
        except ValueError as error:
            raise NumericalError(f"{name}: {error}") from error
    return lowest(unit_scores(name, group_set, config.score, gram, outputs, config.seed), count, per_pool)


def unit_scores(
    name: str, group_set: GroupSet, score: str, gram: Tensor | None, outputs: Tensor | None, seed: int = 0
) -> Tensor:  # fmt: skip
    """`[num_groups]` float64: what each group is worth by itself; the lowest go.

    Args:
        name: of the Linear that reads the groups; with the seed it makes the draws of `random`.
        group_set: the groups.
        score: any but `obs`, which knows no group alone.
        gram: `[in, in]` sum of x x^T at the reader, of the spread for `flap`; for `wanda_sp`, `flap` and `taylor`.
        outputs: `[out, out]` gradients' second moments at the reader, for `taylor`.
        seed: for `random`.
    """
    if score == "random":
        drawn = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7])
        return torch.rand(group_set.num_groups, generator=torch.Generator().manual_seed(drawn), dtype=torch.float64)
    if score == "magnitude":
        return group_set.totals(lambda part: part.parameter.float().square())
    dense, index = as_linear(group_set.slices[-1].module).weight.detach().cpu().double(), group_set.slices[-1].index
    return loss_increase(dense, gram, index, outputs) if score == "taylor" else unit_energy(dense, gram, index)


def _bias_of(model: PreTrainedModel, name: str, group_set: GroupSet) -> Tensor:
    """The reader's bias; where a family may have one and has none, zeros everywhere the config then expects them."""
    reader = group_set.slices[-1].module
    if reader.bias is None:
        field = "mlp_bias" if group_set.kind == "channels" else "attention_bias"
        config = model.config.get_text_config(decoder=True)
        if not hasattr(config, field):
            raise UnsupportedModel(
                f"{name} has no bias, and a {type(model).__name__} can have none: set pruning.compensation to refit"
            )
        setattr(config, field, True)
        for module in dict.fromkeys(part.module for part in group_set.slices):
            if module.bias is None:
                rows = dense_shape(module)[0]
                module.bias = nn.Parameter(torch.zeros(rows, dtype=module.weight.dtype, device=module.weight.device))
    return reader.bias
