import json
from argparse import Namespace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from evaluation import pruning
from hf_compact.calibration import builtin_text


def row(wiki: float, c4: float, **more) -> dict:
    return {"perplexity": {"wiki": wiki, "c4": c4}, "command_seconds": 60.0, "commit": "c0ffee", **more}


TOKENS = 400 * 1024

FOUND = {
    "dense": row(20.0, 30.0),
    "prune-20": row(24.0, 41.0),
    "prune-50": row(43.0, 83.0),
    "trained-dense-0.0001": row(15.0, 29.0, num_tokens=TOKENS, removed_share=0.0, held_out=10.0),
    "trained-dense-0.0003": row(14.0, 28.0, num_tokens=TOKENS, removed_share=0.0, held_out=11.0),
    "hesso-20-0.0001": row(17.0, 30.0, num_tokens=TOKENS, removed_share=0.2, held_out=10.2),
    "hesso-20-0.0003": row(16.0, 31.0, num_tokens=TOKENS, removed_share=0.2, held_out=10.1),
    "hesso-40-0.0001": row(18.0, 36.0, num_tokens=TOKENS, removed_share=0.4, held_out=12.0),
    "flap-20-trained-0.0001": row(16.5, 30.5, num_tokens=TOKENS, removed_share=0.2, held_out=10.5),
    "trained-dense-0.0001-40-steps": row(18.0, 29.0, num_tokens=TOKENS // 10, removed_share=0.0, held_out=12.0),
    "hesso-20-refit-0.0001-40-steps": row(19.8, 31.9, num_tokens=TOKENS // 10, removed_share=0.2, held_out=13.0),
    "flap-20-trained-0.0001-40-steps": row(22.0, 33.0, num_tokens=TOKENS // 10, removed_share=0.2, held_out=14.0),
    "speed": {"prefill dense": 1.4, "prefill -40 %": 1.0, "decode dense": 0.115, "decode -40 %": 0.1, "command_seconds": 1.0, "commit": ""},
    "overhead": {"callback_seconds": 0.05, "step_seconds": 1.0, "command_seconds": 1.0, "commit": ""},
    "cric": {"trained": [[0, 0]] * 2, "with": [[0.01, 0.02], [0.06, 0.0]], "without": [[2.0, 3.0], [4.0, 5.0]], "seeds": [0, 1],
             "command_seconds": 1.0, "commit": ""},
}  # fmt: skip


def test_numbers_are_held_against_their_claims(tmp_path):
    text = pruning.write(FOUND, "python -m evaluation.pruning", tmp_path)
    bars = json.loads((tmp_path / "05-pruning.json").read_text())["bars"]
    assert [bar["measured"] for bar in bars] == [
        1.2, 1.3667, 2.15, 2.7667, 1.0667, 1.069, 1.2, 1.2414, 0.9697, 1.0164, 1.1, 1.1, 0.9, 0.9667, 1.4, 1.15, 0.05, 0.06, 2.0,
    ]  # fmt: skip
    assert [bar["held"] for bar in bars] == [
        True, True, False, *[True] * 6, False, False, False, True, True, True, False, True, False, True,
    ]  # fmt: skip
    assert "| hesso-20-0.0003 | 20.0 % | 0.800 | 1.033 | 1.067 | 1.069 | 10.10 | 1.0 |" in text
    assert "| hesso-20-refit-0.0001-40-steps | 20.0 % | 0.990 | 1.063 | 1.100 | 1.100 | 13.00 | 1.0 |" in text
    assert [bar["claim"].endswith(" (40 steps)") for bar in bars] == [*[False] * 10, *[True] * 4, *[False] * 5]
    assert (tmp_path / "05-pruning.md").read_text().startswith("# Structured pruning")


@pytest.mark.parametrize(("name", "ending"), [
    ("trained-dense-0.0001", ""), ("hesso-20-0.0003", ""), ("hesso-20-refit-0.0001-40-steps", "-40-steps"),
    ("hesso-20-refit-1024-distilled-0.0003-1600-steps-own-text", "-1600-steps-own-text"), ("flap-20-trained-0.0001-own-text", "-own-text"),
    ("prune-20", None), ("prune-20-1024-own-text", None), ("hesso-20-0.001", None), ("overhead", None),
])  # fmt: skip
def test_rows_that_are_trained_alike_end_alike(name, ending):
    assert pruning.ending_of(name) == ending


@pytest.fixture
def arguments(dense_folder, tmp_path):
    texts = {}
    for name, start in (("train", 0), ("wiki", 60_000), ("c4", 80_000)):
        texts[name] = tmp_path / f"{name}.txt"
        texts[name].write_text(builtin_text("calibration")[start : start + 20_000], encoding="utf-8")
    return ["--model", str(dense_folder), "--calibration", str(texts["train"]), "--text", str(texts["wiki"]), "--text", str(texts["c4"]),
            "--work", str(tmp_path / "work"), "--quick"]  # fmt: skip


def test_the_quick_form_runs_and_goes_on(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pruning.api.verify, "verify", lambda *args: {"verified": True, "seconds": 0.0})
    trained = ["trained-dense-0.0001", "hesso-40-0.0001", "hesso-20-refit-0.0001", "flap-20-trained-0.0001"]
    steps = [*trained, "speed", "overhead", "cric"]
    chosen = [part for step in steps for part in ("--step", step)]
    assert pruning.main([*arguments, *chosen]) == 0
    assert capsys.readouterr().out.count("done: ") == 1 + len(steps)
    assert pruning.main([*arguments, *chosen]) == 0
    assert "done: " not in capsys.readouterr().out
    rows = json.loads((tmp_path / "work" / "rows.json").read_text())
    assert rows["hesso-40-0.0001-8-steps"]["removed_share"] == pytest.approx(0.4, abs=0.06)
    shares = pruning.share_of_groups(Namespace(model=arguments[1]), 0.2)
    widths = AutoModelForCausalLM.from_pretrained(tmp_path / "work" / "flap-20-trained-0.0001-8-steps").config.intermediate_size
    assert widths == round(72 * (1 - shares["channels"])) < 72
    assert rows["trained-dense-0.0001-8-steps"]["removed_share"] == 0
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "work" / "hesso-40-0.0001-8-steps").num_parameters()
        == rows["hesso-40-0.0001-8-steps"]["parameters"]
    )
    assert (tmp_path / "work" / "05-pruning.md").is_file()


def test_own_text_is_all_that_its_rows_see(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pruning.api.verify, "verify", lambda *args: {"verified": True, "seconds": 0.0})
    read, of = [], pruning.read_texts
    monkeypatch.setattr(pruning, "read_texts", lambda paths: read.append([Path(path).name for path in paths]) or of(paths))
    chosen = ["--step", "hesso-20-refit-0.0001", "--step", "flap-20-trained-0.0001"]
    assert pruning.main([*arguments, "--own-text", *chosen]) == 0
    assert capsys.readouterr().out.count("done: ") == 1 + 2 + 2  # parts of the text
    written = sorted(path.name for path in (tmp_path / "work").glob("*-text-*.txt"))
    assert [name.split("-")[0] for name in written] == ["own", "prompted"]
    assert read == [written]
    report = json.loads((tmp_path / "work" / "flap-20-own-text" / "compression_report.json").read_text())
    assert [Path(source).name for source in report["calibration"]["sources"]] == written
    rows = json.loads((tmp_path / "work" / "rows.json").read_text())
    assert {"hesso-20-refit-0.0001-8-steps-own-text", "flap-20-trained-0.0001-8-steps-own-text"} < rows.keys()


def test_steps_and_texts_are_checked(arguments, capsys):
    with pytest.raises(SystemExit):
        pruning.main([*arguments, "--step", "luck"])
    assert "--step: invalid choice: 'luck' (choose from " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        pruning.main([*arguments, "--text", "third.txt"])
    assert "--text must be given twice, got 3" in capsys.readouterr().err
