"""One table of module roles per model family: where the blocks are and what each Linear in a block does.

A family that is not in the table falls back to structure (the lists of equal modules that hold Linears) and says so.
Paths are relative to the base model, so that a bare encoder and a model with a head are read by the same row.
"""

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from transformers.pytorch_utils import Conv1D

from .errors import UnsupportedModel

logger = logging.getLogger(__name__)

_LLAMA = {
    "self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v", "self_attn.o_proj": "o",
    "mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down",
}  # fmt: skip
_GPT2 = {"attn.c_attn": "qkv", "attn.c_proj": "o", "mlp.c_fc": "up", "mlp.c_proj": "down"}
_GPT_NEOX = {
    "attention.query_key_value": "qkv", "attention.dense": "o", "mlp.dense_h_to_4h": "up", "mlp.dense_4h_to_h": "down",
}  # fmt: skip
_OPT = {
    "self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v", "self_attn.out_proj": "o",
    "fc1": "up", "fc2": "down",
}  # fmt: skip
_BERT = {
    "attention.self.query": "q", "attention.self.key": "k", "attention.self.value": "v", "attention.output.dense": "o",
    "intermediate.dense": "up", "output.dense": "down",
}  # fmt: skip
_VIT = {
    "attention.q_proj": "q", "attention.k_proj": "k", "attention.v_proj": "v", "attention.o_proj": "o",
    "mlp.fc1": "up", "mlp.fc2": "down",
}  # fmt: skip
_T5 = {f"layer.0.SelfAttention.{role}": role for role in "qkvo"}
_T5 |= {f"layer.1.EncDecAttention.{role}": f"cross_{role}" for role in "qkvo"}
_T5 |= {
    f"layer.{i}.DenseReluDense.{name}": role
    for i in (1, 2)
    for name, role in {"wi": "up", "wi_0": "gate", "wi_1": "up", "wo": "down"}.items()
}

#: `config.model_type` -> (paths of the block lists below the base model, in the order they run; role by name in a block)
FAMILIES: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma3_text"), (("layers",), _LLAMA)),
    "gemma3": (("language_model.layers",), _LLAMA),
    "gpt2": (("h",), _GPT2),
    "gpt_neox": (("layers",), _GPT_NEOX),
    "opt": (("decoder.layers",), _OPT),
    "bert": (("encoder.layer",), _BERT),
    "vit": (("layers",), _VIT),
    "t5": (("encoder.block", "decoder.block"), _T5),
}


@dataclass(frozen=True)
class Architecture:
    """Where the compressible parts of one model are; all names are whole module names."""

    family: str
    """`config.model_type`."""
    is_known: bool
    """Whether the family is in the table; if not, the stacks were found by structure and roles are unknown."""
    stacks: tuple[tuple[str, ...], ...]
    """Block names, stack by stack in the order they run (an encoder before its decoder)."""
    roles: dict[str, str] = field(repr=False)
    """Every Linear inside a block -> its role: q, k, v, qkv, o, gate, up, down, cross_q …, or `linear`."""
    embedding: str | None
    """The token embedding."""
    tied: tuple[str, ...]
    """Modules whose weight is the embedding's own: the head, other embeddings."""
    head: str | None
    """The output projection onto the vocabulary, where it has a weight of its own."""

    @property
    def blocks(self) -> tuple[str, ...]:
        """All block names in running order."""
        return tuple(name for stack in self.stacks for name in stack)

    def targets(self, block: str) -> list[str]:
        """The Linears inside a block, in definition order."""
        return [name for name in self.roles if name.startswith(block + ".")]

    def mask_of(self, block: str, name: str | None = None) -> str:
        """The model's input that says which positions of a block, or of a Linear's inputs, are padding.

        Cross attention's k and v read the encoder's states.
        """
        is_decoder = len(self.stacks) > 1 and block in self.stacks[-1]
        is_own = self.roles.get(name or "") not in ("cross_k", "cross_v")
        return "decoder_attention_mask" if is_decoder and is_own else "attention_mask"


def describe(model: PreTrainedModel) -> Architecture:
    """Find blocks, roles, embedding and tied modules of a model (also on meta).

    Raises:
        UnsupportedModel: no blocks are found, or a block holds fused expert weights.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2, vocab_size=8, num_attention_heads=1))
    >>> describe(tiny).blocks
    ('model.layers.0', 'model.layers.1')
    """
    family = model.config.model_type
    base = model.base_model
    prefix = next(name for name, module in model.named_modules() if module is base)
    prefix = prefix + "." if prefix else ""
    if family in FAMILIES:
        paths, table = FAMILIES[family]
        paths = tuple(prefix + path for path in paths if _has(base, path))
    else:
        paths, table = _block_lists(model), {}
        logger.warning("model_type %r is not in the table of families; blocks found by structure: %s", family, ", ".join(paths))
    if not paths:
        raise UnsupportedModel(f"model_type {family!r}: no list of blocks that hold Linears was found")
    stacks = tuple(tuple(f"{path}.{i}" for i in range(len(model.get_submodule(path)))) for path in paths)
    roles: dict[str, str] = {}
    for block in (name for stack in stacks for name in stack):
        module = model.get_submodule(block)
        _refuse_fused_experts(block, module)
        for name, child in module.named_modules():
            if isinstance(child, nn.Linear | Conv1D):
                roles[f"{block}.{name}"] = table.get(name, "linear")
    embedding, tied = _embedding(model)
    output = model.get_output_embeddings()
    head = next((name for name, m in model.named_modules() if m is output and isinstance(m, nn.Linear)), None)
    return Architecture(family, family in FAMILIES, stacks, roles, embedding, tied, None if head in tied else head)


