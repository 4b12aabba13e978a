"""The low-rank correction: its optimum, its round trip, its limits."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import hf_compact
from hf_compact.calibration import from_batches
from hf_compact.errors import ConfigError, NumericalError
from hf_compact.functional.gram import output_energy
from hf_compact.methods.codebook.apply import compress_linear as compress_codebook
from hf_compact.methods.codebook.config import CodebookConfig
from hf_compact.methods.correction import CorrectedLinear, CorrectionConfig
from hf_compact.methods.correction.apply import compress_linear, finish
from tests.conftest import tiny_inputs, tiny_model

CODEBOOK = {"method": "codebook", "bits": 2, "group_size": 16, "refit_rounds": 0, "shrink_steps": 2}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gram_of(size: int) -> torch.Tensor:
    x = normal(512, size, seed=1) @ normal(size, size, seed=2)
    return (x.T @ x).double()


def corrected(rank: int, gram: torch.Tensor | None) -> tuple[CorrectedLinear, nn.Linear]:
    linear = nn.Linear(32, 48)
    linear.weight.data = normal(48, 32)
    config = CorrectionConfig(rank=rank, damp=0.0)
    module = compress_linear(linear, None, config)
    module.base = compress_codebook(module.base, None, CodebookConfig(bits=2, rounding="nearest"))
    finish(module, linear, gram, config)
    return module, linear


def test_operations_are_those_of_the_base_and_of_the_product():
    module, _ = corrected(4, None)
    assert module.num_multiply_adds == 32 * 48 + 4 * (32 + 48)
    model = tiny_model("llama")
    report = hf_compact.compress(
        model, {"stages": [{"method": "correction", "rank": 4}, CODEBOOK]}, calibration=from_batches([tiny_inputs("llama")])
    )
    found = {layer.name: layer.operations_ratio for layer in report.layers if layer.operations_ratio is not None}
    assert found["model.layers.0.mlp.up_proj"] == pytest.approx(1 + 4 * (32 + 72) / (32 * 72))


@pytest.mark.parametrize("settings", [{"rank": 0}, {"damp": 2.0}], ids=str)
def test_bad_settings_name_themselves(settings):
    with pytest.raises(ConfigError, match=f"correction.{next(iter(settings))} must be"):
        CorrectionConfig(**settings)


def test_it_takes_the_largest_part_of_the_error_away():
    """What is left of the outputs' error is exactly the cut singular values of E L."""
    gram = gram_of(32)
    bare, linear = corrected(1, gram)
    error = linear.weight.detach().double() - bare.base_dense(torch.float64)
    values = torch.linalg.svdvals(error @ torch.linalg.cholesky(gram)).square()
    for rank in (1, 4, 16):
        module, _ = corrected(rank, gram)
        left = output_energy(linear.weight.detach() - module.to_dense(), gram)
        assert left == pytest.approx(values[rank:].sum().item(), rel=1e-3)


def test_forward_is_the_matrix_and_the_bias():
    module, linear = corrected(4, gram_of(32))
    x = normal(3, 5, 32)
    torch.testing.assert_close(module(x), x @ module.to_dense().T + linear.bias, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module.dense_module(torch.float32)(x), module(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module.to_dense(rows=torch.tensor([2])), module.to_dense()[2:3])


def test_before_the_base_is_compressed_nothing_changes():
    linear = nn.Linear(32, 48)
    x = normal(3, 32)
    torch.testing.assert_close(compress_linear(linear, None, CorrectionConfig())(x), linear(x))


def test_a_matrix_too_thin_for_a_correction_is_left_alone():
    linear = nn.Linear(1, 48)
    assert compress_linear(linear, None, CorrectionConfig()) is linear
    assert compress_linear(nn.Linear(8, 6), None, CorrectionConfig(rank=32)).rank == 3


def test_a_gram_matrix_with_a_hole_is_refused():
    with pytest.raises(NumericalError, match="not finite"):
        corrected(2, torch.full((32, 32), float("nan")))


@pytest.mark.parametrize(
    ("stages", "match"),
    [
        ([{"method": "correction"}], r"stages\[0\] corrects model.layers.0.mlp.down_proj, which no later stage compresses"),
        (
            [{"method": "correction"}, CODEBOOK | {"exclude": ["*.q_proj"]}],
            r"stages\[0\] corrects model.layers.0.self_attn.q_proj, which no",
        ),
        (
            [{"method": "tensor_network", "allocation": "uniform"}, {"method": "correction"}, CODEBOOK],
            r"stages\[2\] selects .* which two earlier stages take apart",
        ),
        ([{"method": "correction"}, {"method": "correction"}, CODEBOOK], r"stages\[2\] selects .* which two earlier"),
    ],
    ids=["alone", "partly alone", "in a core", "twice"],
)
def test_a_correction_that_would_correct_nothing_is_refused(stages, match, dense_folder, tmp_path):
    with pytest.raises(ConfigError, match=match):
        hf_compact.compress(tiny_model("llama"), {"stages": stages}, calibration=from_batches([tiny_inputs("llama")]))
    with pytest.raises(ConfigError, match=match):
        hf_compact.compress(dense_folder, {"stages": stages}, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=match):
        hf_compact.plan(dense_folder, {"stages": stages})


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_corrected_model_is_better_and_comes_back_equal(family, tmp_path):
    reports = []
    for stages in ([CODEBOOK], [{"method": "correction", "rank": 8}, CODEBOOK]):
        model = tiny_model(family)
        batches = from_batches([tiny_inputs(family, seed=seed) for seed in (1, 2)])
        reports.append(hf_compact.compress(model, {"stages": stages}, calibration=batches))
    bare, better = ({layer.name: layer for layer in report.body} for report in reports)
    assert {layer.method for layer in better.values()} == {"correction+codebook"}
    assert sum(layer.relative_error for layer in better.values()) < 0.8 * sum(layer.relative_error for layer in bare.values())
    assert reports[1].body_bits_per_weight > reports[0].body_bits_per_weight
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(**tiny_inputs(family)).logits, again(**tiny_inputs(family)).logits)
        logits = again(**tiny_inputs(family)).logits
        torch.testing.assert_close(again.dequantize()(**tiny_inputs(family)).logits, logits, rtol=1e-3, atol=1e-3)
