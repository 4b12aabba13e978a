"""What has to hold on an accelerator as on the processor; skipped where there is none."""

import math
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from hf_compact import (
    DistillationCallback,
    HessoCallback,
    MaskCallback,
    OneBitAdamCallback,
    OneBitAdamConfig,
    Protocol,
    SortedNetCallback,
    SpeedConfig,
    TensorNetworkCallback,
    TernaryCallback,
    Windows,
    api,
    measure,
)
from hf_compact.config import DistillationConfig
from hf_compact.functional.packing import pack_bits, unpack_bits
from hf_compact.methods.one_bit_adam.functional import pack_signs, unpack_signs
from hf_compact.verify import load_model
from tests.conftest import tiny_inputs, tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ROOT = Path(__file__).parents[1]
SMALL = {"num_sequences": 6, "sequence_length": 48, "batch_size": 2}
STAGES = {
    path.stem: yaml.safe_load(path.read_text())["stages"]
    for path in sorted((ROOT / "configs" / "methods").glob("*.yaml"))
    if path.stem != "correction"  # which needs a stage behind it
} | {
    "correction": [{"method": "correction", "rank": 2}, {"method": "codebook", "bits": 3}],
    "jlcm": [{"method": "codebook", "bits": 3, "grid": "learned", "row_order": "similar", "learning": "proximal"}],
    "trains": [{"method": "tensor_network", "format": "tensor_train", "keep_ratio": 0.6}],
    "regression": [{"method": "tensor_network", "solver": "regression", "keep_ratio": 0.6}],
    "taylor": [{"method": "pruning", "score": "taylor", "compensation": "bias"}],
}  # fmt: skip


@pytest.mark.parametrize("name", STAGES)
def test_a_folder_made_on_it_is_verified_there(name, dense_folder, text_file, tmp_path):
    recipe = {"stages": STAGES[name], "calibration": SMALL}
    report = api.compress(dense_folder, recipe, output=tmp_path / "gpu", calibration=[text_file], device="cuda")
    assert report.verification["verified"]
    other = api.compress(dense_folder, recipe, output=tmp_path / "cpu", calibration=[text_file])
    assert report.file_bytes == pytest.approx(other.file_bytes, rel=0.01)
    assert report.verification["perplexity"] == pytest.approx(
        other.verification["perplexity"], rel=0.15
    )  # what is close to a tie


def test_streamed_and_whole_are_one_thing(dense_folder, tokenizer, text_file, tmp_path):
    recipe = {"stages": [{"method": "codebook", "bits": 4}], "calibration": SMALL}
    api.compress(dense_folder, recipe, output=tmp_path / "streamed", calibration=[text_file], device="cuda")
    api.compress(load_model(dense_folder).cuda(), recipe, output=tmp_path / "whole", calibration=[text_file], tokenizer=tokenizer)
    streamed, whole = (load_model(tmp_path / name).state_dict() for name in ("streamed", "whole"))
    assert streamed.keys() == whole.keys()
    same = [torch.equal(tensor, whole[name]) for name, tensor in streamed.items()]
    assert sum(same) > 0.9 * len(same)  # a code that is close to a tie may go the other way


def test_what_is_fitted_gains(dense_folder, text_file, tmp_path):
    recipe = {"stages": [{"method": "codebook", "bits": 3}], "calibration": SMALL, "reconstruction": {"epochs": 2}}
    recipe["distillation"] = {"num_sequences": 16, "batch_size": 2, "epochs": 4}
    report = api.compress(dense_folder, recipe, output=tmp_path / "out", calibration=[text_file], device="cuda")
    assert report.verification["device"].startswith("cuda")
    assert all(last < first for first, last in report.reconstruction.values())
    assert report.distillation["last"] < report.distillation["first"]


