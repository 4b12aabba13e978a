"""lm-evaluation-harness on stock tasks from a folder: the same numbers as the harness itself."""

import builtins
import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

import hf_compact
from hf_compact import cli, harness
from hf_compact.calibration import from_batches
from hf_compact.errors import ConfigError
from tests.conftest import tiny_inputs, tiny_model
from tests.tasks import ROWS, write_tasks


@pytest.fixture(scope="module")
def task_data(tmp_path_factory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def tasks(task_data):
    pytest.importorskip("lm_eval")
    return harness.load_tasks(list(ROWS), task_data)


@pytest.fixture(scope="module")
def found(tasks, tokenizer):
    done = []
    result = harness.run_tasks(
        tiny_model("llama"), tokenizer, tasks, limit=4, batch_size=2, progress=lambda *counts: done.append(counts)
    )
    assert done[-1] == (done[-1][1],) * 2
    assert [count for count, _ in done] == list(range(1, len(done) + 1))
    return result


def test_every_row_is_in_its_columns(found):
    assert list(found) == list(ROWS)
    for name, task in found.items():
        items = task["items"]
        assert task["num_items"] == 4
        assert {len(column) for column in items.values()} == {4}
        assert len(set(items["hash"])) == 4
        assert task["metrics"]["acc"]["value"] == sum(items["acc"]) / 4
        assert task["metrics"]["acc"]["stderr"] is not None
        if name == "lambada_openai":
            assert task["metrics"]["perplexity"]["value"] == pytest.approx(math.exp(-sum(items["perplexity"]) / 4))
            continue
        for row, choice, right, is_right in zip(items["choices"], items["choice"], items["logprob"], items["acc"], strict=True):
            assert sum(map(math.exp, row)) == pytest.approx(1, abs=1e-3)
            assert row[choice] == max(row)
            assert (right == max(row)) == bool(is_right)


def test_the_harness_says_the_same_of_the_same_rows(found, tasks, task_data, tokenizer):
    """Its own model class, called directly, on the configurations that a folder is turned into."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=tiny_model("llama"), tokenizer=tokenizer, batch_size=2)
    with harness._quiet():
        loaded = list(harness.load_tasks(list(ROWS), task_data).values())
        direct = simple_evaluate(lm, tasks=loaded, limit=4, batch_size=2, task_manager=TaskManager(include_defaults=False))
    for name, task in found.items():
        for metric, value in task["metrics"].items():
            assert value["value"] == direct["results"][name][f"{metric},none"], (name, metric)
            assert value["stderr"] == direct["results"][name][f"{metric}_stderr,none"], (name, metric)


def test_stock_definitions_are_included_and_not_copied(task_data):
    pytest.importorskip("lm_eval")
    for name, config in harness.offline_configs(list(ROWS), task_data).items():
        stock = yaml.load(Path(config["include"]).read_text(), Loader=_with_functions())
        assert Path(config["include"]).parts[-4:-1].count("tasks") == 1 or "tasks" in Path(config["include"]).parts
        assert stock["task"] == name
        assert not set(config) & {"doc_to_text", "doc_to_target", "doc_to_choice", "metric_list", "process_docs", "output_type"}


def _with_functions():
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    return Loader


@pytest.mark.cli
def test_lm_eval_prints_these_numbers(found, task_data, dense_folder, tmp_path, monkeypatch):
    """The harness's own command line, which knows the model by name; without its index of all tasks, which takes a minute."""
    from lm_eval.tasks._index import TaskIndex

    monkeypatch.setattr(TaskIndex, "build", lambda self, paths: {})
    names = ["arc_easy", "winogrande"]
    files = [tmp_path / f"{name}.yaml" for name in names]
    for name, path in zip(names, files, strict=True):
        path.write_text(yaml.safe_dump(harness.offline_configs([name], task_data)[name]))
    options = [
        "--model",
        "hf_compact",
        "--model_args",
        f"pretrained={dense_folder},dtype=float32",
        "--limit",
        "4",
        "--batch_size",
        "2",
    ]
    done = CliRunner().invoke(
        cli.app, ["lm-eval", "run", *options, "--tasks", *map(str, files), "--output_path", str(tmp_path / "out.json")]
    )
    assert done.exit_code == 0, done.output
    (path,) = tmp_path.glob("out_*.json")
    written = json.loads(path.read_text())["results"]
    printed = [[cell.strip() for cell in line.split("|")] for line in done.stdout.splitlines()]
    for name in names:
        value = found[name]["metrics"]["acc"]
        assert written[name]["acc,none"] == value["value"]
        (line,) = (cells for cells in printed if name in cells)
        assert float(line[7]) == round(value["value"], 4)
        assert float(line[9]) == round(value["stderr"], 4)


def test_examples_are_shown_from_the_train_file(task_data, tmp_path, tokenizer):
    pytest.importorskip("lm_eval")
    write_tasks(tmp_path)
    with pytest.raises(
        ConfigError, match=r"num_fewshot: arc_easy has no rows to show 2 of: put arc_easy.train.jsonl into task_data"
    ):
        harness.run_tasks(tiny_model("llama"), tokenizer, harness.load_tasks(["arc_easy"], tmp_path), num_fewshot=2)
    shown = [{**row, "question": f"Shown {i}?"} for i, row in enumerate(ROWS["arc_easy"])]
    (tmp_path / "arc_easy.train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in shown))
    tasks = harness.load_tasks(["arc_easy"], tmp_path)
    result = harness.run_tasks(tiny_model("llama"), tokenizer, tasks, num_fewshot=2, limit=2)["arc_easy"]
    assert result["num_fewshot"] == 2
    assert tasks["arc_easy"].instances[0].args[0].count("Shown") == 2


def test_a_task_without_rows_to_show_takes_those_of_the_train_file(tmp_path, tokenizer):
    pytest.importorskip("lm_eval")
    name = "lambada_openai"
    write_tasks(tmp_path)
    (tmp_path / f"{name}.train.jsonl").write_text("".join(json.dumps({"text": f"Shown {i} ends here"}) + "\n" for i in range(4)))
    tasks = harness.load_tasks([name], tmp_path)
    assert harness.run_tasks(tiny_model("llama"), tokenizer, tasks, num_fewshot=2, limit=2)[name]["num_fewshot"] == 2
    assert tasks[name].instances[0].args[0].count("Shown") == 2


def test_scored_rows_are_not_shown(tmp_path, tokenizer):
    """GSM8K shows five rows by itself; MMLU takes them from a split that is not called train."""
    pytest.importorskip("lm_eval")
    rows = [{"question": f"What is {i}?", "answer": f"#### {i}"} for i in range(4)]
    choices = [{"question": f"What is {i}?", "subject": "x", "choices": ["a", "b", "c", "d"], "answer": i} for i in range(4)]
    write_tasks(tmp_path, gsm8k=rows, mmlu_anatomy=choices)
    with pytest.raises(ConfigError, match=r"num_fewshot: gsm8k has no rows to show 5 of: put gsm8k.train.jsonl into task_data"):
        harness.run_tasks(tiny_model("llama"), tokenizer, harness.load_tasks(["gsm8k"], tmp_path))
    result = harness.run_tasks(tiny_model("llama"), tokenizer, harness.load_tasks(["gsm8k"], tmp_path), num_fewshot=0, limit=1)
    first = next(iter(result["gsm8k"]["metrics"]))
    assert first.startswith("exact_match,")
    assert first in result["gsm8k"]["items"]
    write_tasks(tmp_path, **{"mmlu_anatomy.train": [row | {"question": "Shown?"} for row in choices]})
    tasks = harness.load_tasks(["mmlu_anatomy"], tmp_path)
    harness.run_tasks(tiny_model("llama"), tokenizer, tasks, num_fewshot=2, limit=1)
    assert tasks["mmlu_anatomy"].instances[0].args[0].count("Shown?") == 2


def test_the_hub_out_of_reach_is_said(monkeypatch):
    pytest.importorskip("lm_eval")
    from lm_eval.tasks._index import TaskIndex

    build = TaskIndex.build
    monkeypatch.setattr(TaskIndex, "build", lambda self, paths: build([paths[0] / "piqa"]))
    with pytest.raises(ConfigError, match=r"stock task piqa cannot use its rows \(from the Hub; offline, give task_data\)"):
        harness.load_tasks(["piqa"])
    with pytest.raises(ConfigError, match="lm-evaluation-harness has no task 'arc_easy'"):
        harness.load_tasks(["arc_easy"])


def test_what_cannot_work_is_said_before_a_model_is_opened(task_data, tmp_path, tokenizer):
    pytest.importorskip("lm_eval")
    with pytest.raises(ConfigError, match="has no task 'arc_eazy'"):
        harness.load_tasks(["arc_eazy"], task_data)
    with pytest.raises(ConfigError, match=r"task_data must hold boolq.jsonl, .* has no such file"):
        harness.load_tasks(["boolq"], task_data)
    with pytest.raises(ConfigError, match="tasks must name each task once, got 'piqa,piqa'"):
        harness.load_tasks(["piqa", "piqa"], task_data)
    write_tasks(tmp_path, piqa=[{"query": "a", "choices": ["b", "c"], "gold": 0}])
    with pytest.raises(ConfigError, match=r"stock task piqa cannot use its rows \(piqa.jsonl\): 'goal' is undefined"):
        harness.load_tasks(["piqa"], tmp_path)
    (tmp_path / "piqa.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"task_data must hold rows in piqa.jsonl, that of .* is empty"):
        harness.load_tasks(["piqa"], tmp_path)
    (tmp_path / "piqa.jsonl").write_text("{no json\n")
    with pytest.raises(ConfigError, match=r"stock task piqa cannot use its rows \(piqa.jsonl\): JSON parse error"):
        harness.load_tasks(["piqa"], tmp_path)
    write_tasks(tmp_path, winogrande=[*ROWS["winogrande"], {**ROWS["winogrande"][0], "sentence": "no gap"}])
    tasks = harness.load_tasks(["winogrande"], tmp_path)
    with pytest.raises(ConfigError, match="tasks: a row does not fit its task: ValueError: substring not found"):
        harness.run_tasks(tiny_model("llama"), tokenizer, tasks)


def test_without_the_harness_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.partition(".")[0] == "lm_eval":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ConfigError, match=r"tasks need lm-evaluation-harness: pip install 'hf_compact\[eval\]'"):
        harness.load_tasks(["piqa"])


def test_compressed_models_are_taken_by_name(tokenizer, tmp_path, tasks):
    model = tiny_model("llama")
    stages = [{"method": "codebook", "bits": 3, "rounding": "nearest"}]
    hf_compact.compress(model, {"stages": stages}, calibration=from_batches([tiny_inputs("llama")]))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    lm = harness.register()(str(tmp_path), batch_size=1)
    assert lm.model.dtype == torch.bfloat16
    assert type(lm.model.model.layers[0].mlp.up_proj).__name__ == "CodebookLinear"
    assert lm.tokenizer.bos_token == "<s>"
    assert harness.register()(str(tmp_path), batch_size=1, device="meta").model.device.type == "meta"
    with pytest.raises(ConfigError, match="hf_compact does not read peft, revision: pretrained names the folder"):
        harness.register()(str(tmp_path), batch_size=1, peft="adapter", revision="v1")
