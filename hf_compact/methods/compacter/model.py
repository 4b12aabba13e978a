"""The tuner: where adapters go, and the slow matrices that all of them share.

PEFT handles everything that lies in its layers. The slow matrices lie beside them in the tuner, so that they are one
parameter for DDP, for FSDP's root unit and in the file; what PEFT does to layers is done to them here.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper, PeftType, register_peft_method
from torch import nn
from transformers import PreTrainedModel

from ...arch import norms, sublayer_outputs
from ...errors import UnsupportedModel
from .config import STORED_TYPE, VARIANTS, CompacterConfig
from .layer import CompacterAdapter, CompacterLayer, device_of, new_slow, width_of


class CompacterModel(BaseTuner):
    """A frozen model with adapters; made by `peft.get_peft_model(model, CompacterConfig(...))`.

    >>> from peft import get_peft_model
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, vocab_size=8, num_attention_heads=1))
    >>> get_peft_model(tiny, CompacterConfig(variant="compacter++")).print_trainable_parameters()
    trainable params: 124 || all params: 724 || trainable%: 17.1271
    """

    prefix = "compacter_"
    tuner_layer_cls = CompacterLayer
    uses_shared_state = True

    def _pre_injection_hook(self, model: nn.Module, config: CompacterConfig, adapter_name: str) -> None:
        """Read the model's parts before anything wraps them."""
        if any(isinstance(module, CompacterLayer) and module.compacter_adapter for module in model.modules()):
            raise UnsupportedModel(
                "the model has Compacter adapters already: call add_adapter of its PeftModel, or unload() first"
            )
        self.compacter_slow = nn.ParameterDict()
        self._outputs = sublayer_outputs(model) if isinstance(model, PreTrainedModel) else {}
        self._norms = norms(model)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; the caller's config stays as it is, and so does what is trained of other adapters."""
        self.peft_config[adapter_name] = copy.copy(self.peft_config[adapter_name])
        trained = {name: slow.requires_grad for name, slow in self.compacter_slow.items()}
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:  # or the next adapter of this name would take over what has been made of this one
            if adapter_name in self.compacter_slow:
                del self.compacter_slow[adapter_name]
            for module in self.modules():
                if isinstance(module, CompacterLayer) and adapter_name in module.compacter_adapter:
                    del module.compacter_adapter[adapter_name]
            raise
        for name, is_trained in trained.items():
            self.compacter_slow[name].requires_grad_(is_trained)

    def _prepare_adapter_config(self, peft_config: CompacterConfig, model_config: dict) -> CompacterConfig:
        if peft_config.target_modules is None:
            roles = VARIANTS[peft_config.variant]
            peft_config.target_modules = [name for name, role in self._outputs.items() if role in roles]
            if not peft_config.target_modules:
                raise UnsupportedModel(
                    f"compacter.target_modules must name the last Linear of each sub-layer: model_type "
                    f"{model_config.get('model_type')!r} is not in the table of families"
                )
        if peft_config.train_layer_norm:
            chosen = tuple(peft_config.modules_to_save or ())
            peft_config.modules_to_save = [*chosen, *(name for name in self._norms if not _lies_in(name, chosen))]
        return peft_config

    def _create_and_replace(
        self, peft_config: CompacterConfig, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        current_key: str, parameter_name: str | None = None,
    ) -> None:  # fmt: skip
        layer = target if isinstance(target, CompacterLayer) else CompacterLayer(target).train(target.training)
        base = layer.get_base_layer()
        width, device = width_of(base), device_of(base)
        if width is None:
            raise UnsupportedModel(f"compacter.target_modules must name linear maps, {current_key} is a {type(base).__name__}")
        shared = None
        if peft_config.kind == "phm" and peft_config.shared_slow:
            if adapter_name not in self.compacter_slow:
                self.compacter_slow[adapter_name] = new_slow(peft_config, device)
            shared = (self.compacter_slow, adapter_name)
        layer.compacter_adapter[adapter_name] = CompacterAdapter(width, peft_config, shared, device).train(layer.training)
        if layer is not target:
            setattr(parent, target_name, layer)

    def merge_cache(self) -> None:
        """Build the dense maps of all adapters once, for decoding without gradients; `train()` drops them again."""
        for module in self.modules():
            if isinstance(module, CompacterAdapter):
                module.eval().merge_cache_(self.model.dtype)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters, and train them unless in inference mode."""
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._train_slow(not inference_mode)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self._train_slow(enabled)

    def _train_slow(self, is_trained: bool) -> None:
        """Train the slow matrices of active adapters, or of none."""
        for name, slow in self.compacter_slow.items():
            slow.requires_grad_(is_trained and name in self.active_adapters)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train some adapters or not, whichever are active."""
        super().set_requires_grad(adapter_names, requires_grad)
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name in self.compacter_slow:
                self.compacter_slow[name].requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; another one becomes active if it was."""
        is_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        if adapter_name in self.compacter_slow:
            del self.compacter_slow[adapter_name]
        if is_active and self.peft_config:  # PEFT asks the first layer, which may have had this adapter only
            self.set_adapter(self.active_adapters or next(iter(self.peft_config)))

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Iterator[None]:
        """Refuse what PEFT would leave out of account: all rows would go through the active adapters."""
        if adapter_names is not None:
            raise UnsupportedModel(
                "adapter_names, an adapter for each row, cannot be had with Compacter: call set_adapter for each"
            )
        yield

    def unload(self) -> nn.Module:
        """The base model, with its own norms: PEFT would leave trained copies behind, as it does with a new head."""
        for name in self._norms:
            module = self.model.get_submodule(name)
            if isinstance(module, ModulesToSaveWrapper):
                self.model.set_submodule(name, module.original_module)
        return super().unload()

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put a module back; PEFT would copy its `weight` too, which a head of several layers lacks."""
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(
            "a Compacter adapter has a nonlinearity between its two maps, so no weight of the model can take it in: "
            "keep the adapter, or drop it with unload(); merge_cache() makes decoding faster"
        )


def _lies_in(name: str, chosen: tuple[str, ...]) -> bool:
    """Whether the module or one that holds it is copied whole already; PEFT compares the ends of names."""
    parts = name.split(".")
    return any(".".join(parts[:depth]).endswith(chosen) for depth in range(1, len(parts) + 1))


def register() -> None:
    """Make PEFT know the method: its enumeration of types is closed, so a member is put into it."""
    if hasattr(PeftType, "COMPACTER"):
        return
    member = str.__new__(PeftType, "COMPACTER")
    member._name_ = member._value_ = "COMPACTER"
    PeftType.COMPACTER = member
    PeftType._member_names_.append("COMPACTER")
    PeftType._member_map_["COMPACTER"] = PeftType._value2member_map_["COMPACTER"] = member
    register_peft_method(name="compacter", config_cls=CompacterConfig, model_cls=CompacterModel, prefix=CompacterModel.prefix)
    PEFT_TYPE_TO_CONFIG_MAPPING[STORED_TYPE] = CompacterConfig


register()