def test_another_device_goes_on_with_a_run(dense_folder, text_file, tmp_path):
    recipe = {"stages": [{"method": "codebook", "bits": 4}], "calibration": SMALL}

    def stop(unit: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.compress(dense_folder, recipe, output=tmp_path / "out", calibration=[text_file], device="cuda", progress=stop)
    report = api.compress(dense_folder, recipe, output=tmp_path / "out", calibration=[text_file])
    assert report.verification["verified"]
    assert report.verification["device"] == "cpu"


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "vit"])
def test_a_model_in_memory_stays_on_it(family):
    model, inputs = tiny_model(family), tiny_inputs(family)
    reference = tiny_model(family)
    recipe = {"stages": [{"method": "codebook", "bits": 8, "embedding_bits": None}]}
    api.compress(model.cuda(), recipe, calibration=[inputs])
    api.compress(reference, recipe, calibration=[inputs])
    assert all(tensor.is_cuda for tensor in model.state_dict().values())
    with torch.no_grad():
        on_gpu = model(**{name: value.cuda() for name, value in inputs.items()})[0].cpu()
        torch.testing.assert_close(on_gpu, reference(**inputs)[0], rtol=0.02, atol=0.02 * float(on_gpu.abs().max()))


def train(model, callbacks, folder: Path, **settings) -> transformers.Trainer:
    rows = [{"input_ids": row, "labels": row} for row in tiny_inputs("llama", batch=16, length=32)["input_ids"]]
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=4, max_steps=8, learning_rate=1e-3, report_to=[], disable_tqdm=True,
        logging_steps=1, save_steps=4, max_grad_norm=0.0, dataloader_pin_memory=False,
        **settings,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=callbacks)
    trainer.train()
    return trainer