def prediction_of(output: ModelOutput | tuple[Any, ...]) -> Tensor:
    """What a model gives first for its inputs: logits, or hidden states where it has no head; not the loss, which `labels` put before.

    >>> from transformers.modeling_outputs import CausalLMOutput
    >>> prediction_of(CausalLMOutput(loss=torch.zeros(()), logits=torch.ones(1, 2))).shape
    torch.Size([1, 2])
    """
    return output[0] if isinstance(output, tuple) else next(value for key, value in output.items() if key != "loss")


def sublayer_outputs(model: PreTrainedModel) -> dict[str, str]:
    """The last map of every self-attention and feed-forward sub-layer -> its role, `o` or `down`; empty for an unknown family.

    Found by name, so that compressed and wrapped modules count too.

    Raises:
        UnsupportedModel: as of `describe`.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, vocab_size=8, num_attention_heads=1))
    >>> sublayer_outputs(tiny)
    {'model.layers.0.self_attn.o_proj': 'o', 'model.layers.0.mlp.down_proj': 'down'}
    """
    if model.config.model_type not in FAMILIES:
        return {}
    arch = describe(model)
    table = FAMILIES[arch.family][1]
    return {
        f"{block}.{name}": role
        for block in arch.blocks
        for name, role in table.items()
        if role in ("o", "down") and _has(model, f"{block}.{name}")
    }


def norms(model: nn.Module) -> list[str]:
    """Names of the layer norms: modules called so whose own parameters are vectors.

    >>> norms(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
    ['1']
    """
    return [
        name
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and (own := list(module.parameters())) and all(p.dim() == 1 for p in own)
    ]


def as_linear(module: nn.Linear | Conv1D) -> nn.Linear:
    """The module itself, or the `nn.Linear` that computes what a GPT-2 `Conv1D` (weight `[in, out]`) does; meta too."""
    if isinstance(module, nn.Linear):
        return module
    linear = nn.Linear(*module.weight.shape, device="meta", dtype=module.weight.dtype)
    linear.weight = nn.Parameter(module.weight.detach().T.contiguous(), requires_grad=module.weight.requires_grad)
    linear.bias = module.bias
    return linear


def dense_shape(module: nn.Module) -> torch.Size:
    """`[out, in]` of a Linear or Conv1D, `[rows, columns]` of an Embedding."""
    shape = module.weight.shape
    return torch.Size(reversed(shape)) if isinstance(module, Conv1D) else shape


def on_meta(module: nn.Module) -> nn.Linear:
    """A Linear of the module's shape that takes no memory."""
    out_features, in_features = dense_shape(module)
    return nn.Linear(in_features, out_features, bias=module.bias is not None, device="meta", dtype=module.weight.dtype)


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def _block_lists(model: nn.Module) -> tuple[str, ...]:
    """Outermost ModuleLists of one class that hold Linears."""
    found: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(path + ".") for path in found) or not len(module):
            continue
        holds_linears = all(any(isinstance(m, nn.Linear | Conv1D) for m in child.modules()) for child in module)
        if holds_linears and len({type(child) for child in module}) == 1 and not isinstance(module[0], nn.Linear):
            found.append(name)
    return tuple(found)


def _refuse_fused_experts(block: str, module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        owner = module.get_submodule(name.rpartition(".")[0])
        if parameter.dim() == 3 and not isinstance(owner, nn.modules.conv._ConvNd):
            raise UnsupportedModel(
                f"{block}.{name} is a fused 3-D weight {list(parameter.shape)} (experts in one tensor); "
                "such models are refused whole rather than half compressed"
            )


def _embedding(model: PreTrainedModel) -> tuple[str | None, tuple[str, ...]]:
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        return None, ()
    if not isinstance(embedding, nn.Embedding):
        return None, ()
    everywhere = dict(model.named_modules(remove_duplicate=False))
    name = next(name for name, module in everywhere.items() if module is embedding)
    # On meta, before loading, weights are not tied yet but already declared.
    declared = {
        target
        for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items()
        if source == f"{name}.weight"
    }
    tied = [
        other
        for other, module in everywhere.items()
        if isinstance(module, nn.Embedding | nn.Linear)
        and other != name
        and (module.weight is embedding.weight or f"{other}.weight" in declared)
    ]
    return name, tuple(tied)
