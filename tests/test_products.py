from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import hf_compact
from hf_compact import capture, products
from hf_compact.calibration import from_batches
from hf_compact.products import fast_products, plain_products
from tests.conftest import tiny_inputs, tiny_model

LAST_DIGIT = 2**-7
PRODUCTS = {
    "linear": lambda a, b: F.linear(a, b.T),
    "linear and bias": lambda a, b: F.linear(a, b.T, b[0]),
    "linear by keyword": lambda a, b: F.linear(input=a, weight=b.T, bias=b[0]),
    "batches": lambda a, b: F.linear(a.unflatten(0, (4, -1)), b.T).flatten(0, 1),
    "addmm": lambda a, b: torch.addmm(b[0], a, b),
    "operator": lambda a, b: a @ b,
    "matmul": lambda a, b: torch.matmul(a, b),
    "baddbmm": lambda a, b: torch.baddbmm(b[0], a[None], b[None])[0],
    "attention by keyword": lambda a, b: F.scaled_dot_product_attention(query=a[None], key=a[None], value=a[None])[0] * b.sum(),
    "mm": lambda a, b: a.mm(b),
    "bmm": lambda a, b: torch.bmm(a[None], b[None])[0],
    "attention": lambda a, b: F.scaled_dot_product_attention(a[None], a[None], value=a[None], is_causal=True)[0] * b.sum(),
}


#: What is left to the CPU's own way: few rows, and shapes that are not those of a Linear.
NATIVE = {
    "few rows": lambda a, b: F.linear(a[:1], b.T),
    "one row": lambda a, b: F.linear(a[0], b.T),
    "one output": lambda a, b: F.linear(a, b[0]),
    "a matrix is added": lambda a, b: torch.addmm(a, a, b),
    "one number is added": lambda a, b: torch.addmm(b[0, :1], a, b),
}


class Seen(TorchDispatchMode):
    """The dtypes that products are computed in."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(word in str(func) for word in ("mm", "mv", "attention", "dot")):
            self.dtypes |= {value.dtype for value in args if isinstance(value, torch.Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.fixture
def is_slow(monkeypatch):
    monkeypatch.setattr(products, "_PIECE", 20)
    monkeypatch.setattr(products, "has_fast_bfloat16", lambda: False)


def factors(dtype):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).bfloat16().to(dtype).requires_grad_() for shape in ((16, 32), (32, 32))]


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_products_are_computed_in_float32(product, is_slow):
    a, b = factors(torch.bfloat16)
    with fast_products(), Seen() as seen:
        product(a, b).sum().backward()
    assert seen.dtypes == {torch.float32}


def test_plain_products_are_left_alone_until_they_end(is_slow):
    a, b = (factor.detach() for factor in factors(torch.bfloat16))
    with fast_products(), Seen() as seen:
        with plain_products():
            a @ b
        assert seen.dtypes == {torch.bfloat16}
        a @ b
    assert seen.dtypes == {torch.bfloat16, torch.float32}


@pytest.mark.parametrize("is_spared", [True, False])
def test_solvers_are_not_looked_at(is_spared, is_slow, monkeypatch):
    called, of = set(), products._Widening.__torch_function__
    monkeypatch.setattr(products._Widening, "__torch_function__", lambda *args: called.add(args[1]) or of(*args))
    if not is_spared:
        monkeypatch.setattr(capture, "plain_products", nullcontext)
    inputs = tiny_inputs("llama")
    recipe = {"stages": [{"method": "codebook", "bits": 3}]}
    hf_compact.compress(tiny_model("llama"), recipe, calibration=from_batches([inputs, inputs]))
    assert F.linear in called
    assert (torch.linalg.cholesky_ex in called) == (not is_spared)


@pytest.mark.parametrize("product", NATIVE.values(), ids=NATIVE)
def test_other_shapes_are_left_alone(product, is_slow):
    a, b = factors(torch.bfloat16)
    with fast_products(), Seen() as seen:
        found = product(a, b)
    assert seen.dtypes == {torch.bfloat16}
    assert torch.equal(found, product(a, b))


def test_a_given_output_is_written(is_slow):
    a, b = (factor.detach() for factor in factors(torch.bfloat16))
    out = torch.zeros_like(a)
    with fast_products():
        torch.mm(a, b, out=out)
    assert torch.equal(out, a @ b)


def test_functional_gradients(is_slow):
    a, b = (factor.detach() for factor in factors(torch.bfloat16))
    with fast_products():
        found = torch.func.grad(lambda x: F.linear(x, b).square().sum())(a)
        each = torch.func.vmap(lambda x: F.linear(x, b))(a.unflatten(0, (2, 8)))
    exact = torch.func.grad(lambda x: F.linear(x, b.float()).square().sum())(a.float())
    torch.testing.assert_close(found.float(), exact, atol=2 * LAST_DIGIT * exact.abs().max().item(), rtol=2 * LAST_DIGIT)
    assert each.shape == (2, 8, 32)


@pytest.mark.parametrize("product", [*PRODUCTS.values(), *NATIVE.values()], ids=[*PRODUCTS, *NATIVE])
def test_values_and_gradients_are_those_of_float32_rounded(product, is_slow):
    found, exact = [], []
    for dtype, results in ((torch.bfloat16, found), (torch.float32, exact)):
        a, b = factors(dtype)
        with fast_products():
            out = product(a, b)
            out.square().sum().backward()
        results += [out, a.grad, b.grad]
    for value, wanted in zip(found, exact, strict=True):
        assert value.dtype == torch.bfloat16
        torch.testing.assert_close(value.float(), wanted, atol=2 * LAST_DIGIT * wanted.abs().max().item(), rtol=2 * LAST_DIGIT)


def test_other_dtypes_are_left_alone(is_slow):
    a, b = factors(torch.float32)
    with fast_products():
        assert torch.equal(a @ b, torch.matmul(a, b))
        with pytest.raises(RuntimeError, match="dtype"):
            F.linear(a, b.bfloat16())


@pytest.mark.parametrize(("is_fast", "num_calls"), [(True, 0), (False, 1)], ids=["hardware", "software"])
def test_only_a_slow_cpu_is_helped(is_fast, num_calls, monkeypatch):
    calls = []
    original = products._linear
    monkeypatch.setattr(products, "has_fast_bfloat16", lambda: is_fast)
    monkeypatch.setattr(products, "_linear", lambda *args: calls.append(args) or original(*args))
    a, b = factors(torch.bfloat16)
    with fast_products():
        F.linear(a, b.T)
    F.linear(a, b.T)
    assert len(calls) == num_calls


def test_what_is_kept_for_the_backward_pass_is_narrow(is_slow):
    a, b = factors(torch.bfloat16)
    with fast_products():
        kept = F.linear(a, b.T).grad_fn.saved_tensors
    assert {tensor.dtype for tensor in kept} == {torch.bfloat16}


def test_a_cpu_with_wide_vectors_is_fast():
    assert products.has_fast_bfloat16() or "AVX512" not in torch.backends.cpu.get_cpu_capability()
