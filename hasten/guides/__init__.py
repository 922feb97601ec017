"""Guides: one method per file, each a frozen dataclass whose `wrap(denoiser)` returns a steered denoiser."""

from __future__ import annotations

from .cfg import CFG
from .distribution import Distribution
from .dynamic_threshold import DynamicThreshold
from .interval import Interval
from .rescale import Rescale

__all__ = ["CFG", "Distribution", "DynamicThreshold", "Interval", "Rescale"]
