"""The transformers plugin: `quant_method: "hf_compact"` in `config.json`.

Loading walks the modules table and nothing else: it builds empty modules on meta and lets transformers read their
tensors. The files are checked against the table first, because transformers itself only warns about missing tensors
and then fills them with random numbers.
"""

import logging
import re
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..arch import as_linear, describe
from ..capture import Method, compress_outside_
from ..checkpoint import DTYPES, FORMAT_VERSION, QUANT_METHOD, TensorSource, rebuild_, share_buffers_, tie_parts_
from ..config import MethodConfig, Recipe, without_places
from ..errors import ConfigError, FormatError, UnsupportedModel
from ..methods import LAYERS, METHODS
from ..select import select_stages
from ..stored import CodedModule, StoredModule, SwitchableModule, tied_parts
from .hub import push_model

logger = logging.getLogger(__name__)


@register_quantization_config(QUANT_METHOD)
class CompactConfig(QuantizationConfigMixin):
    """What `config.quantization_config` holds.

    Args:
        modules: module name -> `{"layer": class, **settings}`; the table that rebuilds a compressed model.
        format_version: version of that table.
        stages: the recipe's stages. Without a table they are applied while a dense checkpoint loads, which works for
            stages that need no calibration.

    Raises:
        FormatError: an unknown format version or key.
        ConfigError: stages that are not valid.

    >>> config = CompactConfig(stages=[{"method": "codebook", "bits": 4, "rounding": "nearest"}])
    >>> config.stages[0]["group_size"]
    32
    """

    def __init__(
        self, modules: Mapping[str, Any] | None = None, format_version: int = FORMAT_VERSION,
        stages: Sequence[Mapping[str, Any] | MethodConfig] = (), quant_method: str = QUANT_METHOD, **unknown: Any,
    ) -> None:  # fmt: skip
        """Check the version and write every default of the stages out."""
        if format_version != FORMAT_VERSION:
            raise FormatError(
                f"quantization_config.format_version must be {FORMAT_VERSION}, got {format_version!r}: "
                "the folder was written by another version of hf_compact"
            )
        if unknown:
            raise FormatError(f"quantization_config has the unknown key {sorted(unknown)[0]!r}")
        self.quant_method = quant_method
        self.format_version = format_version
        modules = modules or {}
        if not isinstance(modules, Mapping) or not all(isinstance(spec, Mapping) for spec in modules.values()):
            raise FormatError(f"quantization_config.modules must map module names to their settings, got {str(modules)[:80]}")
        self.modules = {name: dict(spec) for name, spec in modules.items()}
        plain = [stage.to_dict() if isinstance(stage, MethodConfig) else dict(stage) for stage in stages]
        self.stages = without_places(Recipe.from_dict({"stages": plain}).to_dict())["stages"] if plain else []
        if not self.modules and not self.stages:
            raise ConfigError("quantization_config needs modules (a compressed model) or stages (to compress while loading)")

    def to_dict(self) -> dict[str, Any]:
        """What is written to `config.json`."""
        return {
            "quant_method": self.quant_method,
            "format_version": self.format_version,
            "stages": self.stages,
            "modules": self.modules,
        }


