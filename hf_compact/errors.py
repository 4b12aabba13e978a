"""Every error a user can cause, as one small tree: the CLI prints the message alone and exits with 2.

A message names the field or module, the value seen and the rule it breaks.
"""


class CompactError(Exception):
    """Base of all errors that hf_compact raises on purpose."""


class ConfigError(CompactError, ValueError):
    """A recipe or a method config has an unknown key, a wrong type or a value out of range."""


class NothingMatched(CompactError, ValueError):
    """A selection matched no module at all, which is never what its author meant."""


class UnsupportedModel(CompactError, ValueError):
    """The model has a part that cannot be compressed correctly, so nothing is compressed."""


class CalibrationError(CompactError, ValueError):
    """The calibration text is missing, empty, or too short for the requested sequences."""


class NumericalError(CompactError, ArithmeticError):
    """A weight, an activation or a solution is not finite."""


class FormatError(CompactError, ValueError):
    """A folder on disk does not hold what its config says it holds."""


class OutputError(CompactError, OSError):
    """The output folder cannot be written, is not empty, or belongs to another run."""


class VerificationError(CompactError, RuntimeError):
    """The written folder does not reload to the model that was compressed."""