CALIBRATED = [tiny_inputs("llama", batch=4, length=32)]
CALLBACKS = {
    "ternary": lambda: [TernaryCallback()],
    "hesso": lambda: [HessoCallback(target=0.2, pruning_steps=4, periods=2, channel_multiple=4)],
    "hesso, refit": lambda: [
        HessoCallback(target=0.2, pruning_steps=4, periods=2, channel_multiple=4, compensation="refit", batches=CALIBRATED)
    ],
    "cric": lambda: [HessoCallback(target=0.2, pruning_steps=2, periods=1, cric=True, cric_cycles=2, cric_steps=2, channel_multiple=4)],
    "masks": lambda: [MaskCallback(interval=2)],
    "sorted": lambda: [SortedNetCallback(widths=(0.5, 1.0), depths=(0.5, 1.0))],
    "maestro": lambda: [TensorNetworkCallback(schedule="maestro", lasso_weight=1e-4)],
    "trp": lambda: [TensorNetworkCallback(schedule="trp", interval=2)],
    "trp, by outputs": lambda: [TensorNetworkCallback(schedule="trp", interval=2, batches=CALIBRATED)],
    "one bit": lambda: [OneBitAdamCallback(OneBitAdamConfig(freeze=4))],
    "distilled": lambda: [DistillationCallback(tiny_model("llama"))],
    "ternary, distilled": lambda: [TernaryCallback(), DistillationCallback(tiny_model("llama"))],
}  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", CALLBACKS)
def test_a_callback_trains_saves_and_goes_on(name, precision, tmp_path):
    model = tiny_model("llama")
    trainer = train(model, CALLBACKS[name](), tmp_path / "run", bf16=precision == "bf16")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 8
    assert all(map(math.isfinite, losses))
    resumed = transformers.Trainer(
        tiny_model("llama"), trainer.args, train_dataset=trainer.train_dataset, callbacks=CALLBACKS[name]()
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert resumed.state.log_history[-2]["loss"] == pytest.approx(losses[-1], rel=0.02)
    model.save_pretrained(tmp_path / "out")
    ids = tiny_inputs("llama")["input_ids"]
    with torch.no_grad():
        before, after = model.eval()(ids.cuda())[0].float(), load_model(tmp_path / "out").cuda()(ids.cuda())[0].float()
    # A model that was trained in bfloat16 goes on computing in it.
    assert (before - after).abs().max() <= (5e-2 if precision == "bf16" else 1e-2) * before.abs().max()


@pytest.mark.parametrize("trains_rest", [False, True])
def test_healing(trains_rest, dense_folder, text_file, tmp_path):
    recipe = {"stages": [{"method": "tensor_network", "keep_ratio": 0.6}], "calibration": SMALL}
    api.compress(dense_folder, recipe, output=tmp_path / "cut", calibration=[text_file], device="cuda")
    model = load_model(tmp_path / "cut", dtype=torch.float32)
    trainer = train(model, [TensorNetworkCallback(schedule="heal", trains_rest=trains_rest)], tmp_path / "run")
    assert trainer.state.log_history[-2]["loss"] < trainer.state.log_history[0]["loss"]


def test_scores_times_and_memory(dense_folder, text_file, tmp_path):
    recipe = {"stages": STAGES["entropy"], "calibration": SMALL}
    api.compress(dense_folder, recipe, output=tmp_path / "small", calibration=[text_file], device="cuda")
    protocol = Protocol(
        windows=Windows(window_length=64, num_windows=4), speed=SpeedConfig(prompt_tokens=16, new_tokens=4, repeats=2), device="cuda"
    )  # fmt: skip
    found = measure([tmp_path / "small"], [text_file], protocol, compare_with=dense_folder)
    on_cpu = measure([tmp_path / "small"], [text_file], Protocol(windows=protocol.windows), compare_with=dense_folder)
    assert torch.cuda.get_device_name() == found.machine["accelerator"]
    for side, other in zip(found.models, on_cpu.models, strict=True):
        ours, theirs = (next(iter(model.perplexity.values()))["perplexity"] for model in (side, other))
        assert ours == pytest.approx(theirs, rel=0.02)
        assert side.memory["peak_bytes"] > 0
        assert side.speed["prefill_seconds"] > 0


def test_plan_profile_and_recovery(dense_folder, text_file, tmp_path):
    plan = api.plan_budget(
        dense_folder, target_bpw=5.0, calibration=[text_file], num_tokens=256, output=tmp_path / "plan.yaml", device="cuda"
    )
    assert plan.point.body_bits <= 5.0
    recipe = {"stages": [{"method": "tensor_network"}], "calibration": SMALL}
    found = api.profile(
        dense_folder, recipe, output=tmp_path / "profile.json", ratios=[0.5], calibration=[text_file], device="cuda"
    )
    on_cpu = api.profile(dense_folder, recipe, output=tmp_path / "cpu.json", ratios=[0.5], calibration=[text_file])
    for name, layer in found["layers"].items():
        assert layer["curve"]["0.5"]["divergence"] == pytest.approx(on_cpu["layers"][name]["curve"]["0.5"]["divergence"], rel=0.1)
    api.compress(
        dense_folder, {"stages": [{"method": "codebook", "bits": 3}], "calibration": SMALL}, output=tmp_path / "small",
        calibration=[text_file], device="cuda",
    )  # fmt: skip
    result = api.recover(
        tmp_path / "small", text_file, teacher=dense_folder, sequence_length=64,
        training=DistillationConfig(num_sequences=16, learning_rate=3e-3),
    )  # fmt: skip
    assert result["verification"]["verified"]


@pytest.mark.parametrize("size", [1, 7, 4096, 100_003])
def test_packing_is_the_same(size):
    values = torch.randn(size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pack_signs(values.cuda()).cpu(), pack_signs(values))
    packed, scale = pack_signs(values), torch.tensor(0.5)
    assert torch.equal(unpack_signs(packed.cuda(), size, scale.cuda()).cpu(), unpack_signs(packed, size, scale))
    for bits in (1, 2, 3, 4, 5, 8):
        codes = (values.abs() * 97).to(torch.int64).remainder(2**bits).to(torch.uint8)
        on_gpu = pack_bits(codes.cuda(), bits)
        assert torch.equal(on_gpu.cpu(), pack_bits(codes, bits))
        assert torch.equal(unpack_bits(on_gpu, bits, size).cpu(), codes)
