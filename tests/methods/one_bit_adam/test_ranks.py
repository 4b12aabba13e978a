"""Two and three gloo processes: the same parameters on all, bytes as promised, errors on all ranks at once."""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hf_compact import CommReport, OneBitAdam, OneBitAdamConfig
from hf_compact.errors import ConfigError, NumericalError, UnsupportedModel, VerificationError
from hf_compact.methods.one_bit_adam.exchange import CompressedMean
from tests.ranks import run_ranks

TIMEOUT_SECONDS = 240
STEPS, FREEZE, WIDTH = 60, 20, 64
SETTINGS = {
    "adam": {"exchange": "none"},
    "bf16": {"exchange": "none", "gradients": "bf16"},
    "power_sgd": {"exchange": "power_sgd"},
    "one_bit": {"check_every": 5},
    "fp16_warmup": {"gradients": "fp16"},
    "dense": {"dense": ("0.*",)},
    "adaptive": {"adaptive_bits": 4, "replan_every": 10},
    "local": {"local_steps": 4, "local_steps_double_every": 8, "check_every": 5},
    "adaptive_local": {"local_steps": 4, "local_steps_double_every": 1, "adaptive_bits": 4, "replan_every": 10},
}


def toy() -> tuple[nn.Module, torch.Tensor]:
    """A model, and the matrix that it has to learn; input 0 is always 0, so the weights of it get no gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, WIDTH))
    return model, torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9)) / 8


def batch(step: int, rank: int) -> torch.Tensor:
    inputs = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(1000 * step + rank))
    inputs[:, 0] = 0
    return inputs


def train(settings: dict, steps: int = STEPS, **attach) -> tuple[DistributedDataParallel, OneBitAdam, list[float]]:
    model, target = toy()
    optimizer = OneBitAdam(model.parameters(), lr=3e-3, config=OneBitAdamConfig(**{"freeze": FREEZE} | settings))
    ddp = DistributedDataParallel(model)
    optimizer.attach(ddp, **attach)
    losses = []
    for step in range(steps):
        inputs = batch(step, dist.get_rank())
        loss = (ddp(inputs) - inputs @ target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        losses.append(loss.item())
    return ddp, optimizer, losses


def check_error_feedback() -> None:
    """What went in is what came out and what the errors hold, however often the widths change."""
    size, generator = dist.get_world_size(), torch.Generator().manual_seed(dist.get_rank())
    mean = CompressedMean([30, 100, 7], [1, 1, 1], None, CommReport(137, size), torch.device("cpu"))
    put_in, come_out = torch.zeros(137), torch.zeros(137)
    for bits in ([1, 1, 1], [1, 1, 1], [2, 1, 8], [16, 4, 1], [1, 8, 2]):
        mean.set_bits(bits)
        values, target = torch.randn(137, generator=generator), torch.empty(137)
        put_in += values
        mean.buffer.add_(values)
        mean.mean_into(target)
        come_out += target
    mean._own(mean.buffer).add_(mean.server_error, alpha=size)
    for total in (put_in, mean.buffer):
        dist.all_reduce(total)
    torch.testing.assert_close(come_out * size + mean.buffer, put_in, rtol=1e-4, atol=1e-4)
    mean.buffer[3] = torch.nan if dist.get_rank() == 1 else 0.0
    with pytest.raises(NumericalError, match="a gradient is not finite on some rank"):
        mean.mean_into(target)


def check_refusals() -> None:
    model, _ = toy()
    with pytest.raises(ConfigError, match=r"no parameter is left to compress: .* the largest has 8192"):
        train({"min_numel": 10**6}, steps=0)
    fully_shard(model)
    with pytest.raises(UnsupportedModel, match="whole parameters on every rank, got DTensor: FSDP and ZeRO shard them"):
        OneBitAdam(model.parameters(), total_steps=9)
    _, optimizer, _ = train({}, steps=1)
    for state in optimizer.state.values():
        state["exp_avg_sq"].zero_()
    with pytest.raises(ConfigError, match="no tensor is left to compress after 1 steps"):
        optimizer.freeze()


def check_divergence() -> None:
    ddp, optimizer, _ = train({}, steps=FREEZE + 2)
    optimizer.check_replicas()
    if dist.get_rank() == 1:
        ddp.module[2].bias.data[0] += 1e-6
    with pytest.raises(VerificationError, match=rf"after step {FREEZE + 2} 1 of 4 tensors differ between ranks: 2\.bias"):
        optimizer.check_replicas()


def check_numbers_that_are_not_finite() -> None:
    """One rank's gradient in the warm-up stops all; so does a parameter that became so without clipping."""
    ddp, optimizer, _ = train({}, steps=2)
    poison = torch.nan if dist.get_rank() == 1 else 1.0
    optimizer.zero_grad()
    (ddp(batch(2, dist.get_rank())).square().mean() * poison).backward()
    with pytest.raises(NumericalError, match="the gradient's norm is nan before step 3: lower the learning rate"):
        optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    with pytest.raises(NumericalError, match=r"0\.weight is not finite after step 3: lower the learning rate"):
        optimizer.check_replicas()


