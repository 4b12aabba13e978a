"""The adapter behind one sub-layer, and the PEFT layer that puts adapters behind a module.

Parameters lie flat in each adapter, because PEFT takes the adapter's name out of keys only where it stands last but one.
"""

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from ...errors import ConfigError
from .config import CompacterConfig
from .functional import (
    bundle,
    draw_frequencies,
    init_glorot_,
    kernel_features,
    low_rank_linear,
    phm_linear,
    phm_weight,
    round_bottleneck,
)


class CompacterAdapter(nn.Module):
    """`h + U(phi(D(h)))` with maps D and U of few parameters; float32, computed in the dtype of `h`.

    Args:
        width: features of the hidden state.
        config: kind and sizes of the maps.
        slow: holder of the slow matrices that the model shares, and this adapter's name in it. It belongs to the tuner:
            here it is only referred to, so that it is one parameter and is stored once.
        device: of the parameters.

    Raises:
        ConfigError: `hypercomplex_division` does not divide the width.
    """

    def __init__(
        self, width: int, config: CompacterConfig, slow: tuple[nn.ParameterDict, str] | None = None,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        """Allocate and initialise."""
        super().__init__()
        self.kind, self.rank, self.feature, self._shared = config.kind, config.rank, config.feature, slow
        self.activation = ACT2FN[config.activation]
        self._dense: tuple[Tensor, Tensor] | None = None
        division = {"phm": config.hypercomplex_division, "low_rank": 1, "snnk": 2 if config.feature == "sincos" else 1}[self.kind]
        if width % division and self.kind == "phm":
            raise ConfigError(f"compacter.hypercomplex_division must divide the width {width}, got {division}")
        self.bottleneck = round_bottleneck(width, config.reduction_factor, division)

        def parameter(name: str, *shape: int) -> None:
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, device=device)))

        if self.kind == "snnk":
            parameter("up", width, self.bottleneck)
            parameter("up_bias", width)
            frequencies = draw_frequencies(self.bottleneck // division, width, config.seed)
            self.register_buffer("frequencies", frequencies.to(device), persistent=False)
            return
        for name, rows, columns in (("down", width, self.bottleneck), ("up", self.bottleneck, width)):
            lead = (division,) if self.kind == "phm" else ()
            rows_each, columns_each = rows // division, columns // division
            if self.rank is None:
                parameter(f"{name}_s", *lead, rows_each, columns_each)
                init_glorot_(getattr(self, f"{name}_s"))
                self.register_parameter(f"{name}_t", None)
            else:
                parameter(f"{name}_s", *lead, rows_each, self.rank)
                parameter(f"{name}_t", *lead, columns_each, self.rank)
                init_glorot_(getattr(self, f"{name}_s"))
                if self.kind == "phm" or name == "down":  # without slow matrices the last factor is 0 at the start
                    init_glorot_(getattr(self, f"{name}_t"))
            parameter(f"{name}_bias", columns)
            if self.kind == "phm" and slow is None:
                self.register_parameter(f"{name}_slow", new_slow(config, device))

    def slow(self, name: str) -> Tensor:
        """The slow matrices of the map `name`, `[n, n, n]`."""
        return getattr(self, f"{name}_slow") if self._shared is None else self._shared[0][self._shared[1]]

    def weight(self, name: str) -> Tensor:
        """The map `down` or `up` as a dense matrix `[out, in]`, for tests and for the cache."""
        if self.kind == "snnk":
            return self.frequencies if name == "down" else self.up
        s, t = getattr(self, f"{name}_s"), getattr(self, f"{name}_t")
        return t @ s.T if self.kind == "low_rank" else phm_weight(self.slow(name), s, t).T

    def forward(self, h: Tensor) -> Tensor:
        """Map `[..., width]` to the same shape and dtype."""
        if self.kind == "snnk":
            return h + F.linear(self.features(h), self.up.to(h.dtype), self.up_bias.to(h.dtype)).to(h.dtype)
        return h + self._map(self.activation(self._map(h, "down")), "up").to(h.dtype)

    def _map(self, x: Tensor, name: str) -> Tensor:
        s, t, bias = (getattr(self, f"{name}_{part}") for part in ("s", "t", "bias"))
        bias = bias.to(x.dtype)
        if self._dense is not None and not torch.is_grad_enabled():
            return F.linear(x, self._dense[name == "up"].to(x.device, x.dtype), bias)
        s, t = s.to(x.dtype), t if t is None else t.to(x.dtype)
        if self.kind == "low_rank":
            return low_rank_linear(x, s, t, bias)
        return phm_linear(x, self.slow(name).to(x.device, x.dtype), s, t, bias)

    def features(self, h: Tensor) -> Tensor:
        """SNNK only: the fixed features `[..., bottleneck]` of hidden states `[..., width]`."""
        return kernel_features(h, self.frequencies.to(h.dtype), self.feature)

    @torch.no_grad()
    def bundle_(self, h: Tensor, target: Tensor, ridge: float = 1e-3) -> None:
        """SNNK only: fit the map up in closed form, so that the adapter takes `h` to `target`, both `[T, width]`.

        Raises:
            ConfigError: another kind of adapter.

        >>> adapter = CompacterAdapter(8, CompacterConfig(kind="snnk", reduction_factor=1))
        >>> h = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> adapter.bundle_(h, 2 * h)
        >>> bool((adapter(h) - 2 * h).norm() < 0.7 * h.norm())
        True
        """
        if self.kind != "snnk":
            raise ConfigError(f"compacter.kind must be snnk for a closed-form fit, got {self.kind}")
        phi = self.features(h.float())
        ones = torch.ones_like(phi[:, :1])
        solution = bundle(torch.cat([phi, ones], dim=1), target.float() - h.float(), ridge)
        self.up.copy_(solution[:, :-1])
        self.up_bias.copy_(solution[:, -1])

    @torch.no_grad()
    def merge_cache_(self, dtype: torch.dtype) -> None:
        """Keep the dense maps for forward passes without gradients, until `train()` is called or other weights are loaded."""
        if self.kind != "snnk":
            self._dense = (self.weight("down").to(dtype).contiguous(), self.weight("up").to(dtype).contiguous())

    def train(self, mode: bool = True) -> "CompacterAdapter":
        """Switch the mode; what was cached is dropped."""
        self._dense = None
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any) -> None:
        """Take other weights; what was cached of the old ones is dropped."""
        self._dense = None
        super()._load_from_state_dict(*args)

    def extra_repr(self) -> str:
        """Kind and sizes, for `print(model)`."""
        return f"kind={self.kind}, bottleneck={self.bottleneck}, rank={self.rank}"


