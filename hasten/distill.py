"""Deprecated: `hasten.workflows.distill`."""

from .utils.deprecation import forward

__getattr__ = forward(__name__, "hasten.workflows.distill")
