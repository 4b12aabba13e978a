"""The command line: the forms that are documented, and one clear line for whatever cannot work."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

import hf_compact
from hf_compact import api, cli, verify
from hf_compact.calibration import builtin_text, from_batches
from hf_compact.errors import VerificationError
from tests.conftest import FAMILIES, tiny_inputs, tiny_model

pytestmark = pytest.mark.cli

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))
RECIPE = """
stages:
- {method: codebook, bits: 3, group_size: 16, refit_rounds: 1, shrink_steps: 4}
calibration: {num_sequences: 4, sequence_length: 32, batch_size: 2}
"""


def run(*arguments: object):
    """The command in this process; a wide terminal, so that lines are not broken."""
    return CliRunner(env={"COLUMNS": "300", "TERM": "dumb"}).invoke(cli.app, [str(argument) for argument in arguments])


def really_run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "hf_compact", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("texts")
    for name, part in (("a.txt", "calibration"), ("b.txt", "evaluation")):
        (folder / name).write_text(builtin_text(part)[:30_000], encoding="utf-8")
    return folder / "a.txt", folder / "b.txt"


@pytest.fixture(scope="module")
def compressed(dense_folder, recipe, texts, tmp_path_factory):
    """One real run, and its folder."""
    output = tmp_path_factory.mktemp("cli") / "small"
    options = ["--calibration", texts[0], "--calibration", texts[1], "--seed", 3]
    done = really_run("compress", dense_folder, "--recipe", recipe, "--output", output, *options)
    assert done.returncode == 0, done.stderr
    return output, done


def assert_one_line(done, message: str) -> None:
    """Exit code 2, one line on stderr that holds the message, no traceback."""
    code = done.returncode if isinstance(done, subprocess.CompletedProcess) else done.exit_code
    assert code == 2, done.stderr
    # PEFT imports bitsandbytes where it is installed, which says on a CPU what it lacks.
    others = ("compressing:", "scoring:", "planning:", "Failed to load CPU gemm")
    lines = [line for line in done.stderr.splitlines() if not line.startswith(others)]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert "Traceback" not in done.stderr + done.stdout


# What works.


def test_the_command_is_installed():
    found = [entry for entry in entry_points(group="console_scripts") if entry.name == "hf-compact"]
    assert [entry.value for entry in found] == ["hf_compact.cli:main"]
    assert found[0].load() is cli.main


def test_compress(compressed):
    output, done = compressed
    assert "compressing: 0/4 embeddings" in done.stderr
    assert "compressing: 4/4 finished" in done.stderr
    assert "yes, in a fresh process" in done.stdout
    assert "perplexity of held-out text" in done.stdout
    report = hf_compact.Report.read(output / "compression_report.json")
    assert report.is_verified
    assert report.recipe["seed"] == 3
    assert report.calibration["sources"] == ["a.txt", "b.txt"]
    assert f"{report.body_bits_per_weight:.3f} bits per weight" in done.stdout


def test_inspect_says_what_the_report_says(compressed):
    output, _ = compressed
    report = hf_compact.Report.read(output / "compression_report.json")
    done = run("inspect", output, "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    for name in ("num_parameters", "file_bytes", "body_bits_per_weight", "file_bits_per_weight"):
        assert found[name] == getattr(report, name), name
    for name in ("share_of_fp32", "share_of_bf16"):
        assert found[name] == report.totals()[name]
    assert {layer["name"]: layer["bytes"] for layer in found["layers"]} == {la.name: la.compressed_bytes for la in report.layers}
    assert {layer["name"]: layer["bits_per_weight"] for layer in found["layers"]} == {
        layer.name: layer.bits_per_weight for layer in report.layers
    }
    assert found["is_verified"] is True
    assert found["file_bytes"] == sum(path.stat().st_size for path in output.glob("*.safetensors"))
    table = run("inspect", output).stdout
    assert f"body: {report.body_bits_per_weight:.3f} bits per weight" in table
    assert "verified: yes" in table
    assert "model.layers.2.mlp.down_proj" in table


def test_a_table_is_as_wide_as_the_terminal_is_now(compressed):
    """GNU readline, which pytest imports, exports COLUMNS=80 to the processes it starts: an import must not read it."""
    code = "import os\nfrom hf_compact import cli\nos.environ['COLUMNS'] = '300'\ncli.app()"
    command = [sys.executable, "-c", code, "inspect", str(compressed[0])]
    done = subprocess.run(command, env={**os.environ, "COLUMNS": "80"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "model.layers.2.mlp.down_proj" in done.stdout


def test_plan_says_what_is_written(compressed, dense_folder, recipe):
    output, _ = compressed
    found = api.plan(dense_folder, recipe)
    assert found["bytes_after"] == tensor_bytes(output)
    done = run("plan", dense_folder, "--recipe", recipe)
    assert done.exit_code == 0, done.stderr
    assert f"{found['bytes_before'] / 1e6:.1f} MB → {found['bytes_after'] / 1e6:.1f} MB" in done.stdout
    assert "read block by block" in done.stdout
    assert "skipped: model.norm.weight (not a Linear of a block: stays in the model's dtype)" in done.stdout


def tensor_bytes(folder: Path) -> int:
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as handle:
            total += sum(handle.get_tensor(name).nbytes for name in handle.keys())  # noqa: SIM118
    return total


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, torch.float32) for family in FAMILIES), *((family, torch.bfloat16) for family in ("llama", "gpt2", "t5"))],
    ids=str,
)
def test_plan_is_exact_in_every_family(family, dtype, tmp_path):
    settings = {"float32": {"bits": 3}, "bfloat16": {"bits": 2, "embedding_bits": 4, "embedding_group_size": 9}}
    stage = {"method": "codebook", "rounding": "nearest", **settings[str(dtype).removeprefix("torch.")]}
    model = tiny_model(family, dtype)
    model.save_pretrained(tmp_path / "dense")
    found = api.plan(tmp_path / "dense", {"stages": [stage]})
    report = hf_compact.compress(model, {"stages": [stage]}, calibration=from_batches([tiny_inputs(family)]))
    model.save_pretrained(tmp_path / "small")
    assert found["bytes_before"] == tensor_bytes(tmp_path / "dense")
    assert found["bytes_after"] == tensor_bytes(tmp_path / "small")
    assert {layer["name"]: layer["compressed_bytes"] for layer in found["layers"]} == {
        layer.name: layer.compressed_bytes for layer in report.layers
    }
    assert found["body_bits_per_weight"] == report.body_bits_per_weight
    assert found["num_parameters"] == report.num_parameters


@pytest.mark.parametrize(
    "stage",
    [{"embedding_bits": None}, {"grid": "learned", "bits": 2}, {"include": ["*.mlp.*"], "exclude": ["*.down_proj"]}, {"symmetric": True, "group_size": None}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "llama_untied"])
def test_plan_is_exact_for_every_setting(family, stage, tmp_path):
    stage = {"method": "codebook", "rounding": "nearest"} | stage
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "dense")
    found = api.plan(tmp_path / "dense", {"stages": [stage]})
    hf_compact.compress(model, {"stages": [stage]}, calibration=from_batches([tiny_inputs(family)]))
    model.save_pretrained(tmp_path / "small")
    assert found["bytes_after"] == tensor_bytes(tmp_path / "small")
    skipped = {entry["name"] for entry in found["skipped"]}
    assert not skipped & {layer["name"] for layer in found["layers"]}
    assert ("model.embed_tokens" in skipped) == (stage.get("embedding_bits", 8) is None)


def test_there_are_recipes():
    assert len(RECIPES) >= 3


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_plans(path, dense_folder):
    done = run("plan", dense_folder, "--recipe", path)
    assert done.exit_code == 0, done.stderr
    assert "bits per weight" in done.stdout


PLAN_OPTIONS = ["--target-size", "45 kB", "--tokens", 64]


@pytest.fixture(scope="module")
def candidates(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("candidates") / "candidates.yaml"
    stages = "".join(
        f"- {{method: codebook, bits: {bits}, group_size: 16, refit_rounds: 0, shrink_steps: 2}}\n" for bits in (2, 3, 4, 8)
    )
    path.write_text(f"stages:\n{stages}calibration: {{num_sequences: 4, sequence_length: 32, batch_size: 2}}\n")
    return path


def test_plan_for_a_budget(dense_folder, candidates, texts, tmp_path):
    options = ["--candidates", candidates, "--output", tmp_path / "recipe.yaml", "--plot", tmp_path / "front.png", "--validate"]
    done = run("plan", dense_folder, *PLAN_OPTIONS, "--calibration", *texts, *options)
    assert done.exit_code == 0, done.stderr
    assert "planning: 0/4 embeddings" in done.stderr
    assert "planning: 4/4 validation" in done.stderr
    assert "forecast" in done.stdout
    assert "measured" in done.stdout
    assert "codebook, embedding only" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["front.png", "recipe.sensitivity.json", "recipe.yaml"]
    dry = run("plan", dense_folder, "--recipe", tmp_path / "recipe.yaml")
    assert dry.exit_code == 0, dry.stderr
    assert "model.embed_tokens" in dry.stdout
    found = api.plan(dense_folder, tmp_path / "recipe.yaml")
    assert f"{found['body_bits_per_weight']:.3f}" in done.stdout
    assert found["bytes_after"] < 45_000


def test_plan_for_a_budget_fails_in_one_line(dense_folder, candidates, texts, tmp_path):
    output = tmp_path / "recipe.yaml"
    cases = [
        (["--target-size", "forty"], "target_size must be a number of bytes with or without a unit, like 40MB, 38e6 or 36MiB, got 'forty'"),
        (["--target-size", "1kB"], "target_size must be between 0.0"),
        (["--target-bpw", "99"], "bits for these candidates, got 99"),
        (["--max-ppl-increase", "10"], "max_ppl_increase must be a percentage above 0, like 10%, got '10'"),
        (["--target-bpw", "3", "--data-free", "--validate"], "data_free proposes from the weights alone: validate needs"),
        (["--target-bpw", "3", "--tokens", "0"], "num_tokens must be at least 1, got 0"),
        (["--target-bpw", "3", "--plot", tmp_path / "no" / "front.png"], "front.png' cannot be created: its folder must exist"),
        (["--target-bpw", "4", "--cache", texts[0]], "a.txt is not a table of errors that can be read"),
    ]  # fmt: skip
    for options, message in cases:
        done = run("plan", dense_folder, "--candidates", candidates, "--output", output, "--calibration", texts[0], *options)
        assert_one_line(done, message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["repeated", "listed", "equals", "options first"])
def test_evaluate(form, compressed, dense_folder, texts, tmp_path):
    output, _ = compressed
    a, b = texts
    options = {
        "repeated": [dense_folder, output, "--text", a, "--text", b],
        "listed": [dense_folder, output, "--text", a, b],
        "equals": [dense_folder, output, f"--text={a}", b],
        "options first": ["--text", a, "--text", b, dense_folder, output],
    }[form]
    done = run("evaluate", *options, "--windows", 3, "--window-length", 64, "--json", tmp_path / "scores.json")
    assert done.exit_code == 0, done.stderr
    rows = json.loads((tmp_path / "scores.json").read_text())
    assert [(row["model"], row["text"]) for row in rows] == [(str(m), str(t)) for m in (dense_folder, output) for t in (a, b)]
    for row in rows:
        assert (row["num_windows"], row["window_length"], row["num_tokens"]) == (3, 64, 3 * 63)
        first = next(other for other in rows if other["text"] == row["text"])
        assert row["ratio"] == row["perplexity"] / first["perplexity"]
        assert f"{row['perplexity']:.3f}" in done.stdout
    assert rows[2]["file_bytes"] == sum(path.stat().st_size for path in output.glob("*.safetensors"))
    assert "scoring: 3/3" in done.stderr


def test_calibration_takes_several_files_too(dense_folder, texts, recipe, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        api, "compress", lambda *args, **kwargs: seen.update(kwargs) or hf_compact.Report(model="", family="", recipe={})
    )
    done = run("compress", dense_folder, "--calibration", *texts, "--recipe", recipe, "--output", tmp_path / "small")
    assert done.exit_code == 0, done.stderr
    assert seen["calibration"] == list(texts)


@pytest.mark.parametrize("command", ["compress", "plan", "evaluate", "inspect"])
def test_help_has_an_example(command):
    done = run(command, "--help")
    assert done.exit_code == 0
    assert "Example" in done.stdout
    assert f"hf-compact {command} " in done.stdout.partition("Example")[2]


def test_help_lists_the_commands():
    done = run("--help")
    assert done.exit_code == 0
    assert all(command in done.stdout for command in ("compress", "plan", "evaluate", "inspect"))


def test_inspect_gives_shapes_as_out_and_in(tmp_path):
    """GPT-2's own layers store their weights the other way round."""
    model = tiny_model("gpt2")
    stages = [{"method": "codebook", "rounding": "nearest"}]
    hf_compact.compress(model, {"stages": stages}, calibration=from_batches([tiny_inputs("gpt2")]))
    model.save_pretrained(tmp_path)
    shapes = {layer["name"]: layer["shape"] for layer in json.loads(run("inspect", tmp_path, "--json").stdout)["layers"]}
    assert shapes["transformer.h.0.mlp.c_fc"] == [128, 32]
    assert shapes["transformer.wte"] == [384, 32]


