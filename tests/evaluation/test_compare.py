"""The table of several results, and the page as a browser shows it."""

import copy
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from evaluation import compare
from hf_compact.errors import ConfigError
from hf_compact.results import ModelResult, Results
from hf_compact.results import compare as paired

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def items(answers: str) -> dict:
    rows = [f"row{number}" for number in range(len(answers))]
    return {
        "hash": rows,
        "acc": [float(answer == "+") for answer in answers],
        "choice": [int(answer == "+") for answer in answers],
    }


def task(answers: str) -> dict:
    value = answers.count("+") / len(answers)
    return {"metrics": {"acc": {"value": value, "stderr": 0.1}}, "num_items": len(answers), "num_fewshot": 0, "version": 1.0, "items": items(answers)}  # fmt: skip


def model(name: str, size: int, losses: list[float], answers: str) -> ModelResult:
    mean = sum(losses) / len(losses)
    text = {"perplexity": round(2.718281828**mean, 6), "mean_nll": mean, "window_nll": losses, "num_tokens": 30}
    return ModelResult(
        name=name, fingerprint=name, dtype="bfloat16", file_bytes=size, num_parameters=10**6, perplexity={"wiki": text},
        tasks={"piqa": task(answers), "sst2": task(answers[::-1])},
        speed={"prefill_tokens_per_second": 100.0, "decode_tokens_per_second": 10.0, "first_token_seconds": 0.5},
        memory={"peak_bytes": 3e8, "runtime_bytes": 2e8, "load_seconds": 1.5, "loaded_bytes": 2e8},
    )  # fmt: skip


def results(*models: ModelResult, **protocol) -> Results:
    windows = {"window_length": 16, "num_windows": 4, "stride": None, "bos": False}
    stated = {
        "windows": windows, "texts": {"wiki": "c0ffee"}, "tasks": ["piqa", "sst2"], "task_data": {}, "limit": None, "num_fewshot": None,
        "batch_size": 8, "dtype": "auto", "device": "cpu", "speed": {"prompt_tokens": 8, "new_tokens": 4, "repeats": 3},
    } | protocol  # fmt: skip
    machine = {"processor": "a processor", "cores": 2, "threads": 1, "memory_bytes": 1}
    return Results(protocol=stated, machine=machine, versions={"lm_eval": "0.4.13"}, base=models[0].name, models=list(models))


@pytest.fixture
def both() -> Results:
    base, small = model("dense", 4_000_000, [3.0, 2.0, 2.5], "++-+"), model("<4 bit> & small", 1_000_000, [3.1, 2.2, 2.5], "++--")
    small.comparison = paired(small, base) | {"speed": {"prefill": 0.5, "first_token": 0.6, "decode": 2.0}}
    small.compression = {"seconds": 12.0}
    found = results(base, small)
    found.skipped = {"another": "no module"}
    return found


def test_table_has_values_errors_and_paired_differences(both):
    lines = compare.markdown(both).splitlines()
    assert lines[0] == (
        "| model | MB | bits per parameter | perplexity, wiki | piqa, acc | sst2, acc | mean of the tasks | prefill, tokens/s | "
        "decode, tokens/s | first token, s | peak MB | load, s | compression, s |"
    )
    cells = [cell.strip() for cell in lines[3].split("|")]
    assert cells[1:4] == ["<4 bit> & small", "1.0", "8.00"]
    assert cells[4] == "13.464 (× 1.1052 ± 0.0638)"
    assert cells[5] == "0.5000 ± 0.1000 (-0.2500 ± 0.2500, 75.0 % alike)"
    assert cells[7:10] == ["0.5000", "100.0 (× 0.50)", "10.0 (× 2.00)"]
    assert cells[11:14] == ["300 (200 before loading)", "1.5", "12"]
    assert [cell.strip() for cell in lines[2].split("|")][5] == "0.7500 ± 0.1000"
    assert lines[-1] == "- skipped: another: no module"


def test_files_are_joined_by_model(both):
    more = results(model("dense", 4_000_000, [3.0, 2.0, 2.5], "++-+"), model("third", 2_000_000, [4.0, 2.0, 2.5], "----"))
    only_text = results(model("fourth", 500_000, [5.0, 5.0, 5.0], "++++"), tasks=[], speed=None)
    only_text.models[0].tasks, only_text.models[0].speed = {}, None
    merged = compare.merge([("a", both), ("b", more), ("c", only_text)])
    assert [m.name for m in merged.models] == ["dense", "<4 bit> & small", "third", "fourth"]
    assert merged.base == "dense"
    last = [cell.strip() for cell in compare.markdown(merged).splitlines()[5].split("|")]
    assert last[4:8] == ["148.413", "", "", ""]


