"""The planner: its table of errors, what it makes of a budget, and the file that its recipe really gives."""

import errno
import json
import math
import os
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from safetensors.torch import save_file
from typer.testing import CliRunner

import hf_compact
from hf_compact import api, cli, distributed, measurement
from hf_compact.arch import describe
from hf_compact.calibration import builtin_text, from_batches
from hf_compact.checkpoint import SHARD_BYTES, header_bytes
from hf_compact.config import Recipe
from hf_compact.distillation import divergence
from hf_compact.errors import ConfigError, NumericalError, OutputError, UnsupportedModel
from hf_compact.functional.histogram import histogram_divergence
from hf_compact.measurement import ErrorTable, measure, propose
from hf_compact.methods import METHODS
from hf_compact.planner import (
    BudgetPlan,
    Point,
    Programme,
    Target,
    compact_globs,
    files_bytes,
    find_items,
    kept_tensors,
    parse_increase,
    parse_size,
)
from hf_compact.select import select_names, select_stages
from tests.conftest import tiny_inputs, tiny_model, train_tokenizer

FAST = {"method": "codebook", "shrink_steps": 2, "refit_rounds": 0, "damp": 0.05}
CANDIDATES = {
    "stages": [
        {**FAST, "bits": 2, "group_size": 32, "embedding_bits": 4, "embedding_group_size": 32},
        {**FAST, "bits": 3, "group_size": 32},
        {**FAST, "bits": 4, "group_size": 32},
        {**FAST, "bits": 8, "group_size": None},
    ],
    "calibration": {"num_sequences": 8, "sequence_length": 32, "batch_size": 2},
}
RATES = {
    "stages": [{"method": "entropy", "bits": bits, "embedding_bits": more} for bits, more in ((3.0, 4.0), (6.0, 6.0))],
    "calibration": CANDIDATES["calibration"],
}


