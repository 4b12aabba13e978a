"""Groups that are zero can be cut out of every family, and nothing changes but the size."""

import pytest
import torch

import hf_compact
from hf_compact.arch import describe
from hf_compact.calibration import from_batches
from hf_compact.errors import ConfigError, NothingMatched, UnsupportedModel
from hf_compact.groups import KINDS, cut_zeros_, drop_layers_, find_groups, least_valid, settle_
from tests.conftest import FAMILIES, tiny_inputs, tiny_model

GENERATES = ["llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt2", "gpt_neox", "opt", "t5"]


def output(model, family: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_inputs(family))[0]


def with_biases(model) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))


def zero_some_(model, kinds, seed: int = 0, is_even: bool = False) -> int:
    """Zero random groups, of every pool equally many; returns the parameters that they have."""
    generator = torch.Generator().manual_seed(seed)
    removed = 0
    for number, group_set in enumerate(find_groups(model, kinds)):
        size = group_set.num_groups // group_set.num_pools
        count = size // 3 + (0 if is_even else number // len(kinds) % 2)
        count = min(max(1, count), size - 1)
        chosen = torch.cat(
            [pool * size + torch.randperm(size, generator=generator)[:count] for pool in range(group_set.num_pools)]
        )
        group_set.scale_(chosen, 0)
        assert torch.equal(group_set.zero_groups(), chosen.sort().values)
        removed += int(group_set.sizes()[chosen].sum())
    return removed


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("is_uniform", [True, False], ids=["uniform", "free"])
def test_zeros_are_cut_out_exactly(family, is_uniform):
    model = tiny_model(family)
    with_biases(model)
    kinds = ("channels",) if family == "t5" else ("channels", "kv_heads")
    removed = zero_some_(model, kinds, is_even=is_uniform)
    before, size = output(model, family), model.num_parameters()
    table = cut_zeros_(model, kinds, is_uniform)
    torch.testing.assert_close(output(model, family), before, rtol=0, atol=1e-5)
    assert model.num_parameters() == size - removed
    stock_heads = family in ("gpt2", "gpt_neox", "opt", "bert", "bert_mlm")
    assert bool(table) == (not is_uniform or stock_heads)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_neox", "opt", "bert", "vit"])
def test_heads_of_a_block_that_was_cut_stay_whole(family):
    model = tiny_model(family)
    (before,) = {group_set.num_groups for group_set in find_groups(model, ("kv_heads",))}
    for left in (before - 1, before - 2) if before > 2 else (before - 1,):
        first = find_groups(model, ("kv_heads",))[0]
        first.scale_(torch.tensor([0]), 0)
        expected = output(model, family)
        cut_zeros_(model, ("kv_heads",), is_uniform=False)
        torch.testing.assert_close(output(model, family), expected, rtol=0, atol=1e-5)
        assert [group_set.num_groups for group_set in find_groups(model, ("kv_heads",))] == [left, before, before]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_query_heads_leave_their_key_value_heads(family):
    model = tiny_model(family)
    zero_some_(model, ("query_heads",), is_even=True)
    before = output(model, family)
    assert cut_zeros_(model) == {}
    torch.testing.assert_close(output(model, family), before, rtol=0, atol=1e-5)
    config = model.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 2, 8)


@pytest.mark.parametrize("family", GENERATES)
@pytest.mark.parametrize(
    "cache", [{"use_cache": False}, {}, {"cache_implementation": "static"}], ids=["none", "dynamic", "static"]
)
def test_generation_is_that_of_the_zeroed_model(family, cache):
    model = tiny_model(family)
    zero_some_(model, ("channels",) if family == "t5" else ("channels", "kv_heads"))
    ids = tiny_inputs(family, 1, 8)["input_ids"]
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **settings, use_cache=False)
    cut_zeros_(model, is_uniform=False)
    assert torch.equal(model.generate(ids, **settings, **cache), expected)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "gpt2", "gpt_neox", "opt", "t5", "vit"])
