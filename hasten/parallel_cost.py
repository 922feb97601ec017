"""Deprecated: `hasten.performance.parallel`."""

from .utils.deprecation import forward

__getattr__ = forward(__name__, "hasten.performance.parallel")
