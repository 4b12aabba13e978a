"""Compression of transformers models: one recipe or one callback, one folder that `from_pretrained` loads.

Importing this package registers the `hf_compact` quantization method with transformers and Compacter with PEFT.
"""

from .api import compress, evaluate, export, inspect_folder, plan, plan_budget, profile, push, recover
from .config import CalibrationConfig, Recipe
from .errors import CompactError
from .hf.quantizer import CompactConfig, set_bits
from .methods.codebook import CodebookConfig
from .methods.compacter import CompacterConfig, CompacterModel
from .methods.distillation import DistillationCallback
from .methods.one_bit_adam import OneBitAdam, OneBitAdamCallback, OneBitAdamConfig
from .methods.pruning import HessoCallback, HessoConfig, PruningConfig
from .methods.tensor_network import TensorNetworkCallback, TensorNetworkConfig
from .methods.ternary import TernaryCallback, TernaryConfig
from .report import CommReport, Report
from .version import __version__

__all__ = [
    "CalibrationConfig",
    "CodebookConfig",
    "CommReport",
    "CompactConfig",
    "CompactError",
    "CompacterConfig",
    "CompacterModel",
    "DistillationCallback",
    "HessoCallback",
    "HessoConfig",
    "OneBitAdam",
    "OneBitAdamCallback",
    "OneBitAdamConfig",
    "PruningConfig",
    "Recipe",
    "Report",
    "TensorNetworkCallback",
    "TensorNetworkConfig",
    "TernaryCallback",
    "TernaryConfig",
    "__version__",
    "compress",
    "evaluate",
    "export",
    "inspect_folder",
    "plan",
    "plan_budget",
    "profile",
    "push",
    "recover",
    "set_bits",
]
