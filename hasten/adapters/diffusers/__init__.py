"""Adapters for `diffusers`: pipelines as models, samplers as schedulers, accelerated pipelines."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .acceleration import accelerate, accelerate_pipeline
    from .pipelines import load_pipeline
    from .quantized_pipelines import open_quantized
    from .scheduler import as_scheduler
    from .schedules import times_like

__all__ = ["accelerate", "accelerate_pipeline", "as_scheduler", "load_pipeline", "open_quantized", "times_like"]

_MODULES = {
    "accelerate": "acceleration",
    "accelerate_pipeline": "acceleration",
    "as_scheduler": "scheduler",
    "load_pipeline": "pipelines",
    "open_quantized": "quantized_pipelines",
    "times_like": "schedules",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
