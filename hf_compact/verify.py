"""Success is what a fresh process says: it loads the folder with transformers, compares logits and scores held-out text.

Run as a module, this file is that process: `python -m hf_compact.verify FOLDER INPUTS.safetensors OUTPUTS.safetensors DEVICE`.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import hf_compact  # noqa: F401 - registers the plugin in the fresh process

from .arch import prediction_of
from .checkpoint import hash_model
from .errors import VerificationError
from .products import fast_products
from .scoring import max_positions, perplexity

#: Largest difference to the reloaded logits, as a fraction of the largest logit. Blocks run one by one and in one pass
#: may take different kernels, which shows in the last digits of the dtype.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def load_model(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a dense or compressed folder with the class that its config names, on stock `from_pretrained`.

    The folder of an adapter gives its base with the adapter, in float32, in which it was trained, if no dtype is given.
    """
    if Path(folder, "adapter_config.json").is_file():
        return AutoPeftModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **kwargs})
    config = AutoConfig.from_pretrained(folder)
    name = (config.architectures or [""])[0]
    cls = AutoModelForCausalLM if name.endswith(("ForCausalLM", "LMHeadModel")) or not name else getattr(transformers, name)
    return cls.from_pretrained(folder, **kwargs)


def verify(
    folder: Path, probe: dict[str, Tensor], logits: Tensor, held_out: Tensor | None, device: str = "cpu"
) -> dict[str, Any]:  # fmt: skip
    """Reload a folder in a fresh process and compare.

    Args:
        folder: a finished output folder.
        probe: inputs of one forward pass.
        logits: what the compressed model gave for them.
        held_out: token ids `[T]` to score, or None for a model that is not a causal language model.
        device: where the logits were computed: another one rounds in other places. Where it has no room for a second
            model, the CPU takes its place.

    Returns:
        `verified`, `is_equal` (bit for bit), `relative_difference`, `device`, `perplexity`, `files` (SHA-256 of weights and config),
        `seconds`.

    Raises:
        VerificationError: the process fails, or the logits differ by more than `TOLERANCE`.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        inputs, outputs = Path(scratch, "inputs.safetensors"), Path(scratch, "outputs.safetensors")
        # Two inputs may be one tensor, which a file may not hold twice.
        tensors = {f"probe.{name}": value.cpu().contiguous().clone() for name, value in probe.items()}
        if held_out is not None:
            tensors["held_out"] = held_out
        save_file(tensors, inputs)
        # -P: the folder where the user stands is not looked into for modules, it may be a downloaded model's.
        command = [sys.executable, "-P", "-m", "hf_compact.verify", str(folder), str(inputs), str(outputs)]
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()  # what this process keeps for later, the other one needs now
        done = subprocess.run([*command, device], capture_output=True, text=True, check=False)
        if done.returncode and "OutOfMemoryError" in done.stderr:
            device = "cpu"  # both models do not fit beside each other
            done = subprocess.run([*command, device], capture_output=True, text=True, check=False)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
            raise VerificationError(f"{folder} does not load in a fresh process: {reason}")
        found = load_file(outputs)["logits"]
        result = json.loads(done.stdout.splitlines()[-1])
    if found.shape != logits.shape or found.dtype != logits.dtype:
        raise VerificationError(
            f"{folder} gives {found.dtype} logits {list(found.shape)} after reloading, expected {logits.dtype} {list(logits.shape)}"
        )
    difference = ((found.float() - logits.float()).abs().max() / logits.float().abs().max().clamp_min(1e-30)).item()
    if not difference <= TOLERANCE[logits.dtype]:  # also when it is not a number
        raise VerificationError(
            f"{folder} gives other logits after reloading: they differ by {difference:.2e} of the largest, "
            f"allowed are {TOLERANCE[logits.dtype]:.0e}"
        )
    return {
        "verified": True,
        "is_equal": torch.equal(found, logits),
        "relative_difference": difference,
        "device": device,
        **result,
        "files": hash_model(folder),
        "seconds": time.perf_counter() - started,
    }


@fast_products()
def main(folder: str, inputs: str, outputs: str, device: str) -> None:
    """What the fresh process does; prints one line of JSON."""
    tensors = load_file(inputs)
    model = load_model(folder).eval().to(device)
    probe = {name.removeprefix("probe."): value.to(device) for name, value in tensors.items() if name != "held_out"}
    with torch.no_grad():
        logits = prediction_of(model(**probe))
    save_file({"logits": logits.cpu().contiguous()}, outputs)
    score = None
    if "held_out" in tensors:
        length = min(512, len(tensors["held_out"]), max_positions(model) or 512)
        score = perplexity(model, tensors["held_out"], window_length=length, num_windows=4)["perplexity"]
    print(json.dumps({"perplexity": score}))  # noqa: T201 - the parent process reads it


if __name__ == "__main__":
    main(*sys.argv[1:])
