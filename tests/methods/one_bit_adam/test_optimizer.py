"""One process: AdamW to the bit, refusals, and the counting of bytes."""

import copy
import gc
import types

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import hf_compact
from hf_compact import CommReport, OneBitAdam, OneBitAdamCallback, OneBitAdamConfig
from hf_compact.errors import ConfigError, NothingMatched, UnsupportedModel
from hf_compact.methods.one_bit_adam import callback as callback_module
from hf_compact.methods.one_bit_adam import optimizer as module


def model_and_data() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, 8)), torch.randn(32, 64)


def test_parameters_keep_their_numbers_in_other_groups():
    """As those without weight decay are for one update; a checkpoint counts by the groups of the Trainer."""
    parameters = [nn.Parameter(torch.zeros(size)) for size in (3, 4, 5)]
    optimizer = OneBitAdam(parameters, config=OneBitAdamConfig(freeze=3))
    group = optimizer.param_groups[0]
    group["params"] = [parameters[0], parameters[2]]
    optimizer.param_groups.append(group | {"params": [parameters[1]]})
    assert [len(p) for _, p in optimizer._trained()] == [3, 4, 5]


@pytest.mark.parametrize(
    "settings", [{}, {"foreach": True}, {"fused": True}, {"weight_decay": 0.1, "betas": (0.8, 0.95)}], ids=str
)
def test_one_rank_is_adamw_to_the_bit(settings):
    model, data = model_and_data()
    other = copy.deepcopy(model)
    ours = OneBitAdam(model.parameters(), lr=1e-2, config=OneBitAdamConfig(freeze=3), **settings)
    ours.attach(model)
    theirs = torch.optim.AdamW(other.parameters(), lr=1e-2, **settings)
    for _ in range(10):
        for net, optimizer in ((model, ours), (other, theirs)):
            optimizer.zero_grad()
            net(data).square().mean().backward()
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    assert not ours.is_compressing
    assert ours.num_steps == 10
    assert ours.report.total_bytes == 0
    assert ours.report.reduction() == 1.0


def test_states_travel_between_adamw_and_ours():
    model, data = model_and_data()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(data).sum().backward()
    adamw.step()
    ours = OneBitAdam.from_adamw(adamw, total_steps=10)
    assert ours.num_steps == 1
    assert all(group is mine for group, mine in zip(adamw.param_groups, ours.param_groups, strict=True))
    before = model(data).sum()
    assert torch.equal(ours.step(lambda: model(data).sum()), before)
    again = OneBitAdam(model.parameters(), total_steps=10)
    again.load_state_dict(ours.state_dict())
    assert again.num_steps == 2
    torch.optim.AdamW(model.parameters()).load_state_dict(again.state_dict())


def test_clipping_is_torchs_on_one_rank():
    model, data = model_and_data()
    optimizer = OneBitAdam(model.parameters(), total_steps=10)
    model(data).square().sum().backward()
    before = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert optimizer.clip_grad_norm_(0.5) == pytest.approx(before.item())
    assert torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item() == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "freeze = auto needs total_steps of at least 1, got None"),
        ({"config": OneBitAdamConfig(freeze=0.2), "total_steps": 0}, "freeze = 0.2 needs total_steps of at least 1, got 0"),
        ({"total_steps": 9, "amsgrad": True}, "no amsgrad"),
        ({"total_steps": 9, "maximize": True}, "no maximize"),
    ],
    ids=["auto", "fraction", "amsgrad", "maximize"],
)
def test_impossible_settings_are_refused_at_start(settings, message):
    with pytest.raises(ConfigError, match=message):
        OneBitAdam([nn.Parameter(torch.ones(2))], **settings)


def test_other_optimizers_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"got torch.optim.sgd.SGD"):
        OneBitAdam.from_adamw(torch.optim.SGD([nn.Parameter(torch.ones(2))]), total_steps=9)


def test_sparse_embeddings_are_refused_by_name():
    model = nn.ModuleDict({"words": nn.Embedding(10, 4, sparse=True)})
    with pytest.raises(UnsupportedModel, match="set sparse=False in words"):
        OneBitAdam(model.parameters(), total_steps=9).attach(model)


def test_flat_parameters_of_fsdp_are_refused():
    class FlatParameter(nn.Parameter):
        pass

    with pytest.raises(UnsupportedModel, match="whole parameters on every rank, got FlatParameter: FSDP and ZeRO"):
        OneBitAdam([FlatParameter(torch.ones(2))], total_steps=9)


