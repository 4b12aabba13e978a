"""Publishing, against a Hub on loopback: what arrives, what is refused before a byte is sent, and what survives a fault."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hf_compact
from hf_compact import CompactConfig, Protocol, Windows
from hf_compact.calibration import from_batches
from hf_compact.checkpoint import REPORT_NAME, hash_model
from hf_compact.errors import ConfigError, FormatError, OutputError, UnsupportedModel, VerificationError
from hf_compact.hf import hub as hub_module
from tests.conftest import tiny_inputs, tiny_model
from tests.fake_hub import READER, WRITER, check_card, environment

# How huggingface_hub hands files to its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
RECIPE = {"stages": [{"method": "codebook", "bits": 4}], "calibration": {"num_sequences": 4, "sequence_length": 32}}
SENT = {
    ".gitattributes", "README.md", "chat_template.jinja", "compression_report.json", "config.json", "generation_config.json",
    "layers.png", "recipe.json", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip

PRIVATE = ["notes.bak", "notes.md", "picture.png", "secrets.json", "token.txt", "train.py"]


@pytest.fixture(scope="module")
def finished(dense_folder, text_file, tmp_path_factory) -> Path:
    """A verified folder with a chat template, and things that are nobody's business."""
    dense = tmp_path_factory.mktemp("chat") / "dense"
    shutil.copytree(dense_folder, dense)
    (dense / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}", encoding="utf-8")
    folder = tmp_path_factory.mktemp("hub") / "small"
    hf_compact.compress(dense, RECIPE, output=folder, calibration=[text_file])
    (folder / ".env").write_text("SECRET=1", encoding="utf-8")
    for name in PRIVATE:
        (folder / name).write_text("draft", encoding="utf-8")
    (folder / "runs").mkdir()
    return folder


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "small"))


LOAD = """
import sys
import hf_compact, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("me/small").eval()
assert AutoTokenizer.from_pretrained("me/small").chat_template
with torch.no_grad():
    save_file({"logits": model(**load_file(sys.argv[1])).logits}, sys.argv[2])
"""


