"""Distillation: students that need 1 to 16 model evaluations where their teacher needs hundreds. One method a file."""

from __future__ import annotations

import warnings
from typing import Any

from ._task import Distiller, DistillTask, Student

__all__ = ["DistillTask", "Distiller", "Student"]


def __getattr__(name: str) -> Any:
    if name == "Task":
        warnings.warn("hasten.distillers.Task is now DistillTask", DeprecationWarning, stacklevel=2)
        return DistillTask
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
