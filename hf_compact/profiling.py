"""What the compression of one Linear alone costs the whole model, at several sizes: a table that an allocation can read.

The cost is the divergence of the next-token distribution from the dense model's on text that no solver has seen, which
says more with few tokens than the perplexity does. Blocks before the changed one are not run again.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .arch import as_linear, dense_shape, describe
from .capture import Method, correct_bias_, input_moments, patched_forwards, without_cache
from .checkpoint import disk_errors, write_plot, write_text
from .config import MethodConfig
from .distillation import divergence
from .errors import OutputError
from .functional.gram import centered
from .select import replace_modules, select_names

PROFILE_VERSION = 3


@torch.no_grad()
def profile_(
    model: PreTrainedModel, stage: tuple[Method, MethodConfig], ratios: Sequence[float],
    batches: Sequence[Mapping[str, Tensor]], probes: Sequence[Tensor], path: Path, fingerprint: Mapping[str, Any],
    progress: Callable[[str, int, int], None] = lambda unit, done, total: None,
) -> dict[str, Any]:  # fmt: skip
    """Measure every selected Linear; the model is dense again afterwards.

    Args:
        model: a dense causal language model in memory.
        stage: a method with a setting `keep_ratio`, and its config.
        ratios: kept parameters / dense parameters, each tried alone.
        batches: inputs behind the gram matrices.
        probes: token ids `[1, T]` on which the divergence is taken.
        path: JSON file, written after every Linear; a file of the same fingerprint is gone on with.
        fingerprint: what decides the numbers.
        progress: called with the Linear, finished and all Linears.

    Returns:
        What is in the file: `layers`, name -> `role`, `shape` and `curve`, ratio -> `divergence` (nats per token) and `ranks`.

    Raises:
        OutputError: the file belongs to another run or cannot be written.
    """
    (method, config), arch = stage, describe(model)
    names = select_names(arch.roles, config.include, config.exclude)
    found = _read(path, fingerprint)
    rest = [name for name in names if name not in found["layers"]]
    if not rest:
        return found
    with without_cache(model):
        moments = input_moments(model, rest, batches)
        blocks = list(arch.blocks) if len(arch.stacks) == 1 else []
        targets, states = zip(*(_dense_run(model, blocks, ids) for ids in probes), strict=True)
        for name in rest:
            progress(name, len(found["layers"]), len(names))
            dense = model.get_submodule(name)
            before = [block for block in blocks if blocks.index(block) < _position(blocks, name)]
            curve = {}
            for ratio in ratios:
                made = _compressed(method, _linear(model, name), *moments[name], _at(config, ratio))
                replace_modules(model, [name], lambda *_, made=made: made)
                lost = [
                    divergence(_rerun(model, before, state, ids), target)
                    for ids, target, state in zip(probes, targets, states, strict=True)
                ]
                replace_modules(model, [name], lambda *_, dense=dense: dense)
                curve[str(ratio)] = {"divergence": torch.stack(lost).mean().item(), "ranks": getattr(made, "ranks", None)}
            found["layers"][name] = {"role": arch.roles[name], "shape": [*dense_shape(dense)], "curve": curve}
            with disk_errors(path.parent):
                write_text(path, json.dumps(found, indent=2) + "\n")
    progress("finished", len(names), len(names))
    return found


def _compressed(method: Method, linear: nn.Linear, gram: Tensor, total: Tensor, config: MethodConfig) -> nn.Module:
    """As a run does it: a bias answers for the mean of the inputs."""
    if linear.bias is None:
        return method.compress_linear(linear, gram, config)
    made = method.compress_linear(linear, centered(gram, total), config)
    if made is not linear:
        made.bias = nn.Parameter(linear.bias.detach().clone())
        correct_bias_(made, linear.weight, total)
    return made


def plot_profile(found: Mapping[str, Any], path: Path) -> None:
    """A PNG: one heat map per ratio, roles by blocks, the divergence as colour on a common logarithmic scale.

    Linears without a role are told by their names inside the block.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    layers = found["layers"]
    inside = {name: name.split(".", _depth(name))[-1] for name in layers}
    owners = {name: name.removesuffix(part).rstrip(".") for name, part in inside.items()}
    role_of = {name: inside[name] if layer["role"] == "linear" else layer["role"] for name, layer in layers.items()}
    roles = list(dict.fromkeys(role_of.values()))
    blocks = list(dict.fromkeys(owners.values()))
    ratios = list(next(iter(layers.values()))["curve"])
    values = torch.full((len(ratios), len(roles), len(blocks)), float("nan"))
    for name, layer in layers.items():
        for k, ratio in enumerate(ratios):
            place = (k, roles.index(role_of[name]), blocks.index(owners[name]))
            values[place] = max(layer["curve"][ratio]["divergence"], 1e-6)
    scale = LogNorm(values[~values.isnan()].min().item(), max(values[~values.isnan()].max().item(), 1.1e-6))
    figure = Figure(figsize=(2 + 0.3 * len(blocks), 1 + 0.35 * len(ratios) * len(roles)), layout="constrained")
    for axes, ratio, image in zip(figure.subplots(len(ratios), 1, squeeze=False)[:, 0], ratios, values, strict=True):
        shown = axes.imshow(image.numpy(), norm=scale, aspect="auto")
        axes.set_title(f"kept share {ratio}")
        axes.set_yticks(range(len(roles)), roles)
        axes.set_xlabel("block")
    figure.colorbar(shown, ax=figure.axes, label="divergence, nats per token")
    write_plot(path, figure)


def _at(config: Any, ratio: float) -> MethodConfig:
    return dataclasses.replace(config, keep_ratio=ratio)


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module: Any = model.get_submodule(name)
    return as_linear(module)


def _depth(name: str) -> int:
    """Parts of a name up to and with the number of its block."""
    return next((i for i, part in enumerate(name.split("."), start=1) if part.isdigit()), name.count("."))


def _read(path: Path, fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    fresh = {"profile_version": PROFILE_VERSION, "fingerprint": dict(fingerprint), "layers": {}}
    if not path.exists():
        return fresh
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        is_ours = isinstance(found["layers"], dict)
    except (OSError, ValueError, KeyError, TypeError):
        is_ours = False
    if not is_ours or {**found, "layers": {}} != fresh:
        raise OutputError(f"{path} exists and is not the profile of the same model, settings and text: choose another --output")
    return found


def _dense_run(model: PreTrainedModel, blocks: Sequence[str], ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Logits, and what every block returns."""
    kept: dict[str, Any] = {}
    hooks = [
        model.get_submodule(block).register_forward_hook(lambda m, a, out, block=block: kept.update({block: out}))
        for block in blocks
    ]
    try:
        logits = model(input_ids=ids.to(model.device))[0]
    finally:
        for hook in hooks:
            hook.remove()
    return logits, kept


def _rerun(model: PreTrainedModel, before: Sequence[str], kept: Mapping[str, Any], ids: Tensor) -> Tensor:
    """Logits with the blocks before the change replaced by what they returned."""
    stands: dict[nn.Module, Callable[..., Any]] = {
        model.get_submodule(block): lambda *args, output=kept[block], **kwargs: output for block in before
    }
    with patched_forwards(stands):
        return model(input_ids=ids.to(model.device))[0]


def _position(blocks: Sequence[str], name: str) -> int:
    return next((i for i, block in enumerate(blocks) if name.startswith(block + ".")), 0)
