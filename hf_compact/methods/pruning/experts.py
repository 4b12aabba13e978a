"""Whole experts of a mixture: those that add least to the outputs go, and the router chooses among the others.

An expert of zeros still takes a place and weight from others, as the router's softmax gives it its share, so experts are not
shrunk like other groups; a router that never picks an expert is what cutting equals, without rounding.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...capture import evaluating, without_cache
from ...errors import ConfigError, NothingMatched, NumericalError, UnsupportedModel
from ...groups import GroupSet
from ...reorder import Slice

#: Family -> the field of the config with the number of experts. All have softmax routers and gated experts in fused tensors.
FAMILIES = {"mixtral": "num_local_experts", "olmoe": "num_experts", "qwen2_moe": "num_experts", "qwen3_moe": "num_experts"}
SCORES = ("output", "frequency")


def find_experts(model: PreTrainedModel) -> list[GroupSet]:
    """The experts of every block that has a router; blocks with a plain MLP are left out, shared experts stay.

    Raises:
        UnsupportedModel: another family than those of `FAMILIES`.
        NothingMatched: no block has a router.
    """
    family = model.config.model_type
    if family not in FAMILIES:
        raise UnsupportedModel(f"experts are dropped in {', '.join(sorted(FAMILIES))} only, got {family}")
    found = []
    for name, module in model.named_modules():
        if not {"gate", "experts"} <= dict(module.named_children()).keys():
            continue
        index = torch.arange(module.gate.weight.shape[0])[:, None]
        parts = [(module.gate, "weight"), (module.experts, "gate_up_proj"), (module.experts, "down_proj")]
        slices = tuple(Slice(owner, leaf, 0, index) for owner, leaf in parts)
        found.append(GroupSet(name, "experts", slices, len(index)))
    if not found:
        raise NothingMatched(f"no block of this {family} model has a router: it holds no experts")
    return found


@torch.no_grad()
def drop_experts_(
    model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]], share: float = 0.25, score: str = "output"
) -> dict[str, list[int]]:
    """Take a share of the experts out of every block, in place; what is left is an ordinary model of its class.

    Args:
        model: Mixtral, OLMoE, Qwen2-MoE or Qwen3-MoE, with experts as transformers holds them, dense.
        batches: model inputs of calibration; tokens under a 0 of `attention_mask` do not count.
        share: of the experts of a block, in [0, 1), rounded down; every block keeps as many.
        score: `output`, the mean of what an expert adds to a token that is sent to it, router weight times the length of its
            output (REAP, https://arxiv.org/abs/2510.13999); `frequency`, how many tokens are.

    Returns:
        Name of every block's mixture -> the numbers of the experts that are gone.

    Raises:
        ConfigError: the share or the score is out of range, nothing would go, fewer experts would stay than a token is sent to, or
            there are no batches.
        UnsupportedModel, NothingMatched: as of `find_experts`.
        NumericalError: outputs are not finite.

    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> tiny = MixtralForCausalLM(MixtralConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, vocab_size=16,
    ...     num_attention_heads=2, num_key_value_heads=2, num_local_experts=4))
    >>> gone = drop_experts_(tiny, [{"input_ids": torch.arange(16)[None]}], share=0.25)
    >>> tiny.config.num_local_experts, {name: len(numbers) for name, numbers in gone.items()}
    (3, {'model.layers.0.mlp': 1})
    """
    if score not in SCORES:
        raise ConfigError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
    if not 0 <= share < 1:
        raise ConfigError(f"share must be in [0, 1), got {share}")
    if not batches:
        raise ConfigError("batches must hold at least one batch, got none")
    sets = find_experts(model)
    number, top_k = sets[0].num_groups, model.config.num_experts_per_tok
    kept = number - int(share * number + 1e-9)
    if kept == number:
        raise ConfigError(f"share {share} of {number} experts rounds to none")
    if kept < top_k:
        raise ConfigError(f"share must leave the {top_k} experts that every token is sent to, got {share} of {number}")
    scores = _scores(model, sets, batches, score)
    if bad := [name for name, values in scores.items() if not values.isfinite().all()]:
        raise NumericalError(f"{bad[0]} gives outputs that are not finite: experts cannot be told apart")
    gone = {}
    for group_set in sets:
        order = scores[group_set.block].argsort(descending=True, stable=True)
        group_set.cut_(model, order[:kept])
        gone[group_set.block] = sorted(order[kept:].tolist())
    for module in model.modules():
        if getattr(module, "num_experts", None) == number:  # of routers, experts, and the loss that balances them
            module.num_experts = kept
    setattr(model.config, FAMILIES[model.config.model_type], kept)
    return gone


def _scores(
    model: PreTrainedModel, sets: Sequence[GroupSet], batches: Sequence[Mapping[str, Tensor]], score: str
) -> dict[str, Tensor]:  # fmt: skip
    """`[experts]` of every block, in float64 on the CPU."""
    sums = {group_set.block: torch.zeros(group_set.num_groups, dtype=torch.float64) for group_set in sets}
    counts = {name: torch.zeros_like(value) for name, value in sums.items()}
    batch: Mapping[str, Tensor] = {}

    def note(name: str, experts: nn.Module, args: tuple[Any, ...]) -> None:
        states, chosen, weights = args
        mask = batch.get("attention_mask")
        is_real = torch.ones(len(states), dtype=torch.bool) if mask is None else mask.flatten().bool()
        for expert in chosen.unique().tolist():
            tokens, places = torch.where((chosen == expert) & is_real.to(chosen.device)[:, None])
            counts[name][expert] += len(tokens)
            if score == "output" and len(tokens):
                gate, up = nn.functional.linear(states[tokens], experts.gate_up_proj[expert]).chunk(2, dim=-1)
                added = nn.functional.linear(experts.act_fn(gate) * up, experts.down_proj[expert])
                sums[name][expert] += float((weights[tokens, places].float() * added.float().norm(dim=-1)).sum())

    hooks = [
        model.get_submodule(f"{name}.experts").register_forward_pre_hook(lambda module, args, name=name: note(name, module, args))
        for name in sums
    ]
    try:
        with evaluating(model), without_cache(model):
            for batch in batches:
                model(**{key: value.to(model.device) for key, value in batch.items()})
    finally:
        for hook in hooks:
            hook.remove()
    if score == "frequency":
        return counts
    return {name: value / counts[name].clamp_min(1) for name, value in sums.items()}
