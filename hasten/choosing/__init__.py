"""The fastest way to sample a model within a loss of quality, found by measurement, with a certificate."""

from __future__ import annotations

from .runner import choose

__all__ = ["choose"]