def test_rows_of_another_machine_say_so(both):
    there = results(
        model("third", 2_000_000, [4.0, 2.0, 2.5], "----"), model("fourth", 1_000_000, [4.0, 2.0, 2.5], "----"), speed=None
    )
    there.machine = there.machine | {"accelerator": "an accelerator"}
    lines = compare.markdown(compare.merge([("a", both), ("b", there)])).splitlines()
    assert "- a processor, 1 of 2 cores, lm_eval 0.4.13" in lines
    assert "- an accelerator, 1 of 2 cores: third, fourth, held against the base there" in lines
    again = compare.markdown(compare.merge([("b", there), ("merged", compare.merge([("a", both), ("b", there)]))])).splitlines()
    assert [line for line in again if "1 of 2 cores" in line and not line.startswith("- speed")] == [
        "- an accelerator, 1 of 2 cores, lm_eval 0.4.13",
        "- a processor, 1 of 2 cores: dense, <4 bit> & small, held against the base there",
    ]
    assert not any("held against the base there" in line for line in compare.markdown(both).splitlines())


def test_times_say_their_dtype_and_machine(both):
    untimed = results(*both.models, speed=None, dtype="bfloat16")
    timed = results(*(copy.deepcopy(model) for model in both.models), dtype="float32", texts={}, tasks=[])
    for model_of in untimed.models:
        model_of.speed = None
    timed.machine = timed.machine | {"processor": "another"}
    merged = compare.merge([("a", untimed), ("b", timed)])
    (line,) = (line for line in compare.stated(merged) if line.startswith("speed"))
    assert "float32 on another, 1 of 2 cores" in line
    assert compare.stated(compare.merge([("merged", merged)])) == compare.stated(merged)
    other = results(model("third", 1, [1.0, 1.0], "+"), dtype="bfloat16", texts={}, tasks=[])
    other.machine = timed.machine
    with pytest.raises(ConfigError, match="speed was not measured alike in b and c: dtype 'float32' and 'bfloat16'"):
        compare.merge([("a", untimed), ("b", timed), ("c", other)])


def test_the_first_file_tells_what_several_have_measured(both):
    again = results(model("dense", 4_000_000, [9.0, 9.0, 9.0], "----"), speed=None, texts={"wiki": "c0ffee", "c4": "beef"})
    again.models[0].perplexity["c4"] = again.models[0].perplexity["wiki"]
    again.machine = again.machine | {"processor": "another"}
    dense = compare.merge([("a", both), ("b", again)]).models[0]
    assert dense.perplexity["wiki"] == both.models[0].perplexity["wiki"]
    assert dense.tasks["piqa"] == both.models[0].tasks["piqa"]
    assert "c4" in dense.perplexity
    assert dense.provenance["measured_on"] == "another, 1 of 2 cores"


def test_numbers_in_a_column_are_measured_alike(both):
    windows = {**both.protocol["windows"], "stride": 4}
    with pytest.raises(ConfigError, match="wiki was not measured alike in a and b: windows "):
        compare.merge([("a", both), ("b", results(model("x", 1, [1.0, 1.0], "+"), windows=windows))])
    with pytest.raises(ConfigError, match="piqa was not measured alike in a and b: limit None and 5"):
        compare.merge([("a", both), ("b", results(model("x", 1, [1.0, 1.0], "+"), limit=5))])
    other = model("dense", 1, [1.0, 1.0], "+")
    other.fingerprint = "another"
    with pytest.raises(ConfigError, match="dense is not the same model in a and b: rename one folder"):
        compare.merge([("a", both), ("b", results(other))])
    with pytest.raises(ConfigError, match="no results were given"):
        compare.merge([])


