"""Models measured by one protocol: alone, and beside a base on the same windows, rows and turns."""

import json
import math
import shutil

import pytest
import torch
from peft import get_peft_model
from torch import nn
from typer.testing import CliRunner

import hf_compact
from hf_compact import CompacterConfig, Protocol, SpeedConfig, Windows, benchmark, cli, speed
from hf_compact.errors import CalibrationError, ConfigError, FormatError, OutputError, UnsupportedModel
from hf_compact.results import ModelResult, Results, compare, compare_items
from tests.conftest import tiny_model
from tests.tasks import write_tasks

SHORT = Windows(window_length=32, num_windows=4)


@pytest.fixture(scope="module")
def small(dense_folder, text_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("small") / "small"
    recipe = {"stages": [{"method": "codebook", "bits": 3, "rounding": "nearest"}]}
    hf_compact.compress(dense_folder, recipe, output=output, calibration=[text_file])
    return output


@pytest.fixture(scope="module")
def compared(dense_folder, small, text_file) -> Results:
    protocol = Protocol(windows=SHORT, speed=SpeedConfig(prompt_tokens=8, new_tokens=3, repeats=2))
    return hf_compact.measure([small], [text_file], protocol, compare_with=dense_folder)


def test_a_model_is_compared_with_its_base_on_every_token(compared, dense_folder, text_file):
    base, model = compared.models
    name = text_file.name
    assert (compared.base, base.name, model.name) == ("tiny-llama", "tiny-llama", "small")
    assert base.comparison is None
    found = model.comparison["perplexity"][name]
    scores, reference = model.perplexity[name], base.perplexity[name]
    assert found["ratio"] == pytest.approx(scores["perplexity"] / reference["perplexity"])
    gaps = torch.tensor(scores["window_nll"], dtype=torch.float64) - torch.tensor(reference["window_nll"], dtype=torch.float64)
    assert found["nll_difference"] == pytest.approx(gaps.mean().item())
    assert found["nll_difference_stderr"] == pytest.approx((gaps.std() / 2).item())
    assert found["nll_difference_stderr"] < scores["stderr"]
    assert 0 < found["kl"] < 1
    assert 0 < found["top1_agreement"] < 1
    alone = hf_compact.evaluate([dense_folder], [text_file], 4, 32)[0]
    assert alone["perplexity"] == pytest.approx(reference["perplexity"], rel=1e-4)


def test_a_model_beside_itself_differs_in_nothing(dense_folder, text_file, tmp_path):
    other = tmp_path / "other"
    tiny_model("llama").save_pretrained(other)
    for path in dense_folder.glob("tokenizer*"):
        (other / path.name).write_bytes(path.read_bytes())
    found = hf_compact.measure([other], [text_file], Protocol(windows=SHORT), compare_with=dense_folder)
    same = found.models[1].comparison["perplexity"][text_file.name]
    assert same == {"ratio": 1.0, "nll_difference": 0.0, "nll_difference_stderr": 0.0, "kl": 0.0, "kl_stderr": 0.0, "top1_agreement": 1.0}  # fmt: skip


def test_what_is_known_of_a_folder(compared, small, dense_folder):
    base, model = compared.models
    report = hf_compact.Report.read(small / "compression_report.json")
    assert model.file_bytes == report.file_bytes
    assert model.num_parameters == base.num_parameters == report.num_parameters
    assert model.body_bits_per_weight == pytest.approx(report.body_bits_per_weight)
    assert model.compression["methods"] == ["codebook"]
    assert model.compression["is_verified"]
    assert model.compression["seconds"] == pytest.approx(sum(report.seconds.values()))
    assert (base.body_bits_per_weight, base.compression) == (None, None)
    assert base.fingerprint != model.fingerprint
    assert model.bits_per_parameter == pytest.approx(report.file_bits_per_weight)
    assert compared.machine["threads"] == torch.get_num_threads()
    assert compared.protocol["texts"].keys() == {"calibration.txt"}


def test_times_and_memory(compared):
    base, model = compared.models
    for found in (base, model):
        times, memory = found.speed, found.memory
        assert 0 < times["decode_seconds"] < times["first_token_seconds"] * 10
        assert times["decode_tokens_per_second"] == pytest.approx(1 / times["decode_seconds"])
        assert times["prefill_tokens_per_second"] == pytest.approx(8 / times["prefill_seconds"])
        assert 0 < memory["runtime_bytes"] < memory["loaded_bytes"] <= memory["peak_bytes"]
        assert memory["load_seconds"] > 0
        assert memory["device"] == "cpu"
    assert set(model.comparison["speed"]) == {"prefill", "first_token", "decode"}


def test_models_take_turns(monkeypatch):
    seen = []

    def noted(model, ids, new_tokens):
        seen.append(model)
        return {"prefill": len(seen), "first_token": 1.0, "decode": 2.0}

    monkeypatch.setattr(speed, "generation", noted)
    turns = speed.alternate({"a": "A", "b": "B"}, None, SpeedConfig(repeats=3), lambda done, total: seen.append((done, total)))
    assert seen == ["A", "B", (0, 3), "A", "B", (1, 3), "A", "B", (2, 3), "A", "B", (3, 3)]
    assert {name: len(found) for name, found in turns.items()} == {"a": 3, "b": 3}
    assert speed.ratios(turns["b"], turns["a"]) == {"prefill": pytest.approx(7 / 8), "first_token": 1.0, "decode": 1.0}


def test_tokens_arrive_one_by_one():
    found = speed.generation(tiny_model("llama"), torch.arange(3, 11)[None], 4)
    assert set(found) - {"joules"} == {"prefill", "first_token", "decode"}
    assert all(value > 0 for value in found.values())


def test_energy_of_a_token_is_that_of_decoding(monkeypatch):
    """The prompt is read twice before, which is no part of it."""
    states = iter([10.0, 16.0])
    monkeypatch.setattr(speed, "energy_joules", lambda device: next(states))
    assert speed.generation(tiny_model("llama"), torch.arange(3, 11)[None], 4)["joules"] == 2.0


def test_energy_is_the_packages_sum(tmp_path):
    cpu = torch.device("cpu")
    assert speed.energy_joules(cpu, tmp_path) is None
    names = {"intel-rapl:0": "package-0", "intel-rapl:0:0": "core", "intel-rapl:1": "package-1", "intel-rapl:2": "psys"}
    for (name, of), value in zip(names.items(), ("3000000", "7", "1500000", "9000000"), strict=True):
        (tmp_path / name).mkdir()
        (tmp_path / name / "name").write_text(of + "\n")
        (tmp_path / name / "energy_uj").write_text(value + "\n")
    assert speed.energy_joules(cpu, tmp_path) == 4.5
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("none")
    assert speed.energy_joules(cpu, tmp_path) is None


def test_results_come_back_from_their_file(compared, tmp_path):
    compared.write(tmp_path / "results.json")
    assert Results.read(tmp_path / "results.json").to_dict() == compared.to_dict()
    text = (tmp_path / "results.json").read_text()
    assert text.count("\n") < 250
    assert max(map(len, text.splitlines())) > 60


def test_what_is_not_finite_is_none(tmp_path):
    model = ModelResult(name="a", fingerprint="", dtype="float32", file_bytes=1, num_parameters=1)
    model.perplexity["t"] = {"perplexity": math.inf, "window_nll": [1.0, math.nan], "mean_nll": 800.0}
    Results(protocol={}, machine={}, versions={}, models=[model]).write(tmp_path / "r.json")
    found = Results.read(tmp_path / "r.json").models[0]
    assert found.perplexity["t"] == {"perplexity": None, "window_nll": [1.0, None], "mean_nll": 800.0}
    assert compare(model, found)["perplexity"]["t"]["ratio"] == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{no", "results .* cannot be read"),
        ("[]", "results must be a mapping, got list"),
        ('{"results_version": 9}', "results_version must be 1, got 9"),
        ('{"results_version": 1, "models": [{"title": 1}]}', "results do not fit their schema"),
    ],
)
def test_no_results(text, message, tmp_path):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(FormatError, match=message):
        Results.read(tmp_path / "r.json")


