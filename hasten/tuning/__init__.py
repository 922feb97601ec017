"""Tuning: one method a file, each a frozen dataclass that finds times, coefficients or small networks for one model."""

from __future__ import annotations

from ._cache import remembered
from ._task import Task, Tuned, Tuner

__all__ = ["Task", "Tuned", "Tuner", "remembered"]
