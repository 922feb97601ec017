"""Initialisations: where sampling begins, one method per file, each a frozen dataclass of the form `Start`."""

from __future__ import annotations

from ._base import Start
from .auxiliary import Auxiliary
from .ccdf import CCDF
from .diffuse_vae import DiffuseVAE
from .early_stop import EarlyStop
from .prior import Prior
from .singdiffusion import SingDiffusion
from .temperature import Temperature

__all__ = ["CCDF", "Auxiliary", "DiffuseVAE", "EarlyStop", "Prior", "SingDiffusion", "Start", "Temperature"]