def test_a_stopped_run_goes_on(dense_folder, small, text_file, tmp_path, monkeypatch):
    output, protocol = tmp_path / "results.json", Protocol(windows=SHORT)
    hf_compact.measure([small], [text_file], protocol, compare_with=dense_folder, output=output)
    whole = json.loads(output.read_text())
    Results.from_dict({**whole, "models": whole["models"][:1]}).write(output)
    opened = []
    real = benchmark.open_for_scoring
    monkeypatch.setattr(benchmark, "open_for_scoring", lambda path, dtype: opened.append(path) or real(path, dtype))
    scored = []
    hf_compact.measure(
        [small],
        [text_file],
        protocol,
        compare_with=dense_folder,
        output=output,
        progress=lambda unit, *counts: scored.append(unit),
    )
    assert set(scored) == {f"small {text_file.name}"}
    again = json.loads(output.read_text())
    for found in (whole, again):
        for model in found["models"]:
            model["perplexity"][text_file.name].pop("seconds")
    assert again == whole
    opened.clear()
    hf_compact.measure([small], [text_file], protocol, compare_with=dense_folder, output=output)
    assert opened == []
    with pytest.raises(OutputError, match="belongs to a run with another protocol"):
        hf_compact.measure(
            [small], [text_file], Protocol(windows=Windows(window_length=16)), compare_with=dense_folder, output=output
        )
    config = small / "config.json"
    before = config.read_text()
    config.write_text(json.dumps({**json.loads(before), "rms_norm_eps": 0.1}))
    with pytest.raises(OutputError, match=r"holds small with other weights: choose another --output or delete it"):
        hf_compact.measure([small], [text_file], protocol, compare_with=dense_folder, output=output)
    config.write_text(before)
    output.write_text("mine")
    with pytest.raises(OutputError, match="exists and is no results file: choose another --output"):
        hf_compact.measure([small], [text_file], protocol, output=output)
    assert output.read_text() == "mine"


