"""Noise schedules: continuous ones by formula, and tables of a network's own steps."""

from __future__ import annotations

from .base import Schedule
from .continuous import EDM, VE, Flow, SubVP, VPCosine, VPLinear
from .discrete import Discrete, rescale_zero_snr
from .serialize import schedule_from_dict
from .truncated import Truncated

__all__ = [
    "EDM",
    "VE",
    "Discrete",
    "Flow",
    "Schedule",
    "SubVP",
    "Truncated",
    "VPCosine",
    "VPLinear",
    "rescale_zero_snr",
    "schedule_from_dict",
]
