"""Jointly learned codes never lose against their start, and rows that share a table may lie apart."""

import pytest
import torch
from torch import nn

import hf_compact
from hf_compact import CodebookConfig, api
from hf_compact.arch import describe
from hf_compact.calibration import from_batches
from hf_compact.functional.gram import output_energy
from hf_compact.methods import METHODS
from hf_compact.methods.codebook.apply import compress_linear, quantize
from hf_compact.methods.codebook.functional import dequantize
from hf_compact.methods.codebook.joint import learn_codes, similarity
from hf_compact.planner import Programme, find_items
from tests.conftest import tiny_inputs, tiny_model
from tests.methods.codebook.test_apply import correlated_gram, normal

START = {"bits": 3, "grid": "learned", "group_size": 16, "rows_per_codebook": 8}
variants = pytest.mark.parametrize("variant", ["proximal", "soft"])


def start(rows: int = 24, columns: int = 64, refit_rounds: int = 2):
    weight, gram = normal(rows, columns), correlated_gram(columns)
    gram += 0.05 * gram.diagonal().mean() * torch.eye(columns)
    return weight, gram.float(), quantize(weight, gram, CodebookConfig(refit_rounds=refit_rounds, **START))


def errors(weight, found, gram) -> torch.Tensor:
    difference = dequantize(found, 16) - weight
    return ((difference @ gram) * difference).sum(1)


@variants
@pytest.mark.parametrize("refit_rounds", [0, 2])
def test_no_row_gets_worse(variant, refit_rounds):
    weight, gram, found = start(refit_rounds=refit_rounds)
    learned = learn_codes(weight, found, 16, gram, 60, variant)
    before, after = errors(weight, found, gram), errors(weight, learned, gram)
    assert (after <= before).all()
    assert refit_rounds or (after < before).any()  # sweeps may have left nothing to find
    for name in ("scale", "zero", "levels"):
        assert torch.equal(getattr(learned, name), getattr(found, name))


@variants
def test_codes_stay_on_the_tables(variant):
    weight, gram, found = start()
    codes = learn_codes(weight, found, 16, gram, 30, variant).codes
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < 8


def test_soft_codes_move_to_neighbours_only():
    weight, gram, found = start(refit_rounds=0)
    moved = learn_codes(weight, found, 16, gram, 60, "soft").codes.int() - found.codes.int()
    assert moved.abs().max() == 1


@variants
def test_inputs_are_unchanged(variant):
    weight, gram, found = start()
    before = [tensor.clone() for tensor in (weight, gram, *found)]
    learn_codes(weight, found, 16, gram, 5, variant)
    assert all(torch.equal(a, b) for a, b in zip(before, (weight, gram, *found), strict=True))


def test_a_solution_without_error_stays():
    _, gram, found = start()
    exact = dequantize(found, 16)
    assert torch.equal(learn_codes(exact, found, 16, gram, 20, "soft").codes, found.codes)


def test_similarity_parts_two_kinds_of_rows():
    kinds = torch.arange(40) % 2
    rows = normal(40, 256)
    rows = torch.where(kinds[:, None] == 0, rows, rows.pow(3))
    order = similarity(rows).argsort()
    assert kinds[order][:20].unique().numel() == 1


def test_similar_rows_share_a_table_and_the_output_keeps_its_order():
    linear = nn.Linear(64, 40, bias=False)
    with torch.no_grad():
        rows = normal(40, 64)
        linear.weight.copy_(torch.where(torch.arange(40)[:, None] % 2 == 0, rows, rows.sign() * rows.abs().sqrt()))
    weight = linear.weight.detach()
    settings = {"bits": 2, "grid": "learned", "group_size": None, "rows_per_codebook": 20, "rounding": "nearest"}
    lost = {}
    for order in ("given", "similar"):
        module = compress_linear(linear, None, CodebookConfig(row_order=order, **settings))
        lost[order] = output_energy(weight - module.to_dense())
        assert torch.equal(module.to_dense(rows=torch.tensor([7, 3])), module.to_dense()[[7, 3]])
    assert module.row_table.unique().tolist() == [0, 1]
    assert lost["similar"] < lost["given"]
    arranged = compress_linear(linear, None, CodebookConfig(row_order="similar", **settings), is_arranged=True)
    assert not arranged.is_labelled