def test_rows_of_tasks_are_compared_pair_by_pair():
    items = {"hash": ["a", "b", "c", "d"], "acc": [1.0, 0.0, 1.0, 1.0], "choice": [0, 1, 1, 0], "choices": [[-0.5, -0.9]] * 4}
    base = {
        "hash": items["hash"],
        "acc": [1.0, 1.0, 1.0, 0.0],
        "choice": [0, 0, 1, 1],
        "choices": [[-0.5, -0.9]] * 3 + [[-2.0, -0.1]],
    }
    found = compare_items(items, base)
    error = pytest.approx(math.sqrt(2 / 3) / 2)
    assert found["metrics"] == {"acc": {"difference": 0.0, "stderr": error, "num_lost": 1, "num_gained": 1, "agreement": 0.5}}
    assert found["agreement"] == 0.5
    p, q = (torch.tensor(row).log_softmax(0) for row in ([-2.0, -0.1], [-0.5, -0.9]))
    assert found["kl"] == pytest.approx((p.exp() * (p - q)).sum().item() / 4, rel=1e-5)
    models = [ModelResult(name=n, fingerprint="", dtype="", file_bytes=1, num_parameters=1, tasks={"t": {"items": i}}) for n, i in (("m", items), ("b", {**base, "hash": ["x"] * 4}))]  # fmt: skip
    with pytest.raises(ConfigError, match="m and b were not given the same rows of t"):
        compare(*models)


def test_each_metric_has_the_rows_that_it_judges():
    """Raw likelihood may choose alike where likelihood per byte does not."""
    choices = {"hash": ["a", "b", "c"], "acc": [1.0, 0.0, 0.0], "choice": [0, 0, 0]}
    found = compare_items(choices | {"acc_norm": [0.0, 0.0, 1.0]}, choices | {"acc_norm": [1.0, 1.0, 1.0]})
    assert found["agreement"] == found["metrics"]["acc"]["agreement"] == 1
    assert found["metrics"]["acc_norm"]["agreement"] == pytest.approx(1 / 3)
    assert (found["metrics"]["acc_norm"]["num_lost"], found["metrics"]["acc_norm"]["num_gained"]) == (2, 0)


def test_rows_without_a_number_agree_on_nothing():
    """Perplexities of a corpus are not those of its rows."""
    assert compare_items({"hash": ["a", "b"]}, {"hash": ["a", "b"]}) == {"metrics": {}, "agreement": None}


def test_an_adapter_stands_on_its_base(small, dense_folder, tmp_path):
    base = shutil.copytree(small, tmp_path / "base")
    model = get_peft_model(hf_compact.verify.load_model(base), CompacterConfig(task_type="CAUSAL_LM", reduction_factor=16))
    model.save_pretrained(tmp_path / "adapter")
    path = str(tmp_path / "adapter")
    loaded, tokenizer, file_bytes = benchmark.open_for_scoring(path)
    opened = benchmark.Loaded(name="adapter", model=loaded, tokenizer=tokenizer, file_bytes=file_bytes, path=path)
    found, below = benchmark._described(opened), hf_compact.inspect_folder(base)
    assert found.num_parameters == below["num_parameters"]
    assert found.body_bits_per_weight == below["body_bits_per_weight"]
    assert found.file_bytes > below["file_bytes"]
    (base / "model.safetensors").write_bytes((dense_folder / "model.safetensors").read_bytes())
    assert benchmark.fingerprint_of(path) != found.fingerprint


def test_shown_rows_are_part_of_the_protocol(tmp_path):
    data = write_tasks(tmp_path, arc_easy=[{"question": "?"}])
    protocol = Protocol(tasks=("arc_easy",))
    before = benchmark._stated(protocol, {}, data)
    write_tasks(tmp_path, **{"arc_easy.train": [{"question": "Shown?"}]})
    assert benchmark._stated(protocol, {}, data) != before


