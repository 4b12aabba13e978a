"""Training with tensor networks: healing, periodic truncation (TRP), ordered dropout of ranks (Maestro).

All three keep their state in the parameters; what is due at a step, and what is drawn, follows from its number.

Sources: Trained Rank Pruning (arXiv 1812.02402), Maestro (arXiv 2308.14929). Both differ: TRP here truncates in the
metric of the inputs where batches are given, and takes the sub-gradient step on the singular values, for a whole interval
at once; Maestro draws from a few shares of the rank, not from every rank.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ... import distributed
from ...arch import as_linear, describe
from ...capture import input_moments
from ...errors import ConfigError
from ...functional.factor import spectrum, whitening_factor
from ...select import replace_modules, select_names
from ...training import CompactCallback, refuse_adapters, refuse_cut
from .config import TensorNetworkTraining
from .functional import balance, suffix_norms, truncate_energy
from .layer import TensorTrainLinear

_DAMP = 0.01


class TensorNetworkCallback(CompactCallback):
    """See `TensorNetworkTraining`.

    Args:
        training: the schedule.
        batches: model inputs, for `trp`: matrices are truncated by what their outputs lose on them, of the model as it is before
            training; without any, by what the weights lose.
        settings: fields of `TensorNetworkTraining`, in the place of those of `training`.

    >>> TensorNetworkCallback(schedule="trp", interval=50).training.interval
    50
    """

    def __init__(
        self, training: TensorNetworkTraining | None = None, batches: Sequence[Mapping[str, Tensor]] = (), **settings: Any
    ) -> None:  # fmt: skip
        """Keep the settings.

        Raises:
            ConfigError: a setting is out of range, or there are batches for another schedule.
        """
        super().__init__()
        self.training, self.batches = replace(training or TensorNetworkTraining(), **settings), batches
        if batches and self.training.schedule != "trp":
            raise ConfigError(f"batches are for training.schedule trp, got {self.training.schedule}")
        self.rights: dict[str, Tensor] = {}
        self.names: list[str] = []
        self.frozen: list[nn.Parameter] = []

    def swap_(self, model: PreTrainedModel) -> None:
        """Freeze all but the factors (heal, unless the rest is trained; pivoted products become plain and balanced ones meanwhile), find the Linears (trp), or factor them at full rank (maestro).

        Raises:
            ConfigError: a schedule does not fit the model, or all its Linears are frozen.
            NothingMatched: a glob matches no Linear.
            UnsupportedModel: it has adapters (trp and maestro).
        """
        trains = [name for name, module in model.named_modules() if isinstance(module, TensorTrainLinear)]
        if self.training.schedule == "heal":
            modules = [model.get_submodule(name) for name in trains]
            if not any(
                parameter.is_floating_point() for train in modules for core in train.cores for parameter in core.parameters()
            ):
                raise ConfigError("training.schedule heal needs a decomposed model whose cores are not quantized, got none")
            self.names = [n for n, m in zip(trains, modules, strict=True) if m.is_pivoted and not m.ties and _is_plain(m)]
            self._set_pivots_(model, False)
            factors = {id(p) for name in trains for p in model.get_submodule(name).parameters()}
            rest = [p for p in model.parameters() if p.requires_grad and id(p) not in factors]
            self.frozen = [] if self.training.trains_rest else rest
            for parameter in self.frozen:
                parameter.requires_grad_(False)
            return
        if trains:
            if self.training.schedule == "trp" or not all(model.get_submodule(name).is_ordered for name in trains):
                raise ConfigError(f"training.schedule {self.training.schedule} starts from a dense model, {trains[0]} is a train")
            if tied := [name for name in trains if model.get_submodule(name).ties]:
                raise ConfigError(
                    f"training.schedule {self.training.schedule} cuts every train alone, {tied[0]} shares its basis"
                )
            self.names = self._trained(model, select_names(trains, self.training.include, self.training.exclude))
            return
        refuse_adapters(model)
        roles = describe(model).roles
        self.names = self._trained(model, select_names(roles, self.training.include, self.training.exclude))
        refuse_cut(model, self.names)
        for name, (gram, _) in input_moments(model, self.names, self.batches).items():
            if (scale := gram.diagonal().mean()) > 0:  # in a metric of mean 1, so that the nuclear weight means the same
                self.rights[name] = whitening_factor(gram / scale, _DAMP)
        if self.training.schedule == "maestro":
            replace_modules(model, self.names, lambda _, module: _full_train(as_linear(module)))

    def _trained(self, model: nn.Module, names: list[str]) -> list[str]:
        """Those that are not frozen: what the user holds still is neither truncated nor factored."""
        found = [name for name in names if any(p.requires_grad for p in model.get_submodule(name).parameters() if p.dim() > 1)]
        if not found:
            raise ConfigError(
                f"training.schedule {self.training.schedule} needs Linears that are trained, all {len(names)} are frozen"
            )
        return found

    def begin_step(self, model: PreTrainedModel, step: int) -> None:
        """Maestro: one layer is cut to one share of its rank."""
        if self.training.schedule == "maestro":
            drawn = random.Random(f"{self.training.seed} {step}")
            layer = model.get_submodule(drawn.choice(self.names))
            layer.active_rank = max(1, round(drawn.choice(self.training.shares) * layer.ranks[0]))

    def before_update(self, model: PreTrainedModel, step: int) -> None:
        """Maestro: the gradient of the hierarchical group lasso."""
        if self.training.schedule == "maestro" and self.training.lasso_weight:
            with torch.enable_grad():
                sums = [
                    suffix_norms(factor.float()).sum()
                    for name in self.names
                    for factor in (model.get_submodule(name).core0.weight.T, model.get_submodule(name).core1.weight)
                ]
                (self.training.lasso_weight * torch.stack(sums).sum()).backward()

    @torch.no_grad()
    def step(self, model: PreTrainedModel, step: int, learning_rate: float) -> None:
        """Trp: every `interval` steps the matrices are truncated. Maestro: the layer that was cut is whole again."""
        if self.training.schedule == "maestro":
            for name in self.names:
                model.get_submodule(name).active_rank = None
        elif self.training.schedule == "trp" and step % self.training.interval == 0:
            shrink = learning_rate * self.training.nuclear_weight * self.training.interval
            for name in self.names:
                self._truncate_(name, as_linear(model.get_submodule(name)), model, shrink)

    @torch.no_grad()
    def restore_(self, model: PreTrainedModel) -> None:
        """Thaw and pivot again (heal); factor what has become low rank (trp); drop components that do nothing (maestro)."""
        for parameter in self.frozen:
            parameter.requires_grad_(True)
        self.frozen = []
        if self.training.schedule == "heal":
            self._set_pivots_(model, True)
        elif self.training.schedule == "trp":
            replace_modules(model, self.names, lambda name, module: self._factor(name, module))
        elif self.training.schedule == "maestro":
            self.step(model, 0, 0.0)
            for name in self.names:
                module = model.get_submodule(name)
                module.set_rank(_kept_rank(module, self.training.threshold))

    def modules(self, model: PreTrainedModel) -> dict[str, dict[str, Any]]:
        """All trains of the model; healing changes the table in its place."""
        if self.training.schedule == "heal":
            return {}
        trains = {name: module for name, module in model.named_modules() if isinstance(module, TensorTrainLinear)}
        return {name: {"layer": "tensor_train_linear", **train.spec()} for name, train in trains.items()}

    def _set_pivots_(self, model: PreTrainedModel, is_pivoted: bool) -> None:
        """Write the same products the other way, in the model and in its modules table.

        The rows of a pivoted product are outputs, and their combinations multiply every change of them; steps at which a
        balanced product learns make it worse.
        """

        def build(_: str, train: nn.Module) -> TensorTrainLinear:
            weight = train.core1.weight
            sizes = ([train.out_features, 1], [1, train.in_features], train.ranks)
            new = TensorTrainLinear(*sizes, is_pivoted=is_pivoted, device=weight.device, dtype=weight.dtype)
            new.register_parameter("bias", train.bias)
            new.mode = train.mode
            factors = train.factors()
            new.load_factors_(*(factors if is_pivoted else balance(*factors))).train(train.training)
            for core, old in zip(new.cores, train.cores, strict=True):
                core.weight.requires_grad_(old.weight.requires_grad)
            return new

        replace_modules(model, self.names, build)
        config = getattr(model.config, "quantization_config", None)
        if config is not None:
            prefix = f"{model.base_model_prefix}."
            for name in self.names:
                # a bare encoder lacks the prefix of its model, adapters of PEFT put one of their own before it
                ends = (name, prefix + name, *(k for k in config.modules if name.endswith(f".{k}")))
                key = next(k for k in ends if k in config.modules)
                config.modules[key] = {"layer": "tensor_train_linear", **model.get_submodule(name).spec()}

    def _right(self, name: str, linear: nn.Linear) -> Tensor | None:
        """The metric of the inputs, where the weight is."""
        return self.rights[name].to(linear.weight.device) if name in self.rights else None

    def _truncate_(self, name: str, linear: nn.Linear, model: PreTrainedModel, shrink: float) -> None:
        matrix, _ = truncate_energy(linear.weight, self.training.energy, shrink, self._right(name, linear))
        distributed.broadcast_([matrix], 0)
        own = model.get_submodule(name)
        own.weight.copy_(matrix if own is linear else matrix.T)

    def _factor(self, name: str, module: nn.Module) -> nn.Module:
        """A pivoted product of the rank that holds the energy, or the module where that saves nothing."""
        linear = as_linear(module)
        right = self._right(name, linear)
        _, rank = truncate_energy(linear.weight, self.training.energy, 0.0, right)
        if rank >= min(linear.weight.shape):
            return module
        train = TensorTrainLinear.empty_like(
            linear, out_factors=[linear.out_features, 1], in_factors=[1, linear.in_features], ranks=[rank], is_pivoted=True
        )
        return train.load_factors_(*spectrum(linear.weight, right).truncate(rank))


def _is_plain(train: TensorTrainLinear) -> bool:
    """Whether no core is quantized or carries an adapter."""
    return all(type(core) is nn.Linear for core in train.cores)


def _full_train(linear: nn.Linear) -> TensorTrainLinear:
    """A plain product of full rank, the singular values shared evenly between both factors."""
    train = TensorTrainLinear.empty_like(
        linear, out_factors=[linear.out_features, 1], in_factors=[1, linear.in_features], ranks=[min(linear.weight.shape)]
    )
    return train.load_factors_(*spectrum(linear.weight.detach()).truncate(min(linear.weight.shape)))


def _kept_rank(module: TensorTrainLinear, threshold: float) -> int:
    importance = suffix_norms(module.core0.weight.T.float()) * suffix_norms(module.core1.weight.float())
    return max(1, int((importance > threshold * importance[0]).sum()))
