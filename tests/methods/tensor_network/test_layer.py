"""The train as a module: against its own matrix, on meta, with other modules as its cores."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_compact.functional.factor import spectrum
from hf_compact.methods.codebook.apply import compress_linear as compress_codebook
from hf_compact.methods.codebook.config import CodebookConfig
from hf_compact.methods.tensor_network import TensorTrainLinear
from hf_compact.methods.tensor_network.functional import decompose, full_ranks

KINDS = {
    "low rank": {"out_factors": [24, 1], "in_factors": [1, 20], "ranks": [7]},
    "pivoted": {"out_factors": [24, 1], "in_factors": [1, 20], "ranks": [7], "is_pivoted": True},
    "kronecker": {"out_factors": [4, 6], "in_factors": [5, 4], "ranks": [7]},
    "sorted": {"out_factors": [4, 6], "in_factors": [5, 4], "ranks": [7], "is_sorted": True},
    "three cores": {"out_factors": [2, 3, 4], "in_factors": [5, 2, 2], "ranks": [3, 4]},
}
kinds = pytest.mark.parametrize("spec", KINDS.values(), ids=KINDS)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(spec: dict, bias: bool = True) -> TensorTrainLinear:
    linear = nn.Linear(20, 24, bias=bias)
    layer = TensorTrainLinear.empty_like(linear, **spec)
    if layer.is_low_rank:
        return layer.load_factors_(*spectrum(normal(24, 20)).truncate(layer.ranks[0]))
    if layer.is_sorted:
        layer.load_orders_(torch.randperm(24, generator=torch.Generator().manual_seed(1)), torch.randperm(20))
    return layer.load_cores_(decompose(normal(24, 20), layer.out_factors, layer.in_factors, layer.ranks))


@kinds
@pytest.mark.parametrize("mode", ["auto", "factored", "dense"])
def test_forward_is_the_matrix(spec, mode):
    layer, x = filled(spec), normal(3, 5, 20, seed=2)
    layer.mode = mode
    torch.testing.assert_close(layer(x), x @ layer.to_dense().T + layer.bias, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.to_dense(rows=torch.tensor([3, 0])), layer.to_dense()[[3, 0]])
    dense = layer.dense_module(torch.float32)
    torch.testing.assert_close(dense(x), layer(x), rtol=1e-4, atol=1e-5)


@kinds
def test_one_token_is_a_row_of_many(spec):
    layer, x = filled(spec), normal(1, 5, 20, seed=2)
    for token in (x[:, 3:4].clone().requires_grad_(), x[0, 3]):
        torch.testing.assert_close(layer(token).flatten(), layer(x)[0, 3], rtol=1e-4, atol=1e-5)
    layer(token[None]).sum().backward()
    assert all(parameter.grad.any() for parameter in layer.parameters())


def test_a_cut_may_change_what_is_cheaper():
    layer = TensorTrainLinear([24, 1], [1, 20], [15])
    assert layer._is_rebuilt(torch.empty(10**4, 20))
    layer.set_rank(10)
    assert not layer._is_rebuilt(torch.empty(10**4, 20))


@kinds
def test_counts_are_those_of_the_parameters(spec):
    layer = filled(spec, bias=False)
    assert layer.num_values == sum(p.numel() for p in layer.parameters())
    assert layer.num_multiply_adds > 0


@pytest.mark.parametrize("shape", [(3, 5, 20), (1, 1, 20), (20,)])
def test_without_gradients_the_outputs_are_the_same(shape):
    """For many tokens the rows of the left factor are put in order; also after a core has changed behind autograd's back."""
    layer, x = filled(KINDS["pivoted"]), torch.randn(shape, generator=torch.Generator().manual_seed(5))
    layer.bias = torch.nn.Parameter(torch.linspace(-1, 1, 24))
    for _ in range(2):
        with torch.no_grad():
            assert layer._bare_weights() is not None
            found = layer(x)
        torch.testing.assert_close(found, layer(x).detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found, x @ layer.to_dense().T + layer.bias, rtol=1e-4, atol=1e-5)
        layer.core0.weight.data *= 2


