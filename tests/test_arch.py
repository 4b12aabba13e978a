"""Every family's blocks, roles, embedding, ties and head are found; what cannot be read correctly is refused."""

import logging

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_compact.arch import FAMILIES as TABLE
from hf_compact.arch import as_linear, dense_shape, describe
from hf_compact.errors import UnsupportedModel
from tests.conftest import FAMILIES, NO_SPECIAL, SMALL, tiny_inputs, tiny_model

ATTENTION = {"q": 1, "k": 1, "v": 1, "o": 1}
GATED = ATTENTION | {"gate": 1, "up": 1, "down": 1}
PLAIN = ATTENTION | {"up": 1, "down": 1}
FUSED = {"qkv": 1, "o": 1, "up": 1, "down": 1}
CROSS = {f"cross_{role}": 1 for role in "qkvo"}

#: family -> (model type, path of each stack, blocks per stack, roles of each stack's block, embedding, tied, head)
EXPECTED = {
    "llama": ("llama", ["model.layers"], 3, [GATED], "model.embed_tokens", {"lm_head"}, None),
    "llama_untied": ("llama", ["model.layers"], 3, [GATED], "model.embed_tokens", set(), "lm_head"),
    "mistral": ("mistral", ["model.layers"], 3, [GATED], "model.embed_tokens", set(), "lm_head"),
    "qwen2": ("qwen2", ["model.layers"], 3, [GATED], "model.embed_tokens", {"lm_head"}, None),
    "qwen3": ("qwen3", ["model.layers"], 3, [GATED], "model.embed_tokens", set(), "lm_head"),
    "gemma3": ("gemma3_text", ["model.layers"], 3, [GATED], "model.embed_tokens", {"lm_head"}, None),
    "gpt2": ("gpt2", ["transformer.h"], 3, [FUSED], "transformer.wte", {"lm_head"}, None),
    "gpt_neox": ("gpt_neox", ["gpt_neox.layers"], 3, [FUSED], "gpt_neox.embed_in", set(), "embed_out"),
    "opt": ("opt", ["model.decoder.layers"], 3, [PLAIN], "model.decoder.embed_tokens", {"lm_head"}, None),
    "bert": ("bert", ["encoder.layer"], 3, [PLAIN], "embeddings.word_embeddings", set(), None),
    "bert_mlm": ("bert", ["bert.encoder.layer"], 3, [PLAIN], "bert.embeddings.word_embeddings", {"cls.predictions.decoder"}, None),
    "t5": (
        "t5", ["encoder.block", "decoder.block"], 2, [PLAIN, PLAIN | CROSS], "shared",
        {"encoder.embed_tokens", "decoder.embed_tokens", "lm_head"}, None,
    ),
    "vit": ("vit", ["vit.layers"], 3, [PLAIN], None, set(), None),
}  # fmt: skip
families = pytest.mark.parametrize("family", FAMILIES)


def counts(arch, block: str) -> dict[str, int]:
    roles = [arch.roles[name] for name in arch.targets(block)]
    return {role: roles.count(role) for role in roles}


def test_every_family_is_expected():
    assert EXPECTED.keys() == FAMILIES.keys()
    assert {expected[0] for expected in EXPECTED.values()} <= TABLE.keys()


@families
def test_parts_are_found(family, caplog):
    model_type, paths, num_blocks, roles, embedding, tied, head = EXPECTED[family]
    model = tiny_model(family)
    arch = describe(model)
    assert arch.family == model_type
    assert arch.is_known
    assert not caplog.records
    assert arch.stacks == tuple(tuple(f"{path}.{i}" for i in range(num_blocks)) for path in paths)
    assert arch.blocks == tuple(name for stack in arch.stacks for name in stack)
    for stack, expected in zip(arch.stacks, roles, strict=True):
        for block in stack:
            assert counts(arch, block) == expected
    assert arch.embedding == embedding
    assert set(arch.tied) == tied
    if family == "gpt_neox":
        head = arch.head  # its name differs between versions of transformers; its object does not
        assert model.get_submodule(head) is model.get_output_embeddings()
    assert arch.head == head


@families
def test_every_linear_of_a_block_has_one_role(family):
    model = tiny_model(family)
    arch = describe(model)
    inside = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name.startswith(tuple(block + "." for block in arch.blocks))
    ]
    assert sorted(arch.roles) == sorted(inside)
    assert [name for block in arch.blocks for name in arch.targets(block)] == list(arch.roles)
    assert "linear" not in arch.roles.values()