# What cannot work.

STAGE = "{method: codebook, bits: 4}"
BAD_RECIPES = {
    "half-bits": ("stages: [{method: codebook, bits: 5.5}]", "codebook.bits must be one of 2, 3, 4, 8, got 5.5"),
    "five-bits": ("stages: [{method: codebook, bits: 5}]", "codebook.bits must be one of 2, 3, 4, 8, got 5"),
    "quoted-bits": ("stages: [{method: codebook, bits: '4'}]", "codebook.bits must be one of 2, 3, 4, 8, got '4'"),
    "unknown-key": ("stages: [{method: codebook, bit: 4}]", "codebook has the unknown key 'bit'; known keys: include, exclude, bits"),
    "unknown-recipe-key": (f"stages: [{STAGE}]\nseeds: 1", "recipe has the unknown key 'seeds'; known keys: stages, calibration, reconstruction"),
    "unknown-method": ("stages: [{method: zip}]", "recipe.stages[0].method must be one of ['codebook', 'correction', "),
    "no-method": ("stages: [{bits: 4}]", "recipe.stages[0] must be a mapping with the key 'method', got {'bits': 4}"),
    "no-stages": ("stages: []", "recipe.stages must name at least one stage, got []"),
    "stages-is-text": ("stages: codebook", "recipe.stages must be a list of mappings, got 'codebook'"),
    "empty": ("", "recipe must be a mapping with the key 'stages', got NoneType"),
    "a-list": ("- 1", "recipe must be a mapping with the key 'stages', got list"),
    "not-yaml": ("stages: [{method: codebook", "is not valid YAML"),
    "glob": ("stages: [{method: codebook, include: ['*.mpl.*']}]", "include glob '*.mpl.*' matches none of 21 modules (model.layers.0."),
    "exclude-glob": ("stages: [{method: codebook, exclude: ['lm_head']}]", "exclude glob 'lm_head' matches none of 21 modules"),
    "seed": (f"stages: [{STAGE}]\nseed: x", "recipe.seed must be a whole number, got 'x'"),
    "calibration": (f"stages: [{STAGE}]\ncalibration: {{num_sequences: 0}}", "calibration.num_sequences must be at least 1, got 0"),
    "too-long": (f"stages: [{STAGE}]\ncalibration: {{sequence_length: 99999}}", "too few for calibration.sequence_length 99999"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BAD_RECIPES.values(), ids=BAD_RECIPES.keys())
def test_bad_recipe(text, message, dense_folder, texts, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    done = run(
        "compress", dense_folder, "--recipe", tmp_path / "recipe.yaml", "--output", tmp_path / "small", "--calibration", texts[0]
    )
    assert_one_line(done, message)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
    if message.startswith("too few"):
        return
    assert_one_line(run("plan", dense_folder, "--recipe", tmp_path / "recipe.yaml"), message)


def test_a_recipe_that_is_not_text(dense_folder, tmp_path):
    for recipe in (tmp_path, ROOT / "tests" / "golden" / "codebook.safetensors"):
        assert_one_line(run("plan", dense_folder, "--recipe", recipe), f"recipe '{recipe}' cannot be read: ")


def test_a_recipe_by_its_bare_name(dense_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("plan", dense_folder, "--recipe", "codebook-4bit")
    assert done.exit_code == 0, done.stderr
    by_path = run("plan", dense_folder, "--recipe", ROOT / "configs" / "recipes" / "codebook-4bit.yaml")
    layers = [[line for line in text.splitlines() if "model.layers" in line] for text in (done.stdout, by_path.stdout)]
    assert layers[0] == layers[1] != []
    message = "recipe must be a YAML file, got 'recipes/prune-20', which does not exist: did you mean prune-20?"
    assert_one_line(run("compress", dense_folder, "--recipe", "recipes/prune-20", "--output", tmp_path / "small"), message)
    assert not (tmp_path / "small").exists()


def test_bad_models(compressed, recipe, tmp_path):
    output, _ = compressed
    (tmp_path / "empty").mkdir()
    (tmp_path / "garbage").mkdir()
    (tmp_path / "garbage" / "config.json").write_text("{")
    (tmp_path / "weightless").mkdir()
    tiny_model("llama").config.save_pretrained(tmp_path / "weightless")
    cases = {
        output: f"model '{output}' is compressed already (quant_method 'hf_compact'): give the dense model",
        "nobody/no-such-model": "model 'nobody/no-such-model' is no folder or .gguf file here, and not a Hub id that can be fetched: ",
        "./no/such/folder": "model './no/such/folder' is no folder or .gguf file here, and not a Hub id that can be fetched: ",
        tmp_path / "missing.gguf": f"model '{tmp_path / 'missing.gguf'}' does not exist",
        tmp_path / "empty": f"{tmp_path / 'empty'} has no config.json that transformers can read",
        tmp_path / "garbage": f"{tmp_path / 'garbage'} has no config.json that transformers can read",
        tmp_path / "weightless": f"{tmp_path / 'weightless'} holds no .safetensors file",
    }
    for model, message in cases.items():
        assert_one_line(run("compress", model, "--recipe", recipe, "--output", tmp_path / "small"), message)
        assert_one_line(run("plan", model, "--recipe", recipe), message)
    assert not list(tmp_path.glob("small*"))


def test_a_gguf_file_that_is_none(recipe, tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(40))
    assert_one_line(run("plan", tmp_path / "bad.gguf", "--recipe", recipe), "bad.gguf' cannot be read as a GGUF file: ")


def test_bad_calibration(dense_folder, recipe, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "short.txt").write_text("a few words")
    (tmp_path / "latin.txt").write_bytes("Übergröße".encode("latin-1") * 99)
    cases = {
        "empty.txt": "empty.txt' is empty: calibration and evaluation need UTF-8 text",
        "short.txt": "too few for calibration.sequence_length 32",
        "latin.txt": "latin.txt' cannot be read: 'utf-8' codec",
        "missing.txt": "missing.txt' cannot be read: ",
    }
    for name, message in cases.items():
        options = ["--recipe", recipe, "--output", tmp_path / "small", "--calibration", tmp_path / name]
        assert_one_line(run("compress", dense_folder, *options), message)
    assert not list(tmp_path.glob("small*"))


def test_bad_output(dense_folder, recipe, tmp_path):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "thesis.txt").write_text("mine")
    done = run("compress", dense_folder, "--recipe", recipe, "--output", tmp_path / "small")
    assert_one_line(done, "exists and is not an empty folder: choose another --output or delete it")
    done = run("compress", dense_folder, "--recipe", recipe, "--output", tmp_path / "small" / "thesis.txt" / "below")
    assert_one_line(done, "thesis.txt is not a folder that can be written")
    assert [path.name for path in tmp_path.rglob("*")] == ["small", "thesis.txt"]


def test_bad_weight(dense_folder, recipe, texts, tmp_path):
    dense = Path(shutil.copytree(dense_folder, tmp_path / "dense"))
    model = tiny_model("llama")
    model.model.layers[2].mlp.down_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(dense)
    done = run("compress", dense, "--recipe", recipe, "--output", tmp_path / "small", "--calibration", texts[0])
    assert_one_line(done, "model.layers.2.mlp.down_proj.weight holds 1 values that are not finite")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_bad_evaluation(compressed, dense_folder, texts, tmp_path):
    output, _ = compressed
    text = texts[0]
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("a few words")
    bert, bare = tmp_path / "bert", tmp_path / "bare"
    tiny_model("bert").save_pretrained(bert)
    tiny_model("llama").save_pretrained(bare)
    cases = [
        ([dense_folder, "--text", tmp_path / "missing.txt"], "missing.txt' cannot be read"),
        ([dense_folder, "--text", tmp_path / "empty.txt"], "empty.txt' is empty"),
        ([dense_folder, "--text", tmp_path / "short.txt"], "fewer than one window of 1024"),
        ([dense_folder, "--text", text, output], "cannot be read: "),
        ([bert, "--text", text], "is a BertModel: perplexity needs a causal language model"),
        ([bare, "--text", text], "has no tokenizer in its folder, which scoring text needs"),
        (["nobody/no-such-model", "--text", text], "not a Hub id that can be fetched"),
        ([dense_folder, "--text", text, "--json", tmp_path / "no" / "such" / "scores.json"], "scores.json' cannot be written: its folder must"),
    ]  # fmt: skip
    for options, message in cases:
        assert_one_line(run("evaluate", *options), message)


def test_bad_inspection(compressed, dense_folder, tmp_path):
    output, _ = compressed
    copy = Path(shutil.copytree(output, tmp_path / "copy"))
    assert_one_line(
        run("inspect", dense_folder), "is not compressed by hf_compact: its config.json has no quantization_config of ours"
    )
    assert_one_line(run("inspect", tmp_path / "missing"), "missing' is no folder here")
    (copy / "compression_report.json").write_text("{")
    assert_one_line(run("inspect", copy), "compression_report.json cannot be read")
    (copy / "compression_report.json").unlink()
    assert json.loads(run("inspect", copy, "--json").stdout)["is_verified"] is False
    (copy / "model-00002-of-00004.safetensors").unlink()
    assert_one_line(run("inspect", copy), "lacks the shard model-00002-of-00004.safetensors, which its index names")


@pytest.mark.parametrize("missing", ["tensor", "scale"])
def test_inspection_of_a_folder_that_lacks_something(missing, compressed, tmp_path):
    """No made-up numbers: a layer whose tensors are not there has no size."""
    copy = Path(shutil.copytree(compressed[0], tmp_path / "copy"))
    shard = copy / "model-00002-of-00004.safetensors"
    name = "model.layers.0.mlp.up_proj." + ("weight" if missing == "tensor" else "scale")
    with safe_open(shard, framework="pt") as handle:
        tensors = {key: handle.get_tensor(key) for key in handle.keys() if key != name}  # noqa: SIM118
    save_file(tensors, shard, metadata={"format": "pt"})
    assert_one_line(run("inspect", copy), f"{name} is missing from the files of the model")


def test_a_failed_verification_exits_with_2(dense_folder, recipe, texts, tmp_path, monkeypatch):
    def fail(*args):
        raise VerificationError("the folder gives other logits after reloading")

    monkeypatch.setattr(verify, "verify", fail)
    output = tmp_path / "small"
    done = run("compress", dense_folder, "--recipe", recipe, "--output", output, "--calibration", texts[0])
    assert_one_line(done, "the folder gives other logits after reloading")
    assert json.loads((output / "compression_report.json").read_text())["verification"]["verified"] is False
    assert "verified: no" in run("inspect", output).stdout


@pytest.mark.parametrize(
    "arguments",
    [["compress"], ["compress", "m"], ["plan", "m"], ["evaluate", "m"], ["evaluate", "--text", "t"], ["inspect"], ["zip"], ["plan", "m", "--recipe", "r", "--seed", "x"], ["evaluate", "m", "--text", "t", "--windows", "0"], ["plan", "m", "--target-bpw", "3"], ["plan", "m", "--target-bpw", "3", "--recipe", "r"], ["plan", "m", "--recipe", "r", "--validate"], ["plan", "m", "--target-bpw", "x", "--output", "o"]],
    ids=" ".join,
)  # fmt: skip
def test_wrong_usage_exits_with_2(arguments):
    done = run(*arguments)
    assert done.exit_code == 2
    assert "Usage:" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_real_process_fails_in_one_line(dense_folder, tmp_path):
    (tmp_path / "recipe.yaml").write_text("stages: [{method: codebook, include: ['*.mpl.*']}]")
    done = really_run("compress", dense_folder, "--recipe", tmp_path / "recipe.yaml", "--output", tmp_path / "small")
    assert_one_line(done, "include glob '*.mpl.*' matches none of 21 modules")
    assert done.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
