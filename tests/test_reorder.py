"""Reordering hidden units leaves the outputs of every family as they are."""

import pytest
import torch

from hf_compact.arch import as_linear, describe
from hf_compact.methods.codebook import CodebookConfig
from hf_compact.methods.codebook.apply import arrange_
from hf_compact.reorder import attention_shape, block_linears, permute_channels_, permute_heads_, permute_values_
from tests.conftest import FAMILIES, tiny_inputs, tiny_model

ALL = CodebookConfig(grid="learned", row_order="similar")


def output(model, family: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_inputs(family))[0]


def with_biases(model) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))


@pytest.mark.parametrize("family", FAMILIES)
def test_arranging_changes_weights_and_not_the_output(family):
    model = tiny_model(family)
    with_biases(model)
    arch = describe(model)
    before, weights = output(model, family), {name: model.get_submodule(name).weight.clone() for name in arch.roles}
    arranged = set().union(*(arrange_(model, arch, block, arch.targets(block), ALL) for block in arch.blocks))
    torch.testing.assert_close(output(model, family), before, rtol=0, atol=1e-4)
    moved = {name for name, weight in weights.items() if not torch.equal(model.get_submodule(name).weight, weight)}
    assert {arch.roles[name] for name in arranged} <= {"up", "gate", "v", "cross_v"}
    assert "up" in {arch.roles[name] for name in arranged & moved}
    if family not in ("gpt2", "gpt_neox"):  # whose q, k and v are one Linear
        assert {arch.roles[name] for name in moved} >= {"v", "o", "up", "down"}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "opt", "bert", "gpt2", "t5"])
def test_random_orders_are_exact(family):
    model = tiny_model(family)
    with_biases(model)
    arch, generator = describe(model), torch.Generator().manual_seed(1)
    before = output(model, family)
    for block in arch.blocks:
        for linears in block_linears(model, arch, block):
            if "up" in linears:
                permute_channels_(linears, torch.randperm(as_linear(linears["up"]).out_features, generator=generator))
            if "v" in linears:
                num_heads, num_kv, width = attention_shape(model, linears)
                order = torch.stack([torch.randperm(width, generator=generator) for _ in range(num_kv)])
                permute_values_(linears, order, num_heads)
                if family != "t5":
                    permute_heads_(linears, torch.randperm(num_kv, generator=generator))
    torch.testing.assert_close(output(model, family), before, rtol=0, atol=1e-4)


def test_old_weights_are_not_written_to():
    model = tiny_model("llama")
    arch = describe(model)
    (linears,) = block_linears(model, arch, arch.blocks[0])
    old = linears["down"].weight.data
    kept = old.clone()
    permute_channels_(linears, torch.arange(72).flip(0))
    assert torch.equal(old, kept)
    assert torch.equal(linears["down"].weight, kept.flip(1))


def test_what_is_known_by_structure_only_stays():
    model = tiny_model("llama")
    model.config.model_type = "somebody_elses"
    arch = describe(model)
    assert block_linears(model, arch, arch.blocks[0]) == []
    assert arrange_(model, arch, arch.blocks[0], arch.targets(arch.blocks[0]), ALL) == set()


def test_only_the_stages_own_linears_are_named():
    model = tiny_model("llama")
    arch = describe(model)
    block = arch.blocks[0]
    assert arrange_(model, arch, block, [f"{block}.mlp.up_proj"], ALL) == {f"{block}.mlp.up_proj"}
    assert arrange_(model, arch, block, arch.targets(block), CodebookConfig(grid="learned")) == set()