def test_two_devices_are_refused():
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, device="meta"))]
    with pytest.raises(UnsupportedModel, match="one device per rank, got cpu, meta"):
        OneBitAdam(parameters, total_steps=9)


def test_a_glob_that_matches_nothing_is_an_error():
    model, _ = model_and_data()
    with pytest.raises(NothingMatched, match=r"dense glob '\*embed\*' matches none of 4 parameters"):
        OneBitAdam(model.parameters(), total_steps=9, config=OneBitAdamConfig(dense=("*embed*",))).attach(model)


def test_several_ranks_need_ddp_and_something_to_compress(monkeypatch):
    model, data = model_and_data()
    optimizer = OneBitAdam(model.parameters(), total_steps=9)
    monkeypatch.setattr(module, "world_size", lambda: 2)
    with pytest.raises(
        UnsupportedModel,
        match=r"on 2 ranks needs a model in DistributedDataParallel, got Sequential; without a GPU .* use_cpu=True",
    ):
        optimizer.attach(model)
    model(data).sum().backward()
    with pytest.raises(UnsupportedModel, match=r"call OneBitAdam\.attach with the DDP model"):
        optimizer.step()


def trainer_arguments(**changed) -> types.SimpleNamespace:
    return types.SimpleNamespace(**{"fsdp": None, "deepspeed": None, "n_gpu": 0, "max_grad_norm": 1.0} | changed)


@pytest.mark.parametrize(
    ("changed", "message"), [({"fsdp": True}, "FSDP shards"), ({"deepspeed": "zero2.json"}, "DeepSpeed ZeRO")], ids=str
)
def test_sharded_training_is_refused_when_the_trainer_is_made(changed, message):
    with pytest.raises(UnsupportedModel, match=message):
        OneBitAdamCallback().on_init_end(trainer_arguments(**changed), None, None)


@pytest.mark.parametrize(("mode", "message"), [("FSDP", "FSDP"), ("DEEPSPEED", "DeepSpeed ZeRO"), ("MEGATRON_LM", "Megatron-LM")])
def test_sharding_set_up_by_accelerate_launch_is_refused_at_the_start_of_training(mode, message):
    model, _ = model_and_data()
    wrapped = types.SimpleNamespace(accelerator_state=types.SimpleNamespace(distributed_type=types.SimpleNamespace(value=mode)))
    with pytest.raises(UnsupportedModel, match=f"{message} shards"):
        OneBitAdamCallback().on_train_begin(trainer_arguments(), None, None, model=model, optimizer=wrapped)


def begin(model: nn.Module, optimizer: torch.optim.Optimizer, callback: OneBitAdamCallback, arguments=None, **changed) -> None:
    wrapped = optimizer
    if not isinstance(optimizer, AcceleratedOptimizer):
        mode = types.SimpleNamespace(distributed_type="NO")
        wrapped = types.SimpleNamespace(accelerator_state=mode, optimizer=optimizer, scaler=None)
    arguments = arguments or trainer_arguments(**changed)
    vars(arguments).update(get_warmup_steps=lambda total: 1, output_dir="nowhere", resume_from_checkpoint=None)
    state = types.SimpleNamespace(max_steps=9, global_step=0)
    callback.on_train_begin(arguments, state, None, model=model, optimizer=wrapped)


def test_the_callback_refuses_what_would_train_nothing_or_the_wrong_thing():
    model, _ = model_and_data()
    with pytest.raises(UnsupportedModel, match=r"2 GPUs in one process is nn.DataParallel"):
        begin(model, torch.optim.AdamW(model.parameters()), OneBitAdamCallback(), n_gpu=2)
    with pytest.raises(ConfigError, match=r"2 trainable parameters are not in the optimizer, first 2.weight"):
        begin(model, torch.optim.AdamW(model[0].parameters()), OneBitAdamCallback())
    ours = OneBitAdam(model.parameters(), total_steps=9, config=OneBitAdamConfig(freeze=5))
    with pytest.raises(ConfigError, match="have different configs"):
        begin(model, ours, OneBitAdamCallback())
    callback = OneBitAdamCallback(OneBitAdamConfig(freeze=5))
    begin(model, ours, callback)
    assert callback.optimizer is ours
    late = OneBitAdamCallback()
    with pytest.raises(ConfigError, match="added after training had begun"):
        late.on_step_end(None, None, transformers.TrainerControl(should_save=True))


