"""Train ordinary diffusion."""

from __future__ import annotations

from dataclasses import dataclass

from ..denoiser import Denoiser
from ..predictions import V
from ..schedules.continuous import VPCosine
from ..train.sources import Data
from ._base import MakeUNet, TrainProcess


@dataclass(frozen=True)
class Diffusion(TrainProcess):
    """v-prediction on the cosine path `x_t = cos(pi t/2) x + sin(pi t/2) eps`: the default.

    References:
        Salimans, Ho 2022, arXiv:2202.00512.
    """

    def denoiser(self, data: Data, unet: MakeUNet) -> Denoiser:
        return Denoiser(unet(), VPCosine(offset=0.0), V())
