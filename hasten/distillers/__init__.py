"""Distillation: students that need 1 to 16 evaluations where their teacher needs hundreds. One method a file."""

from __future__ import annotations

from ._task import Distiller, Student, Task

__all__ = ["Distiller", "Student", "Task"]
