"""AdamW whose ranks exchange one bit per value once the variance has settled.

Warm-up is `torch.optim.AdamW` on gradients that DDP averages. Then the variance is frozen, DDP's hook leaves gradients
local, and `step` exchanges the momentum instead. One rank alone is AdamW to the bit.

What is exchanged is the momentum over the root of the frozen variance, the update of Adam: its values have one size, as a
sign with a scale needs it, where a sign of the momentum itself becomes a huge step wherever the variance is small.

Source: 1-bit Adam (arXiv 2102.02888), local steps from 0/1 Adam (arXiv 2202.06009); differs by what is exchanged, by the
bias correction of the frozen variance, and by local steps that exchange their mean instead of their sum, so that errors
keep their meaning when the interval grows. One file, because every phase works on the same buffers.
"""

import copy
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import debugging_hooks, default_hooks, powerSGD_hook
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ...checkpoint import whole_file
from ...distributed import rank, sum_, world_size
from ...errors import ConfigError, NothingMatched, NumericalError, UnsupportedModel, VerificationError
from ...report import CommReport
from ...select import glob_matches
from .config import OneBitAdamConfig
from .exchange import HOW_TO_STAY_FINITE, CompressedMean

logger = logging.getLogger(__name__)

#: Key of the first parameter group that carries the phase through state dicts, torch's own AdamW's too.
PROGRESS = "one_bit_adam"
#: torch's hook, and bytes per value where they are not the gradient's own.
_GRADIENT_HOOKS: dict[str, tuple[Any, int | None]] = {
    "fp32": (default_hooks.allreduce_hook, None),
    "fp16": (default_hooks.fp16_compress_hook, 2),
    "bf16": (default_hooks.bf16_compress_hook, 2),
}
#: With fewer parameters the messages are so small that their number, not their size, costs the time.
WORTH_IT = 1_000_000
#: With fewer steps of warm-up the variance is mostly its own bias correction.
FEWEST_WARMUP_STEPS = 100
#: Settings that have done their work once the variance is frozen.
DECIDED_AT_FREEZE = ("freeze", "dense", "min_numel", "sparse_share")


