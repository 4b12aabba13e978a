"""The compressed modules against their dense matrix: same outputs, whatever is cast, moved, copied or differentiated."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from hf_compact.errors import UnsupportedModel
from hf_compact.functional.feedback import num_groups, stored_scale
from hf_compact.functional.packing import packed_row_bytes
from hf_compact.methods.codebook.functional import Quantized, fixed_levels, grid_size, has_offset
from hf_compact.methods.codebook.layer import STORED_LEVELS, CodebookEmbedding, CodebookLinear

#: id -> settings
SETTINGS = {
    "uniform2": {"bits": 2, "grid": "uniform", "group_size": 16, "symmetric": False},
    "uniform3": {"bits": 3, "grid": "uniform", "group_size": 32, "symmetric": False},
    "symmetric4": {"bits": 4, "grid": "uniform", "group_size": None, "symmetric": True},
    "uniform8": {"bits": 8, "grid": "uniform", "group_size": 64, "symmetric": False},
    "nf4": {"bits": 4, "grid": "nf4", "group_size": 16, "symmetric": False},
    "learned2": {"bits": 2, "grid": "learned", "group_size": None, "symmetric": False, "num_codebooks": 3},
    "learned4": {"bits": 4, "grid": "learned", "group_size": 16, "symmetric": True, "num_codebooks": 1},
    "labelled3": {"bits": 3, "grid": "learned", "group_size": 16, "symmetric": False, "num_codebooks": 3, "is_labelled": True},
    "split2": {"bits": 2, "grid": "split", "group_size": 16, "symmetric": False},
    "coded_scale": {"bits": 4, "grid": "uniform", "group_size": 16, "symmetric": False, "scale_bits": 6},
}
ROWS, COLUMNS = 13, 70
settings = pytest.mark.parametrize("spec", SETTINGS.values(), ids=SETTINGS)
floats = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_state(module: nn.Module, spec: dict) -> Quantized:
    """Codes, scales, offsets and levels of the right shapes."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = module.out_features, module.in_features
    groups = num_groups(columns, spec["group_size"])
    size = grid_size(spec["grid"], spec["bits"])
    codes = torch.randint(size, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = stored_scale(torch.rand(rows, groups, generator=generator) * 0.1 + 0.01, spec.get("scale_bits"))
    has_zero = has_offset(spec["grid"], spec["symmetric"])
    zero = torch.randint(2 ** spec["bits"], (rows, groups), generator=generator).float() if has_zero else None
    if spec["grid"] in STORED_LEVELS:
        levels = torch.randn(spec.get("num_codebooks", 1), size, generator=generator).half().float().sort(1).values
    else:
        levels = fixed_levels(spec["grid"], spec["bits"], spec["symmetric"])
    return Quantized(codes, scale, zero, levels)


def make_linear(spec: dict, bias: bool = True, rows: int = ROWS, columns: int = COLUMNS) -> CodebookLinear:
    torch.manual_seed(0)
    module = CodebookLinear.empty_like(nn.Linear(columns, rows, bias=bias), **spec)
    return module.load_quantized_(random_state(module, spec), tables=row_tables(rows, spec))


def row_tables(rows: int, spec: dict) -> torch.Tensor:
    """The table of every row: a run of rows has one, or they alternate."""
    tables = spec.get("num_codebooks", 1)
    return torch.arange(rows) % tables if spec.get("is_labelled") else torch.arange(rows) // -(-rows // tables)


def make_embedding(spec: dict, dtype: torch.dtype = torch.float32) -> CodebookEmbedding:
    module = CodebookEmbedding.empty_like(nn.Embedding(ROWS, COLUMNS, dtype=dtype), **spec)
    return module.load_quantized_(random_state(module, spec), tables=row_tables(ROWS, spec))


def element(quantized: Quantized, row: int, column: int, spec: dict) -> float:
    codes, scale, zero, levels = quantized
    group = 0 if spec["group_size"] is None else column // spec["group_size"]
    table = int(row_tables(len(codes), spec)[row])
    offset = 0.0 if zero is None else zero[row, group].item()
    return scale[row, group].item() * (levels[table, codes[row, column].item()].item() - offset)


# The dense matrix.


@settings
def test_to_dense_is_what_was_loaded(spec):
    module = make_linear(spec)
    quantized = random_state(module, spec)
    dense = module.to_dense()
    expected = torch.tensor([[element(quantized, r, c, spec) for c in range(COLUMNS)] for r in range(ROWS)])
    torch.testing.assert_close(dense, expected)


@settings
@pytest.mark.parametrize("rows", [[4], [12, 0, 5, 5], list(range(ROWS)), []], ids=["one", "some", "all", "none"])
def test_rows_alone(spec, rows):
    module = make_linear(spec)
    rows = torch.tensor(rows, dtype=torch.int64)
    assert torch.equal(module.to_dense(rows=rows), module.to_dense()[rows])


@settings
@floats
def test_dense_in_another_dtype_is_near(spec, dtype):
    module = make_linear(spec)
    dense = module.to_dense(dtype)
    assert dense.dtype == dtype
    largest = module.to_dense().abs().amax()
    torch.testing.assert_close(dense.float(), module.to_dense(), rtol=0, atol=(4 * torch.finfo(dtype).eps * largest).item())


# State.


@pytest.mark.parametrize(("bits", "columns"), list(itertools.product([2, 3, 4, 8], [1, 8, 64, 70])), ids=str)
def test_weight_never_has_the_dense_shape(bits, columns):
    for rows in (1, 8, 64):
        spec = {"bits": bits, "grid": "uniform", "group_size": None, "symmetric": False}
        linear, embedding = nn.Linear(columns, rows), nn.Embedding(rows, columns)
        for old, cls in ((linear, CodebookLinear), (embedding, CodebookEmbedding)):
            new = cls.empty_like(old, **spec)
            assert new.weight.shape == (rows, 1, packed_row_bytes(columns, bits))
            assert new.weight.shape != old.weight.shape


@settings
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_empty_like_on_meta(spec, bias):
    linear = nn.Linear(COLUMNS, ROWS, bias=bias, device="meta")
    empty = CodebookLinear.empty_like(linear, **spec)
    real = make_linear(spec, bias)
    assert empty.bias is linear.bias
    assert all(buffer.is_meta for buffer in empty.buffers())
    assert {n: (t.shape, t.dtype) for n, t in empty.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in real.state_dict().items()
    }
    assert empty(torch.zeros(2, COLUMNS, device="meta")).shape == (2, ROWS)
    empty.load_state_dict(real.state_dict(), assign=True)
    assert torch.equal(empty.to_dense(), real.to_dense())


@settings
def test_embedding_empty_like_on_meta(spec):
    empty = CodebookEmbedding.empty_like(nn.Embedding(ROWS, COLUMNS, device="meta", dtype=torch.bfloat16), **spec)
    assert all(buffer.is_meta for buffer in empty.buffers())
    assert empty.dtype == torch.bfloat16
    assert empty.spec() == make_embedding(spec).spec()


@settings
def test_spec_rebuilds_the_module(spec):
    module = make_linear(spec)
    again = CodebookLinear.empty_like(nn.Linear(COLUMNS, ROWS), **module.spec())
    again.load_state_dict(module.state_dict())
    assert torch.equal(again.to_dense(), module.to_dense())
    assert again.spec() == module.spec()
    assert module.spec() == {"scale_bits": None, "num_codebooks": 1, "is_labelled": False, **spec}
    assert f"bits={spec['bits']}" in repr(module)


@settings
@pytest.mark.parametrize("cast", ["bfloat16", "half", "float", "double"])
def test_casts_leave_the_stored_state_alone(spec, cast):
    model = nn.Sequential(make_linear(spec), make_embedding(spec))
    before = {name: (buffer.dtype, buffer.clone()) for name, buffer in model.named_buffers()}
    getattr(model, cast)()
    for name, buffer in model.named_buffers():
        dtype, values = before[name]
        assert buffer.dtype == dtype
        assert torch.equal(buffer, values)
    dtype = {"half": torch.float16, "float": torch.float32, "double": torch.float64}.get(cast, torch.bfloat16)
    assert model[0].bias.dtype == dtype
    assert model[1](torch.tensor([0])).dtype == dtype


@settings
def test_to_meta_and_empty_again(spec):
    model = nn.Sequential(make_linear(spec), make_embedding(spec))
    before = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
    model.to("meta")
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()} == before
    model.to_empty(device="cpu")
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()} == before
    assert not any(tensor.is_meta for tensor in model.state_dict().values())