def new_slow(config: CompacterConfig, device: torch.device | str | None) -> nn.Parameter:
    """Fresh slow matrices `[n, n, n]`, normal with the spread of the config."""
    n = config.hypercomplex_division
    return nn.Parameter(config.slow_std * torch.randn(n, n, n, device=device))


class CompacterLayer(nn.Module, BaseTunerLayer):
    """Any module that ends a sub-layer, followed by the active adapters in their order."""

    adapter_layer_names = ("compacter_adapter",)

    def __init__(self, base_layer: nn.Module) -> None:
        """Wrap a module without adapters."""
        super().__init__()
        self.base_layer = base_layer
        self.compacter_adapter = nn.ModuleDict()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The module's output `[..., width]`, adapted."""
        h = self.base_layer(x, *args, **kwargs)
        if not self.disable_adapters:
            for name in self.active_adapters:
                if name in self.compacter_adapter:
                    h = self.compacter_adapter[name](h)
        return h

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """To the device only: the adapter keeps float32, which a cast to the base's dtype would lose."""
        if adapter_name in self.compacter_adapter:
            self.compacter_adapter[adapter_name].to(device or device_of(self.base_layer))


def device_of(module: nn.Module) -> torch.device:
    """Where a module lies; compressed ones have buffers only."""
    return next((tensor.device for tensors in (module.parameters(), module.buffers()) for tensor in tensors), torch.device("cpu"))


def width_of(module: nn.Module) -> int | None:
    """Features of a module's output, None where it is no linear map; GPT-2's Conv1D calls them `nf`."""
    width = getattr(module, "out_features", getattr(module, "nf", None))
    return width if isinstance(width, int) else None