@pytest.mark.parametrize("kind", ["low rank", "pivoted"])
@pytest.mark.parametrize("reason", ["mode", "hook", "another core", "another forward", "gradients", "none"])
def test_a_core_that_has_to_run_runs(kind, reason):
    layer, x, seen = filled(KINDS[kind]), torch.ones(30, 20), []
    expected = layer(x).detach()
    if reason == "mode":
        layer.mode = "factored"
    elif reason == "hook":
        layer.core0.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    elif reason == "another core":
        layer.core0 = torch.nn.Sequential(layer.core0)
    elif reason == "another forward":  # as accelerate's hooks do
        layer.core0.forward = lambda x, forward=layer.core0.forward: seen.append(x.shape) or forward(x)
    with torch.set_grad_enabled(reason == "gradients"):
        assert (layer._bare_weights() is not None) == (reason == "none")
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert seen == ([torch.Size([30, 7])] if reason in ("hook", "another forward") else [])


def test_a_pivoted_layer_takes_fewer_values_and_operations():
    plain, pivoted = filled(KINDS["low rank"]), filled(KINDS["pivoted"])
    assert plain.num_values - pivoted.num_values == plain.num_multiply_adds - pivoted.num_multiply_adds == 49
    torch.testing.assert_close(plain.to_dense(), pivoted.to_dense(), rtol=1e-4, atol=1e-5)


@kinds
def test_it_is_rebuilt_from_its_spec_on_meta(spec):
    layer = filled(spec)
    empty = TensorTrainLinear.empty_like(nn.Linear(20, 24, device="meta"), **layer.spec())
    assert {k: v.shape for k, v in empty.state_dict().items()} == {k: v.shape for k, v in layer.state_dict().items()}
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    assert empty.state_dict()["weight"].shape == (1,)


def test_a_sorted_train_of_full_rank_is_exact():
    weight = normal(24, 20)
    layer = TensorTrainLinear([4, 6], [5, 4], full_ranks([4, 6], [5, 4]), is_sorted=True)
    rows, columns = torch.randperm(24), torch.randperm(20)
    layer.load_orders_(rows, columns)
    layer.load_cores_(decompose(weight[rows][:, columns], [4, 6], [5, 4], layer.ranks))
    torch.testing.assert_close(layer.to_dense(), weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(torch.eye(20)), weight.T, rtol=1e-4, atol=1e-5)


