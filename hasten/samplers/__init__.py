"""Samplers: one method a file, each a frozen dataclass that writes its paper's algorithm as a coroutine."""

from __future__ import annotations

from .adaptive import AdaptiveSDE
from .analytic import AnalyticDPM
from .consistency import Consistency
from .ddim import DDIM, invert
from .ddpm import DDPM
from .deis import DEIS
from .dpm import DPMSolver
from .fast import FastDPM
from .heun import Heun
from .noise_level import NoiseLevel
from .picard import Picard
from .plms import PLMS
from .preconditioned import Preconditioned
from .predictor_corrector import PredictorCorrector
from .probability_flow import ProbabilityFlow
from .sa import SASolver
from .sn import SNDPM
from .stochastic_distilled import StochasticDistilled
from .unipc import UniPC

__all__ = [
    "DDIM", "DDPM", "DEIS", "PLMS", "SNDPM", "AdaptiveSDE", "AnalyticDPM", "Consistency", "DPMSolver", "FastDPM",
    "Heun", "NoiseLevel", "Picard", "Preconditioned", "PredictorCorrector", "ProbabilityFlow", "SASolver",
    "StochasticDistilled", "UniPC", "invert",
]  # fmt: skip
