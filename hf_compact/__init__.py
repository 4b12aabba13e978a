"""Compression of transformers models: one recipe or one callback, one folder that `from_pretrained` loads.

Importing this package registers the `hf_compact` quantization method with transformers.
"""

from .api import compress, evaluate, export, inspect_folder, plan, profile
from .config import CalibrationConfig, Recipe
from .errors import CompactError
from .hf.quantizer import CompactConfig
from .methods.codebook import CodebookConfig
from .methods.tensor_network import TensorNetworkCallback, TensorNetworkConfig
from .report import Report
from .version import __version__

__all__ = [
    "CalibrationConfig",
    "CodebookConfig",
    "CompactConfig",
    "CompactError",
    "Recipe",
    "Report",
    "TensorNetworkCallback",
    "TensorNetworkConfig",
    "__version__",
    "compress",
    "evaluate",
    "export",
    "inspect_folder",
    "plan",
    "profile",
]
