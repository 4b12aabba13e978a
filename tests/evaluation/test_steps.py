"""Steps of a measurement: kept, shared between processes, and taken over from other machines."""

import argparse
import json
import threading
from pathlib import Path

import pytest

from evaluation import steps


def rows(work: Path) -> dict:
    return json.loads((work / "rows.json").read_text())


def todo(calls: list[str], names=("dense", "a", "b")) -> dict:
    return {name: lambda name=name: calls.append(name) or {"perplexity": {"t": float(len(name))}} for name in names}


def test_steps_are_kept_and_name_where_they_ran(tmp_path):
    calls: list[str] = []
    found = steps.run(todo(calls), tmp_path / "work", ["b"])
    assert list(found) == ["dense", "b"] == calls
    assert found["b"]["machine"] == steps.machine()
    assert found["b"]["commit"] == steps.commit()
    assert steps.run(todo(calls), tmp_path / "work") == found | {"a": steps.run(todo(calls), tmp_path / "work")["a"]}
    assert calls == ["dense", "b", "a"]
    assert steps.run({}, tmp_path / "none") == {}


def test_a_step_that_another_process_is_at_is_left_and_waited_for(tmp_path):
    calls: list[str] = []
    (tmp_path / "rows").mkdir()
    with steps.taken(tmp_path / "rows" / "a.json"):
        thread = threading.Thread(target=steps.run, args=(todo(calls), tmp_path))
        thread.start()
        while len(calls) < 2:
            thread.join(0.01)
        assert calls == ["dense", "b"]
        (tmp_path / "rows" / "a.json").write_text(json.dumps({"perplexity": {"t": 7.0}}))
    thread.join(30)
    assert calls == ["dense", "b"]
    assert rows(tmp_path)["a"] == {"perplexity": {"t": 7.0}}


def test_rows_of_another_run_in_the_same_folder_stay(tmp_path):
    steps.run(todo([], ("dense", "x")), tmp_path)
    steps.run(todo([]), tmp_path)
    assert set(rows(tmp_path)) == {"dense", "x", "a", "b"}


def test_rows_of_another_machine_have_its_dense_model_as_their_base(tmp_path):
    steps.run({"dense": lambda: {"perplexity": {"t": 10.0}}, "a": lambda: {"perplexity": {"t": 12.0}}}, tmp_path / "theirs")
    found = steps.run(
        {"dense": lambda: {"perplexity": {"t": 20.0}}, "a": lambda: {"perplexity": {"t": 20.0}}}, tmp_path / "ours", ["dense"],
        others=[tmp_path / "theirs" / "rows.json"],
    )  # fmt: skip
    dense = found["dense"]["perplexity"]
    assert steps.ratio(found["a"], "t", dense) == pytest.approx(1.2)
    assert steps.ratio(found["dense"], "t", dense) == 1
    assert set(rows(tmp_path / "ours")) == {"dense"}


def test_whole_parts_of_own_text_serve_any_number(tmp_path, monkeypatch):
    calls: list[tuple[int, int, int, bool]] = []

    def written(options: argparse.Namespace, *what: int) -> dict:
        calls.append(what)
        return {"texts": [str(what[0])] * what[1]}

    monkeypatch.setattr(steps, "OWN_BATCH", 2)
    monkeypatch.setattr(steps, "written", written)
    options = argparse.Namespace(work=tmp_path)
    assert steps.own_text(options, 5, 8).read_text() == "0\n\n0\n\n1\n\n1\n\n2"
    assert steps.own_text(options, 4, 8).read_text() == "0\n\n0\n\n1\n\n1"
    assert calls == [(0, 2, 8, False), (1, 2, 8, False), (2, 1, 8, False)]
    assert steps.own_text(options, 3, 8, is_prompted=True).read_text() == "0\n\n0\n\n1"
    assert calls[3:] == [(0, 2, 8, True), (1, 1, 8, True)]


def test_windows_are_for_one_purpose_each(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("".join(map(chr, range(1000, 1400))))
    data = steps.TrainingWindows([str(text)], lambda text, **_: {"input_ids": [ord(letter) for letter in text]}, 4, 20)
    found = [data.rows, data.held_out.split(4), data.spare]
    starts = sorted(int(row[0]) for part in found for row in part)
    assert starts == list(range(1000, 1400, 4))
    assert [len(part) for part in found] == [20, 32, 48]


def test_prompts_are_pieces_of_the_texts_by_turns(tmp_path):
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for text in texts:
        text.write_text(text.stem * 100)
    rows = steps.prompts([str(text) for text in texts], lambda text, **_: {"input_ids": [ord(letter) for letter in text]}, 3)
    assert rows.tolist() == [[ord(letter)] * 64 for letter in "aba"]


def test_times_of_an_accelerator_are_not_those_of_a_cpu():
    assert steps.is_of_cpu({"device": "cpu"})
    assert not steps.is_of_cpu({"device": "cuda"})
