"""Initialisations: where sampling begins, one method per file, each a frozen dataclass of the form `Start`."""

from __future__ import annotations

from ._base import Start
from .auxiliary import Auxiliary
from .ccdf import CCDF
from .singdiffusion import SingDiffusion

__all__ = ["CCDF", "Auxiliary", "SingDiffusion", "Start"]