def test_the_same_answer_is_not_the_same_likelihood():
    """LAMBADA's first metric is a log-probability, which no two models share."""
    items = {"hash": ["a", "b"], "perplexity": [-3.0, -1.0], "acc": [0.0, 1.0]}
    assert compare_items(items, {"hash": ["a", "b"], "perplexity": [-3.1, -0.9], "acc": [0.0, 0.0]})["agreement"] == 0.5


def test_strides_score_every_token_once_with_more_before_it():
    model, ids = tiny_model("llama"), torch.arange(3, 99)
    spans = Windows(window_length=16, stride=4, num_windows=None).spans(len(ids))
    assert [token for span in spans for token in range(span.first, span.end)] == list(range(1, 96))
    assert all(span.first - span.begin >= 12 for span in spans[1:])
    found = hf_compact.scoring.score(model, ids[:20], Windows(window_length=16, stride=4))
    with torch.no_grad():
        rows = [model(input_ids=ids[None, :16]).logits[0, :-1], model(input_ids=ids[None, 4:20]).logits[0, 11:-1]]
    expected = nn.functional.cross_entropy(torch.cat(rows), ids[1:20]).item()
    assert found["mean_nll"] == pytest.approx(expected, rel=1e-5)
    assert (found["num_tokens"], found["stride"]) == (19, 4)


def test_bos_stands_before_every_window():
    model, ids = tiny_model("llama"), torch.arange(3, 23)
    found = hf_compact.scoring.score(model, ids, Windows(window_length=11, bos=True), bos_token_id=0)
    with torch.no_grad():
        losses = [
            model(input_ids=(row := torch.cat([torch.tensor([0]), part]))[None], labels=row[None]).loss for part in ids.split(10)
        ]
    assert found["mean_nll"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    assert found["num_tokens"] == 20
    with pytest.raises(ConfigError, match="bos needs a tokenizer with a BOS token"):
        hf_compact.scoring.score(model, ids, Windows(window_length=11, bos=True))


def test_words_and_bytes_share_the_loss_of_the_tokens(tokenizer):
    text = "the words of a text, and \u00e9tude " * 20
    ids = torch.tensor(tokenizer(text)["input_ids"])
    windows = Windows(window_length=len(ids) + 1, bos=True)
    found = hf_compact.scoring.score(tiny_model("llama"), ids, windows, bos_token_id=0)
    shared = hf_compact.scoring.per_word(found, tokenizer, ids, windows)
    total = found["mean_nll"] * found["num_tokens"]
    assert shared["word_perplexity"] == pytest.approx(math.exp(total / len(text.split())))
    assert shared["bits_per_byte"] == pytest.approx(total / math.log(2) / len(text.encode()))


def test_vocabularies_must_be_one(tokenizer):
    models = tiny_model("llama"), tiny_model("llama", vocab_size=400)
    with pytest.raises(UnsupportedModel, match="one vocabulary to be compared token by token, got 384 and 400"):
        hf_compact.scoring.score_beside(*models, torch.arange(3, 40), SHORT)


def test_tasks_beside_a_base(dense_folder, small, tmp_path):
    pytest.importorskip("lm_eval")
    data = write_tasks(tmp_path)
    protocol = Protocol(tasks=("arc_easy", "lambada_openai"), limit=5, batch_size=2, dtype="float32")
    found = hf_compact.measure([small], (), protocol, compare_with=dense_folder, task_data=data)
    base, model = found.models
    assert (base.dtype, model.dtype) == ("float32", "float32")
    for task in protocol.tasks:
        beside = model.comparison["tasks"][task]
        for metric, change in beside["metrics"].items():
            if metric in model.tasks[task]["metrics"] and metric != "perplexity":
                gap = model.tasks[task]["metrics"][metric]["value"] - base.tasks[task]["metrics"][metric]["value"]
                assert change["difference"] == pytest.approx(gap)
        assert 0 <= beside["agreement"] <= 1
    assert model.comparison["tasks"]["arc_easy"]["kl"] > 0
    assert found.protocol["task_data"].keys() == {"arc_easy", "lambada_openai"}
    assert "lm_eval" in found.versions


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_fewshot": -1}, "num_fewshot must be at least 0, got -1"),
        ({"dtype": "int8"}, "dtype must be one of auto, float32, bfloat16, float16, got 'int8'"),
        ({"device": "cpuu"}, "device 'cpuu' is not to be had"),
    ],
)
def test_a_protocol_that_cannot_be(values, message):
    with pytest.raises(ConfigError, match=message):
        Protocol(**values)


