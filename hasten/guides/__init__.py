"""Guides: one method per file, each a frozen dataclass whose `wrap(denoiser)` returns a steered denoiser."""

from __future__ import annotations

from .apg import APG
from .autoguidance import AutoGuidance
from .cfg import CFG
from .cfg_zero import CFGZero
from .delta_reuse import DeltaReuse
from .distribution import Distribution
from .dynamic_threshold import DynamicThreshold
from .interval import Interval
from .perturbed_attention import PerturbedAttention
from .rescale import Rescale

__all__ = [
    "APG",
    "CFG",
    "AutoGuidance",
    "CFGZero",
    "DeltaReuse",
    "Distribution",
    "DynamicThreshold",
    "Interval",
    "PerturbedAttention",
    "Rescale",
]
