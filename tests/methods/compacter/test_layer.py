"""One adapter: identity at the start, every kind against its dense maps, dtypes, the cache."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_compact import CompacterConfig
from hf_compact.errors import ConfigError
from hf_compact.methods.compacter.layer import CompacterAdapter, CompacterLayer, device_of, new_slow, width_of

KINDS = {
    "compacter": {},
    "rank 3": {"rank": 3},
    "whole fast matrices": {"rank": None},
    "slow matrices of its own": {"shared_slow": False},
    "low rank": {"kind": "low_rank", "rank": 2},
    "snnk relu": {"kind": "snnk"},
    "snnk sincos": {"kind": "snnk", "feature": "sincos"},
}
kinds = pytest.mark.parametrize("settings", KINDS.values(), ids=list(KINDS))


def build(settings: dict, width: int = 32, is_random: bool = True) -> CompacterAdapter:
    torch.manual_seed(0)
    config = CompacterConfig(**{"reduction_factor": 4, **settings})
    slow = None
    if config.kind == "phm" and config.shared_slow:
        slow = (nn.ParameterDict({"default": new_slow(config, None)}), "default")
    adapter = CompacterAdapter(width, config, slow)
    with torch.no_grad():
        for parameter in [*adapter.parameters(), *([slow[0]["default"]] if slow else [])] if is_random else []:
            parameter.normal_(std=0.5)
    return adapter.eval()


def hidden(width: int = 32) -> torch.Tensor:
    return torch.randn(2, 5, width, generator=torch.Generator().manual_seed(1))


@kinds
def test_starts_as_the_identity(settings):
    h = hidden()
    assert (build(settings, is_random=False)(h) - h).abs().max() < 1e-3
    if settings.get("kind", "phm") != "phm":
        assert torch.equal(build(settings, is_random=False)(h), h)


@kinds
def test_every_parameter_gets_a_gradient_at_the_start(settings):
    """Adam needs some; only the side next to a zero stays still for one step."""
    adapter = build(settings, is_random=False)
    adapter(hidden()).square().sum().backward()
    held = [name for name, parameter in adapter.named_parameters() if parameter.grad.abs().max() == 0]
    assert held == ({"low_rank": ["down_s", "down_t", "down_bias", "up_s"]}.get(settings.get("kind"), []))


@kinds
def test_forward_is_that_of_the_dense_maps(settings):
    adapter, h = build(settings), hidden()
    if adapter.kind == "snnk":
        wanted = h + F.linear(adapter.features(h), adapter.weight("up"), adapter.up_bias)
        assert torch.equal(adapter.weight("down"), adapter.frequencies)
    else:
        inner = F.gelu(F.linear(h, adapter.weight("down"), adapter.down_bias), approximate="tanh")
        wanted = h + F.linear(inner, adapter.weight("up"), adapter.up_bias)
    torch.testing.assert_close(adapter(h), wanted, rtol=1e-4, atol=1e-4)


@kinds
def test_cache_gives_the_same_and_ends_with_training(settings):
    adapter, h = build(settings), hidden()
    wanted = adapter(h)
    adapter.merge_cache_(torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(adapter(h), wanted, rtol=1e-4, atol=1e-4)
    assert adapter(h).requires_grad
    adapter.train()
    assert adapter._dense is None


def test_the_cache_is_used_where_the_input_is():
    adapter, h = build({}), hidden()
    adapter.merge_cache_(torch.float32)
    with torch.no_grad():
        assert adapter.to("meta")(h.to("meta")).device.type == "meta"


def test_cache_ends_with_other_weights():
    adapter, h = build({}), hidden()
    weights = {name: -parameter for name, parameter in adapter.state_dict().items()}
    adapter.merge_cache_(torch.float32)
    adapter.load_state_dict(weights)
    wanted = adapter(h)  # with gradients, which never comes from the cache
    with torch.no_grad():
        assert torch.equal(adapter(h), wanted)


@kinds
def test_parameters_stay_float32_under_a_bfloat16_model(settings):
    adapter, h = build(settings), hidden()
    assert adapter(h.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(adapter(h.bfloat16()).float(), adapter(h), rtol=0.1, atol=0.3)
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert adapter(h).dtype == torch.float32


def test_parameters_are_counted_as_the_paper_does():
    adapter = build({"reduction_factor": 32}, width=768)
    assert sum(p.numel() for p in adapter.parameters()) == 3 * (768 + 24) == 2376


def test_division_must_divide_the_width():
    with pytest.raises(ConfigError, match=r"compacter\.hypercomplex_division must divide the width 32, got 5"):
        build({"hypercomplex_division": 5})


def test_bundling_fits_the_map_up_in_closed_form():
    adapter = build({"kind": "snnk", "reduction_factor": 1}, is_random=False)
    h = torch.randn(500, 32, generator=torch.Generator().manual_seed(2))
    target = h + F.gelu(h @ torch.randn(32, 32, generator=torch.Generator().manual_seed(3)))
    before = (adapter(h) - target).norm()
    adapter.bundle_(h, target)
    assert (adapter(h) - target).norm() < 0.7 * before
    with pytest.raises(ConfigError, match=r"compacter\.kind must be snnk for a closed-form fit, got phm"):
        build({}).bundle_(h, target)


def test_layer_passes_attributes_of_its_base_through():
    layer = CompacterLayer(nn.Linear(4, 8))
    assert layer.weight is layer.base_layer.weight
    assert layer.bias is layer.base_layer.bias
    assert width_of(layer.base_layer) == 8
    assert width_of(nn.GELU()) is None
    assert device_of(nn.GELU()) == torch.device("cpu")
    assert "bottleneck=8" in repr(build({}))
