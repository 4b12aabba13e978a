"""How fast a model runs: prefill, time to the first token, decoding; several models by turns in one process.

Machines drift, so models are measured A B A B … and compared pair by pair; the first turn of each warms up and is not counted.
Times are those of `generate`, which is what a user waits for.
"""

import inspect
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from .errors import ConfigError
from .footprint import Comparison, count
from .scoring import max_positions

#: Where Linux shows the energy counters of the processor packages, where it does.
POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """What is timed.

    >>> SpeedConfig(new_tokens=1)
    Traceback (most recent call last):
    hf_compact.errors.ConfigError: new_tokens must be at least 2, got 1
    """

    prompt_tokens: int = 256
    """Tokens of the prompt."""
    new_tokens: int = 32
    """Tokens that are generated, greedily."""
    repeats: int = 5
    """Counted turns."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name, least in (("prompt_tokens", 1), ("new_tokens", 2), ("repeats", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")


class _Clock(BaseStreamer):
    """Notes when every token arrives on the host, and the energy counter at the first one."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.joules = device, None
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """The prompt comes first, then the tokens one by one."""
        self.times.append(time.perf_counter())
        if len(self.times) == 2:
            self.joules = energy_joules(self.device)

    def end(self) -> None:
        """Nothing is left to do."""


@torch.no_grad()
def generation(model: PreTrainedModel, ids: Tensor, new_tokens: int) -> dict[str, float]:
    """One turn.

    Args:
        model: a causal language model, in evaluation mode.
        ids: `[1, T]` prompt.
        new_tokens: at least 2.

    Returns:
        Seconds: `prefill` (one forward pass over the prompt, the cache filled), `first_token` (from the call of `generate` to
        the first token), `decode` (per token after the first); `joules`, per token after the first too, where the machine counts
        them.
    """
    ids = ids.to(model.device)
    only_last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    started = time.perf_counter()
    model(input_ids=ids, use_cache=True, **only_last)
    _wait(model.device)
    prefill = time.perf_counter() - started
    clock = _Clock(model.device)
    started = time.perf_counter()
    model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False,
        streamer=clock, pad_token_id=0,
    )  # fmt: skip
    _, first, *_, last = clock.times
    found = {"prefill": prefill, "first_token": first - started, "decode": (last - first) / (new_tokens - 1)}
    if clock.joules is not None and (after := energy_joules(model.device)) is not None and after >= clock.joules:
        found["joules"] = (after - clock.joules) / (new_tokens - 1)
    return found


def alternate(
    models: Mapping[str, PreTrainedModel], ids: Tensor, config: SpeedConfig,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[dict[str, float]]]:  # fmt: skip
    """Turns of several models, A B A B …, the first of each left out.

    Returns:
        Name -> what `generation` returned, turn by turn.
    """
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    for turn in range(config.repeats + 1):
        for name, model in models.items():
            found = generation(model, ids, config.new_tokens)
            if turn:
                turns[name].append(found)
        progress(turn, config.repeats)
    return turns


def summary(turns: Sequence[Mapping[str, float]], prompt_tokens: int) -> dict[str, float]:
    """Medians: seconds, tokens per second, joules where they were counted.

    >>> summary([{"prefill": 0.5, "first_token": 0.6, "decode": 0.1}], 64)["prefill_tokens_per_second"]
    128.0
    """
    found = {f"{key}_seconds": statistics.median(turn[key] for turn in turns) for key in ("prefill", "first_token", "decode")}
    found["prefill_tokens_per_second"] = prompt_tokens / found["prefill_seconds"]
    found["decode_tokens_per_second"] = 1 / found["decode_seconds"]
    if all("joules" in turn for turn in turns):
        found["joules_per_token"] = statistics.median(turn["joules"] for turn in turns)
    return found


def ratios(turns: Sequence[Mapping[str, float]], base: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """How many times as fast as the base: the median over the turns, pair by pair.

    >>> ratios([{"prefill": 1.0, "first_token": 1.0, "decode": 1.0}], [{"prefill": 2.0, "first_token": 1.0, "decode": 0.5}])
    {'prefill': 2.0, 'first_token': 1.0, 'decode': 0.5}
    """
    return {
        key: statistics.median(other[key] / turn[key] for turn, other in zip(turns, base, strict=True))
        for key in ("prefill", "first_token", "decode")
    }


def check_positions(model: PreTrainedModel, name: str, config: SpeedConfig) -> None:
    """Raise ConfigError if the prompt and what is generated are longer than what the model has positions for."""
    wanted, most = config.prompt_tokens + config.new_tokens, max_positions(model)
    if most is not None and wanted > most:
        raise ConfigError(f"prompt_tokens + new_tokens must be at most {most}, the positions of {name}, got {wanted}")


def compare_by_turns(before: PreTrainedModel, after: PreTrainedModel, config: SpeedConfig) -> Comparison:
    """Two causal language models, in evaluation mode, counted and timed; medians over the turns."""
    models = {"before": before, "after": after}
    vocabulary = min(model.config.get_text_config(decoder=True).vocab_size for model in models.values())
    ids = (torch.arange(config.prompt_tokens) % (vocabulary - 4) + 3)[None]
    sides = {}
    for side, turns in alternate(models, ids, config).items():
        times = summary(turns, config.prompt_tokens)
        seconds = {key: times[key] for key in ("prefill_seconds", "decode_seconds")}
        sides[side] = replace(count(models[side]), **seconds)
    return Comparison(**sides)


def energy_joules(device: torch.device, root: Path = POWERCAP) -> float | None:
    """The state of a counter of energy; None where the machine has none that may be read.

    Of a CUDA device the driver's, read by `nvidia-ml-py` if that is installed; else of the processor packages, with
    everything that runs on them.
    """
    if device.type == "cuda":
        try:
            import pynvml
        except ImportError:
            return None
        try:
            pynvml.nvmlInit()
            uuid = torch.cuda.get_device_properties(device).uuid  # numbers are torch's own, of the devices that it sees
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
        except pynvml.NVMLError:
            return None
    try:
        counters = [
            int((folder / "energy_uj").read_text())
            for folder in sorted(root.glob("intel-rapl:[0-9]*"))
            if (folder / "name").read_text().startswith("package")  # not what is part of one, or what they are part of
        ]
    except (OSError, ValueError):
        return None
    return sum(counters) / 1e6 if counters else None


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
