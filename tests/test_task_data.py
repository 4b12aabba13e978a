"""Rows in another layout become rows of the stock data sets: the harness makes the prompts and answers they stand for."""

import json
import sys

import pytest

from evaluation import steps
from hf_compact import harness
from hf_compact.errors import ConfigError

SOURCES = {
    "arc_easy.jsonl": {"query": "Question: What is hot?", "choices": ["ice", "fire", "snow"], "gold": 1},
    "openbook_qa.jsonl": {"query": "Cats eat", "choices": ["mice", "rocks"], "gold": 0},
    "piqa.jsonl": {"query": "Question: open a door\n", "choices": ["push", "sing"], "gold": 0},
    "winogrande.jsonl": {"context_options": ["Marta saw Mary, so Marta", "Marta saw Mary, so Mary"], "continuation": "left.", "gold": 1},
    "lambada_openai.jsonl": {"context": "He saw the  cat,\n\"and the", "continuation": "cat"},
    "hellaswag_val_1000.jsonl": {"ind": 1, "activity_label": "Run", "ctx_a": "He runs.", "ctx_b": "he", "ctx": "He runs. he",
                                 "split": "val", "endings": ["stops.", "flies."], "label": 1},
}  # fmt: skip
#: task -> prompt, answers (or the target), the right one
EXPECTED = {
    "arc_easy": ("Question: What is hot?\nAnswer:", ["ice", "fire", "snow"], 1),
    "openbookqa": ("Cats eat", ["mice", "rocks"], 0),
    "piqa": ("Question: open a door\nAnswer:", ["push", "sing"], 0),
    "winogrande": (1, ["Marta saw Mary, so Marta", "Marta saw Mary, so Mary"], "left."),
    "lambada_openai": ('He saw the  cat,\n"and the', None, " cat"),
    "hellaswag": ("Run: He runs. He", ["stops.", "flies."], 1),
    "sst2": ('a "fine" film \nQuestion: Is this sentence positive or negative?\nAnswer:', ["negative", "positive"], 1),
}


@pytest.fixture(scope="module")
def script():
    return steps.script("convert_task_data")


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path / "eval"
    folder.mkdir()
    for name, row in SOURCES.items():
        (folder / name).write_text(json.dumps(row) + "\n", encoding="utf-8")
    (tmp_path / "dev.tsv").write_text('sentence\tlabel\na "fine" film \t1\n', encoding="utf-8")
    return [folder, tmp_path / "dev.tsv"]


def test_the_harness_asks_what_the_rows_ask(script, sources, tmp_path):
    pytest.importorskip("lm_eval")
    assert script.convert(sources, tmp_path / "rows") == dict.fromkeys(EXPECTED, 1)
    tasks = harness.load_tasks(list(EXPECTED), tmp_path / "rows")
    for name, (prompt, choices, right) in EXPECTED.items():
        (document,) = tasks[name].eval_docs
        assert tasks[name].doc_to_text(document) == prompt, name
        assert tasks[name].doc_to_target(document) == right, name
        assert choices is None or tasks[name].doc_to_choice(document) == choices, name


def test_every_file_has_its_test(script):
    assert {*SOURCES, "dev.tsv"} == set(script.FILES)
    assert set(EXPECTED) == {task for task, _ in script.FILES.values()}


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("piqa.jsonl", {"query": "a", "choices": ["b"], "gold": 0}, r"piqa.jsonl, row 2: ValueError: not enough values"),
        ("arc_easy.jsonl", {"choices": []}, r"arc_easy.jsonl, row 2: KeyError: 'query'"),
        (
            "winogrande.jsonl",
            {"context_options": ["a _ b", "a _ c"], "continuation": "d", "gold": 0},
            "hold no underscore before it",
        ),
        (
            "winogrande.jsonl",
            {"context_options": ["a b", "a b"], "continuation": "d", "gold": 0},
            "must differ in what they end with",
        ),
        ("lambada_openai.jsonl", {"context": "a", "continuation": "b c"}, "continuation must be one word, got 'b c'"),
    ],
)
def test_a_row_that_does_not_fit_leaves_nothing_behind(script, sources, tmp_path, name, row, message):
    with (sources[0] / name).open("a") as stream:
        stream.write(json.dumps(row) + "\n")
    with pytest.raises(ConfigError, match=message):
        script.convert(sources, tmp_path / "rows")
    assert not (tmp_path / "rows").exists()


@pytest.mark.cli
def test_command(script, sources, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, sources), "--output", str(tmp_path / "rows")])
    assert script.main() == 0
    assert "winogrande: 1 rows" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(sys, "argv", ["convert", str(tmp_path / "empty"), "--output", str(tmp_path / "more")])
    assert script.main() == 2
    assert "must be, or hold, one of arc_easy.jsonl" in capsys.readouterr().err