def test_a_cast_keeps_the_parameter_that_an_optimizer_holds():
    module = make_linear(SETTINGS["nf4"])
    bias = module.bias
    bias.grad = torch.ones(ROWS)
    module.double()
    assert module.bias is bias
    assert bias.dtype == bias.grad.dtype == torch.float64


def test_a_cast_reaches_modules_that_were_added():
    module = make_linear(SETTINGS["nf4"])
    module.adapter = nn.Linear(2, 2)
    assert module.to(torch.bfloat16).adapter.weight.dtype == torch.bfloat16


@settings
def test_copies_are_independent(spec):
    module = make_linear(spec)
    other = copy.deepcopy(module)
    assert torch.equal(other.to_dense(), module.to_dense())
    other.weight.zero_()
    assert module.weight.any()
    assert module.state_dict().keys() == other.state_dict().keys()


# Linear.


@settings
@floats
@pytest.mark.parametrize("shape", [(COLUMNS,), (5, COLUMNS), (2, 3, COLUMNS), (0, COLUMNS)], ids=str)
def test_forward_is_the_dense_linear(spec, dtype, shape):
    module = make_linear(spec).to(dtype)
    x = normal(*shape).to(dtype)
    y = module(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, F.linear(x, module.to_dense(dtype), module.bias), rtol=0, atol=0)


