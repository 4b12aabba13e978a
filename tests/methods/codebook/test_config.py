"""Settings of codebook quantization: every value that is not allowed is refused with its name, its value and the rule."""

import dataclasses
import itertools

import pytest

from hf_compact import CodebookConfig, Recipe
from hf_compact.errors import ConfigError

#: id -> (settings, message)
REFUSED = {
    "bits": ({"bits": 5}, "codebook.bits must be one of 2, 3, 4, 8, got 5"),
    "bits_as_text": ({"bits": "4"}, "codebook.bits must be one of 2, 3, 4, 8, got 4"),
    "grid": ({"grid": "log"}, "codebook.grid must be one of uniform, nf4, learned, power, pot, split, got log"),
    "rounding": ({"rounding": "up"}, "codebook.rounding must be one of gptq, nearest, got up"),
    "embedding_bits": ({"embedding_bits": 2}, "codebook.embedding_bits must be one of 4, 8, null, got 2"),
    "shrink_steps": ({"shrink_steps": 0}, "codebook.shrink_steps must be at least 1, got 0"),
    "refit_rounds": ({"refit_rounds": -1}, "codebook.refit_rounds must be at least 0, got -1"),
    "rows_per_codebook": ({"rows_per_codebook": 0}, "codebook.rows_per_codebook must be at least 1, got 0"),
    "damp": ({"damp": -0.1}, r"codebook.damp must be in \[0, 1\], got -0.1"),
    "damp_of_nothing": ({"damp": float("nan")}, r"codebook.damp must be in \[0, 1\], got nan"),
    "group_size": ({"group_size": 4}, "codebook.group_size must be null or at least 8, got 4"),
    "scale_bits_low": ({"scale_bits": 1}, r"codebook.scale_bits must be null or in \[2, 8\], got 1"),
    "scale_bits_high": ({"scale_bits": 9}, r"codebook.scale_bits must be null or in \[2, 8\], got 9"),
    "embedding_group_size": ({"embedding_group_size": 0}, "codebook.embedding_group_size must be null or at least 8, got 0"),
    "nf4_with_three_bits": ({"grid": "nf4", "bits": 3}, "codebook.grid nf4 has 16 levels, so codebook.bits must be 4, got 3"),
    "symmetric_nf4": (
        {"grid": "nf4", "symmetric": True},
        "codebook.symmetric belongs to the uniform and the learned grid, got grid nf4",
    ),
    "pot_with_four_bits": ({"grid": "pot", "bits": 4}, "codebook.grid pot is for 2 and 3 bits, got 4"),
    "split_eight": ({"grid": "split", "bits": 8}, "codebook.grid split is for 2, 3 and 4 bits, got 8"),
    "learned_eight": ({"grid": "learned", "bits": 8}, "codebook.grid learned is for 2, 3 and 4 bits, got 8"),
    "row_order": ({"row_order": "random"}, "codebook.row_order must be one of given, similar, got random"),
    "row_order_uniform": ({"row_order": "similar"}, "codebook.row_order similar belongs to the learned grid, got grid uniform"),
    "learning": ({"learning": "hard"}, "codebook.learning must be one of none, proximal, soft, got hard"),
    "learning_steps": ({"learning_steps": 0}, "codebook.learning_steps must be at least 1, got 0"),
    "learning_from_nearest": (
        {"learning": "soft", "rounding": "nearest"},
        "codebook.learning soft starts from error feedback, got rounding nearest",
    ),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        CodebookConfig(**settings)


@pytest.mark.parametrize(("grid", "bits"), [*itertools.product(["uniform", "learned"], [2, 3, 4]), ("uniform", 8)], ids=str)
@pytest.mark.parametrize("group_size", [None, 8, 64])
def test_allowed_combinations(bits, grid, group_size):
    config = CodebookConfig(bits=bits, grid=grid, group_size=group_size)
    assert (config.bits, config.grid, config.group_size) == (bits, grid, group_size)


def test_only_error_feedback_needs_calibration():
    assert CodebookConfig().needs_calibration
    assert not CodebookConfig(rounding="nearest").needs_calibration


def test_round_trip_keeps_every_field():
    config = CodebookConfig(
        include=("*.mlp.*",), exclude=("*.0.*", "*.1.*"), bits=3, grid="learned", group_size=None, rows_per_codebook=7,
        symmetric=True, row_order="similar", learning="proximal", learning_steps=7, damp=0.5, act_order=False, shrink_steps=3, refit_rounds=0, embedding_bits=None,
        embedding_group_size=16, scale_bits=6,
    )  # fmt: skip
    changed = [f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(CodebookConfig(), f.name)]
    assert sorted(changed) == sorted(f.name for f in dataclasses.fields(config) if f.name != "rounding")
    assert Recipe.from_dict({"stages": [config.to_dict()]}).stages == (config,)


def test_frozen_and_by_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'bits'"):
        CodebookConfig().bits = 3
    with pytest.raises(TypeError, match="takes 1 positional argument but 2 were given"):
        CodebookConfig(4)
