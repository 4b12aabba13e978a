"""Compression of transformers models: one recipe or one callback, one folder that `from_pretrained` loads.

Importing this package registers the `hf_compact` quantization method with transformers.
"""

from .api import compress, evaluate, inspect_folder, plan
from .config import CalibrationConfig, Recipe
from .errors import CompactError
from .hf.quantizer import CompactConfig
from .methods.codebook import CodebookConfig
from .methods.one_bit_adam import OneBitAdam, OneBitAdamCallback, OneBitAdamConfig
from .report import CommReport, Report
from .version import __version__

__all__ = [
    "CalibrationConfig",
    "CodebookConfig",
    "CommReport",
    "CompactConfig",
    "CompactError",
    "OneBitAdam",
    "OneBitAdamCallback",
    "OneBitAdamConfig",
    "Recipe",
    "Report",
    "__version__",
    "compress",
    "evaluate",
    "inspect_folder",
    "plan",
]
