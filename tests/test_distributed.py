"""Two processes give the answer of one, bit for bit the same on both."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_compact
from hf_compact import distributed
from hf_compact.arch import describe
from hf_compact.calibration import Calibration, from_batches
from hf_compact.errors import ConfigError
from hf_compact.sensitivity import measure
from tests.conftest import tiny_inputs, tiny_model
from tests.ranks import run_ranks

TIMEOUT_SECONDS = 120
#: id -> (stage, calibration batches)
RECIPES = {
    "uniform": ({"method": "codebook", "bits": 4, "group_size": 16}, 4),
    "learned": (
        {"method": "codebook", "bits": 3, "grid": "learned", "group_size": None, "rows_per_codebook": 16, "refit_rounds": 1}, 3,
    ),
    "more_ranks_than_batches": ({"method": "codebook", "bits": 4, "scale_bits": 6}, 1),
    "nearest": ({"method": "codebook", "bits": 4, "rounding": "nearest"}, 1),
    "entropy": ({"method": "entropy", "bits": 5.0, "sensitivity": "none", "embedding_bits": 6.0}, 4),
}  # fmt: skip


def compress(stage: dict, num_batches: int) -> tuple[dict[str, torch.Tensor], hf_compact.Report]:
    """Stored and dense tensors of a compressed tiny model."""
    model = tiny_model("llama")
    recipe = {"stages": [stage]}
    report = hf_compact.compress(model, recipe, calibration=batches(num_batches))
    tensors = {f"stored.{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    for name in model.config.quantization_config.modules:
        tensors[f"dense.{name}"] = model.get_submodule(name).to_dense()
    errors = [layer.relative_error for layer in report.layers]
    tensors["report.errors"] = torch.tensor(errors, dtype=torch.float64)
    return {name: tensor.clone().contiguous() for name, tensor in tensors.items()}, report


def batches(num_batches: int) -> Calibration:
    return from_batches([tiny_inputs("llama", batch=2, length=40, seed=seed) for seed in range(num_batches)])


def work(rank: int, folder: str) -> None:
    """What each of the two processes does; starting them takes longer than all of it, so they start once."""
    check_collectives(rank, folder)
    for name, (stage, num_batches) in RECIPES.items():
        tensors, _ = compress(stage, num_batches)
        save_file(tensors, Path(folder, f"{name}-{rank}.safetensors"))
    save_file(sensitivities(), Path(folder, f"sensitivities-{rank}.safetensors"))


def sensitivities() -> dict[str, torch.Tensor]:
    """Of three batches, so that one of two ranks has more than the other."""
    model = tiny_model("llama")
    arch = describe(model)
    return measure(model, arch, list(arch.roles), distributed.share(batches(3).batches), 10**6, 10**6).rows


def check_collectives(rank: int, folder: str) -> None:
    assert (distributed.rank(), distributed.world_size()) == (rank, 2)
    assert distributed.share([0, 1, 2, 3, 4]) == [[0, 2, 4], [1, 3]][rank]
    assert distributed.owners([1.0, 5.0, 1.0, 2.0]) == [1, 0, 1, 1]
    total = torch.full((2, 2), float(rank + 1), dtype=torch.float64)
    distributed.sum_([total])
    assert total.tolist() == [[3.0, 3.0], [3.0, 3.0]]
    for dtype in (torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.float64):
        for source in (0, 1):
            values = torch.full((3,), rank + 1).to(dtype)
            distributed.broadcast_([values], source)
            assert values.tolist() == [source + 1] * 3
    distributed.barrier()
    with pytest.raises(ConfigError, match="compressing to a folder runs in one process; under torchrun give compress"):
        hf_compact.compress("some/model", {"stages": [RECIPES["uniform"][0]]}, output=Path(folder, "out"))
    Path(folder, f"{rank}.done").touch()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    """Folder of what two finished processes wrote; both are ended if they take too long."""
    folder = tmp_path_factory.mktemp("two-ranks")
    run_ranks(work, str(folder), seconds=TIMEOUT_SECONDS)
    return folder


@pytest.mark.distributed
def test_collectives(two_ranks):
    assert {path.name for path in two_ranks.glob("*.done")} == {"0.done", "1.done"}
    assert not (two_ranks / "out").exists()


@pytest.mark.distributed
def test_sensitivities_are_means_over_the_tokens_of_all_ranks(two_ranks):
    first, second = (load_file(two_ranks / f"sensitivities-{rank}.safetensors") for rank in (0, 1))
    for name, alone in sensitivities().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], alone, rtol=1e-3, atol=0)


@pytest.mark.distributed
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_ranks_give_the_answer_of_one(recipe, two_ranks):
    first, second = (load_file(two_ranks / f"{recipe}-{rank}.safetensors") for rank in (0, 1))
    alone, report = compress(*RECIPES[recipe])
    assert first.keys() == second.keys() == alone.keys()
    dense = [name for name in alone if name.startswith("dense.")]
    assert len(dense) == len(report.layers) + 1  # the tied head has no report of its own
    for name in alone:
        assert torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8)), f"{name} differs between the ranks"
    for name in dense:
        torch.testing.assert_close(first[name], alone[name], rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(first["report.errors"], alone["report.errors"], rtol=1e-4, atol=1e-6)


def test_one_process_needs_no_group():
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.share([3, 1, 2]) == [3, 1, 2]
    assert distributed.owners([3.0, 1.0, 2.0]) == [0, 0, 0]
    tensor = torch.ones(2)
    distributed.sum_([tensor])
    distributed.broadcast_([tensor], 0)
    distributed.barrier()
    assert tensor.tolist() == [1, 1]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("costs", [[], [1.0], [5.0, 1.0, 1.0, 1.0, 1.0, 1.0], [2.0] * 7], ids=str)
def test_owners_balance_the_costs(costs, num_ranks, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: num_ranks)
    owners = distributed.owners(costs)
    assert len(owners) == len(costs)
    loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(num_ranks)]
    assert sum(loads) == sum(costs)
    assert max(loads) <= sum(costs) / num_ranks + max(costs, default=0)


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_shares_are_a_partition(num_ranks, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: num_ranks)
    shares = []
    for rank in range(num_ranks):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(distributed.share(range(7)))
    assert sorted(item for share in shares for item in share) == list(range(7))
