"""Compression of transformers models: one recipe or one callback, one folder that `from_pretrained` loads.

Importing this package registers the `hf_compact` quantization method with transformers and Compacter with PEFT.
"""

from .api import compare, compress, export, inspect_folder, plan, plan_budget, profile, push, recover
from .benchmark import Protocol, evaluate, measure
from .config import CalibrationConfig, Recipe
from .errors import CompactError
from .hf.quantizer import CompactConfig, set_bits
from .methods.codebook import CodebookConfig
from .methods.compacter import CompacterConfig, CompacterModel
from .methods.correction import CorrectionConfig
from .methods.distillation import DistillationCallback
from .methods.entropy import EntropyConfig
from .methods.nested import NestedConfig
from .methods.one_bit_adam import OneBitAdam, OneBitAdamCallback, OneBitAdamConfig
from .methods.pruning import HessoCallback, HessoConfig, PruningConfig, drop_experts_
from .methods.sorted_net import SortedNetCallback, SortedNetConfig, extract, sort_units_
from .methods.sparsity import MaskCallback, MaskTraining, SparsityConfig
from .methods.tensor_network import TensorNetworkCallback, TensorNetworkConfig
from .methods.ternary import TernaryCallback, TernaryConfig
from .report import CommReport, Report
from .results import Results
from .scoring import Windows
from .speed import SpeedConfig
from .version import __version__

__all__ = [
    "CalibrationConfig",
    "CodebookConfig",
    "CommReport",
    "CompactConfig",
    "CompactError",
    "CompacterConfig",
    "CompacterModel",
    "CorrectionConfig",
    "DistillationCallback",
    "EntropyConfig",
    "HessoCallback",
    "HessoConfig",
    "MaskCallback",
    "MaskTraining",
    "NestedConfig",
    "OneBitAdam",
    "OneBitAdamCallback",
    "OneBitAdamConfig",
    "Protocol",
    "PruningConfig",
    "Recipe",
    "Report",
    "Results",
    "SortedNetCallback",
    "SortedNetConfig",
    "SparsityConfig",
    "SpeedConfig",
    "TensorNetworkCallback",
    "TensorNetworkConfig",
    "TernaryCallback",
    "TernaryConfig",
    "Windows",
    "__version__",
    "compare",
    "compress",
    "drop_experts_",
    "evaluate",
    "export",
    "extract",
    "inspect_folder",
    "measure",
    "plan",
    "plan_budget",
    "profile",
    "push",
    "recover",
    "set_bits",
    "sort_units_",
]