def test_one_rank_that_goes_on_from_several_says_so(caplog):
    model, _ = model_and_data()
    adamw = torch.optim.AdamW(model.parameters())
    begin(model, adamw, OneBitAdamCallback())
    assert not caplog.records
    adamw.param_groups[0][module.PROGRESS]["frozen_at"] = 5
    begin(model, adamw, OneBitAdamCallback())
    assert "one rank alone goes on as AdamW" in caplog.text


def test_a_run_that_broke_off_and_begins_again_still_clips(monkeypatch):
    model, data = model_and_data()
    callback, arguments = OneBitAdamCallback(), trainer_arguments()
    monkeypatch.setattr(callback_module, "world_size", lambda: 2)
    for _ in range(2):
        begin(model, torch.optim.AdamW(model.parameters()), callback, arguments=arguments)
        assert arguments.max_grad_norm == 0.0
    model(data).square().sum().backward()
    callback.on_pre_optimizer_step(arguments, None, None)
    assert torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item() == pytest.approx(1.0)


def test_the_wrapper_that_is_trained_is_found_or_asked_for(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model, _ = model_and_data()
        assert callback_module._wrapper_of(model, None) is model
        first = DistributedDataParallel(model)
        before = types.SimpleNamespace(ddp=first)
        assert callback_module._wrapper_of(model, before) is first
        second = DistributedDataParallel(model)
        assert callback_module._wrapper_of(model, before) is second
        with pytest.raises(UnsupportedModel, match="2 DistributedDataParallel hold this model"):
            callback_module._wrapper_of(model, None)
        del first, second, before
        gc.collect()
    finally:
        torch.distributed.destroy_process_group()


def test_a_skipped_step_of_the_scaler_is_seen_by_accelerate():
    """accelerate holds the scheduler back after an overflow; it has to know it of the optimizer that the callback put in."""
    Accelerator(cpu=True)
    model, data = model_and_data()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    wrapped = AcceleratedOptimizer(torch.optim.AdamW(model.parameters()), scaler=scaler)
    begin(model, wrapped, OneBitAdamCallback())
    assert isinstance(wrapped.optimizer, OneBitAdam)
    for overflows in (True, False):
        before = model[0].weight.clone()
        wrapped.zero_grad()
        scaler.scale(model(data).square().mean() * (torch.inf if overflows else 1.0)).backward()
        wrapped.step()
        assert wrapped.step_was_skipped == overflows == torch.equal(before, model[0].weight)
    assert wrapped.optimizer.num_steps == 1


def test_auto_freeze_waits_for_the_variance_between_floor_and_ceiling(monkeypatch):
    weight = nn.Parameter(torch.zeros(8))
    optimizer = OneBitAdam([weight], betas=(0.9, 0.5), total_steps=200, warmup_steps=30)
    monkeypatch.setattr(module, "world_size", lambda: 2)
    optimizer.report.world_size = 2

    def first_freeze(gradient) -> int | None:
        optimizer._progress.update(steps=0, variance_norm=None)
        optimizer.state.clear()
        for step in range(1, 200):
            weight.grad = torch.full((8,), gradient(step))
            torch.optim.AdamW.step(optimizer)
            optimizer._progress["steps"] = step
            if optimizer._is_time_to_freeze():
                return step
        return None

    assert first_freeze(lambda step: 1.0) == 30  # settled from the start: the floor, which is the end of the lr warm-up
    assert first_freeze(lambda step: 0.8**step) == 60  # never settles: the ceiling
    assert 30 < first_freeze(lambda step: max(0.9**step, 0.9**35)) < 60
    optimizer.config = OneBitAdamConfig(freeze=0.1)
    assert first_freeze(lambda step: 1.0) == 20


def test_report_adds_up():
    report = CommReport(num_values=1000, world_size=4)
    report.add_all_reduce("gradients", 4000)
    report.end_step()
    report.phase = "compression"
    for _ in range(3):
        report.add("momentum", 100.0)
        report.end_step()
    assert report.dense_bytes_per_step == 6000
    assert report.bytes_per_step("warm-up") == 6000
    assert report.bytes_per_step("compression") == 100
    assert report.reduction("compression") == 60
    assert report.bytes_per_step() == report.total_bytes / 4 == 6300 / 4
    assert report.to_dict()["by_phase"]["compression"] == {"bytes_per_step": 100.0, "reduction": 60.0}
    assert [column.header for column in report.to_table().columns] == ["phase", "kind", "steps", "per step", "fewer than float32"]
    assert report.to_table().row_count == 5


def test_public_names():
    assert {"OneBitAdam", "OneBitAdamCallback", "OneBitAdamConfig", "CommReport"} <= set(hf_compact.__all__)
