"""Block-wise distillation: every block of the student learns the output of the teacher's, one after the other.

The student's block gets its inputs through the blocks before it, which are trained already, so that it also learns to make
up for what they lost. There is no language head and no deep graph: the cheapest way to win back most of what a coarse
rounding has lost, before the whole model is trained.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...arch import describe
from ...capture import split_call, without_cache
from ...errors import ConfigError, NumericalError
from ...functional.divergence import lost_energy
from ...functional.gram import without_padding


def distill_blocks_(
    student: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]], *, epochs: int = 1,
    learning_rate: float = 1e-3, progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[float]]:  # fmt: skip
    """Train every block's parameters on its dense block's outputs, in place.

    Args:
        student: of the teacher's class and shape, in whatever state its layers train in.
        teacher: dense.
        batches: model inputs; hidden states of all of them are kept, twice.
        epochs: how often each is used, per block.
        learning_rate: of Adam, falling in a straight line to a tenth.
        progress: called with finished and all blocks.

    Returns:
        The loss of every step by block: the share of the outputs' energy that is lost, padding left out; none of a block in which
        nothing is trained.

    Raises:
        ConfigError: the models have no equal numbers of blocks, or there are no batches.
        NumericalError: a loss is not finite.
    """
    names, arch = describe(student).blocks, describe(teacher)
    theirs = arch.blocks
    if len(names) != len(theirs) or len(arch.stacks) != 1:
        raise ConfigError(
            f"block-wise distillation needs one stack of equal length in both models, got {len(names)} and {len(theirs)}"
        )
    if not batches or epochs < 1:
        raise ConfigError(f"batches and epochs must be at least 1, got {len(batches)} and {epochs}")
    if student.device != teacher.device:
        raise ConfigError(f"both models must be on one device, got {student.device} and {teacher.device}")
    was_training = student.training
    losses: dict[str, list[float]] = {}
    with without_cache(student), without_cache(teacher):
        hidden, calls = _record(teacher.eval(), theirs, batches)
        dense_hidden = list(hidden)
        for position, (mine, dense) in enumerate(zip(names, theirs, strict=True)):
            progress(position, len(names))
            block, target_block = student.eval().get_submodule(mine), teacher.get_submodule(dense)
            with torch.no_grad():
                dense_hidden = [_run(target_block, x, calls[i][position]) for i, x in enumerate(dense_hidden)]
            masks = [batch.get(arch.mask_of(dense)) for batch in batches]
            inputs = [(x, calls[i][position], dense_hidden[i], masks[i]) for i, x in enumerate(hidden)]
            losses[mine] = _fit_(mine, block, inputs, epochs, learning_rate)
            with torch.no_grad():
                hidden = [_run(block, x, calls[i][position]) for i, x in enumerate(hidden)]
        progress(len(names), len(names))
    student.train(was_training)
    return losses


def _fit_(
    name: str, block: nn.Module, inputs: Sequence[tuple[Tensor, Any, Tensor, Tensor | None]], epochs: int, learning_rate: float
) -> list[float]:
    trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
    if not trained:
        return []
    optimizer = torch.optim.Adam(trained, lr=learning_rate)
    total = epochs * len(inputs)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, max(total, 1))
    losses = []
    with torch.enable_grad():
        for step in range(total):
            x, call, target, mask = inputs[step % len(inputs)]
            loss = lost_energy(without_padding(_run(block, x, call), mask), without_padding(target, mask)).mean()
            if not loss.isfinite():
                raise NumericalError(f"the loss of {name} is not finite in step {step}: lower the learning rate")
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
    return losses


@torch.no_grad()
def _record(
    model: PreTrainedModel, blocks: Sequence[str], batches: Sequence[Mapping[str, Tensor]]
) -> tuple[list[Tensor], list[list[Any]]]:
    """The first block's inputs per batch, and per batch what every block is called with beside them."""
    hidden: list[Tensor] = []
    calls: list[list[Any]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, call = split_call(args, kwargs)
        if len(calls) > len(hidden):
            hidden.append(x)
        calls[-1].append(call)

    handles = [model.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True) for name in blocks]
    try:
        for batch in batches:
            calls.append([])
            model(**{name: value.to(model.device) for name, value in batch.items()})
    finally:
        for handle in handles:
            handle.remove()
    return hidden, calls


def _run(block: nn.Module, x: Tensor, call: Any) -> Tensor:
    output = block(x, *call.args, **call.kwargs)
    return output[0] if isinstance(output, tuple) else output
