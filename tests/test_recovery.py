"""Recovery: better on held-out text, a folder that a fresh process loads, and nothing written where it cannot work."""

import copy
import json
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from typer.testing import CliRunner

import hf_compact
from hf_compact import CompacterConfig, api, cli, recovery
from hf_compact.config import DistillationConfig
from hf_compact.errors import CompactError, ConfigError, NumericalError, OutputError, UnsupportedModel, VerificationError
from hf_compact.recovery import train_adapter
from tests.conftest import VOCABULARY, tiny_inputs, tiny_model

SHORT = DistillationConfig(num_sequences=16, batch_size=4, epochs=2, learning_rate=1e-2)


@pytest.fixture(scope="module")
def small(dense_folder, tmp_path_factory):
    """A compressed folder, without the cost of a verification."""
    folder = tmp_path_factory.mktemp("recovery") / "small"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api.verify, "verify", lambda *args: {"verified": True, "seconds": 0.0})
        hf_compact.compress(
            dense_folder,
            {"stages": [{"method": "codebook", "bits": 2}], "calibration": {"num_sequences": 4, "sequence_length": 32}},
            output=folder,
        )
    return folder


def batches() -> list[dict]:
    return [tiny_inputs("llama", batch=8, seed=seed) for seed in range(2)]


def test_products_in_bfloat16_are_of_the_training_alone(small, monkeypatch):
    """As on a processor that has instructions for them, whatever this one has."""
    config = DistillationConfig(num_sequences=16, batch_size=4, epochs=2, learning_rate=1e-2)
    losses = {}
    for has_them in (False, True):
        monkeypatch.setattr(recovery, "_has_bfloat16", lambda has_them=has_them: has_them)
        model = hf_compact.verify.load_model(small, dtype=torch.float32)
        adapted, found = train_adapter(model, batches(), CompacterConfig(task_type="CAUSAL_LM"), config)
        logits = adapted(**tiny_inputs("llama")).logits
        assert not torch.equal(logits, logits.bfloat16().float())  # products in bfloat16 would be so
        losses[has_them] = torch.tensor(found)
    assert not torch.equal(losses[False], losses[True])
    torch.testing.assert_close(losses[True], losses[False], rtol=0.01, atol=0)