class Page(HTMLParser):
    """What a page refers to, and its text by element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links, self.texts, self.stack = [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.stack.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href") and not value.startswith("#")]

    def handle_endtag(self, tag):
        while self.stack and self.stack.pop() != tag:
            pass

    def handle_data(self, data):
        if self.stack:
            self.texts.setdefault(self.stack[-1], []).append(data.strip())


def test_page_needs_nothing_else(both):
    text = compare.page(both, "A & B")
    page = Page(text)
    assert page.links == []
    assert "url(http" not in text
    assert page.texts["h1"] == ["A & B"]
    assert "<4 bit> & small" in page.texts["td"]
    assert "-0.2500 ± 0.2500, 75.0 % alike" in page.texts["small"]
    assert len(re.findall("<svg", text)) == 2
    assert {"perplexity on wiki", "mean of the tasks", "piqa, acc", "sst2, acc"} <= set(page.texts["text"])
    assert compare.page(both, "A & B") == text


def test_names_are_no_formulas_and_end_no_cell():
    base, odd = model("dense", 4_000_000, [3.0, 2.0, 2.5], "++-+"), model("a$x^$ | b", 1_000_000, [3.1, 2.2, 2.5], "++--")
    text = compare.page(results(base, odd), "Models")
    assert "a$x^$ | b" in Page(text).texts["text"]
    (row,) = (line for line in compare.markdown(results(base, odd)).splitlines() if "x^" in line)
    assert row.startswith("| a$x^$ \\| b | 1.0 |")


def test_a_page_of_several_files_states_what_each_has_measured(both):
    texts, tasks = results(both.models[0], tasks=[], speed=None), results(both.models[1], texts={})
    merged = compare.merge([("a", texts), ("b", tasks)])
    assert [note.split(":")[0] for note in compare.stated(merged)[:3]] == ["perplexity", "tasks", "speed"]
    other = results(both.models[1], texts={"c4": "beef"}, windows={**both.protocol["windows"], "num_windows": 5})
    with pytest.raises(ConfigError, match="perplexity was not measured alike in a and b: windows "):
        compare.merge([("a", texts), ("b", other)])


def test_what_was_not_compared_is_left_out(both):
    for found in both.models:
        found.tasks["piqa"]["items"] = {"hash": found.tasks["piqa"]["items"]["hash"]}
    both.models[1].comparison = paired(both.models[1], both.models[0]) | {"speed": None}
    table = compare.markdown(both)
    assert (table.count("% alike"), table.count("not finite")) == (1, 0)  # of sst2


def test_what_is_not_finite_is_said_and_not_drawn(both):
    both.models[1].perplexity["wiki"]["perplexity"] = None
    both.models[1].comparison["perplexity"]["wiki"]["ratio"] = None
    assert "| not finite |" in compare.markdown(both)
    assert "perplexity on wiki" not in [axes.get_ylabel() for axes in compare.pictures(both)["pareto"].axes]
    for found in both.models:
        task = found.tasks["piqa"]
        task["metrics"], task["items"]["perplexity"] = {"perplexity": task["metrics"]["acc"]}, task["items"].pop("acc")
    task["metrics"]["perplexity"]["value"] = task["items"]["perplexity"][0] = None
    both.models[1].comparison = paired(both.models[1], both.models[0]) | {"speed": None}
    both = Results.from_dict(both.to_dict())
    assert "| not finite (not finite) |" in compare.markdown(both)
    assert "pareto" not in compare.pictures(both)


@pytest.mark.cli
def test_command(both, tmp_path, monkeypatch, capsys):
    both.write(tmp_path / "results.json")
    outputs = [tmp_path / "table.html", tmp_path / "table.md", tmp_path / "table.json"]
    arguments = [str(tmp_path / "results.json"), *(word for path in outputs for word in ("--output", str(path)))]
    monkeypatch.setattr(sys, "argv", ["compare", *arguments])
    assert compare.main() == 0
    assert outputs[1].read_text() == f"# Compressed models\n\n{compare.markdown(both)}"
    assert Results.read(outputs[2]) == compare.merge([("results.json", both)])
    (tmp_path / "results.json").write_text("{}")
    assert compare.main() == 2
    assert "error: results_version must be 1, got None" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["compare", "a.json", "--output", "a.txt"])
    with pytest.raises(SystemExit):
        compare.main()
    assert "--output must end in .html, .md or .json, got 'a.txt'" in capsys.readouterr().err


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine to open the page in")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_page_in_a_browser(both, tmp_path):
    """Opened from the disk without a network: the table and both pictures are laid out and painted."""
    path, picture = tmp_path / "table.html", tmp_path / "page.png"
    probe = """<script>
        const boxes = [...document.querySelectorAll("table, figure svg")].map(e => e.getBoundingClientRect());
        document.body.dataset.found = JSON.stringify({
            boxes: boxes.map(b => [b.width, b.height]), rows: document.querySelectorAll("tbody tr").length,
            bars: document.querySelectorAll("#tasks svg path").length, width: document.documentElement.scrollWidth,
        });
    </script>"""
    path.write_text(compare.page(both, "Models").replace("</body>", probe + "</body>"), encoding="utf-8")
    common = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
              "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1600,1400"]  # fmt: skip
    url = path.as_uri()
    shown = subprocess.run([*common, "--dump-dom", url], capture_output=True, text=True, check=True, timeout=240).stdout
    found = json.loads(re.search(r'data-found="([^"]*)"', shown)[1].replace("&quot;", '"'))
    assert found["rows"] == 2
    assert len(found["boxes"]) == 3
    assert all(width > 300 and height > 60 for width, height in found["boxes"])
    assert found["bars"] > 10
    assert found["width"] <= 1600
    subprocess.run([*common, f"--screenshot={picture}", url], capture_output=True, check=True, timeout=240)
    pixels = np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3)
    assert (pixels != 255).any(1).mean() > 0.01
    assert (np.abs(pixels.astype(int) - (0x1F, 0x77, 0xB4)).max(1) < 60).sum() > 1000