@register_quantizer(QUANT_METHOD)
class CompactQuantizer(HfQuantizer):
    """Builds compressed modules before transformers reads their tensors."""

    quantization_config: CompactConfig
    requires_calibration = False

    def __init__(self, quantization_config: CompactConfig, **kwargs: Any) -> None:
        """Keep the config; what has to be quantized while loading is found when the skeleton is there."""
        super().__init__(quantization_config, **kwargs)
        self.pending: dict[str, _Pending] = {}

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        if self.pre_quantized or self.quantization_config.modules:
            expect_(model, self.quantization_config.modules, [Path(path) for path in checkpoint_files or ()])
        else:
            self._prepare_quantization(model)

    def _prepare_quantization(self, model: PreTrainedModel) -> None:
        """Put empty compressed modules into a skeleton and remember which dense weights fill them."""
        arch = describe(model)
        stages = [
            (METHODS[stage.method], stage) for stage in Recipe.from_dict({"stages": self.quantization_config.stages}).stages
        ]
        for _, stage in stages:
            if stage.needs_calibration or stage.leaves_linears:
                raise ConfigError(
                    f"{stage.method} with these settings needs calibration, which loading has not: "
                    "use a stage that needs none (codebook with rounding nearest), or hf-compact compress"
                )
        made, table = compress_outside_(model, arch, stages, LAYERS, solve=False)
        self.pending |= {f"{name}.weight": _Pending(part.method, part.config, part.old, True) for name, part in made.items()}
        for (method, stage), names in zip(stages, select_stages(arch.roles, [stage for _, stage in stages]), strict=True):
            for name in (name for name in arch.roles if name in names):
                old = model.get_submodule(name)
                new = method.compress_linear(as_linear(old), None, stage, solve=False)
                table[name] = method.table_entry(new)
                model.set_submodule(name, new)
                self.pending[f"{name}.weight"] = _Pending(method, stage, old, False)
        self.quantization_config.modules = table
        set_ties_(model, table)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether a dense weight from the checkpoint has to be quantized on its way in."""
        return param_name in self.pending

    def get_quantize_ops(self) -> ConversionOps:
        """The operation that does it."""
        return _QuantizeOnLoad(self)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for name, pending in self.pending.items():
            if not pending.is_solved:  # transformers warns and goes on with random numbers
                raise FormatError(f"{name} is missing from the files of the model")
        self.pending.clear()
        specs = names_in(model, self.quantization_config.modules)
        for name, spec in specs.items():
            module = model.get_submodule(name)
            if "tied_to" not in spec and isinstance(module, CodedModule):
                try:
                    module.decode_()
                except FormatError as error:
                    raise FormatError(f"{name}: {error}") from error
        for name, spec in specs.items():
            if "tied_to" in spec:
                share_buffers_(model.get_submodule(name), model.get_submodule(spec["tied_to"]))
        _offer_switches_(model)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        dtype = dtype or model.dtype
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # what save_pretrained leaves in the config
        with torch.device("meta"):
            skeleton = type(model)(model.config)
        table = names_in(model, self.quantization_config.modules)
        for name in outermost(table):
            module = model.get_submodule(name)
            if not hasattr(module, "dense_module"):
                raise UnsupportedModel(
                    f"{name} has lost rows or columns for good: a model of other widths per layer has no dense form"
                )
            dense = module.dense_module(dtype)
            original = skeleton.get_submodule(name)
            if isinstance(original, Conv1D):
                original.weight, original.bias = nn.Parameter(dense.weight.T.contiguous(), requires_grad=False), dense.bias
                dense = original
            elif isinstance(original, nn.Embedding):
                original.weight = dense.weight
                dense = original
                if hasattr(original, "embed_scale"):
                    original.embed_scale = torch.tensor(original.scalar_embed_scale)
            model.set_submodule(name, dense)
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
        model.tie_weights()
        for name in ("set_bits", "set_rank", "push_to_hub"):
            model.__dict__.pop(name, None)
        return model

    def attach_(self, model: PreTrainedModel) -> None:
        """Make a model that holds the compressed modules already what a loaded one is."""
        model.config.quantization_config = self.quantization_config
        model.hf_quantizer = self
        model.quantization_method = QUANT_METHOD
        model.is_quantized = True
        set_ties_(model, self.quantization_config.modules)
        _offer_switches_(model)

    def is_serializable(self) -> bool:
        """Saving is plain `save_pretrained`."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients pass through, so adapters can be trained on top."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether a Trainer may train the model itself: nothing in it is packed."""
        return not any(issubclass(LAYERS[spec["layer"]], StoredModule) for spec in self.quantization_config.modules.values())


class _Pending:
    """How one dense weight becomes a compressed module."""

    def __init__(self, method: Method, config: MethodConfig, old: nn.Module, is_outer: bool) -> None:
        self.method, self.config, self.old, self.is_outer, self.is_solved = method, config, old, is_outer, False

    def solve(self, weight: Tensor) -> nn.Module:
        self.is_solved = True
        self.old.weight = nn.Parameter(weight, requires_grad=False)
        if self.is_outer:
            return self.method.compress_embedding(self.old, self.config)
        linear = as_linear(self.old)
        linear.bias = None  # loaded on its own
        return self.method.compress_linear(linear, None, self.config)


class _QuantizeOnLoad(ConversionOps):
    """One dense weight in, the tensors of its compressed module out."""

    def __init__(self, quantizer: CompactQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        """Quantize every weight of `input_dict`."""
        result: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            owner = name.rpartition(".")[0]
            module = self.quantizer.pending[name].solve(weight)
            result |= {f"{owner}.{leaf}": buffer for leaf, buffer in module.named_buffers()}
        return result


def attach_(model: PreTrainedModel, modules: Mapping[str, Any], stages: Sequence[Mapping[str, Any] | MethodConfig]) -> None:
    """Make a model that was compressed in memory what a reloaded one is: `save_pretrained` then writes the table."""
    CompactQuantizer(CompactConfig(modules=modules, stages=stages), pre_quantized=True).attach_(model)


def set_bits(model: nn.Module, bits: int) -> None:
    """Read every nested layer of a model at `bits` bits from now on.

    Nothing is computed and nothing is lost: the container stays, a view is taken from it in each forward pass, and
    `save_pretrained` writes the same tensors whatever the view is. It writes the view into `config.json` too, so that the
    folder loads as it was saved. Embeddings and heads stay at eight bits. A model that was loaded or compressed with nested
    layers has this function as `model.set_bits(bits)` as well.

    Args:
        model: with layers of the method `nested`.
        bits: 8, 6, 4 or 3.

    Raises:
        ConfigError: the layers have no such view; then none is changed.
        UnsupportedModel: the model has no nested layers.

    >>> set_bits(nn.Linear(2, 2), 4)
    Traceback (most recent call last):
    hf_compact.errors.UnsupportedModel: set_bits needs nested layers, and this Linear has none: compress it with method nested
    """
    layers = _switchable(model)
    if not layers:
        raise UnsupportedModel(
            f"set_bits needs nested layers, and this {type(model).__name__} has none: compress it with method nested"
        )
    for layer in layers:
        if bits not in layer.widths:
            raise ConfigError(f"bits must be one of {', '.join(map(str, layer.widths))}, got {bits!r}")
    for layer in layers:
        layer.bits = bits
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    for spec in config.modules.values() if isinstance(config, CompactConfig) else ():
        if len(spec.get("widths", ())) > 1:
            spec["bits"] = bits


def _switchable(model: nn.Module) -> list[SwitchableModule]:
    return [module for module in model.modules() if isinstance(module, SwitchableModule) and len(module.widths) > 1]


def set_rank(model: PreTrainedModel, share: float) -> None:
    """Cut every low-rank layer to that share of its rank (1 at least), in place; `save_pretrained` then saves the cut model.

    Raises:
        ConfigError: the share is not in (0, 1].
        UnsupportedModel: a layer's components have no order.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"share must be in (0, 1], got {share}")
    table = model.config.quantization_config.modules
    own = {
        name: names_in(model, {name: spec}) for name, spec in table.items() if "tied_to" not in spec
    }  # what is tied is no train
    named = {name: model.get_submodule(mine) for name, found in own.items() for mine in found}
    cut = {name: module for name, module in named.items() if hasattr(module, "set_rank")}
    for name, module in cut.items():
        if not module.is_ordered:
            raise UnsupportedModel(f"{name} has no order of ranks: decompose with is_pivoted false, and quantize after the cut")
    for name, module in cut.items():
        module.set_rank(max(1, round(share * module.ranks[0])))
        table[name] |= module.spec()
    for name, module in model.named_modules():
        if module in cut.values():
            tie_parts_(model, name)


