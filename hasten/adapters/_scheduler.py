"""Deprecated: `hasten.adapters.diffusers.scheduler_class`, for pipelines that were saved when it lay here."""

from ..utils.deprecation import forward

__getattr__ = forward(__name__, "hasten.adapters.diffusers.scheduler_class")
