"""`diffusers`, both ways: pipelines as models of hasten, samplers of hasten as schedulers, accelerated pipelines."""

from __future__ import annotations

from .accelerate import accelerate, accelerate_pipeline
from .pipelines import load_pipeline
from .scheduler import as_scheduler
from .schedules import times_like

__all__ = ["accelerate", "accelerate_pipeline", "as_scheduler", "load_pipeline", "times_like"]
