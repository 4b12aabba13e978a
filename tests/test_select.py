"""Selection by whole names, and replacement that keeps what is shared shared."""

import pytest
from torch import nn

from hf_compact import CodebookConfig, PruningConfig, TensorNetworkConfig
from hf_compact.errors import ConfigError, NothingMatched
from hf_compact.methods.correction.config import CorrectionConfig
from hf_compact.methods.entropy.config import EntropyConfig
from hf_compact.select import glob_matches, replace_modules, select_names, select_stages

NAMES = ["layers.1.q", "layers.1.k", "layers.11.q", "layers.11.mlp.up", "head"]


class Twice(nn.Module):
    """One Linear under two names, and one of its own."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.inner = nn.ModuleDict({"again": self.first, "own": nn.Linear(2, 2)})


@pytest.mark.parametrize(
    ("name", "glob", "matches"),
    [
        ("layers.1.q", "layers.1.*", True),
        ("layers.11.q", "layers.1.*", False),
        ("layers.11.q", "layers.1?.q", True),
        ("layers.1.q", "layers.1", False),
        ("layers.1.q", "q", False),
        ("layers.1.q", "*.q", True),
        ("layers.1.q", "*", True),
        ("layers.1.q", "layers.1.q", True),
        ("layersx1xq", "layers.1.q", False),
        ("a[0]+b", "a[0]+b", True),
        ("a0b", "a[0]b", False),
        ("", "*", True),
    ],
)
def test_globs_match_whole_names(name, glob, matches):
    assert glob_matches(name, glob) == matches


@pytest.mark.parametrize(
    ("include", "exclude", "chosen"),
    [
        (["*"], [], NAMES),
        (["layers.1.*"], [], NAMES[:2]),
        (["head", "*.q"], [], ["layers.1.q", "layers.11.q", "head"]),
        (["*"], ["*.q", "head"], ["layers.1.k", "layers.11.mlp.up"]),
        (["*.q"], ["layers.1.*"], ["layers.11.q"]),
    ],
    ids=str,
)
def test_selection_keeps_the_order(include, exclude, chosen):
    assert select_names(NAMES, include, exclude) == chosen
    assert select_names(iter(NAMES), include, exclude) == chosen


def test_include_that_matches_nothing():
    message = r"include glob '\*.v' matches none of 5 modules \(layers.1.q, layers.1.k, layers.11.q, …\)"
    with pytest.raises(NothingMatched, match=message):
        select_names(NAMES, ["*.q", "*.v"])


def test_exclude_that_matches_nothing():
    with pytest.raises(NothingMatched, match=r"exclude glob 'tail' matches none of 2 modules \(a, b\)"):
        select_names(["a", "b"], ["*"], ["tail"])


def test_nothing_is_left():
    with pytest.raises(NothingMatched, match=r"include \['\*.q'\] without exclude \['layers.\*'\] leaves none of 5 modules"):
        select_names(NAMES, ["*.q"], ["layers.*"])


def test_a_stage_for_the_embedding_only():
    assert select_stages(NAMES, [CodebookConfig(include=()), CodebookConfig()]) == [set(), set(NAMES)]


def test_nothing_is_included():
    with pytest.raises(NothingMatched, match=r"include \[\] without exclude \[\] leaves none of 5 modules"):
        select_names(NAMES, [])


def test_no_modules_at_all():
    with pytest.raises(NothingMatched, match=r"include glob '\*' matches none of 0 modules"):
        select_names([])


def test_stages_share_the_modules_out():
    stages = [CodebookConfig(include=("*.q",)), CodebookConfig(bits=3, exclude=("*.q",))]
    assert select_stages(NAMES, stages) == [{"layers.1.q", "layers.11.q"}, {"layers.1.k", "layers.11.mlp.up", "head"}]


def test_two_stages_on_one_module_are_refused():
    stages = [CodebookConfig(), CodebookConfig(bits=3, include=("*.mlp.*",))]
    with pytest.raises(ConfigError, match=r"recipe.stages\[1\] selects layers.11.mlp.up, which an earlier stage compresses"):
        select_stages(NAMES, stages)


@pytest.mark.parametrize("first", [PruningConfig, TensorNetworkConfig, CorrectionConfig])
def test_bits_are_not_dealt_out_over_what_will_be_another_linear(first):
    with pytest.raises(ConfigError, match=r"recipe.stages\[1\] deals out its bits by what .*, in which head is not yet what"):
        select_stages(NAMES, [first(include=("*.q", "head")), EntropyConfig(exclude=("*.q",))])
    stages = [first(include=("*.q",)), EntropyConfig(exclude=("*.q",))]
    assert select_stages(NAMES, stages)[1] == {"layers.1.k", "layers.11.mlp.up", "head"}
    equal = EntropyConfig(sensitivity="none")
    assert select_stages(NAMES, [first(), equal]) == [set(NAMES), set(NAMES)]


@pytest.mark.parametrize("names", [["first"], ["inner.again"], ["first", "inner.again"]], ids=str)
def test_shared_module_is_built_once_and_stays_shared(names):
    model, calls = Twice(), []
    old, own = model.first, model.inner["own"]

    def build(name, module):
        assert module is old
        calls.append(name)
        return nn.Identity()

    replaced = replace_modules(model, names, build)
    assert calls == names[:1]
    assert replaced.keys() == {"first", "inner.again"}
    assert model.first is model.inner["again"] is replaced["first"]
    assert isinstance(model.first, nn.Identity)
    assert model.inner["own"] is own


def test_replace_leaves_the_rest():
    model = Twice()
    replaced = replace_modules(model, ["inner.own"], lambda name, module: nn.Linear(2, 3))
    assert list(replaced) == ["inner.own"]
    assert model.inner["own"].out_features == 3
    assert model.first is model.inner["again"]