def test_layers_are_left_out_exactly(family):
    model = tiny_model(family)
    with_biases(model)
    chosen = find_groups(model, ("layers",))[1 if family == "t5" else 0]
    chosen.scale_(torch.tensor([0]), 0)
    before = output(model, family)
    number = len(describe(model).blocks)
    assert cut_zeros_(model, ("layers",)) == {}
    torch.testing.assert_close(output(model, family), before, rtol=0, atol=1e-5)
    assert len(describe(model).blocks) == number - 1
    stock = type(model)(model.config).eval()
    stock.load_state_dict(model.state_dict())
    torch.testing.assert_close(output(stock, family), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "llama_untied", "mistral", "qwen2"])
def test_the_residual_stream_is_narrowed_exactly(family, tmp_path):
    model = tiny_model(family)
    with_biases(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    dense, epsilon = model.num_parameters(), model.config.rms_norm_eps
    (group_set,) = find_groups(model, ("hidden",))
    group_set.scale_(torch.randperm(32, generator=torch.Generator().manual_seed(0))[:12], 0)
    before, sizes = output(model, family), group_set.sizes()
    assert cut_zeros_(model, ("hidden",)) == {}
    torch.testing.assert_close(output(model, family), before, rtol=0, atol=1e-5)
    assert model.num_parameters() == dense - 12 * sizes[0]
    assert (model.config.hidden_size, model.config.head_dim, model.config.rms_norm_eps) == (20, 8, epsilon * 32 / 20)
    assert (model.get_input_embeddings().embedding_dim, model.lm_head.in_features) == (20, 20)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(output(again, family), before, rtol=0, atol=1e-5)
    ids = tiny_inputs(family, 1, 8)["input_ids"]
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(again.generate(ids, **settings), model.generate(ids, **settings, use_cache=False))


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma3", "bert"])
def test_other_norms_keep_the_residual_stream(family):
    with pytest.raises(UnsupportedModel, match=r"cut in llama, mistral, qwen2, smollm3 only, got"):
        find_groups(tiny_model(family), ("hidden",))


def test_what_cannot_be_cut_is_named():
    model = tiny_model("llama")
    with pytest.raises(
        ConfigError, match="kinds must be of channels, kv_heads, query_heads, layers, hidden, got \\['experts'\\]"
    ):
        find_groups(model, ("experts",))
    with pytest.raises(NothingMatched, match="a T5ForConditionalGeneration has no groups of the kinds kv_heads"):
        find_groups(tiny_model("t5"), ("kv_heads",))
    with pytest.raises(NothingMatched, match="no groups of the kinds channels"):
        find_groups(tiny_model("bert", hidden_act="sigmoid"), ("channels",))
    (first, *_) = find_groups(model, ("channels",))
    with pytest.raises(ConfigError, match="must keep at least one of its channels in each of 1 pools"):
        first.cut_(model, torch.tensor([], dtype=torch.long))
    (first, *_) = find_groups(model, ("query_heads",))
    with pytest.raises(ConfigError, match=r"equally many, got \[2, 1\]"):
        first.cut_(model, torch.tensor([0, 1, 2]))
    with pytest.raises(ConfigError, match=r"at least one of the 3 blocks of model\.layers must stay"):
        drop_layers_(model, describe(model).blocks)
    with pytest.raises(UnsupportedModel, match=r"encoder\.layer\.0 cannot be left out"):
        drop_layers_(tiny_model("bert"), ["encoder.layer.0"])
    with pytest.raises(UnsupportedModel, match=r"transformer\.h\.0 cannot be left out"):
        drop_layers_(tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True), ["transformer.h.0"])
    model.config.model_type = "somebody_elses"
    with pytest.raises(UnsupportedModel, match="its hidden units are not known"):
        find_groups(model)


@pytest.mark.parametrize(("role", "left"), [("mlp.gate", {"kv_heads", "query_heads"}), ("self_attn.q", {"channels"})])
def test_what_is_compressed_in_part_has_no_groups(role, left):
    model = tiny_model("llama")
    stage = {"method": "codebook", "bits": 4, "include": [f"*.{role}_proj"]}
    hf_compact.compress(model, {"stages": [stage]}, calibration=from_batches([tiny_inputs("llama")]))
    assert {group_set.kind for group_set in find_groups(model, KINDS)} == left
    before = output(model, "llama")
    zero_some_(model, (min(left),))
    cut_zeros_(model)
    assert output(model, "llama").shape == before.shape


