"""The disk door: a folder goes in block by block, can be killed anywhere, and comes out as if nothing had happened."""

import contextlib
import errno
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import hf_compact
from hf_compact import api, checkpoint, verify
from hf_compact.api import inspect_folder
from hf_compact.calibration import from_batches
from hf_compact.checkpoint import Journal, TensorSource
from hf_compact.errors import ConfigError, FormatError, NumericalError, OutputError, VerificationError
from hf_compact.hf import card
from tests.conftest import FAMILIES, VOCABULARY, as_users_run_it, tiny_inputs, tiny_model
from tests.interrupted import ORIGINAL_APPEND, stop_after

RECIPE = {
    "stages": [{"method": "codebook", "bits": 3, "group_size": 16, "refit_rounds": 1, "shrink_steps": 4}],
    "calibration": {"num_sequences": 4, "sequence_length": 32, "batch_size": 2},
}
UNITS = 4  # the embeddings and three blocks
JOURNAL = "journal.jsonl"


@pytest.fixture(autouse=True)
def in_process_verification(monkeypatch):
    """Runs that are killed are forks of this process, so that theirs cannot be another one's children."""

    def run(command: list[str], **kwargs) -> subprocess.CompletedProcess:
        assert command[1:4] == ["-P", "-m", "hf_compact.verify"]
        out = io.StringIO()
        try:
            with contextlib.redirect_stdout(out):
                verify.main(*command[4:])
        except Exception:
            return subprocess.CompletedProcess(command, 1, out.getvalue(), traceback.format_exc())
        return subprocess.CompletedProcess(command, 0, out.getvalue(), "")

    monkeypatch.setattr(verify, "subprocess", SimpleNamespace(run=run))


def compress(folder: Path, output: Path, text_file: Path, **changes) -> hf_compact.Report:
    return hf_compact.compress(folder, RECIPE | changes, output=output, calibration=[text_file])


