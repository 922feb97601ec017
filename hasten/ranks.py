"""Deprecated: `hasten.distributed.ranks`."""

from .utils.deprecation import forward

__getattr__ = forward(__name__, "hasten.distributed.ranks")