def _offer_switches_(model: PreTrainedModel) -> None:
    """Give the model its own `push_to_hub`, and `set_bits` and `set_rank` where it has layers for them.

    They are attributes of this one object.
    """
    model.push_to_hub = _Switch("push_to_hub", push_model, model)
    if _switchable(model):
        model.set_bits = _Switch("set_bits", set_bits, model)
    if any(hasattr(module, "set_rank") for module in model.modules()):
        model.set_rank = _Switch("set_rank", set_rank, model)


class _Switch:
    """A function of one model, copied and pickled along with it; a strong reference would keep the model from being freed."""

    def __init__(self, name: str, function: Callable[..., Any], model: PreTrainedModel) -> None:
        self.name, self.function, self.model = name, function, weakref.ref(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the function.

        Raises:
            ConfigError: nothing but this call holds the model.
        """
        model = self.model()
        if model is None:
            raise ConfigError(f"the model of {self.name} is gone: keep it in a variable while its {self.name} is called")
        return self.function(model, *args, **kwargs)

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return _Switch, (self.name, self.function, self.model())


def set_ties_(model: PreTrainedModel, modules: Mapping[str, Any]) -> None:
    """Take compressed tied modules out of transformers' own tying, which knows parameters only; put shared parameters in."""
    ours = {f"{name}.weight" for name, spec in modules.items() if "tied_to" in spec}
    ties = {key: value for key, value in model.all_tied_weights_keys.items() if key not in ours}
    for name, module in model.named_modules():
        for part, source in tied_parts(module).items():
            if isinstance(module.get_submodule(part), nn.Linear) and isinstance(model.get_submodule(source), nn.Linear):
                ties[f"{name}.{part}.weight"] = f"{source}.weight"
    model.all_tied_weights_keys = ties


def expect_(model: PreTrainedModel, table: Mapping[str, Any], files: Sequence[Path]) -> None:
    """Put the empty compressed modules of a table into a skeleton, and check the files that are to fill it.

    Raises:
        FormatError: the table does not fit the model, or the files do not fit the table.
    """
    modules = names_in(model, table)
    if not modules:
        raise FormatError("quantization_config.modules must name the compressed modules, got none that the model has")
    rebuild_(model, modules, LAYERS)
    set_ties_(model, modules)
    if files:
        check_files(model, modules, files)


def outermost(names: Iterable[str]) -> list[str]:
    """The names that are no part of another one.

    >>> outermost(["a.up", "a.up.core0", "a.upper"])
    ['a.up', 'a.upper']
    """
    known = set(names)
    parents = {name: [name[:i] for i, letter in enumerate(name) if letter == "."] for name in known}
    return [name for name in dict.fromkeys(names) if known.isdisjoint(parents[name])]


def names_in(model: PreTrainedModel, modules: Mapping[str, Any]) -> dict[str, Any]:
    """The table as another head class of the same base model names it.

    `AutoModel` on a causal model's folder drops the base prefix; modules outside the base model that the class does
    not have (a head) are left out.

    Raises:
        FormatError: a module of the base model is missing.
    """
    prefix = model.base_model_prefix + "."
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    is_base = model.base_model is model
    wholes = outermost(modules)

    def rename(name: str) -> str:
        if any(whole in known for whole in wholes if f"{name}.".startswith(f"{whole}.")):
            return name
        return name.removeprefix(prefix) if is_base else prefix + name

    renamed: dict[str, Any] = {}
    for name in sorted(modules, key=lambda name: name not in wholes):
        spec, new = modules[name], rename(name)
        if new in known or any(new.startswith(f"{built}.") for built in renamed):
            tied = {"tied_to": rename(spec["tied_to"])} if "tied_to" in spec else {}
            if tied and not (tied["tied_to"] in known or any(tied["tied_to"].startswith(f"{built}.") for built in renamed)):
                raise FormatError(
                    f"modules[{name!r}].tied_to names {spec['tied_to']!r}, which {type(model).__name__} does not have"
                )
            if isinstance(spec.get("ties"), Mapping):
                tied["ties"] = {part: rename(str(source)) for part, source in spec["ties"].items()}
            renamed[new] = {**spec, **tied}
        elif name.startswith(prefix) or (not is_base and "tied_to" not in spec):
            raise FormatError(f"modules[{name!r}] does not exist in {type(model).__name__}")
        else:
            logger.info("%s has no %s; its table entry is left out", type(model).__name__, name)
    return renamed


def check_files(model: PreTrainedModel, modules: Mapping[str, Any], files: Sequence[Path]) -> None:
    """Compare the headers of the files with the rebuilt model that they are about to fill.

    The class that wrote the folder must find exactly its own tensors. Another class may have a head or a pooler that is
    new, and leave out what it does not have.

    Raises:
        FormatError: a tensor is missing, unexpected, or has another dtype or shape; or a file is damaged.
    """
    headers = TensorSource(files).rename_for(model).headers()
    expected = model.state_dict()
    is_own = type(model).__name__ in (model.config.architectures or [])
    prefix = "" if model.base_model is model else model.base_model_prefix + "."
    for key, (dtype, shape, _) in headers.items():
        owner, _, leaf = key.rpartition(".")
        if key not in expected:
            if owner in modules:
                raise FormatError(
                    f"{key} is in the files, but a {modules[owner]['layer']} with these settings has no such tensor"
                )
            if is_own and not _matches(key, model._keys_to_ignore_on_load_unexpected):
                raise FormatError(f"{key} is in the files, but {type(model).__name__} has no such tensor")
            continue
        if tuple(shape) != tuple(expected[key].shape) and (owner in modules or key.startswith(prefix)):
            raise FormatError(f"{key} must have the shape {list(expected[key].shape)}, the file has {shape}")
        if owner in modules and leaf in model.get_submodule(owner)._buffers and DTYPES[dtype] != expected[key].dtype:
            raise FormatError(f"{key} must be {expected[key].dtype}, the file has {dtype}")
    missing = [key for key in expected if key not in headers and key not in model.all_tied_weights_keys]
    missing = [key for key in missing if not _matches(key, model._keys_to_ignore_on_load_missing)]
    if missing and not is_own:
        own = _own_keys(model)
        missing = [key for key in missing if key.rpartition(".")[0] in modules or key.removeprefix(prefix) in own]
    if missing:
        raise FormatError(f"{missing[0]} is missing from the files of the model")


def _own_keys(model: PreTrainedModel) -> set[str]:
    """Tensor names, below the base model, of the class that wrote the folder."""
    cls = getattr(transformers, (model.config.architectures or [""])[0], type(model))
    with torch.device("meta"):
        own = cls(model.config)
    return {key.removeprefix(own.base_model_prefix + ".") for key in own.state_dict()}


def _matches(key: str, patterns: Iterable[str] | None) -> bool:
    return any(re.search(pattern, key) for pattern in patterns or ())