@families
def test_same_parts_on_meta(family):
    model = tiny_model(family)
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    assert describe(skeleton) == describe(model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert_mlm", "opt"])
def test_base_model_alone(family):
    """What `AutoModel` gives has the same blocks without the prefix of the head class."""
    model = tiny_model(family)
    whole, bare = describe(model), describe(transformers.AutoModel.from_config(model.config))
    prefix = "" if family == "t5" else model.base_model_prefix + "."
    assert tuple(name.removeprefix(prefix) for name in whole.blocks) == bare.blocks
    assert {name.removeprefix(prefix): role for name, role in whole.roles.items()} == bare.roles
    assert whole.embedding.removeprefix(prefix) == bare.embedding
    assert bare.head is None


def test_block_names_do_not_run_into_each_other():
    arch = describe(tiny_model("llama", num_hidden_layers=11))
    assert len(arch.targets("model.layers.1")) == 7
    assert len(arch.targets("model.layers.10")) == 7


def test_gated_t5():
    arch = describe(tiny_model("t5", feed_forward_proj="gated-gelu"))
    assert counts(arch, "encoder.block.0") == GATED
    assert counts(arch, "decoder.block.1") == GATED | CROSS


@pytest.mark.parametrize(
    ("family", "settings", "stacks"),
    [
        ("Phi", SMALL, ["model.layers"]),
        (
            "Bart",
            {"encoder_layers": 3, "decoder_layers": 3, "d_model": 32, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40,
             "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 64},
            ["model.encoder.layers", "model.decoder.layers"],
        ),
    ],
    ids=["phi", "bart"],
)  # fmt: skip
def test_unknown_family_is_read_by_structure_and_says_so(family, settings, stacks, caplog):
    config = getattr(transformers, f"{family}Config")(**settings | NO_SPECIAL)
    name = "PhiForCausalLM" if family == "Phi" else "BartForConditionalGeneration"
    model = getattr(transformers, name)(config)
    with caplog.at_level(logging.WARNING, "hf_compact"):
        arch = describe(model)
    assert not arch.is_known
    assert arch.stacks == tuple(tuple(f"{path}.{i}" for i in range(3)) for path in stacks)
    assert set(arch.roles.values()) == {"linear"}
    (record,) = caplog.records
    assert record.getMessage() == (
        f"model_type '{config.model_type}' is not in the table of families; blocks found by structure: {', '.join(stacks)}"
    )


def test_model_without_blocks(caplog):
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    with pytest.raises(UnsupportedModel, match="model_type 'resnet': no list of blocks that hold Linears was found"):
        describe(transformers.ResNetModel(config))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Mixtral", SMALL | {"num_key_value_heads": 2, "num_local_experts": 2}),
        ("Qwen3Moe", SMALL | {"num_key_value_heads": 2, "head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}),
    ],
    ids=["mixtral", "qwen3_moe"],
)  # fmt: skip
def test_fused_experts_are_refused_by_name(name, settings):
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**settings | NO_SPECIAL))
    message = (
        r"model.layers.0.mlp.experts.\w+ is a fused 3-D weight \[2, \d+, \d+\] \(experts in one tensor\); such models are refused"
    )
    with pytest.raises(UnsupportedModel, match=message):
        describe(model)


# Conv1D.


def test_conv1d_as_linear():
    conv = Conv1D(5, 3)
    nn.init.normal_(conv.weight)
    linear = as_linear(conv)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    assert (linear.in_features, linear.out_features) == (3, 5)
    assert linear.weight.is_contiguous()
    assert linear.bias is conv.bias
    torch.testing.assert_close(linear(x), conv(x))


def test_conv1d_on_meta():
    conv = Conv1D(5, 3).to("meta", torch.bfloat16)
    linear = as_linear(conv)
    assert linear.weight.is_meta
    assert linear.weight.dtype == torch.bfloat16
    assert linear.weight.shape == (5, 3)


def test_linear_is_itself():
    linear = nn.Linear(3, 5)
    assert as_linear(linear) is linear


@pytest.mark.parametrize(
    ("module", "shape"), [(nn.Linear(3, 5), (5, 3)), (Conv1D(5, 3), (5, 3)), (nn.Embedding(7, 2), (7, 2))], ids=repr
)
def test_dense_shape(module, shape):
    assert dense_shape(module) == shape


@families
def test_inputs_of_every_family_run(family):
    with torch.no_grad():
        assert tiny_model(family)(**tiny_inputs(family))[0].isfinite().all()
