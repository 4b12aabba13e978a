"""The comparison on GLUE: the files it reads, what is compared with what, and rows that are never lost."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from evaluation import steps
from tests.conftest import VOCABULARY

PATH = Path(__file__).parents[3] / "scripts" / "glue_compacter.py"
TINY = {"hypercomplex_division": 4, "reduction_factor": 8, "rank": 2}


@pytest.fixture(scope="module")
def script():
    return steps.script("glue_compacter")


@pytest.fixture(scope="module")
def config():
    return transformers.BertConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY, num_labels=2,
        max_position_embeddings=128, pad_token_id=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, tokenizer, config):
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    """The four tasks in the forms that their authors gave them."""
    folder = tmp_path_factory.mktemp("glue")

    def table(name, rows):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        with path.open("w", encoding="utf-8", newline="") as stream:
            csv.writer(stream, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None).writerows(rows)

    for name in ("train_full.tsv", "dev.tsv"):
        table(f"SST-2/{name}", [("sentence", "label"), *[(f'a "fine" film {i}', i % 2) for i in range(12)]])
    for name in ("train", "test"):
        table(f"MRPC/msr_paraphrase_{name}.txt", [("\ufeffQuality", "#1 ID", "#2 ID", "#1", "#2"), (1, 8, 9, "one", "two")])
    for name in ("in_domain_train", "in_domain_dev", "out_of_domain_dev"):
        table(f"CoLA/{name}.tsv", [("gj04", 0, "*", name)])
    for name in ("train", "val"):
        (folder / "RTE").mkdir(exist_ok=True)
        row = {"premise": name, "hypothesis": "h", "label": "not_entailment"}
        (folder / "RTE" / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    return folder


@pytest.mark.parametrize(
    ("task", "train", "validation"),
    [
        ("SST-2", (1, 'a "fine" film 11', None), (1, 'a "fine" film 11', None)),
        ("MRPC", (1, "one", "two"), (1, "one", "two")),
        ("CoLA", (0, "in_domain_train", None), (0, "out_of_domain_dev", None)),
        ("RTE", (1, "train", "h"), (1, "val", "h")),
    ],
)
def test_last_rows_of_a_task(script, glue, task, train, validation):
    parts = script.read_task(task, glue)
    assert (parts[0][-1], parts[1][-1]) == (train, validation)


def test_lora_has_no_fewer_trained_parameters(script, config):
    def trained(method):
        model = script.adapted(transformers.BertForSequenceClassification(config), method, TINY)
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    counts = {method: trained(method) for method in script.METHODS}
    assert counts["compacter++"] < counts["compacter"] <= counts["lora"] < counts["compacter"] + 2 * 2 * 2 * 48
    assert counts["full"] == sum(p.numel() for p in transformers.BertForSequenceClassification(config).parameters())


@pytest.mark.cli
def test_a_run_leaves_its_row_and_a_table(encoder, glue, tmp_path):
    command = [
        sys.executable,
        str(PATH),
        "--quick",
        "--model",
        encoder,
        "--data",
        glue,
        "--task",
        "SST-2",
        "--method",
        "compacter",
    ]
    command += ["--no-bf16", "--work", tmp_path, "--hypercomplex-division", "4"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert (row["examples"], row["validation_examples"], row["settings"]["hypercomplex_division"]) == (12, 12, 4)
    assert 0 <= row["accuracy"] <= 1
    assert f"{row['trainable_parameters']:,}" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "plot.png").exists()


def test_rows_are_kept_and_only_missing_ones_run(script, tmp_path, monkeypatch, capsys):
    asked = []

    def answer(command, **kwargs):
        task, method, seed = (command[command.index(f"--{name}") + 1] for name in ("task", "method", "seed"))
        if method == "lora" and len(asked) == 1:
            raise subprocess.CalledProcessError(1, command)
        asked.append((task, method))
        row = {"task": task, "method": method, "seed": int(seed), "accuracy": 0.5, "trainable_parameters": 10, "seconds": 1.0}
        row |= {"peak_memory_bytes": 1e6, "seconds_per_epoch": 1.0}
        return subprocess.CompletedProcess(command, 0, json.dumps(row))

    monkeypatch.setattr(subprocess, "run", answer)
    arguments = ["glue", "--work", str(tmp_path), "--task", "SST-2", "--method", "full", "lora", "--seed", "0"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match="a run ended with exit code 1; what it said is above"):
        script.main()
    assert asked == [("SST-2", "full")]
    asked.append(None)
    assert script.main() == 0
    assert asked == [("SST-2", "full"), None, ("SST-2", "lora")]
    assert "| SST-2 | lora | 50.00 (0.00) | 10 | 100.000 % | 1 | 1.0 |" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*arguments, "--rank", "3"])
    with pytest.raises(SystemExit, match="holds rows of other settings"):
        script.main()
