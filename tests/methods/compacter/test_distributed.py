"""Two processes of DDP train the adapter that one process trains on both halves of the batch."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel

from hf_compact import CompacterConfig
from tests.conftest import tiny_inputs, tiny_model
from tests.ranks import run_ranks

TIMEOUT_SECONDS = 240
STEPS = 3


def adapted(is_saving: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(tiny_model("llama"), CompacterConfig(task_type="CAUSAL_LM", slow_std=0.1))
    if is_saving:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


def train(model: torch.nn.Module, rows: slice) -> dict[str, torch.Tensor]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(STEPS):
        ids = tiny_inputs("llama", batch=4, seed=step)["input_ids"][rows]
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    inner = getattr(model, "module", model)
    return {name: p.detach().clone() for name, p in inner.named_parameters() if p.requires_grad}


def work(rank: int, folder: str) -> None:
    for is_saving in (False, True):
        found = train(DistributedDataParallel(adapted(is_saving)), slice(2 * rank, 2 * rank + 2))
        save_file(found, Path(folder, f"{is_saving}-{rank}.safetensors"))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two-ranks")
    run_ranks(work, str(folder), seconds=TIMEOUT_SECONDS)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("is_saving", [False, True], ids=["plain", "activation checkpointing"])
def test_two_ranks_train_the_adapter_of_one(is_saving, two_ranks):
    first, second = (load_file(two_ranks / f"{is_saving}-{rank}.safetensors") for rank in (0, 1))
    alone = train(adapted(is_saving), slice(None))
    start = {name: p for name, p in adapted(is_saving).named_parameters() if p.requires_grad}
    assert first.keys() == second.keys() == alone.keys()
    assert "base_model.compacter_slow.default" in alone
    for name, wanted in alone.items():
        assert torch.equal(first[name], second[name]), f"{name} differs between the ranks"
        torch.testing.assert_close(first[name], wanted, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
        assert not torch.equal(wanted, start[name]), f"{name} was not trained"
