"""Masks in a training run: gradual magnitude pruning, or N of M weights.

Without a pattern weights are zero from the mask on that takes them, which is applied again after every step of the optimizer;
the masks are in buffers of the model, so a checkpoint holds them. With a pattern all weights are trained and the product takes
the largest of every M; its masks follow from the weights.

Sources: Zhu and Gupta (arXiv 1710.01878); SR-STE (arXiv 2102.04010); BDWP (arXiv 2309.13015). Beside HESSO and quantization
the order of the callbacks is HESSO, masks, quantization; those that swap Linears do not go with HESSO, a pattern among them.
"""

import hashlib
import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments
from transformers.pytorch_utils import Conv1D

from ...arch import as_linear, dense_shape, describe
from ...errors import ConfigError
from ...functional.packing import pack_bits, unpack_bits
from ...select import replace_modules, select_names
from ...training import CompactCallback, check_same_on_all_ranks, refuse_adapters, table_of
from .apply import METHOD, check_pattern
from .config import MaskTraining, SparsityConfig
from .functional import lowest_mask, scheduled_sparsity
from .layer import MaskedLinear, SparseLinear

logger = logging.getLogger(__name__)

_BUFFER = "mask_bits"
#: Steps between two masks, and how many there are in short runs, where the settings say nothing.
INTERVAL, NUM_MASKS = 50, 10


