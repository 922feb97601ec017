"""Samplers: one method a file, each a frozen dataclass that writes its paper's algorithm as a coroutine."""

from __future__ import annotations

from hasten.samplers.adaptive import AdaptiveSDE
from hasten.samplers.analytic import AnalyticDPM
from hasten.samplers.consistency import Consistency
from hasten.samplers.ddim import DDIM, invert
from hasten.samplers.ddpm import DDPM
from hasten.samplers.deis import DEIS
from hasten.samplers.dpm import DPMSolver
from hasten.samplers.fast import FastDPM
from hasten.samplers.heun import Heun
from hasten.samplers.noise_level import NoiseLevel
from hasten.samplers.picard import Picard
from hasten.samplers.plms import PLMS
from hasten.samplers.preconditioned import Preconditioned
from hasten.samplers.predictor_corrector import PredictorCorrector
from hasten.samplers.probability_flow import ProbabilityFlow
from hasten.samplers.sa import SASolver
from hasten.samplers.sn import SNDPM
from hasten.samplers.stochastic_distilled import StochasticDistilled
from hasten.samplers.unipc import UniPC

__all__ = [
    "DDIM", "DDPM", "DEIS", "PLMS", "SNDPM", "AdaptiveSDE", "AnalyticDPM", "Consistency", "DPMSolver", "FastDPM",
    "Heun", "NoiseLevel", "Picard", "Preconditioned", "PredictorCorrector", "ProbabilityFlow", "SASolver",
    "StochasticDistilled", "UniPC", "invert",
]  # fmt: skip
