"""A low-bit Linear in its two states: `LatentLinear` in training, `TernaryLinear` packed.

The latent state keeps the dense module's own `Parameter` objects under their own names, so an optimizer may hold them
already and a checkpoint in the middle of training is an ordinary dense one.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ...errors import UnsupportedModel
from ...stored import ScaledModule, StoredEmbedding, StoredLinear
from .config import TernaryConfig
from .functional import (
    GRIDS,
    fake_quantize,
    learned_quantize,
    pack_levels,
    packed_bytes,
    quantize,
    quantize_activations,
    round_levels,
    search_step,
    straight_through,
    unpack_levels,
)

NORM_EPSILON = 1e-6


class TernaryModule(ScaledModule):
    """State that the packed Linear and Embedding share.

    Buffers: `weight [out, 1, bytes]` uint8, rows of packed levels; `scale [1]` or `[out]` float32, what levels are
    multiplied by. Parameter, where there is one: `sub_norm [in]`, the gain of an RMS norm on the inputs.
    """

    trained_scales = ("scale",)

    def __init__(  # noqa: PLR0913 - settings, by keyword
        self, out_features: int, in_features: int, *, bits: float, packing: str, granularity: str,
        activation_bits: int | None, is_sub_norm: bool = False, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        """Allocate zeroed buffers for a matrix `[out_features, in_features]`.

        Raises:
            ValueError: a setting is none of those of `TernaryConfig`.
        """
        super().__init__()
        known = {"bits": (bits, GRIDS), "packing": (packing, ("base3", "bits")), "granularity": (granularity, ("tensor", "row"))}
        for name, (value, allowed) in known.items():
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
        self.out_features, self.in_features = out_features, in_features
        self.bits, self.packing, self.granularity = bits, packing, granularity
        self.activation_bits, self.is_sub_norm = activation_bits, is_sub_norm
        rows = 1 if granularity == "tensor" else out_features
        shape = (out_features, 1, packed_bytes(in_features, bits, packing))
        self.register_buffer("weight", torch.zeros(shape, dtype=torch.uint8, device=device))
        self.register_buffer("scale", torch.zeros(rows, dtype=torch.float32, device=device))
        norm = nn.Parameter(torch.ones(in_features, device=device, dtype=dtype)) if is_sub_norm else None
        self.register_parameter("sub_norm", norm)

    def spec(self) -> dict[str, Any]:
        """The settings that rebuild the empty module, as stored in the modules table."""
        bits = self.bits if self.bits % 1 else int(self.bits)
        norm = {"is_sub_norm": True} if self.is_sub_norm else {}
        return {"bits": bits, "packing": self.packing, "granularity": self.granularity,
                "activation_bits": self.activation_bits, **norm}  # fmt: skip

    @torch.no_grad()
    def load_levels_(self, levels: Tensor, factor: Tensor, rows: slice = slice(None)) -> Self:
        """Take over levels and their factor, or those of the given `rows` into their part of the buffers."""
        self.weight[rows].copy_(pack_levels(levels, self.bits, self.packing)[:, None])
        self.scale[rows if self.granularity == "row" else slice(None)].copy_(factor.flatten())
        return self

    def levels(self, rows: Tensor | None = None) -> Tensor:
        """Levels `[out, in]` float32, or only those of the given `rows`."""
        packed = self.weight if rows is None else self.weight[rows]
        return unpack_levels(packed[:, 0], self.bits, self.packing, self.in_features)

    def to_dense(self, dtype: torch.dtype = torch.float32, rows: Tensor | None = None) -> Tensor:
        """The matrix `[out, in]`, or only the given `rows`; multiplied in float32, as in training."""
        scale = self.scale if rows is None or self.granularity == "tensor" else self.scale[rows]
        return self.levels(rows).mul_(scale[:, None].float()).to(dtype)


class TernaryLinear(TernaryModule, StoredLinear):
    """`y = q(norm(x)) W^T + b`, `W` packed, `q` the rounding of inputs to int8 where it is on.

    >>> layer = TernaryLinear.empty_like(nn.Linear(8, 4), bits=1.58, packing="base3", granularity="row", activation_bits=8)
    >>> layer.weight.shape, layer.to_dense().shape
    (torch.Size([4, 1, 2]), torch.Size([4, 8]))
    """

    @classmethod
    def empty_like(cls, linear: nn.Linear, **settings: Any) -> Self:
        """An empty module of the Linear's shape on its device (also meta); takes over the bias."""
        new = cls(*linear.weight.shape, device=linear.weight.device, dtype=linear.weight.dtype, **settings)
        new.register_parameter("bias", linear.bias)
        return new

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` to `[..., out]` in the dtype of `x`, or autocast's."""
        return super().forward(self._prepared(x))

    def scaled_forward(self, x: Tensor) -> Tensor:
        """As `forward`, with the scale on the outputs."""
        y = F.linear(self._prepared(x), self.levels().to(x.dtype)) * self.scale.to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def dense_module(self, dtype: torch.dtype) -> nn.Linear:
        """An ordinary Linear with the same weights; it does not round its inputs.

        Raises:
            UnsupportedModel: it has a norm, which a Linear has not.
        """
        if self.is_sub_norm:
            raise UnsupportedModel("a layer with a norm of its own (is_sub_norm) cannot be written as a plain Linear")
        return super().dense_module(dtype)

    def _prepared(self, x: Tensor) -> Tensor:
        if self.sub_norm is not None:
            x = F.rms_norm(x.float(), (self.in_features,), self.sub_norm.float(), NORM_EPSILON).to(x.dtype)
        is_rounded = self.activation_bits is not None and x.is_floating_point()
        return quantize_activations(x, self.activation_bits) if is_rounded else x


class TernaryEmbedding(TernaryModule, StoredEmbedding):
    """Row lookup in a packed table; only the rows that are asked for are unpacked.

    Its scales are not trained: a tied head has them too.
    """

    trained_scales = ()

    @classmethod
    def empty_like(cls, embedding: nn.Embedding, **settings: Any) -> Self:
        """An empty module of the Embedding's shape on its device (also meta)."""
        new = cls(*embedding.weight.shape, device=embedding.weight.device, **settings)
        new.factor, new.dtype = getattr(embedding, "scalar_embed_scale", 1.0), embedding.weight.dtype
        return new

    def scaled_forward(self, x: Tensor) -> Tensor:
        """As `forward`: a lookup has no product to save."""
        return super().forward(x)


class LatentLinear(nn.Module):
    """The training state: dense weights, rounded on the fly, with straight-through gradients.

    `strength` runs from 0 (the dense layer, to the bit) to 1 (what `pack` gives). It is a tensor, so that a compiled graph
    holds for all of its values, and no part of the state: it follows from the step.

    Args:
        module: a Linear or Conv1D, whose parameters are taken over.
        config: how to round.
        is_sub_norm: put an RMS norm before it, of strength 0 at first as well.

    >>> linear = nn.Linear(8, 4)
    >>> latent = LatentLinear(linear, TernaryConfig(scale="absmedian"))
    >>> latent.weight is linear.weight, latent.pack().spec()["bits"]
    (True, 1.58)
    """

    strength: Tensor

    def __init__(self, module: nn.Linear | Conv1D, config: TernaryConfig, is_sub_norm: bool = False) -> None:
        """Take over the parameters."""
        super().__init__()
        self.config, self.is_transposed = config, isinstance(module, Conv1D)
        self.weight = module.weight
        self.register_parameter("bias", module.bias)
        self.out_features, self.in_features = self.matrix.shape
        kind: dict[str, Any] = {"device": self.weight.device, "dtype": torch.float32}
        self.register_parameter("sub_norm", nn.Parameter(torch.ones(self.in_features, **kind)) if is_sub_norm else None)
        step = search_step(self.matrix.detach(), config.bits, config.granularity) if config.scale == "lsq" else None
        self.register_parameter("step", None if step is None else nn.Parameter(step))
        self.register_buffer("strength", torch.zeros((), **kind), persistent=False)

    @property
    def matrix(self) -> Tensor:
        """The latent weights `[out, in]`."""
        return self.weight.T if self.is_transposed else self.weight

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` to `[..., out]`."""
        config, strength = self.config, self.strength.float()
        if self.sub_norm is not None:
            normed = F.rms_norm(x.float(), (self.in_features,), self.sub_norm.float(), NORM_EPSILON)
            x = torch.lerp(x.float(), normed, strength).to(x.dtype)
        if config.activation_bits is not None:
            with torch.no_grad():
                rounded = quantize_activations(x, config.activation_bits)
            x = straight_through(x, rounded, strength.to(x.dtype))
        return F.linear(x, self.quantized().to(self.weight.dtype), self.bias)

    def quantized(self) -> Tensor:
        """The weights `[out, in]` float32 at the present strength."""
        config = self.config
        if self.step is not None:
            return learned_quantize(self.matrix, self.step, self.strength, config.bits)
        return fake_quantize(
            self.matrix, self.strength, scale=config.scale, bits=config.bits, granularity=config.granularity,
            dequantization=config.dequantization,
        )  # fmt: skip

    @torch.no_grad()
    def pack(self) -> TernaryLinear:
        """The packed state, which computes what this one does at strength 1."""
        config, matrix = self.config, self.matrix.detach()
        if self.step is not None:
            factor = self.step.float().abs().clamp_min(1e-5)
            levels = round_levels(matrix.float(), factor, config.bits)
        else:
            levels, factor = quantize(
                matrix, scale=config.scale, bits=config.bits, granularity=config.granularity,
                dequantization=config.dequantization,
            )  # fmt: skip
        packed = TernaryLinear(
            self.out_features, self.in_features, bits=config.bits, packing=config.packing, granularity=config.granularity,
            activation_bits=config.activation_bits, is_sub_norm=self.sub_norm is not None, device=matrix.device,
            dtype=matrix.dtype,
        )  # fmt: skip
        packed.register_parameter("bias", self.bias)
        if self.sub_norm is not None:
            packed.sub_norm.copy_(self.sub_norm)
        return packed.load_levels_(levels, factor)

    def extra_repr(self) -> str:
        """Shape and settings, for `print(model)`."""
        return f"{self.in_features}, {self.out_features}, bits={self.config.bits}, scale={self.config.scale}"