def partial(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def result(folder: Path) -> dict[str, bytes]:
    """Everything that decides what is loaded."""
    names = {path.name for path in folder.glob("*.safetensors")} | {"model.safetensors.index.json", "config.json", "recipe.json"}
    return {name: (folder / name).read_bytes() for name in sorted(names)}


@pytest.fixture(scope="module")
def expected(dense_folder, text_file, tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    output = tmp_path_factory.mktemp("uninterrupted") / "small"
    with as_users_run_it():
        report = compress(dense_folder, output, text_file)
    assert report.is_verified
    return output


@pytest.fixture
def stopped(dense_folder, text_file, tmp_path, monkeypatch) -> Path:
    """An output whose run ended in an exception after two of the four units."""
    stop_after(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        compress(dense_folder, tmp_path / "small", text_file)
    monkeypatch.setattr(Journal, "append", ORIGINAL_APPEND)
    assert len((partial(tmp_path / "small") / JOURNAL).read_text().splitlines()) == 1 + 2
    return tmp_path / "small"


# The result.


def test_what_a_finished_folder_holds(expected):
    names = {path.name for path in expected.iterdir()}
    shards = {f"model-{i + 1:05d}-of-{UNITS:05d}.safetensors" for i in range(UNITS)}
    assert shards == {name for name in names if name.endswith(".safetensors")}
    side = {"config.json", "generation_config.json", "recipe.json", "compression_report.json", "README.md", "layers.png"}
    assert side | {"tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"} == names - shards
    assert not partial(expected).exists()
    index = json.loads((expected / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == shards
    found = {name: path.name for path in expected.glob("*.safetensors") for name in load_file(path)}
    assert index["weight_map"] == found
    assert (expected / "layers.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, torch.float32) for family in FAMILIES),
        *((family, torch.bfloat16) for family in ("llama", "gpt2", "gemma3", "t5")),
    ],
    ids=str,
)
def test_a_folder_gives_the_same_tensors_as_the_model_in_memory(family, dtype, tmp_path):
    calibration = from_batches([tiny_inputs(family, seed=seed) for seed in (1, 2)])
    model = tiny_model(family, dtype)
    model.save_pretrained(tmp_path / "dense", max_shard_size="50KB")
    hf_compact.compress(tmp_path / "dense", RECIPE, output=tmp_path / "small", calibration=calibration)
    hf_compact.compress(model, RECIPE, calibration=calibration)
    loaded, info = type(model).from_pretrained(tmp_path / "small", output_loading_info=True)
    assert {key: value for key, value in info.items() if value} == {}
    a, b = loaded.state_dict(), model.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**tiny_inputs(family))[0], model.eval()(**tiny_inputs(family))[0])
    config, kept = (json.loads((tmp_path / kind / "config.json").read_text()) for kind in ("small", "dense"))
    assert config.pop("quantization_config")
    for key in kept.keys() - {"transformers_version"}:
        assert config[key] == kept[key], key


def test_the_dtype_of_the_recipe_is_stored(tmp_path, dense_folder, text_file):
    compress(dense_folder, tmp_path / "small", text_file, dtype="bfloat16")
    assert json.loads((tmp_path / "small" / "config.json").read_text())["dtype"] == "bfloat16"
    stored = TensorSource.in_folder(tmp_path / "small").headers()
    assert stored["model.norm.weight"][0] == "BF16"
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small").dtype == torch.bfloat16


def test_the_same_command_gives_the_same_bytes(expected, dense_folder, text_file, tmp_path):
    compress(dense_folder, tmp_path / "small", text_file)
    assert result(tmp_path / "small") == result(expected)


def test_an_empty_folder_may_stand_there(expected, dense_folder, text_file, tmp_path):
    (tmp_path / "a" / "small").mkdir(parents=True)
    compress(dense_folder, tmp_path / "a" / "small", text_file)
    assert result(tmp_path / "a" / "small") == result(expected)


def test_parents_are_made(dense_folder, text_file, tmp_path):
    compress(dense_folder, tmp_path / "a" / "b" / "small", text_file)
    assert inspect_folder(tmp_path / "a" / "b" / "small")["is_verified"]


# Killed.


def run_and_die(arrange: Callable[[], None], work: Callable[[], object]) -> int:
    """Run `work` in a copy of this process; `arrange` plants the point where it kills itself. The signal it died of."""
    pid = os.fork()
    if pid == 0:
        try:
            arrange()
            work()
        finally:
            os._exit(17)  # it was to be killed
    return os.WTERMSIG(os.waitpid(pid, 0)[1])


def die(*args, **kwargs) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: object, name: str, calls: int) -> None:
    """Die before call number `calls`, counted from 0."""
    original, seen = getattr(owner, name), []

    def function(*args, **kwargs):
        if len(seen) == calls:
            die()
        seen.append(name)
        return original(*args, **kwargs)

    setattr(owner, name, function)


def after(owner: object, name: str, calls: int) -> None:
    """Die after call number `calls`."""
    original, seen = getattr(owner, name), []

    def function(*args, **kwargs):
        value = original(*args, **kwargs)
        if len(seen) == calls:
            die()
        seen.append(name)
        return value

    setattr(owner, name, function)


def in_the_middle_of_a_shard() -> None:
    original, seen = checkpoint.save_file, []

    def save(tensors, path, **kwargs):
        original(tensors, path, **kwargs)
        if len(seen) == 2:
            path.write_bytes(path.read_bytes()[:1000])
            die()
        seen.append(path)

    checkpoint.save_file = save


def in_the_middle_of_a_line() -> None:
    original = os.fsync

    def sync(number: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{number}"))
        if path.name == JOURNAL and len(path.read_text().splitlines()) == 3:
            os.truncate(path, path.stat().st_size - 40)
            die()
        original(number)

    os.fsync = sync


POINTS = {
    "before-the-journal": lambda: before(checkpoint, "write_text", 0),
    "before-the-first-unit": lambda: before(Journal, "append", 0),
    "after-the-first-unit": lambda: after(Journal, "append", 0),
    "before-the-third-unit": lambda: before(Journal, "append", 2),
    "after-the-third-unit": lambda: after(Journal, "append", 2),
    "after-the-last-unit": lambda: after(Journal, "append", UNITS - 1),
    "in-the-middle-of-a-shard": in_the_middle_of_a_shard,
    "between-shard-and-line": lambda: before(checkpoint, "hash_files", 1),
    "in-the-middle-of-a-line": in_the_middle_of_a_line,
    "before-the-folder-is-renamed": lambda: before(Path, "rename", 0),
    "after-the-folder-is-renamed": lambda: after(Path, "rename", 0),
    "in-the-verification": lambda: before(verify, "main", 0),
    "before-the-report": lambda: after(verify, "verify", 0),
    "before-the-journal-is-closed": lambda: before(Journal, "close", 0),
}


@pytest.mark.parametrize("point", POINTS)
def test_killed_and_run_again(point, expected, dense_folder, text_file, tmp_path):
    output = tmp_path / "small"
    assert run_and_die(POINTS[point], lambda: compress(dense_folder, output, text_file)) == signal.SIGKILL
    is_named = output.exists()
    assert is_named == (list(POINTS).index(point) >= list(POINTS).index("after-the-folder-is-renamed"))
    assert partial(output).exists() != is_named
    report = compress(dense_folder, output, text_file)
    assert result(output) == result(expected)
    assert not partial(output).exists()
    assert {path.name for path in output.iterdir()} == {path.name for path in expected.iterdir()}
    whole = hf_compact.Report.read(expected / "compression_report.json")
    assert [layer.name for layer in report.layers] == [layer.name for layer in whole.layers]
    assert [layer.relative_error for layer in report.layers] == [layer.relative_error for layer in whole.layers]
    assert report.notes == whole.notes


def test_killed_again_and_again(expected, dense_folder, text_file, tmp_path):
    output = tmp_path / "small"
    for count in range(UNITS):
        assert (
            run_and_die(lambda: after(Journal, "append", 0), lambda: compress(dense_folder, output, text_file)) == signal.SIGKILL
        )
        assert len((partial(output) / JOURNAL).read_text().splitlines()) == 2 + count
    compress(dense_folder, output, text_file)
    assert result(output) == result(expected)


@pytest.mark.parametrize("family", ["llama_untied", "gpt2", "t5", "bert_mlm", "gemma3", "vit"])
def test_resuming_in_other_families(family, tmp_path, monkeypatch):
    """Blocks that were written are read back, and the ones after them see the same inputs."""
    tiny_model(family).save_pretrained(tmp_path / "dense")
    calibration = from_batches([tiny_inputs(family, seed=1)])

    def run(name: str) -> None:
        hf_compact.compress(tmp_path / "dense", RECIPE, output=tmp_path / name, calibration=calibration)

    run("whole")
    stop_after(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run("resumed")
    stop_after(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run("resumed")
    monkeypatch.setattr(Journal, "append", ORIGINAL_APPEND)
    run("resumed")
    assert result(tmp_path / "resumed") == result(tmp_path / "whole")


def test_a_real_process_is_killed(expected, dense_folder, text_file, tmp_path):
    """From outside, at whatever it is doing when the second block's line appears."""
    output, recipe = tmp_path / "small", tmp_path / "recipe.json"
    recipe.write_text(json.dumps(RECIPE))
    command = [sys.executable, "-m", "hf_compact", "compress", dense_folder, "--recipe", recipe, "--output", output]
    child = subprocess.Popen(
        [*map(str, command), "--calibration", str(text_file)], stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    journal = partial(output) / JOURNAL
    deadline = time.monotonic() + 120
    while child.poll() is None and time.monotonic() < deadline:
        if journal.exists() and journal.read_bytes().count(b"\n") >= 3:
            break
        time.sleep(0.002)
    child.kill()
    _, err = child.communicate()
    assert child.returncode == -signal.SIGKILL, err.decode()
    compress(dense_folder, output, text_file)
    assert result(output) == result(expected)


# Another run's folder.


def changed_source(dense_folder: Path, tmp_path: Path) -> Path:
    copy = Path(shutil.copytree(dense_folder, tmp_path / "changed"))
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_another_recipe_is_refused(stopped, dense_folder, text_file):
    held = result_of_partial(stopped)
    stages = [RECIPE["stages"][0] | {"bits": 4}]
    with pytest.raises(
        OutputError, match=r"small\.partial belongs to a run with another recipe .*: finish that run, choose another --output"
    ):
        compress(dense_folder, stopped, text_file, stages=stages)
    assert result_of_partial(stopped) == held


def test_other_weights_are_refused(stopped, dense_folder, text_file, tmp_path):
    with pytest.raises(OutputError, match="belongs to a run with another source "):
        compress(changed_source(dense_folder, tmp_path), stopped, text_file)


def test_another_calibration_is_refused(stopped, dense_folder, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("Some words of another text, again and again and again. " * 400)
    with pytest.raises(OutputError, match="belongs to a run with another calibration "):
        compress(dense_folder, stopped, other)


def test_another_seed_is_refused(stopped, dense_folder, text_file):
    with pytest.raises(OutputError, match="belongs to a run with another recipe "):
        compress(dense_folder, stopped, text_file, seed=1)


def test_other_versions_are_refused(stopped, dense_folder, text_file, monkeypatch):
    monkeypatch.setattr(api.transformers, "__version__", "9.9.9")
    with pytest.raises(OutputError, match="belongs to a run with another versions "):
        compress(dense_folder, stopped, text_file)


def test_a_finished_folder_is_not_resumed_with_another_recipe(dense_folder, text_file, tmp_path):
    """Killed between the rename and the verification: the folder has its name, but still belongs to that run."""
    output = tmp_path / "small"
    work = lambda: compress(dense_folder, output, text_file)  # noqa: E731
    assert run_and_die(POINTS["after-the-folder-is-renamed"], work) == signal.SIGKILL
    with pytest.raises(OutputError, match="belongs to a run with another recipe "):
        compress(dense_folder, output, text_file, seed=1)
    compress(dense_folder, output, text_file)
    assert inspect_folder(output)["is_verified"]


def result_of_partial(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in partial(output).iterdir()}


# Damage between two runs.


@pytest.mark.parametrize("damage", ["truncated", "deleted", "changed"])
def test_a_damaged_shard_is_made_again(damage, stopped, expected, dense_folder, text_file, caplog):
    shard = partial(stopped) / f"model-00002-of-{UNITS:05d}.safetensors"
    data = shard.read_bytes()
    if damage == "truncated":
        shard.write_bytes(data[:-7])
    elif damage == "changed":
        shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    else:
        shard.unlink()
    compress(dense_folder, stopped, text_file)
    assert f"{shard.name} is damaged; going on from its unit 'model.layers.0'" in caplog.text
    assert result(stopped) == result(expected)


@pytest.mark.parametrize(
    "line", ["{", "null", '{"unit": "model.layers.0"}', "\0" * 50], ids=["brace", "null", "incomplete", "zeros"]
)
def test_a_damaged_line_is_made_again(line, stopped, expected, dense_folder, text_file):
    journal = partial(stopped) / JOURNAL
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join([*lines[:2], line]) + "\n")
    compress(dense_folder, stopped, text_file)
    assert result(stopped) == result(expected)


@pytest.mark.parametrize("text", ["", "{\n", "null\n", "[]\n"])
def test_a_journal_without_its_first_line_is_refused(text, stopped, dense_folder, text_file):
    (partial(stopped) / JOURNAL).write_text(text)
    with pytest.raises(OutputError, match=r"small\.partial"):
        compress(dense_folder, stopped, text_file)


# The disk.


def test_disk_full(expected, dense_folder, text_file, tmp_path, monkeypatch):
    output, original, calls = tmp_path / "small", checkpoint.save_file, []

    def save(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", save)
    message = r"disk full while writing .*small\.partial \(\d+ MB free\): free some space and run the same command again"
    with pytest.raises(OutputError, match=message):
        compress(dense_folder, output, text_file)
    assert not output.exists()
    assert not list(partial(output).glob("*.tmp"))
    assert len(list(partial(output).glob("*.safetensors"))) == 2
    compress(dense_folder, output, text_file)
    assert len(calls) == 3 + 2  # two units were kept
    assert result(output) == result(expected)


@pytest.mark.parametrize("point", ["config.json", "model.safetensors.index.json", "compression_report.json", "README.md"])
def test_disk_full_at_the_end(point, expected, dense_folder, text_file, tmp_path, monkeypatch):
    output, original, is_full = tmp_path / "small", Path.open, [True]

    def full(self, mode="r", *args, **kwargs):
        if is_full[0] and self.name.startswith(point) and "w" in mode:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return original(self, mode, *args, **kwargs)

    def save_config(self, folder, *args, **kwargs):
        if is_full[0] and point == "config.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original_save(self, folder, *args, **kwargs)

    original_save = transformers.PreTrainedConfig.save_pretrained
    monkeypatch.setattr(Path, "open", full)
    monkeypatch.setattr(transformers.PreTrainedConfig, "save_pretrained", save_config)
    with pytest.raises(OutputError, match=r"disk full while writing .* \(\d+ MB free\)"):
        compress(dense_folder, output, text_file)
    is_full[0] = False
    assert compress(dense_folder, output, text_file).is_verified
    assert result(output) == result(expected)
    assert {path.name for path in output.iterdir()} == {path.name for path in expected.iterdir()}


def test_a_disk_that_is_really_full(expected, dense_folder, text_file, tmp_path):
    """A tiny file system where mounting is allowed; elsewhere a limit on the size of a file."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = (
        subprocess.Popen(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], stderr=subprocess.DEVNULL).wait() == 0
    )
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if not mounted:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, 16_000))
            compress(dense_folder, disk / "small", text_file)
        except OutputError as error:
            rule = "disk full while writing" if mounted else "cannot be written"
            code = 42 if rule in str(error) and "MB free" in str(error) else 2
        except BaseException:
            code = 3
        finally:
            os._exit(code)
    try:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42
        assert not (disk / "small").exists()
        if mounted:
            assert subprocess.Popen(["mount", "-o", "remount,size=10m", str(disk)]).wait() == 0
        compress(dense_folder, disk / "small", text_file)
        assert result(disk / "small") == result(expected)
    finally:
        if mounted:
            assert subprocess.Popen(["umount", str(disk)]).wait() == 0


# Outputs that are refused.


def test_output_with_something_in_it(dense_folder, text_file, tmp_path):
    output = tmp_path / "small"
    output.mkdir()
    (output / "thesis.txt").write_text("mine")
    with pytest.raises(
        OutputError, match=r"output '.*small' exists and is not an empty folder: choose another --output or delete it"
    ):
        compress(dense_folder, output, text_file)
    assert [(path.name, path.read_text()) for path in output.iterdir()] == [("thesis.txt", "mine")]
    assert not partial(output).exists()


def test_a_finished_output_is_not_overwritten(expected, dense_folder, text_file):
    before = result(expected)
    with pytest.raises(OutputError, match="exists and is not an empty folder"):
        compress(dense_folder, expected, text_file)
    assert result(expected) == before


def test_output_that_is_a_file(dense_folder, text_file, tmp_path):
    (tmp_path / "small").write_text("mine")
    with pytest.raises(OutputError, match="exists and is not an empty folder"):
        compress(dense_folder, tmp_path / "small", text_file)
    with pytest.raises(OutputError, match=r"cannot be created: .*small is not a folder that can be written"):
        compress(dense_folder, tmp_path / "small" / "below", text_file)
    assert (tmp_path / "small").read_text() == "mine"


def test_a_parent_that_cannot_be_written(dense_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match=r"cannot be created: .* is not a folder that can be written"):
        compress(dense_folder, tmp_path / "small", text_file)
    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_refuses_everybody(dense_folder, text_file):
    with pytest.raises(OutputError, match=r"cannot be (written|created)"):
        compress(dense_folder, Path("/proc/self/small"), text_file)


def test_one_process_at_a_time_writes_to_a_folder(tmp_path):
    output, record = tmp_path / "small", {"modules": {}, "layers": [], "notes": []}
    with Journal(output, {"recipe": 1}, num_units=1) as journal:
        journal.append("unit", {"a": torch.zeros(2)}, record)
        with pytest.raises(OutputError, match=r"small\.partial is being written by another process: wait for it, or choose"):
            Journal(output, {"recipe": 1}, num_units=1)
        journal.finish(lambda folder: None)
        with pytest.raises(OutputError, match="small is being written by another process"):
            Journal(output, {"recipe": 1}, num_units=1)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    with pytest.raises(OutputError, match="belongs to a run with another recipe"):
        Journal(output, {"recipe": 2}, num_units=1)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]  # what waits for its verification keeps its name
    assert len(Journal(output, {"recipe": 1}, num_units=1).entries) == 1


def test_a_disk_without_locks_is_written_to(tmp_path, monkeypatch, caplog):
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(checkpoint.fcntl, "flock", refuse)
    with Journal(tmp_path / "small", {"recipe": 1}, num_units=1) as journal:
        assert journal.entries == []
    assert "small.partial cannot be locked (Bad file descriptor): see to it that no other process" in caplog.text


def test_a_unit_that_stands_twice_in_a_journal_counts_once(tmp_path):
    output, record = tmp_path / "small", {"modules": {}, "layers": [], "notes": []}
    with Journal(output, {"recipe": 1}, num_units=2) as journal:
        journal.append("unit", {"a": torch.zeros(2)}, record)
    path = partial(output) / JOURNAL
    path.write_text(path.read_text() + path.read_text().splitlines()[1] + "\n")
    assert len(Journal(output, {"recipe": 1}, num_units=2).entries) == 1


def test_a_model_in_memory_leaves_nothing_of_a_folder_that_could_not_be_written(monkeypatch, tmp_path):
    def fail(self, folder: Path, **kwargs) -> None:
        Path(folder).mkdir()
        Path(folder, "config.json").write_text("{}")
        raise OSError(errno.ENOSPC, "No space left on device")

    model = tiny_model("llama")
    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", fail)
    with pytest.raises(OutputError, match="disk full while writing"):
        hf_compact.compress(model, RECIPE, output=tmp_path / "small", calibration=from_batches([tiny_inputs("llama")]))
    assert list(tmp_path.iterdir()) == []


def test_another_profile_in_the_same_file_is_another_run(tmp_path):
    path = tmp_path / "profile.json"
    recipe = api.as_recipe({"stages": [{"method": "tensor_network", "allocation": "profile", "profile": str(path)}]})
    hashes = []
    for text in ("{}", "{ }", "{}"):
        path.write_text(text)
        hashes.append(api._hashes_of_profiles(recipe))
    assert hashes[0] == hashes[2] != hashes[1]
    assert api._hashes_of_profiles(api.as_recipe(RECIPE)) == {}


# Inputs of other kinds.


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("distillation", [None, {"num_sequences": 1}], ids=["plain", "distilled"])
def test_rows_of_a_training_set_are_verified_by_their_logits(family, distillation, tmp_path, monkeypatch):
    """Their labels, here the very tensor of the inputs, put a loss before the logits."""
    shapes, of = [], verify.verify
    monkeypatch.setattr(verify, "verify", lambda *args: shapes.append(args[2].shape) or of(*args))
    ids = tiny_inputs(family)["input_ids"]
    batch = {"input_ids": ids, "labels": ids} | ({"decoder_input_ids": ids} if family == "t5" else {})
    tiny_model(family).save_pretrained(tmp_path / "dense")
    recipe = {"stages": [{"method": "codebook", "bits": 4}], "distillation": distillation}
    report = hf_compact.compress(tmp_path / "dense", recipe, output=tmp_path / "small", calibration=from_batches([batch]))
    assert report.is_verified
    assert shapes == [(1, *ids.shape[1:], VOCABULARY)]


def test_damaged_and_unknown_checkpoints_are_named(dense_folder, text_file, tmp_path):
    folder = Path(shutil.copytree(dense_folder, tmp_path / "dense"))
    (folder / "tokenizer.json").write_text('{"version": "1.0", "trunc')
    with pytest.raises(FormatError, match=r"dense has a tokenizer that cannot be read"):
        compress(folder, tmp_path / "small", text_file)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    for text in ("", '{"weight_map": {"model.nor', "{}", "[]"):
        (folder / checkpoint.INDEX_NAME).write_text(text)
        with pytest.raises(FormatError, match=r"index.json is no index of shards, or only a part of one"):
            TensorSource.in_folder(folder)
    save_file({"packed": torch.zeros(2, dtype=torch.uint32)}, tmp_path / "a.safetensors")
    assert TensorSource([tmp_path / "a.safetensors"]).headers() == {"packed": ("U32", [2], 8)}
    save_file({"scales": torch.zeros(2, dtype=torch.float8_e8m0fnu)}, tmp_path / "b.safetensors")
    with pytest.raises(FormatError, match=r"scales in .*b.safetensors has the dtype F8_E8M0, known are BOOL"):
        TensorSource([tmp_path / "b.safetensors"]).headers()


def test_a_stub_needs_a_folder():
    with pytest.raises(ConfigError, match=r"recipe\.auto_map writes a file beside a model: give an output folder"):
        hf_compact.compress(tiny_model("llama"), RECIPE | {"auto_map": True}, calibration=from_batches([tiny_inputs("llama")]))


# Weights that are refused.


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("name", ["model.layers.2.mlp.down_proj.weight", "model.norm.weight", "model.embed_tokens.weight"])
def test_a_weight_that_is_not_finite(name, value, dense_folder, text_file, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(dense_folder)
    model.get_parameter(name).data.view(-1)[5] = value
    dense = Path(shutil.copytree(dense_folder, tmp_path / "dense"))
    model.save_pretrained(dense)
    message = f"{name} holds 1 values that are not finite"
    with pytest.raises(NumericalError, match=message):
        compress(dense, tmp_path / "small", text_file)
    calibration = from_batches([tiny_inputs("llama")])
    with pytest.raises(NumericalError, match=message):
        hf_compact.compress(model, RECIPE, output=tmp_path / "small", calibration=calibration)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_checkpoint_that_lacks_a_tensor(dense_folder, text_file, tmp_path):
    dense = Path(shutil.copytree(dense_folder, tmp_path / "dense"))
    tensors = load_file(dense / "model.safetensors")
    del tensors["model.layers.2.mlp.down_proj.weight"]
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"lacks model\.layers\.2\.mlp\.down_proj\.weight, which LlamaForCausalLM needs"):
        compress(dense, tmp_path / "small", text_file)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_checkpoint_with_another_shape(dense_folder, text_file, tmp_path):
    dense = Path(shutil.copytree(dense_folder, tmp_path / "dense"))
    tensors = load_file(dense / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"] = torch.zeros(32, 71)
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    message = r"model\.layers\.2\.mlp\.down_proj\.weight has the shape \[32, 71\] in the checkpoint, \[32, 72\] in the model"
    with pytest.raises(FormatError, match=message):
        compress(dense, tmp_path / "small", text_file)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


# A verification that fails.


def tampered(shard: Path) -> None:
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith("down_proj.weight"))
    tensors[name] = tensors[name] ^ 0x55
    save_file(tensors, shard, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (tampered, r"gives other logits after reloading: they differ by .* of the largest, allowed are 1e-04"),
        (lambda shard: shard.write_bytes(shard.read_bytes()[:-3]), "does not load in a fresh process: .*is not a complete safetensors"),
        (Path.unlink, "does not load in a fresh process: .*model-00003"),
    ],
    ids=["tampered", "truncated", "deleted"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["folder", "memory"])
def test_a_failed_verification_is_said_everywhere(
    kind, damage, reason, dense_folder, text_file, tokenizer, tmp_path, monkeypatch
):
    output, original = tmp_path / "small", verify.verify

    def damaged(folder, *args):
        damage(sorted(folder.glob("*.safetensors"))[2 if kind == "folder" else 0])
        return original(folder, *args)

    monkeypatch.setattr(verify, "verify", damaged)
    reason = reason if kind == "folder" else reason.replace("model-00003", "")
    model = dense_folder if kind == "folder" else transformers.AutoModelForCausalLM.from_pretrained(dense_folder)
    with pytest.raises(VerificationError, match=reason):
        hf_compact.compress(model, RECIPE, output=output, calibration=[text_file], tokenizer=tokenizer)
    report = hf_compact.Report.read(output / "compression_report.json")
    assert report.verification["verified"] is False
    assert not report.is_verified
    assert report.verification["reason"]
    text = (output / "README.md").read_text()
    assert "**This folder failed its verification**" in text
    assert "gave the same logits" not in text
    assert not (output / JOURNAL).exists()
    if damage is tampered:
        assert inspect_folder(output)["is_verified"] is False
    with pytest.raises(OutputError, match="exists and is not an empty folder"):
        compress(dense_folder, output, text_file)


TRAINED = {
    "stages": [{"method": "entropy", "bits": 4.0}],
    "calibration": {"num_sequences": 4, "sequence_length": 32, "batch_size": 2},
    "distillation": {"num_sequences": 4, "batch_size": 2},
}


@pytest.fixture(scope="module")
def trained(dense_folder, text_file, tmp_path_factory) -> Path:
    """An uninterrupted run with sensitivities before the blocks and a distillation behind them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(card, "plot_layers", lambda report, path: path.write_bytes(b""))
        output = tmp_path_factory.mktemp("trained") / "small"
        hf_compact.compress(dense_folder, TRAINED, output=output, calibration=[text_file])
    return output


@pytest.mark.parametrize(("step", "count"), [("append", 1), ("append", 3), ("replace", 1), ("replace", UNITS)])
def test_a_distilled_run_goes_on_to_the_same_bytes(step, count, trained, dense_folder, text_file, tmp_path, monkeypatch):
    """Stopped between blocks, between units that are written for the second time, or after the last of them."""
    original, done = getattr(Journal, step), []

    def stop(journal: Journal, *args) -> None:
        original(journal, *args)
        done.append(args)
        if len(done) == count:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, step, stop)
    with pytest.raises(KeyboardInterrupt):
        hf_compact.compress(dense_folder, TRAINED, output=tmp_path / "small", calibration=[text_file])
    monkeypatch.setattr(Journal, step, original)
    report = hf_compact.compress(dense_folder, TRAINED, output=tmp_path / "small", calibration=[text_file])
    assert result(tmp_path / "small") == result(trained)
    assert report.distillation == json.loads((trained / "compression_report.json").read_text())["distillation"]
