import pytest

from hf_compact import OneBitAdamCallback, OneBitAdamConfig
from hf_compact.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exchange": "two_bit"}, "exchange must be one of one_bit, power_sgd, none, got 'two_bit'"),
        ({"gradients": "fp8"}, "gradients must be one of fp32, fp16, bf16, got 'fp8'"),
        ({"adaptive_bits": 3}, "adaptive_bits must be one of null, 2, 4, 8, got 3"),
        ({"freeze": 0}, "freeze must be"),
        ({"freeze": 2.5}, "freeze must be"),
        ({"freeze": "late"}, "freeze must be .* got 'late'"),
        ({"freeze": float("nan")}, "freeze must be"),
        ({"freeze": True}, "freeze must be .* got True"),
        ({"variance_ratio": "high"}, "variance_ratio must be a number, got 'high'"),
        ({"dense": "lm_head.weight"}, "dense must be a tuple of globs, got 'lm_head.weight'"),
        ({"local_steps": 1.5}, "local_steps must be a whole number of at least 1, got 1.5"),
        ({"variance_ratio": 1.0}, r"variance_ratio must be in \(0, 1\), got 1.0"),
        ({"freeze_floor": 0.4}, "freeze_floor and freeze_ceiling must be in order .* got 0.4 and 0.3"),
        ({"sparse_share": 1.5}, "sparse_share must be in .* got 1.5"),
        ({"min_numel": 0}, "min_numel must be a whole number of at least 1, got 0"),
        ({"replan_every": 0}, "replan_every must be a whole number of at least 1"),
        ({"local_steps": 0}, "local_steps must be a whole number of at least 1"),
        ({"local_steps_double_every": 0}, "local_steps_double_every must be a whole number of at least 1"),
        ({"power_sgd_rank": 0}, "power_sgd_rank must be a whole number of at least 1"),
        ({"check_every": 0}, "check_every must be a whole number of at least 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_values_out_of_range_name_themselves(settings, message):
    with pytest.raises(ConfigError, match=message):
        OneBitAdamConfig(**settings)


@pytest.mark.parametrize("freeze", ["auto", 0.15, 1, 400, 400.0])
def test_every_form_of_freeze_is_taken(freeze):
    assert OneBitAdamConfig(freeze=freeze).freeze == freeze


def test_the_callback_takes_nothing_but_a_config():
    with pytest.raises(ConfigError, match=r"takes an OneBitAdamConfig, got \{'freeze': 8\}"):
        OneBitAdamCallback({"freeze": 8})