def check_overflow() -> None:
    """An overflow on one rank makes all skip the step and halve the scale, and training goes on."""
    ddp, optimizer, _ = train({}, steps=FREEZE + 1, agrees_on_overflow=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for overflows in (False, True, False):
        before, inputs = ddp.module[0].weight.clone(), batch(0, dist.get_rank())
        loss = ddp(inputs).square().mean()
        if overflows and dist.get_rank() == 1:
            loss = loss * torch.inf
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, ddp.module[0].weight) == overflows
    assert scaler.get_scale() == 2.0
    optimizer.check_replicas()


def check_saving(folder: Path) -> None:
    """A run that is saved and loaded after the warm-up goes on as if nothing had happened."""
    ddp, optimizer, _ = train({}, steps=FREEZE + 5)
    # The gradients in each variance, so that AdamW alone corrects the bias of a frozen one as before: weight, bias, twice.
    assert [int(optimizer.state[p]["step"]) for p in ddp.parameters()] == 2 * [FREEZE, FREEZE + 5]
    optimizer.save_errors(folder)
    dist.barrier()
    other, _ = toy()
    other.load_state_dict(ddp.module.state_dict())
    adamw = torch.optim.AdamW(other.parameters(), lr=3e-3)
    adamw.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch would share the tensors
    again = OneBitAdam.from_adamw(adamw, config=optimizer.config)
    wrapped = DistributedDataParallel(other)
    again.attach(wrapped)
    assert again.is_compressing
    assert again.report.num_steps == optimizer.report.num_steps
    assert again.load_errors(folder)
    for net, its_optimizer in ((ddp, optimizer), (wrapped, again)):
        its_optimizer.zero_grad()
        net(batch(77, dist.get_rank())).square().mean().backward()
        its_optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(ddp.parameters(), wrapped.parameters(), strict=True))
    assert not again.load_errors(folder)  # they belong to the step before
    assert not again.load_errors(folder / "nowhere")

    _, local, _ = train(SETTINGS["local"], steps=FREEZE + 10)
    with pytest.raises(VerificationError, match=r"ranks are apart by local steps: call OneBitAdam\.synchronize"):
        local.state_dict()
    local.synchronize()
    local.check_replicas()
    assert local.state_dict()["param_groups"][0]["one_bit_adam"]["frozen_at"] == FREEZE


def work(rank: int, folder: str) -> None:
    """What each process does; starting them takes longer than all of it, so they start once."""
    for name, settings in SETTINGS.items():
        ddp, optimizer, losses = train(settings)
        optimizer.synchronize()
        save_file(
            {key: value.contiguous() for key, value in ddp.module.state_dict().items()},
            Path(folder, f"{name}-{rank}.safetensors"),
        )
        row = {"losses": losses, "report": optimizer.report.to_dict(), "bits": optimizer._progress["bits"]}
        Path(folder, f"{name}-{rank}.json").write_text(json.dumps(row))
    check_error_feedback()
    check_divergence()
    check_numbers_that_are_not_finite()
    if dist.get_world_size() == 2:
        check_refusals()
        check_overflow()
    check_saving(Path(folder, "errors"))
    Path(folder, f"{rank}.done").touch()


@pytest.fixture(scope="module", params=[2, 3], ids=["two ranks", "three ranks"])
def ranks(request, tmp_path_factory) -> tuple[int, Path]:
    """How many ranks there were, and the folder of what they wrote; all are ended if they take too long."""
    folder = tmp_path_factory.mktemp(f"{request.param}-ranks")
    run_ranks(work, str(folder), seconds=TIMEOUT_SECONDS, count=request.param)
    return request.param, folder


