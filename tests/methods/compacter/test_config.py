import pytest
from peft.utils import PeftType

from hf_compact import CompacterConfig
from hf_compact.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "compactor"}, r"compacter.variant must be one of compacter, compacter\+\+, got 'compactor'"),
        ({"kind": "dense"}, "compacter.kind must be one of phm, low_rank, snnk, got 'dense'"),
        ({"feature": "exp"}, "compacter.feature must be one of relu, sincos, got 'exp'"),
        ({"reduction_factor": 0.5}, "compacter.reduction_factor must be at least 1, got 0.5"),
        ({"reduction_factor": float("nan")}, "compacter.reduction_factor must be at least 1, got nan"),
        ({"hypercomplex_division": 0}, "compacter.hypercomplex_division must be at least 1, got 0"),
        ({"slow_std": 0.0}, "compacter.slow_std must be above 0 and finite, got 0.0"),
        ({"slow_std": float("inf")}, "compacter.slow_std must be above 0 and finite, got inf"),
        ({"seed": -1}, "compacter.seed must be at least 0, got -1"),
        ({"rank": 0}, "compacter.rank must be at least 1 or null, got 0"),
        ({"kind": "low_rank", "rank": None}, "compacter.rank must be given for kind low_rank, got null"),
        ({"reduction_factor": "wide"}, "compacter.reduction_factor must be a number, got 'wide'"),
        ({"hypercomplex_division": 2.5}, "compacter.hypercomplex_division must be a whole number, got 2.5"),
        ({"rank": True}, "compacter.rank must be a whole number or null, got True"),
        ({"shared_slow": "false"}, "compacter.shared_slow must be true or false, got 'false'"),
        ({"activation": ["gelu"]}, r"compacter.activation must be a string, got \['gelu'\]"),
        ({"modules_to_save": "lm_head"}, "compacter.modules_to_save must be a list of names, got 'lm_head'"),
        ({"activation": "gelatine"}, "compacter.activation must be a name in transformers' ACT2FN, got 'gelatine'"),
        ({"activation": "prelu"}, "compacter.activation must have no parameters of its own, got 'prelu'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        CompacterConfig(**settings)


def test_a_stored_config_comes_back(tmp_path):
    config = CompacterConfig(variant="compacter++", rank=3, target_modules=["a.b"], task_type="CAUSAL_LM")
    config.save_pretrained(tmp_path)
    again = CompacterConfig.from_pretrained(tmp_path)
    assert again == config
    assert again.peft_type is PeftType.COMPACTER


def test_the_method_is_known_to_peft_like_its_own():
    assert PeftType("COMPACTER") is PeftType["COMPACTER"] is PeftType.COMPACTER
    assert "COMPACTER" in list(PeftType)
    assert PeftType.COMPACTER.name == PeftType.COMPACTER.value == "COMPACTER"
