"""`diffusers`, both ways: pipelines as models of hasten, samplers of hasten as schedulers, accelerated pipelines."""

from __future__ import annotations

from .pipelines import accelerate, accelerate_pipeline, as_scheduler, load_pipeline
from .schedules import times_like

__all__ = ["accelerate", "accelerate_pipeline", "as_scheduler", "load_pipeline", "times_like"]