@pytest.mark.parametrize(("rows", "columns"), [(1, COLUMNS), (ROWS, 1), (1, 1)], ids=str)
def test_single_row_and_single_input(rows, columns):
    module = make_linear(SETTINGS["uniform3"], rows=rows, columns=columns)
    x = normal(4, columns)
    torch.testing.assert_close(module(x), F.linear(x, module.to_dense(), module.bias))


@settings
def test_gradient_flows_to_the_input_and_the_bias(spec):
    module = make_linear(spec)
    x = normal(3, COLUMNS).requires_grad_()
    module(x).square().sum().backward()
    upstream = 2 * F.linear(x, module.to_dense(), module.bias).detach()
    torch.testing.assert_close(x.grad, upstream @ module.to_dense())
    torch.testing.assert_close(module.bias.grad, upstream.sum(0))
    assert not any(buffer.requires_grad for buffer in module.buffers())


@settings
def test_autocast(spec):
    module = make_linear(spec)
    x = normal(3, COLUMNS)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
        expected = F.linear(x, module.to_dense(), module.bias)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=5e-2, atol=5e-2)


def test_input_of_whole_numbers():
    with pytest.raises(
        UnsupportedModel, match=r"input of a compressed layer must be floating point, got torch.int8: exclude the layer"
    ):
        make_linear(SETTINGS["nf4"])(torch.zeros(2, COLUMNS, dtype=torch.int8))


@settings
@floats
def test_dense_linear(spec, dtype):
    module = make_linear(spec)
    dense = module.dense_module(dtype)
    assert type(dense) is nn.Linear
    assert torch.equal(dense.weight, module.to_dense(dtype))
    assert dense.bias is module.bias
    assert (dense.in_features, dense.out_features) == (COLUMNS, ROWS)


# Embedding.


@settings
@floats
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (1, 0)], ids=str)
def test_embedding_is_the_dense_lookup(spec, dtype, shape):
    module = make_embedding(spec, dtype)
    ids = torch.randint(ROWS, shape, generator=torch.Generator().manual_seed(0))
    rows = module(ids)
    assert rows.dtype == dtype
    assert torch.equal(rows, F.embedding(ids, module.to_dense(dtype)))
    assert torch.equal(rows, module.dense_module(dtype)(ids))


@floats
def test_scaled_embedding_of_gemma(dtype):
    spec = SETTINGS["uniform8"]
    dense = Gemma3TextScaledWordEmbedding(ROWS, COLUMNS, padding_idx=0, embed_scale=COLUMNS**0.5)
    module = CodebookEmbedding.empty_like(dense, **spec)
    module.load_quantized_(random_state(module, spec))
    module, dense = module.to(dtype), dense.to(dtype)
    dense.weight = nn.Parameter(module.to_dense(dtype))
    ids = torch.arange(ROWS)
    assert module(ids).dtype == dtype
    assert torch.equal(module(ids), dense(ids))