def test_a_layer_of_zeros_keeps_a_group():
    model = tiny_model("llama")
    for group_set in find_groups(model):
        group_set.scale_(torch.arange(group_set.num_groups), 0)
    before = output(model, "llama")
    assert cut_zeros_(model, ("channels", "kv_heads"), multiple=8) == {}
    assert (model.config.intermediate_size, model.config.num_key_value_heads) == (8, 1)
    torch.testing.assert_close(output(model, "llama"), before, rtol=0, atol=1e-5)


#: Eight heads of four dimensions each, over a residual stream of 32.
EIGHT = {"num_attention_heads": 8, "num_key_value_heads": 8}


@pytest.mark.parametrize(("kind", "number", "step", "expected"), [
    ("kv_heads", 7, 1, 8), ("kv_heads", 3, 1, 4), ("kv_heads", 4, 1, 4), ("hidden", 20, 2, 24), ("hidden", 25, 5, 32), ("channels", 7, 1, 7),
])  # fmt: skip
def test_a_llama_says_heads_that_divide_its_width(kind, number, step, expected):
    model = tiny_model("llama", **EIGHT)
    assert least_valid(model, find_groups(model, (kind,))[0], number, step) == expected
    other = tiny_model("qwen2", **EIGHT)
    assert least_valid(other, find_groups(other, (kind,))[0], number, step) == number


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_heads_that_the_config_cannot_say_are_in_the_table(family):
    """A Llama of 32 dimensions has no seven heads for transformers, a Qwen2 has."""
    model = tiny_model(family, **EIGHT)
    for group_set in find_groups(model, ("kv_heads",)):
        group_set.cut_(model, torch.arange(7))
    table = settle_(model, describe(model))
    assert model.config.num_attention_heads == (8 if family == "llama" else 7)
    assert {name.rpartition(".")[2] for name in table} == (
        {"q_proj", "k_proj", "v_proj", "o_proj"} if family == "llama" else set()
    )
    model.config.validate()


def test_uniform_zeros_leave_what_the_config_can_say():
    model = tiny_model("llama", **EIGHT)
    for group_set in find_groups(model, ("kv_heads",)):
        group_set.scale_(torch.arange(3), 0)
    x = tiny_inputs("llama")
    with torch.no_grad():
        expected = model(**x).logits
        assert cut_zeros_(model, ("kv_heads",)) == {}
        assert model.config.num_attention_heads == 8  # five do not divide 32
        torch.testing.assert_close(model(**x).logits, expected, rtol=0, atol=1e-5)
        for group_set in find_groups(model, ("kv_heads",)):
            group_set.scale_(torch.arange(5), 0)
        expected = model(**x).logits
        assert cut_zeros_(model, ("kv_heads",)) == {}
        assert model.config.num_attention_heads == 4
        torch.testing.assert_close(model(**x).logits, expected, rtol=0, atol=1e-5)


def test_kinds_are_cut_one_after_the_other():
    """Query heads stand elsewhere once key-value heads are gone, and the hidden size goes with the heads that are left."""
    model = tiny_model("llama", num_attention_heads=8, num_key_value_heads=4)
    x = tiny_inputs("llama")
    for group_set in find_groups(model, ("kv_heads", "query_heads")):
        group_set.scale_(torch.tensor([0, 1]) if group_set.kind == "kv_heads" else torch.tensor([4, 6]), 0)
    with torch.no_grad():
        expected = model(**x).logits
        cut_zeros_(model)
        torch.testing.assert_close(model(**x).logits, expected, rtol=0, atol=1e-5)
    assert model.model.layers[0].self_attn.q_proj.weight.shape[0] == 2 * 4
    other = tiny_model("llama", num_attention_heads=6, num_key_value_heads=6, hidden_size=36)
    for group_set in find_groups(other, ("kv_heads", "hidden")):
        group_set.scale_(torch.arange(2 if group_set.kind == "kv_heads" else 4), 0)
    assert cut_zeros_(other, ("kv_heads", "hidden")) == {}
    assert (other.config.hidden_size, other.config.num_attention_heads) == (32, 4)