@pytest.mark.parametrize(("stride", "bos", "most"), [(0, False, 8), (9, False, 8), (8, True, 7)])
def test_a_stride_that_leaves_gaps(stride, bos, most):
    with pytest.raises(ConfigError, match=rf"stride must be in \[1, {most}\], got {stride}"):
        Windows(window_length=8, stride=stride, bos=bos)


def test_nothing_to_measure(dense_folder, text_file, tmp_path):
    with pytest.raises(ConfigError, match="models must name at least one model, got none"):
        hf_compact.measure([], [text_file])
    with pytest.raises(ConfigError, match="nothing to measure: give texts, tasks or speed"):
        hf_compact.measure([dense_folder])
    with pytest.raises(ConfigError, match=r"model .*absent.gguf' does not exist"):
        hf_compact.measure([dense_folder, tmp_path / "absent.gguf"], [text_file])
    with pytest.raises(ConfigError, match="texts must have different file names"):
        hf_compact.measure([dense_folder], [text_file, text_file.parent / ".." / text_file.parent.name / text_file.name])
    with pytest.raises(CalibrationError, match="cannot be read"):
        hf_compact.measure([dense_folder], [tmp_path / "absent.txt"])
    with pytest.raises(OutputError, match="its folder must exist and be writable"):
        hf_compact.measure([dense_folder], [text_file], output=tmp_path / "absent" / "results.json")


def test_models_with_one_name_are_told_apart_by_their_paths(dense_folder, tmp_path):
    (tmp_path / "tiny-llama").mkdir()
    assert benchmark.model_names([dense_folder, "org/name"]) == {str(dense_folder): "tiny-llama", "org/name": "org/name"}
    both = [str(dense_folder), str(tmp_path / "tiny-llama")]
    assert benchmark.model_names(both) == {path: path for path in both}


@pytest.mark.cli
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "at least one of --text, --tasks and --speed must be given"),
        (["--speed", "--bos"], "--bos belongs to --text, which is not given"),
        (["--speed", "--windows", "4"], "--windows belongs to --text, which is not given"),
        (["--speed", "--window-length", "64"], "--window-length belongs to --text, which is not given"),
        (["--text", "a", "--batch-size", "2"], "--batch-size belongs to --tasks, which is not given"),
        (["--text", "a", "--limit", "3"], "--limit belongs to --tasks, which is not given"),
        (["--text", "a", "--new-tokens", "3"], "--new-tokens belongs to --speed, which is not given"),
    ],
)
def test_an_option_that_would_do_nothing(options, message):
    done = CliRunner(env={"COLUMNS": "300", "TERM": "dumb"}).invoke(cli.app, ["evaluate", "model", *options])
    assert done.exit_code == 2
    assert message in done.stderr


@pytest.mark.cli
def test_command(dense_folder, small, text_file, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    memory = {"device": "cpu", "load_seconds": 1.25, "runtime_bytes": 1, "loaded_bytes": 2, "peak_bytes": 345e6}
    monkeypatch.setattr(benchmark, "_memory", lambda path, work: memory)  # fresh processes: test_times_and_memory
    options = ["--text", text_file, "--tasks", "winogrande,piqa", "--task-data", write_tasks(tmp_path), "--limit", 3, "--batch-size", 2,
               "--windows", 2, "--window-length", 32, "--stride", 16, "--bos", "--speed", "--prompt-tokens", 8, "--new-tokens", 2,
               "--repeats", 1, "--output", tmp_path / "results.json", "--json", tmp_path / "rows.json"]  # fmt: skip
    arguments = ["evaluate", small, "--compare", dense_folder, *options]
    done = CliRunner(env={"COLUMNS": "300", "TERM": "dumb"}).invoke(cli.app, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    found = Results.read(tmp_path / "results.json")
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["model"] for row in rows] == [str(dense_folder), str(small)]
    assert (rows[1]["stride"], rows[1]["bos"]) == (16, True)
    beside = found.models[1].comparison
    assert f"{100 * beside['perplexity'][text_file.name]['top1_agreement']:.1f} %" in done.stdout
    assert f"{100 * beside['tasks']['piqa']['agreement']:.1f} %" in done.stdout
    change = beside["tasks"]["winogrande"]["metrics"]["acc"]
    assert f"{change['difference']:+.4f} ± {change['stderr']:.4f}" in done.stdout
    assert f"{found.models[1].speed['decode_tokens_per_second']:.2f}" in done.stdout
    assert "345" in done.stdout
    assert str(tmp_path) not in (tmp_path / "results.json").read_text()
