"""The stock Trainer under torchrun and accelerate launch: one line, a lost rank, and going on from its last checkpoint."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_compact import OneBitAdamCallback
from hf_compact.methods.one_bit_adam.callback import REPORT_FILE
from tests.methods.one_bit_adam import train

ROOT = Path(__file__).parents[3]
TIMEOUT_SECONDS = 240


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--main_process_port", "0", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_processes"]


def launch(launcher: list[str], num_processes: int, folder: Path, what: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", *launcher, str(num_processes), train.__file__, str(folder), what]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=TIMEOUT_SECONDS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Folder of a run that lost a rank, and of all runs that did not."""
    folder = tmp_path_factory.mktemp("trainer")
    started = time.monotonic()
    done = launch(TORCHRUN, 2, folder, "killed")
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL)" in done.stderr
    assert time.monotonic() - started < TIMEOUT_SECONDS
    assert not list(folder.glob("killed-rank*"))  # no rank came to its end
    shutil.copytree(folder / "killed", folder / "kept")
    done = launch(TORCHRUN, 2, folder, "all")
    assert done.returncode == 0, done.stderr
    assert "Sent by each of 2 ranks" in done.stderr
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize(
    "name", ["straight", "plain", "killed", "moved", "forgetful", "bf16", "ternary", "healed", "pruned", "again"]
)
def test_ranks_end_with_the_same_parameters(runs, name):
    first, second = (load_file(runs / f"{name}-rank{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.distributed
def test_other_callbacks_finish_their_work(runs):
    """Weights are packed and channels cut in the phase in which the ranks send bits."""
    name = "model.layers.0.mlp.up_proj"
    ternary, pruned = (load_file(runs / f"{run}-rank0.safetensors") for run in ("ternary", "pruned"))
    assert any(key.startswith(name) and tensor.dtype == torch.uint8 for key, tensor in ternary.items())
    assert pruned[f"{name}.weight"].shape == (48, 32)
    for run in ("ternary", "pruned"):
        phases = json.loads((runs / f"{run}.json").read_text())["report"]["num_steps"]
        assert phases == {"warm-up": 8, "compression": train.STEPS - 8}


@pytest.mark.distributed
def test_a_run_that_lost_a_rank_ends_as_if_it_had_not(runs):
    """Bit for bit, wherever its checkpoint lies; and nearly so where a rank's errors are lost with it."""
    plain, resumed, moved = (load_file(runs / f"{name}-rank0.safetensors") for name in ("plain", "killed", "moved"))
    assert all(torch.equal(plain[key], resumed[key]) and torch.equal(plain[key], moved[key]) for key in plain)
    loss, without_errors = (json.loads((runs / f"{name}.json").read_text())["log"][-2]["loss"] for name in ("plain", "forgetful"))
    assert without_errors == pytest.approx(loss, rel=0.05)
    reports = [json.loads((runs / f"{name}.json").read_text())["report"] for name in ("plain", "killed")]
    assert reports[0]["num_steps"] == reports[1]["num_steps"] == {"warm-up": 8, "compression": train.STEPS_AFTER_50 - 8}


@pytest.mark.distributed
def test_logs_and_the_report_hold_the_bytes(runs):
    result = json.loads((runs / "plain.json").read_text())
    logged = {row["step"]: row for row in result["log"] if "comm_reduction" in row}
    assert set(logged) == set(range(4, train.STEPS_AFTER_50 + 1, 4))
    assert logged[4]["comm_reduction"] == pytest.approx(1.0, rel=0.01)
    assert logged[12]["comm_reduction"] > 5
    assert all(row["grad_norm"] > 0 for row in logged.values())
    assert logged[train.STEPS_AFTER_50]["loss"] < logged[4]["loss"]
    assert result["max_grad_norm"] == 1.0  # given back to the arguments
    assert json.loads((runs / "plain" / REPORT_FILE).read_text()) == result["report"]


@pytest.mark.distributed
def test_a_trainer_goes_on_after_ctrl_c_with_its_clipping(runs):
    assert json.loads((runs / "again.json").read_text())["max_grad_norm"] == 1.0


@pytest.mark.distributed
def test_another_number_of_ranks_goes_on_with_a_warning(runs):
    for name in ("killed", "four"):
        shutil.rmtree(runs / name, ignore_errors=True)
    shutil.copytree(runs / "kept", runs / "killed")
    done = launch(ACCELERATE, 4, runs, "four")
    assert done.returncode == 0, done.stderr
    heard = json.loads((runs / "four-0.json").read_text())
    assert any(f"the checkpoint of step {train.SAVED} has no errors of 1-bit Adam for 4 ranks" in text for text in heard)
    first, *others = (load_file(runs / f"four-rank{rank}.safetensors") for rank in range(4))
    assert all(torch.equal(first[key], other[key]) for other in others for key in first)


def test_one_process_is_the_trainers_own_adamw(tmp_path):
    with_callback = train.train(tmp_path, "with", config=train.CONFIG).model.state_dict()
    trainer = train.train(tmp_path, "without", callback=False)
    assert not any(isinstance(callback, OneBitAdamCallback) for callback in trainer.callback_handler.callbacks)
    assert all(torch.equal(with_callback[key], value) for key, value in trainer.model.state_dict().items())
