"""Short distillation of what is continuous in a compressed model: scales, norms, biases; integers stay as they are.

Every trained tensor is its value times `1 + theta` with `theta` float32 from 0, so that one learning rate, in relative
steps, fits scales and norms of any size. The loss is the divergence of the compressed model's next-token distribution
from the dense one's.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from .capture import patched_forwards, without_cache
from .config import DistillationConfig
from .errors import NumericalError
from .stored import CodedModule, ScaledModule


def distill_(
    model: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]], config: DistillationConfig,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[float]:  # fmt: skip
    """Fit scales, norms and biases of a compressed model to the dense one, in place.

    Args:
        model: compressed, in memory.
        teacher: dense, of the same class.
        batches: model inputs, each used once per epoch, in order.
        config: epochs and learning rate.
        progress: called with finished and all steps.

    Returns:
        The loss of every step, in nats per token.

    Raises:
        NumericalError: the loss is not finite.
    """
    bases = _trained(model)
    modules = [module for module in model.modules() if isinstance(module, ScaledModule)]
    thetas = {name: nn.Parameter(torch.zeros_like(base)) for name, base in bases.items()}
    optimizer = torch.optim.Adam(thetas.values(), lr=config.learning_rate, betas=(0.9, 0.99))
    total = config.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, total))
    losses: list[float] = []
    with _frozen(model), without_cache(model), without_cache(teacher), patched_forwards({m: m.scaled_forward for m in modules}):
        for step in range(total):
            progress(step, total)
            batch = {name: value.to(model.device) for name, value in batches[step % len(batches)].items()}
            with torch.no_grad():
                target = teacher.eval()(**batch)[0]
            with torch.enable_grad():
                output = functional_call(model, _values(model, bases, thetas), args=(), kwargs=batch)[0]
                kept = batch["attention_mask"].bool() if "attention_mask" in batch else slice(None)
                loss = divergence(output[kept], target[kept])
                loss.backward()
            if not loss.isfinite():
                raise NumericalError(f"the loss of distillation step {step} is not finite: lower distillation.learning_rate")
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
    with torch.no_grad():
        for name, value in _values(model, bases, thetas).items():
            model.get_parameter_or_buffer(name).copy_(value)
    return losses


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """No gradients for the parameters themselves, no dropout."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    was_training = model.training
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        model.eval()
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        model.train(was_training)


def divergence(output: Tensor, target: Tensor) -> Tensor:
    """Mean over positions of `KL(target || output)` of logits `[..., vocabulary]`, in nats.

    >>> divergence(torch.zeros(1, 2), torch.zeros(1, 2)).item()
    0.0
    """
    log_p = target.float().flatten(0, -2).log_softmax(-1)
    log_q = output.float().flatten(0, -2).log_softmax(-1)
    return nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def _trained(model: PreTrainedModel) -> dict[str, Tensor]:
    """What is trained: one-dimensional parameters, and the scales of compressed Linears; float32 copies."""
    found = {name: parameter.detach().float() for name, parameter in model.named_parameters() if parameter.dim() == 1}
    for name, module in model.named_modules():
        if isinstance(module, ScaledModule) and not module.is_tied:
            if isinstance(module, CodedModule):
                module.decode_()
            found |= {f"{name}.{scale}": module.get_buffer(scale).float() for scale in module.trained_scales}
    return found


def _values(model: PreTrainedModel, bases: Mapping[str, Tensor], thetas: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Parameters in their own dtype; scales stay in float32 until they are stored."""
    parameters = dict(model.named_parameters())
    values = {name: base * (1 + thetas[name]) for name, base in bases.items()}
    return {name: value.to(parameters[name].dtype) if name in parameters else value for name, value in values.items()}


def _cosine(step: int, total: int) -> float:
    """Five per cent of warm-up, then half a cosine down to a tenth."""
    warm_up = max(1, total // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm_up) / max(1, total - warm_up)))