@pytest.mark.parametrize("is_distilled", [False, True], ids=["text", "teacher"])
def test_the_loss_falls_and_only_the_adapter_moves(small, is_distilled):
    model = hf_compact.verify.load_model(small, dtype=torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    teacher = tiny_model("llama") if is_distilled else None
    config = DistillationConfig(num_sequences=16, batch_size=4, epochs=8, learning_rate=1e-2)
    steps = []
    adapted, losses = train_adapter(
        model,
        batches(),
        CompacterConfig(task_type="CAUSAL_LM"),
        config,
        teacher=teacher,
        progress=lambda *done: steps.append(done),
    )
    assert len(losses) == 32
    assert steps == [(done, 32) for done in range(1, 33)]
    assert sum(losses[-4:]) < 0.97 * sum(losses[:4])
    assert not adapted.training
    assert not adapted._forward_hooks
    base = adapted.unload().state_dict()
    assert all(torch.equal(base[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    "stage", [{"method": "ternary"}, {"method": "pruning", "channel_sparsity": 0.5}], ids=lambda stage: stage["method"]
)
def test_other_bases_win_back_too(stage, dense_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(api.verify, "verify", lambda *args: {"verified": True, "seconds": 0.0})
    recipe = {"stages": [stage], "calibration": {"num_sequences": 4, "sequence_length": 32}}
    hf_compact.compress(dense_folder, recipe, output=tmp_path / "base")
    training = DistillationConfig(num_sequences=24, batch_size=4, epochs=4, learning_rate=1e-2)
    found = api.recover(tmp_path / "base", text_file, training=training, teacher=dense_folder, sequence_length=32)
    assert found["perplexity_after"] < found["perplexity_before"]
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "base-adapter")
    assert torch.isfinite(loaded(input_ids=tiny_inputs("llama")["input_ids"]).logits).all()


def test_the_teachers_own_model_has_nothing_to_learn():
    teacher = tiny_model("llama")
    _, losses = train_adapter(copy.deepcopy(teacher), batches(), CompacterConfig(task_type="CAUSAL_LM"), SHORT, teacher=teacher)
    assert abs(losses[0]) < 1e-5


def test_a_loss_that_is_not_finite_ends_it():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NumericalError, match="the loss of step 1 is not finite: nothing is trained yet, so check the model"):
        train_adapter(model, batches(), CompacterConfig(task_type="CAUSAL_LM"), SHORT)
    model, factors = tiny_model("llama"), iter([1.0, 1.0, float("nan")])
    model.lm_head.register_forward_hook(lambda module, args, output: next(factors) * output)
    with pytest.raises(NumericalError, match="the loss of step 3 is not finite: lower the learning rate"):
        train_adapter(model, batches(), CompacterConfig(task_type="CAUSAL_LM"), SHORT)


@pytest.mark.cli
def test_command(small, dense_folder, text_file, tmp_path):
    folder = tmp_path / "small"
    shutil.copytree(small, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    arguments = ["recover", str(folder), "--text", str(text_file), "--teacher", str(dense_folder), "--num-sequences", "24",
                 "--sequence-length", "32", "--epochs", "2", "--learning-rate", "0.01", "--variant", "compacter++"]  # fmt: skip
    done = CliRunner(env={"COLUMNS": "300", "TERM": "dumb"}).invoke(cli.app, arguments)
    assert done.exit_code == 0, done.stderr
    assert "held-out perplexity: " in done.stdout
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    output = tmp_path / "small-adapter"
    found = json.loads((output / "recovery.json").read_text())
    assert found["verification"]["verified"]
    assert found["trainable_parameters"] == 612
    assert found["adapter_bytes"] == (output / "adapter_model.safetensors").stat().st_size < 20_000
    assert found["perplexity_after"] < found["perplexity_before"]
    loaded = AutoPeftModelForCausalLM.from_pretrained(output)
    assert loaded(input_ids=tiny_inputs("llama")["input_ids"]).logits.shape == (2, 24, VOCABULARY)
    rows = hf_compact.evaluate([folder, output], [text_file], num_windows=2, window_length=32)
    assert rows[1]["file_bytes"] == rows[0]["file_bytes"] + found["adapter_bytes"]
    assert rows[1]["perplexity"] != rows[0]["perplexity"]
    again = CliRunner(env={"COLUMNS": "300", "TERM": "dumb"}).invoke(cli.app, arguments)
    assert again.exit_code == 2
    assert "exists and is not an empty folder" in again.stderr


def test_a_failed_verification_keeps_what_was_trained(small, tmp_path, monkeypatch):
    def fail(*args):
        raise VerificationError("other logits")

    monkeypatch.setattr(api.verify, "verify", fail)
    with pytest.raises(VerificationError, match="other logits"):
        api.recover(small, output=tmp_path / "adapter", training=SHORT, sequence_length=16)
    assert not (tmp_path / "adapter").exists()
    assert (tmp_path / "adapter.partial" / "adapter_model.safetensors").exists()


def test_names_and_settings_as_users_have_them(small, text_file, tmp_path, monkeypatch):
    """The folder one is in, one text, an adapter's settings read back from its folder."""
    monkeypatch.setattr(api.verify, "verify", lambda *args: {"verified": True})
    folder = tmp_path / "small"
    shutil.copytree(small, folder)
    before = sorted(path.name for path in folder.iterdir())
    monkeypatch.chdir(folder)
    stored = CompacterConfig(variant="compacter++", inference_mode=True)
    found = api.recover(".", text_file, adapter=stored, training=SHORT, sequence_length=16)
    assert found["output"] == str(tmp_path / "small-adapter")
    assert json.loads((tmp_path / "small-adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder)
    assert found["texts"] == [text_file.name]
    assert found["trainable_parameters"] == 612
    assert sorted(path.name for path in folder.iterdir()) == before
    assert stored.inference_mode


def test_what_cannot_work_is_refused_before_anything_is_written(small, dense_folder, tmp_path, monkeypatch, tokenizer):
    other = tmp_path / "other"
    tiny_model("llama", vocab_size=VOCABULARY + 8).save_pretrained(other)
    encoder = tmp_path / "encoder"
    tiny_model("bert").save_pretrained(encoder)
    tokenizer.save_pretrained(encoder)
    bare = tmp_path / "bare"
    tiny_model("llama").save_pretrained(bare)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    output = tmp_path / "output"
    short = {"training": SHORT, "sequence_length": 16}

    def refused(error: type[CompactError], match: str, model=small, **settings) -> None:
        with pytest.raises(error, match=match):
            api.recover(model, **{"output": output, **short, **settings})
        assert not output.exists()

    refused(ConfigError, "teacher '.*other' must have the 384 tokens of the model, it has 392", teacher=other)
    refused(UnsupportedModel, "is a BertModel: recover trains causal language models", model=encoder)
    refused(ConfigError, "has no tokenizer in its folder, which training on text needs", model=bare)
    refused(UnsupportedModel, "is an adapter: give the folder of its base model", model=adapter)
    refused(OutputError, "exists and is not an empty folder", output=full)
    refused(ConfigError, r"seed must be in \[0, 2\*\*32\), got -1", seed=-1)
    monkeypatch.setattr(api.distributed, "world_size", lambda: 2)
    refused(ConfigError, "recover runs in one process; under torchrun give the Trainer a model from get_peft_model")
