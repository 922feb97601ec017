"""Tuning methods, one a file: frozen dataclasses that fit times, coefficients or small networks to one model."""

from __future__ import annotations

import warnings
from typing import Any

from ._cache import cached_result
from ._task import Tuned, Tuner, TuningTask

__all__ = ["Tuned", "Tuner", "TuningTask", "cached_result"]

RENAMED: dict[str, Any] = {"Task": TuningTask, "remembered": cached_result}


def __getattr__(name: str) -> Any:
    if name not in RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    new = RENAMED[name]
    warnings.warn(f"{__name__}.{name} is now {new.__name__}", DeprecationWarning, stacklevel=2)
    return new
