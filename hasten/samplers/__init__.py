"""Samplers: one method a file, each a frozen dataclass that writes its paper's algorithm as a coroutine."""

from __future__ import annotations

from hasten.samplers.ddim import DDIM, invert
from hasten.samplers.ddpm import DDPM
from hasten.samplers.deis import DEIS
from hasten.samplers.dpm import DPMSolver
from hasten.samplers.heun import Heun
from hasten.samplers.plms import PLMS
from hasten.samplers.unipc import UniPC

__all__ = ["DDIM", "DDPM", "DEIS", "DPMSolver", "Heun", "PLMS", "UniPC", "invert"]