class OneBitAdam(torch.optim.AdamW):
    """`torch.optim.AdamW` with 1-bit exchange of the momentum between data-parallel ranks.

    Under more than one rank call `attach` with the DDP model before the first backward pass. A parameter that gets its first
    gradient after the warm-up is exchanged exactly.

    >>> weight = torch.nn.Parameter(torch.ones(2)); optimizer = OneBitAdam([weight], lr=0.5, weight_decay=0.0, total_steps=10)
    >>> weight.grad = torch.ones(2); optimizer.step(); [round(value, 4) for value in weight.tolist()]
    [0.5, 0.5]
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        config: OneBitAdamConfig | None = None,
        total_steps: int | None = None,
        warmup_steps: int = 0,
        **adamw: Any,
    ):
        """Check what can be known before training.

        Args:
            params: parameters or groups of them.
            lr: learning rate.
            config: what is exchanged and when.
            total_steps: steps of the run, which `freeze` as a fraction or `"auto"` refers to.
            warmup_steps: steps of the learning rate's warm-up; `freeze="auto"` waits for its end.
            **adamw: `betas, eps, weight_decay, foreach, fused` of `torch.optim.AdamW`.

        Raises:
            ConfigError: `total_steps` is missing, or an option of AdamW that a frozen variance cannot have.
            UnsupportedModel: parameters are sharded, or on several devices.
        """
        super().__init__(params, lr, **adamw)
        # Where AdamW is fused, its base asks the gradient scaler to leave overflow to `step`, where ranks could disagree.
        self._step_supports_amp_scaling = False
        self.config = config or OneBitAdamConfig()
        self.total_steps, self.warmup_steps = total_steps, warmup_steps
        self._order: dict[Tensor, int] = {}
        self._check()
        self.report = CommReport(sum(p.numel() for _, p in self._trained()), world_size())
        self._names: dict[Tensor, str] = {}
        self._power_sgd: powerSGD_hook.PowerSGDState | None = None
        #: What `attach` was called with, on several ranks.
        self.ddp: DistributedDataParallel | None = None
        self._agrees_on_overflow = False
        self._unchecked_steps = 0
        self._restore()

    @classmethod
    def from_adamw(cls, adamw: torch.optim.Optimizer, **settings: Any) -> "OneBitAdam":
        """Take over the groups and the state of a `torch.optim.AdamW`, a state loaded from a checkpoint included.

        Groups stay the same objects, so that a learning-rate scheduler goes on working.

        Raises:
            ConfigError: another optimizer than AdamW.
        """
        if type(adamw) is not torch.optim.AdamW:
            name = f"{type(adamw).__module__}.{type(adamw).__name__}"
            raise ConfigError(f"1-bit Adam replaces torch.optim.AdamW (TrainingArguments optim='adamw_torch'), got {name}")
        is_new = PROGRESS not in adamw.param_groups[0]
        new = cls(adamw.param_groups, **settings)
        new.state = adamw.state
        if is_new:
            del new.param_groups[0][PROGRESS]  # made before the state was there to count steps in
        new._restore()
        return new

    @property
    def num_steps(self) -> int:
        """Steps done, those before a resume included."""
        return self._progress["steps"]

    @property
    def is_compressing(self) -> bool:
        """Whether the warm-up is over, so that gradients stay local."""
        return self._mean is not None

    @property
    def has_frozen(self) -> bool:
        """Whether the variance was frozen at some step, by a run on several ranks before a resume too."""
        return self._progress["frozen_at"] is not None

    def attach(self, model: nn.Module, *, agrees_on_overflow: bool = False) -> None:
        """Register the hook that averages gradients in the warm-up and leaves them local afterwards.

        Args:
            model: the DDP model; on one rank any model.
            agrees_on_overflow: float16 with a gradient scaler: a gradient that is not finite on one rank becomes infinite
                on all, so that all skip the step and shrink the scale together.

        Raises:
            NothingMatched: a glob of `dense` matches no parameter.
            ConfigError: no parameter is left to compress.
            UnsupportedModel: more than one rank and no DDP model, or an embedding with sparse gradients.
        """
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        sparse = [name for name, module in inner.named_modules() if getattr(module, "sparse", False) is True]
        if sparse:
            raise UnsupportedModel(f"1-bit Adam cannot exchange sparse gradients: set sparse=False in {', '.join(sparse)}")
        self._names = {parameter: name for name, parameter in inner.named_parameters()}
        for glob in self.config.dense:
            if not any(glob_matches(name, glob) for name in self._names.values()):
                raise NothingMatched(f"one_bit_adam.dense glob {glob!r} matches none of {len(self._names)} parameters")
        if world_size() == 1:
            return
        if not isinstance(model, DistributedDataParallel):
            raise UnsupportedModel(
                f"1-bit Adam on {world_size()} ranks needs a model in DistributedDataParallel, got {type(model).__name__}; "
                "without a GPU the Trainer makes one only with TrainingArguments use_cpu=True"
            )
        if not any(self._may_compress(p) for _, p in self._trained()):
            largest = max(p.numel() for _, p in self._trained())
            raise ConfigError(
                f"no parameter is left to compress: all have fewer than one_bit_adam.min_numel = {self.config.min_numel} values "
                f"or match one_bit_adam.dense; the largest has {largest}, adapters may need a smaller min_numel"
            )
        if rank() == 0:
            self._warn_of_little_gain()
        if self.config.exchange == "power_sgd":
            self._power_sgd = powerSGD_hook.PowerSGDState(
                None, matrix_approximation_rank=self.config.power_sgd_rank, start_powerSGD_iter=max(2, self._freeze_window()[0])
            )
        self._agrees_on_overflow = agrees_on_overflow
        if self.ddp is not model:  # a Trainer that trains once more keeps its wrapper, and a hook is for good
            model.register_comm_hook(self, _reduce)
        self.ddp = model

    def _warn_of_little_gain(self) -> None:
        if self.report.num_values < WORTH_IT:
            logger.warning("1-bit Adam gains little: only %d parameters are trained", self.report.num_values)
        first, _ = self._freeze_window()
        if self.config.exchange != "none" and self.total_steps and first >= self.total_steps:
            logger.warning(
                "nothing is compressed: the warm-up of %d steps is no shorter than the run of %d", first, self.total_steps
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on gradients that DDP has averaged (warm-up) or left local (afterwards).

        Raises:
            UnsupportedModel: several ranks and `attach` was not called.
            NumericalError: after the warm-up, a gradient is not finite on some rank; or `check_replicas` found it.
            VerificationError: parameters differ between ranks.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if world_size() > 1 and self.ddp is None:
            raise UnsupportedModel(
                "call OneBitAdam.attach with the DDP model before the first step: gradients are not exchanged yet"
            )
        self._progress["steps"] += 1
        if self._mean is None:
            super().step()
            self.report.end_step()
            if self._is_time_to_freeze():
                self.freeze()
        else:
            self._compressed_step(self._mean)
            self.report.end_step()
        self._unchecked_steps += 1
        if self._unchecked_steps >= self.config.check_every and not self._local:
            self.check_replicas()
        return loss

    def freeze(self) -> None:
        """End the warm-up now; must be called on all ranks at the same step, which `step` does by itself.

        Raises:
            ConfigError: no tensor is left to compress, because the variance is mostly 0 in all of them.
            VerificationError: parameters or states differ between ranks.
        """
        trained = self._trained()
        compressed = []
        for index, (_, p) in enumerate(trained):
            variance = self.state[p].get("exp_avg_sq")
            if variance is None or not self._may_compress(p):
                continue
            zeros = variance.numel() - int(variance.count_nonzero())
            if zeros > self.config.sparse_share * variance.numel():
                continue
            compressed.append(index)
            if zeros and rank() == 0:
                logger.warning(
                    "%d of %d values of %s had no gradient in the warm-up and stay as they are; list it in one_bit_adam.dense "
                    "to train them", zeros, variance.numel(), self._name(p),
                )  # fmt: skip
        if not compressed:
            raise ConfigError(f"no tensor is left to compress after {self.num_steps} steps: the variance is 0 almost everywhere")
        if rank() == 0:
            logger.info(
                "1-bit Adam: variance frozen after step %d, %d of %d tensors compressed",
                self.num_steps,
                len(compressed),
                len(trained),
            )
            if self.num_steps < FEWEST_WARMUP_STEPS:
                logger.warning(
                    "the variance was learned in %d steps only; fewer than %d often diverge", self.num_steps, FEWEST_WARMUP_STEPS
                )
        self._progress.update(frozen_at=self.num_steps, compressed=compressed, bits=[1] * len(compressed))
        self._progress["settings"] = {name: getattr(self.config, name) for name in DECIDED_AT_FREEZE}
        self._start_compression()
        self.check_replicas(with_state=True)

    def clip_grad_norm_(self, max_norm: float) -> float:
        """Scale gradients so that their norm is at most `max_norm`, by the same factor on all ranks.

        The norm is that of the averaged gradient in the warm-up, afterwards the root mean square of the ranks' own norms,
        which is larger because noise is not averaged out. Between two exchanges of local steps it is the rank's own.

        Returns:
            The norm before.

        Raises:
            NumericalError: it is not finite, and no gradient scaler will skip the step.
        """
        parameters = [p for _, p in self._trained()]
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None]).float()
        if self.is_compressing and self._interval() == 1:
            norm = norm.square()
            sum_([norm])
            self.report.add_all_reduce("control", 4)
            norm = (norm / world_size()).sqrt()
        if not self._agrees_on_overflow and not norm.isfinite():
            raise NumericalError(f"the gradient's norm is {float(norm)} before step {self.num_steps + 1}: {HOW_TO_STAY_FINITE}")
        clip_grads_with_norm_(parameters, max_norm, norm)
        return float(norm)

    @torch.no_grad()
    def synchronize(self) -> None:
        """End the local steps since the last exchange, on all ranks; without such steps nothing happens."""
        if self._local and self._mean is not None:
            self._exchange_local_steps(self._mean)

    @torch.no_grad()
    def check_replicas(self, *, with_state: bool = False) -> None:
        """Compare parameters between ranks, bit for bit by checksums, and see that they are finite.

        Args:
            with_state: momentum and variance too.

        Raises:
            VerificationError: they differ; names the first such tensors.
            NumericalError: they do not differ and are not finite.
        """
        self._unchecked_steps = 0
        if world_size() == 1:
            return
        tensors = [(self._name(p), p) for _, p in self._trained()]
        if with_state:
            tensors += [
                (f"{name} ({key})", self.state[p][key])
                for name, p in tuple(tensors)
                for key in ("exp_avg", "exp_avg_sq")
                if self.state[p]
            ]
        sums = torch.stack([_checksum(tensor) for _, tensor in tensors])
        extremes = torch.cat([sums, -sums])
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
        self.report.add_all_reduce("control", 8 * len(extremes))
        most, least = extremes.split(len(sums))
        differing = [name for (name, _), is_equal in zip(tensors, (most == -least).tolist(), strict=True) if not is_equal]
        if differing:
            shown = ", ".join(differing[:3]) + (", …" if len(differing) > 3 else "")
            raise VerificationError(
                f"after step {self.num_steps} {len(differing)} of {len(tensors)} tensors differ between ranks: {shown}. "
                "Something changes parameters on some ranks only, or ranks decode on unlike hardware"
            )
        for name, tensor in tensors:
            if not tensor.sum(dtype=torch.float32).isfinite():
                raise NumericalError(f"{name} is not finite after step {self.num_steps}: {HOW_TO_STAY_FINITE}")

    def state_dict(self) -> dict[str, Any]:
        """The state of AdamW, and the phase in its first group. Errors differ by rank: `save_errors` writes them.

        Raises:
            VerificationError: ranks are apart by local steps; call `synchronize` on all of them first.
        """
        if self._local:
            raise VerificationError("ranks are apart by local steps: call OneBitAdam.synchronize() on all ranks before saving")
        self._progress["sent"] = {
            "world_size": self.report.world_size,
            "bytes": self.report.sent_bytes,
            "steps": self.report.num_steps,
        }
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of `torch.optim.AdamW`; errors start at 0 until `load_errors`."""
        super().load_state_dict(state_dict)
        self._restore()

    def save_errors(self, folder: Path) -> None:
        """Write this rank's errors below a checkpoint's folder; in the warm-up there are none."""
        if self._mean is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"worker": self._mean.buffer, "server": self._mean.server_error}
        with whole_file(_error_file(folder)) as temporary:
            save_file(tensors, temporary, metadata=self._fingerprint())

    def load_errors(self, folder: Path) -> bool:
        """Read this rank's errors, if all ranks find theirs and they belong to the present parameters.

        Returns:
            Whether errors were loaded on all ranks. If not, they are 0.
        """
        if self._mean is None:
            return False
        path, found = _error_file(folder), {}
        if path.exists():
            with safe_open(path, framework="pt") as file:
                if file.metadata() == self._fingerprint():
                    found = {name: file.get_tensor(name) for name in ("worker", "server")}
        num_found = torch.tensor(float(bool(found)), device=self._mean.buffer.device)
        sum_([num_found])
        if int(num_found) < world_size():
            return False
        self._mean.buffer.copy_(found["worker"])
        self._mean.server_error.copy_(found["server"])
        return True

    # The rest of the class is not public.

    @property
    def _progress(self) -> dict[str, Any]:
        return self.param_groups[0][PROGRESS]

    def _trained(self) -> list[tuple[dict[str, Any], nn.Parameter]]:
        """In the order in which a checkpoint counts them: whoever is in other groups for a step keeps its number."""
        entries = [(group, p) for group in self.param_groups for p in group["params"] if p.requires_grad]
        return sorted(entries, key=lambda entry: self._order.get(entry[1], len(self._order)))

    def _name(self, parameter: Tensor) -> str:
        return self._names.get(parameter, f"a parameter of shape {list(parameter.shape)}")

    def _may_compress(self, parameter: Tensor) -> bool:
        is_dense = any(glob_matches(self._names.get(parameter, ""), glob) for glob in self.config.dense)
        return parameter.numel() >= self.config.min_numel and not is_dense

    def _check(self) -> None:
        config, trained = self.config, self._trained()
        needs_total = config.exchange in ("one_bit", "power_sgd") and (config.freeze == "auto" or config.freeze < 1)
        if needs_total and (self.total_steps is None or self.total_steps < 1):
            raise ConfigError(f"one_bit_adam.freeze = {config.freeze} needs total_steps of at least 1, got {self.total_steps}")
        for option in ("amsgrad", "maximize", "differentiable"):
            if any(group[option] for group in self.param_groups):
                raise ConfigError(f"1-bit Adam has no {option}: set {option}=False")
        sharded = [type(p).__name__ for _, p in trained if isinstance(p, DTensor) or type(p).__name__ == "FlatParameter"]
        if sharded:
            raise UnsupportedModel(
                f"1-bit Adam needs whole parameters on every rank, got {sharded[0]}: FSDP and ZeRO shard them; use DDP"
            )
        devices = {str(p.device) for _, p in trained}
        if len(devices) > 1:
            raise UnsupportedModel(f"1-bit Adam needs all parameters on one device per rank, got {', '.join(sorted(devices))}")

    def _restore(self) -> None:
        """Take up the phase that the groups and the state say."""
        self._order = {p: number for number, p in enumerate(p for group in self.param_groups for p in group["params"])}
        steps = max((int(state["step"]) for state in self.state.values() if "step" in state), default=0)
        fresh: dict[str, Any] = {"steps": steps, "frozen_at": None, "variance_norm": None, "compressed": [], "bits": []}
        self.param_groups[0].setdefault(PROGRESS, fresh)
        self._mean: CompressedMean | None = None
        self._local: list[dict[str, Any]] = []
        sent = self._progress.get("sent")
        if sent and sent["world_size"] == world_size():
            self.report.sent_bytes, self.report.num_steps = copy.deepcopy(sent["bytes"]), dict(sent["steps"])
        self.report.phase = "training" if self.config.exchange == "none" or world_size() == 1 else "warm-up"
        if self._progress["frozen_at"] is not None and self.state and world_size() > 1 and self.config.exchange == "one_bit":
            self._warn_of_settings_too_late()
            self._start_compression()

    def _warn_of_settings_too_late(self) -> None:
        for name, value in self._progress["settings"].items():
            if getattr(self.config, name) != value and rank() == 0:
                logger.warning(
                    "one_bit_adam.%s = %s changes nothing: the variance was frozen at step %d, with %s",
                    name, getattr(self.config, name), self._progress["frozen_at"], value,
                )  # fmt: skip

    def _start_compression(self) -> None:
        trained = self._trained()
        chosen = set(self._progress["compressed"])
        self._compressed = [entry for index, entry in enumerate(trained) if index in chosen]
        self._exact = [entry for index, entry in enumerate(trained) if index not in chosen]
        states = [self.state[p] for _, p in self._compressed]
        self._momentum = torch.cat([state["exp_avg"].reshape(-1).float() for state in states])
        sizes = [p.numel() for _, p in self._compressed]
        for (_, p), momentum in zip(self._compressed, self._momentum.split(sizes), strict=True):
            self.state[p]["exp_avg"] = momentum.view(p.shape)
        # AdamW's `step` counts the gradients in the variance, so it stands still from here on: plain AdamW goes on from it.
        self._denominator = torch.cat([
            (self.state[p]["exp_avg_sq"].reshape(-1).float() / (1 - group["betas"][1] ** float(self.state[p]["step"])))
            .sqrt_()
            .add_(group["eps"])
            for group, p in self._compressed
        ])  # fmt: skip
        # A value whose variance is 0 would be divided by eps alone, and one bit cannot say 0.
        mask = torch.cat([state["exp_avg_sq"].reshape(-1) > 0 for state in states])
        whole = None if bool(mask.all()) else mask
        self._mean = CompressedMean(sizes, self._progress["bits"], whole, self.report, self._momentum.device)
        self._apply_mask()
        self.report.phase = "compression"

    def _apply_mask(self) -> None:
        if self._mean is not None and self._mean.mask is not None:
            self._momentum.mul_(self._mean.mask)

    def _freeze_window(self) -> tuple[int, int]:
        """First and last step after which the variance may be frozen."""
        config, total = self.config, self.total_steps or 0
        if config.freeze != "auto":
            step = int(config.freeze) if config.freeze >= 1 else max(1, round(config.freeze * total))
            return step, step
        floor = max(1, round(config.freeze_floor * total), self.warmup_steps)
        return floor, max(floor, round(config.freeze_ceiling * total))

    def _is_time_to_freeze(self) -> bool:
        if world_size() == 1 or self.config.exchange != "one_bit":
            return False
        first, last = self._freeze_window()
        steps, progress = self.num_steps, self._progress
        if steps >= last:
            return True
        beta2 = self.param_groups[0]["betas"][1]
        interval = max(1, min(round(1 / (1 - beta2)), first // 2))
        if steps % interval:
            return False
        norm = sum(float(self.state[p]["exp_avg_sq"].sum()) for _, p in self._trained() if self.state[p]) / (1 - beta2**steps)
        before, progress["variance_norm"] = progress["variance_norm"], norm
        if steps < first or not before or not norm:
            return False
        return min(norm / before, before / norm) >= self.config.variance_ratio

    def _interval(self) -> int:
        """Steps from one exchange to the next."""
        doublings = (self.num_steps - self._progress["frozen_at"]) // self.config.local_steps_double_every
        return self.config.local_steps if doublings > 30 else min(self.config.local_steps, 2**doublings)

    def _compressed_step(self, mean: CompressedMean) -> None:
        if self._interval() > 1:
            self._local_step()
            if self._local[0]["steps"] >= self._interval():
                self._exchange_local_steps(mean)
            return
        self._reduce_exact([p for _, p in self._exact])
        self._step_exact()
        self._own_momentum()
        mean.buffer.addcdiv_(self._momentum, self._denominator)
        self._replan(mean)
        mean.mean_into(self._momentum)
        for (group, p), update in self._with_flat(self._momentum):
            lr = float(group["lr"])
            p.mul_(1 - lr * group["weight_decay"]).sub_(update.view(p.shape), alpha=lr)
        self._momentum.mul_(self._denominator)

    def _own_momentum(self) -> None:
        """The common momentum, moved on by the rank's own gradients."""
        for (group, p), momentum in self._with_flat(self._momentum):
            beta1 = group["betas"][0]
            momentum.mul_(beta1)
            if p.grad is not None:
                momentum.add_(p.grad.reshape(-1), alpha=1 - beta1)
        self._apply_mask()

    def _local_step(self) -> None:
        """Move by the own momentum; remember where all ranks were together and how far this one went."""
        if not self._local:
            self._moved = torch.zeros_like(self._momentum)
            self._local = [{"steps": 0, "together": p.clone(), "decay": 1.0, "lr": 0.0} for _, p in self._compressed]
        self._step_exact()
        self._own_momentum()
        flats = self._with_flat(self._momentum, self._denominator, self._moved)
        for ((group, p), momentum, denominator, moved), local in zip(flats, self._local, strict=True):
            lr = float(group["lr"])
            decay, update = 1 - lr * group["weight_decay"], momentum / denominator
            p.mul_(decay).sub_(update.view(p.shape), alpha=lr)
            moved.mul_(decay).add_(update, alpha=lr)
            local.update(steps=local["steps"] + 1, decay=local["decay"] * decay, lr=local["lr"] * decay + lr)

    def _exchange_local_steps(self, mean: CompressedMean) -> None:
        """Replace what this rank did since the last exchange by what all did on average."""
        flats = self._with_flat(mean.buffer, self._momentum, self._denominator, self._moved)
        for (_, values, momentum, denominator, moved), local in zip(flats, self._local, strict=True):
            values.add_(moved.div_(local["lr"]) if local["lr"] else momentum / denominator)
        self._replan(mean)
        mean.mean_into(self._momentum)
        for ((_, p), update), local in zip(self._with_flat(self._momentum), self._local, strict=True):
            p.copy_(local["together"]).mul_(local["decay"]).sub_(update.view(p.shape), alpha=local["lr"])
        self._momentum.mul_(self._denominator)
        exact = [p for _, p in self._exact if self.state[p]]
        self._average([tensor for p in exact for tensor in (p, self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"])])
        self._local = []

    def _with_flat(self, *flats: Tensor) -> Iterable[tuple[Any, ...]]:
        """Every compressed parameter with its group, and its part of each flat buffer."""
        sizes = [p.numel() for _, p in self._compressed]
        return zip(self._compressed, *(flat.split(sizes) for flat in flats), strict=True)

    def _replan(self, mean: CompressedMean) -> None:
        width = self.config.adaptive_bits
        planned_at = self._progress.get("planned_at")  # steps without an exchange plan nothing, so none may be waited for
        if width is None or (planned_at is not None and self.num_steps - planned_at < self.config.replan_every):
            return
        self._progress["planned_at"] = self.num_steps
        self._progress["bits"] = mean.choose_bits(width)
        mean.set_bits(self._progress["bits"])

    def _step_exact(self) -> None:
        """AdamW on the parameters that are not compressed."""
        gradients = [p.grad for _, p in self._compressed]
        for _, p in self._compressed:
            p.grad = None
        super().step()
        for (_, p), gradient in zip(self._compressed, gradients, strict=True):
            p.grad = gradient

    def _reduce_exact(self, parameters: Sequence[nn.Parameter]) -> None:
        """Average gradients over ranks in one message; a gradient that no rank has stays None."""
        if not parameters:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        has_gradient = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
        self._average([*gradients, has_gradient])
        for p, gradient, is_there in zip(parameters, gradients, has_gradient.tolist(), strict=True):
            p.grad = gradient if is_there else None

    def _average(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors by their mean over ranks, in one message."""
        if not tensors:
            return
        flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
        sum_([flat])
        self.report.add_all_reduce("small tensors, exactly", 4 * len(flat))
        flat.div_(world_size())
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view(tensor.shape))

    def _fingerprint(self) -> dict[str, str]:
        """What errors belong to."""
        parameters = sum(int(_checksum(p)) for _, p in self._trained())
        bits = ",".join(map(str, self._progress["bits"]))
        numbers = {"rank": rank(), "world_size": world_size(), "step": self.num_steps, "parameters": parameters, "bits": bits}
        return {name: str(value) for name, value in numbers.items()}

    def _reduce_bucket(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """What DDP calls for every bucket of gradients."""
        if self.is_compressing:
            return self._spread_overflow(bucket) if self._agrees_on_overflow else debugging_hooks.noop_hook(None, bucket)
        state, buffer = self._power_sgd, bucket.buffer()
        if state is not None and state.iter >= state.start_powerSGD_iter:
            self.report.phase = "compression"
            _, _, before = state.compression_stats()
            future = powerSGD_hook.powerSGD_hook(state, bucket)
            self.report.add_all_reduce("factors of gradients", (state.compression_stats()[2] - before) * buffer.element_size())
            return future
        if state is not None:
            state.maybe_increase_iter(bucket)
        hook, num_bytes = _GRADIENT_HOOKS[self.config.gradients]
        self.report.add_all_reduce("gradients", (num_bytes or buffer.element_size()) * buffer.numel())
        return hook(cast(dist.ProcessGroup, dist.group.WORLD), bucket)

    def _spread_overflow(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Leave gradients local, but infinite where any rank's are not finite: every rank's scaler then sees the overflow."""
        buffer = bucket.buffer()
        overflow = (~buffer.sum(dtype=torch.float32).isfinite()).to(torch.float32)
        self.report.add_all_reduce("control", 4)
        work = dist.all_reduce(overflow, op=dist.ReduceOp.MAX, async_op=True)
        return work.get_future().then(lambda future: buffer.masked_fill_(future.value()[0] > 0, torch.inf))


def _reduce(optimizer: OneBitAdam, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    return optimizer._reduce_bucket(bucket)


def _error_file(folder: Path) -> Path:
    return folder / f"one_bit_adam_rank{rank()}.safetensors"


def _checksum(tensor: Tensor) -> Tensor:
    """Sum of the bit patterns as integers; int64."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(integers).sum(dtype=torch.int64)