def test_a_model_is_arranged_and_labelled(tmp_path):
    recipe = {"stages": [{"method": "codebook", "row_order": "similar", "learning": "soft", "learning_steps": 3, **START}]}
    model = tiny_model("llama")
    hf_compact.compress(model, recipe, calibration=from_batches([tiny_inputs("llama")]))
    block = model.model.layers[1]
    assert not block.mlp.up_proj.is_labelled
    assert not block.self_attn.v_proj.is_labelled
    assert block.self_attn.q_proj.is_labelled
    with torch.no_grad():
        expected = model(**tiny_inputs("llama"))[0]
    model.save_pretrained(tmp_path / "small")
    again = type(model).from_pretrained(tmp_path / "small")
    with torch.no_grad():
        torch.testing.assert_close(again(**tiny_inputs("llama"))[0], expected, rtol=0, atol=0)


SIMILAR = {"method": "codebook", "row_order": "similar", "rounding": "nearest", **START}
UNIFORM = {"method": "codebook", "rounding": "nearest", "shrink_steps": 2, "include": ["*.down_proj", "*.q_proj"]}


@pytest.mark.parametrize(
    ("family", "stages"),
    [
        ("llama", [SIMILAR]),
        ("gpt2", [SIMILAR]),
        ("opt", [SIMILAR]),
        ("llama", [UNIFORM, {**SIMILAR, "exclude": UNIFORM["include"]}]),
        ("llama", [{"method": "correction", "rank": 2}, SIMILAR]),
        ("llama", [{"method": "pruning", "channel_sparsity": 0.25}, SIMILAR]),
    ],
    ids=["llama", "gpt2", "opt", "after others", "corrected", "pruned"],
)
def test_a_forecast_knows_which_rows_are_put_in_order(family, stages, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    planned = hf_compact.plan(tmp_path, {"stages": stages})
    report = hf_compact.compress(model, {"stages": stages}, calibration=from_batches([tiny_inputs(family)]))
    made = {layer.name: layer.compressed_bytes for layer in report.layers}
    assert {layer["name"]: layer["compressed_bytes"] for layer in planned["layers"]} == made
    labelled = [name for name in made if getattr(model.get_submodule(name), "is_labelled", False)]
    assert not any(name.endswith(("up_proj", "gate_proj", "v_proj", "c_fc", "fc1")) for name in labelled)


ON_VALUES = {"method": "codebook", "grid": "learned", "bits": 4, "include": ["*v_proj"], "embedding_bits": None}
FACTORED = {"method": "tensor_network", "include": ["*gate_proj"], "keep_ratio": 0.6}
REGRESSION = {"solver": "regression", "allocation": "uniform", "include": ["*down_proj"], "keep_ratio": 0.9}


@pytest.mark.parametrize(
    "other",
    [{"method": "entropy", "bits": 2.0, "include": ["*gate_proj"], "embedding_bits": None}, FACTORED, FACTORED | REGRESSION],
    ids=["entropy", "fisher", "regression"],
)
def test_rows_stay_where_another_stage_has_measured_the_dense_model(other):
    """Its steps and metrics are in the order of the dense rows."""
    errors, inputs = {}, tiny_inputs("llama")
    for order in ("given", "similar"):
        model = tiny_model("llama")
        with torch.no_grad():
            for layer in model.model.layers:  # channels that matter unequally, as in trained models
                layer.mlp.down_proj.weight.mul_(torch.exp(1.5 * torch.randn(72, generator=torch.Generator().manual_seed(1))))
            target = model(**inputs).logits
            hf_compact.compress(
                model, {"stages": [other, ON_VALUES | {"row_order": order}]},
                calibration=from_batches([tiny_inputs("llama", seed=seed) for seed in range(4)]),
            )  # fmt: skip
            errors[order] = ((model(**inputs).logits - target).square().mean() / target.square().mean()).item()
    assert errors["similar"] < 1.2 * errors["given"]


def test_the_planner_counts_tables_of_rows_that_stay():
    model = tiny_model("llama")
    arch = describe(model)
    stages = [(METHODS["codebook"], CodebookConfig(row_order="similar", rounding="nearest", **START))]
    programme = Programme(model, arch, find_items(model, arch, stages))
    table = [0] * len(programme.items)
    batches = from_batches([tiny_inputs("llama")])
    found = api._measured_point(api._compressed_copy(model, arch, stages, batches), model, arch, batches.batches)
    assert programme.point(table).body_bits == pytest.approx(found.body_bits, rel=1e-6)