class MaskCallback(CompactCallback):
    """Trains with masks in a stock Trainer, and leaves a packed or an ordinary model.

    Args:
        config: how many weights go, and of which Linears; by default half of those in all blocks.
        training: the schedule.
        settings: fields of `MaskTraining`, in the place of those of `training`.

    Raises:
        ConfigError: a setting that needs a pattern is given without one.

    >>> MaskCallback(SparsityConfig(pattern="2:4"), backward="own").training.backward
    'own'
    """

    def __init__(
        self, config: SparsityConfig | None = None, training: MaskTraining | None = None, **settings: Any
    ) -> None:  # fmt: skip
        """Keep the settings."""
        super().__init__()
        self.config, self.training = config or SparsityConfig(), replace(training or MaskTraining(), **settings)
        if self.config.n_m is None and (self.training.backward == "own" or self.training.decay):
            raise ConfigError(
                "training.backward own and decay need sparsity.pattern, which is null: weights that are masked stay zero"
            )
        self.num_steps = self.training.num_steps
        self.dense: dict[str, nn.Linear | Conv1D] = {}
        self.masks: dict[str, Tensor] = {}
        self.table: dict[str, Any] = {}

    def swap_(self, model: PreTrainedModel) -> None:
        """Find the Linears; with a pattern they become masked ones, without they get a buffer for their mask.

        Raises:
            NothingMatched: a glob matches no Linear.
            UnsupportedModel: the pattern does not fit a Linear, or the model has adapters.
        """
        refuse_adapters(model)
        roles = describe(model).roles
        names = select_names(roles, self.config.include, self.config.exclude)
        self.dense = {name: model.get_submodule(name) for name in names}
        has_own = self.training.backward == "own"
        for name, module in self.dense.items():
            check_pattern(name, dense_shape(module), self.config, has_own)
        if self.config.n_m is not None:
            n, m = self.config.n_m
            replace_modules(model, names, lambda _, module: MaskedLinear(module, n, m, has_own))
            return
        for module in self.dense.values():
            ones = torch.ones(dense_shape(module), dtype=torch.uint8, device=module.weight.device)
            module.register_buffer(_BUFFER, pack_bits(ones, 1))

    @property
    def update_steps(self) -> tuple[int, int]:
        """The first step, from 1, after which there is a mask, and one that no update comes after."""
        first = max(1, self._share(self.training.start_share))
        return first, max(first, self._share(self.training.end_share))

    def begin_step(self, model: PreTrainedModel, step: int) -> None:
        """With a pattern: the masks of the step."""
        if self.config.n_m is not None and step >= self._share(self.training.start_share):
            for name in self.dense:
                model.get_submodule(name).remask_()

    def before_update(self, model: PreTrainedModel, step: int) -> None:
        """With a pattern: masked weights decay."""
        if self.config.n_m is None or not self.training.decay:
            return
        for name in self.dense:
            module = model.get_submodule(name)
            if module.masks is not None and module.weight.grad is not None:
                pull = self.training.decay * module.matrix.detach() * ~module.masks[0]
                module.weight.grad.add_((pull.T if module.is_transposed else pull).to(module.weight.grad))

    @torch.no_grad()
    def step(self, model: PreTrainedModel, step: int, learning_rate: float) -> None:
        """Without a pattern: make a new mask where one is due, and apply the mask."""
        if self.config.n_m is not None:
            return
        first, last = self.update_steps
        interval = self.training.interval or min(INTERVAL, max(1, (last - first) // NUM_MASKS))
        is_due = first <= step <= last and (step - first) % interval == 0
        if is_due:
            share = scheduled_sparsity(step, first, last, interval, self.config.sparsity)
            for name, module in self.dense.items():
                mask = lowest_mask(module.weight.abs().flatten()[None], share).view(module.weight.shape)
                self.masks[name] = mask
                module.get_buffer(_BUFFER).copy_(pack_bits(_matrix(module, mask).to(torch.uint8), 1))
            check_same_on_all_ranks(_digest(self.dense[name].get_buffer(_BUFFER)) for name in self.dense)
        for name, module in self.dense.items():
            if step >= first:
                module.weight.masked_fill_(~self._mask(name), 0)

    @torch.no_grad()
    def restore_(self, model: PreTrainedModel) -> None:
        """Put the dense modules back with zeros in them, or what is left of them.

        Without a pattern what is zero is masked: HESSO may have cut rows, and the best checkpoint have come back, since the last mask.
        """
        for name, module in self.dense.items():
            if self.config.n_m is None:
                del module._buffers[_BUFFER]
                self.masks[name] = module.weight != 0
            else:
                masked = model.get_submodule(name)
                masked.remask_()
                self.masks[name] = _matrix(module, masked.masks[0])
                module.weight.masked_fill_(~self.masks[name], 0)
        if self.config.n_m is None:
            self._check_sparsity()
        is_dense = self.training.storage == "dense"
        cut = table_of(model).get("modules", {})
        stuck = [name for name in self.dense if name in cut]
        if stuck and not is_dense:
            logger.warning(
                "%d Linears stay dense with zeros, as the config cannot say their width; one is %s", len(stuck), stuck[0]
            )
        new = {name: m if is_dense or name in cut else self._packed(name) for name, m in self.dense.items()}
        replace_modules(model, list(self.dense), lambda name, _: new[name])
        if not is_dense:
            self.table = {name: METHOD.table_entry(module) for name, module in new.items() if name not in cut}
        self.masks = {}

    def modules(self, model: PreTrainedModel) -> dict[str, dict[str, Any]]:
        """Empty while training: the checkpoints are dense ones."""
        return self.table

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check the optimizer, take over the number of steps, and the masks of a checkpoint."""
        self.num_steps = state.max_steps
        if args.fp16 and not args.max_grad_norm and self.config.n_m is not None and self.training.decay:
            raise ConfigError(
                "max_grad_norm must be above 0 with fp16 and training.decay, which is added to gradients that only clipping unscales"
            )
        self.masks = {}
        super().on_train_begin(args, state, control, **kwargs)

    def _share(self, share: float) -> int:
        """Steps that a share of the training takes.

        Raises:
            ConfigError: their number is not known.
        """
        if self.num_steps is None:
            raise ConfigError("training.num_steps must be given in a loop of your own")
        return round(share * self.num_steps)

    def _check_sparsity(self) -> None:
        due = sum(int(self.config.sparsity * mask.numel() + 1e-9) for mask in self.masks.values())
        found = sum(int((~mask).sum()) for mask in self.masks.values())
        if found < due:
            logger.warning(
                "the model has %d zeros of %d that sparsity %s asks for: training ended early, an earlier checkpoint came back, or "
                "zeros were cut out with whole groups, which count among those of a mask until they go",
                found, due, self.config.sparsity,
            )  # fmt: skip

    def _mask(self, name: str) -> Tensor:
        """In the layout of the weight."""
        if name not in self.masks:
            module = self.dense[name]
            bits = unpack_bits(module.get_buffer(_BUFFER), 1, dense_shape(module)[1])
            self.masks[name] = _matrix(module, bits.bool())
        return self.masks[name]

    def _packed(self, name: str) -> SparseLinear:
        return SparseLinear.pack(as_linear(self.dense[name]), _matrix(self.dense[name], self.masks[name]))


def _matrix(module: nn.Linear | Conv1D, mask: Tensor) -> Tensor:
    """Between `[out, in]` and the layout of a module's weight."""
    return mask.T.contiguous() if isinstance(module, Conv1D) else mask


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.cpu().numpy().tobytes()).hexdigest()