def pairs(stages):
    return [(METHODS[stage.method], stage) for stage in Recipe.from_dict({"stages": stages}).stages]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama with enough Linears for half a per cent to mean something."""
    folder = tmp_path_factory.mktemp("planner") / "dense"
    tiny_model("llama", hidden_size=64, intermediate_size=160, num_hidden_layers=4).save_pretrained(folder)
    train_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(builtin_text("calibration")[:40_000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def planned(folder, text, tmp_path_factory):
    """Plans by any target from one measurement."""
    cache = tmp_path_factory.mktemp("cache") / "errors.json"

    def plan(**options):
        settings = {"candidates": CANDIDATES, "calibration": [text], "cache": cache, "num_tokens": 128}
        return hf_compact.plan_budget(folder, **{**settings, **options})

    plan.cache = cache
    return plan


# Sizes.


@pytest.mark.parametrize(
    ("text", "size"),
    [("40MB", 40_000_000), ("38e6", 38_000_000), ("37.7 MB", 37_700_000), ("1KiB", 1024), ("2 kB", 2000), ("1.5GB", 1_500_000_000),
     ("123", 123), (4.5e6, 4_500_000), ("7B", 7), ("0.5GB", 500_000_000), ("0.5 KiB", 512)],
)  # fmt: skip
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "40 bananas", "-3MB", "4,5MB", "0", "1iB", "10%", "inf", "0.2", "1e400MB"])
def test_what_is_no_size_names_the_rule(text):
    with pytest.raises(
        ConfigError, match="target_size must be a number of bytes with or without a unit, like 40MB, 38e6 or 36MiB"
    ):
        parse_size(text)


@pytest.mark.parametrize("value", ["", "10", "ten%", "-5%", "0%", 0.0, float("nan"), None])
def test_what_is_no_percentage_names_the_rule(value):
    with pytest.raises(ConfigError, match="max_ppl_increase must be a percentage above 0, like 10%, got"):
        parse_increase(value)


@given(st.integers(1, 10**12))
def test_whole_bytes_stay_whole(size):
    assert parse_size(size) == parse_size(str(size)) == size


@pytest.mark.parametrize("bits", [0.0, -1.0, math.nan, math.inf])
def test_bits_are_above_zero(bits):
    with pytest.raises(ConfigError, match=r"target_bpw must be a number of bits above 0, like 2.5, got"):
        Target.parse(target_bpw=bits)


@pytest.mark.parametrize("given", [{}, {"target_size": "1MB", "target_bpw": 3.0}])
def test_one_target(given):
    with pytest.raises(ConfigError, match="exactly one of target_size, target_bpw and max_ppl_increase must be given"):
        Target.parse(**given)


def test_header_bytes_are_those_of_a_file(tmp_path):
    tensors = {
        "model.ä.weight": torch.zeros(30, 1, 7, dtype=torch.int8),
        "model.b.scale": torch.zeros(30, 2, dtype=torch.float16),
    }
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    stored = sum(tensor.nbytes for tensor in tensors.values())
    counted = SHARD_BYTES + stored + sum(header_bytes(name, tensor, stored) for name, tensor in tensors.items())
    assert 0 <= counted - (tmp_path / "a.safetensors").stat().st_size <= 16


@pytest.mark.parametrize("family", ["llama", "llama_untied", "gpt2", "opt", "bert", "t5"])
def test_a_forecast_of_bytes_is_never_too_small(family):
    """Every choice once."""
    model = tiny_model(family)
    arch = describe(model)
    items = find_items(model, arch, pairs(CANDIDATES["stages"]))
    programme = Programme(model, arch, items)
    table = [position % len(item.alternatives) for position, item in enumerate(items)]
    batches = from_batches([tiny_inputs(family)])
    other = api._compressed_copy(model, arch, [(METHODS[s.method], s) for s in programme.stages(table)], batches)
    assert 0 <= programme.point(table).file_bytes - api._measured_point(other, model, arch, batches.batches).file_bytes <= 600


# What a table becomes.


@given(
    st.sets(
        st.sampled_from([f"model.layers.{i}.{n}" for i in range(11) for n in ("attn.q", "attn.k", "mlp.up", "mlp.down")]),
        min_size=1,
    )
)
def test_globs_match_exactly_what_was_chosen(chosen):
    names = [f"model.layers.{i}.{n}" for i in range(11) for n in ("attn.q", "attn.k", "mlp.up", "mlp.down")]
    globs = compact_globs(chosen, names)
    assert set(select_names(names, globs)) == chosen
    assert len(globs) <= len(chosen)


def test_globs_are_few():
    names = [f"h.{i}.{n}" for i in range(12) for n in ("attn.q", "mlp.up")]
    assert compact_globs(names, names) == ["*"]
    assert compact_globs([n for n in names if n.endswith("up")], names) == ["*.up"]
    assert compact_globs(["h.1.attn.q", "h.1.mlp.up"], names) == ["h.1.*"]


def test_stages_give_every_linear_its_choice():
    model = tiny_model("llama")
    arch = describe(model)
    items = find_items(model, arch, pairs(CANDIDATES["stages"]))
    assert [item.modules for item in items[:3]] == [
        ("model.embed_tokens",),
        tuple(f"model.layers.0.self_attn.{n}_proj" for n in "qkv"),
        ("model.layers.0.self_attn.o_proj",),
    ]
    programme = Programme(model, arch, items)
    table = [position % len(item.alternatives) for position, item in enumerate(items)]
    stages = programme.stages(table)
    wanted = {
        name: item.alternatives[index].config.bits
        for item, index in zip(items, table, strict=True)
        if item.block
        for name in item.modules
    }
    chosen = select_stages(arch.roles, stages)
    assert {name: stage.bits for stage, names in zip(stages, chosen, strict=True) for name in names} == wanted
    assert chosen[0] == set()
    assert stages[0].embedding_bits == items[0].alternatives[0].config.embedding_bits
    assert [a.config.embedding_bits for a in items[0].alternatives] == [4, 8]


def test_stages_that_match_some_only():
    model = tiny_model("llama")
    arch = describe(model)
    stages = [{**FAST, "bits": 4, "exclude": ["*.v_proj"]}, {**FAST, "bits": 8, "include": ["*.self_attn.*"]}]
    items = {item.name: item for item in find_items(model, arch, pairs(stages))}
    assert len(items["model.layers.0.self_attn.q_proj + model.layers.0.self_attn.k_proj"].alternatives) == 2
    assert [a.config.bits for a in items["model.layers.0.self_attn.v_proj"].alternatives] == [8]
    assert [a.config.bits for a in items["model.layers.0.mlp.down_proj"].alternatives] == [4]


def test_a_stage_may_be_for_the_embedding_only():
    model = tiny_model("llama")
    arch = describe(model)
    outside = {**FAST, "include": [], "embedding_bits": 4, "embedding_group_size": 32}
    items = find_items(model, arch, pairs([{**FAST, "bits": 3}, outside]))
    assert [a.config.embedding_bits for a in items[0].alternatives] == [4, 8]
    assert [len(item.alternatives) for item in items[1:]] == [1] * 12
    rates = find_items(model, arch, pairs([{**RATES["stages"][0], "include": []}, *RATES["stages"]]))
    assert [(item.name, len(item.alternatives)) for item in rates] == [("embeddings", 2), ("blocks", 2)]
    with pytest.raises(ConfigError, match=r"one stage at least must include Linears of the blocks, got include \[\] in all"):
        find_items(model, arch, pairs([outside]))


def test_untouched_tensors_count():
    model = tiny_model("llama_untied")
    arch = describe(model)
    all_items = find_items(model, arch, pairs([FAST]))
    no_embedding = find_items(model, arch, pairs([{**FAST, "embedding_bits": None}]))
    outside = model.model.embed_tokens.weight.nbytes + model.lm_head.weight.nbytes
    grown = Programme(model, arch, no_embedding).fixed_bytes - Programme(model, arch, all_items).fixed_bytes
    assert outside <= grown <= outside + 300
    assert kept_tensors(model, arch, []).keys() == model.state_dict().keys()
    assert files_bytes(model.state_dict(), arch) > sum(tensor.nbytes for tensor in model.state_dict().values())


@pytest.mark.parametrize(
    "stages",
    [[RATES["stages"][0], FAST], [RATES["stages"][0], {**RATES["stages"][1], "damp": 0.1}]],
    ids=["another method", "other settings"],
)
def test_rates_stand_alone(stages):
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="entropy with these settings deals out its bits itself, so all stages must be"):
        find_items(model, describe(model), pairs(stages))


# Measured errors.


def measured(model, stages, batches, table=None, progress=lambda *args: None):
    arch = describe(model)
    items = find_items(model, arch, pairs(stages))
    table = table or ErrorTable(None, {})
    measure(model, arch, items, batches, batches, table, None, progress)
    return {item.name: item for item in items}, table.errors


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "t5", "bert"])
def test_an_error_is_the_divergence_with_one_layer_replaced(family):
    """Against the plain way: the whole model, with the compressed module in the place of the dense one."""
    model = tiny_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = [tiny_inputs(family, seed=seed) for seed in range(2)]
    stage = {**FAST, "bits": 3, "group_size": 16}
    items, errors = measured(model, [stage], batches)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    names = [name for name, item in items.items() if item.block is not None and len(item.modules) == 1]
    for name in (names[0], names[-1]):
        recipe = Recipe.from_dict({"stages": [{**stage, "include": [name], "embedding_bits": None}]})
        other = api._compressed_copy(model, describe(model), [(METHODS["codebook"], recipe.stages[0])], from_batches(batches))
        with torch.no_grad():
            outputs = [(other(**batch)[0], model(**batch)[0]) for batch in batches]
        if family == "bert":
            expected = sum(1 - torch.cosine_similarity(a, b, dim=-1).mean().item() for a, b in outputs) / len(outputs)
        else:
            expected = sum(divergence(a, b).item() for a, b in outputs) / len(outputs)
        assert errors[name] == [pytest.approx(expected, rel=2e-3, abs=1e-7)]
        assert expected > 0


def test_choices_are_ordered_by_their_output_error():
    model = tiny_model("llama")
    _, errors = measured(model, CANDIDATES["stages"], [tiny_inputs("llama", batch=4)])
    assert len(errors) == 1 + 3 * 4
    for name, values in errors.items():
        assert values == sorted(values, reverse=True), name
        assert values[-1] < 0.1 * values[0]


def test_a_killed_measurement_goes_on(tmp_path):
    model = tiny_model("llama")
    batches = [tiny_inputs("llama")]
    _, whole = measured(model, CANDIDATES["stages"], batches)
    seen = []

    def kill(unit, done, total):
        seen.append((unit, done, total))
        if unit == "model.layers.2":
            raise KeyboardInterrupt

    path = tmp_path / "errors.json"
    with pytest.raises(KeyboardInterrupt):
        measured(model, CANDIDATES["stages"], batches, ErrorTable(path, {"model": "a"}), kill)
    assert seen == [("embeddings", 0, 5), ("embeddings", 1, 5), *((f"model.layers.{i}", 2 + i, 5) for i in range(3))]
    kept = json.loads(path.read_text())["errors"]
    assert set(kept) == {name for name in whole if "layers.2" not in name}
    _, again = measured(model, CANDIDATES["stages"], batches, ErrorTable(path, {"model": "a"}))
    assert again == whole
    with pytest.raises(
        OutputError, match=r'errors.json belongs to a run with another model \("a", now "b"\): choose another --cache'
    ):
        ErrorTable(path, {"model": "b"})
    path.write_text("{")
    with pytest.raises(
        OutputError, match=r"errors.json is not a table of errors that can be read: choose another --cache or delete"
    ):
        ErrorTable(path, {"model": "a"})


def test_a_dead_input_counts_nothing():
    model = tiny_model("llama")
    model.model.layers[1].input_layernorm.weight.data.zero_()
    _, errors = measured(model, CANDIDATES["stages"], [tiny_inputs("llama")])
    dead = next(name for name in errors if name.startswith("model.layers.1.self_attn.q_proj"))
    assert errors[dead] == [0.0] * 4


def test_padding_is_left_out():
    model = tiny_model("llama")
    batch = tiny_inputs("llama")
    mask = torch.ones_like(batch["input_ids"])
    mask[:, 16:] = 0
    other = {"input_ids": batch["input_ids"].clone(), "attention_mask": mask}
    other["input_ids"][:, 16:] = 5
    _, errors = measured(model, [FAST], [{**batch, "attention_mask": mask}])
    _, same = measured(model, [FAST], [other])
    assert all(errors[name] == pytest.approx(same[name], rel=1e-4) for name in errors)


def test_a_model_that_overflows_is_named():
    model = tiny_model("llama")
    model.model.norm.weight.data.fill_(torch.inf)
    with pytest.raises(NumericalError, match="the output of the model with embeddings replaced is not finite"):
        measured(model, [FAST], [tiny_inputs("llama")])


def test_a_block_that_does_not_run_is_named():
    model = tiny_model("llama")
    model.config.num_hidden_layers = 2  # the model then runs its first two only
    with pytest.raises(UnsupportedModel, match=r"model.layers.2 does not run with these inputs: its layers cannot be measured"):
        measured(model, [FAST], [tiny_inputs("llama")])


def test_a_histogram_that_moves_costs():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    coarse, fine = ((weight * n).round() / n for n in (2, 50))
    assert histogram_divergence(weight, weight) == 0
    assert 0 < histogram_divergence(weight, fine) < histogram_divergence(weight, coarse) < math.inf
    assert histogram_divergence(torch.ones(3), torch.zeros(3)) == 0


def test_a_proposal_wants_more_bits():
    model = tiny_model("llama")
    arch = describe(model)
    items = find_items(model, arch, pairs(CANDIDATES["stages"]))
    errors = propose(model, arch, items, lambda *args: None)
    assert set(errors) == {item.name for item in items}
    assert all(values[0] > values[-1] >= 0 for values in errors.values())


# Targets.


@pytest.mark.parametrize("size", [100_000, 130_000, "160 kB"])
def test_a_size_is_landed_on(size, planned):
    found = planned(target_size=size)
    assert 0.995 * parse_size(size) <= found.point.file_bytes <= parse_size(size)
    assert found.point.error <= min(p.error for p in found.front if p.file_bytes <= found.point.file_bytes) + 1e-9


def test_the_file_has_the_size(planned, folder, text, tmp_path):
    """The recipe is an ordinary one, and the bytes are read from the disk."""
    found = planned(target_size=120_000, output=tmp_path / "recipe.yaml", plot=tmp_path / "front.png")
    lines = (tmp_path / "recipe.yaml").read_text().splitlines()
    assert lines[0] == f"# hf-compact compress MODEL --recipe {tmp_path / 'recipe.yaml'} --output DIR --calibration TEXT"
    assert f"forecast: perplexity × {found.point.ppl_factor:.4f}" in lines[1]
    assert Recipe.from_yaml(tmp_path / "recipe.yaml") == found.recipe
    report = hf_compact.compress(folder, tmp_path / "recipe.yaml", output=tmp_path / "small", calibration=[text])
    size = sum(path.stat().st_size for path in (tmp_path / "small").glob("*.safetensors"))
    assert size == report.file_bytes
    assert 0.995 * 120_000 <= size <= 120_000
    assert 0 <= found.point.file_bytes - size <= 600
    assert found.point.body_bits == pytest.approx(report.body_bits_per_weight)
    assert len({stage["bits"] for stage in report.recipe["stages"]}) >= 3
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "recipe.sensitivity.json").exists()
    assert planned.cache.exists()


@pytest.mark.parametrize(
    ("target", "name", "unit"),
    [({"target_size": 693_500}, "target_size", "MB"), ({"target_bpw": 5.0}, "target_bpw", "bits")],
    ids=["size", "bits"],
)
def test_coarse_candidates_say_how_near_they_come(target, name, unit, folder, tmp_path):
    """Two items of two sizes: four plans, and the one above is as large as the note says."""
    few = {"include": ["model.layers.0.mlp.*"], "embedding_bits": None}
    stages = [{**stage, **few} for stage in (CANDIDATES["stages"][0], CANDIDATES["stages"][3])]
    for stage in stages:
        stage.pop("embedding_group_size", None)
    (tmp_path / "few.yaml").write_text(yaml.safe_dump({"stages": stages}))
    options = {"candidates": tmp_path / "few.yaml", "data_free": True}
    found = hf_compact.plan_budget(folder, **target, **options)
    (wanted,) = target.values()
    reached = found.point.file_bytes if name == "target_size" else found.point.body_bits
    assert found.shortfall == pytest.approx(1 - reached / wanted)
    assert found.shortfall > 0.005
    modules, size = found.next_size
    assert size > wanted
    assert found.notes[-1] == (
        f"{name} {found.target.text(wanted)}, reached {found.target.text(reached)}, {100 * found.shortfall:.1f} % below: "
        f"the nearest candidates above, those of {modules}, make it {found.target.text(size)}"
    )
    assert found.target.text(size).endswith(unit)
    above = hf_compact.plan_budget(folder, **{name: size}, **options)
    assert (above.point.file_bytes if name == "target_size" else above.point.body_bits) == pytest.approx(size)
    arguments = ["plan", folder, f"--{name.replace('_', '-')}", wanted, "--candidates", tmp_path / "few.yaml", "--data-free",
                 "--output", tmp_path / "recipe.yaml"]  # fmt: skip
    done = CliRunner(env={"COLUMNS": "300", "TERM": "dumb"}).invoke(cli.app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.stderr
    assert f"note: {found.notes[-1]}" in done.stderr


def test_nothing_above_that_would_lose_less():
    recipe = Recipe.from_dict({"stages": [FAST]})
    target = Target(body_bits=4.0)
    found = BudgetPlan(recipe, Point(10**6, 3.9, 0.1), (), (), "divergence", target, None)
    assert found.notes == ["target_bpw 4.000 bits, reached 3.900 bits, 2.5 % below: no larger choice loses less"]
    assert BudgetPlan(recipe, Point(10**6, 3.99, 0.1), (), (), "divergence", target, None).notes == []
    increase = BudgetPlan(recipe, Point(10**6, 3.9, 0.1), (), (), "divergence", Target(increase=0.2), None)
    assert increase.notes == []


@pytest.mark.parametrize("bits", [3.0, 4.5])
def test_bits_are_landed_on(bits, planned):
    found = planned(target_bpw=bits)
    assert 0.995 * bits <= found.point.body_bits <= bits
    assert found.recipe.stages[0].embedding_bits == 8


def test_an_increase_is_kept_and_more_is_smaller(planned):
    small, large = planned(max_ppl_increase="30%"), planned(max_ppl_increase=0.03)
    assert small.point.ppl_factor <= 1.3
    assert large.point.ppl_factor <= 1.03
    assert small.point.file_bytes < large.point.file_bytes
    assert math.isclose(small.point.ppl_factor, math.exp(small.point.error))


def test_a_validation_measures_what_was_forecast(planned, tmp_path):
    seen = []
    found = planned(target_size=150_000, validate=True, plot=tmp_path / "front.png", progress=lambda *args: seen.append(args))
    assert [args for args in seen if args[0] == "validation"] == [("validation", i, 4) for i in range(5)]
    assert len(found.measured) == 4
    assert found.measured[0][0] == found.point
    for forecast, real in found.measured:
        assert 0 <= forecast.file_bytes - real.file_bytes <= 600
        assert forecast.body_bits == pytest.approx(real.body_bits)
        assert forecast.error / 4 < real.error < 4 * forecast.error
    by_size = sorted(found.measured, key=lambda pair: pair[1].file_bytes)
    errors = [real.error for _, real in by_size]
    assert errors == sorted(errors, reverse=True)


@pytest.fixture
def compressions(monkeypatch):
    """The calls that compress a whole copy of the model."""
    calls, compressed = [], api._compressed_copy
    monkeypatch.setattr(api, "_compressed_copy", lambda *args: calls.append(args) or compressed(*args))
    return calls


def killed_at(at):
    def kill(unit, done, total):
        if (unit, done) == at:
            raise KeyboardInterrupt

    return kill


def test_a_killed_validation_goes_on(planned, compressions, tmp_path):
    planned(target_size=150_000)
    cache = tmp_path / "errors.json"
    cache.write_text(json.dumps({**json.loads(planned.cache.read_text()), "points": {}}))
    options = {"target_size": 150_000, "validate": True, "cache": cache}
    with pytest.raises(KeyboardInterrupt):
        planned(**options, progress=killed_at(("validation", 2)))
    assert len(compressions) == len(json.loads(cache.read_text())["points"]) == 2
    again = planned(**options)
    assert len(compressions) == len(json.loads(cache.read_text())["points"]) > 2
    assert f"; measured: perplexity × {again.measured[0][1].ppl_factor:.4f}.\n" in again.to_yaml("recipe.yaml")
    done = len(compressions)
    assert planned(**options).measured == again.measured
    assert len(compressions) == done


def test_a_killed_measurement_of_whole_models_goes_on(planned, compressions, tmp_path):
    stages = [{"method": "entropy", "bits": bits, "embedding_bits": None} for bits in (3.0, 4.0, 6.0)]
    options = {"target_bpw": 6.0, "candidates": {**CANDIDATES, "stages": stages}, "cache": tmp_path / "errors.json"}
    with pytest.raises(KeyboardInterrupt):
        planned(**options, progress=killed_at(("blocks", 2)))
    assert len(json.loads(options["cache"].read_text())["errors"]["blocks"]) == len(compressions) == 2
    planned(**options)
    assert len(compressions) == 3


def test_the_measured_table_beats_one_width_for_all(planned, folder, text):
    """At the bytes of three bits everywhere the mixture is forecast to lose less."""
    dense = api.open_dense(folder, is_whole=True)
    arch = describe(dense.model)
    items = find_items(dense.model, arch, pairs(CANDIDATES["stages"]))
    planned(target_size=120_000)
    errors = json.loads(planned.cache.read_text())["errors"]
    programme = Programme(dense.model, arch, items, errors)
    uniform = programme.point([1] * len(items))
    mixed = planned(target_size=uniform.file_bytes)
    assert mixed.point.file_bytes <= uniform.file_bytes
    assert mixed.point.error <= uniform.error


def test_a_second_target_measures_nothing(planned, monkeypatch):
    planned(target_size=120_000)
    monkeypatch.setattr(measurement, "_block_errors", None)
    assert planned(target_size=140_000).point.file_bytes <= 140_000


def test_other_candidates_do_not_mix_with_a_table(planned, folder, text):
    planned(target_size=120_000)
    other = {**CANDIDATES, "stages": CANDIDATES["stages"][1:]}
    with pytest.raises(OutputError, match=r"errors.json belongs to a run with another candidates \("):
        hf_compact.plan_budget(folder, target_bpw=4.0, candidates=other, calibration=[text], cache=planned.cache, num_tokens=128)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"target_size": "50kB"}, r"target_size must be between 0.08\d MB and 0.2\d\d MB for these candidates, got 0.050 MB"),
        ({"target_size": "5MB"}, r"target_size must be between 0.08\d MB and 0.2\d\d MB for these candidates, got 5.000 MB"),
        ({"target_bpw": 1.5}, r"target_bpw must be between 2.\d\d\d and 8.\d\d\d bits for these candidates, got 1.5"),
        ({"target_bpw": 9.5}, r"target_bpw must be between 2.\d\d\d and 8.\d\d\d bits for these candidates, got 9.5"),
        ({"max_ppl_increase": "0.0001%"}, r"max_ppl_increase must be at least 0.\d+ % for these candidates, got 0.0001 %"),
    ],
)
def test_a_target_out_of_reach_names_what_can_be_had(target, message, planned, tmp_path):
    with pytest.raises(ConfigError, match=message):
        planned(**target, output=tmp_path / "recipe.yaml", plot=tmp_path / "front.png")
    assert not list(tmp_path.iterdir())


def test_rates_are_solved_for_and_landed_on(folder, text, tmp_path):
    """One stage, any rate: what the method codes has the size that was asked for."""
    size = 140_000
    options = {"candidates": RATES, "calibration": [text], "num_tokens": 128}
    found = hf_compact.plan_budget(folder, target_size=size, output=tmp_path / "recipe.yaml", **options)
    assert [stage.include for stage in found.recipe.stages] == [(), ("*",)]
    assert 3 < found.recipe.stages[1].bits < 6
    assert (tmp_path / "recipe.sensitivity.json").exists()
    report = hf_compact.compress(folder, tmp_path / "recipe.yaml", output=tmp_path / "small", calibration=[text])
    assert 0.995 * size <= report.file_bytes <= size
    assert report.body_bits_per_weight == pytest.approx(found.recipe.stages[1].bits, rel=1e-3)


def test_a_proposal_needs_no_text(folder, tmp_path):
    found = hf_compact.plan_budget(folder, target_size=120_000, candidates=CANDIDATES, data_free=True, output=tmp_path / "recipe.yaml",
                                   plot=tmp_path / "front.png")  # fmt: skip
    assert found.is_proposal
    assert 0.995 * 120_000 <= found.point.file_bytes <= 120_000
    assert "data-free proposal" in (tmp_path / "recipe.yaml").read_text()
    assert found.notes == ["a data-free proposal: errors are divergences of weight histograms and predict no perplexity"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["front.png", "recipe.yaml"]


def test_a_plot_that_cannot_be_finished_leaves_nothing(planned, tmp_path, monkeypatch):
    def savefig(self, path, **settings):
        Path(path).write_bytes(b"half of a picture")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Figure, "savefig", savefig)
    with pytest.raises(OutputError, match="disk full while writing"):
        planned(target_size=120_000, plot=tmp_path / "front.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_bpw": 3.0, "data_free": True, "validate": True}, "data_free proposes from the weights alone: validate needs"),
        ({"max_ppl_increase": 0.1, "data_free": True}, "data_free proposes from the weights alone: max_ppl_increase needs"),
        (
            {"target_bpw": 3.0, "data_free": True, "candidates": "entropy"},
            "candidates that deal out their bits by gradients need",
        ),
        ({"target_bpw": 3.0, "data_free": True, "calibration": ["a.txt"]}, r"calibration must not be given, got \['a.txt'\]"),
        ({"target_bpw": 3.0, "data_free": True, "cache": "errors.json"}, "cache must not be given, got errors.json"),
        ({"target_bpw": 3.0, "num_tokens": 0}, "num_tokens must be at least 1, got 0"),
        (
            {"target_bpw": 3.0, "candidates": "no/such.yaml"},
            "recipe must be a YAML file, got 'no/such.yaml', which does not exist",
        ),
        (
            {"target_bpw": 3.0, "candidates": {"stages": [FAST, {"method": "correction"}]}},
            r"candidates: stages\[1\].method must store a Linear by itself, which correction leaves to a later stage",
        ),
    ],
)
def test_what_does_not_go_together_is_named(options, message, folder):
    with pytest.raises(ConfigError, match=message):
        hf_compact.plan_budget(folder, **({"candidates": CANDIDATES} | options))


def test_an_increase_needs_a_perplexity(tmp_path, text):
    tiny_model("bert").save_pretrained(tmp_path / "bert")
    options = {"candidates": CANDIDATES, "calibration": from_batches([tiny_inputs("bert")])}
    with pytest.raises(ConfigError, match="max_ppl_increase needs a model of the next token, which a BertModel is not"):
        hf_compact.plan_budget(tmp_path / "bert", max_ppl_increase="5%", **options)
    found = hf_compact.plan_budget(tmp_path / "bert", target_bpw=4.0, output=tmp_path / "recipe.yaml", **options)
    assert found.point.body_bits <= 4.0
    assert f"one minus the cosine of the outputs {found.point.error:.4f}." in (tmp_path / "recipe.yaml").read_text()


def test_files_are_not_taken_from_anyone(folder, tmp_path):
    (tmp_path / "recipe.yaml").write_text("mine")
    options = {"target_bpw": 3.0, "candidates": CANDIDATES}
    with pytest.raises(OutputError, match=r"recipe.yaml' exists: choose another name or delete it"):
        hf_compact.plan_budget(folder, output=tmp_path / "recipe.yaml", **options)
    with pytest.raises(OutputError, match=r"front.png' cannot be created: its folder must exist and be writable"):
        hf_compact.plan_budget(folder, plot=tmp_path / "no" / "front.png", **options)
    assert (tmp_path / "recipe.yaml").read_text() == "mine"
    for name in ("front", "front.jpg"):
        with pytest.raises(OutputError, match=rf"plot '.*{name}' must be a name that ends in .png"):
            hf_compact.plan_budget(folder, plot=tmp_path / name, **options)
    one, other = tmp_path / "one.png", tmp_path / "other.yaml"
    for files in ({"output": one, "plot": one}, {"output": other, "cache": other}, {"plot": one, "cache": one}):
        with pytest.raises(OutputError, match=r"output, plot and cache must be different files, got .*, .*"):
            hf_compact.plan_budget(folder, **files, **options)
    with pytest.raises(OutputError, match=r"errors.json' cannot be created: its folder must exist and be writable"):
        hf_compact.plan_budget(folder, cache=tmp_path / "no" / "errors.json", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_one_process(folder, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(ConfigError, match="planning runs in one process, not under torchrun"):
        hf_compact.plan_budget(folder, target_bpw=3.0, candidates=CANDIDATES)


def test_a_large_forecast_is_qualified(planned):
    found = planned(target_size=90_000)
    assert found.point.error > 0.3
    assert "measure it with --validate" in found.notes[0]
    assert planned(target_size=160_000).notes == []


@pytest.mark.parametrize("name", sorted(api.BUILT_IN_CANDIDATES))
def test_candidates_that_come_along(name):
    path = api.BUILT_IN_CANDIDATES[name]
    assert path.read_text().startswith("# hf-compact plan MODEL --target-size ")
    assert f"--candidates {name} " in path.read_text()
    recipe = Recipe.from_dict(yaml.safe_load(path.read_text()))
    model = tiny_model("llama", hidden_size=64, intermediate_size=128)
    items = find_items(model, describe(model), [(METHODS[stage.method], stage) for stage in recipe.stages])
    assert len(items[0].alternatives) >= 3
    assert all(len(item.alternatives) == len(recipe.stages) for item in items[1:])


def test_there_are_candidates():
    assert sorted(api.BUILT_IN_CANDIDATES) == ["codebook", "entropy"]