def test_auto_rebuilds_where_the_product_costs_more():
    wide = TensorTrainLinear([16, 16], [16, 16], [100])  # 100 * (1/16 + 1/16) times the operations of the dense matrix
    assert wide.num_multiply_adds / 256**2 == pytest.approx(100 * (1 / 16 + 1 / 16))
    rebuild, excess = 100 * 256**2, wide.num_multiply_adds - 256**2  # per call, per token
    assert wide._is_rebuilt(torch.empty(1, rebuild // excess + 1, 256))
    assert not wide._is_rebuilt(torch.empty(1, rebuild // excess, 256))
    assert not TensorTrainLinear([16, 16], [16, 16], [4])._is_rebuilt(torch.empty(10**6, 256, device="meta"))
    handle = wide.core1.register_forward_pre_hook(lambda *_: None)
    assert not wide._is_rebuilt(torch.empty(1000, 256)), "a hook on a core has to see its inputs"
    handle.remove()


def test_no_tensor_is_larger_than_an_activation():
    layer = TensorTrainLinear([8, 8], [8, 8], [32])
    layer.mode = "factored"
    sizes = []
    for core in layer.cores:
        original = core.forward
        core.forward = lambda x, original=original: sizes.append(original(x).numel()) or original(x)
    layer(normal(128, 64))
    assert max(sizes) <= 128 * 64
    assert len(sizes) > 2


@kinds
def test_gradients_reach_every_core(spec):
    for mode in ("factored", "dense"):
        layer = filled(spec)
        layer.mode = mode
        layer(normal(4, 20)).square().sum().backward()
        assert all(parameter.grad.any() for parameter in layer.parameters())


@kinds
def test_cores_can_be_quantized_and_adapted(spec):
    layer, x = filled(spec), normal(4, 20, seed=3)
    layer.core1 = compress_codebook(layer.core1, None, CodebookConfig(bits=8, group_size=None, rounding="nearest"))
    assert not layer.is_ordered
    for mode in ("factored", "dense"):
        layer.mode = mode
        torch.testing.assert_close(layer(x), x @ layer.to_dense().T + layer.bias, rtol=1e-4, atol=1e-4)

    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.in_features = base, base.in_features

        def forward(self, x):
            return 2 * self.base(x)

    other = filled(spec)
    before = other.to_dense()
    other.core0 = Adapted(other.core0)
    if not other.is_pivoted:
        torch.testing.assert_close(other.to_dense(), 2 * before)
    torch.testing.assert_close(other(x), x @ other.to_dense().T + other.bias, rtol=1e-4, atol=1e-4)


def test_a_cast_keeps_the_orders():
    layer = filled(KINDS["pivoted"])
    order = layer.out_order.clone()
    layer.to(torch.bfloat16)
    assert layer.core0.weight.dtype == torch.bfloat16
    assert torch.equal(layer.out_order, order)
    assert layer.weight.dtype == torch.int8


def test_a_rank_is_cut_to_the_first_components():
    layer = filled(KINDS["low rank"])
    up, down = spectrum(normal(24, 20)).truncate(3)
    whole = copy.deepcopy(layer)
    layer.set_rank(3)
    torch.testing.assert_close(layer.to_dense(), (up @ down).float(), rtol=1e-4, atol=1e-5)
    assert layer.spec()["ranks"] == [3]
    whole.active_rank = 3
    x = normal(2, 20)
    torch.testing.assert_close(whole(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "rank", "match"), [("pivoted", 2, "no order"), ("kronecker", 2, "no order"), ("low rank", 8, r"\[1, 7\]")]
)
def test_what_cannot_be_cut_says_so(kind, rank, match):
    with pytest.raises(ValueError, match=match):
        filled(KINDS[kind]).set_rank(rank)


def test_wrong_shapes_name_themselves():
    with pytest.raises(ValueError, match="is_pivoted is for two cores"):
        TensorTrainLinear([4, 6], [5, 4], [7], is_pivoted=True)
    with pytest.raises(ValueError, match="do not multiply"):
        TensorTrainLinear.empty_like(nn.Linear(20, 25), out_factors=[24, 1], in_factors=[1, 20], ranks=[3])
    with pytest.raises(ValueError, match="core0 must be"):
        TensorTrainLinear([24, 1], [1, 20], [3]).load_cores_([torch.zeros(1, 24, 1, 2), torch.zeros(2, 1, 20, 1)])


def test_a_cut_rank_is_cut_however_it_multiplies():
    layer = TensorTrainLinear([6, 1], [1, 6], [4])
    x, layer.active_rank = torch.randn(3, 6), 2
    expected = layer(x)
    layer.mode = "dense"
    assert torch.equal(layer(x), expected)
    assert not torch.allclose(expected, x @ layer.to_dense().T)


def test_an_adapted_core_of_bfloat16_becomes_dense_in_any_dtype():
    model = nn.Sequential(TensorTrainLinear([4, 3], [3, 4], [3], dtype=torch.bfloat16))
    adapted = get_peft_model(model, LoraConfig(target_modules=["0.core0"], r=2))
    train = adapted.base_model.model[0]
    dense = train.to_dense(torch.float32)
    x = torch.randn(2, 12).bfloat16()
    torch.testing.assert_close(train(x).float(), x.float() @ dense.T, atol=0.03, rtol=0.03)