def rows(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}-0.json").read_text())


@pytest.mark.distributed
def test_every_rank_ran_every_check(ranks):
    size, folder = ranks
    assert len(list(folder.glob("*.done"))) == size
    assert len(list((folder / "errors").glob("one_bit_adam_rank*.safetensors"))) == size


@pytest.mark.distributed
@pytest.mark.parametrize("name", SETTINGS)
def test_parameters_are_the_same_on_all_ranks_bit_for_bit(ranks, name):
    size, folder = ranks
    first, *others = (load_file(folder / f"{name}-{rank}.safetensors") for rank in range(size))
    for other in others:
        assert first.keys() == other.keys()
        assert all(torch.equal(first[key].view(torch.int32), other[key].view(torch.int32)) for key in first)


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["one_bit", "fp16_warmup", "dense", "adaptive", "local"])
def test_training_goes_on_as_adams_does(ranks, name):
    _, folder = ranks
    end = {key: sum(rows(folder, key)["losses"][-10:]) / 10 for key in ("adam", name)}
    start = rows(folder, "adam")["losses"][0]
    assert end[name] < end["adam"] + 0.1 * (start - end["adam"])


@pytest.mark.distributed
def test_bytes_are_those_of_the_formula(ranks):
    size, folder = ranks
    weights, biases = 2 * 2 * WIDTH * WIDTH, 3 * WIDTH
    reports = {name: rows(folder, name)["report"] for name in SETTINGS}
    share = 2 * (size - 1) / size
    dense = share * 4 * (weights + biases)
    compression = {name: report["sent_bytes"].get("compression", {}) for name, report in reports.items()}
    assert {name: report["world_size"] for name, report in reports.items()} == dict.fromkeys(SETTINGS, size)
    assert reports["adam"]["by_phase"] == {"training": pytest.approx({"bytes_per_step": dense, "reduction": 1.0})}
    assert reports["bf16"]["by_phase"]["training"]["reduction"] == pytest.approx(2)
    assert reports["fp16_warmup"]["sent_bytes"]["warm-up"]["gradients"] == pytest.approx(FREEZE * dense / 2)
    assert reports["one_bit"]["num_steps"] == {"warm-up": FREEZE, "compression": STEPS - FREEZE}
    for kind in ("momentum, to its server", "mean momentum, to all"):
        # A scale for each of at most three segments of a chunk, in whole words; the bits are 1 / size of the weights.
        bits, sent = (size - 1) * weights / 8 / size, compression["one_bit"][kind] / (STEPS - FREEZE)
        assert bits < sent <= bits + (size - 1) * (4 * 3 + 4)
    exact = compression["one_bit"]["small tensors, exactly"] / (STEPS - FREEZE)
    assert exact == pytest.approx(share * 4 * (biases + 2))  # and whether each of two has a gradient
    one_bit = sum(compression["one_bit"].values())
    assert compression["local"]["mean momentum, to all"] < 0.5 * compression["one_bit"]["mean momentum, to all"]
    assert one_bit < sum(compression["adaptive"].values()) < dense * (STEPS - FREEZE) / 7
    assert compression["dense"]["small tensors, exactly"] > compression["one_bit"]["small tensors, exactly"]
    assert reports["power_sgd"]["by_phase"]["compression"]["reduction"] > 10


@pytest.mark.distributed
def test_values_without_a_variance_stay_as_they_are(ranks):
    _, folder = ranks
    before = toy()[0].state_dict()["0.weight"][:, 0]
    after = load_file(folder / "one_bit-0.safetensors")["0.weight"][:, 0]
    decay = (1 - 3e-3 * 1e-2) ** STEPS  # weight decay alone
    torch.testing.assert_close(after, before * decay, rtol=1e-4, atol=1e-6)


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["adaptive", "adaptive_local"])
def test_widths_of_lgreco_are_allowed_ones(ranks, name):
    _, folder = ranks
    bits = rows(folder, name)["bits"]
    assert len(bits) == 2
    assert set(bits) <= {1, 2, 4, 8, 16}
    assert bits != [1, 1]
