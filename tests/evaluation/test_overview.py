"""Every method in one table: the quick form on a tiny model, stopped and gone on with."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from evaluation import overview
from hf_compact import benchmark, cli
from hf_compact.methods import METHODS
from hf_compact.results import Results
from hf_compact.speed import SpeedConfig
from tests.tasks import write_tasks


def in_this_process(*arguments: str, log: Path) -> None:
    """The commands of the rows without a fresh interpreter for each."""
    if arguments[:2] == ("-m", "hf_compact"):
        done = CliRunner().invoke(cli.app, list(arguments[2:]))
        log.write_text(done.output)
        if done.exit_code:
            raise subprocess.CalledProcessError(done.exit_code, arguments, output=done.output.strip().splitlines()[-1])
        return
    options = list(arguments[2:])
    before, sys.argv = sys.argv, ["overview", *options]
    try:
        assert arguments[:2] == ("-m", "evaluation.overview")
        assert overview.main() == 0
    finally:
        sys.argv = before


@pytest.fixture
def one_process(monkeypatch):
    """Rows are made and measured without fresh processes, which have tests of their own."""
    monkeypatch.setattr(overview, "python", in_this_process)
    memory = {"device": "cpu", "load_seconds": 1.0, "runtime_bytes": 1, "loaded_bytes": 2, "peak_bytes": 3}
    monkeypatch.setattr(benchmark, "_memory", lambda path, work: memory)


@pytest.mark.cli
@pytest.mark.usefixtures("one_process")
def test_quick_form(dense_folder, text_file, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval")
    (tmp_path / "rows").mkdir()
    write_tasks(tmp_path / "rows")
    common = ["--model", str(dense_folder), "--calibration", str(text_file), "--text", str(text_file), "--quick", "--limit", "3",
              "--task", "piqa", "--task-data", str(tmp_path / "rows"), "--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]  # fmt: skip
    first = ["--row", "codebook-3bit"]
    monkeypatch.setattr(sys, "argv", ["overview", *common, *first])
    assert overview.main() == 0
    before = json.loads((tmp_path / "work" / "results.json").read_text())["models"]
    more = [*first, "--row", "hesso-20", "--row", "ternary"]
    (tmp_path / "work" / "ternary").write_text("in the way")
    monkeypatch.setitem(overview.ROWS, "ternary", overview.from_recipe)
    (tmp_path / "ternary.yaml").write_text("stages: [{method: ternary}]\ndistillation: null\n")
    monkeypatch.setattr(overview, "RECIPES", [tmp_path / "ternary.yaml"])
    monkeypatch.setattr(sys, "argv", ["overview", *common, *more])
    assert overview.main() == 0
    output = capsys.readouterr().out
    assert "skipped: ternary: error: output" in output
    results = Results.read(tmp_path / "results" / "08-overview.json")
    assert [model.name for model in results.models] == ["dense", "codebook-3bit", "hesso-20"]
    assert json.loads((tmp_path / "work" / "results.json").read_text())["models"][:2] == before
    dense, small, pruned = results.models
    assert small.file_bytes < dense.file_bytes
    assert pruned.num_parameters < dense.num_parameters
    for model in (small, pruned):
        assert model.compression["seconds"] > 0
        assert model.comparison["speed"]["decode"] > 0
        assert model.comparison["perplexity"][text_file.name]["kl"] > 0
        assert model.tasks["piqa"]["items"] == {}
    assert results.skipped == dict.fromkeys(overview.ROWS.keys() - {"codebook-3bit", "hesso-20"}, "not run") | {
        "ternary": results.skipped["ternary"]
    }
    table = (tmp_path / "results" / "08-overview.md").read_text()
    assert "| hesso-20 |" in table
    assert "skipped: ternary" in table
    assert "<svg" in (tmp_path / "results" / "08-overview.html").read_text()
    assert str(tmp_path) not in table


@pytest.mark.cli
@pytest.mark.usefixtures("one_process")
def test_times_alone(dense_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(overview, "SpeedConfig", lambda: SpeedConfig(prompt_tokens=5, new_tokens=3, repeats=2))
    monkeypatch.setattr(sys, "argv", ["overview", "--model", str(dense_folder), "--calibration", str(text_file), "--text", str(text_file),
        "--times", "--row", "codebook-3bit", "--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")])  # fmt: skip
    assert overview.main() == 0
    assert {path.name for path in (tmp_path / "results").iterdir()} == {"08-times.json", "08-times.md", "08-times.html"}
    results = Results.read(tmp_path / "results" / "08-times.json")
    dense, small = results.models
    assert small.comparison["speed"].keys() == {"prefill", "first_token", "decode"}
    assert (dense.perplexity, small.perplexity, small.tasks, small.compression) == ({}, {}, {}, None)
    assert results.protocol["speed"] == {"prompt_tokens": 5, "new_tokens": 3, "repeats": 2}
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--no-speed"])
    with pytest.raises(SystemExit):
        overview.main()


def test_a_row_that_was_stopped_begins_anew(tmp_path, monkeypatch):
    """A killed `recover` leaves its folder under another name, which the next one refuses to write over."""
    name = "codebook-3bit-adapter"
    for remnant in (name, f"{name}.partial"):
        (tmp_path / remnant).mkdir()
        (tmp_path / remnant / "adapter_model.safetensors").write_bytes(b"half")
    seen = []
    monkeypatch.setitem(overview.ROWS, name, lambda *_: seen.extend(tmp_path.iterdir()))
    folders, skipped = overview.make(argparse.Namespace(row=[name], work=tmp_path), "c0ffee")
    assert (folders, skipped, seen) == ([tmp_path / name], {}, [])


def test_every_method_has_a_row():
    used = set()
    for path in overview.RECIPES:
        used |= {line.split(":")[1].strip() for line in path.read_text().splitlines() if line.lstrip("- ").startswith("method:")}
    other = {"ternary"}  # converted by its script
    beside_another = {"correction"}  # measured where it is combined, in 03-tensor-network
    assert used | other | beside_another == set(METHODS)
    assert set(overview.ROWS) == {path.stem for path in overview.RECIPES} | {"codebook-3bit-adapter", "hesso-20", "ternary"}
