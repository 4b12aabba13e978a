"""Distillation in a stock Trainer, from a teacher or from what was stored of one."""

from .apply import distill_blocks_
from .cache import TeacherCache, write_cache
from .callback import DistillationCallback
from .config import DistillationTerms

__all__ = ["DistillationCallback", "DistillationTerms", "TeacherCache", "distill_blocks_", "write_cache"]