@pytest.mark.cli
def test_what_is_pushed_is_what_a_stranger_loads(finished, hub, tmp_path):
    variables = os.environ | environment(hub, str(tmp_path / "home"))
    command = [sys.executable, "-m", "hf_compact", "push", str(finished), "me/small", "--message", "First version"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/me/small" in done.stdout
    assert f"left out, not sent: .env, {', '.join(sorted([*PRIVATE, 'runs']))}\n" in done.stderr
    repository = hub.repositories["me/small"]
    assert repository.private
    weights = {path.name for path in finished.glob("model*")}
    assert set(repository.files) == SENT | weights
    for name in set(repository.files) - {"README.md", ".gitattributes", "compression_report.json"}:
        assert repository.files[name] == (finished / name).read_bytes(), name
    sent = json.loads(repository.files["compression_report.json"])
    assert sent == json.loads((finished / "compression_report.json").read_text()) | {"model": "dense"}  # not where it lies
    card = repository.files["README.md"].decode()
    assert 'AutoModelForCausalLM.from_pretrained("me/small")' in card
    assert "path/to/this/folder" not in card
    metric = yaml.safe_load(card.split("---")[1])["model-index"][0]["results"][0]["metrics"][0]
    report = hf_compact.Report.read(finished / "compression_report.json")
    assert metric == {"type": "perplexity", "value": report.verification["perplexity"], "name": "perplexity per token"}

    save_file(tiny_inputs("llama"), tmp_path / "in.safetensors")
    arguments = [str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors")]
    subprocess.run([sys.executable, "-c", LOAD, *arguments], env=variables, check=True)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(finished)(**tiny_inputs("llama")).logits
    assert torch.equal(load_file(tmp_path / "out.safetensors")["logits"], expected)

    home = [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    written = [done.stdout.encode(), done.stderr.encode(), *hub.bodies, *(path.read_bytes() for path in home)]
    assert len(home) > 5
    assert not any(WRITER.encode() in text for text in written)


def test_files_that_a_recipe_reads_stay_without_their_place(folder, hub):
    recipe = {"stages": [{"method": "tensor_network", "allocation": "profile", "profile": "/home/me/profile.json"}]}
    report = json.loads((folder / REPORT_NAME).read_text())
    (folder / "recipe.json").write_text(json.dumps(recipe))
    (folder / REPORT_NAME).write_text(json.dumps(report | {"recipe": recipe}))
    hub_module.push_folder(folder, "me/small")
    files = hub.repositories["me/small"].files
    for name in ("recipe.json", REPORT_NAME):
        assert b'"profile": "profile.json"' in files[name], name
        assert b"/home/me" not in files[name], name
    assert CompactConfig(**recipe).to_dict()["stages"][0]["profile"] == "profile.json"


@pytest.mark.parametrize("text", ["{no json", "[]", '{"stages": 4}'])
def test_a_damaged_recipe_is_named(text, folder, hub):
    (folder / "recipe.json").write_text(text)
    with pytest.raises(FormatError, match=r"recipe\.json is damaged: "):
        hub_module.push_folder(folder, "me/small")
    assert not hub.repositories


@pytest.mark.parametrize(
    "text", [b"---\ntags: [a\n---\n", b"---\nlicense: \xe9\n---\n"], ids=["no_yaml", "no_utf8"]
)  # fmt: skip
def test_a_card_that_nobody_can_read(text, folder, hub):
    (folder / "README.md").write_bytes(text)
    with pytest.raises(OutputError, match=r"the card README\.md"):
        hub_module.push_folder(folder, "me/small")
    assert not hub.repositories


def test_scores_of_these_weights_join_the_card(folder, hub, text_file, tmp_path):
    protocol = Protocol(windows=Windows(window_length=64, num_windows=2))
    hf_compact.measure([folder], [text_file], protocol, output=tmp_path / "results.json")
    hf_compact.push(folder, "me/small", results=tmp_path / "results.json")
    card = hub.repositories["me/small"].files["README.md"].decode()
    assert check_card(card) is None
    (entry,) = yaml.safe_load(card.split("---")[1])["model-index"]
    names = [result["dataset"]["name"] for result in entry["results"]]
    assert names == [f"held-out end of {text_file.name}", f"{text_file.name}, 2 windows of 64 tokens"]
    score = hf_compact.Results.read(tmp_path / "results.json").models[0].perplexity[text_file.name]["perplexity"]
    assert entry["results"][1]["metrics"][0]["value"] == score
    save_file(load_file(folder / "model-00002-of-00004.safetensors"), folder / "model-00002-of-00004.safetensors", {"a": "b"})
    with pytest.raises(ConfigError, match="results hold no model with these weights"):
        hf_compact.push(folder, "me/other", results=tmp_path / "results.json", force=True)


def test_an_export_to_onnx_is_sent_where_it_is_forced(folder, hub, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(folder / name, tmp_path)
    for name in ("model.onnx", "model.onnx.data"):
        (tmp_path / name).write_bytes(b"a graph")
    with pytest.raises(VerificationError, match=r"has no compression_report\.json: verify it, or force the push"):
        hub_module.push_folder(tmp_path, "me/small")
    hub_module.push_folder(tmp_path, "me/small", force=True)
    files = hub.repositories["me/small"].files
    assert {"model.onnx", "model.onnx.data", "tokenizer.json"} <= files.keys()
    assert b"library_name: onnx" in files["README.md"]
    assert b"onnxruntime" in files["README.md"]


@pytest.mark.parametrize("status", [500, 503, 0], ids=["500", "503", "connection_closed"])
def test_a_fault_that_passes_is_not_noticed(status, folder, hub):
    hub.fail("PUT", "/lfs/", status)
    hub_module.push_folder(folder, "me/small")
    assert set(hub.repositories["me/small"].files) > SENT
    assert not hub.faults


def test_an_interrupted_push_goes_on(folder, hub):
    hub.fail("POST", "/commit/main", 500)
    with pytest.raises(OutputError, match="refused me/small with 500: run the same command again: what has arrived is not sent"):
        hub_module.push_folder(folder, "me/small")
    sent = hub.count("PUT", "/lfs/")
    assert sent == len(list(folder.glob("*.safetensors"))) + 1  # and the plot
    hub_module.push_folder(folder, "me/small")
    assert hub.count("PUT", "/lfs/") == sent
    assert set(hub.repositories["me/small"].files) > SENT


@pytest.mark.parametrize(("method", "path"), [("GET", "/api/models/"), ("PUT", "/lfs/")], ids=["at_first", "while_sending"])
def test_a_hub_that_stays_down(method, path, folder, hub):
    hub.fail(method, path, 0, times=100)
    with pytest.raises(OutputError, match=r"the connection to the Hub failed \(\w+\): run the same command again"):
        hub_module.push_folder(folder, "me/small")


def test_offline_mode_is_said(folder, hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    with pytest.raises(OutputError, match="HF_HUB_OFFLINE is set, which forbids every connection to the Hub: unset it to push"):
        hub_module.push_folder(folder, "me/small")
    assert not hub.log


def test_a_server_that_keeps_failing_while_files_are_sent(folder, hub):
    hub.fail("PUT", "/lfs/", 500, times=100)
    with pytest.raises(OutputError, match="refused me/small with 500: run the same command again"):
        hub_module.push_folder(folder, "me/small")
    hub.faults.clear()
    hub_module.push_folder(folder, "me/small")
    assert set(hub.repositories["me/small"].files) > SENT


def test_errors_of_our_own_are_not_the_hubs(folder, hub, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("a defect")

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        hub_module.push_folder(folder, "me/small")


@pytest.mark.parametrize(
    ("token", "repo_id", "match"),
    [
        (READER, "me/small", "refused me/small with 403: the token has no right to write to me"),
        (WRITER, "somebody/small", "refused somebody/small with 403: the token has no right to write to somebody"),
        ("hf_" + "x" * 34, "me/small", "refused me/small with 401: the token is not valid"),
        ("", "me/small", "pushing needs a token with the right to write: run `hf auth login`, or set HF_TOKEN"),
        (WRITER, "small", "repo_id must be user/name, got 'small'"),
        (WRITER, "me/a b", "repo_id 'me/a b' is not valid"),
    ],
    ids=["reader", "of_another", "unknown", "none", "no_user", "not_a_name"],
)
def test_without_the_right_nothing_is_sent(token, repo_id, match, folder, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(OutputError, match=match) as failure:
        hub_module.push_folder(folder, repo_id)
    assert not hub.repositories
    assert not hub.objects
    assert not token or token not in str(failure.value)


def test_a_token_that_is_passed_is_the_one_that_is_used(folder, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    hub_module.push_folder(folder, "me/small", token=WRITER)
    assert "me/small" in hub.repositories


def unverified(folder: Path) -> None:
    report = json.loads((folder / "compression_report.json").read_text())
    report["verification"] = {"verified": False, "reason": "logits differ"}
    (folder / "compression_report.json").write_text(json.dumps(report))


def changed(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[-1]
    save_file(load_file(shard) | {"more": torch.zeros(3)}, shard, metadata={"format": "pt"})


def overwritten(folder: Path) -> None:
    """As many bytes as before."""
    shard = sorted(folder.glob("*.safetensors"))[-1]
    data = shard.read_bytes()
    shard.write_bytes(data[:-8] + bytes(byte ^ 1 for byte in data[-8:]))


def edited(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))


def older(folder: Path) -> None:
    report = json.loads((folder / "compression_report.json").read_text())
    del report["verification"]["files"]
    (folder / "compression_report.json").write_text(json.dumps(report))


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (unverified, r"small failed its verification \(logits differ\): verify it, or force the push"),
        (changed, r"small has changed since it was verified \(its weights take \d+ bytes, then \d+\)"),
        (overwritten, r"small has changed since it was verified \(model-\d+-of-\d+.safetensors\): verify it, or force the push"),
        (edited, r"small has changed since it was verified \(config.json\): verify it, or force the push"),
        (lambda folder: (older(folder), changed(folder)), r"\(its weights take \d+ bytes, then \d+\)"),
        (lambda folder: (folder / "compression_report.json").unlink(), "small has no compression_report.json"),
    ],
    ids=["failed", "changed", "overwritten", "edited", "changed_with_an_older_report", "no_report"],
)
def test_an_unverified_folder_is_refused_unless_forced(damage, match, folder, hub):
    damage(folder)
    with pytest.raises(VerificationError, match=match):
        hub_module.push_folder(folder, "me/small")
    assert not hub.log
    hub_module.push_folder(folder, "me/small", force=True)
    assert "config.json" in hub.repositories["me/small"].files


def test_a_report_from_before_the_hashes_is_enough(folder, hub):
    older(folder)
    hub_module.push_folder(folder, "me/small")
    assert "config.json" in hub.repositories["me/small"].files


def test_damaged_folders_are_refused_even_if_forced(folder, hub):
    shard = sorted(folder.glob("*.safetensors"))[-1]
    data = shard.read_bytes()
    shard.write_bytes(data[:-3])
    report = (folder / "compression_report.json").read_bytes()
    (folder / "compression_report.json").unlink()  # as an export
    with pytest.raises(FormatError, match="is not a complete safetensors file"):
        hub_module.push_folder(folder, "me/small", force=True)
    (folder / "compression_report.json").write_bytes(report)
    with pytest.raises(FormatError, match="is not a complete safetensors file"):
        hf_compact.push(folder, "me/small", force=True)
    shard.write_bytes(data)
    changed(folder)
    with pytest.raises(FormatError, match="more is in the files, but LlamaForCausalLM has no such tensor"):
        hf_compact.push(folder, "me/small", force=True)
    (folder / "journal.jsonl").write_text("{}\n")
    with pytest.raises(VerificationError, match="is the output of a run that has not finished"):
        hub_module.push_folder(folder, "me/small", force=True)
    (folder / "journal.jsonl").unlink()
    (folder / "config.json").unlink()
    with pytest.raises(FormatError, match=r"has no config.json: push sends folders of compress, recover or export"):
        hub_module.push_folder(folder, "me/small", force=True)
    assert not hub.log


def test_a_name_that_exists(folder, hub):
    hub_module.push_folder(folder, "me/small")
    before = dict(hub.repositories["me/small"].files)
    hub_module.push_folder(folder, "me/small")  # the same again: nothing is to be done
    assert len(hub.repositories["me/small"].commits) == 2
    recipe = folder / "recipe.json"
    recipe.write_text(recipe.read_text() + "\n")
    with pytest.raises(OutputError, match=r"me/small exists and holds another recipe.json: choose another name, or overwrite it"):
        hub_module.push_folder(folder, "me/small")
    hub.repositories["me/small"].files["model-00009-of-00009.safetensors"] = b"old"
    with pytest.raises(OutputError, match="exists and holds another"):
        hub_module.push_folder(folder, "me/small")
    hub_module.push_folder(folder, "me/small", overwrite=True)
    after = hub.repositories["me/small"].files
    assert after["recipe.json"] == recipe.read_bytes()
    assert after.keys() == before.keys()


def test_what_is_public_is_not_pushed_to_by_accident(folder, hub):
    hub_module.push_folder(folder, "me/small", private=False)
    assert not hub.repositories["me/small"].private
    with pytest.raises(OutputError, match=r"me/small exists and is public: say so \(--public\), or choose another name"):
        hub_module.push_folder(folder, "me/small")
    hub.repositories["me/small"].private = True
    with pytest.raises(
        OutputError, match="me/small exists and is private: leave out --public, or make it public on the Hub first"
    ):
        hub_module.push_folder(folder, "me/small", private=False)


def test_a_card_that_the_hub_does_not_take(folder, hub):
    card = folder / "README.md"
    card.write_text(card.read_text().replace("  - metrics:", "  - measures:").replace("    metrics:", "    measures:"))
    with pytest.raises(OutputError, match=r"the Hub does not accept the card README.md: .*metrics"):
        hub_module.push_folder(folder, "me/small")
    assert not hub.repositories


def test_the_rules_for_cards_are_rules():
    assert check_card("# no metadata") is None
    assert "name" in check_card("---\nmodel-index:\n- results: []\n---\n")
    assert "dataset" in check_card("---\nmodel-index:\n- name: a\n  results:\n  - task: {type: t}\n    metrics: []\n---\n")


class TestModelsInMemory:
    def test_a_model_as_it_was_loaded_is_its_folder(self, folder, hub):
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.push_to_hub("me/small")
        assert set(hub.repositories["me/small"].files) > SENT
        assert b'from_pretrained("me/small")' in hub.repositories["me/small"].files["README.md"]

    def test_a_model_from_the_hub_is_its_repository(self, folder, hub, monkeypatch, tmp_path):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        hub_module.push_folder(folder, "me/small")
        model = AutoModelForCausalLM.from_pretrained("me/small")
        model.push_to_hub("me/again")
        assert hub.repositories["me/again"].files.keys() == hub.repositories["me/small"].files.keys()
        model.model.norm.weight.data.mul_(2)
        model.push_to_hub("me/changed")
        assert {"tokenizer.json", "chat_template.jinja"} <= hub.repositories["me/changed"].files.keys()

    def test_nobody_hears_of_a_missing_tokenizer_too_late(self, hub, caplog):
        model = tiny_model("llama")
        hf_compact.compress(model, RECIPE | {"stages": [{**RECIPE["stages"][0], "rounding": "nearest"}]}, calibration=from_batches([tiny_inputs("llama")]))  # fmt: skip
        model.push_to_hub("me/small")
        assert "sent without a tokenizer" in caplog.text

    def test_a_changed_model_is_verified_anew(self, folder, hub, monkeypatch):
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.model.norm.weight.data.mul_(2)
        model.push_to_hub("me/small")
        files = hub.repositories["me/small"].files
        assert "compression_report.json" not in files  # its numbers were another model's
        assert {"tokenizer.json", "chat_template.jinja"} <= files.keys()
        assert b"No measured report is part of this model." in files["README.md"]

        def fails(folder, *args):
            raise VerificationError("gives other logits")

        monkeypatch.setattr(hub_module.verify, "verify", fails)
        with pytest.raises(VerificationError, match="gives other logits"):
            model.push_to_hub("me/other")
        assert list(hub.repositories) == ["me/small"]

    def test_with_the_report_of_its_compression(self, hub, text_file, tokenizer, tmp_path):
        model = tiny_model("llama")
        report = hf_compact.compress(model, RECIPE, calibration=[text_file], tokenizer=tokenizer)
        model.push_to_hub("me/small", tokenizer=tokenizer, report=report, private=False)
        files = hub.repositories["me/small"].files
        assert {"README.md", "compression_report.json", "layers.png", "recipe.json", "tokenizer.json"} <= files.keys()
        sent = hf_compact.Report.from_dict(json.loads(files["compression_report.json"]))
        assert sent.is_verified
        assert sent.file_bytes == len(files["model.safetensors"])

    @pytest.mark.parametrize("is_changed", [False, True], ids=["as_scored", "changed_since"])
    @pytest.mark.parametrize("is_loaded", [False, True], ids=["in_memory", "loaded"])
    def test_a_perplexity_is_that_of_the_pushed_weights(self, is_changed, is_loaded, folder, hub, text_file, tokenizer, tmp_path):
        if is_loaded:
            model, report = AutoModelForCausalLM.from_pretrained(folder), hf_compact.Report.read(folder / REPORT_NAME)
        else:
            model, output = tiny_model("llama"), tmp_path / "out"
            report = hf_compact.compress(model, RECIPE, output=output, calibration=[text_file], tokenizer=tokenizer)
        scored = report.verification["perplexity"]
        if is_changed:
            model.model.norm.weight.data.mul_(2)
        model.push_to_hub("me/small", tokenizer=tokenizer, report=report)
        files = hub.repositories["me/small"].files
        sent = json.loads(files[REPORT_NAME])["verification"]
        assert sent["verified"]
        assert sent.get("perplexity") == (None if is_changed else scored)
        card = files["README.md"].decode()
        assert ("model-index" in card) is not is_changed
        assert (f"{scored:.2f}" in card) is not is_changed
        assert report.verification["perplexity"] == scored

    def test_a_changed_config_is_a_changed_model(self, folder, hub):
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.config.max_position_embeddings *= 2
        model.push_to_hub("me/small")
        assert REPORT_NAME not in hub.repositories["me/small"].files

    def test_a_model_of_images_is_pushed_as_a_folder(self):
        model = tiny_model("vit")
        hf_compact.compress(
            model, {"stages": [{"method": "codebook", "rounding": "nearest"}]}, calibration=from_batches([tiny_inputs("vit")])
        )
        with pytest.raises(UnsupportedModel, match="takes pixel_values, and push_to_hub verifies on token ids: push its folder"):
            model.push_to_hub("me/small")

    def test_a_model_that_nobody_holds(self, folder):
        with pytest.raises(ConfigError, match="the model of push_to_hub is gone: keep it in a variable"):
            AutoModelForCausalLM.from_pretrained(folder).push_to_hub("me/small")

    def test_a_dense_model_has_transformers_own(self, folder):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert "push_to_hub" in vars(model)
        assert "push_to_hub" not in vars(model.dequantize())


def test_an_adapter_is_pushed_with_its_report(hub, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(FormatError, match=r"holds no adapter_model.safetensors"):
        hf_compact.push(folder, "me/adapter")
    save_file({"a": torch.zeros(2)}, folder / "adapter_model.safetensors")
    with pytest.raises(VerificationError, match=r"has no recovery.json"):
        hf_compact.push(folder, "me/adapter")
    for text in ("{", "{}", "[]"):
        (folder / "recovery.json").write_text(text)
        with pytest.raises(FormatError, match=r"recovery.json is no report of recover: \w+Error"):
            hf_compact.push(folder, "me/adapter")
    values = {"model": str(tmp_path / "base"), "teacher": None, "output": str(folder), "verification": {"verified": False}}
    (folder / "recovery.json").write_text(json.dumps(values))
    with pytest.raises(VerificationError, match=r"failed the verification in its recovery.json"):
        hf_compact.push(folder, "me/adapter")
    values["verification"]["verified"] = True
    (folder / "recovery.json").write_text(json.dumps(values))
    local = str(tmp_path / "base")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": local, "r": 8}))
    card = f"---\nbase_model: {local}\nlibrary_name: peft\ntags:\n- base_model:adapter:{local}\n- more\n---\n# An adapter\n"
    (folder / "README.md").write_text(card)
    with pytest.raises(
        OutputError, match=r"stands on '.*base', which nobody else has: push that first, and name it \(--base user"
    ):
        hf_compact.push(folder, "me/adapter")
    with pytest.raises(OutputError, match="base must be user/name, got 'base'"):
        hf_compact.push(folder, "me/adapter", base="base")
    values["verification"]["files"] = {}
    (folder / "recovery.json").write_text(json.dumps(values))
    with pytest.raises(VerificationError, match=r"changed since it was verified \(adapter_config.json, adapter_model.safetens"):
        hf_compact.push(folder, "me/adapter", base="me/base")
    values["verification"]["files"] = hash_model(folder)
    (folder / "recovery.json").write_text(json.dumps(values))
    assert not hub.log
    hf_compact.push(folder, "me/adapter", base="me/base")
    sent = hub.repositories["me/adapter"].files
    assert "adapter_model.safetensors" in sent
    assert json.loads(sent["recovery.json"]) == values | {"model": "base", "output": "adapter"}
    assert json.loads(sent["adapter_config.json"]) == {"base_model_name_or_path": "me/base", "r": 8}
    data = yaml.safe_load(sent["README.md"].decode().split("---")[1])
    assert (data["base_model"], data["tags"]) == ("me/base", ["more", "base_model:adapter:me/base"])
    assert (folder / "README.md").read_text() == card
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "me/base"}))
    (folder / "README.md").unlink()
    hf_compact.push(folder, "me/another", force=True)
    assert b'AutoPeftModelForCausalLM.from_pretrained("me/another")' in hub.repositories["me/another"].files["README.md"]


@pytest.mark.parametrize(
    ("kind", "use"),
    [
        ("dense", "no other library is needed:"),
        ("compressed-tensors", "transformers, `pip install compressed-tensors`:"),
        ("q4_0", 'Llama.from_pretrained("me/small", filename="*.gguf")'),
    ],
)
def test_an_export_is_pushed_by_force_with_a_card_of_its_own(kind, use, hub, tokenizer, tmp_path):
    if kind == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    model = tiny_model("llama", intermediate_size=96)
    stage = {"method": "codebook", "rounding": "nearest", "group_size": 32, "scale_bits": None, "symmetric": True}
    hf_compact.compress(model, {"stages": [stage]}, calibration=from_batches([tiny_inputs("llama")]))
    model.save_pretrained(tmp_path / "ours")
    tokenizer.save_pretrained(tmp_path / "ours")
    hf_compact.export(tmp_path / "ours", tmp_path / "out", kind)
    with pytest.raises(VerificationError, match=r"out has no compression_report.json: verify it, or force the push"):
        hf_compact.push(tmp_path / "out", "me/small")
    with pytest.raises(OutputError, match=r"base belongs to an adapter, and .*out holds none"):
        hf_compact.push(tmp_path / "out", "me/small", force=True, base="me/base")
    hf_compact.push(tmp_path / "out", "me/small", force=True)
    files = hub.repositories["me/small"].files
    assert {path.name for path in (tmp_path / "out").iterdir()} <= set(files)
    card = files["README.md"].decode()
    assert use in card
    assert "import hf_compact" not in card


def test_another_librarys_format_is_no_damage(folder, hub):
    """What `--to bitnet` writes, for one."""
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "bitnet"}}
    (folder / "config.json").write_text(json.dumps(config))
    hf_compact.push(folder, "me/small", force=True)
    assert "config.json" in hub.repositories["me/small"].files
